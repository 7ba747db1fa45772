"""Every number of results.json, computed once more from its definition in docs/evaluation.md."""

import itertools
import json
import random
from dataclasses import replace
from statistics import median

import numpy as np
import pytest

from crossin_jax.data.langid import identify
from crossin_jax.evaluation.confusion import measure_confusion
from crossin_jax.evaluation.metrics import choice_probabilities
from crossin_jax.evaluation.predictions import Answer, ItemAnswers, Predictions
from crossin_jax.evaluation.stats import resample_weights
from crossin_jax.report.results import write_results
from crossin_jax.report.summary import OTHERS, Run, summarise
from tests.report.pair_reference import matrix, parts_of_pairs, parts_of_scores, weigh

LANGUAGES = ("en", "zh", "es")
TEXTS = (
    "The answer is that one, which was the capital of this country.",
    "答案是第二个选项，因为它是首都。",
    "La respuesta es la segunda, porque es la capital de este país.",
    "(B)",
    "",
)


# ── the slow reference ───────────────────────────────────────────────────────────────────────────


def chances(predictions, mode, seed):
    """The probability of each choice, as nested lists: [item][language][choice]."""
    if mode == "seaeval":  # tests/evaluation/test_metrics.py shows that its coins are fair
        return choice_probabilities(predictions, mode, seed).tolist()
    return [
        [
            [
                float(c in item.answers[code].candidates)
                / len(item.answers[code].candidates)
                * (mode == "expectation" or len(item.answers[code].candidates) == 1)
                for c in range(item.num_choices)
            ]
            for code in predictions.languages
        ]
        for item in predictions.items
    ]


def ac3(accuracy, consistency):
    return 2 * accuracy * consistency / (accuracy + consistency + 1e-10)


def language_scores(right):
    """Accuracy by language, over all languages, and over those other than English."""
    scores = {"accuracy": np.mean(list(right.values()), axis=0)}
    scores |= {f"accuracy/{code}": values for code, values in right.items()}
    others = [values for code, values in right.items() if code != "en"]
    return scores | ({OTHERS: np.mean(others, axis=0)} if others else {})


def with_ac3(scores):
    return scores | {
        name.replace("consistency", "AC3"): ac3(scores["accuracy"], value)
        for name, value in scores.items()
        if name.startswith("consistency")
    }


def scores_of_items(predictions, mode, seed):
    """Each score but AC3, item by item."""
    p, codes = chances(predictions, mode, seed), predictions.languages
    scores = language_scores(
        {
            code: np.array([p[i][k][item.gold[code]] for i, item in enumerate(predictions.items)])
            for k, code in enumerate(codes)
        }
    )
    for size in range(2, len(codes) + 1):
        sets = list(itertools.combinations(range(len(codes)), size))
        scores[f"consistency_{size}"] = np.array(
            [
                sum(
                    np.prod([item[k][c] for k in chosen])
                    for chosen in sets
                    for c in range(len(item[0]))
                )
                / len(sets)
                for item in p
            ]
        )
    return scores


def bounds(predictions):
    """(least, most) of every score: the worst and the best outcome of the coins, tried one by
    one.
    """
    codes, sides = predictions.languages, []
    for pick in (min, max):
        scores = language_scores(
            {
                code: np.mean(
                    [
                        pick(c == item.gold[code] for c in item.answers[code].candidates)
                        for item in predictions.items
                    ]
                )
                for code in codes
            }
        )
        for size in range(2, len(codes) + 1):
            sets = list(itertools.combinations(range(len(codes)), size))
            scores[f"consistency_{size}"] = np.mean(
                [
                    pick(
                        np.mean([len({outcome[k] for k in chosen}) == 1 for chosen in sets])
                        for outcome in itertools.product(
                            *(item.answers[c].candidates for c in codes)
                        )
                    )
                    for item in predictions.items
                ]
            )
        sides.append(with_ac3(scores))
    return sides


def score_all(predictions, mode, seed, weights):
    """Every score on weighted items, for each row of weights."""
    items = scores_of_items(predictions, mode, seed)
    more = parts_of_scores(predictions, chances(predictions, mode, seed))
    return with_ac3({name: weights @ values for name, values in items.items()}) | {
        name: weigh(parts, weights) for name, parts in more.items()
    }


def resampled(count, seed):
    """Even weights, then those of every resample."""
    return np.vstack([np.full(count, 1 / count), resample_weights(count, 2000, seed)])


