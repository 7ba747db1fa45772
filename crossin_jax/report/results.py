"""Results on disk: results.json, results.md, report.html and answers.json.gz.

results.json: {"format", "title", "mode", "rankc", "level", "resamples", "provenance",
"runs": [{"name", "seed", "provenance"}], "blocks": [summary.Block as an object]}.
docs/evaluation.md explains every score in it.
"""

import gzip
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from crossin_jax.config import UserError
from crossin_jax.evaluation.benchmarks import load_benchmark
from crossin_jax.evaluation.items import Benchmark
from crossin_jax.evaluation.metrics import Mode
from crossin_jax.evaluation.pairs import Weights
from crossin_jax.evaluation.predictions import Predictions, decode, encode
from crossin_jax.evaluation.stats import LEVEL, NUM_RESAMPLES
from crossin_jax.files import read_json, write_whole
from crossin_jax.paths import as_path, move
from crossin_jax.report.page import build_page
from crossin_jax.report.summary import UNTUNED, Block, Run, summarise
from crossin_jax.report.text import to_markdown

# the version of the format of answers.json.gz and results.json
FORMAT = 1
ANSWERS = "answers.json.gz"


def write_results(
    folder: str | Path,
    runs: Sequence[Run],
    provenance: dict[str, Any] | None = None,
    *,
    baselines: dict[str, list[Predictions]] | None = None,
    mode: Mode = "expectation",
    rankc: Weights = "softmax",
    title: str | None = None,
    benchmarks: Sequence[Benchmark] = (),
) -> list[Block]:
    """Writes the results of several runs into a folder, each file whole or not at all.

    Other arms are compared with that of the first run. `baselines` are answers by rules without a
    model. `rankc`: the weights of RankC. `benchmarks` give the page its questions; without them it
    has only those of Cross-World. Raises UserError if the folder cannot be written.
    """
    folder, title = as_path(folder), title or "Cross-lingual evaluation"
    blocks = summarise(runs, baselines, mode, rankc=rankc)
    results = {
        "format": FORMAT,
        "title": title,
        "mode": mode,
        "rankc": rankc,
        "level": LEVEL,
        "resamples": NUM_RESAMPLES,
        "provenance": provenance or {},
        "runs": [
            {"name": run.name, "seed": run.seed, "provenance": run.provenance} for run in runs
        ],
        "blocks": [asdict(block) for block in blocks],
    }
    page = build_page(title, blocks, runs, _find_texts(runs, benchmarks), mode, provenance or {})
    answers = [
        {
            "name": run.name,
            "seed": run.seed,
            "provenance": run.provenance,
            "predictions": [encode(predictions) for predictions in run.predictions],
        }
        for run in runs
    ]
    contents = {
        "results.json": _to_json(results, indent=1),
        "results.md": to_markdown(title, blocks, mode).encode(),
        "report.html": page.encode("utf-8", "replace"),
        # Without the time of writing, the same answers give the same file.
        ANSWERS: gzip.compress(_to_json({"format": FORMAT, "runs": answers}), mtime=0),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, raw in contents.items():
            write_whole(folder / name, raw)
    except OSError as error:
        raise UserError(
            f"{folder}: results cannot be written ({error.strerror}); name another folder"
        ) from None
    return blocks


def read_results(folder: str | Path) -> list[Run]:
    """The runs that `write_results` wrote into a folder, with their answers."""
    file = as_path(folder) / ANSWERS
    if not file.exists():
        raise UserError(f"{file} does not exist; give a folder that evaluate wrote its results to")
    try:
        stored = read_json(
            file, expect=dict, what="a file of answers", remedy="it is damaged: evaluate again"
        )
        if stored["format"] != FORMAT:
            raise UserError(
                f"{file}: format {stored['format']}, but this version reads {FORMAT}; "
                "evaluate again"
            )
        return [
            Run(
                run["name"], run["seed"], [decode(p) for p in run["predictions"]], run["provenance"]
            )
            for run in stored["runs"]
        ]
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{file}: damaged ({type(error).__name__}: {error}); evaluate again"
        ) from None


