"""Reports with 12, 42 and 200 languages: figures that can be read, small files, in seconds."""

import itertools
import json
import re
import time
from dataclasses import replace
from functools import cache

import numpy as np
import pytest

from crossin_jax.evaluation.items import Benchmark, Item, Version
from crossin_jax.evaluation.metrics import MAX_LISTED, evaluate
from crossin_jax.evaluation.pair_tables import MAX_TESTED
from crossin_jax.evaluation.pairs import measure_pairs
from crossin_jax.evaluation.predictions import Answer, ItemAnswers, Predictions
from crossin_jax.evaluation.seaeval import read_log, write_log
from crossin_jax.languages import find_code, name_script, script_of
from crossin_jax.report import page
from crossin_jax.report.figures import draw_curves
from crossin_jax.report.heat_maps import (
    LINE,
    OTHER,
    draw_languages,
    draw_pair_changes,
    draw_pairs,
    group_languages,
)
from crossin_jax.report.results import read_rules, write_results
from crossin_jax.report.summary import Run, summarise
from crossin_jax.report.text import describe_block
from crossin_jax.report.wording import group_scores, number

# the languages of Global-MMLU
GLOBAL_MMLU = (
    "en am ar bn cs de el es fa fil fr ha he hi id ig it ja ko ky lt mg ms ne nl ny pl pt ro ru si "
    "sn so sr sv sw te tr uk vi yo zh"
)
MANY = GLOBAL_MMLU.split()
FEW = ["en", "zh", "vi", "es", "ar", "de", "el", "hi", "ro", "ru", "th", "tr"]


def make(languages, skill=0.5, num_items=20, seed=0):
    """Log-likelihoods of three choices by item and language, the first one right."""
    rng = np.random.default_rng(seed)
    scores = rng.normal(size=(num_items, len(languages), 3)) + rng.normal(size=(num_items, 1, 3))
    scores[:, :, 0] += skill
    items = []
    for i, row in enumerate(scores):
        answers = {
            code: Answer((int(values.argmax()),), scores=tuple(values.tolist()))
            for code, values in zip(languages, row, strict=True)
        }
        items.append(ItemAnswers(f"q{i}", dict.fromkeys(languages, 0), 3, answers))
    return Predictions("made", "sum", 1, tuple(languages), tuple(items))


@cache
def block_of(languages):
    runs = [Run(f"arm {a}", 1, [make(languages, 0.3 + a, 20, a)]) for a in range(2)]
    return summarise(runs)[0]


@pytest.fixture
def few():
    return block_of(tuple(FEW))


@pytest.fixture
def many():
    return block_of(tuple(MANY))


# ---- Order


def test_few_languages_keep_their_order():
    assert group_languages(FEW) == {"": FEW} and group_languages(("zh", "en")) == {"": ["zh", "en"]}


def test_many_languages_stand_by_script():
    groups = group_languages(MANY)
    assert list(groups) == ["Latin", "Arabic", "Devanagari", "Cyrillic", OTHER]
    assert groups["Arabic"] == ["ar", "fa"] and groups["Devanagari"] == ["hi", "ne"]
    assert sorted(itertools.chain(*groups.values())) == sorted(MANY)
    for name, codes in groups.items():
        scripts = [name_script(script_of(code)) for code in codes]
        assert len(set(scripts)) == (len(codes) if name == OTHER else 1)
        assert codes == sorted(codes, key=MANY.index)
    mixed = [*MANY, "zh-Hant"]  # both ways to write Chinese are Han
    assert group_languages(mixed)["Han"] == ["zh", "zh-Hant"]
    assert name_script("Zzzx") == "Zzzx"


# ---- Figures


def test_every_accuracy_of_many_languages_is_in_its_cell(many):
    """In lines of equal cells, with the language below and the arm on the left."""
    figure, found, scripts = draw_languages({"": many}), {}, []
    for axes in figure.axes:
        codes = {int(t): label.get_text() for t, label in ticks(axes)}
        texts = {tuple(map(round, text.get_position())): text.get_text() for text in axes.texts}
        scripts += [text for text in texts.values() if text in group_languages(MANY)]
        assert len(codes) <= LINE and axes.get_xlim() == (-0.5, LINE - 0.5)
        for (column, row), text in texts.items():
            if column in codes and row >= 0:
                found[codes[column], row] = text
    wanted = {
        (code, i): number(row.scores[f"accuracy/{code}"].value)
        for i, row in enumerate(many.rows)
        for code in MANY
    }
    assert found == wanted
    assert dict.fromkeys(scripts) == dict.fromkeys(group_languages(MANY))
    both = draw_languages({"one": many, "two": many})
    assert len(both.axes) == 2 * len(figure.axes)
    assert [axes.get_title() for axes in both.axes if axes.get_title()] == ["one", "two"]