def draw(seeds, mode):
    """{seed: {score: (1 + R,)}}: the value, then that of each resample; the median over prompts."""
    drawn = {}
    for seed, several in seeds.items():
        weights = resampled(len(several[0].items), seed)
        prompts = [score_all(p, mode, seed, weights) for p in several]
        drawn[seed] = {
            name: np.median([told[name] for told in prompts], axis=0) for name in prompts[0]
        }
    return drawn


def draw_pairs(seeds, mode):
    """{measure: {(k, l): {seed: (1 + R,)}}}."""
    drawn = {}
    for seed, several in seeds.items():
        weights = resampled(len(several[0].items), seed)
        prompts = [parts_of_pairs(p, chances(p, mode, seed)) for p in several]
        for name, pairs in prompts[0].items():
            for pair in pairs:
                values = [weigh([parts[name][pair]], weights) for parts in prompts]
                by_pair = drawn.setdefault(name, {}).setdefault(pair, {})
                by_pair[seed] = np.median(values, axis=0)
    return drawn


def tables_of(seeds, base, mode):
    """The measures of language pairs with intervals and the change from the base."""
    tables, others = {}, draw_pairs(base, mode)
    for name, pairs in draw_pairs(seeds, mode).items():
        found = {}
        for pair, drawn in pairs.items():
            values = np.mean(list(drawn.values()), axis=0)
            other = {seed: {name: v} for seed, v in others.get(name, {}).get(pair, {}).items()}
            change = change_of(name, {seed: {name: v} for seed, v in drawn.items()}, other) or {}
            found[pair] = {"value": values[0], **interval(values[1:])}
            found[pair] |= {"difference": change.get("difference"), "p": change.get("p")}
        tables[name] = {
            field: None
            if any(values[field] is None for values in found.values())
            else matrix({pair: values[field] for pair, values in found.items()}, diagonal, range(3))
            for field, diagonal in zip(
                ("value", "low", "high", "difference", "p"), (1.0, 1.0, 1.0, 0.0, 1.0), strict=True
            )
        }
    return tables


def interval(values):
    return dict(zip(("low", "high"), np.quantile(values, [0.025, 0.975]), strict=True))


def change_of(name, mine, base):
    """The difference from the first arm, or None where no seed is common."""
    deltas = [mine[seed][name] - base[seed][name] for seed in mine if seed in base]
    if not deltas:
        return None
    deltas, mean = (np.where(np.abs(d) < 1e-12, 0, d) for d in (deltas, np.mean(deltas, axis=0)))
    below, above = sum(mean[1:] <= 0), sum(mean[1:] >= 0)
    p = float(min(1, 2 * (1 + min(below, above)) / 2001))
    signs = {np.sign(delta[0]) for delta in deltas}
    return {
        "difference": mean[0],
        **interval(mean[1:]),
        "p": p,
        "clear": bool(p < 0.05 and signs in ({1.0}, {-1.0})),
    }


def share(values, of):
    return len(values) / len(of) if len(of) else None


def readings_of(runs, code):
    """What docs/evaluation.md says of the free answers in one language."""
    answers = [item.answers[code] for p in runs for item in p.items]
    languages = [told for a in answers if (told := identify(a.text, code))]
    confusion = measure_confusion([a.text for a in answers], code)
    certain = [a for a in answers if len(a.own) == 1]
    both = [a for a in certain if len(a.candidates) == 1]
    return {
        "num_answers": len(answers),
        "identified": share(languages, answers),
        "off_target": share([x for x in languages if x != code], languages),
        "own_certain": share(certain, answers),
        "agreement": share([a for a in both if a.own == a.candidates], both),
        "line_pass": confusion.line_pass,
        "word_pass": confusion.word_pass,
    }


def chances_of(counts, size):
    """Agreement of guesses, by listing all of them, and AC3 of that."""
    agree = np.mean(
        [
            np.mean([len(set(guess)) == 1 for guess in itertools.product(range(k), repeat=size)])
            for k in counts
        ]
    )
    right = np.mean([1 / k for k in counts])
    return {
        f"consistency_{size}": agree,
        f"AC3_{size}": 2 * right * agree / (right + agree + 1e-10),
    }


