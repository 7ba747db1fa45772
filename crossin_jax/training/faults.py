"""After a loss that is not finite: the rows it came from."""

import json
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from crossin_jax.data.loader import Loader
from crossin_jax.training.state import AbstractModel, to_mesh
from crossin_jax.training.step import StepSettings, TrainState, make_eval_step


def find_bad_rows(loader: Loader, position: tuple[int, int], state: TrainState, model: AbstractModel,
                  static: StepSettings, mesh: Mesh) -> list[int]:
    """Rows of the batch that began at a position whose own loss is not finite; none where only a gradient overflowed.

    The state must be that before the step, as it is: a step that meets a non-finite loss changes nothing. Halves the
    batch again and again, so one bad row of B costs about 2·log2(B) forward passes. Dropout is off.
    """
    loader.go_to(position)
    batch = to_mesh(next(loader), mesh)
    eval_step = make_eval_step(model.graphdef, static)

    @jax.jit
    def masked_loss(trainable, frozen, batch, mask_B):
        return eval_step(trainable, frozen, batch | {"learned_BT": batch["learned_BT"] & mask_B[:, None]})["loss"]

    def search(first: int, stop: int) -> list[int]:
        mask_B = np.zeros(num_rows, bool)
        mask_B[first:stop] = True
        if np.isfinite(masked_loss(state.trainable, state.frozen, batch, mask_B)):
            return []
        middle = (first + stop) // 2
        return [first] if stop - first == 1 else search(first, middle) + search(middle, stop)

    num_rows = batch["learned_BT"].shape[0]
    return search(0, num_rows)


def describe_fault(folder: Path, step: int, bad: list[int], examples: list[list[str]]) -> str:
    """Writes every example of the batch to `fault.json` and returns one line that names those of the bad rows."""
    rows = [{"row": i, "finite": i not in bad, "examples": names} for i, names in enumerate(examples)]
    if jax.process_index() == 0:
        (folder / "fault.json").write_text(json.dumps({"step": step, "rows": rows}, indent=1, ensure_ascii=False))
    if not bad:
        return f"every row's loss is finite, the gradient is not; the batch is listed in {folder / 'fault.json'}"
    names = [name for i in bad for name in examples[i]]
    return (f"rows {', '.join(map(str, bad[:4]))}{' …' if len(bad) > 4 else ''} of the batch: {'; '.join(names[:3])}"
            f"{' …' if len(names) > 3 else ''}; all in {folder / 'fault.json'}")
