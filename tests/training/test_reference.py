"""The training step beside one that is written out: the whole batch at once, AdamW in NumPy."""

import dataclasses
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from crossin_jax.config import Optim
from crossin_jax.models.transformer import Transformer
from crossin_jax.parallel.mesh import leaf_name
from crossin_jax.training.optim import make_optimizer
from crossin_jax.training.step import init_state, loss_sums, make_train_step
from tests.training.test_step import SETTINGS, make_batch, make_state

OPTIM = Optim(
    learning_rate=1e-2,
    warmup_share=0.25,
    schedule="linear",
    final_share=0.1,
    weight_decay=0.2,
    b1=0.8,
    b2=0.9,
    clip_norm=0.82,
)
NUM_STEPS = 8  # of the schedule: two of warm-up, six of decay
RATES = (0.005, 0.01, 0.01, 0.0085)


def flatten(tree) -> dict[str, np.ndarray]:
    """The arrays of a tree by name."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {leaf_name(path): np.asarray(leaf) for path, leaf in leaves}


def token_losses(logits: jax.Array, targets: np.ndarray) -> jax.Array:
    """The negative log-likelihood of each target."""
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)[..., 0]


def follow(graphdef, params, batches) -> list[tuple[dict, dict]]:
    """(metrics, parameters by name) after each step, by the definitions."""

    @jax.jit
    def differentiate(params, batch):
        def loss(params):
            model = nnx.merge(graphdef, params)
            logits = model(batch["tokens_BT"], batch["positions_BT"], batch["segment_ids_BT"])
            losses = jnp.where(batch["loss_mask_BT"], token_losses(logits, batch["targets_BT"]), 0)
            return losses.sum() / batch["loss_mask_BT"].sum(), losses

        return jax.value_and_grad(loss, has_aux=True)(params)

    results, structure = [], jax.tree.structure(params)
    mean, square = (
        {name: np.zeros(leaf.shape) for name, leaf in flatten(params).items()} for _ in range(2)
    )
    for step, batch in enumerate(batches):
        (loss, losses), gradient = differentiate(params, batch)
        gradient = {name: leaf.astype(np.float64) for name, leaf in flatten(gradient).items()}
        norm = np.sqrt(sum((leaf**2).sum() for leaf in gradient.values()))
        after = {}
        for name, value in flatten(params).items():
            g = gradient[name] * min(1, OPTIM.clip_norm / norm)
            mean[name] = 0.8 * mean[name] + 0.2 * g
            square[name] = 0.9 * square[name] + 0.1 * g**2
            change = mean[name] / (1 - 0.8 ** (step + 1))
            change /= np.sqrt(square[name] / (1 - 0.9 ** (step + 1))) + 1e-8
            decay = 0 if "norm" in name else 0.2 * value
            after[name] = value - RATES[step] * (change + decay)
        leaves = [jnp.asarray(value, jnp.float32) for value in after.values()]
        params = jax.tree.unflatten(structure, leaves)
        chosen = [batch["group_BT"] == group for group in range(3)]
        results.append(
            (
                {
                    "loss": loss,
                    "grad_norm": norm,
                    "count": batch["loss_mask_BT"].sum(),
                    "tokens": (batch["segment_ids_BT"] > 0).sum(),
                    "group_loss": [losses[where].sum() for where in chosen],
                    "group_count": [batch["loss_mask_BT"][where].sum() for where in chosen],
                },
                after,
            )
        )
    return results


@pytest.fixture(scope="module")
def expected():
    """Four steps by the definitions."""
    graphdef, state, _ = make_state()
    return follow(graphdef, state.trainable, [make_batch(i) for i in range(4)])


@pytest.mark.parametrize("accumulation", [1, 4])
def test_a_step_is_what_it_is_said_to_be(accumulation, expected):
    """Loss, norm, clipping, rate, decay and every metric, with micro-batches of uneven size."""
    graphdef, state, _ = make_state()
    rule = make_optimizer(OPTIM, NUM_STEPS)
    state = init_state(state.trainable, state.frozen, rule)
    settings = dataclasses.replace(SETTINGS, accumulation=accumulation)
    step = jax.jit(make_train_step(graphdef, rule, settings))
    norms = []
    for i, (metrics, params) in enumerate(expected):
        state, found = step(state, make_batch(i))
        assert int(state.step) == i + 1 and bool(state.finite)
        assert found.keys() == metrics.keys()
        for name, value in metrics.items():
            np.testing.assert_allclose(found[name], value, rtol=2e-5, err_msg=name)
        for name, value in flatten(state.trainable).items():
            np.testing.assert_allclose(value, params[name], atol=1e-4, err_msg=name)
        norms.append(float(found["grad_norm"]))
    assert min(norms) < OPTIM.clip_norm < max(norms)  # some steps are clipped, some are not


@cache
def compiled(accumulation: int):
    """A state and a compiled step, of the default optimizer."""
    graphdef, state, rule = make_state()
    settings = dataclasses.replace(SETTINGS, accumulation=accumulation)
    return state, jax.jit(make_train_step(graphdef, rule, settings))


def test_targets_that_are_not_learned_may_be_anything(monkeypatch):
    """Not even a target of probability zero has an influence where it is not learned."""
    unembed = Transformer.unembed
    # No position gives token 95.
    monkeypatch.setattr(
        Transformer, "unembed", lambda *inputs: unembed(*inputs).at[..., 95].set(-jnp.inf)
    )
    graphdef, state, _ = make_state()
    model, batch = nnx.merge(graphdef, state.trainable, state.frozen), make_batch(0)
    targets = np.minimum(batch["targets_BT"], 94)
    sound, odd = (
        loss_sums(
            model,
            batch | {"targets_BT": np.where(batch["loss_mask_BT"], targets, other)},
            SETTINGS,
            None,
        )
        for other in (targets, 95)
    )
    assert np.isfinite(sound["loss"])
    for name, value in sound.items():
        np.testing.assert_array_equal(odd[name], value, err_msg=name)


def test_a_batch_without_learned_tokens_has_loss_zero_and_moves_by_decay_alone():
    graphdef, state, _ = make_state()
    rule = make_optimizer(OPTIM, NUM_STEPS)
    state = init_state(state.trainable, state.frozen, rule)
    batch = make_batch(0)
    batch["loss_mask_BT"] = np.zeros_like(batch["loss_mask_BT"])
    after, metrics = jax.jit(make_train_step(graphdef, rule, SETTINGS))(state, batch)
    assert metrics["loss"] == metrics["grad_norm"] == metrics["count"] == 0
    assert after.finite and int(after.step) == 1
    before = flatten(state.trainable)
    for name, value in flatten(after.trainable).items():
        share = 1 if "norm" in name else 1 - 0.2 * RATES[0]
        np.testing.assert_allclose(value, share * before[name], rtol=1e-6, err_msg=name)


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("fault", ["loss", "gradient"])
def test_a_fault_in_loss_or_gradient_changes_nothing_from_then_on(fault, accumulation):
    """Parameters, moments and the number of steps stay; nor does a sound batch change them then.

    `gradient`: the last norm multiplies by 1e25, so the loss is large and the square of the
    gradient is beyond float32.
    """
    state, step = compiled(accumulation)
    good, _ = step(state, make_batch(0))
    bad, batch = good, make_batch(1)
    if fault == "loss":
        batch["tokens_BT"] = batch["tokens_BT"].copy()
        batch["tokens_BT"][2, 5] = 10_000  # no such embedding
    else:
        weight = good.trainable["norm"]["weight"]
        large = {"norm": {"weight": weight.replace(1e25 * weight.get_value())}}
        bad = dataclasses.replace(good, trainable=nnx.merge_state(good.trainable, nnx.State(large)))
    after, metrics = step(bad, batch)
    assert np.isfinite(metrics["loss"]) == (fault == "gradient")
    assert not np.isfinite(metrics["grad_norm"])
    assert not after.finite
    later, metrics = step(dataclasses.replace(after, trainable=good.trainable), make_batch(2))
    assert np.isfinite(metrics["loss"]) and np.isfinite(metrics["grad_norm"])
    for old, new in ((bad, after), (good, later)):
        assert int(new.step) == 1 and not new.finite
        for a, b in zip(
            jax.tree.leaves((old.trainable, old.optimizer)),
            jax.tree.leaves((new.trainable, new.optimizer)),
            strict=True,
        ):
            np.testing.assert_array_equal(a, b)
