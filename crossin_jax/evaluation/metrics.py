"""Accuracy, consistency and AC3 of answers to a parallel benchmark, as in SeaEval v0.1.

If SeaEval finds no single choice in an answer, it tosses a coin between the candidates. Here the
mode says what happens:

- "expectation": each candidate has the probability 1 / number of candidates, and the coins of
  different languages are independent. Every score is exact: the probability that s languages agree
  is the sum over choices of the product of their probabilities.
- "seaeval": the coin is tossed; the outcome is a hash of (seed, item id, language).
- "strict": there is no answer: it is wrong, and it agrees with nothing.

Example: English answers A, Chinese A or B. In expectation they agree with probability 1/2.

Shape letters: I items · L languages · C choices · S sizes of language sets (2 to L).
"""

import hashlib
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import accumulate, combinations_with_replacement
from typing import Literal

import numpy as np

from crossin_jax.config import UserError, hint
from crossin_jax.evaluation.predictions import Predictions

Mode = Literal["expectation", "seaeval", "strict"]
MODES: tuple[Mode, ...] = ("expectation", "seaeval", "strict")
# Up to this number of languages their sets are listed: 12 languages have 4,083 sets, 30 a billion.
MAX_LISTED = 12
# SeaEval's guard against 0 / 0
EPSILON = 1e-10


@dataclass(frozen=True, slots=True)
class FourScores:
    """The four scores, from 0 to 1; consistency and AC3 by the number of languages s, 2 to all."""

    accuracy: float
    language_accuracy: dict[str, float]
    consistency: dict[int, float]
    ac3: dict[int, float]

    def flatten(self) -> dict[str, float]:
        """All scores under one name each: accuracy, accuracy/LANGUAGE, consistency_s, AC3_s."""
        return (
            {"accuracy": self.accuracy}
            | {f"accuracy/{name}": v for name, v in self.language_accuracy.items()}
            | {f"consistency_{s}": v for s, v in self.consistency.items()}
            | {f"AC3_{s}": v for s, v in self.ac3.items()}
        )


@dataclass(frozen=True, slots=True)
class Scores(FourScores):
    """Scores of one run on one benchmark; see `evaluate`.

    combinations: consistency of every set of s languages; empty above MAX_LISTED languages.
    coin_share: the share of answers that a coin decides, by language and reason (tie, empty,
    unreadable).
    least, most (expectation only): bounds over all outcomes of the coins. For accuracy and for
    consistency some outcome reaches them; those of AC3 may need two different outcomes.
    coin_sd (expectation only): exact standard deviations of accuracy and each consistency_s.
    """

    benchmark: str
    mode: Mode
    num_items: int
    combinations: dict[int, dict[tuple[str, ...], float]] = field(repr=False)
    coin_share: dict[str, dict[str, float]]
    least: FourScores | None = None
    most: FourScores | None = None
    coin_sd: dict[str, float] = field(default_factory=dict)


# Accuracy .8 and consistency .5 give .615. A model that is always wrong in the same way has
# consistency 1 and accuracy 0, and AC3 is 0.
def ac3(accuracy: float, consistency: float) -> float:
    """Harmonic mean of accuracy and consistency, operation by operation as SeaEval computes it."""
    return 2 * consistency * accuracy / (consistency + accuracy + EPSILON)


def evaluate(predictions: Predictions, mode: Mode = "expectation", *, seed: int = 0) -> Scores:
    """Scores of a run, averaged as SeaEval does: over items, then over languages or language sets.

    Consistency compares the positions (letters) of the choices. In expectation mode, AC3_s is AC3
    of the expected accuracy and the expected consistency_s. AC3 is not linear, so its mean over
    many tosses differs, by less than 1e-3 on SeaEval's own logs. If no answer needs a coin, the
    modes agree and every number equals SeaEval's to the last digit. `seed` tosses the coins of
    mode "seaeval". Raises UserError for an unknown mode or no items.
    """
    p_ILC = choice_probabilities(predictions, mode, seed)
    languages, num_items = predictions.languages, len(p_ILC)
    correct_IL = gold_probabilities(predictions, p_ILC)[1]
    combinations: dict[int, dict[tuple[str, ...], float]] = {}
    if len(languages) <= MAX_LISTED:
        combinations = {
            s: {names: float(total) / num_items for names, total in sets.items()}
            for s, sets in _agreement(p_ILC, languages).items()
        }
        consistency = {s: _mean(list(sets.values())) for s, sets in combinations.items()}
    else:
        consistency = {s: float(share_I.mean()) for s, share_I in _share_of_sets(p_ILC).items()}
    level = _four_scores(languages, correct_IL.sum(0) / num_items, consistency)
    least = most = None
    coin_sd: dict[str, float] = {}
    if mode == "expectation":
        least, most, coin_sd = _coin_range(predictions, correct_IL, level)
    return Scores(
        level.accuracy,
        level.language_accuracy,
        level.consistency,
        level.ac3,
        predictions.benchmark,
        mode,
        num_items,
        combinations,
        _coin_share(predictions),
        least,
        most,
        coin_sd,
    )


