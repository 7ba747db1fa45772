"""Small figures as inline SVG: about 340 units wide, so that a column of them is readable on a phone.

Colours are the page's CSS variables (--c1 to --c8, --heat, --ink, --grid …): dark mode needs no second figure. Every
mark has a <title>, the figure's text for screen readers and for the pointer.
"""

import math
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH = 340
NUM_COLOURS = 8


@dataclass(frozen=True, slots=True)
class Bar:
    """One horizontal bar with its interval; `colour` counts from 0; rules without a model are drawn hollow."""

    label: str
    value: float
    low: float
    high: float
    colour: int
    hollow: bool = False
    mark: str = ""


def text_width(text: str) -> int:
    """Columns that a text takes: two for wide characters, none for combining ones."""
    return sum(0 if unicodedata.combining(c) or unicodedata.category(c) in ("Cf", "Mn", "Me") else
               2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def shorten(text: str, width: int) -> str:
    """The text in at most `width` columns, with … where it was cut."""
    if text_width(text) <= width:
        return text
    kept = ""
    for c in text:
        if text_width(kept + c) > width - 1:
            break
        kept += c
    return kept.rstrip() + "…"


def number(value: float) -> str:
    """Three decimals without the leading zero, as in the paper's tables: .512."""
    text = f"{value:.3f}"
    return text.replace("0.", ".", 1) if text.startswith(("0.", "-0.")) else text


def draw_bars(title: str, bars: Sequence[Bar], *, chance: float | None = None) -> str:
    """Bars on an axis from 0 to 1 with 95 % whiskers; a dashed line where blind guessing lies."""
    longest = max(text_width(bar.label) for bar in bars)
    above = longest > 16  # labels stand over their bars
    left, right, step = (4 if above else 16 + 7.2 * longest), 48, (38 if above else 26)
    span, top = WIDTH - left - right, 26
    height = top + step * len(bars) + 18
    parts = [_axis({t: left + span * t for t in (0, 0.25, 0.5, 0.75, 1)}, top - 4, height - 18)]
    if chance is not None:
        x = left + span * chance
        parts.append(f'<line class="chance" x1="{x:.1f}" x2="{x:.1f}" y1="{top - 4}" y2="{height - 18}">'
                     f"<title>blind guessing: {number(chance)}</title></line>")
    for i, bar in enumerate(bars):
        y = top + i * step + (16 if above else 3)
        label_y, label_x, anchor = (y - 5, left, "start") if above else (y + 13, left - 8, "end")
        end = left + span * bar.value
        hue = colour(bar.colour)
        style = f"fill:none;stroke:{hue};stroke-width:1.5" if bar.hollow else f"fill:{hue}"
        parts.append(
            f"<g><title>{escape(bar.label)}: {number(bar.value)} [{number(bar.low)}, {number(bar.high)}]"
            f"{escape(' ' + bar.mark if bar.mark else '')}</title>"
            f'<text class="label" x="{label_x:g}" y="{label_y}" text-anchor="{anchor}">'
            f"{escape(shorten(bar.label, 44 if above else 16))}</text>"
            f'<rect x="{left:g}" y="{y}" width="{max(end - left, 0.8):.1f}" height="17" rx="2.5" style="{style}"/>'
            f'{_whisker(left + span * bar.low, left + span * bar.high, y + 8.5)}'
            f'<text class="value" x="{WIDTH - right + 8}" y="{y + 13}">{number(bar.value)}'
            f'<tspan class="mark">{escape(bar.mark)}</tspan></text></g>')
    return _figure(title, height, "".join(parts))


def draw_dots(title: str, rows: Sequence[tuple[str, dict[str, float], float, int]]) -> str:
    """Per arm (label, value by prompt, median, colour) a dot per prompt on a stretch of 0 to 1; the tick: median."""
    left, right, step, top = 10, 84, 40, 26
    span = WIDTH - left - right
    height = top + step * len(rows) + 18
    told = [value for _, values, _, _ in rows for value in values.values()]
    start, end = max(0, math.floor(10 * min(told) - 0.5)), min(10, math.ceil(10 * max(told) + 0.5))  # in tenths

    def place(value: float) -> float:
        return left + span * (10 * value - start) / (end - start)

    ticks = range(start, end + 1, 1 if end - start <= 5 else 2)
    parts = [_axis({tick / 10: place(tick / 10) for tick in ticks}, top - 4, height - 18)]
    for i, (label, values, median, hue) in enumerate(rows):
        y = top + i * step + 25
        low, high = min(values.values()), max(values.values())
        parts.append(f'<text class="label" x="{left}" y="{y - 12}">{escape(shorten(label, 34))}</text>'
                     f'<line x1="{place(low):.1f}" x2="{place(high):.1f}" y1="{y}" y2="{y}" '
                     f'style="stroke:{colour(hue)};stroke-width:3;opacity:.35;stroke-linecap:round"/>')
        for prompt, value in values.items():
            parts.append(f'<circle cx="{place(value):.1f}" cy="{y}" r="5" style="fill:{colour(hue)}" '
                         f'class="dot"><title>{escape(label)}, {escape(prompt)}: {number(value)}</title></circle>')
        x = place(median)
        parts.append(f'<line class="median" x1="{x:.1f}" x2="{x:.1f}" y1="{y - 9}" y2="{y + 9}">'
                     f"<title>median: {number(median)}</title></line>"
                     f'<text class="value" x="{WIDTH - right + 8}" y="{y + 4}">{number(low)} to {number(high)}</text>')
    return _figure(title, height, "".join(parts))


def draw_heat(title: str, labels: Sequence[str], values: Sequence[Sequence[float]]) -> str:
    """A square of language pairs, the share of items on which both chose alike; the diagonal is left blank."""
    count = len(labels)
    left, top = 34, 40
    cell = min(64.0, (WIDTH - left - 6) / count)
    parts = []
    for i, label in enumerate(labels):
        middle = i * cell + cell / 2
        parts.append(f'<text class="label" x="{left - 8}" y="{top + middle + 4:.1f}" text-anchor="end">{escape(label)}'
                     f'</text><text class="label" x="{left + middle:.1f}" y="{top - 8}" text-anchor="middle">'
                     f"{escape(label)}</text>")
        for j, other in enumerate(labels):
            x, y = left + j * cell, top + i * cell
            box = f'x="{x + 1:.1f}" y="{y + 1:.1f}" width="{cell - 2:.1f}" height="{cell - 2:.1f}" rx="4"'
            if i == j:
                parts.append(f'<rect {box} class="blank"/>')
                continue
            value = values[i][j]
            text = number(value) if cell > 38 else number(value)[:3]
            parts.append(f"<g><title>{escape(label)} and {escape(other)}: {number(value)}</title>"
                         f'<rect {box} class="heat-bed"/>'
                         f'<rect {box} style="fill:var(--heat);fill-opacity:{max(value, 0.04):.3f}"/>'
                         f'<text class="{"on" if value > 0.65 else "value"}" x="{x + cell / 2:.1f}" '
                         f'y="{y + cell / 2 + 4:.1f}" text-anchor="middle">{text}</text></g>')
    return _figure(title, round(top + count * cell + 6), "".join(parts))


def colour(index: int) -> str:
    """The CSS variable of an arm; after eight arms the colours come round again, the labels tell them apart."""
    return f"var(--c{index % NUM_COLOURS + 1})"


def _axis(ticks: dict[float, float], top: float, bottom: float) -> str:
    """Grid lines and numbers at the places of some values."""
    marks = []
    for tick, x in ticks.items():
        anchor = "start" if x < 8 else "middle"
        marks.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{bottom}"/>'
                     f'<text class="tick" x="{x:.1f}" y="{bottom + 14}" text-anchor="{anchor}">{tick:g}</text>')
    return "".join(marks)


def _whisker(low: float, high: float, y: float) -> str:
    if high - low < 0.5:
        return ""
    cap = f"{y - 4}V{y + 4}"
    return f'<path class="whisker" d="M{low:.1f} {cap}M{low:.1f} {y}H{high:.1f}M{high:.1f} {cap}"/>'


def _figure(title: str, height: float, content: str) -> str:
    return (f'<svg class="figure" viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(title)}">'
            f'<text class="title" x="4" y="13">{escape(shorten(title, 46))}</text>{content}</svg>')
