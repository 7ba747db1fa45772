"""Causal grouped-query attention: one mask rule, kernels by name and backend."""

import jax
import jax.numpy as jnp

from crossin_jax.models.layers import precision

MASKED = -1e30  # finite: a row with no key to see stays finite


def attention_mask(query_positions_BT: jax.Array, key_positions_BS: jax.Array, query_segments_BT: jax.Array,
                   key_segments_BS: jax.Array, window: jax.Array | int | None) -> jax.Array:
    """Who sees whom, (B, T, S) bool: same segment, not later, and fewer than `window` positions back."""
    back = query_positions_BT[:, :, None] - key_positions_BS[:, None]
    mask = (back >= 0) & (query_segments_BT[:, :, None] == key_segments_BS[:, None])
    return mask if window is None else mask & (back < window)


def attend_reference(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, mask_BTS: jax.Array, *,
                     scale: float, soft_cap: float | None) -> jax.Array:
    """Einsum attention with scores and softmax in float32; returns (B, T, N, H)."""
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)
    scores = jnp.einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH, precision=precision(q_BTNH.dtype),
                        preferred_element_type=jnp.float32) * scale
    if soft_cap is not None:
        scores = soft_cap * jnp.tanh(scores / soft_cap)
    probabilities = jax.nn.softmax(jnp.where(mask_BTS[:, None, None], scores, MASKED), axis=-1)
    context = jnp.einsum("BKGTS,BSKH->BTKGH", probabilities.astype(v_BSKH.dtype), v_BSKH,
                         precision=precision(v_BSKH.dtype))
    return context.reshape(B, T, N, H)
