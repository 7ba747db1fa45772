"""State, loss, training step and evaluation step: pure functions, used by every program.

Batches are dictionaries of global arrays: tokens_BT, targets_BT, segment_ids_BT, positions_BT, group_BT int32 and
learned_BT bool. The loss is the sum over learned targets divided by their number in the whole global batch, so it does
not depend on how the batch is split over micro-batches, devices or hosts.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from crossin_jax.models.attention import Kernel
from crossin_jax.parallel.mesh import constrain_parameter

Batch = dict[str, jax.Array]

# Weights sharded over fsdp are gathered whole, beside the work before them. The compiler's way of itself, to multiply
# shard by shard while they pass around, cuts every product into as many pieces: on v5e 4x4 the step of Llama-2-7B with
# LoRA has 4238 instead of 5587 Mcycles without it.
COMPILER_OPTIONS = {"tpu": {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}}

SKIPPED = 256  # positions with logits at once where those that are not learned have none


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class TrainState:
    """What a step maps to its successor; `frozen` passes through untouched and is no part of a checkpoint."""

    step: jax.Array  # int32: optimizer steps taken
    finite: jax.Array  # bool: False from the first non-finite loss or gradient on; the state then stays as it was
    trainable: nnx.State
    frozen: nnx.State
    optimizer: Any


@dataclasses.dataclass(frozen=True)
class StepSettings:
    """The static part of a step: what changes the compiled program."""

    accumulation: int
    loss_chunk: int
    remat: str
    attention: str | Kernel
    seed: int
    num_groups: int


def init_state(trainable: nnx.State, frozen: nnx.State, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step."""
    return TrainState(jnp.zeros((), jnp.int32), jnp.ones((), bool), trainable, frozen, optimizer.init(trainable))


def token_losses(model: Any, hidden_BTD: jax.Array, targets_BT: jax.Array, learned_BT: jax.Array, chunk: int, *,
                 head_trains: bool) -> tuple[jax.Array, jax.Array]:
    """Negative log-likelihoods of targets, float32: their sum over learned ones, and each (B, T) without gradient.

    At most `chunk` positions of a row have logits at one time, and no logit is made twice: the gradient of a sum is
    known but for a factor, so the forward pass takes it while a chunk's logits are there.
    """
    B, T = targets_BT.shape
    if not model.skips_unlearned:
        return _chunked_losses(model, hidden_BTD, targets_BT, learned_BT, chunk, head_trains=head_trains)
    # what is learned goes first, in one row that chunks divide; chunks after it have no logits at all
    chunk = min(B * chunk, SKIPPED)
    order = jnp.argsort(~learned_BT.reshape(B * T), stable=True)

    def arrange(x):
        row = jnp.take(x.reshape(1, B * T, *x.shape[2:]), order, axis=1, unique_indices=True)
        return jnp.pad(row, [(0, -B * T % chunk if axis == 1 else 0) for axis in range(row.ndim)])

    loss, losses = _chunked_losses(model, arrange(hidden_BTD), arrange(targets_BT), arrange(learned_BT), chunk,
                                   head_trains=head_trains)
    losses_BT = jnp.zeros((B * T,)).at[order].set(losses[0, :B * T], unique_indices=True).reshape(B, T)
    return loss, losses_BT


