"""RankC, agreement and transfer: published values, their definitions by hand, and intervals."""

import itertools
import json
import random
import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from crossin_jax import score
from crossin_jax.config import UserError
from crossin_jax.evaluation import pair_tables, pairs
from crossin_jax.evaluation.metrics import choice_probabilities, pair_agreement
from crossin_jax.evaluation.pair_tables import tabulate_pairs
from crossin_jax.evaluation.pairs import (
    MEASURES,
    WEIGHTS,
    LanguagePairs,
    measure_pairs,
    pair_scores,
    rank_weights,
)
from crossin_jax.evaluation.predictions import Answer, ItemAnswers, Predictions
from crossin_jax.evaluation.stats import bootstrap, paired_change, resample, weigh_items

EVERY = slice(None)


def ranked(rows, gold=None, languages=("en", "zh", "vi", "es")):
    """Predictions from log-likelihoods by item and language; None: the model was not asked."""
    items = []
    for i, row in enumerate(rows):
        count = next(len(scores) for scores in row if scores is not None)
        answers = {
            language: Answer(tuple(range(count)), "too_long")
            if scores is None
            else Answer((int(np.argmax(scores)),), scores=tuple(scores))
            for language, scores in zip(languages, row, strict=False)
        }
        right = gold[i] if gold else 0
        by_language = right if isinstance(right, dict) else dict.fromkeys(answers, right)
        items.append(ItemAnswers(f"item {i}", by_language, count, answers))
    return Predictions("made", "sum", 1, tuple(languages[: len(rows[0])]), tuple(items))


def draw(num_items=60, num_languages=4, seed=0, sizes=(2, 3, 4, 10)):
    """Predictions with ties, as log-likelihoods of a few values have them."""
    rng = np.random.default_rng(seed)
    counts = rng.choice(sizes, num_items)
    rows = [rng.integers(-4, 0, (num_languages, count)).tolist() for count in counts]
    gold = [int(rng.integers(count)) for count in counts]
    languages = ("en", "zh", "vi", "es", "ja", "sw")
    return ranked(rows, gold, languages)


def matrix(predictions, name, **options):
    """A measure as {(language, other): value}, both ways."""
    table = tabulate_pairs({0: [predictions]}, **options)[name]
    return {
        (a, b): table.value[i][j]
        for i, a in enumerate(predictions.languages)
        for j, b in enumerate(predictions.languages)
        if i != j
    }


# ---- Published formulas


@pytest.fixture(scope="module")
def published(request):
    shared = request.getfixturevalue("shared")
    return json.loads((shared / "rankc" / "rankc.json").read_text())


def test_the_published_values_of_every_ordered_pair(published):
    languages = tuple(published["items"][0]["log_likelihoods"])
    rows = [list(item["log_likelihoods"].values()) for item in published["items"]]
    predictions = ranked(rows, [item["gold"] for item in published["items"]], languages)
    columns = {"rankc": "rankc", "agreement": "top1", "agreement_right": "top1_where_one_is_right"}
    assert len(published["expected"]) == 12
    for name, column in columns.items():
        found = matrix(predictions, name)
        for pair, expected in published["expected"].items():
            assert found[tuple(pair.split("|"))] == pytest.approx(expected[column], abs=1e-9)
    overall = measure_pairs(predictions)
    for name in ("rankc", "agreement_right"):
        expected = np.mean([values[columns[name]] for values in published["expected"].values()])
        assert overall[name] == pytest.approx(expected, abs=1e-9)


