"""A study in miniature: everything is opened and counted, and a few steps and prompts are timed.

    cell ─ open ─► examples, tokens, prompts
         └ 5 steps in a scratch folder ─► seconds per step   ┐
         └ a batch of every benchmark by each method ─► s.   ┴─► hours of the cell

A cell that starts from a model which the study has yet to train gets one of that shape, trained for
the same few steps.
"""

import contextlib
import dataclasses
import io
import json
import logging
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from crossin_jax.checkpoint.open import open_model
from crossin_jax.config import Cell, Config, Study, UserError, to_dict
from crossin_jax.data.pipeline import open_eval_renderer
from crossin_jax.evaluation.items import Benchmark, with_items
from crossin_jax.evaluation.runner import (
    count_prompts,
    load_benchmarks,
    make_engine,
    run_benchmarks,
)
from crossin_jax.export import export
from crossin_jax.files import content_hash
from crossin_jax.parallel.mesh import make_mesh
from crossin_jax.paths import as_path
from crossin_jax.study.run import find_folder, resolve_budget
from crossin_jax.train import set_up, train

STEPS = 5  # the first one compiles, the last one has nothing after it: three are timed


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What a cell does and how long it takes; hours are None where nothing was timed."""

    steps: int
    examples: int
    tokens: int
    prompts: int
    training_hours: float | None = None
    evaluation_hours: float | None = None

    @property
    def hours(self) -> float:
        """Training and evaluation."""
        return (self.training_hours or 0) + (self.evaluation_hours or 0)


def try_cells(study: Study, chosen: Sequence[Cell], times: bool = True) -> dict[str, Estimate]:
    """By name, what the chosen cells would do. Raises `UserError` with the faults of the first
    three cells that cannot be opened: data, model, tokenizer, benchmarks, a batch that does not
    fit.
    """
    estimates, faults = {}, {}
    with tempfile.TemporaryDirectory(prefix="crossin_jax_trial_") as folder:
        trial = Trial(study, Path(folder), times)
        for cell in chosen:
            try:
                estimates[cell.name] = trial.estimate(cell)
            except UserError as error:
                faults.setdefault(str(error), cell.name)
    if faults:
        lines = [f"cell {name}: {fault}" for fault, name in faults.items()]
        raise UserError("\n".join(lines[:3]))
    return estimates


class Trial:
    """The scratch folder of a study, with what is known of its cells so far."""

    def __init__(self, study: Study, folder: Path, times: bool):
        self._folder, self._times = folder, times
        self._by_name = {cell.name: cell for cell in study.cells}
        self._models: dict[str, Path] = {}  # exported models by the settings of their cell
        self._seconds: dict[str, tuple[float, list[dict[str, float]]]] = {}
        self._untuned: set[str] = set()

    def estimate(self, cell: Cell) -> Estimate:
        """Opens a cell, counts, and times what no cell like it has shown yet."""
        config = self._at_scratch(cell)
        config = resolve_budget(dataclasses.replace(cell, config=config))
        with quiet():
            run = set_up(config, as_path(config.output_dir))
        epochs = run.num_steps / run.loader.steps_per_epoch
        benchmarks = load_benchmarks(config)
        counts = [count_prompts(config, benchmark) for benchmark in benchmarks]
        prompts = sum(sum(by_method.values()) for by_method in counts)
        times_asked = self._times_asked(cell)
        run.loader.close()
        found = Estimate(
            run.num_steps,
            round(epochs * len(run.data.mixture)),
            round(epochs * run.loader.tokens_per_epoch),
            prompts * times_asked,
        )
        if not self._times:
            return found
        per_step, per_prompt = self._time(config, benchmarks)
        evaluation = sum(
            seconds[method] * count
            for seconds, by_method in zip(per_prompt, counts, strict=True)
            for method, count in by_method.items()
        )
        return dataclasses.replace(
            found,
            training_hours=per_step * run.num_steps / 3600,
            evaluation_hours=evaluation * times_asked / 3600,
        )

    def _times_asked(self, cell: Cell) -> int:
        """2 for the first cell that asks its untuned model too; others on that model share it."""
        base = f"{cell.config.model.path} {cell.config.seed}"
        if not cell.config.evaluation.untuned or base in self._untuned:
            return 1
        self._untuned.add(base)
        return 2

    def _at_scratch(self, cell: Cell) -> Config:
        """The configuration of a cell with a folder of its own here, on a model that exists."""
        config = dataclasses.replace(cell.config, output_dir=str(self._folder / f"{id(cell)}"))
        for name in cell.needs:
            base = self._by_name[name]
            if config.model.path == str(find_folder(base) / "model"):
                path = str(self._make_model(base))
                config.model = dataclasses.replace(config.model, path=path)
        return config

    def _make_model(self, base: Cell) -> Path:
        """A model of the shape that a cell trains, or the one that it has trained."""
        done = find_folder(base) / "model"
        if (done / "config.json").is_file():
            return done
        key = content_hash(to_dict(dataclasses.replace(base.config, output_dir="", seed=0)))
        if key not in self._models:
            config = shorten(self._at_scratch(base))
            with quiet():
                run = train(config)
                export(run, "hf", run / "model")
            self._models[key] = run / "model"
        return self._models[key]

    def _time(
        self, config: Config, benchmarks: Sequence[Benchmark]
    ) -> tuple[float, list[dict[str, float]]]:
        """Seconds per step, and of every benchmark per prompt by method, of a cell or one like
        it.
        """
        values = to_dict(config)
        key = content_hash(
            [
                values["model"],
                values["lora"],
                values["mesh"],
                {name: values["optim"][name] for name in ("name", "moments_dtype")},
                {name: values["train"][name] for name in ("batch_size", "accumulation")},
                {name: values["data"][name] for name in ("length", "packing", "languages")},
                values["evaluation"],
            ]
        )
        if key not in self._seconds:
            with quiet():
                run = train(shorten(config))
                per_prompt = time_prompts(config, run, benchmarks) if benchmarks else []
            self._seconds[key] = time_steps(run), per_prompt
        return self._seconds[key]


def shorten(config: Config) -> Config:
    """A run of a few steps that evaluates nothing."""
    changes: dict[str, Any] = {"steps": STEPS, "log_every": 1, "tensorboard": False}
    off = dict.fromkeys(("eval_every", "benchmark_every", "checkpoint_every"))
    return dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, eval_sources=()),
        train=dataclasses.replace(config.train, **changes, **off),
    )


def time_steps(run: Path) -> float:
    """Mean seconds of the timed steps of a short run, by its own estimates of the time left."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    seconds = [
        record["seconds_left"] / (STEPS - record["step"])
        for record in records
        if record.get("seconds_left")
    ]
    return sum(seconds) / len(seconds)


