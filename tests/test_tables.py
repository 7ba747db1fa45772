"""Tables as text."""

from crossin_jax.tables import format_markdown, format_table


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
