"""Rotary position embeddings: read from config.json, written to it, and applied.

Shape letters: B batch rows · T query positions · N query heads · H head width · P rotated pairs, at
most H/2.
"""

import functools
import math
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from crossin_jax.config import UserError, hint

# In config.json a null means that a field is absent, except for these: there it means off.
NULL_IS_OFF = ("sliding_window", "attn_logit_softcapping", "final_logit_softcapping")
ROPE_KINDS = ("default", "linear", "llama3", "yarn", "dynamic", "longrope")


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary position embedding: base, and how its frequencies are scaled to longer contexts.

    In transformers the frequencies of `dynamic` and `longrope` depend on the length of the whole
    batch. Here they are those of the original context, and `ModelSpec.max_length` ends there.
    """

    theta: float
    kind: str = "default"  # one of ROPE_KINDS
    factor: float = 1.0
    low_freq_factor: float = 1.0  # this and the next: llama3 only
    high_freq_factor: float = 4.0
    original_max_length: int = 8192  # llama3, yarn and longrope
    fraction: float = 1.0  # of the head width that is rotated; Phi-4-mini
    attention_factor: float = 1.0  # on cosine and sine; yarn and longrope
    beta_fast: float = 32.0  # this and the next two: yarn only
    beta_slow: float = 1.0
    truncate: bool = True
    short_factors: tuple[float, ...] = ()  # this and the next two: longrope only
    long_factors: tuple[float, ...] = ()
    extended_length: int | None = None  # max_position_embeddings of the file


def drop_nulls(config: dict[str, Any]) -> dict[str, Any]:
    """The fields that are present: a null means that one is absent, except where it means off."""
    return {
        name: value for name, value in config.items() if value is not None or name in NULL_IS_OFF
    }


def need(config: dict[str, Any], name: str, place: str) -> Any:
    """A field that has to be there."""
    if config.get(name) is None:
        raise UserError(
            f"{place}: the field {name!r} is missing; take config.json from the model's own "
            "repository"
        )
    return config[name]


def read_rope(
    config: dict[str, Any],
    place: str,
    *,
    local_theta: float | None,
    aliases: dict[str, str],
    partial: bool,
) -> tuple[Rope, Rope | None]:
    """The rope of global layers, and of local layers where theirs differs.

    transformers 5 writes `rope_parameters`, before it was `rope_theta` and `rope_scaling`. Where a
    file has both, transformers 5 takes `rope_scaling` instead of `rope_parameters`, and for Gemma 3
    in addition to it. `local_theta`: the family has local layers with a rope of their own;
    `aliases`: its other names of rope types; `partial`: part of a head may go without rotation.
    """
    parse = functools.partial(_parse, config=config, aliases=aliases, partial=partial, place=place)
    values, scaling = config.get("rope_parameters"), config.get("rope_scaling")
    # Gemma 3: one entry for global and one for local layers.
    if local_theta is not None:
        if values is None:
            return parse(scaling or {}), Rope(float(local_theta))
        full, local = (
            need(values, name, f"{place}, rope_parameters")
            for name in ("full_attention", "sliding_attention")
        )
        local = parse(local)
        if local.kind != "default":  # the layout that both versions read has no place for it
            raise UserError(
                f"{place}: rope type {local.kind!r} of the local layers is not supported; "
                "supported there: default"
            )
        return parse({**full, **(scaling or {})}), local
    if values is not None and "full_attention" in values:
        raise UserError(
            f"{place}: rope_parameters by layer type are not supported for {config['model_type']}; "
            "write those of all layers directly into rope_parameters"
        )
    # What transformers would lose without a word: the base of the frequencies, and with it the
    # model.
    if values and scaling:
        kept, lost = (
            drop_nulls(v).get("rope_theta", config["rope_theta"]) for v in (scaling, values)
        )
        if kept != lost:
            raise UserError(
                f"{place}: rope_scaling replaces rope_parameters in transformers, and with it "
                f"rope_theta={lost} becomes {kept}; move the fields of rope_scaling into "
                "rope_parameters"
            )
    return parse(scaling or values or {}), None


def _parse(
    values: dict[str, Any],
    *,
    config: dict[str, Any],
    aliases: dict[str, str],
    partial: bool,
    place: str,
) -> Rope:
    values = drop_nulls(values)
    kind = values.get("rope_type", values.get("type", "default"))
    kind = aliases.get(kind, kind)
    if kind not in ROPE_KINDS:
        raise UserError(
            f"{place}: rope type {kind!r} is not supported{hint(kind, ROPE_KINDS)}; "
            f"supported: {', '.join(ROPE_KINDS)}"
        )
    fraction = values.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    if fraction != 1.0 and not partial:
        raise UserError(
            f"{place}: partial_rotary_factor={fraction} is not supported; supported: 1.0"
        )

    def number(name: str) -> float:
        return float(need(values, name, f"{place}, rope"))

    rope = Rope(float(values.get("rope_theta", config["rope_theta"])), kind, fraction=fraction)
    if kind == "default":
        return rope
    if kind == "longrope":
        return _parse_longrope(rope, values, config, place)
    rope = replace(rope, factor=number("factor"))
    if kind == "llama3":
        return replace(
            rope,
            low_freq_factor=number("low_freq_factor"),
            high_freq_factor=number("high_freq_factor"),
            original_max_length=int(number("original_max_position_embeddings")),
        )
    if kind == "yarn":
        return _parse_yarn(rope, values, config, place)
    return rope


def _parse_yarn(rope: Rope, values: dict[str, Any], config: dict[str, Any], place: str) -> Rope:
    """YaRN (arXiv 2309.00071), as transformers reads it: DeepSeek's two mscales included."""
    top, bottom = values.get("mscale"), values.get("mscale_all_dim")
    attention = _mscale(rope.factor)
    if top and bottom:
        attention = _mscale(rope.factor, top) / _mscale(rope.factor, bottom)
    length = values.get("original_max_position_embeddings") or need(
        config, "max_position_embeddings", place
    )
    return replace(
        rope,
        original_max_length=int(config.get("original_max_position_embeddings", length)),
        attention_factor=float(values.get("attention_factor", attention)),
        beta_fast=float(values.get("beta_fast") or 32),
        beta_slow=float(values.get("beta_slow") or 1),
        truncate=bool(values.get("truncate", True)),
    )


