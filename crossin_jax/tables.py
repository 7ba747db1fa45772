"""Tables as text: aligned for a terminal, or as Markdown."""

import unicodedata
from collections.abc import Sequence


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


def _cell(value: object) -> str:
    return " ".join(str(value).replace("|", "\\|").split())
