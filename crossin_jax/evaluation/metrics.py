"""Accuracy, consistency and AC3 of answers to a parallel benchmark, with coins as probabilities (SeaEval v0.1).

An answer in which SeaEval finds no single choice is decided by a coin there. Three modes say what it is here:

- "expectation": each candidate has probability 1 / number of candidates, coins of different languages are independent,
  and every score is exact: P(all of s languages agree) = sum over choices of the product of their probabilities.
- "seaeval": the coin is tossed, as a hash of (seed, item id, language).
- "strict": the answer is none: wrong, and in agreement with nothing.

Axes in names: I items, L languages, C choices, S sizes of language sets (2 to L), R resamples.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import accumulate
from typing import Literal

import numpy as np

from crossin_jax.config import UserError, hint
from crossin_jax.evaluation.predictions import Predictions

Mode = Literal["expectation", "seaeval", "strict"]
MODES: tuple[Mode, ...] = ("expectation", "seaeval", "strict")
EPSILON = 1e-10  # SeaEval's guard against 0 / 0


@dataclass(frozen=True, slots=True)
class Level:
    """The four scores: shares from 0 to 1; consistency and AC3 by the number of languages s, from 2 to all."""

    accuracy: float
    language_accuracy: dict[str, float]
    consistency: dict[int, float]
    ac3: dict[int, float]

    def flatten(self) -> dict[str, float]:
        """All scores under one name each: accuracy, accuracy/LANGUAGE, consistency_s, AC3_s."""
        return ({"accuracy": self.accuracy} | {f"accuracy/{name}": v for name, v in self.language_accuracy.items()}
                | {f"consistency_{s}": v for s, v in self.consistency.items()}
                | {f"AC3_{s}": v for s, v in self.ac3.items()})


@dataclass(frozen=True, slots=True)
class Scores(Level):
    """Scores of one run on one benchmark; see `evaluate`.

    combinations: consistency of every set of s languages. least, most (expectation only): what no outcome of the coins
    goes below or above; reached by some outcome for accuracy and for consistency, but AC3's may need two different
    ones. coin_sd (expectation only): exact standard deviation over the coins of accuracy and each consistency_s.
    coin_share: by language and reason (tie, empty, unreadable), the share of answers that a coin decides.
    """

    benchmark: str
    mode: Mode
    num_items: int
    combinations: dict[int, dict[tuple[str, ...], float]] = field(repr=False)
    coin_share: dict[str, dict[str, float]]
    least: Level | None = None
    most: Level | None = None
    coin_sd: dict[str, float] = field(default_factory=dict)


def ac3(accuracy: float, consistency: float) -> float:
    """Harmonic mean of accuracy and consistency, operation by operation as SeaEval computes it."""
    return 2 * consistency * accuracy / (consistency + accuracy + EPSILON)


def evaluate(predictions: Predictions, mode: Mode = "expectation", *, seed: int = 0) -> Scores:
    """Scores of a run, averaged as SeaEval does: over items, then over languages, or over all sets of s languages.

    Consistency compares the positions (letters) of the choices. AC3_s in expectation mode is AC3 of the expected
    accuracy and the expected consistency_s; as AC3 is not linear, the mean of AC3 over tosses (`toss`) differs from it,
    by less than 1e-3 on SeaEval's own logs. Where no answer needs a coin the modes agree and every number equals
    SeaEval's in its last digit. `seed` tosses the coins of mode "seaeval". Raises UserError for an unknown mode or no
    items.
    """
    p_ILC = choice_probabilities(predictions, mode, seed)
    languages, num_items = predictions.languages, len(p_ILC)
    correct_IL = _gold_probabilities(predictions, p_ILC)
    combinations = {s: {names: float(total) / num_items for names, total in sets.items()}
                    for s, sets in _agreement(p_ILC, languages).items()}
    level = _level(languages, correct_IL.sum(0) / num_items,
                   {s: _mean(list(sets.values())) for s, sets in combinations.items()})
    least = most = None
    coin_sd: dict[str, float] = {}
    if mode == "expectation":
        least, most, coin_sd = _coin_range(predictions, correct_IL, level)
    return Scores(level.accuracy, level.language_accuracy, level.consistency, level.ac3, predictions.benchmark, mode,
                  num_items, combinations, _coin_share(predictions), least, most, coin_sd)


def choice_probabilities(predictions: Predictions, mode: Mode = "expectation", seed: int = 0) -> np.ndarray:
    """The probability of each choice (I, L, C) float64: rows sum to 1, or to 0 where strict mode sees no answer."""
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
    digest = hashlib.blake2b(f"{seed}\0{item}\0{language}".encode(errors="surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") * sides >> 64


def _gold_probabilities(predictions: Predictions, p_ILC: np.ndarray) -> np.ndarray:
    gold_IL = np.array([[item.gold[language] for language in predictions.languages] for item in predictions.items])
    return np.take_along_axis(p_ILC, gold_IL[:, :, None], axis=2)[:, :, 0]


def _agreement(p_ILC: np.ndarray, languages: Sequence[str]) -> dict[int, dict[tuple[str, ...], float]]:
    """Expected number of items on which a set of languages agrees, in the order of itertools.combinations."""
    counts: dict[int, dict[tuple[str, ...], float]] = {s: {} for s in range(2, len(languages) + 1)}

    def extend(names: tuple[str, ...], product_IC: np.ndarray, start: int) -> None:
        if len(names) > 1:
            counts[len(names)][names] = product_IC.sum()
        for l in range(start, len(languages)):
            extend((*names, languages[l]), product_IC * p_ILC[:, l], l + 1)

    extend((), np.ones_like(p_ILC[:, 0]), 0)
    return counts


def _mean(values: Sequence[float]) -> float:
    """Summed from left to right, as SeaEval's scores were: Python 3.12's `sum` rounds otherwise in the last digit."""
    return list(accumulate(values))[-1] / len(values)


def _level(languages: Sequence[str], accuracy_L: np.ndarray, consistency: dict[int, float]) -> Level:
    by_language = dict(zip(languages, map(float, accuracy_L), strict=True))
    accuracy = _mean(list(by_language.values()))
    return Level(accuracy, by_language, consistency, {s: ac3(accuracy, value) for s, value in consistency.items()})


def _coin_share(predictions: Predictions) -> dict[str, dict[str, float]]:
    shares: dict[str, dict[str, float]] = {}
    for language in predictions.languages:
        reasons = [answer.reason for item in predictions.items
                   if len((answer := item.answers[language]).candidates) > 1]
        shares[language] = {reason: reasons.count(reason) / len(predictions.items)
                            for reason in dict.fromkeys(("tie", "empty", "unreadable", *reasons))}
    return shares


# --- one item under its coins: how many languages pick each choice decides its consistency for every s -------------


def _set_shares(counts: Sequence[int], num_languages: int) -> tuple[float, ...]:
    """For s = 2, 3, …: the share of sets of s languages that agree, when counts[c] languages pick choice c."""
    return tuple(sum(math.comb(n, s) for n in counts) / math.comb(num_languages, s)
                 for s in range(2, num_languages + 1))


@lru_cache(maxsize=1 << 16)
def _item_range(counts: tuple[int, ...], coins: tuple[tuple[int, ...], ...],
                num_languages: int) -> tuple[tuple[float, ...], ...]:
    """(least, most, variance) by s over all outcomes of an item's coins, beside its certain answers' counts.

    Coins are ordered by their number of candidates: once only coins over all choices are left, which choice has which
    count no longer matters, and outcomes are kept sorted. So ten choices in twelve languages take milliseconds.
    """
    outcomes = {counts: 1.0}
    for candidates in coins:
        longer: dict[tuple[int, ...], float] = {}
        for state, p in outcomes.items():
            for c in candidates:
                after = (*state[:c], state[c] + 1, *state[c + 1:])
                if len(candidates) == len(counts):
                    after = tuple(sorted(after))
                longer[after] = longer.get(after, 0.0) + p / len(candidates)
        outcomes = longer
    shares_OS = np.array([_set_shares(state, num_languages) for state in outcomes]).reshape(len(outcomes), -1)
    p_O = np.array(list(outcomes.values()))
    variance_S = p_O @ (shares_OS - p_O @ shares_OS) ** 2
    return tuple(shares_OS.min(0)), tuple(shares_OS.max(0)), tuple(variance_S)


def _coin_range(predictions: Predictions, correct_IL: np.ndarray,
                expected: Level) -> tuple[Level, Level, dict[str, float]]:
    """What the coins can make of a run: least, most, and standard deviations."""
    languages, (num_items, num_languages) = predictions.languages, correct_IL.shape
    sizes = range(2, num_languages + 1)
    if all(len(answer.candidates) == 1 for item in predictions.items for answer in item.answers.values()):
        return expected, expected, dict.fromkeys(("accuracy", *(f"consistency_{s}" for s in sizes)), 0.0)
    ranges = []
    for item in predictions.items:
        counts, coins = [0] * item.num_choices, []
        for language in languages:
            candidates = item.answers[language].candidates
            if len(candidates) == 1:
                counts[candidates[0]] += 1
            else:
                coins.append(candidates)
        ranges.append(_item_range(tuple(counts), tuple(sorted(coins, key=lambda c: (len(c), c))), num_languages))
    sums_3S = np.array(ranges).sum(0)  # least, most, variance
    accuracies_2L = [(correct_IL == 1).sum(0) / num_items, (correct_IL > 0).sum(0) / num_items]
    least, most = (_level(languages, accuracy_L, {s: bound(float(total) / num_items, expected.consistency[s])
                                                  for s, total in zip(sizes, sums_S, strict=True)})
                   for bound, accuracy_L, sums_S in zip((min, max), accuracies_2L, sums_3S[:2], strict=True))
    variance = float((correct_IL * (1 - correct_IL)).sum()) / (num_items * num_languages) ** 2
    return least, most, {"accuracy": math.sqrt(variance)} | {
        f"consistency_{s}": math.sqrt(float(v)) / num_items for s, v in zip(sizes, sums_3S[2], strict=True)}


def item_scores(predictions: Predictions, mode: Mode = "expectation", *, seed: int = 0) -> dict[str, np.ndarray]:
    """The (expected) score of every item: accuracy, accuracy/LANGUAGE, consistency_s; each (I,) float64.

    Their means over items are the scores of `evaluate` up to rounding.
    """
    p_ILC = choice_probabilities(predictions, mode, seed)
    correct_IL = _gold_probabilities(predictions, p_ILC)
    scores = {"accuracy": correct_IL.mean(1)}
    scores |= {f"accuracy/{language}": correct_IL[:, l] for l, language in enumerate(predictions.languages)}
    num_languages = p_ILC.shape[1]
    # elementary symmetric polynomials: sums over all sets of s languages without listing them
    sums_SIC = [np.ones_like(p_ILC[:, 0]), *(np.zeros_like(p_ILC[:, 0]) for _ in range(num_languages))]
    for l in range(num_languages):
        for s in range(l + 1, 0, -1):
            sums_SIC[s] = sums_SIC[s] + sums_SIC[s - 1] * p_ILC[:, l]
    return scores | {f"consistency_{s}": sums_SIC[s].sum(1) / math.comb(num_languages, s)
                     for s in range(2, num_languages + 1)}


def toss(predictions: Predictions, num_tosses: int = 1000, *, seed: int = 0) -> dict[str, np.ndarray]:
    """Scores of `num_tosses` re-scorings with fresh coins, as SeaEval's would scatter; each (num_tosses,) float64.

    Holds accuracy, consistency_s and AC3_s; the mean of an AC3 here is its expectation proper.
    """
    p_ILC = choice_probabilities(predictions)
    rng = np.random.default_rng(seed)
    num_items, num_languages, num_choices = p_ILC.shape
    gold_IL = np.array([[item.gold[language] for language in predictions.languages] for item in predictions.items])
    share = np.array([_set_shares([n], num_languages) for n in range(num_languages + 1)])  # of n that agree, by s
    edges_ILC = p_ILC.cumsum(2)[:, :, :-1]
    accuracy, consistency = np.empty(num_tosses), np.empty((num_tosses, num_languages - 1))
    for r in range(num_tosses):
        choice_IL = (rng.random((num_items, num_languages, 1)) >= edges_ILC).sum(2)
        accuracy[r] = (choice_IL == gold_IL).mean()
        counts_IC = (choice_IL[:, :, None] == np.arange(num_choices)).sum(1)
        consistency[r] = share[counts_IC].sum((0, 1)) / num_items
    scores = {"accuracy": accuracy}
    scores |= {f"consistency_{s}": consistency[:, s - 2] for s in range(2, num_languages + 1)}
    return scores | {f"AC3_{s}": ac3(accuracy, consistency[:, s - 2]) for s in range(2, num_languages + 1)}


def pair_agreement(predictions: Predictions, mode: Mode = "expectation", *, seed: int = 0) -> np.ndarray:
    """Share of items on which two languages pick the same choice, (L, L) float64 with ones on the diagonal."""
    p_ILC = choice_probabilities(predictions, mode, seed)
    share_LL = np.einsum("ilc,imc->lm", p_ILC, p_ILC) / len(p_ILC)
    np.fill_diagonal(share_LL, 1)
    return share_LL
