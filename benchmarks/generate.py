"""Prompts per second of the engine beside `transformers.generate`: Cross-MMLU on the same Llama and
the same machine.

    python benchmarks/generate.py [--limit 200] [--answers gpt4_1106_preview,128] [--out FILE.json]

The model has random weights and a real vocabulary (Llama 2, 32,000 pieces), both sides compute
greedy answers in float32. Random weights do not end their answers, so lengths are imposed on both
sides: those of the answers that a real model gave to the same prompts (its SeaEval log, at most 128
tokens), or a number for all. `transformers` gets the static batch size and order (as given, or
sorted by prompt length) that is best on a sample. The two sides take turns on slices of the
prompts, so that other work on the machine hits both, and processor seconds stand beside those of
the clock. Compilation is counted apart.
"""

import argparse
import gzip
import json
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from record import write_record

LANGUAGES = ("en", "zh", "vi", "es", "id", "ms", "fil")
LONGEST = 128


def make_model(folder: Path, arguments: argparse.Namespace) -> Any:
    """A Llama of random weights, saved by transformers for both sides."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=32_000,
        hidden_size=arguments.width,
        intermediate_size=arguments.ff_width,
        num_hidden_layers=arguments.layers,
        num_attention_heads=arguments.heads,
        num_key_value_heads=arguments.heads,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        initializer_range=0.05,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    model.save_pretrained(folder)
    return model


def read_prompts(data: Path, limit: int | None) -> tuple[list[np.ndarray], list[tuple[str, str]]]:
    """Token ids of every question in every language, and (id, language) of each."""
    from crossin_jax.data.pipeline import load_tokenizer
    from crossin_jax.data.prompts import Renderer
    from crossin_jax.evaluation.benchmarks import load_benchmark
    from crossin_jax.evaluation.frames import make_prompt

    renderer = Renderer(load_tokenizer(str(data / "tokenizers/llama2")), "alpaca")
    benchmark = load_benchmark(str(data / "seaeval/cross_mmlu.json"), LANGUAGES)
    asked = [
        (item.id, language, make_prompt(version, 1))
        for item in benchmark.items
        for language, version in item.versions.items()
    ]
    asked = [asked[i] for i in np.random.default_rng(0).permutation(len(asked))[:limit]]
    return [renderer.render_prompt(text) for *_, text in asked], [
        (item, language) for item, language, _ in asked
    ]


def read_lengths(data: Path, answers: str, asked: list[tuple[str, str]]) -> list[int]:
    """How many tokens each answer gets."""
    from crossin_jax.data.pipeline import load_tokenizer
    from crossin_jax.languages import LANGUAGES as NAMES

    if answers.isdigit():
        return [int(answers)] * len(asked)
    log = sorted((data / "seaeval/logs" / answers / "cross_mmlu").glob("*_p1.json.gz"))[0]
    rows = {row["id"]: row for row in json.loads(gzip.decompress(log.read_bytes()))}
    texts = [rows[item][NAMES[language]]["model_prediction"] for item, language in asked]
    tokens = load_tokenizer(str(data / "tokenizers/llama2"))(
        texts, add_special_tokens=False
    ).input_ids
    return [min(len(ids) + 1, LONGEST) for ids in tokens]  # with EOS


def spent(since: np.ndarray | float = 0.0) -> np.ndarray:
    """Seconds of the clock, and of all processors for this process."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return np.array([time.perf_counter(), usage.ru_utime + usage.ru_stime]) - since


def run_theirs(
    model: Any, prompts: list[np.ndarray], lengths: list[int], batch: int, by_length: bool
) -> tuple[np.ndarray, list[list[int]]]:
    """Seconds (clock, processors) and answers of `transformers.generate` in static, left-padded
    batches.
    """
    import torch
    import transformers

    class Lengths(transformers.StoppingCriteria):
        """Ends every row at its own length."""

        def __init__(self, start, limits):
            self.start, self.limits = start, torch.tensor(limits)

        def __call__(self, ids, scores, **kwargs):
            return ids.shape[1] - self.start >= self.limits

    answers: list[list[int]] = [[] for _ in prompts]
    order = (
        sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        if by_length
        else list(range(len(prompts)))
    )
    start = spent()
    for first in range(0, len(order), batch):
        rows = order[first : first + batch]
        longest = max(len(prompts[i]) for i in rows)
        tokens, mask = np.zeros((2, len(rows), longest), np.int64)
        for row, i in enumerate(rows):
            tokens[row, longest - len(prompts[i]) :], mask[row, longest - len(prompts[i]) :] = (
                prompts[i],
                1,
            )
        with torch.inference_mode():
            out = model.generate(
                torch.from_numpy(tokens),
                attention_mask=torch.from_numpy(mask),
                do_sample=False,
                max_new_tokens=max(lengths[i] for i in rows),
                eos_token_id=None,
                pad_token_id=0,
                stopping_criteria=transformers.StoppingCriteriaList(
                    [Lengths(longest, [lengths[i] for i in rows])]
                ),
            )
        for row, i in enumerate(rows):
            answers[i] = out[row, longest : longest + lengths[i]].tolist()
    return spent(start), answers


