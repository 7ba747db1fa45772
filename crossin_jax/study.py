"""Run a whole study: train and evaluate every cell, skip what is done, write one report.

  python -m crossin_jax.study --config configs/quickstart.py [--seeds=0,1,2] [--languages=en,zh,vi,es,id,ms,fil]

A configuration file offers a study as `get_study()`. An interrupted study goes on; a cell whose settings changed, or
whose base changed, is the only one that runs again.
"""

import json
import logging
import os
import shutil
import time
from pathlib import Path
from typing import Any

import jax
from absl import flags

from crossin_jax import config as settings
from crossin_jax import program, provenance
from crossin_jax.checkpoint.store import MAY_CHANGE, flatten_dict
from crossin_jax.config import Cell, Study, UserError, check
from crossin_jax.evaluate import evaluate, write_run
from crossin_jax.evaluation.report import Run, print_table, read_results, write_results
from crossin_jax.evaluation.runner import answer_without_model
from crossin_jax.export import export
from crossin_jax.train import train

FORMAT = 1  # raised when the same settings would give other results


def run_study(study: Study, chosen: slice = slice(None)) -> list[Run]:
    """Brings the chosen cells up to date; returns the results of every evaluated cell that is."""
    keys, runs = cell_keys(study), []
    for cell in study.cells[chosen]:
        if is_done(cell, keys):
            logging.info("%s is done", cell.name)
        else:
            run_cell(cell, keys)
    for cell in study.cells:
        if cell.config.evaluation.benchmarks and is_done(cell, keys):
            runs += read_results(Path(cell.config.output_dir) / "evaluation")
    return runs


def is_done(cell: Cell, keys: dict[str, str]) -> bool:
    """Whether a cell's results are those of its present settings and bases."""
    return read_key(Path(cell.config.output_dir) / "done.json") == evaluation_key(cell, keys)


def evaluation_key(cell: Cell, keys: dict[str, str]) -> str:
    """A hash of the trained weights' key and of how they are evaluated."""
    return provenance.content_hash([keys[cell.name], settings.to_dict(cell.config)["evaluation"]])


def run_cell(cell: Cell, keys: dict[str, str]) -> None:
    """Trains a cell anew or to its end, exports it where others need it, and answers its benchmarks."""
    folder = Path(cell.config.output_dir)
    if folder.exists() and read_key(folder / "key.json") != keys[cell.name]:
        shutil.rmtree(folder)  # of other settings
    folder.mkdir(parents=True, exist_ok=True)
    write_key(folder / "key.json", keys[cell.name])
    start, cpu = time.time(), time.process_time()
    train(cell.config)
    if cell.exports:
        shutil.rmtree(folder / "model", ignore_errors=True)
        export(folder, "hf", folder / "model")
    if cell.config.evaluation.benchmarks:
        predictions, source = evaluate(cell.config, folder, folder / "evaluation")
        write_run(cell.config, Run(cell.config.name, cell.config.seed, predictions, source), folder / "evaluation")
    write_key(folder / "done.json", evaluation_key(cell, keys), seconds=round(time.time() - start, 1),
              cpu_seconds=round(time.process_time() - cpu, 1))


def cell_keys(study: Study) -> dict[str, str]:
    """A hash per cell of everything that decides its trained weights, what it needs included."""
    keys: dict[str, str] = {}
    for cell in study.cells:
        missing = [name for name in cell.needs if name not in keys]
        if missing:
            raise UserError(f"study {study.name}: cell {cell.name} needs {missing[0]}, which does not come before it")
        decides = {name: value for name, value in flatten_dict(settings.to_dict(check(cell.config))).items()
                   if not name.startswith(MAY_CHANGE)}
        keys[cell.name] = provenance.content_hash([FORMAT, decides, [keys[name] for name in cell.needs]])
    return keys


def read_key(file: Path) -> str | None:
    """The key in a file, or None."""
    try:
        return json.loads(file.read_text())["key"]
    except (OSError, ValueError, KeyError):
        return None


def write_key(file: Path, key: str, **more: Any) -> None:
    """Writes a key whole or not at all."""
    part = file.with_suffix(".part")
    part.write_text(json.dumps({"key": key, **more}))
    os.replace(part, file)


def define_flags() -> None:
    """Flags of a study."""
    flags.DEFINE_string("config", None, "Python file with get_study()")
    flags.DEFINE_list("seeds", None, "seeds, e.g. 0,1,2 (default: the study's own)")
    flags.DEFINE_list("languages", None, "language codes, e.g. en,zh,vi,es,id,ms,fil (default: the study's own)")
    flags.DEFINE_string("cells", None, "part of the cells to run here, FIRST:LAST (as in Python)")
    flags.DEFINE_bool("dry_run", False, "print the cells and leave")


def main(arguments: Any) -> None:
    """Runs the study and prints its table."""
    if not arguments.config:
        raise UserError("--config=FILE.py is missing; see configs/quickstart.py")
    options: dict[str, Any] = {}
    if arguments.seeds:
        try:
            options["seeds"] = tuple(int(seed) for seed in arguments.seeds)
        except ValueError:
            raise UserError(f"--seeds={','.join(arguments.seeds)}: seeds are whole numbers, e.g. 0,1,2") from None
    if arguments.languages:
        options["languages"] = tuple(arguments.languages)
    study = program.call_config_file(arguments.config, "get_study", **options)
    keys = cell_keys(study)
    chosen = slice(None)
    if arguments.cells:
        try:
            chosen = slice(*(int(part) if part else None for part in arguments.cells.split(":")))
        except ValueError:
            raise UserError(f"--cells={arguments.cells}: give FIRST:LAST, e.g. 0:4") from None
    if arguments.dry_run:
        for i, cell in enumerate(study.cells):
            state = "done" if is_done(cell, keys) else "to do"
            print(f"{i:3d}  {state:6s} {cell.name:28s} {cell.config.train.steps} steps  -> {cell.config.output_dir}")
        return
    start = time.time()
    runs = run_study(study, chosen)
    if not runs or jax.process_index():
        return
    first = next(cell.config for cell in study.cells if cell.config.evaluation.benchmarks)
    baselines = answer_without_model(first)
    out = Path(study.output_dir)
    write_results(out, runs, baselines=baselines, mode=first.evaluation.mode, title=study.name)
    print(print_table(runs, baselines=baselines, mode=first.evaluation.mode))
    print(f"{len(study.cells)} cells in {time.time() - start:.0f} s; report: {out / 'report.html'}")


if __name__ == "__main__":
    program.run(main, define=define_flags, takes_config=False)
