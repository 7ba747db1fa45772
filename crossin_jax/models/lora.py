"""Which parameters train under LoRA, adapters merged into the weights, and the start of DoRA."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from crossin_jax.config import Lora, UserError, hint
from crossin_jax.models.layers import Adapter, Linear
from crossin_jax.models.spec import ModelSpec

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
NORMS = ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm",
         "q_norm", "k_norm", "norm")


def modules(spec: ModelSpec) -> tuple[str, ...]:
    """Names of the modules that a model of this spec has and that can be trained in full."""
    absent = {"pre_feedforward_layernorm", "post_feedforward_layernorm"} if not spec.post_norms else set()
    absent |= set() if spec.qk_norm else {"q_norm", "k_norm"}
    return ("embed_tokens", "lm_head", *TARGETS, *(name for name in NORMS if name not in absent))


def resolve(lora: Lora | None, spec: ModelSpec) -> Lora | None:
    """The LoRA settings in effect for a model: names checked, `released_code_compatible` and tied embeddings applied.

    Raises `UserError` for a name that matches nothing and for a module that would be adapted and trained in full.
    """
    if lora is None:
        return None
    known = modules(spec)
    for field, names, allowed in (("targets", lora.targets, TARGETS), ("modules_to_save", lora.modules_to_save, known)):
        for name in names:
            if name not in allowed:
                raise UserError(f"lora.{field}: {name!r} matches nothing in a {spec.model_type} model"
                                f"{hint(name, allowed)}; known: {', '.join(allowed)}")
    targets = tuple(t for t in lora.targets if not (lora.released_code_compatible and t == "q_proj"))
    if not targets:
        raise UserError("lora.targets is empty: name at least one of " + ", ".join(TARGETS))
    both = [name for name in targets if name in lora.modules_to_save]
    if both:
        raise UserError(f"lora: {both[0]} stands in targets and in modules_to_save; keep it in one of them")
    saved = lora.modules_to_save
    if spec.tie_embeddings and "lm_head" in saved and "embed_tokens" not in saved:
        saved = (*saved, "embed_tokens")  # one matrix under two names
    return dataclasses.replace(lora, targets=targets, modules_to_save=saved)


def is_trainable(path: tuple[Any, ...], variable: nnx.Variable, lora: Lora | None) -> bool:
    """Whether a parameter receives gradients: everything without LoRA; else adapters and `modules_to_save`.

    `lora` as `resolve` returned it.
    """
    if lora is None or isinstance(variable, Adapter):
        return True
    return any(str(part) in lora.modules_to_save for part in path)


def merge(model: nnx.Module) -> nnx.Module:
    """A copy of the model with adapters added to the weights and removed.

    The sum is taken in float32, one layer at a time; a weight keeps its precision, a quantized one becomes bfloat16.
    """
    model = nnx.clone(model)
    for layer in _adapted(model):
        dtype = layer.weight.get_value().dtype if layer.scale is None else jnp.bfloat16
        layer.weight.set_value(_by_layer(layer, lambda one, dtype=dtype: one.merged_weight().astype(dtype)))
        layer.scale = layer.lora_a = layer.lora_b = layer.magnitude = None
    return model


def start_magnitudes(model: nnx.Module) -> None:
    """Sets the magnitudes of new DoRA adapters to the lengths of the loaded weights: training starts from the base."""
    for layer in _adapted(model):
        if layer.magnitude is not None:
            dtype = layer.magnitude.get_value().dtype
            layer.magnitude.set_value(_by_layer(layer, lambda one, dtype=dtype: one.lengths().astype(dtype)))


def _adapted(model: nnx.Module) -> Iterator[Linear]:
    for _, layer in nnx.iter_modules(model):
        if isinstance(layer, Linear) and layer.lora_a is not None:
            yield layer


def _by_layer(stacked: Linear, function: Any) -> jax.Array:
    """A function of one layer applied along the leading L, so that float32 copies exist for one layer at a time."""
    graphdef, state = nnx.split(stacked)
    return jax.lax.map(lambda one: function(nnx.merge(graphdef, one)), state)
