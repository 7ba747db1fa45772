"""A study's figures (matplotlib): curves, arms against a control, accuracy by language; as SVG or PNG."""

import io
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from crossin_jax.config import Contrast
from crossin_jax.evaluation.figures import number
from crossin_jax.evaluation.summary import OTHERS, Block, Row
from crossin_jax.evaluation.wording import describe_score

# the colours of report.html, without their dark variants
COLOURS = ("#56616e", "#0072b2", "#d55e00", "#00825f", "#a8578a", "#9a6b00", "#2b8fc4", "#6b4fa0")


def draw_curves(title: str, blocks: dict[float, Block]) -> Any:
    """AC3 and accuracy outside English of every arm over x, with the standard deviation over seeds."""
    count = Counter(row.arm for _, block in sorted(blocks.items()) for row in _models(block))
    arms = [arm for arm, places in count.items() if places > 1]

    def fill(axes: Any, name: str) -> None:
        for i, arm in enumerate(arms):
            known = [(x, row.scores[name]) for x, block in sorted(blocks.items())
                     for row in block.rows if row.arm == arm and name in row.scores]
            axes.errorbar([x for x, _ in known], [e.value for _, e in known], [e.sd or 0.0 for _, e in known],
                          label=arm, color=COLOURS[i % len(COLOURS)], marker="o", capsize=3, linewidth=1.6)
        axes.set(xlabel=title, ylabel=describe_score(name), xticks=sorted(blocks))
    return _panels(next(iter(blocks.values())), fill, height=3.4)


def draw_contrast(contrast: Contrast, blocks: dict[str, Block]) -> Any:
    """Per table and arm the score minus the control's: a dot per seed, a bar for their mean."""
    tables = list(blocks)[::-1]  # the first one on top

    def fill(axes: Any, name: str) -> None:
        height = 0.8 / len(contrast.arms)
        for i, arm in enumerate(contrast.arms):
            for y, table in enumerate(tables):
                rows = {row.arm: row for row in blocks[table].rows}
                if arm not in rows or contrast.control not in rows:
                    continue
                differences = differ(rows[arm], rows[contrast.control], name)
                place = y + height * ((len(contrast.arms) - 1) / 2 - i)
                axes.barh(place, np.mean(differences), height, color=COLOURS[i + 1], alpha=0.45,
                          label=f"{arm} minus {contrast.control}" if y == len(tables) - 1 else None)
                axes.plot(differences, [place] * len(differences), "o", color=COLOURS[i + 1], markersize=4)
        axes.axvline(0, color="black", linewidth=1)
        axes.locator_params(axis="x", nbins=5)
        axes.set(xlabel=f"{describe_score(name)}, difference", yticks=range(len(tables)), yticklabels=tables)
    return _panels(next(iter(blocks.values())), fill, height=1.4 + 0.55 * len(tables), sharey=True)


def differ(row: Row, control: Row, name: str) -> list[float]:
    """A score minus the control's, by the seeds that both have."""
    return [told[name] - control.seed_scores[seed][name] for seed, told in row.seed_scores.items()
            if seed in control.seed_scores]


def draw_languages(blocks: dict[str, Block]) -> Any:
    """Accuracy of every arm in every language, a heat map per table."""
    columns = min(3, len(blocks))
    lines = -(-len(blocks) // columns)
    tallest = max(len(_models(block)) for block in blocks.values())
    figure = _figure(3.6 * columns, lines * (1.1 + 0.34 * tallest))
    grid = figure.subplots(lines, columns, squeeze=False).flat
    for (name, block), axes in zip(blocks.items(), grid, strict=False):
        rows = _models(block)
        values = np.array([[row.scores[f"accuracy/{code}"].value for code in block.languages] for row in rows])
        axes.imshow(values, cmap="Blues", vmin=0, vmax=1, aspect="auto")
        for (i, j), value in np.ndenumerate(values):
            axes.text(j, i, number(value), ha="center", va="center", fontsize=8, color="white" if value > 0.6 else
                      "black")
        axes.set_xticks(range(len(block.languages)), block.languages)
        axes.set_yticks(range(len(rows)), [row.arm for row in rows])
        axes.set_title(name, fontsize=10)
    for axes in list(grid):  # what the last line does not fill
        axes.set_axis_off()
    return figure


def _models(block: Block) -> list[Row]:
    return [row for row in block.rows if not row.is_baseline]


def _panels(block: Block, fill: Callable[[Any, str], None], *, height: float, **options: Any) -> Any:
    """One panel for AC3 and one for accuracy outside English, with one legend."""
    names: Sequence[str] = [block.headline[-1], *([OTHERS] if OTHERS in block.headline else [])]
    figure = _figure(4.6 * len(names) + 1.0, height)
    panels = figure.subplots(1, len(names), squeeze=False, **options)[0]
    for axes, name in zip(panels, names, strict=True):
        fill(axes, name)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=5, frameon=False)
    return figure


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure
    return Figure(figsize=(width, height), layout="constrained")


def to_svg(figure: Any) -> str:
    """The figure as SVG; the same figure gives the same text."""
    import matplotlib
    out = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "crossin_jax", "svg.fonttype": "none"}):
        figure.savefig(out, format="svg", metadata={"Date": None})
    return out.getvalue()


def to_png(figure: Any) -> bytes:
    """The figure as PNG, as wide as a page of text."""
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=110, metadata={"Software": None})
    return out.getvalue()
