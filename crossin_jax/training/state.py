"""From a configuration to a model on the mesh: abstract first, then initialised, imported or
restored.
"""

import contextlib
import dataclasses
import json
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

from crossin_jax.checkpoint.fingerprint import find_changed, find_unlike
from crossin_jax.checkpoint.hf import (
    ORIGIN,
    load_weights,
    read_export,
    read_spec,
    resolve_folder,
    state_leaves,
)
from crossin_jax.checkpoint.peft import load_adapter, read_adapter
from crossin_jax.checkpoint.store import list_steps
from crossin_jax.config import Config, UserError
from crossin_jax.models.cpu import model_options
from crossin_jax.models.layers import Adapter
from crossin_jax.models.lora import is_trainable, resolve, start_magnitudes
from crossin_jax.models.spec import ModelSpec, spec_from_architecture
from crossin_jax.models.transformer import Transformer
from crossin_jax.parallel.mesh import batch_sharding, fast_dtype, leaf_name, shardings
from crossin_jax.training.step import Batch, TrainState


@dataclasses.dataclass(frozen=True)
class AbstractModel:
    """A model without arrays: structure, and the shape, dtype and sharding of every parameter."""

    spec: ModelSpec
    graphdef: Any
    trainable: nnx.State
    frozen: nnx.State


def model_spec(config: Config) -> ModelSpec:
    """The spec of `model.path` or of `model.architecture`; reads no weight."""
    if config.model.architecture:
        return spec_from_architecture(
            config.model.architecture, config.model.architecture.vocab_size
        )
    spec = read_spec(resolve_folder(config.model.path, config.model.revision))
    if config.lora and config.lora.path:
        # An adapter may have a head of its own over tied embeddings.
        spec = read_adapter(config.lora.path, spec, config.lora).spec
    return spec


def check_base(config: Config, frozen: Any, origin: dict[str, Any], place: Path) -> bool:
    """Refuses frozen weights on which the checkpoint in `place` was not trained; `origin` is its
    provenance.

    False where some are in another precision than in training and cannot be compared. A checkpoint
    of an earlier version has no fingerprints of its base: then nothing is compared.
    """
    if not jax.tree.leaves(frozen) or "base_weights" not in origin:
        return True
    changed, skipped = find_changed(origin["base_weights"], frozen)
    if changed:
        raise UserError(
            f"model.path={config.model.path}: {changed[0]} is not what {place} was trained on "
            f"({len(changed)} of {len(origin['base_weights'])} arrays differ)\n"
            "bring back that base model, or train on this one with another output_dir"
        )
    return not skipped


def load_start(config: Config, *states: Any, progress: bool = True) -> Any:
    """`load_base` at the start of a run, which also checks folders that `export` wrote."""
    states = load_base(config, *states, progress=progress)
    check_export(resolve_folder(config.model.path, config.model.revision), states)
    if config.lora and config.lora.path:
        check_export(resolve_folder(config.lora.path), states)
    return states


def check_export(folder: Path, states: Any) -> None:
    """Refuses weights that differ from those that `export` wrote to `folder`, or from the base on
    which its adapter was trained.

    Other folders pass, and so do weights in a precision in which they cannot be compared.
    """
    origin = read_export(folder)
    if not origin:
        return
    leaves = {
        path: leaf for path, leaf in state_leaves(states).items() if isinstance(leaf, jax.Array)
    }
    for part, fault, remedy in (
        ("weights", "is not what was exported", "export it again, or bring it back from a copy"),
        (
            "base_weights",
            "of the base model is not what the adapter was trained on",
            f"bring that base model back: {origin.get('base') or 'see README.md there'}",
        ),
    ):
        if changed := find_unlike(origin[part], leaves):
            raise UserError(
                f"{folder}: {changed[0]} {fault} "
                f"({len(changed)} of {len(origin[part])} arrays differ)\n"
                f"{remedy}; or delete {folder / ORIGIN} to use it as it is"
            )


def build(config: Config, spec: ModelSpec, key: jax.Array, **options: Any) -> Transformer:
    """The model of a configuration, with random weights; `jax.eval_shape` of it has no arrays."""
    config = resolve_precision(config)
    return Transformer(
        spec,
        lora=config.lora,
        param_dtype=config.model.param_dtype,
        frozen_dtype=config.model.frozen_dtype,
        compute_dtype=config.model.compute_dtype,
        **options,
        rngs=nnx.Rngs(key),
    )


def resolve_precision(config: Config, device: Any = None) -> Config:
    """The configuration with "auto" replaced by what the device (None: the first one) computes
    fast.
    """
    if config.model.compute_dtype != "auto":
        return config
    dtype = fast_dtype(jax.devices()[0] if device is None else device)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, compute_dtype=dtype))


def settle_precision(config: Config, folder: Path | None) -> Config:
    """The configuration with "auto" replaced: by the precision of the run in `folder` where it
    continues, else as in `resolve_precision`.
    """
    if config.model.compute_dtype == "auto" and folder and list_steps(folder / "checkpoints"):
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
            dtype = json.loads((folder / "config.json").read_text())["model"]["compute_dtype"]
            model = dataclasses.replace(config.model, compute_dtype=dtype)
            config = dataclasses.replace(config, model=model)
    return resolve_precision(config)


def describe_precision(config: Config, mesh: Mesh) -> str:
    """Devices and precision in one line, for the log."""
    first = mesh.devices.flat[0]
    model = config.model
    frozen = f", frozen weights in {model.frozen_dtype}" if config.lora else ""
    return f"{mesh.size} x {first.device_kind}: products in {model.compute_dtype}{frozen}"


