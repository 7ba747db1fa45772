"""Scores against enumeration of all coins, against SeaEval's published numbers, and their
intervals.
"""

import gzip
import itertools
import json
import math
import random
import time
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crossin_jax.config import UserError
from crossin_jax.evaluation import metrics
from crossin_jax.evaluation.metrics import (
    ac3,
    choice_probabilities,
    evaluate,
    item_scores,
    pair_agreement,
)
from crossin_jax.evaluation.predictions import Answer, ItemAnswers, Predictions
from crossin_jax.evaluation.seaeval import read_log
from crossin_jax.evaluation.stats import (
    Change,
    bootstrap,
    in_order_of,
    paired_change,
    resample,
    resample_weights,
    restrict,
)

NAMES = ("en", "zh", "vi", "es")


def make(rows, gold=0, num_choices=3, tags=()):
    """Predictions from rows of candidates by language."""
    languages = NAMES[: len(rows[0])]
    return Predictions(
        "made",
        "generate",
        1,
        languages,
        tuple(
            ItemAnswers(
                f"item {i}",
                dict.fromkeys(languages, gold),
                num_choices,
                {
                    language: Answer(
                        (c,) if isinstance(c, int) else c,
                        "matched" if isinstance(c, int) else "tie",
                    )
                    for language, c in zip(languages, row, strict=True)
                },
                tags[i] if tags else (),
            )
            for i, row in enumerate(rows)
        ),
    )


def plain_scores(rows):
    """Straight from the definition, for certain answers; choice 0 is right."""
    num_languages = len(rows[0])
    scores = {"accuracy": sum(c == 0 for row in rows for c in row) / len(rows) / num_languages}
    for s in range(2, num_languages + 1):
        sets = list(itertools.combinations(range(num_languages), s))
        agree = sum(len({row[l] for l in chosen}) == 1 for row in rows for chosen in sets)
        scores[f"consistency_{s}"] = agree / len(rows) / len(sets)
        scores[f"AC3_{s}"] = ac3(scores["accuracy"], scores[f"consistency_{s}"])
    return scores


def outcomes(rows):
    """(probability, rows of certain answers) of every outcome of all coins."""
    cells = [(c,) if isinstance(c, int) else c for row in rows for c in row]
    for outcome in itertools.product(*cells):
        width = len(rows[0])
        yield (
            1 / math.prod(map(len, cells)),
            [outcome[i : i + width] for i in range(0, len(outcome), width)],
        )


COINS = [
    [(0, 1), 0, (0, 2)],
    [1, 1, (0, 1, 2)],
    [(0, 1, 2), (1, 2), (0, 1, 2)],
    [2, 2, 2],
]
FOUR = [[(0, 1), (0, 1), (1, 2), (0, 1, 2)], [(0, 1), (0, 1), (0, 1), (0, 1)]]


MIXED = [[0, (0, 1, 2), (1, 2), (0, 1, 2)], [(0, 1, 2), (0, 1, 2), 2, 2]]


@pytest.mark.parametrize("rows", [COINS, FOUR, MIXED])
def test_expectation_is_the_mean_over_all_outcomes(rows):
    scores = evaluate(make(rows))
    table = [(p, plain_scores(outcome)) for p, outcome in outcomes(rows)]
    assert math.isclose(sum(p for p, _ in table), 1)
    flat, least, most = scores.flatten(), scores.least.flatten(), scores.most.flatten()
    for name in scores.coin_sd:
        values = np.array([result[name] for _, result in table])
        weights = np.array([p for p, _ in table])
        assert flat[name] == pytest.approx(weights @ values, abs=1e-12)
        assert scores.coin_sd[name] == pytest.approx(
            math.sqrt(weights @ (values - weights @ values) ** 2), abs=1e-12
        )
        assert least[name] == pytest.approx(values.min(), abs=1e-12)
        assert most[name] == pytest.approx(values.max(), abs=1e-12)
    for name in ("AC3_2", "AC3_3"):
        values = [result[name] for _, result in table]
        assert least[name] - 1e-12 <= min(values) and max(values) <= most[name] + 1e-12
        s = name[-1]
        assert flat[name] == ac3(flat["accuracy"], flat[f"consistency_{s}"])


