"""The key/value cache: every number in its slot, and rounded to the nearest in eight bits."""

import jax.numpy as jnp
import numpy as np
import pytest

from crossin_jax.models.cache import (
    init_cache,
    layer_arrays,
    read_layer,
    write_layer,
    write_positions,
)
from tests.models.models import LLAMA

L, B, K, S, H, T = LLAMA.num_layers, 3, LLAMA.num_kv_heads, 7, LLAMA.head_width, 2


def keys_and_values():
    """New keys and values (B, T, K, H)."""
    rng = np.random.default_rng(0)
    return (rng.standard_normal((B, T, K, H)).astype(np.float32) for _ in range(2))


def test_an_empty_cache_has_nothing_stored():
    """Shapes and precisions of both forms; -1 is no position."""
    for stacked in (True, False):
        cache = init_cache(LLAMA, B, S, "int8", stacked=stacked)
        assert isinstance(cache["k"], tuple) != stacked
        assert cache["positions"].shape == (B, S) and (cache["positions"] == -1).all()
        assert cache["next_slot"].shape == () and cache["next_slot"] == 0
        arrays = layer_arrays(cache)
        assert set(arrays) == {"k", "v", "k_scale", "v_scale"}
        for name, array in arrays.items():
            shape = (B, K, S) if name.endswith("scale") else (B, K, S, H)
            dtype = jnp.float32 if name.endswith("scale") else jnp.int8
            layers = [array[i] for i in range(L)]
            assert len(array) == L and all(layer.shape == shape for layer in layers)
            assert all(layer.dtype == dtype for layer in layers)
    assert set(layer_arrays(init_cache(LLAMA, B, S))) == {"k", "v"}
    assert init_cache(LLAMA, B, S)["k"].dtype == jnp.bfloat16


SLOTS = {
    "common": 3,
    "per_row": [0, 5, 2],
    "one_row_is_full": [1, 7, 4],
    "one_row_is_nearly_full": [6, 0, 5],
}


@pytest.mark.parametrize("slot", SLOTS.values(), ids=SLOTS)
@pytest.mark.parametrize("layer", [0, 2])
def test_what_is_stored_lies_in_its_slots_and_nowhere_else(slot, layer):
    """Layer, row and slot as asked for; what has no slot left is dropped."""
    rng = np.random.default_rng(1)
    before = {name: rng.standard_normal((L, B, K, S, H)).astype(np.float32) for name in ("k", "v")}
    k, v = keys_and_values()
    stored = write_layer(
        {name: jnp.asarray(array) for name, array in before.items()},
        jnp.int32(layer),
        jnp.asarray(slot, jnp.int32),
        jnp.asarray(k),
        jnp.asarray(v),
    )
    expected = {name: array.copy() for name, array in before.items()}
    for b, t in np.ndindex(B, T):
        at = (slot if isinstance(slot, int) else slot[b]) + t
        if at < S:
            expected["k"][layer, b, :, at], expected["v"][layer, b, :, at] = k[b, t], v[b, t]
    for name in ("k", "v"):
        np.testing.assert_array_equal(stored[name], expected[name])
    read = read_layer(stored, jnp.int32(layer), jnp.float32)
    for name, array in zip(("k", "v"), read, strict=True):
        np.testing.assert_array_equal(array, expected[name][layer])


@pytest.mark.parametrize("slot", SLOTS.values(), ids=SLOTS)
def test_positions_are_noted_beside_what_is_stored(slot):
    """Those of padding are none."""
    cache = init_cache(LLAMA, B, S) | {"next_slot": jnp.asarray(slot, jnp.int32)}
    positions = np.array([[4, 5], [0, 1], [8, 2]], np.int32)
    segments = np.array([[1, 1], [0, 1], [2, 0]], np.int32)
    noted = write_positions(cache, jnp.asarray(positions), jnp.asarray(segments))
    expected = np.full((B, S), -1)
    for b, t in np.ndindex(B, T):
        at = (slot if isinstance(slot, int) else slot[b]) + t
        if at < S:
            expected[b, at] = positions[b, t] if segments[b, t] else -1
    np.testing.assert_array_equal(noted["positions"], expected)
    np.testing.assert_array_equal(noted["next_slot"], slot)  # the caller moves on


def test_eight_bits_hold_the_nearest_of_255_steps():
    """Each head has its own scale; its largest number is exact, others are near by half a step."""
    k, v = keys_and_values()
    k *= np.array([1e-3, 50.0]).reshape(1, 1, K, 1)  # heads of unlike size
    v[0, 0, 1] = 0
    cache = init_cache(LLAMA, B, S, "int8")
    stored = write_layer(
        layer_arrays(cache), jnp.int32(1), jnp.int32(2), jnp.asarray(k), jnp.asarray(v)
    )
    read = [np.asarray(array) for array in read_layer(stored, jnp.int32(1), jnp.float32)]
    for exact, array in zip((k, v), read, strict=True):
        here = array[:, :, 2 : 2 + T].swapaxes(1, 2)  # (B, T, K, H)
        largest = np.abs(exact).max(-1, keepdims=True)
        assert (np.abs(here - exact) <= largest / 127 / 2 * (1 + 1e-5)).all()
        at_largest = np.abs(exact) == largest
        np.testing.assert_allclose(here[at_largest], exact[at_largest], rtol=1e-6)
        assert not array[:, :, :2].any() and not array[:, :, 2 + T :].any()
    assert not np.asarray(read_layer(stored, jnp.int32(0), jnp.float32)[0]).any()
    assert read_layer(stored, jnp.int32(1), jnp.bfloat16)[0].dtype == jnp.bfloat16
