"""How far languages agree, two at a time, and how far what is right in English is right elsewhere.

- RankC (Qi, Fernández and Bisazza 2023, arXiv 2310.10378): both languages rank the n choices of an
  item by log-likelihood. Of the first j choices of both, a share of the j is in common. RankC is
  the mean of these shares over j, with weights w_j that fall with j.
- Top-1 agreement: the share of items on which both choose the same letter. Its mean over pairs is
  consistency_2.
- Agreement where one is right: the same among the items that at least one of the two has right, so
  that wrong answers in common do not count.
- Transfer: among the items that are right in English, the share that is right in another language.
  Conductivity (Gao et al. 2024, arXiv 2404.04659): transfer against blind guessing, so that 0 is
  no better than chance, and 1 is everything.

All come from answers that exist: no model is asked again. Where an answer fits several choices, the
probabilities of `metrics.choice_probabilities` count.

Shape letters: I items · L languages · C choices · P pairs of languages · R resamples · K any
columns.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, Protocol

import numpy as np

from crossin_jax.config import UserError, hint
from crossin_jax.evaluation.metrics import Mode, choice_probabilities, gold_probabilities
from crossin_jax.evaluation.predictions import Predictions

Weights = Literal["softmax", "norm1", "norm2"]
WEIGHTS: tuple[Weights, ...] = ("softmax", "norm1", "norm2")
# The measures of pairs, in the order of reports
MEASURES = ("rankc", "agreement", "agreement_right")
# Codes and column names of the language whose right answers should carry over
PIVOTS = ("en", "English")
# Numbers of one array (I, P, C) or (R, P): 4 MiB, so that they stay in the cache
MAX_CHUNK = 1 << 19


class Weighable(Protocol):
    """A score that is no mean over items, but can be taken of weighted items."""

    def weigh(self, weights_RI: np.ndarray) -> np.ndarray:
        """The score under each row of weights, (R,) or (R, K)."""
        ...


@dataclass(frozen=True, slots=True)
class Ratio:
    """Sum over items of `part`, divided by that of `whole`; both (I,) or (I, K).

    Where nothing is left to divide by, the value is 0.
    """

    part: np.ndarray
    whole: np.ndarray

    def weigh(self, weights_RI: np.ndarray) -> np.ndarray:
        return _divide(weights_RI @ self.part, weights_RI @ self.whole)


@dataclass(frozen=True, slots=True)
class RightInOne:
    """The share of items with the same choice, among those that at least one of two languages has
    right; for pairs (a_P, b_P) of the languages.

    `same_IP`: both choose a letter that is right in one. `both_IP`: both are right, which is the
    same array where the right letters are the same in all languages.
    """

    same_IP: np.ndarray
    both_IP: np.ndarray
    right_IL: np.ndarray
    a_P: np.ndarray
    b_P: np.ndarray

    def weigh(self, weights_RI: np.ndarray) -> np.ndarray:
        both_RP, right_RL = weights_RI @ self.both_IP, weights_RI @ self.right_IL
        same_RP = both_RP if self.same_IP is self.both_IP else weights_RI @ self.same_IP
        # right in at least one = right in a + right in b - right in both
        return _divide(same_RP, right_RL[:, self.a_P] + right_RL[:, self.b_P] - both_RP)


@dataclass(frozen=True, slots=True)
class Mean:
    """The mean over items, of each column (I, K)."""

    part: np.ndarray

    def weigh(self, weights_RI: np.ndarray) -> np.ndarray:
        return weights_RI @ self.part


@dataclass(frozen=True, slots=True)
class MeanOverColumns:
    """The mean over the columns of another score."""

    of: Weighable

    def weigh(self, weights_RI: np.ndarray) -> np.ndarray:
        return self.of.weigh(weights_RI).mean(1)


class LanguagePairs:
    """What the languages of a run have in common, for every pair l < m.

    The order of pairs is that of itertools.combinations: (0, 1), (0, 2) … (L-2, L-1). Every measure
    is symmetric: the value of (m, l) is that of (l, m). Raises UserError for an unknown mode or
    unknown weights, or for no items.
    """

    def __init__(
        self,
        predictions: Predictions,
        mode: Mode = "expectation",
        *,
        seed: int = 0,
        weights: Weights = "softmax",
    ):
        self.p_ILC = choice_probabilities(predictions, mode, seed)
        self.gold_IL, self.correct_IL = gold_probabilities(predictions, self.p_ILC)
        self.values_ILC, self.asked_IL = rank_choices(predictions, weights)
        sizes_I = [item.num_choices for item in predictions.items]
        # A language that was not asked ranks at random: of the first j choices, j / n are shared.
        self.random_I = np.array(
            [0.0 if mode == "strict" else _random_rankc(size, weights) for size in sizes_I]
        )
        self.first_P, self.second_P = np.triu_indices(self.p_ILC.shape[1], 1)

    @property
    def measures(self) -> tuple[str, ...]:
        """The measures that these answers have; RankC needs log-likelihoods of choices."""
        return MEASURES if self.asked_IL.any() else MEASURES[1:]

    def chunks(self) -> Iterator[slice]:
        """All pairs, in parts whose arrays fit in memory."""
        num_items, _, num_choices = self.p_ILC.shape
        size = max(1, MAX_CHUNK // max(num_items * num_choices, 1 << 12))
        for start in range(0, len(self.first_P), size):
            yield slice(start, start + size)

    def measure(self, name: str, pairs: slice) -> Weighable:
        """A measure of some pairs, by item."""
        a_P, b_P = self.first_P[pairs], self.second_P[pairs]
        if name == "rankc":
            return Mean(self._rankc(a_P, b_P))
        if name == "agreement":
            return Mean(np.einsum("ipc,ipc->ip", self.p_ILC[:, a_P], self.p_ILC[:, b_P]))
        both_IP = same_IP = self.correct_IL[:, a_P] * self.correct_IL[:, b_P]
        gold_a_IP, gold_b_IP = self.gold_IL[:, a_P], self.gold_IL[:, b_P]
        if (gold_a_IP != gold_b_IP).any():
            # The right letter is another one in each language: the same choice is right in one.
            same_IP = self.correct_IL[:, a_P] * _take(self.p_ILC[:, b_P], gold_a_IP)
            other_IP = self.correct_IL[:, b_P] * _take(self.p_ILC[:, a_P], gold_b_IP)
            same_IP += np.where(gold_a_IP == gold_b_IP, 0, other_IP)
        return RightInOne(same_IP, both_IP, self.correct_IL, a_P, b_P)

    # One language ranks A B C, another B A C. Of the first 1, 2, 3 choices they share 0, 2, 3,
    # which are shares of 0, 1, 1. With the softmax weights .665 .245 .090, RankC is .245 + .090 =
    # .335.
    def _rankc(self, a_P: np.ndarray, b_P: np.ndarray) -> np.ndarray:
        """RankC of every item and pair, (I, P).

        Choice c is in common among the first j where j ≥ max(rank_a(c), rank_b(c)). So RankC is
        a sum over choices of a value that falls with that rank: the smaller of two values.
        """
        common_IP = np.minimum(self.values_ILC[:, a_P], self.values_ILC[:, b_P]).sum(2)
        are_asked_IP = self.asked_IL[:, a_P] & self.asked_IL[:, b_P]
        return np.where(are_asked_IP, common_IP, self.random_I[:, None])


@dataclass(frozen=True, slots=True)
class OverPairs:
    """The mean of a measure over all pairs of languages."""

    pairs: LanguagePairs
    name: str

    def weigh(self, weights_RI: np.ndarray) -> np.ndarray:
        sums = (
            self.pairs.measure(self.name, chunk).weigh(weights_RI).sum(1)
            for chunk in self.pairs.chunks()
        )
        return sum(sums) / len(self.pairs.first_P)


def pair_scores(
    predictions: Predictions,
    mode: Mode = "expectation",
    *,
    seed: int = 0,
    weights: Weights = "softmax",
) -> dict[str, Weighable]:
    """rankc, agreement_right, transfer, conductivity: means over pairs or languages, and of the
    last two the value of each language (conductivity/es).

    No RankC without log-likelihoods; no transfer without English; nothing with one language.
    """
    if len(predictions.languages) < 2:
        return {}
    pairs = LanguagePairs(predictions, mode, seed=seed, weights=weights)
    scores: dict[str, Weighable] = {}
    if "rankc" in pairs.measures:
        # RankC is a mean over items: the pairs can be averaged first.
        parts = [pairs.measure("rankc", chunk).part.sum(1) for chunk in pairs.chunks()]
        scores["rankc"] = Mean(sum(parts) / len(pairs.first_P))
    scores["agreement_right"] = OverPairs(pairs, "agreement_right")
    return scores | _transfer(predictions, pairs.correct_IL)


# Three items are right in English, and two of them in Spanish too: transfer is 2/3. With four
# choices a guess has 1/4, so conductivity is (2/3 − 1/4) / (1 − 1/4) = .56.
def _transfer(predictions: Predictions, correct_IL: np.ndarray) -> dict[str, Weighable]:
    languages = predictions.languages
    pivot = next((l for l, language in enumerate(languages) if language in PIVOTS), None)
    if pivot is None:
        return {}
    others = [l for l in range(len(languages)) if l != pivot]
    chance_I1 = np.array([[1 / item.num_choices] for item in predictions.items])
    whole_IK = np.repeat(correct_IL[:, [pivot]], len(others), axis=1)
    part_IK, guessed_IK = whole_IK * correct_IL[:, others], whole_IK * chance_I1
    by_name = {
        "transfer": (part_IK, whole_IK),
        # share s against chance g: (s - g) / (1 - g)
        "conductivity": (part_IK - guessed_IK, whole_IK - guessed_IK),
    }
    means = {name: MeanOverColumns(Ratio(*both)) for name, both in by_name.items()}
    return means | {
        f"{name}/{languages[l]}": Ratio(part[:, k], whole[:, k])
        for name, (part, whole) in by_name.items()
        for k, l in enumerate(others)
    }


def measure_pairs(
    predictions: Predictions,
    mode: Mode = "expectation",
    *,
    seed: int = 0,
    weights: Weights = "softmax",
) -> dict[str, float]:
    """The values of `pair_scores`."""
    even_1I = np.full((1, len(predictions.items)), 1 / max(1, len(predictions.items)))
    scores = pair_scores(predictions, mode, seed=seed, weights=weights)
    return {name: float(score.weigh(even_1I)[0]) for name, score in scores.items()}


def _divide(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """The quotient, 0 where there is nothing to divide by."""
    return np.divide(part, whole, out=np.zeros_like(part), where=whole > 1e-12)


# ---- Ranks


def rank_choices(predictions: Predictions, weights: Weights) -> tuple[np.ndarray, np.ndarray]:
    """The value of each choice by its rank (I, L, C), see `_rank_values`, and which languages have
    log-likelihoods, (I, L).

    Equal log-likelihoods are ranked in the order of the choices.
    """
    num_choices = max((item.num_choices for item in predictions.items), default=0)
    shape = len(predictions.items), len(predictions.languages)
    values_ILC, asked_IL = np.zeros((*shape, num_choices)), np.zeros(shape, bool)
    for i, item in enumerate(predictions.items):
        values_C = _rank_values(item.num_choices, weights)
        for l, language in enumerate(predictions.languages):
            if (scores := item.answers[language].scores) is not None:
                asked_IL[i, l] = True
                order_C = np.argsort(-np.asarray(scores), kind="stable")
                values_ILC[i, l, order_C] = values_C
    return values_ILC, asked_IL


def rank_weights(num_choices: int, weights: Weights = "softmax") -> np.ndarray:
    """The weight w_j of the first j choices, j = 1 … n; they sum to 1.

    From n, n - 1, … 1: their softmax, their shares ("norm1"), or the shares of their squares
    ("norm2").
    """
    if weights not in WEIGHTS:
        raise UserError(
            f"RankC weights {weights!r}: not one of {', '.join(WEIGHTS)}{hint(weights, WEIGHTS)}"
        )
    order_C = np.arange(num_choices, 0, -1.0)
    if weights == "softmax":
        # less the largest, so that exp does not overflow
        raw_C = np.exp(order_C - num_choices)
    else:
        raw_C = order_C if weights == "norm1" else order_C**2
    return raw_C / raw_C.sum()


@lru_cache(maxsize=256)
def _rank_values(num_choices: int, weights: Weights) -> np.ndarray:
    """What a choice that both languages rank at r or better adds to RankC: Σ_{j ≥ r} w_j / j."""
    shares_C = rank_weights(num_choices, weights) / np.arange(1, num_choices + 1)
    return shares_C[::-1].cumsum()[::-1]


def _random_rankc(num_choices: int, weights: Weights) -> float:
    """The expected RankC with a ranking at random: of the first j choices, j / n are shared."""
    return float(rank_weights(num_choices, weights) @ np.arange(1, num_choices + 1) / num_choices)


def _take(p_IPC: np.ndarray, choice_IP: np.ndarray) -> np.ndarray:
    return np.take_along_axis(p_IPC, choice_IP[:, :, None], axis=2)[:, :, 0]
