"""What a report says about several runs: every score with its interval, and changes against an arm.

Runs are grouped into blocks: one benchmark, one way of answering, and maybe only the items with one
tag. In a block each arm is one row:

    cross_mmlu, free answers      English  Other languages  Consistency_3  AC3_3
      base (seeds 0, 1, 2)        .512     .433             .501           .479    the first arm
      x2x  (seeds 0, 1, 2)        .520     .471 ▲           .566 ▲         .527 ▲

Over the prompts of a run, a score is the median, as SeaEval reports it; over seeds it is the mean.

Shape letters: R resamples · S seeds; "1R" is the score itself, then that of every resample.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

from crossin_jax.config import UserError
from crossin_jax.evaluation import separate
from crossin_jax.evaluation.metrics import (
    MODES,
    FourScores,
    Mode,
    Scores,
    ac3,
    item_scores,
    pair_agreement,
)
from crossin_jax.evaluation.pair_tables import PairTable, tabulate_pairs
from crossin_jax.evaluation.pairs import PIVOTS, Weights, measure_pairs, pair_scores
from crossin_jax.evaluation.predictions import Predictions
from crossin_jax.evaluation.stats import (
    SMALL,
    Change,
    ItemScores,
    in_order_of,
    interval,
    paired_change,
    resample,
    restrict,
    wilson,
)
from crossin_jax.report.readings import Reading, read_answers

# mean accuracy over the languages other than English
OTHERS = "accuracy/others"
# the arm of the model before tuning
UNTUNED = "untuned"
# the method of baselines that use no model
RULE = "rule"
# By seed, scores by name for each prompt
Flat = dict[int, list[dict[str, float]]]
# predictions, one per prompt, by arm and by seed
Arms = dict[str, dict[int, list[Predictions]]]


# ---- What goes in


@dataclass(frozen=True, slots=True)
class Run:
    """The answers of one model: `name` is its arm; runs of one arm differ in their seed."""

    name: str
    seed: int
    predictions: list[Predictions]
    provenance: dict[str, Any] = field(default_factory=dict)


# ---- What comes out


@dataclass(frozen=True, slots=True)
class Estimate:
    """One score of an arm.

    `low` and `high`: 95 % interval over items. `sd`: standard deviation over seeds. `least`,
    `most`: what random draws could make of unclear answers. `change`: against the first arm.
    """

    value: float
    low: float
    high: float
    sd: float | None = None
    least: float | None = None
    most: float | None = None
    change: Change | None = None


@dataclass(frozen=True, slots=True)
class Row:
    """One arm in a block: scores by name, by seed and by prompt.

    `agreement`: of language pairs, in the block's order. By language: `coin_share`, the share of
    answers without one clear choice by reason, and `readings` of free answers. `pairs`: the
    measures of language pairs by name, for a whole benchmark.
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
    pairs: dict[str, PairTable] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Block:
    """All arms on one benchmark by one method.

    With a `tag`, only the items that have it count. `chance` is the accuracy of blind guessing,
    `chances` are its headline consistency and AC3.
    `kind` says what is measured: see `evaluation.items.KINDS`.
    """

    benchmark: str
    method: str
    tag: str | None
    languages: tuple[str, ...]
    num_items: int
    chance: float
    rows: tuple[Row, ...]
    kind: str = "parallel"
    chances: dict[str, float] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """The number s of the headline's consistency_s and AC3_s: 3, or 2 with two languages."""
        return min(3, len(self.languages))

    @property
    def headline(self) -> tuple[str, ...]:
        """The scores of the headline table in order; with one language, only its accuracy."""
        if self.kind == "open":
            return separate.RATES
        pivot = [f"accuracy/{code}" for code in self.languages if code in PIVOTS]
        if len(self.languages) == 1:
            return ("accuracy",)
        split = (*pivot, OTHERS) if pivot else ()
        if self.kind == "separate":
            return ("accuracy", *split)
        ranked = ("rankc",) if any("rankc" in row.scores for row in self.rows) else ()
        return ("accuracy", *split, f"consistency_{self.size}", self.main_score, *ranked)

    @property
    def main_score(self) -> str:
        """AC3_s; accuracy with one language, or where languages cannot be compared by item."""
        if self.kind == "open":
            return separate.RATES[0]
        is_alone = len(self.languages) == 1 or self.kind == "separate"
        return "accuracy" if is_alone else f"AC3_{self.size}"


