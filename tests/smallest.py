"""The smallest study, sound and with one part broken at a time; a process of its own, on one device.

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

from crossin_jax import program
from crossin_jax.config import Cell
from crossin_jax.data import mixture, packing
from crossin_jax.evaluate import evaluate
from crossin_jax.evaluation.summary import OTHERS, Run, summarise
from crossin_jax.export import export
from crossin_jax.generation.engine import Engine
from crossin_jax.train import train

CONFIG = Path(__file__).resolve().parent.parent / "configs/mini_study.py:smallest"
ARMS = ("base", "x2x_same")


@contextmanager
def broken(part: str) -> Iterator[None]:
    """Everything inside runs with one part of the package broken."""
    if part == "mixture":  # every component is English, whatever its kind
        def draw_pairs(self, units, rows, visits):
            return np.full(len(units), self.pivot), np.full(len(units), self.pivot)
        change = mock.patch.object(mixture.Pool, "draw_pairs", draw_pairs)
    elif part == "mask":  # the question is learned, the answer is not
        fill = packing.Windows._fill

        def swap(self, rows, kept):
            arrays = fill(self, rows, kept)
            return arrays | {"learned": (arrays["segment_ids"] > 0) & ~arrays["learned"]}
        change = mock.patch.object(packing.Windows, "_fill", swap)
    else:  # choices are scored after another question
        score = Engine.score

        def shift(self, prompts, continuations, **options):
            return score(self, [*prompts[2:], *prompts[:2]], continuations, **options)
        change = mock.patch.object(Engine, "score", shift)
    with change:
        yield


def tune(cells: dict[str, Cell], folder: Path, arms: tuple[str, ...]) -> None:
    """Trains arms into a folder."""
    for arm in arms:
        train(dataclasses.replace(cells[arm].config, output_dir=str(folder / arm)))


def ask(cells: dict[str, Cell], folders: dict[str, Path], out: Path) -> dict[str, dict[str, float]]:
    """Scores by arm, choices by log-likelihood per token."""
    runs = [Run(arm, cells[arm].config.seed, evaluate(cells[arm].config, folder, out / arm)[0])
            for arm, folder in folders.items()]
    block = next(b for b in summarise(runs) if b.method == "mean" and b.tag is None)
    return {row.arm: {name: row.scores[name].value for name in ("accuracy/en", OTHERS, "AC3_2")} for row in block.rows}


def main(root: Path, seed: int, parts: list[str]) -> dict[str, dict[str, dict[str, float]]]:
    """Scores of the sound study, and with each of the parts broken."""
    study = program.call_config_file(str(CONFIG), "get_study", seeds=(seed,), root=str(root))
    start, cells = study.cells[0], {cell.config.name: cell for cell in study.cells[1:]}
    train(start.config)
    export(Path(start.config.output_dir), "hf", Path(start.config.output_dir) / "model")
    sound = root / "sound"
    tune(cells, sound, ARMS)
    found = {"sound": ask(cells, {arm: sound / arm for arm in ARMS}, root / "asked")}
    for part in parts:
        folders = {arm: sound / arm for arm in ARMS}
        with broken(part):
            if part != "scorer":
                changed = ARMS if part == "mask" else ARMS[1:]  # base has no pairs
                tune(cells, root / part, changed)
                folders |= {arm: root / part / arm for arm in changed}
            found[part] = ask(cells, folders, root / f"asked_{part}")
    return found


if __name__ == "__main__":
    os.environ["TQDM_DISABLE"] = "1"
    print(json.dumps(main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])))
