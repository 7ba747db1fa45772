"""The cache in int8: how far keys and values are rounded."""

import jax.numpy as jnp
import numpy as np
import pytest

from crossin_jax.models.cache import init_cache, layer_arrays, read_layer, write_layer
from tests.models.models import LLAMA

B, T, S = 2, 5, 9


@pytest.mark.parametrize(
    ("dtype", "step"), [("float32", 0), ("bfloat16", 2**-8), ("int8", 1 / 254)]
)
def test_keys_and_values_are_rounded_by_no_more_than_their_precision(dtype, step):
    """int8: half of a 127th of the largest number of a vector, whatever stands in other vectors."""
    rng, K, H = np.random.default_rng(0), LLAMA.num_kv_heads, LLAMA.head_width
    lengths = 10.0 ** rng.integers(-6, 5, (2, B, T, K, 1))  # vectors of very different size
    k, v = (lengths * rng.normal(size=(2, B, T, K, H))).astype(np.float32)
    k[1, 2, 0] = 0
    stored = write_layer(
        layer_arrays(init_cache(LLAMA, B, S, dtype)), jnp.int32(1), jnp.int32(3), k, v
    )
    for expected, found in zip((k, v), read_layer(stored, jnp.int32(1), "float32"), strict=True):
        found, expected = np.asarray(found)[:, :, 3 : 3 + T], expected.swapaxes(1, 2)
        limit = np.abs(expected).max(-1, keepdims=True) * step
        assert (np.abs(found - expected) <= limit * 1.001).all()
    for other in (0, 2):  # layers that were not written
        assert not any(
            np.asarray(part).any() for part in read_layer(stored, jnp.int32(other), "float32")
        )
