"""Run a whole study: train and evaluate every cell, skip what is done, write one report."""

import dataclasses
import json
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax

from crossin_jax import config as settings
from crossin_jax import process
from crossin_jax.checkpoint.store import MAY_CHANGE, flatten_dict
from crossin_jax.checks import check
from crossin_jax.config import Cell, Config, Study, UserError
from crossin_jax.data.loader import make_loader
from crossin_jax.data.mixture import Mixture, load_corpora
from crossin_jax.data.pipeline import open_pipeline
from crossin_jax.evaluate import evaluate, evaluate_untuned, write_run
from crossin_jax.evaluation.benchmarks import check_benchmarks
from crossin_jax.evaluation.items import Benchmark
from crossin_jax.evaluation.runner import answer_without_model, load_benchmarks
from crossin_jax.export import export
from crossin_jax.files import content_hash, write_whole
from crossin_jax.ownership import OWNER
from crossin_jax.parallel import hosts
from crossin_jax.parallel.mesh import make_mesh
from crossin_jax.paths import absolute, as_path
from crossin_jax.report.results import read_results, without_repeats, write_results
from crossin_jax.report.summary import UNTUNED, Run
from crossin_jax.report.text import list_parts
from crossin_jax.study.inputs import find_changed_input, identify_inputs
from crossin_jax.study.report import Table, write_study
from crossin_jax.tables import print_parts
from crossin_jax.train import find_folder as find_run
from crossin_jax.train import train
from crossin_jax.training.state import model_spec

FORMAT = 1  # raised when the same settings would give other results
BUDGETS = ("steps", "examples", "tokens")
# what training, export, evaluation and the study itself write into the folder of a cell
WRITTEN = (
    "done.json",
    "checkpoints",
    "damaged-*",
    "earlier-*",
    "config.json",
    "metrics.jsonl",
    "fault.json",
    "tensorboard",
    "wandb",
    "tokenizer",
    "profile",
    "model",
    "evaluation",
)


def run_study(study: Study, chosen: slice = slice(None)) -> list[Run]:
    """Brings the chosen cells up to date; returns the results of every evaluated cell that is."""
    study = check_cells(study)
    keys = cell_keys(study)
    check_folders(study, chosen)
    left = [cell for cell in study.cells[chosen] if not is_done(cell, keys)]
    check_each(study, left, check_benchmarks)
    for cell in study.cells[chosen]:
        done = is_done(cell, keys)
        if not jax.process_index():
            print(
                f"cell {study.cells.index(cell) + 1} of {len(study.cells)}: "
                f"{cell.name}{' is done' * done}",
                file=sys.stderr,
            )
        if not done:
            run_cell(cell, keys, study)
    return read_runs(evaluated(study, keys))


def read_runs(cells: Iterable[Cell]) -> list[Run]:
    """The results of cells; the model before tuning, which several of them hold, is there once."""
    runs = (run for cell in cells for run in read_results(find_folder(cell) / "evaluation"))
    return without_repeats(runs)


def check_cells(study: Study) -> Study:
    """The study with canonical language codes in every cell."""
    configs = check_each(study, study.cells, check)
    cells = [
        dataclasses.replace(cell, config=config)
        for cell, config in zip(study.cells, configs, strict=True)
    ]
    return dataclasses.replace(study, cells=tuple(cells))


def check_each(study: Study, cells: Iterable[Cell], check: Callable[[Config], Any]) -> list[Any]:
    """What a check returns for the configuration of each cell; `UserError` at the first fault, with
    its cell.
    """
    found = []
    for cell in cells:
        try:
            found.append(check(cell.config))
        except UserError as fault:
            raise UserError(f"study {study.name}: cell {cell.name}: {fault}") from None
    return found


def find_folder(cell: Cell) -> Path:
    """The folder of a cell."""
    return find_run(cell.config)


def check_folders(study: Study, chosen: slice) -> None:
    """Refuses folders that two cells share and folders that hold what this study did not make,
    before anything runs.
    """
    report = absolute(study.output_dir)
    seen: dict[Path, str] = {}
    for cell in study.cells:
        folder = find_folder(cell).resolve()
        if report.is_relative_to(folder):
            raise UserError(
                f"study {study.name}: cell {cell.name} has output_dir={folder}, which holds "
                f"{report} of the study\n"
                "give the cell a folder of its own"
            )
        for other, name in seen.items():
            if folder.is_relative_to(other) or other.is_relative_to(folder):
                raise UserError(
                    f"study {study.name}: cells {name} and {cell.name} share a folder: {other} "
                    f"and {folder}"
                    "\ngive each cell a folder of its own"
                )
        seen[folder] = cell.name
    for cell in study.cells[chosen]:
        check_mark(cell, study)


