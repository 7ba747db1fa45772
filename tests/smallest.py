"""The smallest study, sound and with one part broken at a time; a process of its own, on one
device.

    python tests/smallest.py FOLDER SEED [mixture mask scorer]

Prints {"sound": {arm: {score: value}}, "mixture": …} with the scores of the test territories.
"""

import dataclasses
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import numpy as np

from crossin_jax import cli
from crossin_jax.config import Config
from crossin_jax.data import mixture, packing
from crossin_jax.evaluate import evaluate
from crossin_jax.export import export
from crossin_jax.generation.engine import Engine
from crossin_jax.report.summary import OTHERS, Run, summarise
from crossin_jax.train import train

CONFIG = Path(__file__).resolve().parent.parent / "configs/mini_study.py:smallest"
ARMS = ("english", "x2x_same")


@contextmanager
def broken(part: str) -> Iterator[None]:
    """Everything inside runs with one part of the package broken."""
    if part == "mixture":  # every component is English, whatever its kind

        def draw_pairs(self, units, rows, passes):
            return np.full(len(units), self.pivot), np.full(len(units), self.pivot)

        change = mock.patch.object(mixture.Pool, "draw_pairs", draw_pairs)
    elif part == "mask":  # the question is learned, the answer is not
        fill = packing.PackedWindows._fill

        def swap(self, rows, kept):
            arrays = fill(self, rows, kept)
            return arrays | {"loss_mask": (arrays["segment_ids"] > 0) & ~arrays["loss_mask"]}

        change = mock.patch.object(packing.PackedWindows, "_fill", swap)
    else:  # choices are scored after another question
        score = Engine.score

        def shift(self, prompts, continuations, **options):
            return score(self, [*prompts[2:], *prompts[:2]], continuations, **options)

        change = mock.patch.object(Engine, "score", shift)
    with change:
        yield


def ask(config: Config, folder: Path, out: Path) -> dict[str, float]:
    """Scores of one arm, choices by log-likelihood per token."""
    blocks = summarise([Run(config.name, config.seed, evaluate(config, folder, out)[0])])
    block = next(block for block in blocks if block.method == "mean" and block.tag is None)
    return {name: block.rows[0].scores[name].value for name in ("accuracy/en", OTHERS, "AC3_2")}


def main(root: Path, seed: int, parts: list[str]) -> dict[str, dict[str, dict[str, float]]]:
    """Scores of the sound study, and with each of the parts broken."""
    study = cli.call_config_file(str(CONFIG), "get_study", seeds=(seed,), root=str(root))
    start, arms = study.cells[0].config, {cell.config.name: cell.config for cell in study.cells[1:]}
    train(start)
    export(Path(start.output_dir), "hf", Path(start.output_dir) / "model")
    sound = {arm: train(arms[arm]) for arm in ARMS}
    found = {"sound": {arm: ask(arms[arm], sound[arm], root / "asked" / arm) for arm in ARMS}}
    for part in parts:
        with broken(part):
            # Against a broken base the gap is smaller still.
            changed = ARMS if part == "scorer" else ARMS[1:]
            folders = {
                arm: sound[arm]
                if part == "scorer"
                else train(dataclasses.replace(arms[arm], output_dir=str(root / part / arm)))
                for arm in changed
            }
            found[part] = found["sound"] | {
                arm: ask(arms[arm], folder, root / f"asked_{part}" / arm)
                for arm, folder in folders.items()
            }
    return found


if __name__ == "__main__":
    os.environ["TQDM_DISABLE"] = "1"
    print(json.dumps(main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])))
