"""The key/value cache: a dictionary of arrays, written in place, masked by stored positions.

Shape letters: L layers · B rows · T new tokens · S slots · K key/value heads · H head width.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

from crossin_jax.models.spec import ModelSpec

# Two rows with five slots, after prompts of 3 and 2 tokens (left-padded) and one drawn token:
#
#     positions   0  1  2  3 -1        next_slot = 4: a new token goes into slot 4 of both rows.
#                -1  0  1  2 -1        No token attends to a slot of position -1.
Cache = dict[str, jax.Array]
_PER_LAYER = ("k", "v", "k_scale", "v_scale")


# The slots of one head lie side by side, (…, K, S, H): a decode step reads them as one stretch.
def init_cache(
    spec: ModelSpec, batch: int, length: int, dtype: Any = "bfloat16", *, stacked: bool = True
) -> Cache:
    """An empty cache of `length` slots per row; `dtype` float32, bfloat16 or int8.

    k and v (L, B, K, S, H); with int8 also k_scale and v_scale (L, B, K, S) float32. If not
    `stacked`, they are tuples of L arrays. positions (B, S) int32 is -1 for an empty slot.
    next_slot () int32 is where the next token is written; the caller may set it to (B,) for a slot
    per row. The order of slots means nothing: attention compares stored positions. The caller keeps
    next_slot + T within S.
    """
    shape = (spec.num_kv_heads, length, spec.head_width)

    def zeros(shape, dtype):
        if stacked:
            return jnp.zeros((spec.num_layers, batch, *shape), dtype)
        return tuple(jnp.zeros((batch, *shape), dtype) for _ in range(spec.num_layers))

    cache = {
        "k": zeros(shape, dtype),
        "v": zeros(shape, dtype),
        "positions": jnp.full((batch, length), -1, jnp.int32),
        "next_slot": jnp.zeros((), jnp.int32),
    }
    if jnp.dtype(dtype) == jnp.int8:
        cache |= {
            "k_scale": zeros(shape[:-1], jnp.float32),
            "v_scale": zeros(shape[:-1], jnp.float32),
        }
    return cache


def layer_arrays(cache: Cache) -> Cache:
    """The arrays with a leading L, which the scan carries, or the tuples of L arrays."""
    return {name: cache[name] for name in _PER_LAYER if name in cache}


def write_positions(cache: Cache, positions_BT: jax.Array, segment_ids_BT: jax.Array) -> Cache:
    """The cache with the positions of these tokens; a slot with padding (segment 0) stays empty."""
    stored = jnp.where(segment_ids_BT == 0, -1, positions_BT)
    positions_1B1S = _write_slots(
        cache["positions"][None, :, None],
        stored[:, None],
        jnp.zeros((), jnp.int32),
        cache["next_slot"],
    )
    return {**cache, "positions": positions_1B1S[0, :, 0]}


def write_layer(
    layers: Cache, layer: jax.Array, slot: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array
) -> Cache:
    """The `layer_arrays` with keys and values of one layer written from `slot` on."""
    new = {"k": k_BTKH.swapaxes(1, 2), "v": v_BTKH.swapaxes(1, 2)}
    if "k_scale" in layers:
        # One scale for the H numbers of a slot and head: a large number coarsens only its own slot,
        # and writing a token changes no other slot.
        for name in ("k", "v"):
            wide = new[name].astype(jnp.float32)
            scale = jnp.max(jnp.abs(wide), axis=-1) / 127
            new[name + "_scale"] = scale
            new[name] = jnp.round(wide / jnp.maximum(scale, 1e-30)[..., None])
    return {name: _write_slots(stack, new[name], layer, slot) for name, stack in layers.items()}


def read_layer(layers: Cache, layer: jax.Array, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """Keys and values (B, K, S, H) of one layer."""
    one = {
        name: jax.lax.dynamic_index_in_dim(stack, layer, keepdims=False)
        for name, stack in layers.items()
    }
    if "k_scale" in one:
        return tuple(
            (one[n].astype(jnp.float32) * one[n + "_scale"][..., None]).astype(dtype)
            for n in ("k", "v")
        )
    return one["k"].astype(dtype), one["v"].astype(dtype)


def _write_slots(stack: jax.Array, new: jax.Array, layer: jax.Array, slot: jax.Array) -> jax.Array:
    """Writes (B, K, T, …) into (L, B, K, S, …) at a layer, from one slot or one slot per row."""
    new = new.astype(stack.dtype)
    if slot.ndim == 0:
        start = (layer.astype(slot.dtype), 0, 0, slot) + (0,) * (stack.ndim - 4)
        written = jax.lax.dynamic_update_slice(stack, new[None], start)
        # Without this, the TPU compiler changes the layout inside the decode loop and copies the
        # whole cache twice per step.
        return with_layout_constraint(written, Layout(major_to_minor=tuple(range(stack.ndim))))
    # Rows write to slots of their own. A slot beyond the cache belongs to a row that has ended: it
    # is dropped.
    rows, slots = jnp.arange(new.shape[0])[:, None], slot[:, None] + jnp.arange(new.shape[2])[None]
    return stack.at[layer, rows, :, slots].set(new.swapaxes(1, 2), mode="drop")