def ticks(axes):
    return zip(axes.get_xticks(), axes.get_xticklabels(), strict=True)


@pytest.mark.parametrize("name", ["rankc", "agreement", "agreement_right"])
def test_every_pair_is_in_its_cell(name, few, many):
    """With numbers for few languages; by script and with a colour bar for many."""
    for block in (few, many):
        has_numbers = block is few
        maps = [axes for axes in draw_pairs(block, name).axes if axes.images]
        order = [*itertools.chain(*group_languages(block.languages).values())]
        for axes, row in zip(maps, block.rows, strict=True):
            values = row.pairs[name].value
            shown = np.asarray(axes.images[0].get_array().filled(np.nan))
            for (i, a), (j, b) in itertools.product(enumerate(order), repeat=2):
                wanted = values[block.languages.index(a)][block.languages.index(b)]
                assert np.isnan(shown[i, j]) if i == j else abs(shown[i, j] - wanted) < 1e-12
            labels = [label.get_text() for label in axes.get_xticklabels()]
            assert labels == [label.get_text() for label in axes.get_yticklabels()] == order
            assert len(axes.texts) == (len(order) * (len(order) - 1) if has_numbers else 0)
            low, high = axes.images[0].get_clim()
            if has_numbers:
                assert (low, high) == (0, 1)
            else:  # the colours span the values that occur in any arm
                assert 0 <= low <= np.nanmin(shown) < np.nanmax(shown) <= high <= 1
            (top,) = axes.child_axes or (None,)
            if top:
                assert [t.get_text() for t in top.get_xticklabels()] == list(group_languages(MANY))
        assert len(draw_pairs(block, name).axes) == len(maps) * (1 if has_numbers else 2)


def test_a_change_is_marked_where_its_test_says_so(few, many):
    for block in (few, many):
        figure = draw_pair_changes(block, "rankc")
        axes = figure.axes[0]
        order = [*itertools.chain(*group_languages(block.languages).values())]
        place = [block.languages.index(code) for code in order]
        table = block.rows[1].pairs["rankc"]
        assert axes.get_title() == "arm 1"
        shown = np.asarray(axes.images[0].get_array().filled(0))
        assert np.array_equal(shown, np.array(table.difference)[np.ix_(place, place)])
        clear = np.array(table.p)[np.ix_(place, place)] < 0.05
        marked = {(round(y - 0.1), round(x)) for x, y in axes.collections[0].get_offsets().tolist()}
        assert marked == {(y, x) for y, x in zip(*np.nonzero(clear), strict=True)} and marked
        low, high = axes.images[0].get_clim()
        assert -low == high == pytest.approx(np.abs(shown).max())
        dots = zip(axes.collections[0].get_facecolors(), sorted(marked), strict=True)
        for colour, cell in dots:  # a dot can be seen on the darkest colours too
            assert colour[:3].tolist() == [float(abs(shown[cell]) > 0.6 * high)] * 3


def test_nothing_is_marked_where_no_change_is_clear(few):
    base, arm = few.rows
    table = arm.pairs["rankc"]
    pairs = {"rankc": replace(table, p=np.ones_like(table.p).tolist())}
    block = replace(few, rows=(base, replace(arm, pairs=pairs)))
    (axes,) = draw_pair_changes(block, "rankc").axes
    assert len(axes.collections[0].get_offsets()) == 0
    grey = axes.get_facecolor()[:3]  # a language beside itself is not a change of 0
    assert len({round(part, 3) for part in grey}) == 1 and 0.5 < grey[0] < 0.95


def test_many_scores_stand_in_groups(many):
    groups = group_scores(many.rows[0].scores)
    assert list(groups) == [
        *("Overall", "Accuracy by language", "By number of languages s"),
        *("Transfer from English", "Conductivity from English"),
    ]
    assert groups["Overall"] == [
        *("accuracy", "accuracy/others", "rankc", "agreement_right", "transfer", "conductivity")
    ]
    assert groups["Accuracy by language"] == [f"accuracy/{code}" for code in MANY]
    assert groups["Conductivity from English"] == [f"conductivity/{code}" for code in MANY[1:]]
    sizes = [f"{name}_{s}" for name in ("consistency", "AC3") for s in range(2, 13)]
    assert groups["By number of languages s"] == sizes
    assert "42 languages" in describe_block(many)
    assert "en zh vi" in describe_block(block_of(tuple(FEW)))