def test_a_log_with_log_likelihoods_is_scored_alike(published, tmp_path, capsys):
    """`score` reads them from a log; the choice is the likeliest one where no text says it."""
    rows = [
        {"id": item["id"]}
        | {
            code: {
                "choices": [f"({letter}) {letter}" for letter in "ABCDEFGHIJ"[: len(scores)]],
                "answer": "({0}) {0}".format("ABCDEFGHIJ"[item["gold"]]),
                "log_likelihoods": scores,
            }
            for code, scores in item["log_likelihoods"].items()
        }
        for item in published["items"]
    ]
    log, out = tmp_path / "log.json", tmp_path / "out.json"
    log.write_text(json.dumps(rows))
    options = {"log": log, "answers": None, "mode": "expectation", "rankc": "softmax", "seed": 0}
    options |= {"out": out, "alignments": None, "few_shot": "auto", "format": "text"}
    score.main(SimpleNamespace(**options))
    printed, ours = capsys.readouterr().out, json.loads(out.read_text())["crossin_jax"]
    expected = published["expected"]
    assert ours["measures"]["rankc"] == pytest.approx(
        np.mean([values["rankc"] for values in expected.values()]), abs=1e-9
    )
    assert re.search(rf"rankc +{ours['measures']['rankc']:.3f}", printed)
    low, high = ours["intervals_95"]["conductivity/vi"]
    assert low < ours["measures"]["conductivity/vi"] < high
    place = {code: i for i, code in enumerate(ours["languages"])}
    for pair, values in expected.items():
        i, j = (place[code] for code in pair.split("|"))
        table = ours["pairs"]["rankc"]
        assert table["value"][i][j] == pytest.approx(values["rankc"], abs=1e-9)
        assert table["low"][i][j] < table["value"][i][j] < table["high"][i][j]
    score.main(SimpleNamespace(**options | {"rankc": "norm1"}))
    other = json.loads(out.read_text())["crossin_jax"]
    assert other["rankc"] == "norm1" and other["measures"]["rankc"] != ours["measures"]["rankc"]
    with pytest.raises(UserError, match="--rankc=norm: not one of softmax, norm1, norm2"):
        score.main(SimpleNamespace(**options | {"rankc": "norm"}))
    for wrong in ([-1.0], ["x"] * 10, [float("nan")] * 10, -1.0):
        rows[0]["en"]["log_likelihoods"] = wrong
        log.write_text(json.dumps(rows))
        with pytest.raises(UserError, match="item '0', en: log_likelihoods=.*; give 10 numbers"):
            score.main(SimpleNamespace(**options))


def test_weights_by_hand():
    e = np.e
    assert rank_weights(2) == pytest.approx([e / (e + 1), 1 / (e + 1)])
    assert rank_weights(3, "norm1") == pytest.approx([3 / 6, 2 / 6, 1 / 6])
    assert rank_weights(3, "norm2") == pytest.approx([9 / 14, 4 / 14, 1 / 14])
    assert all(rank_weights(n, w).sum() == pytest.approx(1) for n in (1, 2, 10) for w in WEIGHTS)
    with pytest.raises(UserError, match="'norm3': not one of softmax, norm1, norm2"):
        rank_weights(4, "norm3")


@pytest.mark.parametrize("weights", WEIGHTS)
def test_rankc_by_its_definition(weights):
    """Shares of the first j choices, with ties in the order of the choices."""
    predictions = draw()
    found = matrix(predictions, "rankc", weights=weights)
    for a, b in itertools.combinations(predictions.languages, 2):
        values = []
        for item in predictions.items:
            count = item.num_choices
            order = [
                sorted(range(count), key=lambda c, s=item.answers[x].scores: (-s[c], c))
                for x in (a, b)
            ]
            tops = [len(set(order[0][:j]) & set(order[1][:j])) / j for j in range(1, count + 1)]
            values.append(rank_weights(count, weights) @ tops)
        assert found[a, b] == found[b, a] == pytest.approx(np.mean(values), abs=1e-12)
    assert measure_pairs(predictions, weights=weights)["rankc"] == pytest.approx(
        np.mean(list(found.values())), abs=1e-12
    )


def test_a_language_that_was_not_asked_is_ranked_at_random():
    """The expectation over all its rankings; by mode "strict" it agrees with nothing."""
    scores = [-2.0, -1.0, -4.0, -3.0]
    rows = [[scores, [float(-x) for x in order]] for order in itertools.permutations(range(4))]
    expected = measure_pairs(ranked(rows))["rankc"]
    assert measure_pairs(ranked([[scores, None]]))["rankc"] == pytest.approx(expected, abs=1e-12)
    assert measure_pairs(ranked([[scores, None]]), "strict")["rankc"] == 0
    mixed = ranked([[scores, None, scores], [scores, scores, scores]])
    found = matrix(mixed, "rankc")
    assert found["en", "vi"] == pytest.approx(1)
    assert found["en", "zh"] == found["vi", "zh"] == pytest.approx((1 + expected) / 2)


def test_free_answers_have_no_rankc():
    answers = {code: Answer((0,), text="(A)") for code in ("en", "zh")}
    item = ItemAnswers("1", dict.fromkeys(answers, 0), 2, answers)
    free = Predictions("x", "generate", 1, ("en", "zh"), (item,))
    assert measure_pairs(free).keys() == {
        *("agreement_right", "transfer", "conductivity", "transfer/zh", "conductivity/zh")
    }
    assert list(tabulate_pairs({0: [free]})) == ["agreement", "agreement_right"]
    alone = replace(free, languages=("en",))
    assert measure_pairs(alone) == {} and tabulate_pairs({0: [alone]}) == {}
    with pytest.raises(UserError, match="no items"):
        measure_pairs(replace(free, items=()))