@st.composite
def parallel_answers(draw):
    """Predictions whose items differ in choices, gold and coins; at most 64 outcomes per item."""
    languages, items = NAMES[: draw(st.integers(1, 4))], []
    for i in range(draw(st.integers(1, 3))):
        count = draw(st.integers(2, 4 if len(languages) < 4 else 2))
        choice, answers = st.integers(0, count - 1), {}
        for language in languages:
            coin = draw(st.sampled_from(("matched", "tie", "empty", "unreadable", "too_long")))
            candidates = {
                "matched": st.tuples(choice),
                "tie": st.sets(choice, min_size=2, max_size=2).map(lambda c: tuple(sorted(c))),
            }
            answers[language] = Answer(
                draw(candidates.get(coin, st.just(tuple(range(count))))), coin
            )
        items.append(
            ItemAnswers(f"i{i}", {language: draw(choice) for language in languages}, count, answers)
        )
    return Predictions("drawn", "generate", 1, languages, tuple(items))


def score_outcome(items, pick):
    """Scores of certain answers: `pick(item, language)` is the choice, None for no answer."""
    languages, scores = list(items[0].gold), {}
    right = {a: np.mean([pick(item, a) == item.gold[a] for item in items]) for a in languages}
    scores["accuracy"] = np.mean(list(right.values()))
    scores |= {f"accuracy/{a}": value for a, value in right.items()}
    for s in range(2, len(languages) + 1):
        scores[f"consistency_{s}"] = np.mean(
            [
                len({pick(item, a) for a in chosen}) == 1 and pick(item, chosen[0]) is not None
                for item in items
                for chosen in itertools.combinations(languages, s)
            ]
        )
    return scores


def enumerate_outcomes(item):
    """Every outcome of an item's coins, as a choice by language; all are equally likely."""
    for outcome in itertools.product(*(answer.candidates for answer in item.answers.values())):
        yield dict(zip(item.answers, outcome, strict=True))


@settings(max_examples=60, deadline=None)
@given(predictions=parallel_answers(), seed=st.integers(0, 9))
def test_every_mode_is_its_definition(predictions, seed):
    """Expectation is the mean over all outcomes, strict drops coins, seaeval is one of the
    outcomes.
    """
    items = predictions.items

    def certain(item, language):
        candidates = item.answers[language].candidates
        return candidates[0] if len(candidates) == 1 else None

    by_item = [
        [
            score_outcome([item], lambda item, a, o=outcome: o[a])
            for outcome in enumerate_outcomes(item)
        ]
        for item in items
    ]
    wanted = {
        "strict": score_outcome(items, certain),
        "expectation": {
            name: np.mean([np.mean([told[name] for told in outcomes]) for outcomes in by_item])
            for name in by_item[0][0]
        },
    }
    tossed = choice_probabilities(predictions, "seaeval", seed)
    picks = {
        (item.id, language): int(tossed[i, k].argmax())
        for i, item in enumerate(items)
        for k, language in enumerate(predictions.languages)
    }
    assert all(picks[item.id, a] in item.answers[a].candidates for item in items for a in item.gold)
    wanted["seaeval"] = score_outcome(items, lambda item, a: picks[item.id, a])
    for mode, expected in wanted.items():
        found = evaluate(predictions, mode, seed=seed)
        flat, of_items = found.flatten(), item_scores(predictions, mode, seed=seed)
        assert (found.benchmark, found.mode, found.num_items) == ("drawn", mode, len(items))
        for name, value in expected.items():
            assert flat[name] == pytest.approx(value, abs=1e-12), (mode, name)
            assert of_items[name].mean() == pytest.approx(value, abs=1e-12), (mode, name)
        assert of_items.keys() == expected.keys()
        for name in flat.keys() - expected.keys():
            assert flat[name] == ac3(flat["accuracy"], flat[f"consistency_{name[-1]}"])
        for pair, value in found.combinations.get(2, {}).items():
            two = replace(predictions, languages=pair)
            assert value == pytest.approx(evaluate(two, mode, seed=seed).consistency[2], abs=1e-12)
            a, b = map(predictions.languages.index, pair)
            assert pair_agreement(predictions, mode, seed=seed)[b, a] == pytest.approx(
                value, abs=1e-12
            )
    exact = evaluate(predictions)
    for name, sd in exact.coin_sd.items():
        bounds = [[told[name] for told in outcomes] for outcomes in by_item]
        assert exact.least.flatten()[name] == pytest.approx(
            np.mean([min(b) for b in bounds]), abs=1e-12
        )
        assert exact.most.flatten()[name] == pytest.approx(
            np.mean([max(b) for b in bounds]), abs=1e-12
        )
        assert sd == pytest.approx(np.sqrt(sum(np.var(b) for b in bounds)) / len(items), abs=1e-9)
    for language, shares in exact.coin_share.items():
        reasons = [
            item.answers[language].reason
            for item in items
            if len(item.answers[language].candidates) > 1
        ]
        assert shares == {
            reason: reasons.count(reason) / len(items)
            for reason in {"tie", "empty", "unreadable", *reasons}
        }


