"""After a loss that is not finite: which rows of the batch it came from.

Shape letters: B batch rows · T positions.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from crossin_jax.training.state import to_mesh
from crossin_jax.training.step import TrainState, make_eval_step


def explain(
    run: Any, step: int, position: tuple[int, int], state: TrainState, saved: Sequence[int]
) -> str:
    """The message for the user: the step, the last good checkpoint, the rows and the remedy.

    `run` is the `Run` of the training program; `position` is where the batch of the step starts.
    """
    newest = max(saved, default=None)
    good = "there is no checkpoint yet"
    if newest is not None:
        good = f"checkpoint {newest} is the last good state"
    bad = find_bad_rows(run, position, state)
    return (
        f"{run.folder}: the loss or gradient of step {step} is not finite; {good}\n"
        f"{describe_fault(run.folder, step, bad, run.loader.name_rows(position))}\n"
        "lower optim.learning_rate, set optim.clip_norm, or correct those rows"
    )


def find_bad_rows(run: Any, position: tuple[int, int], state: TrainState) -> list[int]:
    """Rows of a batch whose own loss is not finite; none where only a gradient overflowed.

    `state` is the one before the step. Dropout is off.
    """
    run.loader.go_to(position)
    batch = to_mesh(next(run.loader), run.mesh)
    eval_step = make_eval_step(run.model.graphdef, run.settings)

    @jax.jit
    def masked_loss(trainable, frozen, batch, mask_B):
        loss_mask_BT = batch["loss_mask_BT"] & mask_B[:, None]
        return eval_step(trainable, frozen, batch | {"loss_mask_BT": loss_mask_BT})["loss"]

    # Bisection: a half with a finite loss has no bad row, another one is halved again. One bad row
    # of B costs about 2·log2(B) forward passes instead of B.
    def search(first: int, stop: int) -> list[int]:
        mask_B = np.zeros(num_rows, bool)
        mask_B[first:stop] = True
        if np.isfinite(masked_loss(state.trainable, state.frozen, batch, mask_B)):
            return []
        middle = (first + stop) // 2
        return [first] if stop - first == 1 else search(first, middle) + search(middle, stop)

    num_rows = batch["loss_mask_BT"].shape[0]
    return search(0, num_rows)


def describe_fault(folder: Path, step: int, bad: list[int], examples: list[list[str]]) -> str:
    """Writes every example of the batch to `fault.json`; returns a line that names the bad rows."""
    file = folder / "fault.json"
    rows = [
        {"row": i, "finite": i not in bad, "examples": names} for i, names in enumerate(examples)
    ]
    if jax.process_index() == 0:
        file.write_text(json.dumps({"step": step, "rows": rows}, indent=1, ensure_ascii=False))
    if not bad:
        return f"every row's loss is finite, the gradient is not; the batch is listed in {file}"
    names = [name for i in bad for name in examples[i]]
    return (
        f"rows {', '.join(map(str, bad[:4]))}{' …' if len(bad) > 4 else ''} of the batch: "
        f"{'; '.join(names[:3])}{' …' if len(names) > 3 else ''}; all in {file}"
    )
