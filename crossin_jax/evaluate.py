"""Evaluate a checkpoint or a base model on the benchmarks, and compare results.

  python -m crossin_jax.evaluate --checkpoint runs/mine            (with the run's settings)
  python -m crossin_jax.evaluate --config configs/mine.py --checkpoint runs/mine
  python -m crossin_jax.evaluate --config configs/mine.py          (the model before tuning)
  python -m crossin_jax.evaluate --checkpoint runs/mine --untuned  (and the model before tuning)
  python -m crossin_jax.evaluate --compare runs/a/evaluation runs/b/evaluation

An interrupted evaluation continues where it stopped. Results: results.json, results.md,
report.html, answers.json.gz, logs/ (answers in SeaEval's layout), predictions/ (answers as they
come).
"""

import dataclasses
import logging
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
from absl import flags

from crossin_jax import __version__, cli, provenance
from crossin_jax import config as settings
from crossin_jax.checkpoint.fingerprint import fingerprint
from crossin_jax.checkpoint.open import LoadedModel, open_model
from crossin_jax.checkpoint.store import find_checkpoint, read_config
from crossin_jax.checks import check
from crossin_jax.config import Config, UserError
from crossin_jax.data.pipeline import open_eval_renderer, open_renderer
from crossin_jax.data.templates import load_template
from crossin_jax.evaluation.benchmarks import load_benchmark
from crossin_jax.evaluation.items import Benchmark
from crossin_jax.evaluation.predictions import Predictions
from crossin_jax.evaluation.runner import (
    describe_benchmarks,
    load_benchmarks,
    make_engine,
    run_benchmarks,
)
from crossin_jax.evaluation.seaeval import write_log, write_rows
from crossin_jax.files import content_hash
from crossin_jax.parallel import hosts, roll_call
from crossin_jax.parallel.mesh import make_mesh
from crossin_jax.paths import as_path
from crossin_jax.report.results import keep_other_model, read_pair, read_rules, write_results
from crossin_jax.report.summary import UNTUNED, Block, Run
from crossin_jax.report.text import list_parts
from crossin_jax.tables import FORMAT_FLAG, print_parts
from crossin_jax.training.state import describe_precision

log = logging.getLogger(__name__)


def evaluate(
    config: Config,
    checkpoint: str | Path | None,
    out: Path,
    benchmarks: Sequence[Benchmark] | None = None,
) -> tuple[list[Predictions], dict[str, Any]]:
    """Answers and provenance of one model on the benchmarks of the configuration; answers are kept
    in `out`.

    `benchmarks` are those of the configuration, if the caller has loaded them already.
    """
    config = check(config)
    if not config.evaluation.benchmarks:
        raise UserError(
            "evaluation.benchmarks is empty; name at least one, e.g. cross_mmlu or cross_world"
        )
    benchmarks = load_benchmarks(config) if benchmarks is None else benchmarks
    if checkpoint is not None:
        settle_template(config, dataclasses.asdict(read_config(checkpoint).data))
    # The untuned model is asked without an adapter, unless lora.path names one.
    adapter = config.lora.path if config.lora else None
    if checkpoint is None and adapter is None:
        config = dataclasses.replace(config, lora=None)
    opened = open_model(checkpoint or config, mesh=make_mesh(config.mesh))
    if jax.process_index() == 0:
        print(describe_precision(opened.config, opened.mesh), file=sys.stderr, flush=True)
    if checkpoint is None:
        settle_template(config, opened.tokenizer.prompt)
        trained = {"base": config.model.path, "adapter": adapter}
    else:
        trained = opened.provenance | {"step": opened.step, "run": str(opened.run)}
    trained["tokenizer"] = provenance.identify_tokenizer(opened.tokenizer)
    trained["weights"] = fingerprint(opened.state)
    if jax.process_index() == 0 and (place := keep_other_model(out, trained["weights"])):
        log.warning("%s had the report of another model, which was moved to %s", out, place)
    renderer = open_eval_renderer(config, opened.tokenizer)
    renderer.check_embeddings(opened.spec.vocab_size, config.model.tokenizer or config.model.path)
    warn_of_changed_template(config, opened)
    engine = make_engine(config, renderer, opened.graphdef, opened.state, opened.spec, opened.mesh)
    predictions = run_benchmarks(
        config,
        engine,
        renderer,
        benchmarks,
        cache=out / "predictions",
        weights=identify_computation(opened, trained["weights"]),
    )
    source = provenance.describe(
        settings.to_dict(config),
        model=trained,
        precision=opened.config.model.compute_dtype,
        template=renderer.hash,
        benchmarks=describe_benchmarks(config, benchmarks),
        compilations=engine.compilations,
    )
    return predictions, source


