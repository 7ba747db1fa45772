"""How far scores can be trusted: intervals over items, and paired tests.

Shape letters: I items · R resamples · S seeds · K scores, or any columns. An axis "1R" has the
score itself and then that of every resample.

Every interval comes from one bootstrap. A resample draws as many items as there are, with
replacement; the score of a resample is the weighted mean of the items' scores:

    items                 i1    i2    i3    i4
    scores of items       1     0     1     .5        score      0.625
    weights of resample   2/4   0     1/4   1/4       resample   0.875

All languages of an item are drawn together, because their answers depend on each other.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from statistics import NormalDist

import numpy as np

from crossin_jax.config import UserError
from crossin_jax.evaluation.metrics import Mode, ac3, item_scores
from crossin_jax.evaluation.pairs import Weighable
from crossin_jax.evaluation.predictions import Predictions

NUM_RESAMPLES = 2000
LEVEL = 0.95
SMALL = 50  # items below which intervals are widened
# By name, the scores of the items (I,), whose mean is the score, or what weighs items itself
ItemScores = Mapping[str, np.ndarray | Weighable]


@dataclass(frozen=True, slots=True)
class Change:
    """A score minus the first arm's, with its 95 % interval and two-sided p value.

    Both have the same seeds and items.

    `clear`: p < 0.05, and the same sign in every seed.
    """

    difference: float
    low: float
    high: float
    p: float
    clear: bool


def bootstrap(
    predictions: Predictions,
    mode: Mode = "expectation",
    *,
    level: float = LEVEL,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
    scores: Callable[..., ItemScores] = item_scores,
) -> dict[str, tuple[float, float]]:
    """Percentile intervals of every score over resampled items; `scores` gives those of the items.

    They say how the (expected) scores would vary with other items. Coins are not tossed again for
    each resample; mode "seaeval" tosses them once, with this seed.
    """
    drawn = resample(
        [predictions],
        lambda predictions: scores(predictions, mode, seed=seed),
        seed=seed,
        num_resamples=num_resamples,
    )
    return {name: interval(values_1R[1:], level) for name, values_1R in drawn.items()}


def resample(
    several: Sequence[Predictions],
    score_items: Callable[[Predictions], ItemScores],
    *,
    seed: int,
    num_resamples: int = NUM_RESAMPLES,
) -> dict[str, np.ndarray]:
    """By score (1 + R,): the value, then the value of each resample; medians over several prompts.

    The drawn items depend on their number and the seed alone, so that arms are compared on the same
    ones. `score_items` gives the scores of the items.
    """
    weights_1RI = weigh_items(len(several[0].items), seed, num_resamples)
    weighed = [weigh_scores(score_items(predictions), weights_1RI) for predictions in several]
    return {name: np.median([scores[name] for scores in weighed], axis=0) for name in weighed[0]}


@lru_cache(maxsize=16)
def weigh_items(num_items: int, seed: int, num_resamples: int = NUM_RESAMPLES) -> np.ndarray:
    """The weights (1 + R, I) of items: all alike, then those of every resample."""
    even_1I = np.full((1, num_items), 1 / num_items)
    return np.concatenate([even_1I, resample_weights(num_items, num_resamples, seed)])


def interval(values_R: np.ndarray, level: float = LEVEL) -> tuple[float, float]:
    """The middle part of resampled values that holds a share `level` of them."""
    low, high = intervals(values_R[:, None], level)
    return float(low[0]), float(high[0])


def intervals(values_RK: np.ndarray, level: float = LEVEL) -> tuple[np.ndarray, np.ndarray]:
    """Low and high end (K,) of the interval of each column."""
    # numpy.quantile, four times as fast: columns are made contiguous and sorted.
    sorted_KR = np.sort(np.ascontiguousarray(values_RK.T), axis=1)
    ends = []
    for share in ((1 - level) / 2, (1 + level) / 2):
        place = share * (sorted_KR.shape[1] - 1)
        below = min(int(place), max(0, sorted_KR.shape[1] - 2))
        left_K, right_K = sorted_KR[:, below], sorted_KR[:, min(below + 1, sorted_KR.shape[1] - 1)]
        ends.append(left_K + (right_K - left_K) * (place - below))
    return ends[0], ends[1]


def wilson(share: float, count: int, level: float = LEVEL) -> tuple[float, float]:
    """Wilson's score interval of a proportion among `count`; source: E. B. Wilson, JASA 22 (1927).

    Example: 0 of 4 gives (0, 0.49).
    """
    z = NormalDist().inv_cdf((1 + level) / 2)
    center = share + z * z / (2 * count)
    spread = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    low, high = ((center + side * spread) / (1 + z * z / count) for side in (-1, 1))
    return max(0.0, low), min(1.0, high)


def paired_change(
    samples: dict[int, np.ndarray], base: dict[int, np.ndarray], level: float = LEVEL
) -> Change | None:
    """The difference of an arm from the base, by their values (1 + R,) for each seed.

    None without a common seed.
    """
    one, other = ({seed: v[:, None] for seed, v in side.items()} for side in (samples, base))
    changes = paired_changes(one, other, level)
    if changes is None:
        return None
    difference, low, high, p, is_clear = (array[0].item() for array in changes)
    return Change(difference, low, high, p, is_clear)


# With 1999 resamples, of which 30 have a difference of zero or less and 1970 one of zero or more: p
# = 2 · (1 + 30) / 2000 = .031. Both arms are weighed by the same resample, so that an item which
# both find hard moves both scores, and not their difference.
def paired_changes(
    samples: dict[int, np.ndarray], base: dict[int, np.ndarray], level: float = LEVEL
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray] | None:
    """The fields of a `Change`, each (K,), by values (1 + R, K) for each seed.

    A paired bootstrap over items, averaged over seeds. p is twice the smaller share of resamples on
    either side of zero. Resamples at zero count on both sides, and one is added to each count, so
    that p is never 0.
    """
    common = [seed for seed in samples if seed in base]
    if not common:
        return None
    delta_S1RK = np.array([samples[seed] - base[seed] for seed in common])
    mean_1RK = delta_S1RK.mean(0)
    # A rounding error is not a difference. The mean is treated again: two seeds may cancel.
    for deltas in (delta_S1RK, mean_1RK):
        deltas[np.abs(deltas) < 1e-12] = 0
    observed_K, delta_RK = mean_1RK[0], mean_1RK[1:]
    side_K = 1 + np.minimum((delta_RK <= 0).sum(0), (delta_RK >= 0).sum(0))
    p_K = np.minimum(1.0, 2 * side_K / (len(delta_RK) + 1))
    first_SK = delta_S1RK[:, 0]
    have_same_sign_K = (first_SK > 0).all(0) | (first_SK < 0).all(0)
    return (observed_K, *intervals(delta_RK, level), p_K, (p_K < 1 - level) & have_same_sign_K)


def resample_weights(num_items: int, num_resamples: int, seed: int) -> np.ndarray:
    """Weights (R, I) of the items in each resample; rows sum to 1."""
    rng = np.random.default_rng(seed)
    return (
        rng.multinomial(num_items, np.full(num_items, 1 / num_items), size=num_resamples)
        / num_items
    )


def weigh_scores(scores: ItemScores, weights_RI: np.ndarray) -> dict[str, np.ndarray]:
    """Weighted means of item scores, and AC3 of these; each (R,)."""
    items = {name: score for name, score in scores.items() if isinstance(score, np.ndarray)}
    means = {}
    if items:
        means = dict(zip(items, (weights_RI @ np.stack(list(items.values()), 1)).T, strict=True))
    more = {
        f"AC3_{name.removeprefix('consistency_')}": ac3(means["accuracy"], value)
        for name, value in means.items()
        if name.startswith("consistency_")
    }
    return means | more | {n: s.weigh(weights_RI) for n, s in scores.items() if n not in items}


def in_order_of(first: Predictions, second: Predictions) -> Predictions:
    """The second run in the first one's order of items and languages; UserError if they differ."""
    place = f"comparing {first.benchmark!r} with {second.benchmark!r}"
    if set(first.languages) != set(second.languages):
        raise UserError(
            f"{place}: languages {', '.join(first.languages)} against "
            f"{', '.join(second.languages)}; evaluate both runs in the same languages"
        )
    by_id = {item.id: item for item in second.items}
    if len(by_id) != len(second.items) or len({item.id for item in first.items}) != len(
        first.items
    ):
        raise UserError(f"{place}: item ids repeat; a paired comparison needs unique ids")
    if other := set(by_id) ^ {item.id for item in first.items}:
        raise UserError(
            f"{place}: {len(other)} items are in one run only, such as {min(other)!r}; "
            "evaluate both on the same benchmark with the same limit"
        )
    for item in first.items:
        if by_id[item.id].num_choices != item.num_choices or any(
            by_id[item.id].gold.get(code) != gold for code, gold in item.gold.items()
        ):
            raise UserError(
                f"{place}: item {item.id!r} has another gold choice; "
                "the two runs saw different benchmarks"
            )
    return replace(
        second, languages=first.languages, items=tuple(by_id[item.id] for item in first.items)
    )


def restrict(predictions: Predictions, tag: str) -> Predictions:
    """The run on the items with this tag alone; UserError if no item has it."""
    items = tuple(item for item in predictions.items if tag in item.tags)
    if not items:
        tags = sorted({t for item in predictions.items for t in item.tags})
        raise UserError(
            f"benchmark {predictions.benchmark!r}: no item has the tag {tag!r}; "
            f"tags in use: {', '.join(tags) or 'none'}"
        )
    return replace(predictions, items=items)
