"""What serves only the speed of CPUs: flat products, attention in blocks, unrolled layers.

Shape letters: B batch rows · T query positions · S key positions · N query heads · K key/value
heads · G = N/K · H head width · M = B·T · X inputs and Y outputs of a projection, heads joined.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from crossin_jax.models.cache import Cache
from crossin_jax.models.layers import MASKED, attention_mask, precision

MIN_BLOCK_QUERIES, MAX_BLOCKS_PER_ROW = 128, 8


def model_options(platform: str, num_devices: int = 1) -> dict[str, bool]:
    """The arguments of `Transformer` that make it fast on this platform."""
    is_cpu = platform == "cpu"
    return {"flat_products": is_cpu, "skip_masked_logits": is_cpu and num_devices == 1}


# ---- Flat products: every projection is one product of two matrices.
#
# Without this, XLA copies the weights of heads into another order at each product on CPUs:
#
#     "BTD,NHD->BTNH"    becomes    (B·T, D) times (N·H, D) transposed, then split into heads
#
# On TPUs this would cost time: Gemma-2B's LoRA step on v5e:2x4 takes 1,563 instead of 1,521
# Mcycles.


def flat_einsum(equation: str, x: jax.Array, weight: jax.Array) -> jax.Array:
    """The einsum of a projection, e.g. "BTD,NHD->BTNH", with outputs and inputs of the weight
    joined.
    """
    inputs, letters, outputs = equation.replace("->", ",").split(",")
    sizes = dict(zip(letters, weight.shape, strict=True))
    added, contracted = ([sizes[c] for c in letters if c in side] for side in (outputs, inputs))
    fan_in = math.prod(contracted)
    y = _matrix_product(x.reshape(-1, fan_in), weight.reshape(-1, fan_in))
    return y.reshape(*x.shape[:2], *added)


@jax.custom_vjp
def _matrix_product(x_MX: jax.Array, weight_YX: jax.Array) -> jax.Array:
    """(M, Y)."""
    return _product("MX,YX->MY", x_MX, weight_YX)


def _product(equation: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """A product of two matrices, summed in float32: XLA has quick bfloat16 products for CPUs with
    AMX only where their sums are float32.
    """
    sums = jnp.einsum(
        equation, a, b, precision=precision(a.dtype), preferred_element_type=jnp.float32
    )
    return sums.astype(a.dtype)


def _matrix_product_backward(
    factors: tuple[jax.Array, jax.Array], d_MY: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x_MX, weight_YX = factors
    # The CPU transposes the first factor of a product over M: let it be the narrower one.
    narrow_first = x_MX.shape[1] < d_MY.shape[1]
    d_weight = (
        _product("MX,MY->XY", x_MX, d_MY).T if narrow_first else _product("MY,MX->YX", d_MY, x_MX)
    )
    return _product("MY,YX->MX", d_MY, weight_YX), d_weight


_matrix_product.defvjp(
    lambda x, weight: (_matrix_product(x, weight), (x, weight)), _matrix_product_backward
)


# ---- Attention in blocks of queries, each against the keys that some of its queries may see.
#
#     keys →   0 1 2 3 4 5 6 7      With a window of 4, block 2 (queries 4 and 5) takes keys 1 to 5:
#     block 1  x x x x              no key after the block, none before its first query's window.
#     block 2    x x x x x          The backward pass computes the scores of a block again, so that
#     block 3        x x x x x      no array of T × T is ever stored.


def attend_blocks(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    positions_BT: jax.Array,
    segment_ids_BT: jax.Array,
    window: int | None,
    soft_cap: float | None,
) -> jax.Array:
    """Attention within a row, (B, T, N, H)."""
    B, T, N, H = q_BTNH.shape
    K = k_BTKH.shape[2]
    q_BKGTH = q_BTNH.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)
    k_BKSH, v_BKSH = k_BTKH.swapaxes(1, 2), v_BTKH.swapaxes(1, 2)
    context_BKGTH = _in_blocks(
        q_BKGTH, k_BKSH, v_BKSH, positions_BT, segment_ids_BT, window, soft_cap
    )
    return context_BKGTH.transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)


def cut(length: int, window: int | None) -> list[tuple[slice, slice]]:
    """(queries, keys that some of them may see) of every block."""
    size = max(MIN_BLOCK_QUERIES, -(-length // MAX_BLOCKS_PER_ROW))
    starts = range(0, length, size)
    return [
        (
            slice(start, min(start + size, length)),
            slice(0 if window is None else max(0, start - window + 1), min(start + size, length)),
        )
        for start in starts
    ]


def _block_scores(q, k, positions_BT, segments_BT, queries, keys, window, soft_cap):
    """Scores of a block in float32, masked, and the derivative of the soft cap."""
    scores = jnp.einsum(
        "BKGTH,BKSH->BKGTS",
        q[..., queries, :],
        k[..., keys, :],
        precision=precision(q.dtype),
        preferred_element_type=jnp.float32,
    )
    slope = None
    if soft_cap is not None:
        bent = jnp.tanh(scores / soft_cap)
        scores, slope = soft_cap * bent, 1 - bent * bent
    mask = attention_mask(
        positions_BT[:, queries],
        positions_BT[:, keys],
        segments_BT[:, queries],
        segments_BT[:, keys],
        window,
    )
    return jnp.where(mask[:, None, None], scores, MASKED), slope


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _in_blocks(q, k, v, positions_BT, segments_BT, window, soft_cap):
    return _blocks_forward(q, k, v, positions_BT, segments_BT, window, soft_cap)[0]


def _blocks_forward(q, k, v, positions_BT, segments_BT, window, soft_cap):
    contexts, norms = [], []
    for queries, keys in cut(q.shape[-2], window):
        scores, _ = _block_scores(q, k, positions_BT, segments_BT, queries, keys, window, soft_cap)
        highest = scores.max(axis=-1, keepdims=True)
        weights = jnp.exp(scores - highest)
        total = weights.sum(axis=-1, keepdims=True)
        context = jnp.einsum(
            "BKGTS,BKSH->BKGTH",
            weights.astype(v.dtype),
            v[..., keys, :],
            precision=precision(v.dtype),
            preferred_element_type=jnp.float32,
        )
        contexts.append((context / total).astype(v.dtype))
        # The log of the softmax's denominator is all that the backward pass needs of the scores.
        norms.append(highest + jnp.log(total))
    context = jnp.concatenate(contexts, axis=-2)
    return context, (q, k, v, positions_BT, segments_BT, context, jnp.concatenate(norms, axis=-2))


# With the scores s of a query and its softmax p = exp(s − norm), the forward pass is context = p v.
# From d_context follow
#
#     d_v = pᵀ d_context        d_p = d_context vᵀ        d_s = p · (d_p − inner)
#     inner = Σ p · d_p = d_context · context              then through s = q kᵀ to d_q and d_k
#
# So one number per query and head (`norms`) is kept, instead of a row of scores.
def _blocks_backward(window, soft_cap, saved, d_context):
    q, k, v, positions_BT, segments_BT, context, norms = saved
    dtype = q.dtype
    einsum = functools.partial(
        jnp.einsum, precision=precision(dtype), preferred_element_type=jnp.float32
    )
    inner = (d_context.astype(jnp.float32) * context.astype(jnp.float32)).sum(
        axis=-1, keepdims=True
    )
    d_q, d_k, d_v = [], jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
    for queries, keys in cut(q.shape[-2], window):
        scores, slope = _block_scores(
            q, k, positions_BT, segments_BT, queries, keys, window, soft_cap
        )
        weights = jnp.exp(scores - norms[..., queries, :])
        here = d_context[..., queries, :]
        d_v = d_v.at[..., keys, :].add(einsum("BKGTS,BKGTH->BKSH", weights.astype(dtype), here))
        d_scores = weights * (
            einsum("BKGTH,BKSH->BKGTS", here, v[..., keys, :]) - inner[..., queries, :]
        )
        d_scores = (d_scores if slope is None else d_scores * slope).astype(dtype)
        d_q.append(einsum("BKGTS,BKSH->BKGTH", d_scores, k[..., keys, :]).astype(dtype))
        d_k = d_k.at[..., keys, :].add(einsum("BKGTS,BKGTH->BKSH", d_scores, q[..., queries, :]))
    return jnp.concatenate(d_q, axis=-2), d_k.astype(dtype), d_v.astype(dtype), None, None


_in_blocks.defvjp(_blocks_forward, _blocks_backward)


# ---- Unrolled layers: decoding without the scan over stacked layers.
#
# On a CPU the scan copies a layer's slice of the stacked weights and of the stacked cache at every
# token. Here each layer has arrays of its own, and a Python loop goes through them.


class UnrolledModel:
    """A `Transformer` with the parameters of each layer beside it; it needs a cache for every
    call.
    """

    def __init__(self, model: Any, layers: list[nnx.State]):
        self._model, self._layers = model, layers
        self.spec, self.compute_dtype, self.unembed = model.spec, model.compute_dtype, model.unembed

    def hidden(self, *inputs: Any, **options: Any) -> tuple[jax.Array, Cache]:
        """As `Transformer.hidden`."""
        return self._model.hidden(*inputs, unrolled=self._layers, **options)

    def init_cache(self, batch: int, length: int, dtype: Any = "bfloat16") -> Cache:
        """As `Transformer.init_cache`, with arrays of its own for each layer."""
        return self._model.init_cache(batch, length, dtype, stacked=False)


def unstack(layers: nnx.Module, num_layers: int) -> list[nnx.State]:
    """The parameters of each layer of a stack."""
    stacked = nnx.state(layers)
    return [jax.tree.map(lambda leaf, i=i: leaf[i], stacked) for i in range(num_layers)]


def unroll(
    step: Callable[..., Any],
    x: jax.Array,
    caches: Cache,
    per_layer: dict[str, Any],
    layers: list[nnx.State],
) -> tuple[Any, Cache]:
    """The layers one after the other; each is, for `step`, the only one of its stack."""
    stored: dict[str, list[jax.Array]] = {name: [] for name in caches}
    for i, layer in enumerate(layers):
        here = jax.tree.map(lambda leaf, i=i: leaf[i], per_layer)
        here |= {"layers": layer, "index": jnp.zeros((), jnp.int32)}
        (x, one), _ = step((x, {name: arrays[i][None] for name, arrays in caches.items()}), here)
        for name, stack in one.items():
            stored[name].append(stack[0])
    return x, {name: tuple(arrays) for name, arrays in stored.items()}