def test_ac3_is_a_harmonic_mean():
    assert ac3(0.5, 0.25) == pytest.approx(1 / 3) and ac3(0.25, 0.5) == ac3(0.5, 0.25)
    assert ac3(0.25, 1.0) == pytest.approx(0.4) and ac3(0.0, 0.0) == 0 and ac3(1.0, 1.0) < 1


def test_combinations_and_items_average_to_the_scores():
    predictions = make(COINS)
    scores, items = evaluate(predictions), item_scores(predictions)
    assert list(scores.combinations[2]) == [("en", "zh"), ("en", "vi"), ("zh", "vi")]
    assert scores.combinations[3].keys() == {("en", "zh", "vi")}
    for name, values in items.items():
        assert values.shape == (4,)
        assert values.mean() == pytest.approx(scores.flatten()[name], abs=1e-12)
    matrix = pair_agreement(predictions)
    for (a, b), value in scores.combinations[2].items():
        i, j = NAMES.index(a), NAMES.index(b)
        assert matrix[i, j] == matrix[j, i] == pytest.approx(value)
    assert np.diagonal(matrix).tolist() == [1, 1, 1]


def test_strict_counts_a_coin_as_no_answer():
    scores = evaluate(make(COINS), "strict")
    assert scores.language_accuracy == {"en": 0, "zh": 1 / 4, "vi": 0}
    assert scores.combinations[2] == {("en", "zh"): 2 / 4, ("en", "vi"): 1 / 4, ("zh", "vi"): 1 / 4}
    assert scores.consistency[3] == 1 / 4
    assert scores.least is None and scores.most is None


def test_seaeval_mode_tosses_fair_seeded_coins():
    predictions = make(COINS)
    possible = [plain_scores(outcome) for _, outcome in outcomes(COINS)]
    results = [evaluate(predictions, "seaeval", seed=seed).flatten() for seed in range(600)]
    assert results[3] == evaluate(predictions, "seaeval", seed=3).flatten()
    for result in results[:20]:
        assert any(
            all(result[k] == pytest.approx(v, abs=1e-12) for k, v in one.items())
            for one in possible
        )
    expected = evaluate(predictions)
    for name, sd in expected.coin_sd.items():
        mean = np.mean([result[name] for result in results])
        assert abs(mean - expected.flatten()[name]) < 4 * sd / math.sqrt(600)
    # a coin belongs to its item, not to its place in the benchmark
    turned = replace(predictions, items=predictions.items[::-1])
    assert evaluate(turned, "seaeval", seed=5).flatten() == pytest.approx(results[5])


