"""How far scores can be trusted: intervals over items, paired tests, spread over prompts and seeds."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from crossin_jax.config import UserError
from crossin_jax.evaluation.metrics import Level, Mode, ac3, item_scores
from crossin_jax.evaluation.predictions import Predictions


@dataclass(frozen=True, slots=True)
class Difference:
    """Second minus first on the same items: the difference, its interval, and a two-sided p value."""

    difference: float
    low: float
    high: float
    p: float


@dataclass(frozen=True, slots=True)
class Spread:
    """Of the same score over several runs: median, least, most, mean, standard deviation (n - 1), number of runs."""

    median: float
    low: float
    high: float
    mean: float
    sd: float
    num_runs: int


def bootstrap(predictions: Predictions, mode: Mode = "expectation", *, level: float = 0.95, num_resamples: int = 2000,
              seed: int = 0) -> dict[str, tuple[float, float]]:
    """Percentile intervals of every score over resampled parallel items; all languages of an item stay together.

    They say how the (expected) scores would vary with other items; the coins are not tossed anew, unless by the mode
    "seaeval", once, with this seed.
    """
    scores = item_scores(predictions, mode, seed=seed)
    weights_RI = resample_weights(len(predictions.items), num_resamples, seed)
    tails = [(1 - level) / 2, (1 + level) / 2]
    return {name: tuple(map(float, np.quantile(values_R, tails)))
            for name, values_R in weigh_scores(scores, weights_RI).items()}


def compare(first: Predictions, second: Predictions, mode: Mode = "expectation", *, level: float = 0.95,
            num_resamples: int = 5000, seed: int = 0) -> dict[str, Difference]:
    """Paired bootstrap of two runs on the same items: every score's difference with interval and p value.

    Both runs are resampled by the same items. p is twice the smaller share of resamples on either side of zero, those
    at zero counted on both and one added to each count, so that it is never 0. Raises UserError where items, gold or
    languages differ.
    """
    second = in_order_of(first, second)
    weights_RI = resample_weights(len(first.items), num_resamples, seed)
    even_1I = np.full((1, len(first.items)), 1 / len(first.items))
    one, two = item_scores(first, mode, seed=seed), item_scores(second, mode, seed=seed)
    results = {}
    resampled = [weigh_scores(scores, weights_RI) for scores in (one, two)]
    observed = [weigh_scores(scores, even_1I) for scores in (one, two)]
    for name in resampled[0]:
        delta_R = resampled[1][name] - resampled[0][name]
        delta_R[np.abs(delta_R) < 1e-12] = 0  # rounding is no difference
        low, high = np.quantile(delta_R, [(1 - level) / 2, (1 + level) / 2])
        side = 1 + min(int((delta_R <= 0).sum()), int((delta_R >= 0).sum()))
        results[name] = Difference(float((observed[1][name] - observed[0][name])[0]), float(low), float(high),
                                   min(1.0, 2 * side / (num_resamples + 1)))
    return results


def resample_weights(num_items: int, num_resamples: int, seed: int) -> np.ndarray:
    """Weights (R, I) of the items in each resample; rows sum to 1."""
    rng = np.random.default_rng(seed)
    return rng.multinomial(num_items, np.full(num_items, 1 / num_items), size=num_resamples) / num_items


def weigh_scores(scores: dict[str, np.ndarray], weights_RI: np.ndarray) -> dict[str, np.ndarray]:
    """Weighted means of item scores, and AC3 of these; each (R,)."""
    means = dict(zip(scores, (weights_RI @ np.stack(list(scores.values()), 1)).T, strict=True))
    return means | {f"AC3_{name.removeprefix('consistency_')}": ac3(means["accuracy"], value)
                    for name, value in means.items() if name.startswith("consistency_")}


def in_order_of(first: Predictions, second: Predictions) -> Predictions:
    """The second run with the first one's order of items and languages; UserError where they are not the same."""
    place = f"comparing {first.benchmark!r} with {second.benchmark!r}"
    if set(first.languages) != set(second.languages):
        raise UserError(f"{place}: languages {', '.join(first.languages)} against {', '.join(second.languages)}; "
                        "evaluate both runs in the same languages")
    by_id = {item.id: item for item in second.items}
    if len(by_id) != len(second.items) or len({item.id for item in first.items}) != len(first.items):
        raise UserError(f"{place}: item ids repeat; a paired comparison needs unique ids")
    if other := set(by_id) ^ {item.id for item in first.items}:
        raise UserError(f"{place}: {len(other)} items are in one run only, such as {min(other)!r}; "
                        "evaluate both on the same benchmark with the same limit")
    for item in first.items:
        if by_id[item.id].num_choices != item.num_choices or any(
                by_id[item.id].gold[language] != item.gold[language] for language in first.languages):
            raise UserError(f"{place}: item {item.id!r} has another gold choice; the two runs saw different benchmarks")
    return replace(second, languages=first.languages, items=tuple(by_id[item.id] for item in first.items))


def restrict(predictions: Predictions, tag: str) -> Predictions:
    """The run on the items with this tag alone; UserError where none has it."""
    items = tuple(item for item in predictions.items if tag in item.tags)
    if not items:
        tags = sorted({t for item in predictions.items for t in item.tags})
        raise UserError(f"benchmark {predictions.benchmark!r}: no item has the tag {tag!r}; "
                        f"tags in use: {', '.join(tags) or 'none'}")
    return replace(predictions, items=items)


def spread(scores: Sequence[Level]) -> dict[str, Spread]:
    """Every score over several runs, such as SeaEval's five prompts (it reports the median) or several seeds."""
    if not scores:
        raise UserError("no runs to summarise")
    columns = [score.flatten() for score in scores]
    results = {}
    for name in columns[0]:
        values = np.array([column[name] for column in columns])
        sd = float(values.std(ddof=1)) if len(values) > 1 else float("nan")
        results[name] = Spread(float(np.median(values)), float(values.min()), float(values.max()),
                               float(values.mean()), sd, len(values))
    return results