# ---- From runs to blocks


def summarise(
    runs: Sequence[Run],
    baselines: dict[str, list[Predictions]] | None = None,
    mode: Mode = "expectation",
    *,
    rankc: Weights = "softmax",
) -> list[Block]:
    """Blocks in the order of the runs' predictions, each whole benchmark before its tags.

    Baselines are in every block. `rankc`: the weights of RankC. Raises UserError where arms of one
    seed saw different items, or one run's answers are given twice.
    """
    if mode not in MODES:
        raise UserError(f"mode={mode!r} is not one of {', '.join(MODES)}")
    cells: dict[tuple[str, str], Arms] = {}
    for run in runs:
        for predictions in run.predictions:
            arms = cells.setdefault((predictions.benchmark, predictions.method), {})
            _add(arms, run, predictions)
    if not cells:
        raise UserError("no answers to report; evaluate at least one benchmark")
    blocks = []
    for (benchmark, method), arms in cells.items():
        # Rules do not depend on a seed. They get that of the first run, to be drawn on its items.
        seed = next(iter(next(iter(arms.values()))))
        rules = {
            name: {seed: [p]}
            for name, answers in (baselines or {}).items()
            for p in answers
            if p.benchmark == benchmark and method != RULE
        }
        blocks.append(_block(benchmark, method, None, arms, rules, mode, rankc))
        for tag in _find_tags(arms):
            only = (_restrict(some, tag) for some in (arms, rules))
            blocks.append(_block(benchmark, method, tag, *only, mode, rankc))
    return blocks


def _add(arms: Arms, run: Run, predictions: Predictions) -> None:
    several = arms.setdefault(run.name, {}).setdefault(run.seed, [])
    if any(other.prompt == predictions.prompt for other in several):
        raise UserError(
            f"run {run.name!r}, seed {run.seed}: two sets of answers to {predictions.benchmark} by "
            f"{predictions.method}, prompt {predictions.prompt}; give each run its own name"
        )
    several.append(predictions)


def _find_tags(arms: Arms) -> list[str]:
    """The tags of some items; a tag that all items have would only repeat the whole benchmark."""
    items = [
        item
        for seeds in arms.values()
        for several in seeds.values()
        for predictions in several
        for item in predictions.items
    ]
    tags = dict.fromkeys(tag for item in items for tag in item.tags)
    return [tag for tag in tags if any(tag not in item.tags for item in items)]


def _restrict(arms: Arms, tag: str) -> Arms:
    return {
        name: {seed: [restrict(p, tag) for p in several] for seed, several in seeds.items()}
        for name, seeds in arms.items()
    }


