"""Which parameters train under LoRA, and adapters merged into the weights."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from crossin_jax.config import Lora, UserError, hint
from crossin_jax.models.layers import Adapter, Linear

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
MODULES_TO_SAVE = ("embed_tokens", "lm_head", "norm")


def resolve(lora: Lora | None) -> Lora | None:
    """The LoRA settings in effect: checks names and applies `released_code_compatible`."""
    if lora is None:
        return None
    for name in lora.targets:
        if name not in TARGETS:
            raise UserError(f"lora.targets: {name!r} matches no projection{hint(name, TARGETS)}; known: "
                            + ", ".join(TARGETS))
    for name in lora.modules_to_save:
        if name not in MODULES_TO_SAVE:
            raise UserError(f"lora.modules_to_save: {name!r} is not a module that can be trained in full"
                            f"{hint(name, MODULES_TO_SAVE)}; known: {', '.join(MODULES_TO_SAVE)}")
    targets = tuple(t for t in lora.targets if not (lora.released_code_compatible and t == "q_proj"))
    if not targets:
        raise UserError("lora.targets is empty: name at least one of " + ", ".join(TARGETS))
    return dataclasses.replace(lora, targets=targets)


def is_trainable(path: tuple[Any, ...], variable: nnx.Variable, lora: Lora | None) -> bool:
    """Whether a parameter receives gradients: everything without LoRA; else adapters and `modules_to_save`."""
    if lora is None or isinstance(variable, Adapter):
        return True
    return any(str(part) in lora.modules_to_save for part in path)


def merge(model: nnx.Module) -> nnx.Module:
    """A copy of the model with W + scale · BA in place of W and without adapters; the sum is taken in float32."""
    model = nnx.clone(model)
    for _, layer in nnx.iter_modules(model):
        if isinstance(layer, Linear) and layer.lora_a is not None:
            weight = layer.weight.get_value()
            layer.weight.set_value((weight.astype(jnp.float32) + layer.delta()).astype(weight.dtype))
            layer.lora_a = layer.lora_b = None
    return model


def count(state: Any) -> int:
    """Numbers in a pytree of arrays or shapes."""
    return sum(leaf.size for leaf in jax.tree.leaves(state))
