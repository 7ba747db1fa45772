"""Causal grouped-query attention: one rule for the mask, one kernel per backend.

Queries arrive scaled. A token sees the tokens of its own segment that are not later and, in a local
layer, fewer than `window` positions before it. Two segments in a row of seven tokens, without a
window (x: visible, rows are queries):

    segment  1 1 1 2 2 2 0          x . . . . . .
    position 0 1 2 0 1 2 0          x x . . . . .
                                    x x x . . . .
                                    . . . x . . .
                                    . . . x x . .
                                    . . . x x x .
                                    padding sees only padding

The fused kernels compare places in the row instead of positions, so positions must increase within
each segment.

Shape letters: B batch rows · T query positions · S key positions · N query heads · K key/value
heads · G = N/K · H head width.
"""

import functools
import re
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from crossin_jax.config import UserError, hint
from crossin_jax.models.cpu import attend_blocks
from crossin_jax.models.layers import MASKED, attention_mask, precision
from crossin_jax.models.spec import ModelSpec
from crossin_jax.parallel.mesh import activation_spec

KERNELS = ("auto", "reference", "blocks", "splash", "cudnn")
# The checkpoint name of the result, which a remat policy may keep instead of running a kernel
# twice.
SAVED = "attention"
# Splash blocks are multiples of the TPU's vector width.
LANES = 128
_PREFERRED = {"tpu": "splash", "gpu": "cudnn", "cuda": "cudnn", "cpu": "blocks"}


@dataclass(frozen=True, slots=True)
class Kernel:
    """A kernel with its tile; `interpret` runs it without its device, for tests."""

    name: str
    block: int = 512
    interpret: bool = False


def choose_kernel(
    attention: str,
    spec: ModelSpec,
    length: int,
    compute_dtype: Any,
    platform: str,
    *,
    required: bool = True,
) -> Kernel:
    """The kernel for rows of `length` on `platform` (tpu, gpu or cpu).

    `auto` is the platform's own kernel if that supports the model, else the reference. A kernel
    that was named but does not support the model raises `UserError` with the reason; if it is not
    `required`, the reference takes its place. `splash:1024` sets the tile.
    """
    # "splash:1024" asks for a kernel and its tile.
    asked, _, block = attention.partition(":")
    if attention not in KERNELS and not (
        re.fullmatch(r"splash:[1-9]\d*", attention) and int(block) % LANES == 0
    ):
        raise UserError(
            f"model.attention={attention!r} is not one of {', '.join(KERNELS)}, "
            f"or splash:BLOCK with a multiple of {LANES}{hint(attention, KERNELS)}"
        )
    # What keeps the kernel from this work, in words for the error.
    name = _PREFERRED.get(platform, "reference") if asked == "auto" else asked
    obstacle = None
    if name in ("splash", "cudnn") and _PREFERRED.get(platform) != name:
        obstacle = f"it runs on {'TPU' if name == 'splash' else 'NVIDIA GPUs'}, not on {platform}"
    elif name == "splash" and length % LANES:
        obstacle = f"rows of {length} tokens are not a multiple of {LANES}"
    elif name == "cudnn" and spec.attention_soft_cap is not None:
        obstacle = f"it has no soft cap, which {spec.model_type} needs"
    elif name == "cudnn" and (spec.head_width % 8 or spec.head_width > 256 or length % 2):
        obstacle = (
            f"head width {spec.head_width} or row length {length} is outside its range "
            "(8 to 256 by 8; even)"
        )
    elif name == "cudnn" and jnp.dtype(compute_dtype) != jnp.bfloat16:
        obstacle = "it takes bfloat16 only; set model.compute_dtype=bfloat16"
    if obstacle is None:
        return Kernel(name, int(block)) if block else Kernel(name)
    if asked == "auto" or not required:
        return Kernel("reference")
    raise UserError(f"model.attention={name}: {obstacle}; use auto or reference")


# The letters of the two einsums, for 4 query heads over 2 key/value heads (K = 2, G = 2):
#
#     query heads          0 1 │ 2 3       N = 4 is split into (K, G)
#     read keys of head     0  │  1
#     BTKGH,BSKH->BKGTS    scores: summed over the head width H, for every pair of T and S
#     BKGTS,BSKH->BTKGH    context: summed over the keys S
def attend_reference(
    q_BTNH: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask_BTS: jax.Array,
    *,
    soft_cap: float | None,
    layout: str = "BSKH",
) -> jax.Array:
    """Einsum attention (B, T, N, H) with scores and softmax in float32; k and v have `layout`."""
    B, T, N, H = q_BTNH.shape
    K = k.shape[layout.index("K")]
    # Each key/value head serves a group of G = N/K neighbouring query heads.
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)
    scores = jnp.einsum(
        f"BTKGH,{layout}->BKGTS",
        q_BTKGH,
        k,
        precision=precision(q_BTNH.dtype),
        preferred_element_type=jnp.float32,
    )
    if soft_cap is not None:
        scores = soft_cap * jnp.tanh(scores / soft_cap)
    probabilities = jax.nn.softmax(jnp.where(mask_BTS[:, None, None], scores, MASKED), axis=-1)
    context = jnp.einsum(
        f"BKGTS,{layout}->BTKGH", probabilities.astype(v.dtype), v, precision=precision(v.dtype)
    )
    return checkpoint_name(context.reshape(B, T, N, H), SAVED)