def read_rules(folder: str | Path) -> dict[str, Any]:
    """How a folder's answers were counted: `mode` and `rankc` for `write_results`."""
    usual = {"mode": "expectation", "rankc": "softmax"}
    try:
        stored = json.loads((as_path(folder) / "results.json").read_bytes())
        return {name: stored.get(name, value) for name, value in usual.items()}
    except (OSError, ValueError, AttributeError):
        return usual


def read_pair(first: str | Path, second: str | Path) -> list[Run]:
    """The runs of two result folders, to compare before and after.

    The reference is the first arm of the first folder. An arm whose name is in both folders gets
    the folder beside its name. Raises UserError if the folders share no benchmark and method.
    """
    pair = read_results(first), read_results(second)
    asked = [{(p.benchmark, p.method) for run in runs for p in run.predictions} for runs in pair]
    if not asked[0] & asked[1]:
        names = [
            ", ".join(sorted({f"{benchmark} ({method})" for benchmark, method in each}))
            for each in asked
        ]
        raise UserError(
            f"nothing to compare: {first} holds {names[0]}\n{second} holds {names[1]}\n"
            "evaluate both on the same benchmark by the same method"
        )
    pair = pair[0], [run for run in pair[1] if not any(map(partial(is_same, run), pair[0]))]
    taken = {run.name for run in pair[0]} & {run.name for run in pair[1]}
    return [
        replace(run, name=f"{run.name} ({folder})") if run.name in taken else run
        for folder, runs in zip((first, second), pair, strict=True)
        for run in runs
    ]


def is_same(run: Run, other: Run) -> bool:
    """Whether two runs are one: the model before tuning is in the results of every run from it."""
    return (run.name, run.seed, run.predictions) == (other.name, other.seed, other.predictions)


def without_repeats(runs: Iterable[Run]) -> list[Run]:
    """The runs, each once. Different models before tuning get the name of their folder beside
    theirs.
    """
    kept: list[Run] = []
    for run in runs:
        if any(map(partial(is_same, run), kept)):
            continue
        if any((other.name, other.seed) == (run.name, run.seed) for other in kept):
            base = str((run.provenance.get("model") or {}).get("base"))
            run = replace(
                run, name=f"{run.name} ({Path(base).name})" if run.name == UNTUNED else run.name
            )
        kept.append(run)
    return kept


def keep_other_model(folder: Path, weights: str) -> Path | None:
    """Moves the report of another model out of a folder; returns its new place.

    `weights` is the fingerprint of the model whose report comes next. Finished parts of evaluations
    stay: each belongs to its weights by name.
    """
    try:
        origin = json.loads((folder / "results.json").read_text())["runs"][-1]["provenance"][
            "model"
        ]
        known, step = origin["weights"], origin.get("step")
    except (OSError, ValueError, LookupError, TypeError):
        return None
    if known == weights:
        return None
    name = f"{folder.name}-{f'step{step}' if step is not None else str(known)[:8]}"
    place, number = folder.with_name(name), 1
    while place.exists():
        number += 1
        place = folder.with_name(f"{name}-{number}")
    place.mkdir()
    for name in ("results.json", "results.md", "report.html", ANSWERS, "logs", "comparison"):
        if (folder / name).exists():
            move(folder / name, place / name)
    return place


def _to_json(value: Any, indent: int | None = None) -> bytes:
    return (
        json.dumps(value, ensure_ascii=False, indent=indent).encode("utf-8", "surrogatepass")
        + b"\n"
    )


def _find_texts(runs: Sequence[Run], benchmarks: Sequence[Benchmark]) -> dict[str, Benchmark]:
    """The questions by benchmark, as the first run saw them."""
    texts = {benchmark.name: benchmark for benchmark in reversed(benchmarks)}
    for run in runs[:1]:
        for predictions in run.predictions:
            name = predictions.benchmark
            if name not in texts and name.startswith("cross_world"):
                texts[name] = load_benchmark(name, predictions.languages, seed=run.seed)
    return texts
