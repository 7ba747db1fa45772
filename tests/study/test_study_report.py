"""A study's figures and files show the numbers of its tables' own reports."""

import json
import random

import numpy as np
import pytest

from crossin_jax.config import Contrast, Study, UserError
from crossin_jax.evaluation.predictions import Answer, ItemAnswers, Predictions
from crossin_jax.report.figures import (
    differ,
    draw_contrast,
    draw_curves,
    to_svg,
)
from crossin_jax.report.heat_maps import draw_languages
from crossin_jax.report.summary import OTHERS, Run, summarise
from crossin_jax.study.report import (
    Table,
    draw_figures,
    find,
    from_json,
    questions,
    slug,
    write_study,
)

LANGUAGES = ("en", "zh", "es")
SIZES = {"25 %": 25.0, "50 %": 50.0, "100 %": 100.0}
ARMS = {"base": 0.2, "pairs": 0.7, "mono": 0.5}


def make(arm, seed, table, method="sum", benchmark="made"):
    """Answers of an arm, some tagged; English is mostly right."""
    rng = random.Random(f"{arm}/{seed}/{table}/{method}")
    return Predictions(
        benchmark,
        method,
        1,
        LANGUAGES,
        tuple(
            ItemAnswers(
                f"q{i}",
                dict.fromkeys(LANGUAGES, i % 3),
                3,
                {
                    code: Answer(((i + (rng.random() > (0.8 if code == "en" else ARMS[arm]))) % 3,))
                    for code in LANGUAGES
                },
                ("rare",) * (i < 9),
            )
            for i in range(24)
        ),
    )


def runs_of(table, seeds):
    return [
        Run(arm, seed, [make(arm, seed, table, method) for method in ("sum", "mean", "byte")])
        for arm, numbers in seeds.items()
        for seed in numbers
    ]


SEEDS = {"base": (1, 2), "pairs": (2, 3, 1), "mono": (3, 2)}


@pytest.fixture(scope="module")
def blocks():
    """The blocks of three tables; "mono" is not in the last."""
    return {
        table: summarise(
            runs_of(
                table,
                {arm: seeds for arm, seeds in SEEDS.items() if (arm, table) != ("mono", "100 %")},
            )
        )
        for table in SIZES
    }


@pytest.fixture(scope="module")
def study():
    return Study(
        name="Sizes",
        output_dir="out",
        cells=(),
        curves={
            "share, %": {x: table for table, x in SIZES.items()},
            "one": {25.0: "25 %", 1.0: "nowhere"},
        },
        contrasts=(
            Contrast(
                title="Over base",
                arms=("pairs", "mono"),
                control="base",
                tables=("100 %", "25 %", "nowhere"),
            ),
            Contrast(title="Nothing", arms=("pairs",), control="base", tables=("nowhere",)),
        ),
    )


def rows_of(blocks, table):
    return {row.arm: row for row in find(blocks[table], "made", "sum").rows}


# ── figures ──────────────────────────────────────────────────────────────────────────────────────


def test_an_arm_differs_from_its_control_seed_by_seed(blocks):
    """One difference for each seed that both arms have, whatever their order."""
    rows = rows_of(blocks, "25 %")
    for arm, control, common in (
        ("pairs", "base", [2, 1]),
        ("mono", "base", [2]),
        ("mono", "pairs", [3, 2]),
        ("base", "pairs", [1, 2]),
    ):
        for name in (OTHERS, "AC3_3"):
            assert differ(rows[arm], rows[control], name) == pytest.approx(
                [
                    rows[arm].seed_scores[seed][name] - rows[control].seed_scores[seed][name]
                    for seed in common
                ]
            )