def attend(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    positions_BT: jax.Array,
    segment_ids_BT: jax.Array,
    *,
    kernel: Kernel,
    window: int | None,
    is_local: jax.Array | None,
    soft_cap: float | None,
) -> jax.Array:
    """Attention within a row, (B, T, N, H).

    `window` None: every layer is global. `is_local` None: every layer has the window; otherwise a
    () bool says whether this one has it.
    """
    if kernel.name == "reference":
        mask_BTT = attention_mask(
            positions_BT,
            positions_BT,
            segment_ids_BT,
            segment_ids_BT,
            _window_here(window, is_local),
        )
        return attend_reference(q_BTNH, k_BTKH, v_BTKH, mask_BTT, soft_cap=soft_cap)
    run = functools.partial(
        {"blocks": _blocks, "splash": _splash, "cudnn": _cudnn}[kernel.name],
        kernel=kernel,
        soft_cap=soft_cap,
    )
    inputs = (q_BTNH, k_BTKH, v_BTKH, positions_BT, segment_ids_BT)
    if window is None or is_local is None or window >= q_BTNH.shape[1]:
        return run(*inputs, window=window)
    # The window is part of the compiled kernel, and one program serves all layers. So both kernels
    # are compiled, and each layer takes its branch.
    return jax.lax.cond(
        is_local,
        functools.partial(run, window=window),
        functools.partial(run, window=None),
        *inputs,
    )


def attend_cached(
    q_BTNH: jax.Array,
    k_BKSH: jax.Array,
    v_BKSH: jax.Array,
    positions_BT: jax.Array,
    key_positions_BS: jax.Array,
    *,
    window: int | None,
    is_local: jax.Array | None,
    soft_cap: float | None,
) -> jax.Array:
    """Attention to all tokens in a row of the cache, (B, T, N, H); negative positions are empty."""
    stored_BS = (key_positions_BS >= 0).astype(jnp.int32)
    mask_BTS = attention_mask(
        positions_BT,
        key_positions_BS,
        jnp.ones_like(positions_BT),
        stored_BS,
        _window_here(window, is_local),
    )
    return attend_reference(q_BTNH, k_BKSH, v_BKSH, mask_BTS, soft_cap=soft_cap, layout="BKSH")


def _window_here(window: int | None, is_local: jax.Array | None) -> jax.Array | int | None:
    """The window of this layer, where some layers are local and others are not."""
    return window if is_local is None else jnp.where(is_local, window, jnp.iinfo(jnp.int32).max)


def _blocks(
    *inputs: jax.Array, kernel: Kernel, window: int | None, soft_cap: float | None
) -> jax.Array:
    """Einsums in blocks of queries, see `models/cpu.py`."""
    return checkpoint_name(attend_blocks(*inputs, window, soft_cap), SAVED)


def _splash(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    _: jax.Array,
    segment_ids_BT: jax.Array,
    *,
    kernel: Kernel,
    window: int | None,
    soft_cap: float | None,
) -> jax.Array:
    """The Pallas TPU kernel, on each device's share of rows and heads."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    T, block = q_BTNH.shape[1], tile(kernel, q_BTNH.shape[1])
    blocks = splash.BlockSizes(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_q_dq=block,
        block_kv_dq=block,
    )
    mask = (
        splash.CausalMask((T, T))
        if window is None
        else splash.LocalMask((T, T), (window - 1, 0), 0)
    )

    def on_device(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT):
        run = splash.make_splash_mha(
            splash.MultiHeadMask([mask] * q_BTNH.shape[2]),
            head_shards=1,
            q_seq_shards=1,
            block_sizes=blocks,
            attn_logits_soft_cap=soft_cap,
            residual_checkpoint_name=SAVED,
            interpret=kernel.interpret,
        )
        heads_first = (x.swapaxes(1, 2) for x in (q_BTNH, k_BTKH, v_BTKH))
        context = jax.vmap(run)(*heads_first, splash.SegmentIds(segment_ids_BT, segment_ids_BT))
        return context.swapaxes(1, 2)

    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return on_device(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT)
    # a Pallas call cannot be partitioned by the compiler: rows and heads are split by hand, by the
    # same table
    q_spec = activation_spec(q_BTNH.shape, ("batch", "length", "heads", "head"), mesh)
    k_spec = activation_spec(k_BTKH.shape, ("batch", "length", "kv_heads", "head"), mesh)
    if q_spec[2] != k_spec[2]:
        # There are fewer key/value heads than shards: they are repeated until every query head has
        # its own.
        k_BTKH, v_BTKH = (
            jnp.repeat(x, q_BTNH.shape[2] // x.shape[2], axis=2) for x in (k_BTKH, v_BTKH)
        )
        k_spec = q_spec
    return jax.shard_map(
        on_device,
        mesh=mesh,
        in_specs=(q_spec, k_spec, k_spec, PartitionSpec(*q_spec[:2])),
        out_specs=q_spec,
        check_vma=False,
    )(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT)


def tile(kernel: Kernel, length: int) -> int:
    """The tile in effect: the largest up to the kernel's that divides the row."""
    return max(b for b in range(LANES, max(kernel.block, LANES) + 1, LANES) if length % b == 0)


def _cudnn(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    _: jax.Array,
    segment_ids_BT: jax.Array,
    *,
    kernel: Kernel,
    window: int | None,
    soft_cap: float | None,
) -> jax.Array:
    """cuDNN's flash attention; segments are a mask, causality and window are options."""
    assert soft_cap is None
    # Causality and window are options of the kernel, which skips whole blocks for them. Only
    # segments need a mask.
    same_segment = segment_ids_BT[:, None, :, None] == segment_ids_BT[:, None, None]
    context = jax.nn.dot_product_attention(
        q_BTNH,
        k_BTKH,
        v_BTKH,
        mask=same_segment,
        scale=1.0,
        is_causal=True,
        implementation="xla" if kernel.interpret else "cudnn",
        local_window_size=None if window is None else (window - 1, 0),
    )
    return checkpoint_name(context, SAVED)