def _block(
    benchmark: str,
    method: str,
    tag: str | None,
    arms: Arms,
    rules: Arms,
    mode: Mode,
    rankc: Weights,
) -> Block:
    first_arm, base = next(iter(arms.items()))
    first = next(iter(base.values()))[0]
    base_samples, rows = _sample(base, mode, rankc), []
    for name, given in (*arms.items(), *rules.items()):
        # A paired comparison needs the items of both arms in the same order.
        seeds = {
            seed: [in_order_of(base[seed][0] if seed in base else several[0], p) for p in several]
            for seed, several in given.items()
        }
        is_compared = name in arms and name != first_arm
        is_base = name in arms and name == first_arm
        samples = base_samples if is_base else _sample(seeds, mode, rankc)
        compared = base_samples if is_compared else {}
        row = _row(name, seeds, samples, compared, mode, rankc, name in rules)
        if tag is None and first.kind == "parallel":
            tables = tabulate_pairs(seeds, base if is_compared else None, mode, weights=rankc)
            row = replace(row, pairs=tables)
        rows.append(row)
    counts = np.array([max(1, item.num_choices) for item in first.items])
    block = Block(
        benchmark,
        method,
        tag,
        first.languages,
        len(first.items),
        float(np.mean(1 / counts)),
        tuple(rows),
        first.kind,
    )
    if first.kind != "parallel" or len(first.languages) < 2:
        return block
    # s guesses among k choices agree with probability k · (1 / k) ** s.
    agreement = float(np.mean(counts ** (1.0 - block.size)))
    chances = {
        f"consistency_{block.size}": agreement,
        f"AC3_{block.size}": ac3(block.chance, agreement),
    }
    return replace(block, chances=chances)


def _row(
    arm: str,
    seeds: dict[int, list[Predictions]],
    samples: dict[int, dict[str, np.ndarray]],
    base: dict[int, dict[str, np.ndarray]],
    mode: Mode,
    rankc: Weights,
    is_baseline: bool,
) -> Row:
    scored = {
        seed: [separate.evaluate(p, mode, seed=seed) for p in several]
        for seed, several in seeds.items()
    }
    is_parallel = next(iter(seeds.values()))[0].kind == "parallel"
    flat = {
        seed: [
            _flatten(scores)
            | (measure_pairs(p, mode, seed=seed, weights=rankc) if is_parallel else {})
            for scores, p in zip(scored[seed], several, strict=True)
        ]
        for seed, several in seeds.items()
    }
    agreement = [
        pair_agreement(p, mode, seed=seed)
        for seed, several in seeds.items()
        for p in several
        if is_parallel
    ]
    return Row(
        arm=arm,
        seeds=tuple(seeds),
        num_items=len(next(iter(seeds.values()))[0].items),
        scores=_estimate(samples, base, flat, scored, len(next(iter(seeds.values()))[0].items)),
        seed_scores={
            seed: {name: float(values_1R[0]) for name, values_1R in sample.items()}
            for seed, sample in samples.items()
        },
        prompts=_by_prompt(seeds, flat),
        agreement=np.mean(agreement, axis=0).tolist() if is_parallel else [],
        coin_share=_mean_shares([s.coin_share for several in scored.values() for s in several]),
        readings=read_answers([p for several in seeds.values() for p in several]),
        is_baseline=is_baseline,
    )


def _estimate(
    samples: dict[int, dict[str, np.ndarray]],
    base: dict[int, dict[str, np.ndarray]],
    flat: Flat,
    scored: dict[int, list[Scores]],
    num_items: int,
) -> dict[str, Estimate]:
    """Every score of an arm, from its resampled scores and those of the first arm."""
    values = _medians(flat)
    least, most = (
        _medians(_bounds(scored, side)) for side in (lambda s: s.least, lambda s: s.most)
    )
    estimates = {}
    for name in next(iter(samples.values())):
        value_S = np.array(values[name])
        low, high = interval(np.mean([sample[name][1:] for sample in samples.values()], axis=0))
        # Without unclear answers both ends are the value itself, and there is no range to show.
        bottom, top = (float(np.mean(side.get(name, 0.0))) for side in (least, most))
        has_range = top - bottom > 1e-9
        estimates[name] = Estimate(
            value=float(value_S.mean()),
            low=low,
            high=high,
            sd=float(value_S.std(ddof=1)) if len(value_S) > 1 else None,
            least=bottom if has_range else None,
            most=top if has_range else None,
            change=paired_change(
                {seed: sample[name] for seed, sample in samples.items()},
                {seed: sample[name] for seed, sample in base.items() if name in sample},
            ),
        )
    return estimates if num_items >= SMALL else _widen(estimates, num_items)


