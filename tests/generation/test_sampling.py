"""Draws: which tokens the rules allow, how often, and on what they depend."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from crossin_jax.config import UserError
from crossin_jax.generation.sampling import draw, make_sampling

LOGITS = np.random.default_rng(0).normal(0, 3, (3, 50)).astype(np.float32)
sample = jax.jit(draw)


def draws(logits, count, **rules):
    """`count` draws (count, B) of the same logits at different positions."""
    sampling = make_sampling(**rules)
    B = len(logits)
    return np.stack(
        [
            sample(logits, np.arange(B, dtype=np.uint32), np.full(B, i), sampling)
            for i in range(count)
        ]
    )


def test_greedy_takes_the_first_of_the_best():
    logits = np.array([[0.0, 2, 1, 2], [-5, -6, -4, -9]], np.float32)
    assert draws(logits, 1).tolist() == [[1, 2]]


@pytest.mark.parametrize(
    "rules",
    [
        {"top_k": 4},
        {"top_p": 0.8},
        {"top_k": 20, "top_p": 0.9},
        {"top_k": 999},
        {"top_p": 1.0},
        {"top_p": 1e-6},
    ],
)
def test_rules_allow_the_tokens_that_transformers_allows_with_the_same_shares(rules):
    scores = torch.tensor(LOGITS)
    scores = TemperatureLogitsWarper(1.7)(None, scores)
    if "top_k" in rules:
        scores = TopKLogitsWarper(rules["top_k"])(None, scores)
    if "top_p" in rules:
        scores = TopPLogitsWarper(rules["top_p"])(None, scores)
    shares = torch.softmax(scores, -1).numpy()
    count = 3000
    sampling = make_sampling(temperature=1.7, **rules)
    drawn = jax.jit(
        jax.vmap(
            lambda i: draw(jnp.asarray(LOGITS), jnp.zeros(3, jnp.uint32), jnp.full(3, i), sampling)
        )
    )(jnp.arange(count))
    for row in range(3):
        found = np.bincount(drawn[:, row], minlength=50) / count
        assert not found[shares[row] == 0].any()
        assert np.abs(found - shares[row]).max() < 5 * 0.5 / count**0.5


def allowed(logits, temperature, top_k=None, top_p=None) -> set[int]:
    """The tokens that may be drawn: likeliest first, temperature before top-k before top-p."""
    order = np.argsort(-logits, kind="stable")[:top_k]
    shares = np.exp((logits[order] - logits.max()) / temperature)
    shares /= shares.sum()
    if top_p is not None:  # as few as reach the share
        order = order[: np.searchsorted(np.cumsum(shares), top_p * (1 - 1e-6)) + 1]
    return set(order.tolist())


@pytest.mark.parametrize(
    "rules",
    [
        {},
        {"top_k": 1},
        {"top_k": 3},
        {"top_k": 12},
        {"top_p": 0.1},
        {"top_p": 0.5},
        {"top_p": 0.9},
        {"top_p": 1.0},
        {"top_k": 4, "top_p": 0.7},
        {"top_k": 6, "top_p": 0.95},
    ],
    ids=str,
)
@pytest.mark.parametrize("temperature", [1.5, 6.0])
def test_exactly_the_tokens_that_the_rules_allow_are_drawn(temperature, rules):
    """Of twelve tokens, in three rows; two thousand draws leave none of them out."""
    logits = np.random.default_rng(2).normal(0, 2, (3, 12)).astype(np.float32)
    sampling = make_sampling(temperature=temperature, **rules)
    drawn = np.asarray(draw_many(logits, np.arange(2000), sampling))
    for row in range(3):
        expected = allowed(logits[row].astype(np.float64), temperature, **rules)
        assert set(drawn[:, row].tolist()) <= expected
        likely = {
            i for i in expected if np.exp((logits[row, i] - logits[row].max()) / temperature) > 0.05
        }
        assert likely <= set(drawn[:, row].tolist())
    assert likely


draw_many = jax.jit(
    jax.vmap(
        lambda logits, i, sampling: draw(
            logits, jnp.zeros(3, jnp.uint32), jnp.full(3, i), sampling
        ),
        (None, 0, None),
    )
)


def test_tokens_that_tie_with_the_last_one_allowed_are_allowed_too():
    logits = np.array([[3.0, 1, 1, 0, 1]] * 3, np.float32)
    for rules in ({"top_k": 2}, {"top_p": 0.75}):
        drawn = draw_many(logits, np.arange(500), make_sampling(temperature=1.0, **rules))
        assert set(np.unique(drawn).tolist()) == {0, 1, 2, 4}


def test_shares_follow_the_temperature():
    """Odds of e² between two tokens at temperature 1 are e at 2 and e⁴ at a half."""
    logits = np.array([[2.0, 0.0, -50.0]] * 3, np.float32)
    for temperature in (0.5, 1.0, 2.0):
        drawn = draw_many(logits, np.arange(6000), make_sampling(temperature=temperature))
        expected = 1 / (1 + np.exp(-2 / temperature))
        spread = (expected * (1 - expected) / 6000) ** 0.5
        assert abs(float((drawn[:, 0] == 0).mean()) - expected) < 4 * spread


def test_a_draw_depends_on_seed_and_position_alone():
    sampling = make_sampling(temperature=1.0)
    seeds, positions = np.array([7, 8, 7], np.uint32), np.array([4, 4, 5], np.int32)
    logits = np.zeros((3, 5000), np.float32)
    together = np.asarray(sample(logits, seeds, positions, sampling))
    assert len(set(together.tolist())) == 3
    for order in ([2, 1, 0], [1, 2, 0]):
        assert (sample(logits, seeds[order], positions[order], sampling) == together[order]).all()
    assert sample(logits[:1], seeds[:1], positions[:1], sampling)[0] == together[0]


@pytest.mark.parametrize(
    "rules, words",
    [
        ({"temperature": -1.0}, "temperature=-1"),
        ({"temperature": 1.0, "top_k": 0}, "top_k=0"),
        ({"temperature": 1.0, "top_p": 1.5}, "top_p=1.5"),
        ({"top_p": 0.9}, "no effect at temperature=0"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p=0"),
        ({"temperature": 1.0, "top_p": -0.5}, "top_p=-0.5"),
        ({"top_k": 3}, "no effect at temperature=0"),
        ({"temperature": 1.0, "top_k": -1}, "top_k=-1"),
    ],
)
def test_rules_that_cannot_be_meant_are_refused(rules, words):
    with pytest.raises(UserError, match=words):
        make_sampling(**rules)