def _mscale(factor: float, weight: float = 1.0) -> float:
    """YaRN's factor on cosine and sine, section 3.4."""
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def _parse_longrope(rope: Rope, values: dict[str, Any], config: dict[str, Any], place: str) -> Rope:
    """LongRoPE (arXiv 2402.13753): a divisor for each frequency, within and beyond the original
    context.
    """
    # Phi-3 keeps the original length beside the rope, and transformers takes that one first.
    extended = int(need(config, "max_position_embeddings", place))
    original = config.get("original_max_position_embeddings") or values.get(
        "original_max_position_embeddings", extended
    )
    factor = float(values.get("factor", extended / original))
    spread = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    width = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    count = int(width * rope.fraction) // 2
    lists = {}
    for name in ("short_factor", "long_factor"):
        lists[name] = tuple(map(float, need(values, name, f"{place}, rope")))
        if len(lists[name]) != count:
            raise UserError(
                f"{place}: {name} of the rope has {len(lists[name])} entries; it takes {count}, "
                "one for each pair of rotated numbers"
            )
    return replace(
        rope,
        factor=factor,
        original_max_length=int(original),
        attention_factor=float(values.get("attention_factor", spread)),
        short_factors=lists["short_factor"],
        long_factors=lists["long_factor"],
        extended_length=extended,
    )


def rope_to_hf(rope: Rope) -> dict[str, Any] | None:
    """The field `rope_scaling` of config.json."""
    if rope.kind == "default":
        return None
    if rope.kind == "longrope":
        # transformers 4 accepts exactly these three fields; it derives the factors from the two
        # lengths
        return {
            "type": "longrope",
            "short_factor": list(rope.short_factors),
            "long_factor": list(rope.long_factors),
        }
    values: dict[str, Any] = {"rope_type": rope.kind, "factor": rope.factor}
    if rope.kind in ("llama3", "yarn"):
        values["original_max_position_embeddings"] = rope.original_max_length
    names: tuple[str, ...] = ()
    if rope.kind == "llama3":
        names = ("low_freq_factor", "high_freq_factor")
    elif rope.kind == "yarn":  # as most files do, without what follows from the rest
        usual = Rope(rope.theta, attention_factor=_mscale(rope.factor))
        names = ("attention_factor", "beta_fast", "beta_slow", "truncate")
        names = tuple(name for name in names if getattr(rope, name) != getattr(usual, name))
    return values | {name: getattr(rope, name) for name in names}