def choice_probabilities(
    predictions: Predictions, mode: Mode = "expectation", seed: int = 0
) -> np.ndarray:
    """The probability of each choice (I, L, C) float64; the sum is 1, or 0 for "no answer"."""
    if mode not in MODES:
        raise UserError(f"mode={mode!r} is not one of {', '.join(MODES)}{hint(mode, MODES)}")
    if not predictions.items:
        raise UserError(f"benchmark {predictions.benchmark!r} has no items to score")
    num_choices = max(item.num_choices for item in predictions.items)
    p_ILC = np.zeros((len(predictions.items), len(predictions.languages), num_choices))
    for i, item in enumerate(predictions.items):
        for l, language in enumerate(predictions.languages):
            candidates = item.answers[language].candidates
            if len(candidates) == 1:
                p_ILC[i, l, candidates[0]] = 1
            elif mode == "expectation":
                p_ILC[i, l, list(candidates)] = 1 / len(candidates)
            elif mode == "seaeval":
                p_ILC[i, l, candidates[_coin(seed, item.id, language, len(candidates))]] = 1
    return p_ILC


def _coin(seed: int, item: str, language: str, sides: int) -> int:
    digest = hashlib.blake2b(
        f"{seed}\0{item}\0{language}".encode(errors="surrogatepass"), digest_size=8
    ).digest()
    return int.from_bytes(digest, "big") * sides >> 64


