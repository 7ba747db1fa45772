"""Heat maps over languages: accuracy by language, and measures of language pairs.

Up to FEW_LANGUAGES, every cell has its number and the languages keep their order. With more of
them the languages of one script are next to each other, accuracies run over several lines, and the
maps of pairs have a colour bar instead of numbers.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from crossin_jax.languages import name_script, script_of
from crossin_jax.report.figures import make_figure, models_of, styled
from crossin_jax.report.summary import Block, Row
from crossin_jax.report.wording import language_code, number, shorten

FEW_LANGUAGES = 16
# Above it, the axes of a map of pairs have the names of scripts alone
MANY_LANGUAGES = 60
# A script with fewer languages is one of the "other scripts"
MIN_GROUP = 2
OTHER = "other scripts"
# Cells of one line of accuracies
LINE = 20
# The cell of a language with itself; neither scale of colours has a grey
OF_ITSELF = "#d9d9d9"


def group_languages(languages: Sequence[str]) -> dict[str, list[str]]:
    """The languages by script, the first language's script first, single ones at the end.

    {"": languages} where they are few.
    """
    if len(languages) <= FEW_LANGUAGES:
        return {"": list(languages)}
    groups: dict[str, list[str]] = {}
    for language in languages:
        groups.setdefault(name_script(script_of(language)), []).append(language)
    single = [l for several in groups.values() if len(several) < MIN_GROUP for l in several]
    groups = {name: several for name, several in groups.items() if len(several) >= MIN_GROUP}
    return groups | ({OTHER: single} if single else {})


# ---- Accuracy by language


@styled
def draw_languages(blocks: dict[str, Block]) -> Any:
    """Accuracy of every arm in every language: a heat map per table."""
    if max(len(block.languages) for block in blocks.values()) > FEW_LANGUAGES:
        return _draw_lines(blocks)
    columns = min(3, len(blocks))
    lines = -(-len(blocks) // columns)
    tallest = max(len(models_of(block)) for block in blocks.values())
    widest = max(len(block.languages) for block in blocks.values())
    width = max(3.6, 1.6 + 0.45 * widest)
    figure = make_figure(width * columns, lines * (1.1 + 0.34 * tallest))
    grid = figure.subplots(lines, columns, squeeze=False).flat
    for (name, block), axes in zip(blocks.items(), grid, strict=False):
        _fill(axes, models_of(block), block.languages)
        axes.set_title(name, fontsize=10)
    # The iterator has consumed the panels in use; what is left are the unused ones.
    for axes in list(grid):
        axes.set_axis_off()
    return figure


def _draw_lines(blocks: dict[str, Block]) -> Any:
    """All tables below each other, their languages in lines of equal cells, by script."""
    lines = [
        (title if i == 0 else "", block, line)
        for title, block in blocks.items()
        for i, line in enumerate(_fill_lines(group_languages(block.languages)))
    ]
    heights = [0.95 + 0.3 * len(models_of(block)) for _, block, _ in lines]
    figure = make_figure(2.2 + 0.45 * LINE, sum(heights))
    grid = figure.subplots(len(lines), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, (title, block, line) in zip(grid, lines, strict=True):
        _fill(axes, models_of(block), [code for code, _ in line])
        places = [column for column, (code, _) in enumerate(line) if code]
        axes.set_xticks(places, [shorten(language_code(line[i][0]), 8) for i in places])
        for column, (_, group) in enumerate(line):
            if group:
                axes.text(column - 0.5, -0.62, group, fontsize=8, va="bottom")
        axes.set_title(title, fontsize=10, pad=16 if title else 6)
        axes.set_xlim(-0.5, LINE - 0.5)
        axes.spines[:].set_visible(False)
    return figure


def _fill_lines(groups: dict[str, list[str]]) -> list[list[tuple[str, str]]]:
    """Lines of (language, name of the script where one begins); "" is a gap between two scripts."""
    lines: list[list[tuple[str, str]]] = [[]]
    for group, several in groups.items():
        if lines[-1] and len(lines[-1]) + 1 + len(several) > LINE:
            lines.append([])
        elif lines[-1]:
            lines[-1].append(("", ""))
        for i, code in enumerate(several):
            if len(lines[-1]) == LINE:
                lines.append([])
            lines[-1].append((code, group if i == 0 or not lines[-1] else ""))
    return lines


def _fill(axes: Any, rows: Sequence[Row], languages: Sequence[str]) -> None:
    values = [
        [row.scores[f"accuracy/{code}"].value if code else np.nan for code in languages]
        for row in rows
    ]
    labels = [shorten(language_code(code), 8) for code in languages]
    _heat(axes, np.array(values), labels, [shorten(row.arm, 24) for row in rows])


# ---- Language pairs


@styled
def draw_pairs(block: Block, name: str) -> Any:
    """A heat map per arm of a measure of language pairs: rankc, agreement or agreement_right."""
    rows = [row for row in models_of(block) if name == "agreement" or name in row.pairs]
    values = [row.agreement if name == "agreement" else row.pairs[name].value for row in rows]
    return _draw_maps(block, {row.arm: np.array(v) for row, v in zip(rows, values, strict=True)})


@styled
def draw_pair_changes(block: Block, name: str) -> Any:
    """A heat map per arm of what sets a measure apart from the first arm's; a dot: p < 0.05."""
    rows = find_changed(block, name)
    maps = {row.arm: np.array(row.pairs[name].difference) for row in rows}
    tests = [row.pairs[name].p for row in rows]
    marks = [np.array(p) < 0.05 for p in tests if p is not None]
    return _draw_maps(block, maps, marks, are_changes=True)