# ---- Agreement where one is right, and transfer


def with_coins():
    """Answers with coins, some languages with another right letter."""
    draw = random.Random(0)
    items = []
    for i in range(40):
        gold = {code: draw.randrange(3) for code in ("en", "zh", "vi")}
        if draw.random() < 0.5:
            gold = dict.fromkeys(gold, gold["en"])
        options = [(0,), (1,), (2,), (0, 1), (0, 2), (0, 1, 2)]
        answers = {code: Answer(draw.choice(options)) for code in gold}
        items.append(ItemAnswers(str(i), gold, 3, answers))
    return Predictions("coins", "generate", 1, ("en", "zh", "vi"), tuple(items))


@pytest.mark.parametrize("mode", ["expectation", "seaeval", "strict"])
def test_agreement_where_one_is_right_by_enumeration(mode):
    predictions = with_coins()
    p_ILC = choice_probabilities(predictions, mode, 3)
    found = LanguagePairs(predictions, mode, seed=3)
    even = np.full((1, 40), 1 / 40)
    values = found.measure("agreement_right", EVERY).weigh(even)[0]
    for (a, b), value in zip(itertools.combinations(range(3), 2), values, strict=True):
        part = whole = 0.0
        for i, item in enumerate(predictions.items):
            gold = [item.gold[predictions.languages[l]] for l in (a, b)]
            # a choice of each, or none where the mode counts an unclear answer as none
            choices = [[*enumerate(p_ILC[i, l]), (None, 1 - p_ILC[i, l].sum())] for l in (a, b)]
            for (c, p), (d, q) in itertools.product(*choices):
                is_right = c == gold[0] or d == gold[1]
                whole += p * q * is_right
                part += p * q * (is_right and c == d)
        assert value == pytest.approx(part / whole, abs=1e-12)
    agreement = found.measure("agreement", EVERY).weigh(even)[0]
    wanted = pair_agreement(predictions, mode, seed=3)[np.triu_indices(3, 1)]
    assert agreement == pytest.approx(wanted, abs=1e-12)


def test_transfer_and_conductivity_by_hand():
    """Of four items that are right in English, three are right in Spanish; guessing has 1 in 2."""
    right, wrong = [0.0, -1.0], [-1.0, 0.0]
    rows = [[right, right], [right, right], [right, right], [right, wrong], [wrong, right]]
    found = measure_pairs(ranked(rows, languages=("en", "es")))
    assert found["transfer"] == found["transfer/es"] == pytest.approx(3 / 4)
    assert found["conductivity/es"] == pytest.approx((3 / 4 - 1 / 2) / (1 - 1 / 2))
    # a third language that guesses, and items with more choices
    more = [[*row, right if i % 2 else wrong] for i, row in enumerate(rows)]
    three = measure_pairs(ranked(more, languages=("es", "English", "vi")))
    assert three["transfer/es"] == pytest.approx(3 / 4)
    assert three["conductivity"] == pytest.approx(
        (three["conductivity/es"] + three["conductivity/vi"]) / 2
    )
    tens = measure_pairs(ranked([[[0, *[-1] * 9], [-1] * 9 + [0]]], [9], ("zh", "en")))
    assert tens["conductivity"] == pytest.approx((0 - 0.1) / 0.9)


def test_without_english_or_right_answers():
    right, wrong = [0.0, -1.0], [-1.0, 0.0]
    assert "transfer" not in measure_pairs(ranked([[right, right]], languages=("zh", "es")))
    nothing = measure_pairs(ranked([[wrong, right]], languages=("en", "es")))
    assert nothing["transfer"] == nothing["conductivity"] == 0
    assert measure_pairs(ranked([[wrong, wrong]]))["agreement_right"] == 0


# ---- Intervals and tests


def test_intervals_are_those_of_resampled_items():
    """Every resample is scored as if its items were the benchmark."""
    predictions = draw(num_items=9, num_languages=3)
    weights = weigh_items(9, 0, 40)[1:]
    drawn = []
    for row in np.rint(weights * 9).astype(int):
        items = [item for item, n in zip(predictions.items, row, strict=True) for _ in range(n)]
        drawn.append(measure_pairs(replace(predictions, items=tuple(items))))
    found = bootstrap(predictions, num_resamples=40, scores=pair_scores)
    assert found.keys() == drawn[0].keys()
    for name, interval in found.items():
        wanted = np.quantile([scores[name] for scores in drawn], [0.025, 0.975])
        assert interval == pytest.approx(wanted, abs=1e-9), name