def test_a_contrast_shows_every_seed_and_the_mean(blocks, study):
    """Per table and arm a bar as long as the mean difference and a dot for each common seed."""
    contrast, here = (
        study.contrasts[0],
        {t: find(blocks[t], "made", "sum") for t in ("100 %", "25 %")},
    )
    axes = draw_contrast(contrast, here).axes
    assert [a.get_xlabel() for a in axes] == ["AC3_3, difference", "Other languages, difference"]
    # From below.
    assert [label.get_text() for label in axes[0].get_yticklabels()] == [
        "25 %",
        "100 %",
    ]
    for panel, name in zip(axes, ("AC3_3", OTHERS), strict=True):
        expected = {}
        for place, table in enumerate(("25 %", "100 %")):
            rows = rows_of(blocks, table)
            for arm, shift in (("pairs", 0.2), ("mono", -0.2)):
                if arm in rows:
                    expected[round(place + shift, 6)] = differ(rows[arm], rows["base"], name)
        bars = {
            round(bar.get_y() + bar.get_height() / 2, 6): bar.get_width() for bar in panel.patches
        }
        dots = {
            round(line.get_ydata()[0], 6): list(line.get_xdata())
            for line in panel.lines
            if line.get_marker() == "o"
        }
        assert bars == pytest.approx({place: np.mean(values) for place, values in expected.items()})
        assert dots == expected and sorted(map(len, dots.values())) == [1, 2, 2]


def test_curves_show_value_and_deviation_over_seeds(blocks):
    """Every arm of more than one table is a line over x, with the deviation over its seeds."""
    here = {x: find(blocks[table], "made", "sum") for table, x in list(SIZES.items())[::-1]}
    figure = draw_curves("share, %", here)
    for panel, name in zip(figure.axes, ("AC3_3", OTHERS), strict=True):
        lines = {container.get_label(): container for container in panel.containers}
        assert list(lines) == ["base", "pairs", "mono"]
        for arm, container in lines.items():
            tables = [table for table in SIZES if arm in rows_of(blocks, table)]
            line, _, (bars,) = container
            estimates = [rows_of(blocks, table)[arm].scores[name] for table in tables]
            assert list(line.get_xdata()) == [SIZES[table] for table in tables]
            assert list(line.get_ydata()) == [e.value for e in estimates]
            for (low, high), e in zip(bars.get_segments(), estimates, strict=True):
                assert (low[1], high[1]) == pytest.approx((e.value - e.sd, e.value + e.sd))
        assert panel.get_xlabel() == "share, %" and list(panel.get_xticks()) == [25, 50, 100]


def test_heat_maps_show_accuracy_by_language(blocks):
    """A map per table, a line per arm and a column per language; the numbers stand in the cells."""
    figure = draw_languages(
        {table: find(several, "made", "sum") for table, several in blocks.items()}
    )
    for panel, table in zip(figure.axes, SIZES, strict=True):
        rows = rows_of(blocks, table)
        values = [
            [row.scores[f"accuracy/{code}"].value for code in LANGUAGES] for row in rows.values()
        ]
        assert panel.get_title() == table
        assert np.asarray(panel.images[0].get_array()).tolist() == values
        assert panel.images[0].get_clim() == (0, 1)
        assert [label.get_text() for label in panel.get_xticklabels()] == list(LANGUAGES)
        assert [label.get_text() for label in panel.get_yticklabels()] == list(rows)
        assert [text.get_text() for text in panel.texts] == [
            f"{value:.3f}".lstrip("0") for row in values for value in row
        ]


def test_a_figure_gives_the_same_text_twice(blocks):
    here = {25.0: find(blocks["25 %"], "made", "sum"), 50.0: find(blocks["50 %"], "made", "sum")}
    assert to_svg(draw_curves("x", here)) == to_svg(draw_curves("x", here))


def test_figures_are_drawn_of_what_is_there(blocks, study):
    """Curves need two of their tables and contrasts one; each benchmark is shown by its first
    method.
    """
    figures = draw_figures(study, blocks)
    assert {name: caption for name, (caption, _) in figures.items()} == {
        "share-percent-made": "share, %: made, choice by summed log-likelihood",
        "over-base-made": "Over base: made, choice by summed log-likelihood; a dot per seed, the "
        "bar is their mean",
        "languages-made": "Accuracy by language: made, choice by summed log-likelihood",
    }
    assert slug("25 %, x2x + Trans") == "25-percent-x2x-trans"


# ── files ────────────────────────────────────────────────────────────────────────────────────────

SHORT = {"value": "value", "low": "low", "high": "high", "sd": "sd"}