def check_mark(cell: Cell, study: Study) -> None:
    """Refuses a cell's folder that holds files but not this study's mark, key.json."""
    folder = find_folder(cell)
    # The note of an owner is no content: its process may have been killed before it wrote the mark.
    # An audit is none either: `prepare audit` writes it there before anything runs, and it stays.
    if (
        not folder.exists()
        or folder.is_dir()
        and all(path.name in (OWNER, "audit") for path in folder.iterdir())
    ):
        return
    mark = read_mark(folder / "key.json") if folder.is_dir() else None
    if mark is None or mark.get("study", study.name) != study.name:  # early marks name no study
        owner = f"belongs to the study {mark['study']!r}" if mark else "was not made by a study"
        raise UserError(
            f"cell {cell.name}: output_dir={folder} exists and {owner}; nothing was changed\n"
            "move or delete that folder, or give the cell another output_dir"
        )


def evaluated(study: Study, keys: dict[str, str]) -> list[Cell]:
    """The cells whose scores are there."""
    return [
        cell for cell in study.cells if cell.config.evaluation.benchmarks and is_done(cell, keys)
    ]


def is_done(cell: Cell, keys: dict[str, str]) -> bool:
    """Whether a cell's results are those of its present settings and bases, and of the files that
    they name.
    """
    mark = read_mark(find_folder(cell) / "done.json")
    if mark is None or mark["key"] != evaluation_key(cell, keys):
        return False
    return not any(
        find_changed_input(cell.config, part, mark.get("inputs"))
        for part in ("training", "evaluation")
    )


def evaluation_key(cell: Cell, keys: dict[str, str]) -> str:
    """A hash of the trained weights' key and of how they are evaluated."""
    return content_hash([keys[cell.name], settings.to_dict(check(cell.config))["evaluation"]])


def run_cell(cell: Cell, keys: dict[str, str], study: Study) -> None:
    """Trains a cell from its start or from its checkpoint, exports it where others need it, and
    answers its benchmarks.
    """
    for needed in study.cells:
        if needed.name in cell.needs and not is_done(needed, keys):
            number = study.cells.index(needed)
            raise UserError(
                f"cell {cell.name} needs {needed.name}, which is not done; run it first, here or "
                f"on another pod: --cells={number}:{number + 1}"
            )
    folder = find_folder(cell)
    config = resolve_budget(cell)
    check_mark(cell, study)
    with hosts.own_folder(folder):
        mark = read_mark(folder / "key.json") or {}
        changed = find_changed_input(config, "training", mark.get("inputs"))
        if changed and not jax.process_index():
            print(
                f"cell {cell.name}: {changed} changed; it starts from the beginning",
                file=sys.stderr,
            )
        if hosts.any_process(bool(changed) or mark.get("key") != keys[cell.name]):
            # A configuration that cannot run must not cost the results of the one before it.
            open_everything(config)
            hosts.barrier("every process has looked at the folder")
            if not jax.process_index():
                delete_results(folder)
                inputs = identify_inputs(config, "training")
                write_key(folder / "key.json", keys[cell.name], study=study.name, inputs=inputs)
            hosts.barrier("the folder is marked")
        fill_folder(cell, config, folder, keys, as_path(study.output_dir))


def delete_results(folder: Path) -> None:
    """Deletes what a study wrote in a cell's folder; files of others stay."""
    for pattern in WRITTEN:
        for path in folder.glob(pattern):
            process.remove(path)


def fill_folder(
    cell: Cell, config: Config, folder: Path, keys: dict[str, str], shared: Path
) -> None:
    """Trains, exports and evaluates a cell in its folder; `shared` is that of the study."""
    start, cpu = time.time(), time.process_time()
    train(config)
    process.check_stop()
    if cell.exports:
        process.remove(folder / "model")
        export(folder, "hf", folder / "model")
    # Files as they were before they were read: one that changes meanwhile makes the cell run again.
    inputs = (read_mark(folder / "key.json") or {}).get("inputs") or {}
    inputs = inputs | identify_inputs(config, "evaluation")
    if config.evaluation.benchmarks:
        benchmarks = load_benchmarks(config)
        predictions, source = evaluate(config, folder, folder / "evaluation", benchmarks)
        run = Run(config.name, config.seed, predictions, source)
        before = []
        if config.evaluation.untuned:
            # Cells with the same base share its answers.
            before = [evaluate_untuned(config, shared / UNTUNED, benchmarks)]
        write_run(config, run, folder / "evaluation", benchmarks, before=before)
    write_key(
        folder / "done.json",
        evaluation_key(cell, keys),
        inputs=inputs,
        seconds=round(time.time() - start, 1),
        cpu_seconds=round(time.process_time() - cpu, 1),
    )