# Pair i turns by theta^(-2i/H) radians per position. With theta = 10,000 and H = 128, pair 0 turns
# once in 6 tokens and pair 63 once in 54,000. Scaled ropes slow pairs down, so that positions
# beyond the original context have angles that the model has seen.
def rope_frequencies(rope: Rope, head_width: int) -> np.ndarray:
    """Radians per position of each rotated pair, (P,) float32 (Su et al. 2021; llama3: Llama 3.1
    model card).
    """
    width = int(head_width * rope.fraction)
    exponents = np.arange(0, width, 2, dtype=np.float32) / np.float32(width)
    # Each step is rounded to float32 as in torch: one ulp here is 1e-3 radians at position 9000.
    wavelengths = (rope.theta ** exponents.astype(np.float64)).astype(np.float32)
    frequencies = np.float32(1) / wavelengths
    if rope.kind == "linear":
        return frequencies / np.float32(rope.factor)
    if rope.kind == "llama3":
        # Turns of a pair over the original context: few turns are stretched, many are kept, between
        # them a ramp.
        #     turns   0 … low_freq_factor … high_freq_factor …
        #     kept    0 … 0               … 1                …
        turns = rope.original_max_length * frequencies / (2 * math.pi)
        kept = np.clip(
            (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor), 0, 1
        )
        return ((1 - kept) * frequencies / rope.factor + kept * frequencies).astype(np.float32)
    if rope.kind == "yarn":
        # The same idea; the ramp is straight in the number of the pair instead of its turns.
        low, high = (_find_pair(rope, width, turns) for turns in (rope.beta_fast, rope.beta_slow))
        if rope.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, width - 1)
        high += 0.001 if low == high else 0
        ramp = (np.arange(width // 2, dtype=np.float32) - np.float32(low)) / np.float32(high - low)
        kept = 1 - np.clip(ramp, 0, 1)
        stretched = np.float32(1) / (np.float32(rope.factor) * wavelengths)
        return (stretched * (1 - kept) + frequencies * kept).astype(np.float32)
    if rope.kind == "longrope":
        return np.float32(1) / (np.asarray(rope.short_factors, np.float32) * wavelengths)
    return frequencies


def _find_pair(rope: Rope, width: int, turns: float) -> float:
    """The number of the pair, as a fraction, that makes so many turns over the original context."""
    ratio = rope.original_max_length / (turns * 2 * math.pi)
    return width * math.log(ratio) / (2 * math.log(rope.theta))


def rope_tables(
    positions_BT: jax.Array, frequencies: np.ndarray, factor: float = 1.0
) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine times a factor, each (B, T, P) float32: in bfloat16 position 257
    becomes 256.
    """
    # One angle for each position and rotated pair.
    angles = positions_BT.astype(jnp.float32)[..., None] * jnp.asarray(frequencies)[None, None]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return (cos, sin) if factor == 1 else (factor * cos, factor * sin)


# A head of H = 8 numbers has the pairs (0 4) (1 5) (2 6) (3 7): `first` is 0 to 3, `second` 4 to 7.
# Each pair is a point in the plane that is turned by position · frequency:
#
#     (a, b)  →  (a cos − b sin, b cos + a sin)
def rotate(x_BTNH: jax.Array, cos: jax.Array, sin: jax.Array, scale: float = 1.0) -> jax.Array:
    """Applies rotary positions to the two halves of the rotated part, and a scale: in float32, one
    rounding for both.

    Pair i is elements i and P + i. With P below H/2 the elements from 2P on are left as they are.
    """
    width, H = 2 * cos.shape[-1], x_BTNH.shape[-1]
    # The split of a whole head is written as such: as slices it would be compiled to other
    # roundings.
    turned = x_BTNH if width == H else x_BTNH[..., :width]
    first, second = jnp.split(turned.astype(jnp.float32), 2, axis=-1)
    cos, sin = scale * cos[:, :, None], scale * sin[:, :, None]
    parts = [first * cos - second * sin, second * cos + first * sin]
    if width < H:
        parts.append(scale * x_BTNH[..., width:].astype(jnp.float32))
    return jnp.concatenate(parts, axis=-1).astype(x_BTNH.dtype)
