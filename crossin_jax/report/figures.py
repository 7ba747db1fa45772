"""The figures of every report (matplotlib), as SVG or PNG.

Bars of scores, dots of prompts, curves over tables, and arms against a control.
"""

import functools
import io
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from crossin_jax.config import Contrast
from crossin_jax.report.summary import OTHERS, Block, Row
from crossin_jax.report.wording import describe_score, number, shorten
from crossin_jax.report.wording import mark as mark_of

# The legend of report.html has the same colours, --c1 to --c8. After eight arms they repeat.
COLOURS = ("#56616e", "#0072b2", "#d55e00", "#00825f", "#a8578a", "#9a6b00", "#2b8fc4", "#6b4fa0")
STYLE = {
    # The same figure gives the same file.
    "svg.hashsalt": "crossin_jax",
    # Text stays text, which can be selected and found.
    "svg.fonttype": "none",
    # A dollar sign in a name is a dollar sign, not the start of a formula.
    "text.parse_math": False,
}


def styled(function: Callable) -> Callable:
    """Runs a function that draws or saves a figure with our style.

    It also silences warnings about missing glyphs: names may be written in scripts that
    matplotlib's font lacks, and the browser has fonts of its own.
    """

    @functools.wraps(function)
    def wrapper(*args: Any, **options: Any) -> Any:
        import matplotlib

        with matplotlib.rc_context(STYLE), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing")
            return function(*args, **options)

    return wrapper


# ---- Figures of one block: one benchmark, one way of answering


@styled
def draw_scores(block: Block, names: Sequence[str], arms: Sequence[str]) -> Any:
    """A panel per score: a bar per arm with its 95 % interval.

    Bars of rules are hollow, and a dashed line shows blind guessing. `arms` are all arms of the
    report: their order decides the colours.
    """
    # matplotlib counts y upward, and the first arm should be on top.
    rows = block.rows[::-1]
    figure = make_figure(3.6 * len(names) + 0.8, 0.9 + 0.3 * len(rows))
    panels = figure.subplots(1, len(names), squeeze=False, sharey=True)[0]
    for axes, name in zip(panels, names, strict=True):
        for y, row in enumerate(rows):
            if name not in row.scores:
                continue
            score, colour = row.scores[name], colour_of(row.arm, arms)
            face = "none" if row.is_baseline else colour
            # The interval is that of resampled scores, so the value itself may lie outside of it.
            errors = [[max(score.value - score.low, 0)], [max(score.high - score.value, 0)]]
            axes.barh(
                y, score.value, 0.66, facecolor=face, edgecolor=colour, xerr=errors, capsize=2
            )
            axes.text(1.02, y, number(score.value) + mark_of(score), va="center", fontsize=8)
        if name.startswith("accuracy"):
            axes.axvline(block.chance, color="#888888", linestyle="--", linewidth=1)
        axes.set(xlim=(0, 1), title=describe_score(name))
        _tidy(axes)
    panels[0].set_yticks(range(len(rows)), [shorten(row.arm, 24) for row in rows])
    return figure


@styled
def draw_prompts(block: Block, names: Sequence[str], arms: Sequence[str]) -> Any:
    """A panel per score: a dot per prompt of every arm, and a tick at the median."""
    rows = [row for row in block.rows[::-1] if len(row.prompts) > 1]
    figure = make_figure(3.6 * len(names) + 0.8, 0.9 + 0.3 * len(rows))
    panels = figure.subplots(1, len(names), squeeze=False, sharey=True)[0]
    for axes, name in zip(panels, names, strict=True):
        for y, row in enumerate(rows):
            values = [scores[name] for scores in row.prompts.values()]
            axes.plot(values, [y] * len(values), "o", color=colour_of(row.arm, arms), alpha=0.7)
            axes.plot([row.scores[name].value], [y], "|", color="black", markersize=16)
        axes.set(title=describe_score(name))
        _tidy(axes)
    panels[0].set_yticks(range(len(rows)), [shorten(row.arm, 24) for row in rows])
    return figure


# ---- Figures over the tables of a study


