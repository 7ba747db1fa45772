"""The printed tables: one way of choosing first, differences with p, and four formats."""

import csv
import io
import math
import shutil
import subprocess

import pytest

from crossin_jax.evaluation.stats import Change, wilson
from crossin_jax.report.summary import Block, Estimate, Row
from crossin_jax.report.text import PRIMARY, list_parts, list_rows
from crossin_jax.tables import STYLES, render_table
from tests.helpers import print_table


def block(method, differences, benchmark="b", num_items=200):
    """Arms "base" and those of the differences in AC3_2, in two languages."""
    rows = []
    for arm, difference in {"base": None, **differences}.items():
        change = None
        if difference is not None:
            change = Change(difference, difference - 0.1, difference + 0.1, 0.0004, True)
        estimate = Estimate(0.5, 0.4, 0.6, change=change)
        names = ("accuracy", "accuracy/en", "accuracy/others", "consistency_2", "AC3_2")
        rows.append(Row(arm, (0,), num_items, dict.fromkeys(names, estimate), {}, {}, [], {}, {}))
    chances = {"consistency_2": 0.25, "AC3_2": 0.25}
    return Block(
        benchmark, method, None, ("en", "zh"), num_items, 0.25, tuple(rows), chances=chances
    )


def test_the_primary_way_has_the_table_and_each_other_one_a_line():
    blocks = [block(method, {"x2x": 0.1}) for method in ("byte", "mean", "generate", "sum")]
    text = print_table(blocks)
    assert text.startswith("b: choice by summed log-likelihood") and text.count("200 items") == 1
    lines = text.splitlines()
    assert [line for line in lines if line.startswith("difference from base (p)")]
    assert [line.split(", AC3_2:")[0] for line in lines if ", AC3_2: base .500, x2x" in line] == [
        "free answers",
        "choice by log-likelihood per token",
        "choice by log-likelihood per byte",
    ]
    assert "the primary way is" in text and "docs/evaluation.md" in text and "note:" not in text
    for method in PRIMARY:  # one way alone needs no reason
        assert "primary" not in print_table([block(method, {"x2x": 0.1})])


def test_ways_that_disagree_in_sign_are_noted():
    blocks = [
        block("sum", {"x2x": 0.1, "mono": 0.2}),
        block("letter", {"x2x": -0.05, "mono": 0.1}),
        block("mean", {"x2x": 0.0, "mono": 0.1}),
    ]
    notes = [line for line in print_table(blocks).splitlines() if line.startswith("note:")]
    assert notes == [
        "note: choice by summed log-likelihood and choice by log-likelihood of its letter "
        "disagree in sign on AC3_2 of x2x"
    ]


def test_differences_have_a_sign_and_p():
    text = print_table([block("sum", {"x2x": 0.1, "mono": -0.05})])
    rows = [line.split("  ") for line in text.splitlines() if "(<.001)" in line]
    assert [row[0] for row in rows] == ["x2x", "mono"]
    assert "+.100 (<.001)" in rows[0][-1] and "−.050 (<.001)" in rows[1][-1]


def test_the_chance_of_every_headline_score_is_there():
    text = print_table([block("sum", {})])
    assert "blind guessing: Accuracy .250, Consistency_2 .250, AC3_2 .250" in text


@pytest.mark.parametrize(("num_items", "is_told"), [(4, True), (49, True), (50, False)])
def test_few_items_decide_nothing(num_items, is_told):
    text = print_table([block("sum", {}, num_items=num_items)])
    assert (f"a table here has {num_items}:" in text) == is_told


def test_csv_has_every_score_of_every_way_in_one_table():
    blocks = [block("sum", {"x2x": 0.1}), block("mean", {"x2x": 0.1}, benchmark='with "quotes", x')]
    rows = list(csv.DictReader(io.StringIO(print_table(blocks, "csv"))))
    assert len(rows) == 2 * 2 * 5 == sum(len(list_rows(block)) for block in blocks)
    last = rows[-1]
    assert (last["benchmark"], last["method"], last["arm"], last["score"]) == (
        'with "quotes", x',
        "mean",
        "x2x",
        "AC3_2",
    )
    assert [
        float(last[name]) for name in ("value", "low", "high", "chance", "difference", "p")
    ] == [
        0.5,
        0.4,
        0.6,
        0.25,
        0.1,
        0.0004,
    ]
    assert rows[0]["difference"] == rows[0]["p"] == rows[0]["sd"] == ""


def test_csv_of_a_study_names_the_table_of_each_row():
    blocks = [block("sum", {"x2x": 0.1})]
    (table,) = list_parts({"small": blocks, "large": blocks}, "csv")
    rows = [dict(zip(table.head, row, strict=True)) for row in table.rows]
    assert [row["table"] for row in rows] == ["small"] * 10 + ["large"] * 10
    parts = list_parts({"small": blocks, "large": blocks})
    assert [part for part in parts if str(part).startswith("==")] == ["== small\n", "== large\n"]


@pytest.mark.parametrize("style", STYLES)
def test_every_style_holds_every_cell(style):
    head, rows = ("arm", "a & b"), [("x_1", "50 % ±2"), ("ü|v", "1\n2")]
    text = "\n".join(render_table(style, head, rows))
    for cell in ("arm", "x", "50", "2"):
        assert cell in text
    expected = {
        "text": "x_1",
        "markdown": r"| ü\|v | 1 2 |",
        "latex": r"x\_1 & 50 \% $\pm$2 \\",
        "csv": "ü|v,",
    }
    assert expected[style] in text


def test_latex_compiles_where_latex_is():
    if not (latex := shutil.which("pdflatex")):
        pytest.skip("no pdflatex")
    body = "\n".join(render_table("latex", ("a_b", "%"), [("~^\\{}", "▲ −1 #$&")]))
    document = (
        rf"\documentclass{{article}}\usepackage{{booktabs}}\begin{{document}}{body}\end{{document}}"
    )
    subprocess.run([latex, "-draftmode", "-halt-on-error"], input=document, text=True, check=True)


@pytest.mark.parametrize(
    ("share", "count", "low", "high"),
    [
        (0.0, 4, 0.0, 0.4899),
        (1.0, 4, 0.5101, 1.0),
        (0.5, 10, 0.2366, 0.7634),
        (0.1, 30, 0.0346, 0.2562),
    ],
)
def test_wilson_intervals_are_those_of_tables(share, count, low, high):
    found = wilson(share, count)
    assert found == pytest.approx((low, high), abs=2e-4)
    assert math.isclose(wilson(1 - share, count)[1], 1 - found[0], abs_tol=1e-12)