def run_ours(
    engine: Any, prompts: list[np.ndarray], lengths: list[int]
) -> tuple[np.ndarray, list[list[int]]]:
    """Seconds (clock, processors) and answers of the engine, whose programs are compiled
    already.
    """
    start, compiled = spent(), engine.compilations
    answers = engine.generate(prompts, max_new_tokens=lengths, progress=False)
    seconds = spent(start)
    if engine.compilations > compiled:  # a program was new: once more without it
        return run_ours(engine, prompts, lengths)
    return seconds, answers


def choose_batch(
    model: Any, prompts: list[np.ndarray], lengths: list[int], batches: list[int]
) -> dict[tuple[int, bool], float]:
    """Prompts per processor second of every static batch size and order on a sample."""
    run_theirs(model, prompts[:8], [4] * 8, 8, False)  # warm
    return {
        (batch, by_length): len(prompts)
        / run_theirs(model, prompts, lengths, batch, by_length)[0][1]
        for batch in batches
        for by_length in (False, True)
    }


def main() -> None:
    """Prints the table and writes it as JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data", type=Path, default=Path(__file__).resolve().parents[2] / "shared" / "data"
    )
    parser.add_argument("--limit", type=int, default=None, help="prompts; none: all 1,050")
    parser.add_argument(
        "--answers", default="gpt4_1106_preview,gemma_2b_it,128", help="logs or numbers of tokens"
    )
    parser.add_argument(
        "--batch", type=int, default=64, help="rows that our engine decodes at once"
    )
    parser.add_argument(
        "--batches", default="8,16,32", help="static batch sizes tried for transformers"
    )
    parser.add_argument(
        "--sample", type=int, default=128, help="prompts on which their batch is chosen"
    )
    parser.add_argument("--slices", type=int, default=3, help="turns of each side")
    for name, default in (
        ("width", 384),
        ("ff_width", 1024),
        ("layers", 8),
        ("heads", 6),
        ("threads", 0),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--out", type=Path, default=None)
    arguments = parser.parse_args()

    import torch

    from crossin_jax.generation.engine import Engine
    from crossin_jax.generation.model import load_model

    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as folder:
        theirs = make_model(Path(folder), arguments)
        loaded = load_model(folder, progress=False)
    engine = Engine(
        loaded.graphdef,
        loaded.state,
        loaded.spec,
        eos_ids=[],
        pad_id=0,
        batch_size=arguments.batch,
        cache_dtype="float32",
    )
    prompts, asked = read_prompts(arguments.data, arguments.limit)
    results = []
    print(
        f"{loaded.spec.num_parameters / 1e6:.1f} M parameters, {len(prompts)} prompts of "
        f"{np.mean([len(p) for p in prompts]):.0f} tokens on average"
    )
    for answers in arguments.answers.split(","):
        lengths = read_lengths(arguments.data, answers, asked)
        found = choose_batch(
            theirs,
            prompts[: arguments.sample],
            lengths[: arguments.sample],
            [int(size) for size in arguments.batches.split(",")],
        )
        batch, by_length = max(found, key=found.get)
        seconds, same = {"ours": np.zeros(2), "theirs": np.zeros(2)}, 0
        for part in np.array_split(np.arange(len(prompts)), arguments.slices):
            few, few_lengths = [prompts[i] for i in part], [lengths[i] for i in part]
            ours, our_answers = run_ours(engine, few, few_lengths)
            others, their_answers = run_theirs(theirs, few, few_lengths, batch, by_length)
            seconds["ours"] += ours
            seconds["theirs"] += others
            same += sum(a == b for a, b in zip(our_answers, their_answers, strict=True))
        ratio = seconds["theirs"] / seconds["ours"]
        results.append(
            {
                "answers": answers,
                "mean_length": float(np.mean(lengths)),
                "ratio": {"clock": ratio[0], "processors": ratio[1]},
                "seconds": {
                    side: {"clock": s[0], "processors": s[1]} for side, s in seconds.items()
                },
                "prompts_per_second": {side: len(prompts) / s[0] for side, s in seconds.items()},
                "their_batch": batch,
                "their_order": "by length" if by_length else "as given",
                "equal_answers": same,
                "their_sample": {
                    f"{size} {'by length' if order else 'as given'}": rate
                    for (size, order), rate in found.items()
                },
            }
        )
        print(
            f"answers as {answers} (mean {np.mean(lengths):.0f} tokens): ours "
            f"{len(prompts) / seconds['ours'][0]:.2f} prompts/s, transformers "
            f"{len(prompts) / seconds['theirs'][0]:.2f} (batch {batch}, "
            f"{results[-1]['their_order']}): {ratio[0]:.2f} x by the clock, {ratio[1]:.2f} x in "
            f"processor seconds ({seconds['ours'][1]:.0f} and {seconds['theirs'][1]:.0f}); "
            f"{same} of {len(prompts)} answers equal",
            flush=True,
        )
    print(f"{engine.compilations} programs, compiled in {engine.programs.compile_seconds:.0f} s")
    if arguments.out:
        write_record(arguments.out, arguments, results=results)


if __name__ == "__main__":
    main()
