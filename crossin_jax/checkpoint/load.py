"""A model ready to call, from a folder, a Hub id or an adapter."""

import contextlib
import os
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from crossin_jax.checkpoint.hf import load_weights, read_json, read_spec, resolve_folder
from crossin_jax.checkpoint.peft import CONFIG, load_adapter, read_adapter
from crossin_jax.config import UserError
from crossin_jax.models.spec import ModelSpec
from crossin_jax.models.transformer import Transformer
from crossin_jax.parallel.mesh import shardings


class LoadedModel:
    """A model ready to call: `model(tokens_BT) -> logits_BTV` in float32; has `spec`, `graphdef`, `state`, `mesh`."""

    def __init__(self, spec: ModelSpec, graphdef: Any, state: Any, mesh: Mesh | None = None):
        self.spec, self.graphdef, self.state, self.mesh = spec, graphdef, state, mesh
        self._logits = jax.jit(lambda state, *inputs: nnx.merge(graphdef, state)(*inputs))

    def __call__(self, tokens_BT: Any, positions_BT: Any = None, segment_ids_BT: Any = None) -> jax.Array:
        """Logits (B, T, V) for token ids (B, T); segment 0 is padding. Compiled once per shape."""
        tokens_BT = np.asarray(tokens_BT, np.int32)
        if tokens_BT.ndim != 2 or tokens_BT.size and not 0 <= tokens_BT.min() <= tokens_BT.max() < self.spec.vocab_size:
            raise UserError(f"tokens of shape {tokens_BT.shape}: pass (rows, tokens) of ids from 0 to "
                            f"{self.spec.vocab_size - 1}")
        with jax.set_mesh(self.mesh) if self.mesh is not None else contextlib.nullcontext():
            return self._logits(self.state, tokens_BT, positions_BT, segment_ids_BT)


def abstract_transformer(spec: ModelSpec, mesh: Mesh | None, **settings: Any) -> tuple[Any, Any]:
    """(graphdef, abstract state with shardings) of a Transformer with these settings; allocates nothing."""
    graphdef, state = nnx.split(nnx.eval_shape(lambda: Transformer(spec, **settings, rngs=nnx.Rngs(0))))
    if mesh is not None:
        state = jax.tree.map(lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
                             state, shardings(state, mesh))
    return graphdef, state


def load_model(path: str | os.PathLike, *, dtype: str = "float32", mesh: Mesh | None = None,
               revision: str | None = None, progress: bool = True) -> LoadedModel:
    """A model from a Hugging Face folder, a Hub id or a PEFT adapter (on the base it names), computed in `dtype`.

    Raises `UserError` for what cannot be loaded. Example: `load_model("Qwen/Qwen2.5-0.5B")([[1, 2, 3]]).shape`.
    """
    if dtype not in ("float32", "bfloat16"):
        raise UserError(f"dtype={dtype!r}: models compute in float32 or bfloat16")
    folder, adapter = resolve_folder(path, revision), None
    if (folder / CONFIG).is_file() and not (folder / "config.json").is_file():
        adapter, settings = folder, read_json(folder / CONFIG)
        if not settings.get("base_model_name_or_path"):
            raise UserError(f"{folder / CONFIG}: base_model_name_or_path is missing; add the base's folder or Hub id")
        folder = resolve_folder(settings["base_model_name_or_path"], settings.get("revision"))
    spec, lora = read_spec(folder), None
    if adapter:
        adapter = read_adapter(adapter, spec)
        spec, lora = adapter.spec, adapter.lora
    graphdef, state = abstract_transformer(spec, mesh, lora=lora, param_dtype=dtype, frozen_dtype=dtype,
                                           compute_dtype=dtype)
    state = load_weights(folder, state, progress=progress)
    if adapter:
        state = load_adapter(adapter, state, progress=progress)
    return LoadedModel(spec, graphdef, state, mesh)