# ---- The whole report


def questions(languages, count):
    versions = {
        code: Version(f"Question in {code}?", ("(A) one", "(B) two", "(C) three"), 0, None)
        for code in languages
    }
    items = tuple(Item(f"q{i}", versions, ()) for i in range(count))
    return Benchmark(name="made", languages=tuple(languages), items=items, source="made")


def world(count):
    """Codes of languages: those of Global-MMLU, then what CLDR has names for."""
    from babel import Locale

    codes = dict.fromkeys((*MANY, *filter(None, map(find_code, Locale.parse("en").languages))))
    return tuple(codes)[:count]


@pytest.mark.parametrize("count, seconds", [(42, 15), (200, 25)])
def test_a_report_takes_seconds(count, seconds, tmp_path):
    """CPU time of this process; consistency of every s, small files, and the documented limits."""
    languages = world(count)
    predictions, start = make(languages, num_items=25), time.process_time()
    runs = [Run("base", 1, [predictions])]
    (block,) = write_results(tmp_path, runs, benchmarks=[questions(languages, 25)])
    assert time.process_time() - start < seconds
    (row,) = block.rows
    scores = evaluate(predictions)
    assert scores.combinations == {} and count > MAX_LISTED
    assert [f"consistency_{s}" in row.scores for s in range(2, count + 1)] == [True] * (count - 1)
    assert row.scores["consistency_2"].value == pytest.approx(
        np.mean(np.array(row.agreement)[np.triu_indices(count, 1)]), abs=1e-12
    )
    assert (row.pairs["rankc"].low is None) == (count > MAX_TESTED)
    assert np.shape(row.pairs["rankc"].value) == (count, count)
    html = (tmp_path / "report.html").read_text()
    assert len(html) < 3e6 and (tmp_path / "results.json").stat().st_size < 12e6
    data = json.loads(re.search(r'id="data">(.*?)</script>', html, re.DOTALL)[1])
    assert len(data["items"]) == min(25, page.MAX_QUESTIONS // count)
    assert html.count("Consistency_12") and not html.count("Consistency_13")


# ---- What uses the measures


def test_curves_of_a_study_have_a_panel_of_rankc(few):
    """Where the arms have it; it shows the score at each x."""
    figure = draw_curves("examples", {10.0: few, 20.0: few})
    panels = {axes.get_ylabel(): axes for axes in figure.axes}
    assert list(panels) == ["AC3_3", "Other languages", "RankC"]
    for line, row in zip(panels["RankC"].lines[::3], few.rows, strict=True):
        assert list(line.get_ydata()) == [row.scores["rankc"].value] * 2
    without = replace(
        few,
        rows=tuple(
            replace(row, scores={n: e for n, e in row.scores.items() if n != "rankc"})
            for row in few.rows
        ),
    )
    assert len(draw_curves("examples", {10.0: without, 20.0: without}).axes) == 2
    assert few.headline[-1] == "rankc" and without.headline[-1] == few.main_score == "AC3_3"


def test_a_comparison_counts_as_the_first_results_did(tmp_path):
    runs = [Run("base", 1, [make(("en", "zh"))])]
    write_results(tmp_path / "a", runs, mode="strict", rankc="norm1")
    assert read_rules(tmp_path / "a") == {"mode": "strict", "rankc": "norm1"}
    usual = {"mode": "expectation", "rankc": "softmax"}
    assert read_rules(tmp_path / "absent") == usual
    (tmp_path / "a" / "results.json").write_text('{"format": 1}')  # of an earlier version
    assert read_rules(tmp_path / "a") == usual
    (tmp_path / "a" / "results.json").write_text("[")
    assert read_rules(tmp_path / "a") == usual


def test_a_written_log_keeps_the_log_likelihoods(tmp_path):
    """`score` finds the same RankC in the log as the evaluation had."""
    predictions = make(("en", "zh", "es"), num_items=6)
    items = questions(("en", "zh", "es"), 6).items
    write_log(tmp_path / "log.json", items, predictions)
    found = read_log(tmp_path / "log.json")
    for one, other in zip(found.items, predictions.items, strict=True):
        assert [a.scores for a in one.answers.values()] == [
            a.scores for a in other.answers.values()
        ]
    assert measure_pairs(found)["rankc"] == measure_pairs(predictions)["rankc"]