def toss(
    predictions: Predictions, num_tosses: int = 1000, *, seed: int = 0
) -> dict[str, np.ndarray]:
    """Accuracy, consistency_s and AC3_s of `num_tosses` re-scorings with fresh coins, as in
    SeaEval.
    """
    p_ILC = choice_probabilities(predictions)
    rng = np.random.default_rng(seed)
    num_items, num_languages, num_choices = p_ILC.shape
    gold_IL = np.array(
        [[item.gold[language] for language in predictions.languages] for item in predictions.items]
    )
    share = metrics._share_table(num_languages)
    edges_ILC = p_ILC.cumsum(2)[:, :, :-1]
    accuracy, consistency = np.empty(num_tosses), np.empty((num_tosses, num_languages - 1))
    for r in range(num_tosses):
        choice_IL = (rng.random((num_items, num_languages, 1)) >= edges_ILC).sum(2)
        accuracy[r] = (choice_IL == gold_IL).mean()
        counts_IC = (choice_IL[:, :, None] == np.arange(num_choices)).sum(1)
        consistency[r] = share[counts_IC].sum((0, 1)) / num_items
    scores = {"accuracy": accuracy}
    scores |= {f"consistency_{s}": consistency[:, s - 2] for s in range(2, num_languages + 1)}
    return scores | {
        f"AC3_{s}": ac3(accuracy, consistency[:, s - 2]) for s in range(2, num_languages + 1)
    }


def test_tosses_scatter_as_the_exact_deviation_says():
    predictions = make(COINS * 5)
    scores, tossed = evaluate(predictions), toss(predictions, 4000, seed=1)
    for name, sd in scores.coin_sd.items():
        assert abs(tossed[name].mean() - scores.flatten()[name]) < 4 * sd / math.sqrt(4000)
        assert tossed[name].std() == pytest.approx(sd, rel=0.06)
    assert np.array_equal(tossed["AC3_3"], toss(predictions, 4000, seed=1)["AC3_3"])


def test_coin_share_by_language_and_reason():
    shares = evaluate(make(COINS)).coin_share
    assert shares["en"] == {"tie": 2 / 4, "empty": 0, "unreadable": 0}
    assert shares["vi"]["tie"] == 3 / 4


def test_one_language_has_accuracy_alone():
    scores = evaluate(make([[0], [1]]))
    assert (scores.accuracy, scores.consistency, scores.ac3) == (0.5, {}, {})


def test_items_may_differ_in_choices_and_gold():
    predictions = make([[0, 0], [1, 1]], num_choices=2)
    first = replace(predictions.items[0], num_choices=5, gold={"en": 4, "zh": 0})
    scores = evaluate(replace(predictions, items=(first, predictions.items[1])))
    assert scores.language_accuracy == {"en": 0, "zh": 0.5}


def test_nothing_to_score_and_unknown_modes_are_refused():
    with pytest.raises(UserError, match="no items"):
        evaluate(replace(make(COINS), items=()))
    with pytest.raises(UserError, match="did you mean strict"):
        evaluate(make(COINS), "strikt")


def published(path):
    scores = json.loads(path.read_text())
    flat = {"accuracy": scores["overall_acc"]}
    flat |= {f"accuracy/{language}": value for language, value in scores["language_acc"].items()}
    flat |= {
        key.replace("consistency_score", "consistency"): value
        for key, value in scores.items()
        if key.startswith(("consistency", "AC3"))
    }
    return flat, {
        tuple(key.split(",")): value
        for sets in scores["detailed_consistency_score"].values()
        for key, value in sets.items()
    }


def test_published_scores(shared):
    """To the last digit where no coin is tossed; within the coins' range and noise elsewhere."""
    num_exact = 0
    for log in sorted((shared / "seaeval" / "logs").glob("*/*/*.json.gz")):
        expected, sets = published(log.with_name(log.name.replace(".json.gz", "_score.json")))
        scores = evaluate(read_log(log))
        flat, least, most = scores.flatten(), scores.least.flatten(), scores.most.flatten()
        for name, value in expected.items():
            assert least[name] - 1e-12 <= value <= most[name] + 1e-12, (log, name)
        if not any(any(share.values()) for share in scores.coin_share.values()):
            num_exact += 1
            assert flat == least == most == expected and list(flat) == list(expected)
            assert {
                names: v for by_size in scores.combinations.values() for names, v in by_size.items()
            } == sets
            assert list(sets) == [
                names for by_size in scores.combinations.values() for names in by_size
            ]
            for mode in ("seaeval", "strict"):
                assert evaluate(read_log(log), mode).flatten() == expected
        else:
            for name, sd in scores.coin_sd.items():
                assert abs(expected[name] - flat[name]) < 4 * sd, (log, name)
    assert num_exact == 5