# Nothing has arrays yet here. All that makes arrays later starts from these shapes and shardings:
#
#     spec ─ eval_shape ─► shapes, axes ─ mesh ─► shardings ─┬─ start_state     draws or reads
#                                                            ├─ Store.restore   continues a run
#                                                            └─ plan            only compiles
def abstract_model(config: Config, spec: ModelSpec, mesh: Mesh) -> AbstractModel:
    """Structure and shardings of the model, split into what trains and what is frozen."""
    config = resolve_precision(config, mesh.devices.flat[0])
    options = model_options(mesh.devices.flat[0].platform, mesh.size)
    model = nnx.eval_shape(partial(build, config, spec, **options), jax.random.key(0))
    lora = resolve(config.lora, spec)
    graphdef, trainable, frozen = nnx.split(
        model, lambda path, leaf: is_trainable(path, leaf, lora), ...
    )
    return AbstractModel(spec, graphdef, on_mesh(trainable, mesh), on_mesh(frozen, mesh))


def flops_per_token(model: AbstractModel, length: int) -> float:
    """Model FLOPs per token of a training step, as the makers of chips count them for MFU.

    For P parameters the forward pass takes 2P, the backward pass 2P, and 2P more for those that
    train. An untied embedding is a look-up and not counted. Attention adds 12·L·N·H·T as in PaLM
    (arXiv 2204.02311, appendix B). What rematerialisation computes again is not counted.
    """
    spec = model.spec

    def count(state: nnx.State) -> int:
        leaves, _ = jax.tree_util.tree_flatten_with_path(state)
        return sum(
            leaf.size
            for path, leaf in leaves
            if spec.tie_embeddings or not leaf_name(path).startswith("embed_tokens")
        )

    attention = 12 * spec.num_layers * spec.num_heads * spec.head_width * length
    return 6 * count(model.trainable) + 4 * count(model.frozen) + attention


def on_mesh(tree: Any, mesh: Mesh) -> Any:
    """The abstract tree with the sharding of each leaf attached."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        tree,
        shardings(tree, mesh),
    )


def abstract_state(
    model: AbstractModel, optimizer: optax.GradientTransformation, mesh: Mesh
) -> TrainState:
    """The training state without arrays, for restoring, compiling ahead of time and checks."""
    scalars = on_mesh((jax.ShapeDtypeStruct((), jnp.int32), jax.ShapeDtypeStruct((), bool)), mesh)
    moments = on_mesh(jax.eval_shape(optimizer.init, model.trainable), mesh)
    return TrainState(*scalars, model.trainable, model.frozen, moments)


def load_base(config: Config, *states: Any, progress: bool = True) -> Any:
    """Weights of one or several abstract states, from `model.path` and `lora.path` straight onto
    their shardings.

    The adapter is read only if a state has some of its leaves. A run that continues loads only
    frozen weights, which have none.
    """
    folder = resolve_folder(config.model.path, config.model.revision)
    states = load_weights(folder, states, progress=progress)
    if config.lora and config.lora.path:
        adapter = read_adapter(config.lora.path, read_spec(folder), config.lora)
        if adapter.tensors.keys() & state_leaves(states).keys():
            states = load_adapter(adapter, states, progress=progress)
    return states


# Where the arrays of a new run come from:
#
#                         no model.path     model.path          model.path and lora.path
#     base weights        drawn             read                read
#     adapters            drawn             drawn               read
#     optimizer moments   zero              zero                zero
def start_state(
    config: Config,
    model: AbstractModel,
    abstract: TrainState,
    optimizer: optax.GradientTransformation,
) -> TrainState:
    """The state before the first step: weights from `model.path` or random, fresh adapters, zero
    moments.
    """
    trainable, frozen = model.trainable, model.frozen
    drawn = trainable
    if config.model.path is not None:
        trainable, frozen = load_start(config, trainable, frozen)
        drawn = (
            nnx.filter_state(model.trainable, Adapter)
            if config.lora and not config.lora.path
            else nnx.State({})
        )
    if jax.tree.leaves(drawn):
        paths = {path for path, _ in nnx.to_flat_state(drawn)}

        def draw() -> nnx.State:
            return nnx.state(
                build(config, model.spec, jax.random.key(config.seed)),
                lambda path, _: path in paths,
            )

        trainable = nnx.merge_state(trainable, jax.jit(draw, out_shardings=shardings_of(drawn))())
        if config.lora and config.lora.use_dora:
            magnitudes = nnx.filter_state(drawn, lambda path, _: path[-1] == "magnitude")
            trainable = nnx.merge_state(
                trainable,
                jax.jit(
                    partial(_start_magnitudes, model.graphdef),
                    out_shardings=shardings_of(magnitudes),
                )(trainable, frozen),
            )
    moments = jax.jit(optimizer.init, out_shardings=shardings_of(abstract.optimizer))(trainable)
    scalars = (jnp.zeros((), jnp.int32), jnp.ones((), bool))
    step, finite = jax.device_put(scalars, shardings_of((abstract.step, abstract.finite)))
    return TrainState(step, finite, trainable, frozen, moments)


def _start_magnitudes(graphdef: Any, trainable: nnx.State, frozen: nnx.State) -> nnx.State:
    """The magnitudes of new DoRA adapters: the lengths of the loaded weights."""
    merged = nnx.merge(graphdef, trainable, frozen)
    start_magnitudes(merged)
    return nnx.state(merged, lambda path, _: path[-1] == "magnitude")


def shardings_of(abstract: Any) -> Any:
    """The shardings of an abstract tree."""
    return jax.tree.map(lambda leaf: leaf.sharding, abstract)


def to_mesh(batch: dict[str, np.ndarray], mesh: Mesh) -> Batch:
    """This process's rows of a batch as global arrays."""
    sharding = batch_sharding(mesh)
    return {
        name: jax.make_array_from_process_local_data(sharding, rows) for name, rows in batch.items()
    }