def open_everything(config: Config) -> None:
    """Raises `UserError` where the model, the data or the benchmarks of a cell cannot be opened."""
    make_mesh(config.mesh)
    model_spec(config)
    corpora = load_corpora(config.data, config.seed)
    Mixture(config.data, corpora, config.seed)
    load_benchmarks(config)


def resolve_budget(cell: Cell) -> Config:
    """The cell's configuration, with the steps that its budget allows."""
    if cell.budget is None:
        return cell.config
    kind, amount = parse_budget(cell.budget)
    steps, config = amount, cell.config
    if kind != "steps":
        data = open_pipeline(config)
        loader = make_loader(
            data.mixture,
            data.renderer,
            config.data,
            batch_size=config.train.batch_size,
            seed=config.seed,
        )
        per_epoch = len(data.mixture) if kind == "examples" else loader.tokens_per_epoch
        steps = max(1, round(amount / per_epoch * loader.steps_per_epoch))
    return dataclasses.replace(config, train=dataclasses.replace(config.train, steps=steps))


def parse_budget(text: str) -> tuple[str, int]:
    """ "tokens=300000" → ("tokens", 300000)."""
    kind, _, amount = text.partition("=")
    if kind not in BUDGETS or not amount.isdigit() or int(amount) < 1:
        raise UserError(
            f"budget={text!r}: give steps, examples or tokens and a number, e.g. "
            "--budget=tokens=300000"
        )
    return kind, int(amount)


def with_budget(study: Study, budget: str) -> Study:
    """The study with the same budget in every cell that is evaluated; models that others start from
    keep theirs.
    """
    parse_budget(budget)
    return dataclasses.replace(
        study,
        cells=tuple(
            dataclasses.replace(cell, budget=budget) if cell.config.evaluation.benchmarks else cell
            for cell in study.cells
        ),
    )


def cell_keys(study: Study) -> dict[str, str]:
    """A hash per cell of everything that decides its trained weights, what it needs included."""
    keys: dict[str, str] = {}
    for cell in check_cells(study).cells:
        missing = [name for name in cell.needs if name not in keys]
        if missing:
            raise UserError(
                f"study {study.name}: cell {cell.name} needs {missing[0]}, which must come "
                "before it"
            )
        decides = {
            name: value
            for name, value in flatten_dict(settings.to_dict(cell.config)).items()
            if not name.startswith(MAY_CHANGE)
        }
        keys[cell.name] = content_hash(
            [
                FORMAT,
                decides,
                [keys[name] for name in cell.needs],
                *([cell.budget] if cell.budget else []),
            ]
        )
    return keys


def read_mark(file: Path) -> dict[str, Any] | None:
    """What `write_key` wrote, or None."""
    try:
        mark = json.loads(file.read_text())
        return mark if isinstance(mark["key"], str) else None
    except (OSError, ValueError, LookupError, TypeError):
        return None


def write_key(file: Path, key: str, **more: Any) -> None:
    """Writes a key, and what else is to be known, for `read_mark`."""
    write_whole(file, json.dumps({"key": key, **more}))


def write_report(study: Study, style: str = "text") -> Path | None:
    """Writes the report of every evaluated cell that is done, prints its tables, and returns its
    page.
    """
    study = check_cells(study)
    keys, out = cell_keys(study), as_path(study.output_dir)
    done = evaluated(study, keys)
    if not done:
        return None
    how = done[0].config.evaluation
    tables = []
    for name in dict.fromkeys(name for cell in done for name in cell.tables or ("",)):
        cells = [cell for cell in done if name in (cell.tables or ("",))]
        rules = answer_without_model(cells[0].config)
        tables.append(Table(name, read_runs(cells), rules, read_questions(cells)))
    if len(tables) == 1 and not tables[0].name:
        (table,) = tables
        blocks = {
            "": write_results(
                out,
                table.runs,
                baselines=table.baselines,
                mode=how.mode,
                rankc=how.rankc,
                title=study.name,
                benchmarks=table.benchmarks,
            )
        }
    else:
        blocks = write_study(out, study, tables, how.mode, how.rankc)
    print_parts(style, list_parts(blocks, style))
    return out / "report.html"


def read_questions(cells: Sequence[Cell]) -> list[Benchmark]:
    """The benchmarks of cells, for the questions on the page. One that cannot be read any more is
    left out, and named on stderr.
    """
    found: dict[str, Benchmark | None] = {}
    for config in (cell.config for cell in cells):
        for name in config.evaluation.benchmarks:
            if name in found:
                continue
            evaluation = dataclasses.replace(config.evaluation, benchmarks=(name,))
            try:
                (found[name],) = load_benchmarks(dataclasses.replace(config, evaluation=evaluation))
            except UserError as fault:
                found[name] = None
                print(f"the report has no questions of {name}: {fault}", file=sys.stderr)
    return [benchmark for benchmark in found.values() if benchmark]
