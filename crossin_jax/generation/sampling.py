"""How the next token is drawn from its logits: greedy, temperature, top-k, top-p.

Shape letters: B rows · V vocabulary.
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from crossin_jax.config import UserError

MIN_TEMPERATURE = 1e-4  # logits divided by less overflow float32, and no token is likelier then


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Sampling:
    """Settings of a draw as a pytree: None switches a rule off, so its presence is part of the
    compiled program.
    """

    temperature: jax.Array | None = None  # None: greedy
    top_k: jax.Array | None = None
    top_p: jax.Array | None = None

    @property
    def rules(self) -> str:
        """The rules in force, as the name of their program."""
        if self.temperature is None:
            return "greedy"
        return (
            "sampled"
            + (" top-k" if self.top_k is not None else "")
            + (" top-p" if self.top_p is not None else "")
        )


def make_sampling(
    temperature: float = 0.0, top_k: int | None = None, top_p: float | None = None
) -> Sampling:
    """Checked settings; temperature 0 is greedy and ignores no rule silently: top-k and top-p need
    a temperature.
    """
    if temperature != 0 and not MIN_TEMPERATURE <= temperature < math.inf:
        raise UserError(
            f"temperature={temperature} is not 0 and not at least {MIN_TEMPERATURE}; "
            "0 is greedy, 1 samples from the model's distribution"
        )
    if top_k is not None and top_k < 1:
        raise UserError(f"top_k={top_k} leaves no token; use at least 1, or None for all")
    if top_p is not None and not 0 < top_p <= 1:
        raise UserError(
            f"top_p={top_p} is not a share; use a number above 0 and at most 1, or None for all"
        )
    if temperature == 0:
        if top_k is not None or top_p is not None:
            raise UserError(
                f"top_k={top_k}, top_p={top_p} have no effect at temperature=0; set a temperature "
                "above 0"
            )
        return Sampling()
    return Sampling(
        np.float32(temperature),
        None if top_k is None else np.float32(top_k),
        None if top_p is None else np.float32(top_p),
    )


def draw(
    logits_BV: jax.Array, seeds_B: jax.Array, positions_B: jax.Array, sampling: Sampling
) -> jax.Array:
    """Token ids (B,) int32, a function of each row's logits, seed and position alone.

    The rules apply in the order temperature, top-k, top-p, as in `transformers`; tokens that tie
    with the last one allowed are allowed too.
    """
    if sampling.temperature is None:
        return _argmax(logits_BV)
    scores_BV = logits_BV / sampling.temperature
    if sampling.top_k is not None:
        p_BV = jax.nn.softmax(scores_BV, axis=-1)
        kept = p_BV >= _threshold(p_BV, jnp.ones_like(p_BV), sampling.top_k)
        scores_BV = jnp.where(kept, scores_BV, -jnp.inf)
    if sampling.top_p is not None:
        p_BV = jax.nn.softmax(scores_BV, axis=-1)
        scores_BV = jnp.where(p_BV >= _threshold(p_BV, p_BV, sampling.top_p), scores_BV, -jnp.inf)

    # The largest of log p + Gumbel noise is a draw from p. The noise depends on the row's own seed
    # and position, so an answer is the same in every batch.
    def noise(seed, position):
        return jax.random.gumbel(
            jax.random.fold_in(jax.random.key(seed), position), logits_BV.shape[1:], jnp.float32
        )

    return _argmax(scores_BV + jax.vmap(noise)(seeds_B, positions_B))


def _argmax(scores_BV: jax.Array) -> jax.Array:
    """The first index of the largest score, (B,) int32; two plain reductions, which a CPU
    vectorizes and argmax not.
    """
    # The largest score, then the smallest index that has it.
    index = jnp.arange(scores_BV.shape[-1], dtype=jnp.int32)[None]
    best = scores_BV.max(axis=-1, keepdims=True)
    return jnp.where(scores_BV == best, index, scores_BV.shape[-1] - 1).min(axis=-1)


# Probabilities .5 .3 .2: for top_p = .7 the weights are the probabilities, and the threshold is .3,
# since .5 + .3 reaches .7. For top_k = 2 every weight is 1, and the threshold is .3 again.
def _threshold(p_BV: jax.Array, weight_BV: jax.Array, target: jax.Array) -> jax.Array:
    """The largest t (B, 1) for which the weights of all p >= t sum to `target`.

    Bisection over the bits of a float32, whose order is the order of the numbers; a sort of the
    vocabulary costs more.
    """

    def halve(_, bounds):
        low, high = bounds
        middle = (low + high) // 2
        heavy = p_BV >= jax.lax.bitcast_convert_type(middle, jnp.float32)
        enough = jnp.sum(jnp.where(heavy, weight_BV, 0), axis=-1, keepdims=True) >= target
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    # Positive float32 numbers are ordered as their bits are, read as integers: 31 halvings of the
    # range from 0 to 1 find the exact threshold.
    zero = jnp.zeros((p_BV.shape[0], 1), jnp.int32)
    one = jax.lax.bitcast_convert_type(jnp.float32(1.0), jnp.int32) + 1
    low, _ = jax.lax.fori_loop(0, 31, halve, (zero, zero + one))
    return jax.lax.bitcast_convert_type(low, jnp.float32)
