"""What a report says about several runs: every score with its interval, and what sets it apart from the first arm.

Runs are grouped into blocks: one benchmark, one way of answering, and maybe only the items with one tag. In a block
each arm is one row. Over prompts a score is the median (as SeaEval reports it), over seeds the mean.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np

from crossin_jax.config import UserError
from crossin_jax.evaluation.intervals import in_order_of, resample_weights, restrict, weigh_scores
from crossin_jax.evaluation.metrics import MODES, Level, Mode, Scores, evaluate, item_scores, pair_agreement
from crossin_jax.evaluation.predictions import Predictions
from crossin_jax.evaluation.readings import Reading, read_answers

NUM_RESAMPLES = 2000
LEVEL = 0.95
PIVOTS = ("en", "English")
OTHERS = "accuracy/others"  # mean accuracy over the languages other than English
RULE = "rule"  # the method of baselines that use no model


@dataclass(frozen=True, slots=True)
class Run:
    """The answers of one model: `name` is its arm; runs of one arm differ in their seed."""

    name: str
    seed: int
    predictions: list[Predictions]
    provenance: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Change:
    """A score minus the first arm's, on the same seeds and items, with its 95 % interval and two-sided p value.

    `clear`: p < 0.05, and the same sign in every seed.
    """

    difference: float
    low: float
    high: float
    p: float
    clear: bool


@dataclass(frozen=True, slots=True)
class Estimate:
    """One score of an arm: 95 % interval over items, standard deviation over seeds, and what coins could make of it."""

    value: float
    low: float
    high: float
    sd: float | None = None
    least: float | None = None
    most: float | None = None
    change: Change | None = None


@dataclass(frozen=True, slots=True)
class Row:
    """One arm in a block: scores by name, by seed and by prompt; `agreement` of language pairs in the block's order.

    By language: `coin_share`, the share of answers without one clear choice by reason, and `readings` of free answers.
    """

    arm: str
    seeds: tuple[int, ...]
    num_items: int
    scores: dict[str, Estimate]
    seed_scores: dict[int, dict[str, float]]
    prompts: dict[int, dict[str, float]]
    agreement: list[list[float]]
    coin_share: dict[str, dict[str, float]]
    readings: dict[str, Reading]
    is_baseline: bool = False


@dataclass(frozen=True, slots=True)
class Block:
    """All arms on one benchmark by one method; `tag` narrows it to the items with it; `chance` is a blind guess."""

    benchmark: str
    method: str
    tag: str | None
    languages: tuple[str, ...]
    num_items: int
    chance: float
    rows: tuple[Row, ...]

    @property
    def size(self) -> int:
        """The s of the headline's consistency_s and AC3_s: three languages, or as many as there are."""
        return min(3, len(self.languages))

    @property
    def headline(self) -> tuple[str, ...]:
        """The scores of the headline table, in its order; a benchmark in one language has only its accuracy."""
        pivot = [f"accuracy/{code}" for code in self.languages if code in PIVOTS]
        if len(self.languages) == 1:
            return ("accuracy",)
        split = (*pivot, OTHERS) if pivot else ()
        return ("accuracy", *split, f"consistency_{self.size}", f"AC3_{self.size}")


def summarise(runs: Sequence[Run], baselines: dict[str, list[Predictions]] | None = None,
              mode: Mode = "expectation") -> list[Block]:
    """Blocks in the order of the runs' predictions, whole benchmarks before their tags; baselines stand in every block.

    Raises UserError where arms of one seed saw different items, or one run's answers are given twice.
    """
    if mode not in MODES:
        raise UserError(f"mode={mode!r} is not one of {', '.join(MODES)}")
    cells: dict[tuple[str, str], dict[str, dict[int, list[Predictions]]]] = {}
    for run in runs:
        for predictions in run.predictions:
            arms = cells.setdefault((predictions.benchmark, predictions.method), {})
            told = arms.setdefault(run.name, {}).setdefault(run.seed, [])
            if any(other.prompt == predictions.prompt for other in told):
                raise UserError(f"run {run.name!r}, seed {run.seed}: two sets of answers to {predictions.benchmark} by "
                                f"{predictions.method}, prompt {predictions.prompt}; give each run its own name")
            told.append(predictions)
    if not cells:
        raise UserError("no answers to report; evaluate at least one benchmark")
    blocks = []
    for (benchmark, method), arms in cells.items():
        seed = next(iter(next(iter(arms.values()))))
        rules = {name: {seed: [p]} for name, answers in (baselines or {}).items() for p in answers
                 if p.benchmark == benchmark and method != RULE}
        told = [p for seeds in arms.values() for several in seeds.values() for p in several]
        tags = dict.fromkeys(tag for p in told for item in p.items for tag in item.tags)
        blocks.append(_block(benchmark, method, None, arms, rules, mode))
        for tag in tags:
            if any(tag not in item.tags for p in told for item in p.items):
                only = [{name: {seed: [restrict(p, tag) for p in several] for seed, several in seeds.items()}
                         for name, seeds in some.items()} for some in (arms, rules)]
                blocks.append(_block(benchmark, method, tag, *only, mode))
    return blocks