def find_changed(block: Block, name: str) -> list[Row]:
    """The arms whose pairs are compared with the first arm's."""
    return [
        row
        for row in models_of(block)
        if name in row.pairs and row.pairs[name].difference is not None
    ]


def _draw_maps(
    block: Block,
    maps: dict[str, np.ndarray],
    marks: Sequence[np.ndarray] = (),
    *,
    are_changes: bool = False,
) -> Any:
    groups = group_languages(block.languages)
    order = [block.languages.index(code) for several in groups.values() for code in several]
    num_languages = len(order)
    has_numbers = num_languages <= FEW_LANGUAGES
    cell = 0.42 if has_numbers else 0.17 if num_languages <= MANY_LANGUAGES else 0.045
    size = 0.9 + cell * num_languages
    columns = max(1, min(len(maps), int(12.5 // size)))
    lines = -(-len(maps) // columns)
    figure = make_figure(
        size * columns + (0.4 if has_numbers else 1.4 * columns), lines * (size + 0.2)
    )
    grid = figure.subplots(lines, columns, squeeze=False).flat
    scale = _scale(list(maps.values()), are_changes, has_numbers)
    for i, (arm, matrix) in enumerate(maps.items()):
        axes = next(grid)
        values = matrix[np.ix_(order, order)].astype(float)
        # A language agrees with itself: those cells have no value.
        np.fill_diagonal(values, np.nan)
        shown = order if num_languages <= MANY_LANGUAGES else []
        labels = [shorten(language_code(block.languages[l]), 8) for l in shown]
        _heat(axes, values, labels, labels, with_numbers=has_numbers, **scale)
        axes.set_facecolor(OF_ITSELF)
        if marks:
            _mark(axes, marks[i][np.ix_(order, order)], _is_dark(values, scale["vmax"]), cell)
        if not has_numbers:
            _group_axes(axes, groups, names_only=num_languages > MANY_LANGUAGES)
            bar = figure.colorbar(axes.images[0], ax=axes, shrink=0.5, pad=0.02)
            bar.ax.tick_params(labelsize=7)
        axes.set_title(shorten(arm, 18 if has_numbers else 40), fontsize=10)
    for axes in list(grid):
        axes.set_axis_off()
    return figure


def _scale(maps: Sequence[np.ndarray], are_changes: bool, has_numbers: bool) -> dict[str, Any]:
    """Colours from 0 to 1; without numbers, over the values that occur; changes around 0."""
    pairs = np.concatenate([m[np.triu_indices(len(m), 1)] for m in maps])
    if are_changes:
        most = max(0.01, float(np.abs(pairs).max()))
        return {"cmap": "RdBu", "vmin": -most, "vmax": most}
    if has_numbers:
        return {}
    low, high = float(pairs.min()), float(pairs.max())
    return {"vmin": low, "vmax": max(high, low + 0.01)}


def _mark(axes: Any, marks: np.ndarray, are_dark: np.ndarray, cell: float) -> None:
    """A dot at every marked cell; below the number, where there are numbers."""
    y, x = np.nonzero(marks & ~np.eye(len(marks), dtype=bool))
    below = 0.33 if cell > 0.3 else 0
    size = (14 * cell) ** 2 / (4 if below else 2)
    colours = np.where(are_dark[y, x], "white", "black")
    axes.scatter(x, y + below, s=size, c=colours, linewidths=0)


def _group_axes(axes: Any, groups: dict[str, list[str]], *, names_only: bool) -> None:
    """Lines between the scripts, their names along the top and the left."""
    starts = np.cumsum([0, *map(len, groups.values())])
    for start in starts[1:-1]:
        axes.axhline(start - 0.5, color="#444444", linewidth=0.8)
        axes.axvline(start - 0.5, color="#444444", linewidth=0.8)
    axes.tick_params(labelsize=6.5, left=False, bottom=False)
    if names_only:
        middles = (starts[:-1] + starts[1:] - 1) / 2
        axes.set_xticks(middles, groups, rotation=90, fontsize=7)
        axes.set_yticks(middles, groups, fontsize=7)
        return
    axes.tick_params(axis="x", labelrotation=90)
    top = axes.secondary_xaxis("top")
    middles = (starts[:-1] + starts[1:] - 1) / 2
    top.set_xticks(middles, groups, fontsize=7)
    top.tick_params(length=0, labelrotation=30)


# ---- Parts


def _heat(
    axes: Any,
    values: np.ndarray,
    columns: list[str],
    rows: list[str],
    *,
    with_numbers: bool = True,
    cmap: str = "Blues",
    vmin: float = 0,
    vmax: float = 1,
) -> None:
    """Fills a panel with a heat map and writes each number into its cell."""
    axes.imshow(values, cmap=cmap, vmin=vmin, vmax=vmax, aspect="auto")
    for axis in (axes.xaxis, axes.yaxis):
        # The axes have no labels. With a place of their own, matplotlib does not measure every name
        # of a language again to find them one.
        axis.set_label_coords(0, 0)
    for (i, j), value in np.ndenumerate(values) if with_numbers else ():
        if not np.isnan(value):
            colour = "white" if _is_dark(value, vmax) else "black"
            axes.text(j, i, number(value), ha="center", va="center", fontsize=8, color=colour)
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), rows)


def _is_dark(values: Any, vmax: float) -> Any:
    """Whether black cannot be read on the colour of a value."""
    return np.abs(values) > 0.6 * vmax
