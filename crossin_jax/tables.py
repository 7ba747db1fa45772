"""Tables as text: aligned for a terminal, as Markdown, LaTeX, or comma-separated values.

Every program that prints tables has the flag FORMAT_FLAG and prints them by `print_parts`.
"""

import csv
import dataclasses
import io
import re
import sys
import unicodedata
from collections.abc import Iterable, Sequence

STYLES = ("text", "markdown", "latex", "csv")
FORMAT_FLAG = ("format", "text", STYLES, "how tables are printed")  # of flags.DEFINE_enum
LATEX = {
    "\0": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    "−": "$-$",
    "▲": r"$^{\uparrow}$",
    "▼": r"$^{\downarrow}$",
    "→": r"$\rightarrow$",
    "<": "$<$",
    ">": "$>$",
}


@dataclasses.dataclass(frozen=True)
class Table:
    """A head, rows, and the sides of the columns as in `format_table`."""

    head: Sequence[object]
    rows: Sequence[Sequence[object]]
    sides: str = "<"


def text_width(text: str) -> int:
    """The number of terminal columns that a text takes: Chinese characters take two, accents
    none.
    """
    return sum(map(_char_width, text))


def _char_width(char: str) -> int:
    if unicodedata.combining(char) or unicodedata.category(char) in ("Cf", "Mn", "Me"):
        return 0
    return 2 if unicodedata.east_asian_width(char) in "WF" else 1


def pad(text: str, width: int, side: str) -> str:
    """The text filled up with spaces to a width; `side` is "<" (text left) or ">" (text right)."""
    spaces = " " * (width - text_width(text))
    return spaces + text if side == ">" else text + spaces


def format_table(rows: Sequence[Sequence[object]], sides: str = "<", gap: str = "  ") -> list[str]:
    """The lines of a table with columns of equal width.

    `rows` include the head, if any. `sides` has a "<" or ">" per column; its last one holds for all
    further columns.
    """
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(text_width, column)) for column in zip(*cells, strict=True)]
    sides = sides.ljust(len(widths), sides[-1])
    return [gap.join(map(pad, row, widths, sides)).rstrip() for row in cells]


def format_markdown(
    head: Sequence[object], rows: Sequence[Sequence[object]], sides: str = "<"
) -> list[str]:
    """The lines of a Markdown table; `sides` as in `format_table`. Bars and line breaks in cells
    are made harmless.
    """
    sides = sides.ljust(len(head), sides[-1])
    rule = "".join("|--:" if side == ">" else "|---" for side in sides[: len(head)]) + "|"
    lines = [
        "|" + "".join(f" {text} |" if text else " |" for text in map(_cell, row))
        for row in (head, *rows)
    ]
    return [lines[0], rule, *lines[1:]]


def format_latex(
    head: Sequence[object], rows: Sequence[Sequence[object]], sides: str = "<"
) -> list[str]:
    """The lines of a LaTeX table (package booktabs); `sides` as in `format_table`."""
    columns = "".join("r" if side == ">" else "l" for side in sides.ljust(len(head), sides[-1]))
    lines = [" & ".join(map(escape_latex, row)) + r" \\" for row in (head, *rows)]
    return [
        rf"\begin{{tabular}}{{{columns[: len(head)]}}}",
        r"\toprule",
        lines[0],
        r"\midrule",
        *lines[1:],
        r"\bottomrule",
        r"\end{tabular}",
    ]


def escape_latex(value: object) -> str:
    """A text in which LaTeX sees no commands; the marks of comparisons become symbols."""
    text = str(value).replace("\\", "\0")
    text = re.sub(r"([&%$#_{}])", r"\\\1", text)
    for char, command in LATEX.items():
        text = text.replace(char, command)
    return text


def format_csv(head: Sequence[object], rows: Sequence[Sequence[object]]) -> list[str]:
    """The lines of a table of comma-separated values."""
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows((head, *rows))
    return out.getvalue().splitlines()


def render_table(
    style: str, head: Sequence[object], rows: Sequence[Sequence[object]], sides: str = "<"
) -> list[str]:
    """The lines of a table in one of `STYLES`; `sides` as in `format_table`."""
    if style == "text":
        return format_table((head, *rows), sides)
    if style == "csv":
        return format_csv(head, rows)
    return (format_markdown if style == "markdown" else format_latex)(head, rows, sides)


def render_parts(style: str, parts: Iterable[str | Table]) -> tuple[list[str], list[str]]:
    """Tables and the texts between them, as (lines for standard output, for standard error).

    A text may have several lines. As LaTeX texts are comments. As csv they go to standard error,
    so that standard output can be read as it is; an empty line is between two tables.
    """
    out: list[str] = []
    err: list[str] = []
    after_table = False
    for part in parts:
        is_table = isinstance(part, Table)
        if isinstance(part, Table):
            lines = render_table(style, part.head, part.rows, part.sides)
        else:
            lines = part.split("\n")
        if style == "csv" and not is_table:
            err += filter(None, lines)
            continue
        if style == "latex" and not is_table:
            lines = [f"% {line}" if line else "" for line in lines]
        # Markdown takes a line beside a table for a part of it.
        if out and out[-1] and (style == "csv" or style == "markdown" and is_table | after_table):
            out += [""] if lines[0] else []
        out += lines
        after_table = is_table
    return out, err


def print_parts(style: str, parts: Iterable[str | Table]) -> None:
    """Prints tables and texts by `render_parts`."""
    out, err = render_parts(style, parts)
    if out:
        print("\n".join(out), flush=True)
    if err:
        print("\n".join(err), file=sys.stderr, flush=True)


def _cell(value: object) -> str:
    return " ".join(str(value).replace("|", "\\|").split())