def test_summation_is_seaevals_on_every_python():
    values = [0.1] * 10
    assert metrics._mean(values) == 0.09999999999999999  # a compensated sum would give 0.1


def random_rows(num_items, p, seed):
    rng = random.Random(seed)
    return [
        [0 if rng.random() < p else rng.choice((1, 2)) for _ in range(3)] for _ in range(num_items)
    ]


def test_bootstrap_interval_is_that_of_a_mean():
    predictions = make(random_rows(400, 0.6, seed=0))
    intervals, values = bootstrap(predictions, num_resamples=2000), item_scores(predictions)
    assert intervals.keys() == evaluate(predictions).flatten().keys()
    for name in ("accuracy", "accuracy/zh", "consistency_3"):
        low, high = intervals[name]
        error = 1.96 * values[name].std() / math.sqrt(400)
        assert low == pytest.approx(values[name].mean() - error, abs=0.15 * error)
        assert high == pytest.approx(values[name].mean() + error, abs=0.15 * error)
    low, high = intervals["AC3_3"]
    assert low < evaluate(predictions).ac3[3] < high
    assert intervals == bootstrap(predictions, num_resamples=2000)
    assert intervals != bootstrap(predictions, num_resamples=2000, seed=1)


def test_resamples_draw_items_with_replacement():
    """Each row counts as many draws as there are items; each item is drawn once on average."""
    weights = resample_weights(30, 500, seed=3)
    assert weights.shape == (500, 30)
    counts = np.rint(weights * 30)
    assert np.allclose(weights * 30, counts) and (counts.sum(1) == 30).all()
    assert counts.mean() == 1 and counts.var() == pytest.approx(29 / 30, rel=0.05)
    assert len(np.unique(counts, axis=0)) == 500
    assert np.array_equal(weights, resample_weights(30, 500, seed=3))
    assert not np.array_equal(weights, resample_weights(30, 500, seed=4))


def resampled(predictions, mode, num_resamples, seed):
    """{score: value of each resample}, an item at a time."""
    counts = np.rint(
        resample_weights(len(predictions.items), num_resamples, seed) * len(predictions.items)
    ).astype(int)
    items, drawn = item_scores(predictions, mode, seed=seed), []
    for row in counts:
        chosen = [i for i, count in enumerate(row) for _ in range(count)]
        scores = {name: np.mean([values[i] for i in chosen]) for name, values in items.items()}
        drawn.append(
            scores
            | {
                f"AC3_{name[-1]}": ac3(scores["accuracy"], value)
                for name, value in scores.items()
                if name.startswith("consistency")
            }
        )
    return {name: np.array([scores[name] for scores in drawn]) for name in drawn[0]}


def compare(
    first, second, mode="expectation", *, level=0.95, num_resamples=2000, seed=0
) -> dict[str, Change]:
    """What sets the second run apart from the first, by score."""
    one, two = (
        resample(
            [predictions],
            lambda p: item_scores(p, mode, seed=seed),
            seed=seed,
            num_resamples=num_resamples,
        )
        for predictions in (first, in_order_of(first, second))
    )
    return {name: paired_change({seed: two[name]}, {seed: one[name]}, level) for name in one}


RESAMPLING = [
    {},
    {"level": 0.5},
    {"level": 0.8, "num_resamples": 37},
    {"seed": 5},
    {"mode": "strict"},
    {"mode": "seaeval", "seed": 2, "num_resamples": 1},
]


