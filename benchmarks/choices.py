"""Questions per second of option scoring beside lm-evaluation-harness's own backend: Cross-MMLU,
the same Llama.

    python benchmarks/choices.py [--limit 210] [--out FILE.json]

Both sides are models of the harness and get the same requests: four choices in full for every
question in every language, as texts; both compute in float32. The harness's backend gets the batch
size that is best on a sample. The sides take turns on slices of the questions, so that other work
on the machine hits both. Compilation is counted apart. Where the two differ most, both are held
against the harness's backend in float64: a sum near 600 has steps of 6e-5.
"""

import argparse
import logging
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from generate import LANGUAGES, make_model, spent
from record import write_record


def read_requests(data: Path, limit: int | None) -> list[list[Any]]:
    """Per question the harness's requests, one per choice."""
    from lm_eval.api.instance import Instance

    from crossin_jax.data.templates import load_template
    from crossin_jax.evaluation.benchmarks import load_benchmark
    from crossin_jax.evaluation.frames import make_prompt

    frame = load_template("alpaca").prompt_no_input
    asked = [
        version
        for item in load_benchmark(str(data / "seaeval/cross_mmlu.json"), LANGUAGES).items
        for version in item.versions.values()
    ]
    asked = [asked[i] for i in np.random.default_rng(0).permutation(len(asked))[:limit]]
    return [
        [
            Instance(
                "loglikelihood",
                {},
                (frame.format(instruction=make_prompt(version, 1)), " " + choice),
                i,
            )
            for i, choice in enumerate(version.choices)
        ]
        for version in asked
    ]


def run_theirs(model: Any, requests: list[Any], batch: int) -> tuple[np.ndarray, list[float]]:
    """Seconds (clock, processors) and log-likelihoods of the harness's backend."""
    model.batch_size_per_gpu = batch
    start = spent()
    found = model.loglikelihood(requests, disable_tqdm=True)
    return spent(start), [value for value, _ in found]


def run_ours(model: Any, requests: list[Any]) -> tuple[np.ndarray, list[float]]:
    """Seconds (clock, processors) and log-likelihoods of ours, whose programs are compiled
    already.
    """
    start, compiled = spent(), model.engine.compilations
    found = model.loglikelihood(requests, disable_tqdm=True)
    seconds = spent(start)
    if model.engine.compilations > compiled:  # a program was new: once more without it
        return run_ours(model, requests)
    return seconds, [value for value, _ in found]


def against_float64(
    model: Any, requests: list[Any], values: np.ndarray, theirs: np.ndarray
) -> dict[str, float]:
    """How far both sides are from float64 on the 16 requests where they differ most, and the
    largest log-likelihood.
    """
    worst = np.argsort(-np.abs(values - theirs))[:16]
    model.model.double()
    exact = np.array(
        [value for value, _ in model.loglikelihood([requests[i] for i in worst], disable_tqdm=True)]
    )
    return {
        "ours": float(np.abs(values[worst] - exact).max()),
        "theirs": float(np.abs(theirs[worst] - exact).max()),
        "largest": float(np.abs(exact).max()),
    }


def main() -> None:
    """Prints the comparison and writes it as JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data", type=Path, default=Path(__file__).resolve().parents[2] / "shared" / "data"
    )
    parser.add_argument("--limit", type=int, default=None, help="questions; none: all 1,050")
    parser.add_argument("--batch", type=int, default=16, help="batch size of our engine")
    parser.add_argument(
        "--batches", default="1,2,4,8", help="batch sizes tried for the harness's backend"
    )
    parser.add_argument(
        "--sample", type=int, default=12, help="questions on which their batch size is chosen"
    )
    parser.add_argument("--slices", type=int, default=5, help="turns of each side")
    for name, default in (("width", 384), ("ff_width", 1024), ("layers", 8), ("heads", 6)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--out", type=Path, default=None)
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)

    from lm_eval.models.huggingface import HFLM

    from crossin_jax.data.pipeline import load_tokenizer
    from crossin_jax.evaluation.harness import EngineLM
    from crossin_jax.generation.engine import Engine
    from crossin_jax.generation.model import load_model

    tokenizer = load_tokenizer(str(arguments.data / "tokenizers/llama2"))
    with tempfile.TemporaryDirectory() as folder:
        theirs = HFLM(
            pretrained=make_model(Path(folder), arguments), tokenizer=tokenizer, backend="causal"
        )
        loaded = load_model(folder, progress=False)
    engine = Engine(
        loaded.graphdef,
        loaded.state,
        loaded.spec,
        eos_ids=[tokenizer.eos_token_id],
        pad_id=0,
        batch_size=arguments.batch,
    )
    ours = EngineLM(engine, tokenizer)
    questions = read_requests(arguments.data, arguments.limit)

    def joined(part):
        return [request for question in part for request in question]

    sample = joined(questions[: arguments.sample])
    run_theirs(theirs, sample[:4], 4)  # warm
    found = {
        batch: len(sample) / 4 / run_theirs(theirs, sample, batch)[0][1]
        for batch in map(int, arguments.batches.split(","))
    }
    batch = max(found, key=found.get)
    seconds, values, their_values = {"ours": np.zeros(2), "theirs": np.zeros(2)}, [], []
    for part in np.array_split(np.arange(len(questions)), arguments.slices):
        requests = joined([questions[i] for i in part])
        spent_ours, found_ours = run_ours(ours, requests)
        spent_theirs, found_theirs = run_theirs(theirs, requests, batch)
        seconds["ours"] += spent_ours
        seconds["theirs"] += spent_theirs
        values += found_ours
        their_values += found_theirs
    ratio = seconds["theirs"] / seconds["ours"]
    apart = np.abs(np.array(values) - np.array(their_values))
    exact = against_float64(theirs, joined(questions), np.array(values), np.array(their_values))
    print(
        f"{loaded.spec.num_parameters / 1e6:.1f} M parameters, {len(questions)} questions with "
        f"four choices: ours {len(questions) / seconds['ours'][0]:.2f} questions/s, the "
        f"harness's backend {len(questions) / seconds['theirs'][0]:.2f} (batch {batch}): "
        f"{ratio[0]:.2f} x by the clock, {ratio[1]:.2f} x in processor seconds "
        f"({seconds['ours'][1]:.0f} and {seconds['theirs'][1]:.0f}); log-likelihoods at most "
        f"{apart.max():.1e} apart, {(apart > 1e-4).sum()} of {len(apart)} by more than 1e-4; "
        f"where they differ most (values to {exact['largest']:.0f}) ours is {exact['ours']:.1e} "
        f"from float64, theirs {exact['theirs']:.1e}; {engine.compilations} programs, compiled "
        f"in {engine.programs.compile_seconds:.0f} s"
    )
    if arguments.out:
        result = {
            "ratio": {"clock": ratio[0], "processors": ratio[1]},
            "their_batch": batch,
            "their_sample": found,
            "seconds": {side: {"clock": s[0], "processors": s[1]} for side, s in seconds.items()},
            "questions_per_second": {side: len(questions) / s[0] for side, s in seconds.items()},
            "largest_difference": float(apart.max()),
            "beyond_1e-4": int((apart > 1e-4).sum()),
            "from_float64": exact,
        }
        write_record(arguments.out, arguments, results=result)


if __name__ == "__main__":
    main()