def time_prompts(
    config: Config, run: Path, benchmarks: Sequence[Benchmark]
) -> list[dict[str, float]]:
    """Of every benchmark, the seconds per prompt by method, of one batch and without compiling."""
    opened = open_model(run, mesh=make_mesh(config.mesh))
    renderer = open_eval_renderer(config, opened.tokenizer)
    renderer.check_embeddings(opened.spec.vocab_size, config.model.tokenizer or config.model.path)
    engine = make_engine(config, renderer, opened.graphdef, opened.state, opened.spec, opened.mesh)
    found = []
    for benchmark in benchmarks:
        rows = max(1, config.evaluation.batch_size // max(1, len(benchmark.languages)))
        some = with_items(benchmark, benchmark.items[:rows])
        seconds = {}
        for method in count_prompts(config, benchmark):
            evaluation = dataclasses.replace(
                config.evaluation,
                prompts=config.evaluation.prompts[:1],
                method=method,
                limit=rows,
            )
            asked = dataclasses.replace(config, evaluation=evaluation)
            start, compiled = time.perf_counter(), engine.programs.compile_seconds
            run_benchmarks(asked, engine, renderer, [some], progress=False)
            spent = time.perf_counter() - start - (engine.programs.compile_seconds - compiled)
            seconds[method] = spent / sum(count_prompts(asked, some).values())
        found.append(seconds)
    return found


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """What the runs in miniature say is not for the user."""
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        before = logging.root.manager.disable
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(before)


def describe(estimate: Estimate) -> str:
    """One line: what there is to do, and how long it takes here."""
    parts = f"{estimate.steps:,} steps, {estimate.examples:,} examples, {estimate.tokens:,} tokens"
    if estimate.prompts:
        parts += f", {estimate.prompts:,} prompts"
    if estimate.training_hours is None:
        return parts
    return f"{parts}: {format_hours(estimate.hours)}"


def format_hours(hours: float) -> str:
    """Two digits that say something: 0.06 min, 30 min, 1.3 h, 31 h."""
    if hours < 1:
        return f"{60 * hours:.2g} min"
    return f"{hours:.2g} h" if hours < 10 else f"{hours:,.0f} h"


def describe_device() -> str:
    """What the times were measured on."""
    return f"{jax.device_count()} x {jax.devices()[0].device_kind}"