def identify_computation(opened: LoadedModel, weights: str) -> str:
    """The key of cached answers: everything of a model that decides what it answers.

    `weights` is the fingerprint of its arrays, since a path may hold other weights tomorrow.
    """
    lora = opened.config.lora
    return content_hash(
        [
            weights,
            dataclasses.asdict(opened.spec),
            opened.config.model.compute_dtype,
            lora and dataclasses.asdict(dataclasses.replace(lora, path=None)),
            __version__,
        ]
    )


def evaluate_untuned(
    config: Config, cache: Path, benchmarks: Sequence[Benchmark] | None = None
) -> Run:
    """The answers of the model that the run of a configuration began with, asked as the run is.

    Its finished parts are kept in `cache`.
    """
    evaluation = dataclasses.replace(
        config.evaluation, template=config.evaluation.template or config.data.template
    )
    predictions, source = evaluate(
        dataclasses.replace(config, evaluation=evaluation), None, cache, benchmarks
    )
    return Run(UNTUNED, config.seed, predictions, source)


def settle_template(config: Config, trained: dict[str, Any]) -> None:
    """Takes `evaluation.template` for `config.data.template` if it is set, and else refuses prompts
    that differ from those of training.

    `trained` has settings of `data`: those of a checkpoint, or those in the files of an export.
    """
    if config.evaluation.template is not None:
        config.data.template = config.evaluation.template
        return
    for field in ("template", "system", "tokenization", "tag"):
        now = getattr(config.data, field)
        before = trained.get(field, now)
        if isinstance(before, dict) and load_template(now) == load_template(before):
            continue
        if now != before:
            raise UserError(
                f"data.{field}={now!r}, but the model was trained with {before!r}; use that, or "
                "set evaluation.template to ask in another form on purpose"
            )


def warn_of_changed_template(config: Config, opened: LoadedModel) -> None:
    """Warns where the template of this name has another text than in training."""
    trained = opened.provenance.get("template")
    if trained is None or config.evaluation.template is not None:
        return
    if open_renderer(opened.config, opened.tokenizer).hash != trained:
        log.warning(
            "data.template=%s: its text is not the one that %s was trained with",
            config.data.template,
            opened.run,
        )


def define_flags() -> None:
    """Flags beside the configuration."""
    flags.DEFINE_string(
        "checkpoint",
        None,
        "run folder or one of its checkpoints/STEP; none: the model before tuning",
    )
    flags.DEFINE_string(
        "out",
        None,
        "folder for results (default: output_dir/evaluation; without --checkpoint "
        "output_dir/evaluation-untuned)",
    )
    flags.DEFINE_bool(
        "untuned", None, "short for --config.evaluation.untuned: ask the model before tuning too"
    )
    flags.DEFINE_integer(
        "limit", None, "short for --config.evaluation.limit: first items of each benchmark"
    )
    flags.DEFINE_enum(*FORMAT_FLAG)
    flags.DEFINE_list("languages", None, "short for --config.evaluation.languages, e.g. en,zh")
    flags.DEFINE_list("prompts", None, "short for --config.evaluation.prompts, e.g. 1,3,harness")
    flags.DEFINE_string(
        "compare", None, "two folders of results, A B: what changed from A to B, and how clearly"
    )
    flags.DEFINE_string("after", None, "the second folder of --compare")
    roll_call.define_flags()


def write_run(
    config: Config,
    run: Run,
    out: Path,
    benchmarks: Sequence[Benchmark] | None = None,
    *,
    before: Sequence[Run] = (),
) -> list[Block]:
    """Writes the report of one run, after the runs `before` it, and its answers as logs in
    SeaEval's layout; returns what the report says.
    """
    benchmarks = load_benchmarks(config) if benchmarks is None else benchmarks
    how = {"mode": config.evaluation.mode, "rankc": config.evaluation.rankc}
    blocks = write_results(out, [*before, run], title=run.name, benchmarks=benchmarks, **how)
    items = {benchmark.name: benchmark.items for benchmark in benchmarks}
    (out / "logs").mkdir(exist_ok=True)
    for predictions in run.predictions:
        write = write_log if predictions.kind == "parallel" else write_rows
        write(name_log(out, predictions), items[predictions.benchmark], predictions)
    return blocks


def name_log(out: Path, predictions: Predictions) -> Path:
    """The file of a run's answers in SeaEval's layout, beside its report."""
    parts = predictions.benchmark, predictions.method, predictions.prompt_label
    name = re.sub(r"[^\w.]+", "_", "_".join(parts))
    return out / "logs" / f"{name}.{'json' if predictions.kind == 'parallel' else 'jsonl'}"


def read_questions(folder: Path, runs: Sequence[Run]) -> Iterator[Benchmark]:
    """The questions that the logs of a results folder hold, each parallel benchmark once."""
    asked = {p.benchmark: p for run in runs for p in run.predictions if p.kind == "parallel"}
    for name, predictions in asked.items():
        file = name_log(folder, predictions)
        try:
            if file.is_file():
                yield dataclasses.replace(
                    load_benchmark(str(file), predictions.languages), name=name
                )
        except UserError as fault:
            log.warning("the page has no questions of %s: %s", name, fault)


