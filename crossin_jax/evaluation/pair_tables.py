"""Measures of language pairs with their intervals, and changes against another arm: one table each.

Shape letters: I items · L languages · C choices · P pairs of languages · R resamples · S seeds.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from crossin_jax.evaluation.metrics import Mode
from crossin_jax.evaluation.pairs import LanguagePairs, Weights
from crossin_jax.evaluation.predictions import Predictions
from crossin_jax.evaluation.stats import intervals, paired_changes, weigh_items

# Up to this number of languages every pair has an interval and a test: 60 languages make 1,770
# pairs, 200 make 19,900.
MAX_TESTED = 60
Matrix = list[list[float]]
# Of each field, what a language has beside itself
DIAGONAL = {"value": 1.0, "low": 1.0, "high": 1.0, "difference": 0.0, "p": 1.0}
# Answers by seed, one for each prompt
BySeed = dict[int, list[Predictions]]


@dataclass(frozen=True, slots=True)
class PairTable:
    """A measure of every two languages: row and column in the order of the block's languages.

    `low` and `high`: 95 % interval over items. `difference` and `p`: against the first arm, by a
    paired bootstrap; None in the first arm. Above MAX_TESTED languages, `low`, `high` and `p` are
    None.
    """

    value: Matrix
    low: Matrix | None
    high: Matrix | None
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
    tables, is_tested = {}, first.p_ILC.shape[1] <= MAX_TESTED
    for name in _common_measures(arm):
        sides = arm, other if other and name in _common_measures(other) else {}
        columns = [
            _estimate(*(_sample(side, name, chunk, is_tested) for side in sides))
            for chunk in first.chunks()
        ]
        tables[name] = PairTable(
            **{
                field: _matrix(first, np.concatenate([c[field] for c in columns]), DIAGONAL[field])
                if columns[0][field] is not None
                else None
                for field in DIAGONAL
            }
        )
    return tables


def _open(seeds: BySeed, mode: Mode, weights: Weights) -> dict[int, list[LanguagePairs]]:
    return {
        seed: [LanguagePairs(p, mode, seed=seed, weights=weights) for p in several]
        for seed, several in seeds.items()
    }


def _common_measures(side: dict[int, list[LanguagePairs]]) -> Sequence[str]:
    everything = [pairs.measures for several in side.values() for pairs in several]
    return [name for name in everything[0] if all(name in names for names in everything)]


def _sample(
    side: dict[int, list[LanguagePairs]], name: str, chunk: slice, is_tested: bool
) -> dict[int, np.ndarray]:
    """By seed the value of each pair and, if tested, those on the resamples, (1 + R, P)."""
    samples = {}
    for seed, several in side.items():
        weights_1RI = weigh_items(len(several[0].p_ILC), seed)[: None if is_tested else 1]
        prompts = [pairs.measure(name, chunk).weigh(weights_1RI) for pairs in several]
        samples[seed] = prompts[0] if len(prompts) == 1 else np.median(prompts, axis=0)
    return samples


def _estimate(
    samples: dict[int, np.ndarray], base: dict[int, np.ndarray]
) -> dict[str, np.ndarray | None]:
    """The fields of a table, each (P,)."""
    mean_1RP = np.mean(list(samples.values()), axis=0)
    fields = dict.fromkeys(DIAGONAL) | {"value": mean_1RP[0]}
    common = [seed for seed in samples if seed in base]
    if common:
        fields["difference"] = np.mean([samples[s][0] - base[s][0] for s in common], axis=0)
    if len(mean_1RP) > 1:
        fields["low"], fields["high"] = intervals(mean_1RP[1:])
        if changes := paired_changes(samples, base):
            fields["difference"], fields["p"] = changes[0], changes[3]
    return fields


def _matrix(pairs: LanguagePairs, values_P: np.ndarray, diagonal: float) -> Matrix:
    """The values of pairs as a symmetric matrix."""
    num_languages = pairs.p_ILC.shape[1]
    matrix_LL = np.full((num_languages, num_languages), diagonal)
    matrix_LL[pairs.first_P, pairs.second_P] = values_P
    matrix_LL[pairs.second_P, pairs.first_P] = values_P
    return matrix_LL.tolist()