def widen(scores, count):
    """Wilson's intervals: the shares p whose score test does not reject the value x.

    Their ends solve (x - p)² = z² p (1 - p) / n. AC3 has the ends of accuracy and consistency.
    """
    z2 = 1.959963984540054**2 / count

    def ends(x):
        return sorted(np.roots([1 + z2, -2 * x - z2, x * x]).real)

    def harmonic(pair):
        return 2 * pair[0] * pair[1] / (sum(pair) + 1e-10)

    wide = {
        name: ends(score["value"])
        for name, score in scores.items()
        if name.startswith(("accuracy", "consistency_"))
    }
    for name in [name for name in scores if name.startswith("AC3_")]:
        both = wide["accuracy"], wide[name.replace("AC3", "consistency")]
        wide[name] = [harmonic(pair) for pair in zip(*both, strict=True)]
    for name, (low, high) in wide.items():
        scores[name] |= {"low": max(low, 0.0), "high": min(high, 1.0)}


def row_of(arm, seeds, base, mode, is_baseline=False):
    """One arm as results.json has it; `seeds` holds its predictions by seed, one per prompt."""
    drawn, runs = draw(seeds, mode), [p for several in seeds.values() for p in several]
    coins = [list(map(bounds, several)) for several in seeds.values()]
    scores = {}
    for name in next(iter(drawn.values())):
        values = [told[name][0] for told in drawn.values()]
        least, most = (
            float(
                np.mean(
                    [median(found[side].get(name, 0) for found in several) for several in coins]
                )
            )
            for side in (0, 1)
        )
        is_open = mode == "expectation" and most - least > 1e-9
        scores[name] = {
            "value": np.mean(values),
            **interval(np.mean([t[name][1:] for t in drawn.values()], 0)),
            "sd": np.std(values, ddof=1) if len(values) > 1 else None,
            "least": least if is_open else None,
            "most": most if is_open else None,
            "change": change_of(name, drawn, base) if base else None,
        }
    if len(runs[0].items) < 50:
        widen(scores, len(runs[0].items))
    numbers = [tuple(p.prompt for p in several) for several in seeds.values()]
    means = {
        seed: [
            {
                name: values[0]
                for name, values in score_all(p, mode, seed, resampled(len(p.items), seed)).items()
            }
            for p in several
        ]
        for seed, several in seeds.items()
    }
    matrices = [
        [
            [
                1.0 if a == b else np.mean([np.dot(item[a], item[b]) for item in p])
                for b in range(len(LANGUAGES))
            ]
            for a in range(len(LANGUAGES))
        ]
        for seed, several in seeds.items()
        for p in (chances(one, mode, seed) for one in several)
    ]
    return {
        "arm": arm,
        "seeds": list(seeds),
        "num_items": len(runs[0].items),
        "scores": scores,
        "seed_scores": {
            str(seed): {name: told[0] for name, told in by_name.items()}
            for seed, by_name in drawn.items()
        },
        "prompts": {
            str(number): {
                name: np.mean([several[i][name] for several in means.values()]) for name in scores
            }
            for i, number in enumerate(numbers[0])
        }
        if len(set(numbers)) == 1
        else {},
        "agreement": np.mean(matrices, 0).tolist(),
        "coin_share": {
            code: {
                reason: np.mean(
                    [
                        (lambda a: len(a.candidates) > 1 and a.reason == reason)(item.answers[code])
                        for p in runs
                        for item in p.items
                    ]
                )
                for reason in dict.fromkeys(
                    (
                        "tie",
                        "empty",
                        "unreadable",
                        *(
                            item.answers[code].reason
                            for p in runs
                            for item in p.items
                            if len(item.answers[code].candidates) > 1
                        ),
                    )
                )
            }
            for code in LANGUAGES
        },
        "readings": {code: readings_of(runs, code) for code in LANGUAGES}
        if runs[0].method == "generate"
        else {},
        "is_baseline": is_baseline,
        "pairs": {},
    }


# ── made-up runs ─────────────────────────────────────────────────────────────────────────────────


def make(seed, method, prompt, skill, count=14):
    """Answers with ties, empty and unreadable ones, to items with two to four choices."""
    rng = random.Random(f"{seed}/{method}/{prompt}/{skill}")
    items = []
    for i in range(count):
        num_choices = 2 + i % 3
        gold = {code: (i + (code == "es")) % num_choices for code in LANGUAGES}
        answers = {}
        for code in LANGUAGES:
            known, every = rng.random() < skill[code], tuple(range(num_choices))
            picked = (gold[code],) if known else (rng.randrange(num_choices),)
            text = rng.choice(TEXTS) if method == "generate" else None
            ranks = random.Random(f"{seed}/{prompt}/{skill}/{i}/{code}")
            scores = [float(c in picked) - ranks.random() for c in every]
            answer = Answer(
                picked,
                text=text,
                scores=tuple(scores) if method == "sum" else None,
                own=rng.choice((picked, every)) if text is not None else None,
            )
            if method == "generate" and rng.random() < 0.4:
                answer = rng.choice(
                    (
                        replace(answer, candidates=(0, 1), reason="tie"),
                        replace(answer, candidates=every, reason="empty"),
                        replace(answer, candidates=every, reason="too_long"),
                    )
                )
            answers[code] = answer
        items.append(ItemAnswers(f"q{i}", gold, num_choices, answers, ("rare",) if i < 9 else ()))
    return Predictions("made", method, prompt, LANGUAGES, tuple(items))


