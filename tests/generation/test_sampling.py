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
    return np.stack([sample(logits, np.arange(B, dtype=np.uint32), np.full(B, i), sampling) for i in range(count)])


def test_greedy_takes_the_first_of_the_best():
    logits = np.array([[0.0, 2, 1, 2], [-5, -6, -4, -9]], np.float32)
    assert draws(logits, 1).tolist() == [[1, 2]]


@pytest.mark.parametrize("rules", [{"top_k": 4}, {"top_p": 0.8}, {"top_k": 20, "top_p": 0.9}, {"top_k": 999},
                                   {"top_p": 1.0}, {"top_p": 1e-6}])
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
    drawn = jax.jit(jax.vmap(lambda i: draw(jnp.asarray(LOGITS), jnp.zeros(3, jnp.uint32), jnp.full(3, i), sampling)))(
        jnp.arange(count))
    for row in range(3):
        found = np.bincount(drawn[:, row], minlength=50) / count
        assert not found[shares[row] == 0].any()
        assert np.abs(found - shares[row]).max() < 5 * 0.5 / count ** 0.5


def test_a_draw_depends_on_seed_and_position_alone():
    sampling = make_sampling(temperature=1.0)
    seeds, positions = np.array([7, 8, 7], np.uint32), np.array([4, 4, 5], np.int32)
    logits = np.zeros((3, 5000), np.float32)
    together = np.asarray(sample(logits, seeds, positions, sampling))
    assert len(set(together.tolist())) == 3
    for order in ([2, 1, 0], [1, 2, 0]):
        assert (sample(logits, seeds[order], positions[order], sampling) == together[order]).all()
    assert sample(logits[:1], seeds[:1], positions[:1], sampling)[0] == together[0]


@pytest.mark.parametrize("rules, words", [
    ({"temperature": -1.0}, "temperature=-1"), ({"temperature": 1.0, "top_k": 0}, "top_k=0"),
    ({"temperature": 1.0, "top_p": 1.5}, "top_p=1.5"), ({"top_p": 0.9}, "no effect at temperature=0")])
def test_rules_that_cannot_be_meant_are_refused(rules, words):
    with pytest.raises(UserError, match=words):
        make_sampling(**rules)
