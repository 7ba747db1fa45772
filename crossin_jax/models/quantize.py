"""Frozen weights in 8 or 4 bits: what is stored, and how a product reads it.

int8: one float32 scale per output channel, applied to the result of the product. nf4 (QLoRA, arXiv
2305.14314): blocks along the last dimension, a code into the 16 quantiles of a normal distribution
and one bfloat16 scale each.
"""

import functools
import statistics
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# The kinds of quantized weights, by the type that stores their codes.
KINDS = {"int8": jnp.int8, "nf4": jnp.uint4}
BLOCK = 64


@functools.cache
def nf4_values() -> np.ndarray:
    """The 16 values of the code, ascending from -1 to 1: quantiles of a normal distribution, with
    an exact zero.
    """
    quantile = statistics.NormalDist().inv_cdf
    # The mean of 1 - 1/32 and 1 - 1/30: it keeps the last quantile finite.
    outermost = 0.9677083
    positive = [quantile(p) for p in np.linspace(outermost, 0.5, 9)[:-1]]
    negative = [-quantile(p) for p in np.linspace(outermost, 0.5, 8)[:-1]]
    values = np.array(sorted(negative + [0.0] + positive))
    return (values / np.abs(values).max()).astype(np.float32)


def kind_of(dtype: Any) -> str | None:
    """The kind of quantized weight that a storage dtype stands for."""
    return next(
        (kind for kind, stored in KINDS.items() if jnp.dtype(stored) == jnp.dtype(dtype)), None
    )


def block_size(width: int) -> int:
    """The nf4 block along a last dimension of this size: the largest divisor up to 64."""
    return max(b for b in range(1, min(BLOCK, width) + 1) if width % b == 0)


# A block of 64 weights in nf4 takes 64 · 4 bits of codes and 16 bits of scale: 4.25 bits each. An
# int8 weight takes 8 bits, and each output one scale of 32 bits. Example for int8: the row
# [0.5 -1.27] has the scale 1.27 / 127 = 0.01 and the codes [50 -127].
def quantize(
    weight: jax.Array, scale_shape: tuple[int, ...], kind: str
) -> tuple[jax.Array, jax.Array]:
    """(codes, scales) of a weight (added…, contracted…), stacked or not.

    The shape of the scales says how: for int8 the dimensions that the product keeps, for nf4 the
    weight's with blocks in place of the last dimension.
    """
    wide = weight.astype(jnp.float32)
    if kind == "int8":
        contracted = tuple(range(len(scale_shape), wide.ndim))
        scale = jnp.maximum(jnp.max(jnp.abs(wide), axis=contracted) / 127, 1e-30)
        return jnp.round(wide / scale.reshape(scale.shape + (1,) * len(contracted))).astype(
            jnp.int8
        ), scale
    blocks = wide.reshape(*scale_shape, -1)
    scale = jnp.maximum(jnp.max(jnp.abs(blocks), axis=-1), 1e-30).astype(jnp.bfloat16)
    code = nf4_values()
    # The nearest value of the code: borders lie halfway between neighbours.
    borders = (code[1:] + code[:-1]) / 2
    codes = jnp.searchsorted(borders, (blocks / scale.astype(jnp.float32)[..., None]).ravel())
    return codes.astype(jnp.uint4).reshape(wide.shape), scale


def dequantize(codes: jax.Array, scale: jax.Array, dtype: Any) -> jax.Array:
    """The weight that codes and scales stand for."""
    if kind_of(codes.dtype) == "int8":
        scale = scale.reshape(scale.shape + (1,) * (codes.ndim - scale.ndim))
        return (codes.astype(jnp.float32) * scale).astype(dtype)
    # A tree of selects by the bits of the code: vector work, where a gather from 16 values would be
    # scalar.
    #     bit 0 chooses in the pairs (v0 v1) (v2 v3) …, bit 1 between the chosen of two pairs, …
    bits = codes.astype(jnp.int32)
    values: list[Any] = [float(v) for v in nf4_values()]
    for bit in range(4):
        is_set = (bits >> bit) & 1 == 1
        values = [
            jnp.where(is_set, high, low)
            for low, high in zip(values[::2], values[1::2], strict=True)
        ]
    blocks = values[0].reshape(*scale.shape, -1) * scale.astype(jnp.float32)[..., None]
    return blocks.reshape(codes.shape).astype(dtype)