@pytest.mark.parametrize("options", RESAMPLING, ids=str)
def test_intervals_and_p_values_by_hand(options):
    """Level, number of resamples, seed and mode decide the interval and the two-sided p value."""
    rows = random_rows(11, 0.6, seed=4)
    rows[3], rows[7] = [(0, 1), 0, (0, 2)], [1, (0, 1, 2), 1]
    first, second = make(rows), make(random_rows(11, 0.7, seed=6))
    told = {"mode": "expectation", "level": 0.95, "num_resamples": 400, "seed": 0} | options
    how = told["mode"], told["num_resamples"], told["seed"]
    tails = [(1 - told["level"]) / 2, 1 - (1 - told["level"]) / 2]
    one, two = resampled(first, *how), resampled(second, *how)
    intervals = bootstrap(first, **told)
    assert intervals.keys() == one.keys()
    for name, interval in intervals.items():
        assert interval == pytest.approx(np.quantile(one[name], tails), abs=1e-12), name
    before, after = (
        evaluate(p, told["mode"], seed=told["seed"]).flatten() for p in (first, second)
    )
    differences = compare(first, second, **told)
    assert differences.keys() == one.keys()
    for name, found in differences.items():
        deltas = np.round(two[name] - one[name], 12)
        sides = 1 + sum(deltas <= 0), 1 + sum(deltas >= 0)
        assert found.difference == pytest.approx(after[name] - before[name], abs=1e-12)
        assert (found.low, found.high) == pytest.approx(np.quantile(deltas, tails), abs=1e-9), name
        assert found.p == pytest.approx(min(1, 2 * min(sides) / (told["num_resamples"] + 1))), name


def test_the_usual_intervals_have_95_percent_of_2000_resamples():
    """What is not asked for: level .95 and 2,000 resamples, for an interval and for a
    comparison.
    """
    first, second = make(random_rows(20, 0.5, seed=1)), make(random_rows(20, 0.8, seed=2))
    assert bootstrap(first) == bootstrap(
        first, "expectation", level=0.95, num_resamples=2000, seed=0
    )
    one, two = (
        resample([p], lambda p: item_scores(p, "expectation", seed=0), seed=0)["accuracy"]
        for p in (first, second)
    )
    assert len(one) == 2001
    assert paired_change({0: two}, {0: one}) == paired_change({0: two}, {0: one}, 0.95)


def test_languages_of_an_item_stay_together():
    """Answers that are equal in all languages carry no more than one language does."""
    one = make([[row[0]] * 3 for row in random_rows(200, 0.5, seed=3)])
    intervals = bootstrap(one)
    assert intervals["accuracy"] == pytest.approx(intervals["accuracy/en"])


def test_paired_comparison():
    first = make(random_rows(200, 0.4, seed=1))
    better = make(random_rows(200, 0.7, seed=2))
    same = compare(first, first)
    assert all((d.difference, d.low, d.high, d.p) == (0, 0, 0, 1) for d in same.values())
    gain = compare(first, better)["accuracy"]
    assert gain.difference == pytest.approx(evaluate(better).accuracy - evaluate(first).accuracy)
    assert 0 < gain.low < gain.difference < gain.high and gain.p < 0.01
    loss = compare(better, first)["accuracy"]
    assert loss.difference == -gain.difference and loss.p == pytest.approx(gain.p)
    turned = replace(better, items=better.items[::-1], languages=better.languages[::-1])
    assert compare(first, turned)["AC3_3"].difference == pytest.approx(
        compare(first, better)["AC3_3"].difference
    )


def test_p_values_are_uniform_where_runs_do_not_differ():
    p = [
        compare(
            make(random_rows(60, 0.5, seed=2 * i)),
            make(random_rows(60, 0.5, seed=2 * i + 1)),
            num_resamples=400,
        )["accuracy"].p
        for i in range(150)
    ]
    assert 0.005 < np.mean(np.array(p) < 0.1) < 0.2


def test_comparison_refuses_other_items():
    rows = random_rows(10, 0.5, seed=1)
    first = make(rows)
    with pytest.raises(UserError, match="'item 9'"):
        compare(first, make(rows[:9]))
    with pytest.raises(UserError, match="another gold"):
        compare(first, make(rows, gold=1))
    with pytest.raises(UserError, match="languages en, zh, vi against en, zh"):
        compare(first, make([row[:2] for row in rows]))
    with pytest.raises(UserError, match="ids repeat"):
        compare(first, replace(first, items=first.items + first.items[:1]))