SKILLS = {
    "base": {"en": 0.7, "zh": 0.2, "es": 0.2},
    "x2x": {"en": 0.6, "zh": 0.9, "es": 0.8},
    "mono": {"en": 0.7, "zh": 0.3, "es": 0.3},
    "late": {"en": 0.8, "zh": 0.5, "es": 0.4},
}
ARMS = {
    "base": {1: (1, 3, 4), 2: (1, 3, 4)},
    "x2x": {1: (1, 3), 2: (1, 3)},
    "mono": {2: (1, 3, 4), 3: (1, 3, 5)},
    "late": {3: (1,)},
}


def turn(predictions):
    """The same answers with items and languages in another order."""
    return replace(predictions, items=predictions.items[::-1], languages=LANGUAGES[::-1])


def expect_block(method, tag, mode):
    """A block of results.json, from the reference."""

    def narrow(p):
        return replace(p, items=tuple(i for i in p.items if tag is None or tag in i.tags))

    arms = {
        arm: {
            seed: [narrow(make(seed, method, n, SKILLS[arm])) for n in numbers]
            for seed, numbers in seeds.items()
        }
        for arm, seeds in ARMS.items()
    }
    base = draw(arms["base"], mode)
    rows = [row_of(arm, seeds, {} if arm == "base" else base, mode) for arm, seeds in arms.items()]
    rule = narrow(make(0, "rule", 0, SKILLS["base"]))
    rows.append(row_of("strings", {1: [rule]}, {}, mode, is_baseline=True))
    if tag is None:  # pairs are for whole benchmarks
        for row, (arm, seeds) in zip(rows, (*arms.items(), ("", {1: [rule]})), strict=True):
            row["pairs"] = tables_of(seeds, arms["base"] if arm in list(arms)[1:] else {}, mode)
    items = arms["base"][1][0].items
    return {
        "benchmark": "made",
        "method": method,
        "tag": tag,
        "languages": list(LANGUAGES),
        "num_items": len(items),
        "chance": np.mean([1 / i.num_choices for i in items]),
        "rows": rows,
        "kind": "parallel",
        "chances": chances_of([i.num_choices for i in items], min(3, len(LANGUAGES))),
    }


def assert_same(found, expected, place="results.json"):
    """The same keys, texts and numbers, the latter up to rounding."""
    if isinstance(expected, dict):
        assert isinstance(found, dict) and found.keys() == expected.keys(), place
        for key, value in expected.items():
            assert_same(found[key], value, f"{place}.{key}")
    elif isinstance(expected, list):
        assert isinstance(found, list) and len(found) == len(expected), place
        for i, value in enumerate(expected):
            assert_same(found[i], value, f"{place}[{i}]")
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, abs=1e-9), place
    else:
        assert (found, type(found)) == (expected, type(expected)), place


@pytest.mark.parametrize("mode", ["expectation", "seaeval", "strict"])
def test_every_field_of_results_json_follows_from_its_definition(mode, tmp_path):
    """Several arms, seeds, prompts, methods, a tag and a rule: all fields equal the reference."""
    runs = [
        Run(
            arm,
            seed,
            [
                (turn if arm == "x2x" else lambda p: p)(make(seed, method, n, SKILLS[arm]))
                for method in ("generate", "sum")
                for n in numbers
            ],
            {"device": arm},
        )
        for arm, seeds in ARMS.items()
        for seed, numbers in seeds.items()
    ]
    rules = {"strings": [make(0, "rule", 0, SKILLS["base"])]}
    write_results(tmp_path, runs, {"commit": "abc"}, baselines=rules, mode=mode, title="A title")
    found = json.loads((tmp_path / "results.json").read_text())
    blocks = found.pop("blocks")
    assert_same(
        found,
        {
            "format": 1,
            "title": "A title",
            "mode": mode,
            "rankc": "softmax",
            "level": 0.95,
            "resamples": 2000,
            "provenance": {"commit": "abc"},
            "runs": [
                {"name": run.name, "seed": run.seed, "provenance": {"device": run.name}}
                for run in runs
            ],
        },
    )
    assert_same(
        blocks,
        [
            expect_block(method, tag, mode)
            for method in ("generate", "sum")
            for tag in (None, "rare")
        ],
    )
    changes = [
        score["change"]
        for block in blocks
        for row in block["rows"]
        for score in row["scores"].values()
        if score["change"]
    ]
    assert any(change["clear"] for change in changes)  # the table holds clear differences
    assert any(0.05 < change["p"] < 1 for change in changes)  # and others