def _block(benchmark: str, method: str, tag: str | None, arms: dict[str, dict[int, list[Predictions]]],
           rules: dict[str, dict[int, list[Predictions]]], mode: Mode) -> Block:
    first_arm, base = next(iter(arms.items()))
    first = next(iter(base.values()))[0]
    base_samples, rows = _sample(base, mode), []
    for name, given in (*arms.items(), *rules.items()):
        seeds = {seed: [in_order_of(base[seed][0] if seed in base else several[0], p) for p in several]
                 for seed, several in given.items()}
        compared = base_samples if name in arms and name != first_arm else {}
        rows.append(_row(name, seeds, compared, mode, name in rules))
    chance = float(np.mean([1 / item.num_choices for item in first.items]))
    return Block(benchmark, method, tag, first.languages, len(first.items), chance, tuple(rows))


def _row(arm: str, seeds: dict[int, list[Predictions]], base: dict[int, dict[str, np.ndarray]], mode: Mode,
         is_baseline: bool) -> Row:
    samples = _sample(seeds, mode)
    scored = {seed: [evaluate(p, mode, seed=seed) for p in several] for seed, several in seeds.items()}
    estimates = {}
    for name in next(iter(samples.values())):
        of_seeds = np.array([_over_prompts([_flatten(s)[name] for s in several]) for several in scored.values()])
        drawn_R = np.mean([sample[name][1:] for sample in samples.values()], axis=0)
        low, high = _interval(drawn_R)
        coins = [[_over_prompts([_flatten(bound)[name] for s in several if (bound := getattr(s, side))])
                  for several in scored.values()] for side in ("least", "most")] if mode == "expectation" else None
        least, most = (float(np.mean(values)) for values in coins) if coins else (None, None)
        moved = least is not None and most is not None and most - least > 1e-9
        estimates[name] = Estimate(
            float(of_seeds.mean()), low, high, float(of_seeds.std(ddof=1)) if len(of_seeds) > 1 else None,
            least if moved else None, most if moved else None, _change(samples, base, name))
    first = next(iter(seeds.values()))
    prompts = {p.prompt: {name: float(np.mean([_flatten(several[i])[name] for several in scored.values()]))
                          for name in estimates} for i, p in enumerate(first)} if _same_prompts(seeds) else {}
    agreement = [pair_agreement(p, mode, seed=seed) for seed, several in seeds.items() for p in several]
    return Row(arm, tuple(seeds), len(first[0].items), estimates,
               {seed: {name: float(sample[name][0]) for name in sample} for seed, sample in samples.items()},
               prompts, np.mean(agreement, axis=0).tolist(),
               _mean_shares([s.coin_share for several in scored.values() for s in several]),
               read_answers([p for several in seeds.values() for p in several]), is_baseline)


def _sample(seeds: dict[int, list[Predictions]], mode: Mode) -> dict[int, dict[str, np.ndarray]]:
    """By seed and score (1 + R,): the value, then the value on resampled items; the median over prompts of each.

    The items drawn depend on their number and the seed alone, so that arms are compared on the same ones.
    """
    samples = {}
    for seed, several in seeds.items():
        weights_RI = _weights(len(several[0].items), seed)
        weighed = []
        for predictions in several:
            scores = item_scores(predictions, mode, seed=seed)
            if others := [f"accuracy/{code}" for code in predictions.languages if code not in PIVOTS]:
                mean = {OTHERS: np.mean([scores[name] for name in others], axis=0)}
                scores = {"accuracy": scores["accuracy"]} | mean | scores  # in the order of the tables
            weighed.append(weigh_scores(scores, weights_RI))
        samples[seed] = {name: np.median([scores[name] for scores in weighed], axis=0) for name in weighed[0]}
    return samples


@lru_cache(maxsize=16)
def _weights(num_items: int, seed: int) -> np.ndarray:
    return np.concatenate([np.full((1, num_items), 1 / num_items), resample_weights(num_items, NUM_RESAMPLES, seed)])


def _change(samples: dict[int, dict[str, np.ndarray]], base: dict[int, dict[str, np.ndarray]],
            name: str) -> Change | None:
    """Against the first arm on the seeds that both have: paired bootstrap over items, mean over seeds."""
    common = [seed for seed in samples if seed in base and name in base[seed]]
    if not common:
        return None
    delta_SR = np.array([samples[seed][name] - base[seed][name] for seed in common])
    mean_R = delta_SR.mean(0)
    for deltas in (delta_SR, mean_R):  # differences of two seeds may cancel each other
        deltas[np.abs(deltas) < 1e-12] = 0  # rounding is no difference
    observed, delta_R = float(mean_R[0]), mean_R[1:]
    side = 1 + min(int((delta_R <= 0).sum()), int((delta_R >= 0).sum()))
    p = min(1.0, 2 * side / (NUM_RESAMPLES + 1))
    same_sign = bool((delta_SR[:, 0] > 0).all() or (delta_SR[:, 0] < 0).all())
    return Change(observed, *_interval(delta_R), p, p < 1 - LEVEL and same_sign)


def _interval(values_R: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(values_R, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def _over_prompts(values: Iterable[float]) -> float:
    return float(np.median(list(values)))


def _flatten(scores: Scores | Level) -> dict[str, float]:
    others = [value for code, value in scores.language_accuracy.items() if code not in PIVOTS]
    return scores.flatten() | ({OTHERS: sum(others) / len(others)} if others else {})


def _same_prompts(seeds: dict[int, list[Predictions]]) -> bool:
    return len({tuple(p.prompt for p in several) for several in seeds.values()}) == 1


def _mean_shares(shares: list[dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    """Mean over runs of the share of coins by language and reason."""
    return {language: {reason: sum(s[language].get(reason, 0.0) for s in shares) / len(shares)
                       for reason in dict.fromkeys(r for s in shares for r in s[language])} for language in shares[0]}