@pytest.fixture(scope="module")
def written(study, tmp_path_factory):
    """(folder, blocks) of a study that was written with three tables and a rule."""
    folder = tmp_path_factory.mktemp("study")
    tables = [
        Table(table, runs_of(table, SEEDS), {"strings": [make("base", 0, table, "rule")]})
        for table in SIZES
    ]
    return folder, write_study(folder, study, tables, "strict")


def test_the_study_says_what_its_tables_say(written):
    """results.json of the study has, for every arm, the numbers of its table's own results.json."""
    folder, blocks = written
    results = json.loads((folder / "results.json").read_text())
    assert (results["format"], results["title"], results["mode"]) == (1, "Sizes", "strict")
    assert list(results["tables"]) == list(SIZES)
    for table, several in results["tables"].items():
        own = json.loads((folder / "tables" / slug(table) / "results.json").read_text())
        assert (own["mode"], own["title"]) == ("strict", f"Sizes: {table}")
        whole = [block for block in own["blocks"] if block["tag"] is None]
        assert [(b["benchmark"], b["method"]) for b in several] == [
            (b["benchmark"], b["method"]) for b in whole
        ]
        for found, block in zip(several, whole, strict=True):
            assert (found["languages"], found["chance"]) == (block["languages"], block["chance"])
            for arm, row in zip(found["arms"], block["rows"], strict=True):
                assert (arm["arm"], arm["rule"], arm["items"]) == (
                    row["arm"],
                    row["is_baseline"],
                    24,
                )
                assert arm["seeds"].keys() == row["seed_scores"].keys()
                for seed, scores in row["seed_scores"].items():
                    assert arm["seeds"][seed] == pytest.approx(scores, abs=1e-6)
                assert arm["scores"].keys() == row["scores"].keys()
                for name, score in row["scores"].items():
                    change = score["change"]
                    wanted = {key: score[key] for key in SHORT if score[key] is not None}
                    wanted |= {"change": change["difference"], "p": change["p"]} if change else {}
                    told = dict(arm["scores"][name])
                    assert told.pop("clear", None) == (change["clear"] if change else None)
                    assert told == pytest.approx(wanted, abs=1e-6), (table, name)
    again = from_json(results)
    assert list(again) == list(SIZES)
    for table, several in again.items():
        for block, first in zip(several, (b for b in blocks[table] if b.tag is None), strict=True):
            assert (
                block.benchmark,
                block.method,
                block.languages,
                block.num_items,
                block.chance,
            ) == (first.benchmark, first.method, first.languages, 24, first.chance)
            for row, old in zip(block.rows, first.rows, strict=True):
                assert (row.arm, row.seeds, row.num_items, row.is_baseline) == (
                    old.arm,
                    old.seeds,
                    old.num_items,
                    old.is_baseline,
                )
                for name, e in old.scores.items():
                    assert row.scores[name].value == pytest.approx(e.value, abs=1e-6)
                    assert (row.scores[name].change is None) == (e.change is None)
    with pytest.raises(UserError, match="format 2, but this version reads 1"):
        from_json(results | {"format": 2})


def test_the_study_shows_every_table_but_not_scores_by_byte(written):
    """results.md and the page have a table for each method that is shown, with a row per table and
    arm.
    """
    folder, blocks = written
    assert questions(blocks) == [("made", "sum"), ("made", "mean")]
    text, page = ((folder / name).read_text() for name in ("results.md", "report.html"))
    assert (
        text.count("## made: ") == page.count("<h2>made: ") == 2 and "per byte" not in text + page
    )
    for table in SIZES:
        for arm, seeds in SEEDS.items():
            rows = [
                line
                for line in text.splitlines()
                if line.startswith(f"| {table} | {arm} | {len(seeds)} | 24 |")
            ]
            assert len(rows) == 2
            for method, line in zip(("sum", "mean"), rows, strict=True):
                row = next(r for r in find(blocks[table], "made", method).rows if r.arm == arm)
                e = row.scores["AC3_3"]
                clear = (
                    ""
                    if not e.change or not e.change.clear
                    else "▲"
                    if e.change.difference > 0
                    else "▼"
                )
                cell = f"{e.value:.3f} ± {e.sd:.3f}".replace("0.", ".") + clear
                assert line.endswith(f"| {cell} |") and f"<td>{cell}</td></tr>" in page
