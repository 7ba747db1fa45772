"""Option scores and greedy answers per second beside `transformers`: the same Llama of random
weights on one GPU.

    python benchmarks/gpu_answers.py [--out FILE.json]
    python benchmarks/gpu_answers.py --quick     (tiny shapes on any machine)

The prompts are those of a benchmark in shape: 256 questions of 64 to 384 tokens, each with four
choices of 2 to 24 tokens to score, and answers of 8 to 128 tokens to generate. Both sides compute
in bfloat16. `transformers` gets the best of several batch sizes, prompts sorted by length, SDPA;
its generation gets as many tokens as the longest answer of each batch needs. Sums of
log-likelihoods of both sides are compared. Compilation is not counted.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from gpu import MORE, SHAPES, attempt, best, find_torch_device
from record import write_record

Question = tuple[np.ndarray, list[np.ndarray], int]  # prompt, choices, tokens of the answer


def make_questions(vocabulary: int, count: int, scale: int) -> list[Question]:
    """Random token ids with the lengths of a benchmark, divided by `scale`."""
    rng = np.random.default_rng(0)

    def draw(low: int, high: int) -> np.ndarray:
        size = rng.integers(max(1, low // scale), high // scale + 1)
        return rng.integers(3, vocabulary, size).astype(np.int32)

    return [
        (draw(64, 384), [draw(2, 24) for _ in range(4)], len(draw(8, 128))) for _ in range(count)
    ]


def write_model(shape: dict[str, Any], folder: str, device: str) -> None:
    """A Llama of random weights in bfloat16, in Hugging Face layout."""
    import torch
    import transformers

    torch.manual_seed(0)
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(
            transformers.LlamaConfig(**MORE, **shape, initializer_range=0.05), dtype=torch.bfloat16
        )
    model.save_pretrained(folder)


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of the second of two runs, and its result: the first one compiles."""
    work()
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def ours(folder: str, questions: list[Question], batch: int) -> dict[str, Any]:
    """Questions per second of our engine, scoring and answering."""
    import crossin_jax
    from crossin_jax.generation.engine import Engine

    model = crossin_jax.load_model(folder, dtype="bfloat16", progress=False)
    engine = Engine(
        model.graphdef, model.state, model.spec, eos_ids=[], pad_id=0, mesh=None, batch_size=batch
    )
    prompts, choices, lengths = (list(part) for part in zip(*questions, strict=True))
    scoring, scores = timed(lambda: engine.score(prompts, choices, progress=False))
    answering, _ = timed(lambda: engine.generate(prompts, max_new_tokens=lengths, progress=False))
    return {
        "scored_per_second": len(questions) / scoring,
        "answered_per_second": len(questions) / answering,
        "scores": [list(map(float, row)) for row in scores],
    }


def pad(rows: list[np.ndarray], left: bool) -> tuple[np.ndarray, np.ndarray]:
    """Rows (B, T) filled with zeros on one side, and where they are not filled."""
    width = max(map(len, rows))
    ids, mask = np.zeros((len(rows), width), np.int64), np.zeros((len(rows), width), np.int64)
    for i, row in enumerate(rows):
        place = slice(width - len(row), width) if left else slice(0, len(row))
        ids[i, place], mask[i, place] = row, 1
    return ids, mask


def theirs(folder: str, questions: list[Question], batch: int, device: str) -> dict[str, Any]:
    """The same of `transformers`."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, attn_implementation="sdpa"
    )
    model = model.to(device).eval()
    order = sorted(range(len(questions)), key=lambda i: len(questions[i][0]))

    def send(array: np.ndarray) -> Any:
        return torch.from_numpy(array).to(device)

    @torch.inference_mode()
    def score() -> list[list[float]]:
        pairs = [(i, k) for i in order for k in range(4)]
        scores = [[0.0] * 4 for _ in questions]
        for first in range(0, len(pairs), batch):
            some = pairs[first : first + batch]
            rows = [np.concatenate([questions[i][0], questions[i][1][k]]) for i, k in some]
            ids, mask = pad(rows, left=False)
            logits = model(send(ids), attention_mask=send(mask)).logits
            for row, (i, k) in enumerate(some):
                start, size = len(questions[i][0]), len(questions[i][1][k])
                words = torch.log_softmax(logits[row, start - 1 : start - 1 + size].float(), -1)
                targets = send(questions[i][1][k].astype(np.int64))[:, None]
                scores[i][k] = words.gather(-1, targets).sum()
        return [[float(value) for value in row] for row in scores]

    @torch.inference_mode()
    def answer() -> None:
        for first in range(0, len(order), batch):
            some = order[first : first + batch]
            ids, mask = pad([questions[i][0] for i in some], left=True)
            length = max(questions[i][2] for i in some)
            model.generate(
                input_ids=send(ids),
                attention_mask=send(mask),
                max_new_tokens=length,
                min_new_tokens=length,
                do_sample=False,
                pad_token_id=0,
            )
        if device == "cuda":
            torch.cuda.synchronize()

    scoring, scores = timed(score)
    answering, _ = timed(answer)
    return {
        "scored_per_second": len(questions) / scoring,
        "answered_per_second": len(questions) / answering,
        "scores": scores,
    }


def main() -> int:
    """Prints both sides and writes them; 1 where ours could not do the work or the scores
    differ.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", default="1B", choices=list(SHAPES))
    parser.add_argument("--questions", type=int, default=256)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    quick, device = arguments.quick, find_torch_device(arguments.quick)
    shape = SHAPES["tiny" if quick else arguments.shape]
    questions = make_questions(
        shape["vocab_size"], 6 if quick else arguments.questions, 8 if quick else 1
    )
    if device is None:
        raise SystemExit("error: the peer needs a CUDA build of torch")
    results: dict[str, Any] = {"questions": len(questions)}
    with tempfile.TemporaryDirectory() as folder:
        write_model(shape, folder, device)
        for side, sizes, function, more in (
            ("ours", (4,) if quick else (64, 128), ours, ()),
            ("theirs", (4,) if quick else (16, 64), theirs, (device,)),
        ):
            found = {
                f"{side}, batch {size}": attempt(quick, function, folder, questions, size, *more)
                for size in sizes
            }
            results[side] = {
                key: best(found, key) for key in ("scored_per_second", "answered_per_second")
            }
    sums = [
        np.array(results[side]["scored_per_second"].pop("scores"))
        for side in ("ours", "theirs")
        if results[side]["scored_per_second"]
    ]
    for side in ("ours", "theirs"):
        for row in filter(None, results[side].values()):
            row.pop("scores", None)
    is_whole = len(sums) == 2
    if is_whole:
        apart = np.abs(sums[0] - sums[1]) / np.abs(sums[1])
        results["scores_apart"] = {"median": float(np.median(apart)), "most": float(apart.max())}
        results["same_choice"] = float(np.mean(sums[0].argmax(-1) == sums[1].argmax(-1)))
        for key in ("scored_per_second", "answered_per_second"):
            results[f"{key}_ratio"] = results["ours"][key][key] / results["theirs"][key][key]
    print(json.dumps(results, indent=1))
    if arguments.out:
        write_record(arguments.out, arguments, results=results)
    # bfloat16 keeps 8 bits, and a sum adds up the rounding of up to 24 tokens
    return int(not is_whole or results["scores_apart"]["median"] > 0.01)


if __name__ == "__main__":
    sys.exit(main())
