"""Measures of language pairs with their intervals, and changes against another arm: one table each.

Shape letters: I items · L languages · C choices · P pairs of languages · R resamples · S seeds.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from crossin_jax.evaluation.metrics import Mode
from crossin_jax.evaluation.pairs import LanguagePairs, Weights
from crossin_jax.evaluation.predictions import Predictions
from crossin_jax.evaluation.stats import intervals, paired_changes, weigh_items

Matrix = list[list[float]]
# Answers by seed, one for each prompt
BySeed = dict[int, list[Predictions]]


@dataclass(frozen=True, slots=True)
class PairTable:
    """A measure of every two languages: row and column in the order of the block's languages.

    `low` and `high`: 95 % interval over items. `difference` and `p`: against the first arm, by a
    paired bootstrap; None in the first arm.
    """

    value: Matrix
    low: Matrix
    high: Matrix
    difference: Matrix | None = None
    p: Matrix | None = None


def tabulate_pairs(
    seeds: BySeed,
    base: BySeed | None = None,
    mode: Mode = "expectation",
    *,
    weights: Weights = "softmax",
) -> dict[str, PairTable]:
    """By measure (rankc, agreement, agreement_right) the table of an arm, and its change from the
    base, whose items are in the same order.

    A value is the median over prompts, then the mean over seeds, as with every other score.
    """
    arm, other = (_open(side, mode, weights) for side in (seeds, base or {}))
    first = next(iter(arm.values()))[0]
    if not len(first.first_P):
        return {}
    tables = {}
    for name in _common_measures(arm):
        has_base = bool(other) and name in _common_measures(other)
        columns = [
            _estimate(_sample(arm, name, chunk), _sample(other, name, chunk) if has_base else {})
            for chunk in first.chunks()
        ]
        fields = [np.concatenate(parts) for parts in zip(*columns, strict=True)]
        tables[name] = PairTable(*_matrices(first, fields))
    return tables


def _open(seeds: BySeed, mode: Mode, weights: Weights) -> dict[int, list[LanguagePairs]]:
    return {
        seed: [LanguagePairs(p, mode, seed=seed, weights=weights) for p in several]
        for seed, several in seeds.items()
    }


def _common_measures(side: dict[int, list[LanguagePairs]]) -> Sequence[str]:
    everything = [pairs.measures for several in side.values() for pairs in several]
    return [name for name in everything[0] if all(name in names for names in everything)]


def _sample(side: dict[int, list[LanguagePairs]], name: str, chunk: slice) -> dict[int, np.ndarray]:
    """By seed the value of each pair and those on the resamples, (1 + R, P)."""
    samples = {}
    for seed, several in side.items():
        weights_1RI = weigh_items(len(several[0].p_ILC), seed)
        prompts = [pairs.measure(name, chunk).weigh(weights_1RI) for pairs in several]
        samples[seed] = prompts[0] if len(prompts) == 1 else np.median(prompts, axis=0)
    return samples


def _estimate(samples: dict[int, np.ndarray], base: dict[int, np.ndarray]) -> list[np.ndarray]:
    """value, low, high and, beside a base with a common seed, difference and p; each (P,)."""
    mean_1RP = np.mean(list(samples.values()), axis=0)
    fields = [mean_1RP[0], *intervals(mean_1RP[1:])]
    if changes := paired_changes(samples, base):
        difference_P, _, _, p_P, _ = changes
        fields += [difference_P, p_P]
    return fields


def _matrices(pairs: LanguagePairs, fields: Sequence[np.ndarray]) -> Iterator[Matrix]:
    """Each field (P,) as a symmetric matrix; a language agrees with itself and does not change."""
    num_languages = pairs.p_ILC.shape[1]
    for values_P, diagonal in zip(fields, (1.0, 1.0, 1.0, 0.0, 1.0), strict=False):
        matrix_LL = np.full((num_languages, num_languages), diagonal)
        matrix_LL[pairs.first_P, pairs.second_P] = values_P
        matrix_LL[pairs.second_P, pairs.first_P] = values_P
        yield matrix_LL.tolist()