def gold_probabilities(
    predictions: Predictions, p_ILC: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The gold choice of every item and language, (I, L) int, and its probability, (I, L)."""
    gold_IL = np.array(
        [[item.gold[language] for language in predictions.languages] for item in predictions.items]
    )
    return gold_IL, np.take_along_axis(p_ILC, gold_IL[:, :, None], axis=2)[:, :, 0]


# English answers A, Vietnamese B, and Chinese A or B. The chances that two agree are en-zh .5,
# en-vi 0 and zh-vi .5, so consistency_2 of this item is their mean, 1/3: exact, and no coin is
# tossed.
def _agreement(
    p_ILC: np.ndarray, languages: Sequence[str]
) -> dict[int, dict[tuple[str, ...], float]]:
    """Expected number of items on which a set of languages agrees.

    Sets are in the order of itertools.combinations, as SeaEval adds them up.
    """
    counts: dict[int, dict[tuple[str, ...], float]] = {s: {} for s in range(2, len(languages) + 1)}

    # Depth first, so that (en, zh, vi) reuses the product of (en, zh).
    def extend(names: tuple[str, ...], product_IC: np.ndarray, start: int) -> None:
        if len(names) > 1:
            counts[len(names)][names] = product_IC.sum()
        for l in range(start, len(languages)):
            extend((*names, languages[l]), product_IC * p_ILC[:, l], l + 1)

    extend((), np.ones_like(p_ILC[:, 0]), 0)
    return counts


# One choice with the probabilities 1, 1 and .5 in three languages; sums[s] after each language:
#
#     s           0    1      2    3
#     first       1    1      0    0
#     second      1    2      1    0
#     third       1    2.5    2    .5      2 of the 3 pairs and .5 of the triple pick this choice
def _share_of_sets(p_ILC: np.ndarray) -> dict[int, np.ndarray]:
    """By s, the expected share of sets of s languages that agree on an item, (I,).

    The sets are not listed: the sum over all of them of the product of their probabilities is an
    elementary symmetric polynomial. Adding one language at a time, a set of s languages either has
    the new one or does not:
        sums[s] = sums[s] + sums[s - 1] · p_new
    """
    num_languages = p_ILC.shape[1]
    sums_SIC = np.zeros((num_languages + 1, *p_ILC[:, 0].shape))
    sums_SIC[0] = 1
    for l in range(num_languages):
        sums_SIC[1:] += sums_SIC[:-1] * p_ILC[:, l]
    return {
        s: sums_SIC[s].sum(1) / math.comb(num_languages, s) for s in range(2, num_languages + 1)
    }


def _mean(values: Sequence[float]) -> float:
    # Summed from left to right, as SeaEval did. `sum` of Python 3.12 compensates rounding errors
    # and may differ in the last digit.
    return list(accumulate(values))[-1] / len(values)


def _four_scores(
    languages: Sequence[str], accuracy_L: np.ndarray, consistency: dict[int, float]
) -> FourScores:
    by_language = dict(zip(languages, map(float, accuracy_L), strict=True))
    accuracy = _mean(list(by_language.values()))
    return FourScores(
        accuracy,
        by_language,
        consistency,
        {s: ac3(accuracy, value) for s, value in consistency.items()},
    )


def _coin_share(predictions: Predictions) -> dict[str, dict[str, float]]:
    shares: dict[str, dict[str, float]] = {}
    for language in predictions.languages:
        reasons = [
            answer.reason
            for item in predictions.items
            if len((answer := item.answers[language]).candidates) > 1
        ]
        shares[language] = {
            reason: reasons.count(reason) / len(predictions.items)
            for reason in dict.fromkeys(("tie", "empty", "unreadable", *reasons))
        }
    return shares


# ---- One item under its coins
#
# The consistency of an item depends only on how many languages pick each choice, so these counts
# are enough, and the outcomes of the coins are not listed one by one. Three languages, choices A
# and B, en and zh answer A, vi has a coin between A and B:
#
#     counts   (2, 0)  ──coin──►  (3, 0) with p = 1/2: all pairs agree,        consistency_2 = 1
#                            └──►  (2, 1) with p = 1/2: one of 3 pairs agrees,  consistency_2 = 1/3


@lru_cache(maxsize=256)
def _share_table(num_languages: int) -> np.ndarray:
    """The share of all sets of s languages that n languages make, which pick one choice; by
    n, s.
    """
    sizes = range(2, num_languages + 1)
    return np.array(
        [
            [math.comb(n, s) / math.comb(num_languages, s) for s in sizes]
            for n in range(num_languages + 1)
        ]
    ).reshape(num_languages + 1, len(sizes))


@lru_cache(maxsize=1 << 16)
def _item_range(
    counts: tuple[int, ...], coins: tuple[tuple[int, ...], ...], num_languages: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(least, most, variance) by s over all outcomes of an item's coins, each (S,).

    `counts` are those of the certain answers. The share of agreeing sets is a sum over choices of
    C(n, s), which is convex in the number n of languages that pick the choice. So it is least where
    the numbers are as even as the coins allow, for every s at once. It is most where choices take
    all the coins they can, one choice after the other, in the best order.
    """
    share = _share_table(num_languages)
    even = share[_level_out(counts, coins)].sum(0)
    # best[taken]: the most by s when these choices have taken their coins, in any order
    groups = Counter(map(frozenset, coins))
    best = {frozenset(): np.zeros(share.shape[1])}
    for _ in counts:
        longer: dict[frozenset[int], np.ndarray] = {}
        for taken, value in best.items():
            for c in set(range(len(counts))) - taken:
                won = sum(n for coin, n in groups.items() if c in coin and not taken & coin)
                after, total = taken | {c}, value + share[counts[c] + won]
                longer[after] = np.maximum(longer.get(after, total), total)
        best = longer
    (most,) = best.values()
    return even, most, _variance(counts, coins, share)


# Choices A B C with the certain counts 0 0 2, and two coins. Coin 1 (A or B) goes to A: 1 0 2. Coin
# 2 (A or C) finds A with 1 and C with 2. But coin 1 can move from A to B, which has 0. So it moves,
# and coin 2 takes its place on A: 1 1 2.
def _level_out(counts: tuple[int, ...], coins: tuple[tuple[int, ...], ...]) -> list[int]:
    """The most even numbers of languages by choice that the coins can make.

    Each coin goes to the choice with the lowest number that it can reach: one of its candidates, or
    one to which a coin on these can move.
    """
    numbers = list(counts)
    lies_on: list[int] = []  # the choice of each coin so far
    for candidates in coins:
        # The coin that moves to a choice to make room where it lay; None: the new coin itself.
        movers: dict[int, int | None] = dict.fromkeys(candidates)
        reached = list(candidates)
        for choice in reached:  # grows while it is read
            if len(reached) == len(counts):
                break
            for other, place in enumerate(lies_on):
                if place == choice:
                    further = [c for c in coins[other] if c not in movers]
                    movers |= dict.fromkeys(further, other)
                    reached += further
        choice = min(reached, key=lambda c: numbers[c])
        numbers[choice] += 1
        while (mover := movers[choice]) is not None:
            choice, lies_on[mover] = lies_on[mover], choice
        lies_on.append(choice)
    return numbers


# The item's share is a sum over choices, Σ X_c, where X_c is the share of the sets that pick c. So
# its variance is Σ Var(X_c) + 2 Σ Cov(X_c, X_d) over pairs c < d. For that, the joint distribution
# of two choices' counts is enough: a table of numbers of coins, not of all outcomes.
def _variance(
    counts: tuple[int, ...], coins: tuple[tuple[int, ...], ...], share: np.ndarray
) -> np.ndarray:
    """The variance by s of an item's share of agreeing sets, (S,): covariances of pairs of
    choices.
    """
    variance = np.zeros(share.shape[1])
    for c, d in combinations_with_replacement(range(len(counts)), 2):
        chances = [((c in coin) / len(coin), (d in coin and c != d) / len(coin)) for coin in coins]
        joint = _joint_numbers(tuple(sorted(chance for chance in chances if any(chance))))
        share_c, share_d = share[counts[c] :][: len(joint)], share[counts[d] :][: len(joint)]
        share_c = share_c - joint.sum(1) @ share_c
        if c == d:
            variance += joint.sum(1) @ share_c**2
        else:
            share_d = share_d - joint.sum(0) @ share_d
            variance += 2 * (share_c * (joint @ share_d)).sum(0)
    return np.maximum(variance, 0)


@lru_cache(maxsize=1 << 10)
def _joint_numbers(chances: tuple[tuple[float, float], ...]) -> np.ndarray:
    """[a, b]: the probability that a coins fall on one choice and b on another.

    `chances` are those of each coin for the two choices.
    """
    joint = np.zeros((len(chances) + 1, len(chances) + 1))
    joint[0, 0] = 1
    for n, (p_a, p_b) in enumerate(chances, 1):
        before = joint[:n, :n].copy()
        joint[:n, :n] *= 1 - p_a - p_b
        joint[1 : n + 1, :n] += p_a * before
        joint[:n, 1 : n + 1] += p_b * before
    return joint


def _coin_range(
    predictions: Predictions, correct_IL: np.ndarray, expected: FourScores
) -> tuple[FourScores, FourScores, dict[str, float]]:
    """What the coins can make of a run: the least, the most, and standard deviations."""
    languages, (num_items, num_languages) = predictions.languages, correct_IL.shape
    sizes = range(2, num_languages + 1)
    if all(
        len(answer.candidates) == 1
        for item in predictions.items
        for answer in item.answers.values()
    ):
        return (
            expected,
            expected,
            dict.fromkeys(("accuracy", *(f"consistency_{s}" for s in sizes)), 0.0),
        )
    ranges = []
    for item in predictions.items:
        counts, coins = [0] * item.num_choices, []
        for language in languages:
            candidates = item.answers[language].candidates
            if len(candidates) == 1:
                counts[candidates[0]] += 1
            else:
                coins.append(candidates)
        ranges.append(
            _item_range(
                tuple(counts), tuple(sorted(coins, key=lambda c: (len(c), c))), num_languages
            )
        )
    sums_3S = np.array(ranges).sum(0)  # least, most, variance
    accuracies_2L = [(correct_IL == 1).sum(0) / num_items, (correct_IL > 0).sum(0) / num_items]
    least, most = (
        _four_scores(
            languages,
            accuracy_L,
            {
                s: bound(float(total) / num_items, expected.consistency[s])
                for s, total in zip(sizes, sums_S, strict=True)
            },
        )
        for bound, accuracy_L, sums_S in zip((min, max), accuracies_2L, sums_3S[:2], strict=True)
    )
    variance = float((correct_IL * (1 - correct_IL)).sum()) / (num_items * num_languages) ** 2
    return (
        least,
        most,
        {"accuracy": math.sqrt(variance)}
        | {
            f"consistency_{s}": math.sqrt(float(v)) / num_items
            for s, v in zip(sizes, sums_3S[2], strict=True)
        },
    )


def item_scores(
    predictions: Predictions, mode: Mode = "expectation", *, seed: int = 0
) -> dict[str, np.ndarray]:
    """The (expected) scores of every item: accuracy, accuracy/LANGUAGE, consistency_s; each (I,).

    Their means over items are the scores of `evaluate`, except for rounding.
    """
    p_ILC = choice_probabilities(predictions, mode, seed)
    correct_IL = gold_probabilities(predictions, p_ILC)[1]
    scores = {"accuracy": correct_IL.mean(1)}
    scores |= {
        f"accuracy/{language}": correct_IL[:, l] for l, language in enumerate(predictions.languages)
    }
    return scores | {f"consistency_{s}": share_I for s, share_I in _share_of_sets(p_ILC).items()}


def pair_agreement(
    predictions: Predictions, mode: Mode = "expectation", *, seed: int = 0
) -> np.ndarray:
    """Share of items on which two languages pick the same choice (L, L), 1 on the diagonal."""
    p_ILC = choice_probabilities(predictions, mode, seed)
    share_LL = np.einsum("ilc,imc->lm", p_ILC, p_ILC) / len(p_ILC)
    np.fill_diagonal(share_LL, 1)
    return share_LL