@styled
def draw_curves(title: str, blocks: dict[float, Block]) -> Any:
    """AC3, accuracy outside English and RankC over x, with the standard deviation over seeds."""
    # An arm with a single point has no curve.
    blocks = dict(sorted(blocks.items()))
    count = Counter(row.arm for block in blocks.values() for row in models_of(block))
    arms = [arm for arm, places in count.items() if places > 1]

    def fill(axes: Any, name: str) -> None:
        for arm in arms:
            points = [
                (x, row.scores[name].value, row.scores[name].sd or 0.0)
                for x, block in blocks.items()
                for row in block.rows
                if row.arm == arm and name in row.scores
            ]
            line = {"marker": "o", "capsize": 3, "linewidth": 1.6}
            axes.errorbar(*zip(*points, strict=True), label=arm, color=colour_of(arm, arms), **line)
        axes.set(xlabel=title, ylabel=describe_score(name), xticks=list(blocks))

    return _panels(next(iter(blocks.values())), fill, height=3.4)


@styled
def draw_contrast(contrast: Contrast, blocks: dict[str, Block]) -> Any:
    """Per table and arm the score minus the control's: a dot per seed, a bar for their mean."""
    tables = list(blocks)[::-1]
    # The bars of one table share a height of 0.8 around its tick.
    height = 0.8 / len(contrast.arms)

    def fill(axes: Any, name: str) -> None:
        for i, arm in enumerate(contrast.arms):
            for y, table in enumerate(tables):
                rows = {row.arm: row for row in blocks[table].rows}
                if arm not in rows or contrast.control not in rows:
                    continue
                differences = differ(rows[arm], rows[contrast.control], name)
                place = y + height * ((len(contrast.arms) - 1) / 2 - i)
                label = f"{arm} minus {contrast.control}" if y == len(tables) - 1 else None
                style = {"color": COLOURS[(i + 1) % len(COLOURS)]}
                axes.barh(place, np.mean(differences), height, alpha=0.45, label=label, **style)
                axes.plot(differences, [place] * len(differences), "o", markersize=4, **style)
        axes.axvline(0, color="black", linewidth=1)
        axes.locator_params(axis="x", nbins=5)
        axes.set(xlabel=f"{describe_score(name)}, difference")
        axes.set_yticks(range(len(tables)), tables)

    return _panels(next(iter(blocks.values())), fill, height=1.4 + 0.55 * len(tables), sharey=True)


def differ(row: Row, control: Row, name: str) -> list[float]:
    """A score minus the control's, for each seed that both have."""
    return [
        scores[name] - control.seed_scores[seed][name]
        for seed, scores in row.seed_scores.items()
        if seed in control.seed_scores
    ]


# ---- Parts


def models_of(block: Block) -> list[Row]:
    """The rows of a block that are models, not rules."""
    return [row for row in block.rows if not row.is_baseline]


def colour_of(arm: str, arms: Sequence[str]) -> str:
    """The colour of an arm by its place among all arms."""
    return COLOURS[list(arms).index(arm) % len(COLOURS)]


def make_figure(width: float, height: float) -> Any:
    """A figure of a size in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _panels(
    block: Block, fill: Callable[[Any, str], None], *, height: float, **options: Any
) -> Any:
    """Panels for AC3, accuracy outside English and RankC, with one legend."""
    names = [
        block.main_score,
        *(name for name in (OTHERS, "rankc") if name in block.headline),
    ]
    figure = make_figure(4.6 * len(names) + 1.0, height)
    panels = figure.subplots(1, len(names), squeeze=False, **options)[0]
    for axes, name in zip(panels, names, strict=True):
        fill(axes, name)
        _tidy(axes)
    handles = panels[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside upper center", ncols=5, frameon=False)
    return figure


def _tidy(axes: Any) -> None:
    axes.grid(alpha=0.25)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


@styled
def to_svg(figure: Any) -> str:
    """The figure as SVG, from its <svg> element on."""
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    return out.getvalue()


@styled
def to_png(figure: Any) -> bytes:
    """The figure as PNG, as wide as a page of text."""
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=110, metadata={"Software": None})
    return out.getvalue()