def apply_short_flags(config: Config, arguments: Any) -> Config:
    """The configuration with --limit, --languages, --untuned and --prompts in its evaluation."""
    given = {
        "limit": arguments.limit,
        "languages": arguments.languages and tuple(arguments.languages),
        "untuned": arguments.untuned,
    }
    if arguments.prompts:
        given["prompts"] = tuple(int(p) if p.isdigit() else p for p in arguments.prompts)
    evaluation = dataclasses.replace(
        config.evaluation, **{k: v for k, v in given.items() if v is not None}
    )
    return check(dataclasses.replace(config, evaluation=evaluation))


def main(config: Config, arguments: Any) -> None:
    """Joins the processes of the run, evaluates and prints the table."""
    with hosts.joined(arguments):
        evaluate_and_print(apply_short_flags(config, arguments), arguments)


def evaluate_and_print(config: Config, arguments: Any) -> None:
    """Evaluates what the flags name; process 0 writes the report and prints the table."""
    out = as_path(arguments.out or default_folder(config, arguments.checkpoint))
    benchmarks = load_benchmarks(config)
    name = config.name if arguments.checkpoint else UNTUNED
    with hosts.own_folder(out):
        predictions, source = evaluate(config, arguments.checkpoint, out, benchmarks)
        before = []
        if config.evaluation.untuned and arguments.checkpoint:
            before = [evaluate_untuned(config, out / UNTUNED, benchmarks)]
        if jax.process_index():
            return
        run = Run(name, config.seed, predictions, source)
        blocks = write_run(config, run, out, benchmarks, before=before)
    last = f"report: {out / 'report.html'}; logs in SeaEval's layout: {out / 'logs'}"
    print_parts(arguments.format, [*list_parts({"": blocks}, arguments.format), last])


def default_folder(config: Config, checkpoint: str | None) -> str:
    """The folder of results: another one for a run, for its model before tuning, for each step."""
    folder = f"{config.output_dir}/evaluation"
    if checkpoint is None:
        return f"{folder}-{UNTUNED}"
    name = Path(checkpoint).name
    return f"{folder}-step{name}" if name.isdigit() else folder


def compare(arguments: Any) -> None:
    """Before and after, from two folders of results."""
    if not arguments.after:
        raise UserError("--compare takes two folders: --compare A B")
    runs = read_pair(arguments.compare, arguments.after)
    for difference in find_differences(runs[0].provenance, runs[-1].provenance):
        log.warning("%s and %s: %s", arguments.compare, arguments.after, difference)
    out = as_path(arguments.out or arguments.after) / "comparison"
    title = f"{runs[0].name} and {runs[-1].name}"
    asked = [
        benchmark
        for folder in (arguments.compare, arguments.after)
        for benchmark in read_questions(as_path(folder), runs)
    ]
    rules = read_rules(arguments.compare)
    blocks = write_results(out, runs, title=title, benchmarks=asked, **rules)
    last = f"report: {out / 'report.html'}"
    print_parts(arguments.format, [*list_parts({"": blocks}, arguments.format), last])


def find_differences(first: dict[str, Any], second: dict[str, Any]) -> list[str]:
    """What two results do not share besides their weights, as texts; what only one of them records
    is left out.
    """

    def read(source: dict[str, Any], *names: str) -> Any:
        for name in names:
            source = source.get(name) if isinstance(source, dict) else None
        return source

    places = {
        "another tokenizer": ("model", "tokenizer"),
        "another prompt template or tokenizer": ("template",),
        "another precision": ("precision",),
        "another version of crossin_jax": ("versions", "crossin_jax"),
        "another commit of crossin_jax": ("commit",),
    }
    for name in read(first, "benchmarks") or ():
        places[f"other questions in {name}"] = ("benchmarks", name, "fingerprint")
    return [
        f"{what} ({before} and {after})"
        for what, names in places.items()
        if None not in (before := read(first, *names), after := read(second, *names))
        and before != after
    ]


def config_of_run(checkpoint: str) -> Config:
    """The settings of a run or checkpoint; its folder may have moved."""
    config = read_config(checkpoint)
    config.output_dir = str(find_checkpoint(checkpoint)[0])
    return config


def split_pair(argv: list[str]) -> bool:
    """Turns `--compare A B` into flags; True where the command line asks for a comparison."""
    for i, argument in enumerate(argv):
        if argument.lstrip("-").split("=")[0] == "compare" and argument.startswith("-"):
            last = i + (1 if "=" in argument else 2)
            if last < len(argv) and not argv[last].startswith("-"):
                argv[last] = f"--after={argv[last]}"
            return True
    return False


if __name__ == "__main__":
    if split_pair(sys.argv):
        cli.run(compare, define=define_flags, takes_config=False)
    cli.run(main, define=define_flags, run_flag=("checkpoint", config_of_run))
