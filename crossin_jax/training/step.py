"""State, loss, training step and evaluation step: pure functions, used by every program.

A batch is a dictionary of global arrays: tokens_BT, targets_BT, segment_ids_BT, positions_BT,
group_BT (int32) and loss_mask_BT (bool). The loss is the sum over supervised targets divided by
their number in the whole global batch. So it does not depend on how the batch is split over
micro-batches, devices or hosts.

Shape letters: B rows · T positions of a row · c positions of a chunk · D model width · V vocabulary
· G groups of examples whose loss is reported.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from crossin_jax.models.attention import Kernel
from crossin_jax.parallel.mesh import constrain_parameter

Batch = dict[str, jax.Array]

# With this threshold, weights that are sharded over fsdp are gathered whole while earlier work
# runs. By default the compiler multiplies shard by shard while the shards pass around, which cuts
# every product into as many pieces: on v5e 4x4, the step of Llama-2-7B with LoRA then takes 5587
# Mcycles instead of 4238.
COMPILER_OPTIONS = {"tpu": {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}}

# Positions per chunk where masked positions have no logits (CPU only).
MASKED_CHUNK = 256


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class TrainState:
    """The input and the output of a training step."""

    step: jax.Array  # int32: optimizer steps taken
    # bool: becomes False at the first loss or gradient that is not finite. From then on the state
    # does not change, so that no bad weights are saved.
    finite: jax.Array
    trainable: nnx.State
    frozen: nnx.State  # unchanged by a step, and not part of a checkpoint
    optimizer: Any  # the moments of `trainable`


@dataclasses.dataclass(frozen=True)
class StepSettings:
    """The settings that change the compiled program."""

    accumulation: int
    loss_chunk: int
    remat: str
    attention: str | Kernel
    seed: int
    num_groups: int


def init_state(
    trainable: nnx.State, frozen: nnx.State, optimizer: optax.GradientTransformation
) -> TrainState:
    """The state before the first step."""
    return TrainState(
        jnp.zeros((), jnp.int32), jnp.ones((), bool), trainable, frozen, optimizer.init(trainable)
    )


def token_losses(
    model: Any,
    hidden_BTD: jax.Array,
    targets_BT: jax.Array,
    loss_mask_BT: jax.Array,
    chunk: int,
    *,
    head_trains: bool,
) -> tuple[jax.Array, jax.Array]:
    """The sum of negative log-likelihoods over supervised targets, and the one of each target.

    float32; the second is (B, T), and no gradient flows through it. At most `chunk` positions of a
    row have logits at a time, and no logit is computed twice. `head_trains`: the matrix that makes
    the logits needs a gradient too.
    """
    B, T = targets_BT.shape
    if not model.skip_masked_logits:
        return _chunked_losses(
            model, hidden_BTD, targets_BT, loss_mask_BT, chunk, head_trains=head_trains
        )
    # On CPU: the supervised positions are put first, in one long row. A chunk without any of them
    # is skipped:
    #   loss mask  0 0 1 1 | 0 1 0 0   →   1 1 1 0 | 0 0 0 0
    chunk = min(B * chunk, MASKED_CHUNK)
    order = jnp.argsort(~loss_mask_BT.reshape(B * T), stable=True)

    def arrange(x):
        row = jnp.take(x.reshape(1, B * T, *x.shape[2:]), order, axis=1, unique_indices=True)
        return jnp.pad(row, [(0, -B * T % chunk if axis == 1 else 0) for axis in range(row.ndim)])

    arranged = (arrange(x) for x in (hidden_BTD, targets_BT, loss_mask_BT))
    loss, losses = _chunked_losses(model, *arranged, chunk, head_trains=head_trains)
    losses_BT = jnp.zeros((B * T,)).at[order].set(losses[0, : B * T], unique_indices=True)
    return loss, losses_BT.reshape(B, T)


# The logits of all positions are by far the largest array of a step: 4096 positions of Gemma's
# 256,000 tokens are 4 GB in float32. So the loss is computed chunk by chunk:
#
#     hidden_BTD    | chunk 1 | chunk 2 | chunk 3 |
#                                  ↓
#     logits_BcV              one chunk at a time
#                                  ↓
#     losses_BT     | done    | now     |         |    and d loss / d hidden_BTD beside it
#
# Automatic differentiation would keep every chunk's logits for the backward pass, or compute them
# again. But the gradient of this sum is known in the forward pass, except for one factor that comes
# with the backward pass: d objective / d sum. So the forward pass computes the gradient while the
# logits of a chunk exist, and the backward pass multiplies it by the factor.
def _chunked_losses(
    model: Any,
    hidden_BTD: jax.Array,
    targets_BT: jax.Array,
    loss_mask_BT: jax.Array,
    chunk: int,
    *,
    head_trains: bool,
) -> tuple[jax.Array, jax.Array]:
    length = targets_BT.shape[1]
    # A scan needs chunks of equal length: the largest divisor of the row that is not above `chunk`.
    chunk = max(c for c in range(1, min(chunk, length) + 1) if length % c == 0)

    chunk_losses = partial(_losses_with_logits, model)

    def scan(body, start, hidden_BTD):
        """Runs `body(carry, hidden, targets, loss_mask) -> (carry, outputs)` over the chunks."""
        arrays = hidden_BTD, targets_BT, loss_mask_BT.astype(jnp.float32)
        chunks = tuple(_split(x, chunk) for x in arrays)
        return jax.lax.scan(lambda carry, xs: body(carry, *xs), start, chunks)

    def finish(losses):
        # A target outside the mask may have an infinite loss, and 0 * inf would make the sum nan.
        losses_BT = jnp.where(loss_mask_BT, _join(losses), 0.0)
        return losses_BT.sum(), losses_BT

    @jax.custom_vjp
    def total(weight_VD, hidden_BTD):
        """The losses alone, for evaluation."""

        def compute(_, hidden, targets, loss_mask):
            return None, chunk_losses(weight_VD, hidden, targets)

        def skip(_, hidden, targets, loss_mask):
            return None, jnp.zeros(targets.shape, jnp.float32)

        return finish(scan(_unless_masked(model, compute, skip), None, hidden_BTD)[1])

    def forward(weight_VD, hidden_BTD):
        """The losses and what `backward` needs: both gradients of the sum of losses."""

        def compute(d_weight, hidden, targets, loss_mask):
            if head_trains:
                losses, pull = jax.vjp(lambda w, h: chunk_losses(w, h, targets), weight_VD, hidden)
                more, d_hidden = pull(loss_mask)
                d_weight += more.astype(jnp.float32)
                d_weight = constrain_parameter(d_weight, "vocab", "embed")
            else:
                losses, pull = jax.vjp(lambda h: chunk_losses(weight_VD, h, targets), hidden)
                (d_hidden,) = pull(loss_mask)
            return d_weight, (losses, d_hidden)

        def skip(d_weight, hidden, targets, loss_mask):
            return d_weight, (jnp.zeros(targets.shape, jnp.float32), jnp.zeros_like(hidden))

        start = jnp.zeros(weight_VD.shape, jnp.float32) if head_trains else None
        body = _unless_masked(model, compute, skip)
        d_weight, (losses, d_hidden) = scan(body, start, hidden_BTD)
        return finish(losses), (d_weight, _join(d_hidden))

    def backward(saved, cotangents):
        factor, _ = cotangents
        d_weight, d_hidden = saved
        d_weight = None if d_weight is None else (factor * d_weight).astype(weight_VD.dtype)
        return d_weight, (factor * d_hidden).astype(d_hidden.dtype)

    total.defvjp(forward, backward)
    weight_VD = model.head.weight.get_value()
    return total(weight_VD, hidden_BTD)


def _losses_with_logits(
    model: Any, weight_VD: jax.Array, hidden_BcD: jax.Array, targets_Bc: jax.Array
) -> jax.Array:
    logits_BcV = model.unembed(hidden_BcD, weight_VD)
    target_logits_Bc = jnp.take_along_axis(logits_BcV, targets_Bc[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits_BcV, axis=-1) - target_logits_Bc


def _split(x: jax.Array, chunk: int) -> jax.Array:
    """(B, T, …) → (chunks, B, chunk, …)."""
    B, T = x.shape[:2]
    return jnp.moveaxis(x.reshape(B, T // chunk, chunk, *x.shape[2:]), 1, 0)


def _join(x: jax.Array) -> jax.Array:
    """(chunks, B, chunk, …) → (B, T, …)."""
    chunks, B, chunk = x.shape[:3]
    return jnp.moveaxis(x, 0, 1).reshape(B, chunks * chunk, *x.shape[3:])


def _unless_masked(model: Any, compute: Callable, skip: Callable) -> Callable:
    """`compute`; on CPU `skip` for chunks without a supervised target (the last argument)."""
    if not model.skip_masked_logits:
        return compute
    return lambda *args: jax.lax.cond((args[-1] > 0).any(), compute, skip, *args)


def loss_sums(
    model: Any,
    batch: Batch,
    settings: StepSettings,
    dropout_key: jax.Array | None,
    *,
    head_trains: bool = False,
) -> dict[str, jax.Array]:
    """Sums over one batch: `loss` and `count` over supervised targets, and both by group (G,)."""
    hidden_BTD, _ = model.hidden(
        batch["tokens_BT"],
        batch["positions_BT"],
        batch["segment_ids_BT"],
        dropout_key=dropout_key,
        remat=settings.remat,
        attention=settings.attention,
    )
    loss, losses_BT = token_losses(
        model,
        hidden_BTD,
        batch["targets_BT"],
        batch["loss_mask_BT"],
        settings.loss_chunk,
        head_trains=head_trains,
    )
    loss_mask_BT = batch["loss_mask_BT"].astype(jnp.float32)
    groups_BTG = jax.nn.one_hot(batch["group_BT"], settings.num_groups, dtype=jnp.float32)
    return {
        "loss": loss,
        "count": loss_mask_BT.sum(),
        "group_loss": jnp.einsum("BT,BTG->G", losses_BT, groups_BTG),
        "group_count": jnp.einsum("BT,BTG->G", loss_mask_BT, groups_BTG),
        "tokens": (batch["segment_ids_BT"] > 0).sum().astype(jnp.float32),
    }


# Why the step divides a sum and does not average means: take two micro-batches, one with losses
# 1 1 1 and one with the loss 5. The loss of the batch is 8 / 4 = 2. The mean of the two means would
# be (1 + 5) / 2 = 3, and would change with the way the batch is split.
def make_train_step(
    graphdef: Any, optimizer: optax.GradientTransformation, settings: StepSettings
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]:
    """The training step `(state, batch) -> (state, metrics)`; jit it with the state donated."""

    def batch_loss(trainable, frozen, batch, key):
        model = nnx.merge(graphdef, trainable, frozen)
        # With tied embeddings, the matrix that makes the logits is that of the embeddings.
        head = "embed_tokens" if model.lm_head is None else "lm_head"
        sums = loss_sums(model, batch, settings, key, head_trains=head in trainable)
        return sums["loss"], sums

    gradient = jax.grad(batch_loss, has_aux=True)

    def accumulate(state, batch, key):
        """Gradients and sums, added up over the micro-batches."""
        # With A micro-batches, number i has the rows i, i+A, i+2A, …: the rows that a device holds
        # spread over all of them, so that no row moves to another device.
        parts = settings.accumulation
        if parts == 1:
            return gradient(state.trainable, state.frozen, batch, key)
        micro = {
            k: jnp.moveaxis(v.reshape(v.shape[0] // parts, parts, *v.shape[1:]), 1, 0)
            for k, v in batch.items()
        }

        def add(carry, xs):
            index, part = xs
            grads, sums = gradient(
                state.trainable, state.frozen, part, jax.random.fold_in(key, index)
            )
            return jax.tree.map(
                lambda total, new: total + new.astype(total.dtype), carry, (grads, sums)
            ), None

        # The sums start from zeros, in the shapes of one micro-batch's results.
        one = jax.eval_shape(
            gradient, state.trainable, state.frozen, jax.tree.map(lambda x: x[0], micro), key
        )
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, jnp.float32), one)
        return jax.lax.scan(add, zeros, (jnp.arange(parts), micro))[0]

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        # Dropout depends on the seed and the step alone, so a continued run has the same masks.
        key = jax.random.fold_in(jax.random.key(settings.seed), state.step)
        grads, sums = accumulate(state, batch, key)
        # The gradient of a sum, divided once by the count of the whole batch: exact for any split.
        count = jnp.maximum(sums["count"], 1.0)
        grads = jax.tree.map(lambda g: g / count.astype(g.dtype), grads)
        norm = optax.tree.norm(grads)
        updates, moments = optimizer.update(grads, state.optimizer, state.trainable)
        finite = state.finite & jnp.isfinite(sums["loss"]) & jnp.isfinite(norm)

        def keep(new, old):
            return jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)

        trainable = keep(optax.apply_updates(state.trainable, updates), state.trainable)
        new_state = TrainState(
            state.step + finite, finite, trainable, state.frozen, keep(moments, state.optimizer)
        )
        return new_state, sums | {"loss": sums["loss"] / count, "grad_norm": norm}

    return train_step


def make_eval_step(
    graphdef: Any, settings: StepSettings
) -> Callable[[nnx.State, nnx.State, Batch], dict[str, jax.Array]]:
    """The evaluation step `(trainable, frozen, batch) -> sums`, without dropout."""

    def eval_step(trainable: nnx.State, frozen: nnx.State, batch: Batch) -> dict[str, jax.Array]:
        return loss_sums(nnx.merge(graphdef, trainable, frozen), batch, settings, None)

    return eval_step
