"""Which parameters train under LoRA, adapters merged into the weights, and the start of DoRA."""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from crossin_jax.config import Lora, UserError, hint
from crossin_jax.models.layers import Adapter, Linear
from crossin_jax.models.modules import TARGETS, fused_parts, layer_modules
from crossin_jax.models.spec import ModelSpec


def modules(spec: ModelSpec) -> tuple[str, ...]:
    """Names of the modules that a model of this spec has and that can be trained in full."""
    norms = (name for name, _ in layer_modules(spec) if name not in TARGETS)
    return ("embed_tokens", "lm_head", *TARGETS, *norms, "norm")


# What this settles, for tied embeddings and modules_to_save=("lm_head",): the head is the embedding
# matrix, so ("lm_head", "embed_tokens") train, and `is_trainable` finds the one matrix by its name.
def resolve(lora: Lora | None, spec: ModelSpec) -> Lora | None:
    """The LoRA settings in effect for a model: names checked, `released_code_compatible` and tied
    embeddings applied.

    Raises `UserError` for a name that matches nothing and for a module that would be adapted and
    trained in full.
    """
    if lora is None:
        return None
    known = modules(spec)
    for field, names, allowed in (
        ("targets", lora.targets, TARGETS),
        ("modules_to_save", lora.modules_to_save, known),
    ):
        for name in names:
            if name not in allowed:
                raise UserError(
                    f"lora.{field}: {name!r} matches nothing in a {spec.model_type} model"
                    f"{hint(name, allowed)}; known: {', '.join(allowed)}"
                )
    # The release asked for "p_proj", which matched nothing: its models have no adapter on q_proj.
    targets = tuple(
        t for t in lora.targets if not (lora.released_code_compatible and t == "q_proj")
    )
    if not targets:
        raise UserError("lora.targets is empty: name at least one of " + ", ".join(TARGETS))
    both = [name for name in targets if name in lora.modules_to_save]
    if both:
        raise UserError(
            f"lora: {both[0]} is in targets and in modules_to_save; keep it in one of them"
        )
    # PEFT has one adapter for a fused weight. One on some of its parts could not be exported.
    for parts in fused_parts(spec).values():
        for field, names in (("targets", targets), ("modules_to_save", lora.modules_to_save)):
            if 0 < len(set(parts) & set(names)) < len(parts):
                raise UserError(
                    f"lora.{field}: {', '.join(parts)} are one weight in a {spec.model_type} "
                    "model; name all of them or none"
                    + (
                        "; released_code_compatible leaves out q_proj"
                        if targets != lora.targets
                        else ""
                    )
                )
    saved = lora.modules_to_save
    # Tied embeddings are one matrix under two names.
    if spec.tie_embeddings and "lm_head" in saved and "embed_tokens" not in saved:
        saved = (*saved, "embed_tokens")
    return dataclasses.replace(lora, targets=targets, modules_to_save=saved)


def is_trainable(path: tuple[Any, ...], variable: nnx.Variable, lora: Lora | None) -> bool:
    """Whether a parameter receives gradients: everything without LoRA; else adapters and
    `modules_to_save`.

    `lora` as `resolve` returned it.
    """
    if lora is None or isinstance(variable, Adapter):
        return True
    # "norm" is the last norm alone: those of the layers have names of their own.
    return any(str(part) in lora.modules_to_save for part in path)


def merge(model: nnx.Module, dtype: Any = None) -> nnx.Module:
    """A copy of the model with adapters added to the weights and removed.

    The sum is taken in float32, one layer at a time. `dtype` is the precision of the sums; None
    keeps that of the weight, and takes bfloat16 for a quantized one.
    """
    # The clone shares its arrays with the model: only the weights that are replaced are new.
    model = nnx.clone(model)
    for layer in _adapted(model):
        kept = layer.weight.get_value().dtype if layer.scale is None else jnp.bfloat16
        kept = jnp.dtype(dtype or kept)
        layer.weight.set_value(
            _by_layer(layer, lambda one, kept=kept: one.merged_weight().astype(kept))
        )
        layer.scale = layer.lora_a = layer.lora_b = layer.magnitude = None
    return model


def measure_rounding(
    model: nnx.Module, dtype: Any, saved: Sequence[tuple[jax.Array, jax.Array]] = ()
) -> float:
    """What is lost when the merged weights are stored in `dtype`: the rounding error over the
    update, both as rms.

    `saved` has the weights that were trained in full: each as it is, and as it was in the base.
    What is lost of them and what is lost of the adapter are two ratios; the larger one counts.
    """
    # A bfloat16 weight of 0.1 has neighbours 0.0005 away: an update below 0.00025 is lost whole.
    info = jnp.finfo(dtype)

    @jax.jit
    def squares(after: jax.Array, before: jax.Array) -> jax.Array:
        after, before = after.astype(jnp.float32), before.astype(jnp.float32)
        # two conversions in a row would be optimised away
        rounded = jax.lax.reduce_precision(after, info.nexp, info.nmant)
        return jnp.stack([jnp.sum((rounded - after) ** 2), jnp.sum((after - before) ** 2)])

    def squares_of(one: Linear) -> jax.Array:
        return squares(one.merged_weight(), one.wide_weight())

    def ratio(sums: Iterable[jax.Array]) -> float:
        error, update = sum(sums, jnp.zeros(2))
        return float(jnp.sqrt(error / update)) if update else 0.0

    # Apart: a large update of the embedding would hide that a small one of the layers is lost.
    adapted = (_by_layer(layer, squares_of).sum(axis=0) for layer in _adapted(model))
    return max(ratio(adapted), ratio(squares(*pair) for pair in saved))


def start_magnitudes(model: nnx.Module) -> None:
    """Sets the magnitudes of new DoRA adapters to the lengths of the loaded weights: training
    starts from the base.
    """
    for layer in _adapted(model):
        if layer.magnitude is not None:
            dtype = layer.magnitude.get_value().dtype
            layer.magnitude.set_value(
                _by_layer(layer, lambda one, dtype=dtype: one.lengths().astype(dtype))
            )


def _adapted(model: nnx.Module) -> Iterator[Linear]:
    for _, layer in nnx.iter_modules(model):
        if isinstance(layer, Linear) and layer.lora_a is not None:
            yield layer


def _by_layer(stacked: Linear, function: Any) -> jax.Array:
    """A function of one layer applied along the leading L, so that float32 copies exist for one
    layer at a time.
    """
    # A stack of Llama-2-7B's down_proj is 5.8 GB in float32, one layer 180 MB.
    graphdef, state = nnx.split(stacked)
    return jax.lax.map(lambda one: function(nnx.merge(graphdef, one)), state)
