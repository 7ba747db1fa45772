"""Tables as text."""

import csv
import importlib
import io
import re

import pytest
from absl import flags

from crossin_jax.tables import (
    STYLES,
    Table,
    escape_latex,
    format_markdown,
    format_table,
    print_parts,
    render_parts,
)

PARTS = (
    "two tables\n",
    Table(("a", "n"), [("x_1", 5)], "<>"),
    "between",
    Table(("b",), [("y,z",)]),
)
PRINTED = {
    "text": "two tables\n\na    n\nx_1  5\nbetween\nb\ny,z\n",
    "markdown": (
        "two tables\n\n| a | n |\n|---|--:|\n| x_1 | 5 |\n\nbetween\n\n| b |\n|---|\n| y,z |\n"
    ),
    "latex": (
        "% two tables\n\n"
        "\\begin{tabular}{lr}\n\\toprule\na & n \\\\\n\\midrule\nx\\_1 & 5 \\\\\n"
        "\\bottomrule\n\\end{tabular}\n"
        "% between\n"
        "\\begin{tabular}{l}\n\\toprule\nb \\\\\n\\midrule\n"
        "y,z \\\\\n\\bottomrule\n\\end{tabular}\n"
    ),
    "csv": 'a,n\nx_1,5\n\nb\n"y,z"\n',
}
PROGRAMS = ("evaluate", "study.__main__", "score", "plan.__main__", "prepare.__main__")


def test_columns_are_aligned_by_the_width_on_a_terminal():
    rows = [("", "n", "share"), ("中文", 5, ".5"), ("e\u0301t", 10, "1.")]
    assert format_table(rows, "<>") == [
        "       n  share",
        "中文   5     .5",
        "e\u0301t    10     1.",
    ]
    assert format_table([("a", "b")], "<") == ["a  b"]


def test_markdown_escapes_bars_and_line_breaks():
    assert format_markdown(("", "n"), [("a|b", 1), ("two\nlines", 22)], "<>") == [
        "| | n |",
        "|---|--:|",
        "| a\\|b | 1 |",
        "| two lines | 22 |",
    ]


@pytest.mark.parametrize("style", STYLES)
def test_tables_and_texts_are_printed_in_order(style, capsys):
    """As csv, texts are apart from the tables."""
    print_parts(style, PARTS)
    said = capsys.readouterr()
    assert said.out == PRINTED[style]
    assert said.err == ("two tables\nbetween\n" if style == "csv" else "")
    print_parts(style, [])
    assert capsys.readouterr() == ("", "")


def test_nothing_but_tables_and_comments_is_in_latex():
    lines, _ = render_parts("latex", PARTS)
    inside = "\n".join(lines)
    outside = re.sub(r"(?s)\\begin\{tabular\}.*?\\end\{tabular\}", "", inside)
    assert all(line.startswith("%") for line in outside.split("\n") if line)


@pytest.mark.parametrize(
    ("cell", "shown"),
    [("(<.001)", "($<$.001)"), ("en → zh", r"en $\rightarrow$ zh"), (">2", "$>$2")],
)
def test_signs_of_comparisons_are_mathematics_in_latex(cell, shown):
    """In the usual encoding of text a "<" becomes an inverted exclamation mark."""
    assert escape_latex(cell) == shown


def test_a_cell_may_hold_anything_in_csv():
    cells = [('a "b"', "c,d", "e\nf")]
    (text,) = render_parts("csv", [Table(("x", "y", "z"), cells)])[:1]
    assert list(csv.reader(io.StringIO("\n".join(text)))) == [["x", "y", "z"], list(cells[0])]


@pytest.mark.parametrize("name", PROGRAMS)
def test_every_program_with_tables_has_the_flag(name, monkeypatch):
    known: list[tuple] = []
    monkeypatch.setattr(flags, "DEFINE_enum", lambda *given: known.append(given[:3]))
    for other in ("string", "integer", "bool", "list"):
        monkeypatch.setattr(flags, f"DEFINE_{other}", lambda *_, **__: None)
    monkeypatch.setattr(flags, "mark_flags_as_mutual_exclusive", lambda *_: None)
    importlib.import_module(f"crossin_jax.{name}").define_flags()
    assert ("format", "text", STYLES) in known