def _chunked_losses(model: Any, hidden_BTD: jax.Array, targets_BT: jax.Array, learned_BT: jax.Array, chunk: int, *,
                    head_trains: bool) -> tuple[jax.Array, jax.Array]:
    length = targets_BT.shape[1]
    chunk = max(c for c in range(1, min(chunk, length) + 1) if length % c == 0)

    def chunk_losses(weight_VD, hidden_BcD, targets_Bc):
        logits_BcV = model.unembed(hidden_BcD, weight_VD)
        target_logits_Bc = jnp.take_along_axis(logits_BcV, targets_Bc[..., None], axis=-1)[..., 0]
        return jax.nn.logsumexp(logits_BcV, axis=-1) - target_logits_Bc

    def split(x):
        return jnp.moveaxis(x.reshape(x.shape[0], length // chunk, chunk, *x.shape[2:]), 1, 0)

    def join(x):
        return jnp.moveaxis(x, 0, 1).reshape(x.shape[1], length, *x.shape[3:])

    def finish(losses):
        # a target outside the answer may have an infinite loss; 0 * inf would poison the sum
        losses_BT = jnp.where(learned_BT, join(losses), 0.0)
        return losses_BT.sum(), losses_BT

    def where_learned(compute, skipped, *operands):
        """`compute`, or `skipped` where nothing of the chunk is learned."""
        if not model.skips_unlearned:
            return compute(*operands)
        return jax.lax.cond((operands[-1] > 0).any(), compute, skipped, *operands)

    def chunks(hidden_BTD):
        return split(hidden_BTD), split(targets_BT), split(learned_BT.astype(jnp.float32))

    @jax.custom_vjp
    def total(weight_VD, hidden_BTD):
        def one(_, xs):
            return None, where_learned(lambda hidden, targets, _: chunk_losses(weight_VD, hidden, targets),
                                       lambda hidden, targets, _: jnp.zeros(targets.shape, jnp.float32), *xs)

        return finish(jax.lax.scan(one, None, chunks(hidden_BTD))[1])

    def forward(weight_VD, hidden_BTD):
        def compute(d_weight, hidden, targets, learned):
            if head_trains:
                losses, pull = jax.vjp(lambda w, h: chunk_losses(w, h, targets), weight_VD, hidden)
                more, d_hidden = pull(learned)
                d_weight = constrain_parameter(d_weight + more.astype(jnp.float32), "vocab", "embed")
            else:
                losses, pull = jax.vjp(lambda h: chunk_losses(weight_VD, h, targets), hidden)
                d_hidden, = pull(learned)
            return d_weight, (losses, d_hidden)

        def skipped(d_weight, hidden, targets, learned):
            return d_weight, (jnp.zeros(targets.shape, jnp.float32), jnp.zeros_like(hidden))

        start = jnp.zeros(weight_VD.shape, jnp.float32) if head_trains else None
        d_weight, (losses, d_hidden) = jax.lax.scan(
            lambda d_weight, xs: where_learned(compute, skipped, d_weight, *xs), start, chunks(hidden_BTD))
        return finish(losses), (d_weight, join(d_hidden))

    def backward(saved, cotangents):
        factor, _ = cotangents
        d_weight, d_hidden = saved
        d_weight = None if d_weight is None else (factor * d_weight).astype(weight_VD.dtype)
        return d_weight, (factor * d_hidden).astype(d_hidden.dtype)

    total.defvjp(forward, backward)
    weight_VD = model.head.weight.get_value()
    return total(weight_VD, hidden_BTD)


def loss_sums(model: Any, batch: Batch, settings: StepSettings, dropout_key: jax.Array | None,
              *, head_trains: bool = False) -> dict[str, jax.Array]:
    """Sums over one batch: `loss` and `count` over learned targets, and both by group (G,)."""
    hidden_BTD, _ = model.hidden(batch["tokens_BT"], batch["positions_BT"], batch["segment_ids_BT"],
                                 dropout_key=dropout_key, remat=settings.remat, attention=settings.attention)
    loss, losses_BT = token_losses(model, hidden_BTD, batch["targets_BT"], batch["learned_BT"], settings.loss_chunk,
                                   head_trains=head_trains)
    learned_BT = batch["learned_BT"].astype(jnp.float32)
    groups_BTG = jax.nn.one_hot(batch["group_BT"], settings.num_groups, dtype=jnp.float32)
    return {
        "loss": loss, "count": learned_BT.sum(),
        "group_loss": jnp.einsum("BT,BTG->G", losses_BT, groups_BTG),
        "group_count": jnp.einsum("BT,BTG->G", learned_BT, groups_BTG),
        "tokens": (batch["segment_ids_BT"] > 0).sum().astype(jnp.float32),
    }


def make_train_step(graphdef: Any, optimizer: optax.GradientTransformation,
                    settings: StepSettings) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]:
    """The training step `(state, batch) -> (state, metrics)`; pure, to be jitted with the state donated."""

    def batch_loss(trainable, frozen, batch, key):
        model = nnx.merge(graphdef, trainable, frozen)
        head = "embed_tokens" if model.lm_head is None else "lm_head"
        sums = loss_sums(model, batch, settings, key, head_trains=head in trainable)
        return sums["loss"], sums

    gradient = jax.grad(batch_loss, has_aux=True)

    def accumulate(state, batch, key):
        """Gradients and sums over micro-batches: rows i, i+A, i+2A … form micro-batch i, so no row changes device."""
        parts = settings.accumulation
        if parts == 1:
            return gradient(state.trainable, state.frozen, batch, key)
        micro = {k: jnp.moveaxis(v.reshape(v.shape[0] // parts, parts, *v.shape[1:]), 1, 0) for k, v in batch.items()}

        def add(carry, xs):
            index, part = xs
            grads, sums = gradient(state.trainable, state.frozen, part, jax.random.fold_in(key, index))
            return jax.tree.map(lambda total, new: total + new.astype(total.dtype), carry, (grads, sums)), None

        one = jax.eval_shape(gradient, state.trainable, state.frozen, jax.tree.map(lambda x: x[0], micro), key)
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, jnp.float32), one)
        return jax.lax.scan(add, zeros, (jnp.arange(parts), micro))[0]

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        key = jax.random.fold_in(jax.random.key(settings.seed), state.step)
        grads, sums = accumulate(state, batch, key)
        count = jnp.maximum(sums["count"], 1.0)
        grads = jax.tree.map(lambda g: g / count.astype(g.dtype), grads)
        norm = optax.tree.norm(grads)
        updates, moments = optimizer.update(grads, state.optimizer, state.trainable)
        finite = state.finite & jnp.isfinite(sums["loss"]) & jnp.isfinite(norm)

        def keep(new, old):
            return jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)

        trainable = keep(optax.apply_updates(state.trainable, updates), state.trainable)
        new_state = TrainState(state.step + finite, finite, trainable, state.frozen, keep(moments, state.optimizer))
        return new_state, sums | {"loss": sums["loss"] / count, "grad_norm": norm}

    return train_step


def make_eval_step(graphdef: Any,
                   settings: StepSettings) -> Callable[[nnx.State, nnx.State, Batch], dict[str, jax.Array]]:
    """The evaluation step `(trainable, frozen, batch) -> sums`, without dropout."""

    def eval_step(trainable: nnx.State, frozen: nnx.State, batch: Batch) -> dict[str, jax.Array]:
        return loss_sums(nnx.merge(graphdef, trainable, frozen), batch, settings, None)

    return eval_step