@pytest.mark.parametrize("name", MEASURES)
def test_a_table_of_pairs_is_what_two_languages_alone_give(name, monkeypatch):
    """Value, interval and paired test of every pair, whatever the number of pairs at a time."""
    sides = []
    for shift in (0, 1):  # three prompts, whose median is no mean, of two seeds on each side
        sides.append({s: [draw(20, 3, 10 * s + p + 5 * shift) for p in range(3)] for s in (0, 1)})
    base, arm = sides
    for seeds in sides:
        for several in seeds.values():  # the same items on both sides
            several[:] = [_with_gold_of(base[0][0], p) for p in several]
    table = tabulate_pairs(arm, base)[name]
    for i, j in itertools.combinations(range(3), 2):
        samples = [
            {
                seed: resample([_only(p, i, j) for p in several], _score(name), seed=seed)["x"]
                for seed, several in side.items()
            }
            for side in (arm, base)
        ]
        mean = np.mean([values[0] for values in samples[0].values()])
        spread = np.mean(list(samples[0].values()), axis=0)[1:]
        low, high = np.quantile(spread, [0.025, 0.975])
        change = paired_change(*samples)
        for field, wanted in (
            *(("value", mean), ("low", low), ("high", high)),
            *(("difference", change.difference), ("p", change.p)),
        ):
            found = getattr(table, field)
            assert found[i][j] == found[j][i] == pytest.approx(wanted, abs=1e-9), field
    assert np.diagonal(table.value).tolist() == np.diagonal(table.p).tolist() == [1, 1, 1]
    assert np.diagonal(table.difference).tolist() == [0, 0, 0]
    alone = tabulate_pairs(arm)[name]
    assert alone.value == table.value and alone.p is None and alone.difference is None
    monkeypatch.setattr(pairs, "MAX_CHUNK", 1)
    assert len(list(LanguagePairs(base[0][0]).chunks())) == 3
    one_by_one = tabulate_pairs(arm, base)[name]
    for field in ("value", "low", "high", "difference", "p"):
        assert np.allclose(getattr(one_by_one, field), getattr(table, field), atol=1e-12)


def _with_gold_of(first, second):
    """The second run's answers, on items that have the first one's gold and numbers of choices."""
    items = []
    for one, other in zip(first.items, second.items, strict=True):
        answers = {}
        for code, answer in other.answers.items():
            scores = (list(answer.scores) * 10)[: one.num_choices]
            answers[code] = Answer((int(np.argmax(scores)),), scores=tuple(scores))
        items.append(replace(one, answers=answers))
    return replace(first, items=tuple(items))


def _only(predictions, i, j):
    languages = (predictions.languages[i], predictions.languages[j])
    return replace(predictions, languages=languages)


def _score(name):
    return lambda p: {"x": pairs.MeanOverColumns(LanguagePairs(p).measure(name, EVERY))}


@pytest.mark.parametrize(("most", "has_intervals"), [(4, True), (3, False)])
def test_above_a_number_of_languages_pairs_have_a_value_alone(most, has_intervals, monkeypatch):
    monkeypatch.setattr(pair_tables, "MAX_TESTED", most)
    arm, base = {0: [draw(9, 4)]}, {0: [draw(9, 4)]}
    for table in tabulate_pairs(arm, base).values():
        assert [table.low, table.high, table.p].count(None) == (0 if has_intervals else 3)
        assert np.shape(table.value) == np.shape(table.difference) == (4, 4)


def test_arms_without_a_common_seed_or_measure_have_no_change():
    first = draw(8)
    assert tabulate_pairs({0: [first]}, {1: [first]})["rankc"].p is None
    items = tuple(
        replace(item, answers={code: replace(a, scores=None) for code, a in item.answers.items()})
        for item in first.items
    )
    without = replace(first, items=items)
    for several in ([first, without], [without, first]):  # one of two prompts has RankC
        assert list(tabulate_pairs({0: several})) == ["agreement", "agreement_right"]
    tables = tabulate_pairs({0: [first]}, {0: [without]})
    assert tables["rankc"].p is None and tables["agreement"].difference is not None
    assert np.allclose(tables["agreement"].difference, 0) and np.all(tables["agreement"].p)
