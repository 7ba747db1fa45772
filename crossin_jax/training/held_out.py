"""The loss of held-out records, overall and by language."""

import contextlib
import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from crossin_jax.data.loader import Loader
from crossin_jax.training.state import AbstractModel, to_mesh
from crossin_jax.training.step import StepSettings, TrainState, make_eval_step
from crossin_jax.training.telemetry import group_metrics


class HeldOut:
    """The loss of one pass over the held-out records; its program is compiled once."""

    def __init__(
        self,
        open_batches: Callable[..., Loader],
        model: AbstractModel,
        settings: StepSettings,
        mesh: Mesh,
    ):
        self._open_batches, self._mesh = open_batches, mesh
        # One group per source and language: ("same:dev#2", "zh") becomes ("dev", "zh").
        self._groups = [
            ((component.partition(":")[2] or component).split("#")[0], language)
            for component, language in open_batches().groups
        ]
        settings = dataclasses.replace(settings, num_groups=len(self._groups))
        self._step = jax.jit(make_eval_step(model.graphdef, settings))

    def __call__(self, state: TrainState) -> dict[str, float]:
        """Means by name: held_out/loss, and held_out/loss/SOURCE/LANGUAGE."""
        with contextlib.closing(self._open_batches(num_epochs=1)) as loader:
            sums = []
            # A large model needs minutes for this, and it comes before the first step.
            batches = tqdm(
                loader,
                desc="held-out loss",
                total=math.ceil(loader.steps_per_epoch),
                delay=5,
                leave=False,
                disable=jax.process_index() != 0,
            )
            for batch in batches:
                self._wait((state, sums))
                batch = to_mesh(batch, self._mesh)
                sums.append(self._step(state.trainable, state.frozen, batch))
        total = jax.tree.map(lambda *parts: np.sum(parts, axis=0), *jax.device_get(sums))
        losses = {"held_out/loss": float(total["loss"] / total["count"])}
        by_group = group_metrics(self._groups, total["group_loss"], total["group_count"])
        return losses | {
            f"held_out/{name}": value for name, value in by_group.items() if name.startswith("loss")
        }

    def _wait(self, tree: Any) -> None:
        """On a CPU, waits for what is under way."""
        # Simulated devices share the threads of one pool. Two programs at once could take all of
        # them, and each would wait forever for the other.
        if self._mesh.devices.flat[0].platform == "cpu":
            jax.block_until_ready(tree)
