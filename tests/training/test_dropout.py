"""Dropout on the inputs of adapters: which mask acts where, and in which step."""

import dataclasses
import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from crossin_jax.config import Lora
from crossin_jax.models.layers import dropout
from crossin_jax.models.lora import TARGETS, is_trainable, resolve
from crossin_jax.models.transformer import Transformer
from crossin_jax.training.step import StepSettings, init_state, make_eval_step, make_train_step
from tests.models.models import LLAMA, make_model, make_tokens

RATE = 0.3
LORA = Lora(rank=2, dropout=RATE, modules_to_save=())
SETTINGS = StepSettings(
    accumulation=1, loss_chunk=8, remat="none", attention="reference", seed=1, num_groups=4
)
still = optax.set_to_zero()  # an optimizer that moves nothing


def spread(share: float, size: int) -> float:
    """The standard deviation of a share of `size` draws."""
    return (share * (1 - share) / size) ** 0.5


# ---- Masks, read off gradients


@pytest.fixture(scope="module")
def input_gradients():
    """The gradient of every lora_a with and without dropout, {projection: (L, R, inputs)}.

    The gradient of lora_a is a sum over tokens of an output's gradient times the adapter's input.
    Only one token has an input here: the row is that token and, before it, one whose embedding is
    zero, and which stays zero in every layer. So the gradient is zero where the input was dropped.
    lora_b is almost zero: a mask in one place does not change what other places read.
    """
    # all widths alike: masks of one key would be equal
    spec = dataclasses.replace(LLAMA, width=64, num_heads=8, ff_width=64)
    model = Transformer(spec, lora=LORA, frozen_dtype="float32", rngs=nnx.Rngs(0))
    for path, leaf in nnx.to_flat_state(nnx.state(model)):
        if path[-1] == "lora_b":
            leaf.set_value(1e-8 * jax.random.normal(jax.random.key(1), leaf.shape))
        elif path[0] == "embed_tokens":
            leaf.set_value(leaf.get_value().at[0].set(0))
        elif leaf.ndim > 2:
            leaf.set_value(5 * leaf.get_value())
    lora = resolve(LORA, spec)
    graphdef, adapters, rest = nnx.split(model, partial(is_trainable, lora=lora), ...)
    key, tokens = jax.random.key(5), np.array([[0, 7]], np.int32)

    @jax.jit
    def gradients(adapters):
        def target(adapters, key):
            model = nnx.merge(graphdef, adapters, rest)
            hidden, _ = model.hidden(tokens, dropout_key=key)
            return (hidden * jnp.sin(jnp.arange(hidden.shape[-1]))[None, None]).sum()

        return jax.grad(target)(adapters, key), jax.grad(target)(adapters, None)

    return [
        {
            name: np.asarray(grads["layers"][name]["lora_a"].get_value()).reshape(3, 2, -1)
            for name in TARGETS
        }
        for grads in gradients(adapters)
    ]


def test_every_projection_reads_its_input_after_inverted_dropout(input_gradients):
    """An input is zero with the probability of dropout, else 1 / (1 - rate) times what it was."""
    dropped, plain = input_gradients
    for name in TARGETS:
        kept = dropped[name] != 0
        assert (kept[:, 0] == kept[:, 1]).all(), name  # of all ranks alike: the input is dropped
        assert abs(kept[:, 0].mean() - (1 - RATE)) < 4 * spread(RATE, kept[:, 0].size), name
        np.testing.assert_allclose(
            dropped[name][kept],
            plain[name][kept] / (1 - RATE),
            rtol=1e-2,
            atol=1e-4 * np.abs(plain[name]).max(),
            err_msg=name,
        )
        assert (plain[name] != 0).all(), name


def test_every_layer_and_every_input_within_a_layer_has_a_mask_of_its_own(input_gradients):
    """No two masks agree in more places than chance would have it."""
    dropped, _ = input_gradients
    expected = RATE**2 + (1 - RATE) ** 2
    masks = {
        (layer, name): dropped[name][layer, 0] != 0
        for layer in range(3)
        for name in ("q_proj", "o_proj", "up_proj", "down_proj")
    }
    for (one, a), (other, b) in itertools.combinations(masks.items(), 2):
        assert abs((a == b).mean() - expected) < 5 * spread(expected, len(a)), (one, other)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_rows_positions_and_channels_have_masks_of_their_own(axis):
    kept = np.asarray(dropout(jnp.ones((20, 24, 28)), 0.5, jax.random.key(3))) > 0
    slices = np.moveaxis(kept, axis, 0).reshape(kept.shape[axis], -1)
    agree = [(a == b).mean() for a, b in itertools.combinations(slices, 2)]
    assert min(agree) > 0.35 and max(agree) < 0.65


