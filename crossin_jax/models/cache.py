"""The key/value cache: a dictionary of arrays, written in place, masked by stored positions."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

from crossin_jax.models.spec import ModelSpec

Cache = dict[str, jax.Array]
_PER_LAYER = ("k", "v", "k_scale", "v_scale")


def init_cache(spec: ModelSpec, batch: int, length: int, dtype: Any = "bfloat16", *, stacked: bool = True) -> Cache:
    """An empty cache of `length` slots per row; `dtype` float32, bfloat16 or int8.

    k, v (L, B, K, S, H), with int8 also k_scale, v_scale (L, B, K, S) float32, or tuples of L arrays where not
    `stacked`; positions (B, S) int32, -1 where nothing is stored; length () int32, the next slot to write, or set by
    the caller to (B,) for a slot per row. The order of slots carries no meaning: who sees whom goes by stored
    positions. The caller keeps length + T within S.
    """
    shape = (spec.num_kv_heads, length, spec.head_width)

    def zeros(shape, dtype):
        if stacked:
            return jnp.zeros((spec.num_layers, batch, *shape), dtype)
        return tuple(jnp.zeros((batch, *shape), dtype) for _ in range(spec.num_layers))

    cache = {"k": zeros(shape, dtype), "v": zeros(shape, dtype),
             "positions": jnp.full((batch, length), -1, jnp.int32), "length": jnp.zeros((), jnp.int32)}
    if jnp.dtype(dtype) == jnp.int8:
        cache |= {"k_scale": zeros(shape[:-1], jnp.float32), "v_scale": zeros(shape[:-1], jnp.float32)}
    return cache


def stacks(cache: Cache) -> Cache:
    """The arrays with a leading L, which the scan over layers carries, or the tuples of L arrays."""
    return {name: cache[name] for name in _PER_LAYER if name in cache}


def is_stacked(cache: Cache) -> bool:
    """Whether the layers share their arrays."""
    return not isinstance(cache["k"], tuple)


def note_positions(cache: Cache, positions_BT: jax.Array, segment_ids_BT: jax.Array) -> Cache:
    """The cache with the positions of these tokens; padding (segment 0) is noted as nothing stored."""
    stored = jnp.where(segment_ids_BT == 0, -1, positions_BT)
    positions_1B1S = _write(cache["positions"][None, :, None], stored[:, None], jnp.zeros((), jnp.int32),
                            cache["length"])
    return {**cache, "positions": positions_1B1S[0, :, 0]}


def store(layers: Cache, layer: jax.Array, slot: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array) -> Cache:
    """The stacks with keys and values of one layer written from `slot` on."""
    new = {"k": k_BTKH.swapaxes(1, 2), "v": v_BTKH.swapaxes(1, 2)}
    if "k_scale" in layers:
        for name in ("k", "v"):
            wide = new[name].astype(jnp.float32)
            scale = jnp.max(jnp.abs(wide), axis=-1) / 127
            new[name + "_scale"] = scale
            new[name] = jnp.round(wide / jnp.maximum(scale, 1e-30)[..., None])
    return {name: _write(stack, new[name], layer, slot) for name, stack in layers.items()}


def load(layers: Cache, layer: jax.Array, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """Keys and values (B, K, S, H) of one layer."""
    one = {name: jax.lax.dynamic_index_in_dim(stack, layer, keepdims=False) for name, stack in layers.items()}
    if "k_scale" in one:
        return tuple((one[n].astype(jnp.float32) * one[n + "_scale"][..., None]).astype(dtype) for n in ("k", "v"))
    return one["k"].astype(dtype), one["v"].astype(dtype)


def _write(stack: jax.Array, new: jax.Array, layer: jax.Array, slot: jax.Array) -> jax.Array:
    """Writes (B, K, T, …) into (L, B, K, S, …) at one layer, from one slot or from one slot per row."""
    new = new.astype(stack.dtype)
    if slot.ndim == 0:
        start = (layer.astype(slot.dtype), 0, 0, slot) + (0,) * (stack.ndim - 4)
        written = jax.lax.dynamic_update_slice(stack, new[None], start)
        # left to itself, the TPU compiler has slots outermost within a loop: a second cache, copied in and out
        return with_layout_constraint(written, Layout(major_to_minor=tuple(range(stack.ndim))))
    rows, slots = jnp.arange(new.shape[0])[:, None], slot[:, None] + jnp.arange(new.shape[2])[None]
    return stack.at[layer, rows, :, slots].set(new.swapaxes(1, 2), mode="drop")
