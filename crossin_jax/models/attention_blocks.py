"""Attention in blocks of queries, each against the keys that it can see: what CPUs run.

A block meets no key after it and none before its window, and the backward pass makes the scores again, so nothing of
T x T stays. Softmax is in float32, as in the reference.
"""

import functools

import jax
import jax.numpy as jnp

from crossin_jax.models.layers import precision

MASKED = -1e30  # finite: a row with no key to see stays finite
SMALLEST, MOST = 128, 8  # queries in a block at least, and blocks in a row at most


def attend_blocks(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, positions_BT: jax.Array,
                  segment_ids_BT: jax.Array, *, window: int | None, soft_cap: float | None) -> jax.Array:
    """Causal attention within segments, (B, T, N, H); positions rise within each segment."""
    B, T, N, H = q_BTNH.shape
    K = k_BTKH.shape[2]
    q_BKGTH = q_BTNH.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)
    k_BKTH, v_BKTH = k_BTKH.swapaxes(1, 2), v_BTKH.swapaxes(1, 2)
    context_BKGTH = _attend(q_BKGTH, k_BKTH, v_BKTH, positions_BT, segment_ids_BT, window, soft_cap)
    return context_BKGTH.transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)


def cut(length: int, window: int | None) -> list[tuple[slice, slice]]:
    """(queries, keys that some of them may see) of every block."""
    size = max(SMALLEST, -(-length // MOST))
    starts = range(0, length, size)
    return [(slice(start, min(start + size, length)),
             slice(0 if window is None else max(0, start - window + 1), min(start + size, length))) for start in starts]


def _scores(q, k, positions_BT, segments_BT, queries, keys, window, soft_cap):
    """Scores of a block in float32, masked, and the derivative of the soft cap."""
    scores = jnp.einsum("BKGTH,BKSH->BKGTS", q[..., queries, :], k[..., keys, :], precision=precision(q.dtype),
                        preferred_element_type=jnp.float32)
    slope = None
    if soft_cap is not None:
        bent = jnp.tanh(scores / soft_cap)
        scores, slope = soft_cap * bent, 1 - bent * bent
    back = positions_BT[:, queries, None] - positions_BT[:, None, keys]
    seen = (back >= 0) & (segments_BT[:, queries, None] == segments_BT[:, None, keys])
    if window is not None:
        seen &= back < window
    return jnp.where(seen[:, None, None], scores, MASKED), slope


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _attend(q, k, v, positions_BT, segments_BT, window, soft_cap):
    return _forward(q, k, v, positions_BT, segments_BT, window, soft_cap)[0]


def _forward(q, k, v, positions_BT, segments_BT, window, soft_cap):
    contexts, norms = [], []
    for queries, keys in cut(q.shape[-2], window):
        scores, _ = _scores(q, k, positions_BT, segments_BT, queries, keys, window, soft_cap)
        highest = scores.max(axis=-1, keepdims=True)
        weights = jnp.exp(scores - highest)
        total = weights.sum(axis=-1, keepdims=True)
        context = jnp.einsum("BKGTS,BKSH->BKGTH", weights.astype(v.dtype), v[..., keys, :],
                             precision=precision(v.dtype), preferred_element_type=jnp.float32)
        contexts.append((context / total).astype(v.dtype))
        norms.append(highest + jnp.log(total))
    context = jnp.concatenate(contexts, axis=-2)
    return context, (q, k, v, positions_BT, segments_BT, context, jnp.concatenate(norms, axis=-2))


def _backward(window, soft_cap, saved, d_context):
    q, k, v, positions_BT, segments_BT, context, norms = saved
    dtype, einsum = q.dtype, functools.partial(jnp.einsum, precision=precision(q.dtype),
                                               preferred_element_type=jnp.float32)
    inner = (d_context.astype(jnp.float32) * context.astype(jnp.float32)).sum(axis=-1, keepdims=True)
    d_q, d_k, d_v = [], jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
    for queries, keys in cut(q.shape[-2], window):
        scores, slope = _scores(q, k, positions_BT, segments_BT, queries, keys, window, soft_cap)
        weights = jnp.exp(scores - norms[..., queries, :])
        here = d_context[..., queries, :]
        d_v = d_v.at[..., keys, :].add(einsum("BKGTS,BKGTH->BKSH", weights.astype(dtype), here))
        d_scores = weights * (einsum("BKGTH,BKSH->BKGTS", here, v[..., keys, :]) - inner[..., queries, :])
        d_scores = (d_scores if slope is None else d_scores * slope).astype(dtype)
        d_q.append(einsum("BKGTS,BKSH->BKGTH", d_scores, k[..., keys, :]).astype(dtype))
        d_k = d_k.at[..., keys, :].add(einsum("BKGTS,BKGTH->BKSH", d_scores, q[..., queries, :]))
    return jnp.concatenate(d_q, axis=-2), d_k.astype(dtype), d_v.astype(dtype), None, None


_attend.defvjp(_forward, _backward)