def test_restriction_to_a_tag():
    predictions = make([[0, 0], [1, 1], [0, 1]], tags=(("opaque",), (), ("opaque", "short")))
    assert [item.id for item in restrict(predictions, "opaque").items] == ["item 0", "item 2"]
    with pytest.raises(UserError, match="opaque, short"):
        restrict(predictions, "clear")


def test_compressed_and_plain_logs_are_one(shared, tmp_path):
    log = shared / "seaeval" / "logs" / "flan_t5_large" / "cross_mmlu" / "zero_shot_p1.json.gz"
    plain = tmp_path / "zero_shot_p1.json"
    plain.write_bytes(gzip.decompress(log.read_bytes()))
    assert read_log(plain) == read_log(log)


# ---- many languages


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_the_range_of_an_item_is_that_of_all_outcomes(data):
    """Coins over any candidates, so that room is made by moving other coins."""
    num_choices = data.draw(st.integers(2, 5))
    coin = st.sets(st.integers(0, num_choices - 1), min_size=2).map(lambda c: tuple(sorted(c)))
    coins = tuple(data.draw(st.lists(coin, min_size=1, max_size=5)))
    counts = tuple(
        data.draw(st.lists(st.integers(0, 4), min_size=num_choices, max_size=num_choices))
    )
    num_languages = sum(counts) + len(coins)
    shares = []
    for outcome in itertools.product(*coins):
        numbers = [n + outcome.count(c) for c, n in enumerate(counts)]
        shares.append(
            [
                sum(math.comb(n, s) for n in numbers) / math.comb(num_languages, s)
                for s in range(2, num_languages + 1)
            ]
        )
    weights = np.array([1 / math.prod(map(len, coins))] * len(shares))
    least, most, variance = metrics._item_range(counts, coins, num_languages)
    mean = weights @ np.array(shares)
    np.testing.assert_allclose(least, np.min(shares, 0), atol=1e-12)
    np.testing.assert_allclose(most, np.max(shares, 0), atol=1e-12)
    np.testing.assert_allclose(variance, weights @ (np.array(shares) - mean) ** 2, atol=1e-12)


def in_many_languages(count, num_items):
    rng = random.Random(0)
    languages = tuple(f"l{i}" for i in range(count))
    ties = [(0, 1), (1, 3), (0, 1, 2, 3)]

    def answer():
        if rng.random() < 0.3:
            return Answer(rng.choice(ties), "tie")
        return Answer((rng.randrange(4),), "matched")

    items = tuple(
        ItemAnswers(f"i{i}", dict.fromkeys(languages, i % 4), 4, {l: answer() for l in languages})
        for i in range(num_items)
    )
    return Predictions("made", "generate", 1, languages, items)


@pytest.mark.parametrize("mode", metrics.MODES)
def test_scores_are_the_same_whether_sets_are_listed_or_not(mode, monkeypatch):
    predictions = in_many_languages(9, 20)
    listed = evaluate(predictions, mode)
    monkeypatch.setattr(metrics, "MAX_LISTED", 8)
    found = evaluate(predictions, mode)
    assert found.flatten() == pytest.approx(listed.flatten(), abs=1e-13)
    assert listed.combinations.keys() == set(range(2, 10)) and found.combinations == {}


def test_two_hundred_languages_take_seconds():
    """2^200 sets are not listed; the range holds the tosses, and their mean is the expectation."""
    predictions = in_many_languages(200, 30)
    start = time.monotonic()
    scores = evaluate(predictions)
    assert time.monotonic() - start < 20
    tossed = toss(predictions, 50)
    least, most = scores.least.flatten(), scores.most.flatten()
    for s in (2, 3, 50, 199, 200):
        name = f"consistency_{s}"
        assert (
            least[name] - 1e-15 <= tossed[name].min() and tossed[name].max() <= most[name] + 1e-15
        )
        error = scores.coin_sd[name] / math.sqrt(50)
        assert abs(tossed[name].mean() - scores.consistency[s]) <= 5 * error + 1e-15
        assert scores.ac3[s] == ac3(scores.accuracy, scores.consistency[s])