def test_masks_follow_the_whole_key():
    words = jnp.array(list(itertools.product(range(3), repeat=2)), jnp.uint32)
    keys = jax.random.wrap_key_data(words)
    masks = [np.asarray(dropout(jnp.ones((30, 40)), 0.5, key)) > 0 for key in keys]
    agree = [(a == b).mean() for a, b in itertools.combinations(masks, 2)]
    assert min(agree) > 0.4 and max(agree) < 0.6


@pytest.mark.parametrize("rate", [0.01, 0.25, 0.5, 0.9])
def test_the_rate_is_the_share_of_zeros_and_the_mean_stays(rate):
    x = dropout(jnp.ones((400, 500)), rate, jax.random.key(0))
    assert abs(float((x == 0).mean()) - rate) < 4 * spread(rate, x.size)
    np.testing.assert_allclose(x[x > 0], 1 / (1 - rate), rtol=1e-6)


def test_nothing_is_dropped_without_a_key_or_at_rate_zero():
    x = jnp.ones((40, 50))
    assert (dropout(x, 0.5, None) == x).all() and (dropout(x, 0.0, jax.random.key(0)) == x).all()


# ---- Masks of steps, micro-batches and rows


def equal_rows(rows: int) -> dict[str, np.ndarray]:
    """A batch of equal rows; each is a group of its own, so that metrics tell its loss."""
    tokens = make_tokens(1, 13).repeat(rows, 0)
    ones = np.ones((rows, 12), np.int32)
    return {
        "tokens_BT": tokens[:, :-1],
        "targets_BT": tokens[:, 1:],
        "segment_ids_BT": ones,
        "positions_BT": np.arange(12, dtype=np.int32)[None] * ones,
        "loss_mask_BT": ones > 0,
        "group_BT": np.arange(rows, dtype=np.int32)[:, None] * ones,
    }


def make_state(lora: Lora = LORA):
    """A model with adapters whose lora_b is not zero, so that dropout changes the loss."""
    model = make_model(LLAMA, lora=lora)
    trains = partial(is_trainable, lora=resolve(lora, LLAMA))
    graphdef, trainable, frozen = nnx.split(model, trains, ...)
    return graphdef, init_state(trainable, frozen, still)


def row_losses(metrics) -> list[float]:
    """The loss of each row of `equal_rows`."""
    return [float(loss) for loss in metrics["group_loss"] / 12]


@pytest.mark.parametrize("accumulation", [1, 2, 4])
def test_no_two_rows_micro_batches_or_steps_share_a_mask(accumulation):
    """Weights and rows are equal throughout: without dropout all losses would be one number."""
    graphdef, state = make_state()
    settings = dataclasses.replace(SETTINGS, accumulation=accumulation)
    step = jax.jit(make_train_step(graphdef, still, settings))
    batch, losses = equal_rows(4), []
    for _ in range(3):
        state, metrics = step(state, batch)
        losses += row_losses(metrics)
    assert int(state.step) == 3
    assert min(abs(a - b) for a, b in itertools.combinations(losses, 2)) > 1e-3


def test_masks_follow_the_seed_and_the_step_alone():
    """The same step of the same seed has the same masks, whatever was run before it."""
    graphdef, start = make_state()
    batch, losses = equal_rows(4), {}
    for seed in (1, 2):
        step = jax.jit(make_train_step(graphdef, still, dataclasses.replace(SETTINGS, seed=seed)))
        second = row_losses(step(step(start, batch)[0], batch)[1])
        losses[seed] = second
        alone = dataclasses.replace(start, step=jnp.ones((), jnp.int32))  # as after a restore
        assert row_losses(step(alone, batch)[1]) == second
    assert min(abs(a - b) for a, b in zip(losses[1], losses[2], strict=True)) > 1e-3


def test_there_is_no_dropout_in_evaluation():
    """The held-out loss of a model with dropout is that of the same weights without."""
    expected = None
    for rate in (0.0, 0.9):
        graphdef, state = make_state(dataclasses.replace(LORA, dropout=rate))
        evaluate = jax.jit(make_eval_step(graphdef, SETTINGS))
        losses = row_losses(evaluate(state.trainable, state.frozen, equal_rows(4)))
        expected = expected or losses
        assert losses == expected and max(losses) - min(losses) < 1e-5