def test_the_resampled_items_depend_on_the_seed_alone():
    """Arms of one seed are resampled alike; two seeds apart, so that their mean varies less."""
    twice = [
        Run(arm, seed, [make(0, "sum", 1, SKILLS["base"], count=80)])
        for arm in ("one", "two")
        for seed in (1, 2)
    ]
    both = summarise(twice)[0].rows
    alone = [summarise([run for run in twice if run.seed == seed])[0].rows[0] for seed in (1, 2)]
    for name, estimate in both[0].scores.items():
        assert both[1].scores[name].change.low == both[1].scores[name].change.high == 0
        width = np.mean([row.scores[name].high - row.scores[name].low for row in alone])
        assert estimate.high - estimate.low == pytest.approx(width / np.sqrt(2), rel=0.1), name


@pytest.mark.parametrize("order", ["forward", "backward"])
def test_english_answers_do_not_move_accuracy_outside_english(order):
    """Value, interval, bounds, difference and spread of "other languages" leave English out."""
    runs = [
        [
            Run(arm, seed, [make(seed, "generate", 1, SKILLS[arm])])
            for arm in ("base", "x2x")
            for seed in (1, 2)
        ]
        for _ in range(2)
    ]
    for run in runs[1]:  # every English answer becomes wrong
        run.predictions[0] = replace(
            run.predictions[0],
            items=tuple(
                replace(
                    item,
                    answers=item.answers
                    | {
                        "en": Answer(
                            ((item.gold["en"] + 1) % item.num_choices,), text="x", own=(0,)
                        )
                    },
                )
                for item in run.predictions[0].items
            ),
        )
    if order == "backward":
        runs = [
            [replace(run, predictions=list(map(turn, run.predictions))) for run in some]
            for some in runs
        ]
    before, after = (summarise(some)[0].rows for some in runs)
    for one, other in zip(before, after, strict=True):
        assert one.scores["accuracy/en"] != other.scores["accuracy/en"]
        assert one.scores[OTHERS] == other.scores[OTHERS]
        assert [told[OTHERS] for told in one.seed_scores.values()] == [
            told[OTHERS] for told in other.seed_scores.values()
        ]


def test_a_tag_makes_a_block_where_some_items_lack_it():
    """Tags follow the whole benchmark, in the order of the items; one that all items have is no
    part.
    """
    items = make(0, "sum", 1, SKILLS["base"]).items
    tags = [
        ("all", "late") if i > 4 else ("all", "early") if i == 2 else ("all",)
        for i in range(len(items))
    ]
    tagged = tuple(replace(item, tags=tag) for item, tag in zip(items, tags, strict=True))
    blocks = summarise([Run("base", 1, [Predictions("made", "sum", 1, LANGUAGES, tagged)])])
    assert [(block.tag, block.num_items) for block in blocks] == [
        (None, 14),
        ("early", 1),
        ("late", 9),
    ]


@pytest.mark.parametrize("english", ["en", "English"])
def test_english_is_known_by_its_code_and_by_its_name(english):
    """Logs have languages by name: English is left out of the others and has a column of its
    own.
    """
    names = {"en": english, "zh": "Chinese", "es": "es"}
    p = make(1, "generate", 1, SKILLS["base"])
    items = tuple(
        replace(
            item,
            gold={names[c]: g for c, g in item.gold.items()},
            answers={names[c]: a for c, a in item.answers.items()},
        )
        for item in p.items
    )
    renamed = replace(p, languages=tuple(names.values()), items=items)
    block, other = (summarise([Run("base", 1, [one])])[0] for one in (renamed, p))
    assert block.headline == ("accuracy", f"accuracy/{english}", OTHERS, "consistency_3", "AC3_3")
    for name in ("accuracy", OTHERS, "consistency_3", "AC3_3"):
        assert block.rows[0].scores[name] == other.rows[0].scores[name]
    assert block.rows[0].readings["Chinese"] == other.rows[0].readings["zh"]
