"""From a configuration to a model on the mesh: abstract first, then initialised, imported or restored."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

from crossin_jax.checkpoint import hf, peft
from crossin_jax.config import Config, UserError
from crossin_jax.models.layers import Adapter
from crossin_jax.models.lora import is_trainable, resolve, start_magnitudes
from crossin_jax.models.spec import ModelSpec, spec_from_architecture
from crossin_jax.models.transformer import Transformer
from crossin_jax.parallel.mesh import batch_sharding, shardings
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
        return spec_from_architecture(config.model.architecture, config.model.architecture.vocab_size)
    spec = hf.read_spec(hf.resolve_folder(config.model.path, config.model.revision))
    if config.lora and config.lora.path:  # an adapter may have a head of its own over tied embeddings
        spec = peft.read_adapter(config.lora.path, spec, config.lora).spec
    return spec


def check_tokenizer(config: Config, tokenizer: Any, spec: ModelSpec) -> None:
    """Refuses a tokenizer with ids that the model has no embedding for."""
    if len(tokenizer) > spec.vocab_size:
        name = config.model.tokenizer or config.model.path
        raise UserError(f"model.tokenizer={name}: {len(tokenizer)} tokens, but the model's vocabulary has "
                        f"{spec.vocab_size}; use the tokenizer that came with the weights")


def build(config: Config, spec: ModelSpec, key: jax.Array) -> Transformer:
    """The model object of a configuration; under `jax.eval_shape` or `jax.jit` nothing is allocated."""
    return Transformer(spec, lora=config.lora, param_dtype=config.model.param_dtype,
                       frozen_dtype=config.model.frozen_dtype, compute_dtype=config.model.compute_dtype,
                       rngs=nnx.Rngs(key))


def abstract_model(config: Config, spec: ModelSpec, mesh: Mesh) -> AbstractModel:
    """Structure and shardings of the model, split into what trains and what is frozen."""
    model = nnx.eval_shape(partial(build, config, spec), jax.random.key(0))
    if mesh.devices.flat[0].platform == "cpu":
        model.flatten_products()
        model.skips_unlearned = mesh.size == 1
    lora = resolve(config.lora, spec)
    graphdef, trainable, frozen = nnx.split(model, lambda path, leaf: is_trainable(path, leaf, lora), ...)
    return AbstractModel(spec, graphdef, on_mesh(trainable, mesh), on_mesh(frozen, mesh))


def on_mesh(tree: Any, mesh: Mesh) -> Any:
    """The abstract tree with the sharding of each leaf attached."""
    return jax.tree.map(lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
                        tree, shardings(tree, mesh))


def abstract_state(model: AbstractModel, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """The training state without arrays: what restore, ahead-of-time compilation and checks work from."""
    scalars = on_mesh((jax.ShapeDtypeStruct((), jnp.int32), jax.ShapeDtypeStruct((), bool)), mesh)
    moments = on_mesh(jax.eval_shape(optimizer.init, model.trainable), mesh)
    return TrainState(*scalars, model.trainable, model.frozen, moments)


def load_base(config: Config, *states: Any) -> Any:
    """Weights of one or several abstract states, from `model.path` and `lora.path` straight onto their shardings."""
    folder = hf.resolve_folder(config.model.path, config.model.revision)
    states = hf.load_weights(folder, states)
    if config.lora and config.lora.path:
        states = peft.load_adapter(peft.read_adapter(config.lora.path, hf.read_spec(folder), config.lora), states)
    return states


def start_state(config: Config, model: AbstractModel, abstract: TrainState,
                optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step: weights from `model.path` or random, fresh adapters, zero moments."""
    trainable, frozen = model.trainable, model.frozen
    drawn = trainable
    if config.model.path is not None:
        trainable, frozen = load_base(config, trainable, frozen)
        drawn = nnx.filter_state(model.trainable, Adapter) if config.lora and not config.lora.path else nnx.State({})
    if jax.tree.leaves(drawn):
        paths = {path for path, _ in nnx.to_flat_state(drawn)}

        def draw() -> nnx.State:
            return nnx.state(build(config, model.spec, jax.random.key(config.seed)), lambda path, _: path in paths)

        trainable = nnx.merge_state(trainable, jax.jit(draw, out_shardings=placed(drawn))())
        if config.lora and config.lora.use_dora:
            magnitudes = nnx.filter_state(drawn, lambda path, _: path[-1] == "magnitude")
            trainable = nnx.merge_state(trainable, jax.jit(
                partial(_start_magnitudes, model.graphdef), out_shardings=placed(magnitudes))(trainable, frozen))
    moments = jax.jit(optimizer.init, out_shardings=placed(abstract.optimizer))(trainable)
    scalars = (jnp.zeros((), jnp.int32), jnp.ones((), bool))
    step, finite = jax.device_put(scalars, placed((abstract.step, abstract.finite)))
    return TrainState(step, finite, trainable, frozen, moments)


def _start_magnitudes(graphdef: Any, trainable: nnx.State, frozen: nnx.State) -> nnx.State:
    """The magnitudes of new DoRA adapters: the lengths of the loaded weights."""
    merged = nnx.merge(graphdef, trainable, frozen)
    start_magnitudes(merged)
    return nnx.state(merged, lambda path, _: path[-1] == "magnitude")


def placed(abstract: Any) -> Any:
    """The shardings of an abstract tree."""
    return jax.tree.map(lambda leaf: leaf.sharding, abstract)


def to_mesh(batch: dict[str, np.ndarray], mesh: Mesh) -> Batch:
    """This process's rows of a batch as global arrays."""
    sharding = batch_sharding(mesh)
    return {name: jax.make_array_from_process_local_data(sharding, rows) for name, rows in batch.items()}