def _widen(estimates: dict[str, Estimate], num_items: int) -> dict[str, Estimate]:
    """The estimates of few items, with intervals that are right at 0 and 1 too.

    A bootstrap of four wrong answers gives [0, 0]. Wilson's interval is for a proportion. It is
    also safe for a mean of shares, such as the share of language pairs that agree: that varies less
    than a proportion does. AC3 grows with accuracy and consistency, so its ends are those of both.
    """
    ends = {
        name: wilson(estimate.value, num_items)
        for name, estimate in estimates.items()
        if name.split("/")[0] == "accuracy" or name.startswith("consistency_")
    }
    for name in estimates:
        size = name.removeprefix("AC3_")
        if size != name and f"consistency_{size}" in ends:
            both = zip(ends["accuracy"], ends[f"consistency_{size}"], strict=True)
            low, high = (ac3(*pair) for pair in both)
            ends[name] = low, high
    return estimates | {
        name: replace(estimates[name], low=low, high=high) for name, (low, high) in ends.items()
    }


def _medians(flat: Flat) -> dict[str, list[float]]:
    """By score the median over prompts, for each seed."""
    first = next(iter(flat.values()), [{}])[0]
    return {
        name: [_over_prompts(scores[name] for scores in several) for several in flat.values()]
        for name in first
    }


def _bounds(scored: dict[int, list[Scores]], side: Callable[[Scores], FourScores | None]) -> Flat:
    """The least or the most that coins can make of the scores; empty where the mode has none."""
    return {
        seed: [_flatten(level) for scores in several if (level := side(scores))]
        for seed, several in scored.items()
        if all(side(scores) for scores in several)
    }


def _by_prompt(seeds: dict[int, list[Predictions]], flat: Flat) -> dict[int, dict[str, float]]:
    """By prompt the scores, as means over seeds; empty where seeds were asked by other prompts."""
    asked = [[p.prompt for p in several] for several in seeds.values()]
    if any(prompts != asked[0] for prompts in asked):
        return {}
    by_prompt = {}
    for i, prompt in enumerate(asked[0]):
        scores = [several[i] for several in flat.values()]
        by_prompt[prompt] = {name: float(np.mean([f[name] for f in scores])) for name in scores[0]}
    return by_prompt


# ---- Scores


def _sample(
    seeds: dict[int, list[Predictions]], mode: Mode, rankc: Weights
) -> dict[int, dict[str, np.ndarray]]:
    """By seed and score (1 + R,): the value, then the values on R resamples of the items."""
    return {
        seed: resample(several, partial(_score_items, mode=mode, rankc=rankc, seed=seed), seed=seed)
        for seed, several in seeds.items()
    }


def _score_items(predictions: Predictions, mode: Mode, rankc: Weights, seed: int) -> ItemScores:
    """The scores of items, with the mean over the languages other than English."""
    codes = [code for code in predictions.languages if code not in PIVOTS]
    if predictions.kind != "parallel":
        return separate.item_scores(predictions, mode, seed=seed, others=codes)
    scores = item_scores(predictions, mode, seed=seed)
    others = [f"accuracy/{code}" for code in codes]
    mean = {OTHERS: np.mean([scores[name] for name in others], axis=0)} if others else {}
    first = {"accuracy": scores["accuracy"]} | mean
    return first | scores | pair_scores(predictions, mode, seed=seed, weights=rankc)


def _over_prompts(values: Iterable[float]) -> float:
    return float(np.median(list(values)))


def _flatten(scores: Scores | FourScores) -> dict[str, float]:
    others = [value for code, value in scores.language_accuracy.items() if code not in PIVOTS]
    return scores.flatten() | ({OTHERS: sum(others) / len(others)} if others else {})


def _mean_shares(shares: list[dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    """Mean over runs of the share of coins by language and reason."""
    return {
        language: {
            reason: sum(s[language].get(reason, 0.0) for s in shares) / len(shares)
            for reason in dict.fromkeys(r for s in shares for r in s[language])
        }
        for language in shares[0]
    }
