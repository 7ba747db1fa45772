"""What the fingerprints of a checkpoint cost, beside saving and restoring it.

    python benchmarks/fingerprints.py --millions 100          (a full fine-tuning state)
    python benchmarks/fingerprints.py --millions 100 --lora   (the arrays that a LoRA run saves)

A full fine-tuning state is weights and two moments in float32.

Prints one line of JSON. `fingerprint` is the time of all arrays of the state; a save and a restore
take each of them once. The first call, which compiles, is reported apart: a run pays for it once.
"""

import argparse
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from crossin_jax.checkpoint.fingerprint import fingerprints, flatten
from crossin_jax.checkpoint.store import Store
from crossin_jax.config import Architecture, Config, Lora, Model
from crossin_jax.parallel.mesh import make_mesh
from crossin_jax.training.optim import make_optimizer
from crossin_jax.training.state import abstract_model, abstract_state, model_spec
from crossin_jax.training.step import TrainState


def make_state(config: Config) -> tuple[TrainState, TrainState]:
    """A state with random weights and moments, and its abstract form."""
    mesh = make_mesh(config.mesh)
    model = abstract_model(config, model_spec(config), mesh)
    abstract = abstract_state(model, make_optimizer(config.optim, 10), mesh)
    keys = iter(jax.random.split(jax.random.key(0), 10_000))

    def draw(leaf: Any) -> Any:
        is_float = jnp.issubdtype(leaf.dtype, jnp.floating)
        make = jax.random.normal if is_float else jnp.zeros
        arguments = (next(keys), leaf.shape, leaf.dtype) if is_float else (leaf.shape, leaf.dtype)
        return jax.device_put(make(*arguments), leaf.sharding)

    trainable, moments = (
        jax.tree.map(draw, part) for part in (abstract.trainable, abstract.optimizer)
    )
    state = TrainState(jnp.int32(1), jnp.bool_(True), trainable, abstract.frozen, moments)
    step, finite = jax.device_put(
        (state.step, state.finite), (abstract.step.sharding, abstract.finite.sharding)
    )
    return TrainState(step, finite, trainable, abstract.frozen, moments), abstract


def measure(action: Callable[[], Any], repeats: int) -> float:
    """The median time of an action, seconds."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        action()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--millions", type=int, default=100, help="parameters of the model, millions"
    )
    parser.add_argument("--lora", action="store_true", help="the state of a LoRA run")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=None, help="where the checkpoint is written")
    arguments = parser.parse_args()

    # A layer of width D has about 12 D² parameters, and there are 8 of them.
    width = round((arguments.millions * 1e6 / (8 * 12)) ** 0.5 / 64) * 64
    architecture = Architecture(
        width=width, ff_width=4 * width, num_layers=8, num_heads=8, num_kv_heads=8
    )
    config = Config(model=Model(architecture=architecture, compute_dtype="float32"))
    if arguments.lora:
        config.lora = Lora(rank=16)
    state, abstract = make_state(config)
    saved = {"trainable": state.trainable, "optimizer": state.optimizer}
    jax.block_until_ready(saved)
    size = sum(leaf.nbytes for leaf in flatten(saved).values())

    compiled = measure(lambda: fingerprints(saved), 1)
    fingerprint = measure(lambda: fingerprints(saved), arguments.repeats)
    folder = Path(tempfile.mkdtemp(prefix="fingerprints_", dir=arguments.folder))
    saves, restores = [], []
    try:
        for i in range(arguments.repeats):
            with Store(folder / str(i), config=config) as store:
                saves.append(measure(lambda: (store.save(state, {}, {}), store.wait()), 1))
                restores.append(measure(lambda: store.restore(1, abstract, config), 1))
            shutil.rmtree(folder / str(i))
    finally:
        shutil.rmtree(folder)
    save, restore = statistics.median(saves), statistics.median(restores)
    result = {
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "state_gib": round(size / 2**30, 3),
        "arrays": len(flatten(saved)),
        "first_fingerprint_s": round(compiled, 3),
        "fingerprint_s": round(fingerprint, 3),
        "save_s": round(save, 3),
        "restore_s": round(restore, 3),
        "share_of_save": round(fingerprint / save, 4),
        "share_of_restore": round(fingerprint / restore, 4),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
