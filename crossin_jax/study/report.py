"""One report over all tables of a study: scores with marks, curves over tables, arms against a
control, heat maps.

results.md and report.html show every table; results.json holds what they show, with every seed's
scores; tables/NAME has each table's own report, with the items.
"""

import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crossin_jax.config import Study, UserError
from crossin_jax.evaluation.items import Benchmark
from crossin_jax.evaluation.metrics import Mode
from crossin_jax.evaluation.pairs import Weights
from crossin_jax.evaluation.predictions import Predictions
from crossin_jax.evaluation.stats import Change
from crossin_jax.files import write_whole
from crossin_jax.report.figures import draw_contrast, draw_curves, to_svg
from crossin_jax.report.heat_maps import draw_languages
from crossin_jax.report.page import inline, render
from crossin_jax.report.results import write_results
from crossin_jax.report.summary import Block, Estimate, Row, Run
from crossin_jax.report.text import explain_marks, format_scores, list_languages
from crossin_jax.report.wording import MODES_IN_WORDS, describe_score, method_name, number
from crossin_jax.tables import format_markdown

FORMAT = 1
HIDDEN = ("byte",)  # ways of choosing that only the tables' own reports show


@dataclass(frozen=True, slots=True)
class Table:
    """The runs of one table; the other arms are compared with the first.

    `benchmarks` give the table's own report its questions.
    """

    name: str
    runs: Sequence[Run]
    baselines: dict[str, list[Predictions]]
    benchmarks: Sequence[Benchmark] = ()


def write_study(
    folder: Path,
    study: Study,
    tables: Sequence[Table],
    mode: Mode,
    rankc: Weights = "softmax",
) -> dict[str, list[Block]]:
    """Writes the study's report and each table's own; returns the blocks by table."""
    folders = folders_of([table.name for table in tables])
    blocks = {
        table.name: write_results(
            folder / "tables" / folders[table.name],
            table.runs,
            baselines=table.baselines,
            mode=mode,
            rankc=rankc,
            title=f"{study.name}: {table.name}",
            benchmarks=table.benchmarks,
        )
        for table in tables
    }
    figures = draw_figures(study, blocks)
    contents = {
        "results.json": json.dumps(to_json(study, blocks, mode), indent=1, ensure_ascii=False),
        "results.md": to_markdown(study, blocks, mode),
        "report.html": to_html(study, blocks, mode, figures),
    }
    contents |= {f"figures/{name}.svg": to_svg(figure) for name, (_, figure) in figures.items()}
    for name, text in contents.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, text)
    return blocks


def folders_of(names: Iterable[str]) -> dict[str, str]:
    """The folder of each table below `tables`; two names that differ in signs alone get different
    folders.
    """
    folders: dict[str, str] = {}
    for name in names:
        folder, count = slug(name), 1
        while folder in folders.values():
            count += 1
            folder = f"{slug(name)}-{count}"
        folders[name] = folder
    return folders


def slug(name: str) -> str:
    """A name as part of a path: lower case, words joined by dashes."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower().replace("%", "percent")).strip("-")


def questions(blocks: dict[str, list[Block]]) -> list[tuple[str, str]]:
    """(benchmark, method) of every table to show, in order; a tag that is a benchmark of its own is
    left out.
    """
    asked = [(block.benchmark, block.method) for several in blocks.values() for block in several]
    return [key for key in dict.fromkeys(asked) if key[1] not in HIDDEN]


def find(blocks: Sequence[Block], benchmark: str, method: str) -> Block | None:
    """A table's block of a benchmark and method, on all items."""
    return next(
        (
            block
            for block in blocks
            if (block.benchmark, block.method, block.tag) == (benchmark, method, None)
        ),
        None,
    )


def draw_figures(study: Study, blocks: dict[str, list[Block]]) -> dict[str, tuple[str, Any]]:
    """(caption, figure) by file name: curves, contrasts and heat maps of every benchmark, by its
    first method.
    """
    figures: dict[str, tuple[str, Any]] = {}
    first = dict(reversed([(benchmark, method) for benchmark, method in questions(blocks)]))
    for benchmark, method in reversed(first.items()):
        here = {
            name: block
            for name, several in blocks.items()
            if (block := find(several, benchmark, method))
        }
        what = f"{benchmark}, {method_name(method)}"
        for title, points in study.curves.items():
            known = {x: here[table] for x, table in points.items() if table in here}
            if len(known) > 1:
                figures[slug(f"{title} {benchmark}")] = (
                    f"{title}: {what}",
                    draw_curves(title, known),
                )
        for contrast in study.contrasts:
            known = {table: here[table] for table in contrast.tables if table in here}
            if known:
                figures[slug(f"{contrast.title} {benchmark}")] = (
                    f"{contrast.title}: {what}; a dot per seed, the bar is their mean",
                    draw_contrast(contrast, known),
                )
        figures[slug(f"languages {benchmark}")] = (
            f"Accuracy by language: {what}",
            draw_languages(here),
        )
    return figures


# ---- Tables


def rows_of(
    blocks: dict[str, list[Block]], benchmark: str, method: str
) -> list[tuple[str, Block, Row]]:
    """(table, block, row) of every arm that was asked this way."""
    return [
        (name, block, row)
        for name, several in blocks.items()
        if (block := find(several, benchmark, method))
        for row in block.rows
    ]


def notes(blocks: dict[str, list[Block]], mode: Mode) -> str:
    """How to read the tables."""
    everything = [block for several in blocks.values() for block in several]
    return (
        f"{MODES_IN_WORDS[mode]} {explain_marks(everything)}. Arms are compared with the first "
        "arm of their table. AC3 says little without the accuracy beside it."
    )


def heading(block: Block) -> str:
    """The benchmark and method in one line."""
    return f"{block.benchmark}: {method_name(block.method)}"


def count_seeds(row: Row) -> str:
    """The number of seeds of an arm, or "rule"."""
    return "rule" if row.is_baseline else str(len(row.seeds))


def to_markdown(study: Study, blocks: dict[str, list[Block]], mode: Mode) -> str:
    """results.md: per benchmark and method one table with every arm of every table."""
    lines = [f"# {study.name}", "", notes(blocks, mode), ""]
    for benchmark, method in questions(blocks):
        rows = rows_of(blocks, benchmark, method)
        block = rows[0][1]
        table = [
            (name, row.arm, count_seeds(row), row.num_items, *format_scores(here, row))
            for name, here, row in rows
        ]
        head = ("table", "arm", "seeds", "items", *map(describe_score, block.headline))
        chance = f"Blind guessing: {number(block.chance)}."
        lines += [f"## {heading(block)}", "", chance, "", *format_markdown(head, table), ""]
    return "\n".join(lines)


def to_html(
    study: Study, blocks: dict[str, list[Block]], mode: Mode, figures: dict[str, tuple[str, Any]]
) -> str:
    """The page: tables, then figures, all in one file."""
    asked = []
    for benchmark, method in questions(blocks):
        rows = rows_of(blocks, benchmark, method)
        tables: dict[str, list[dict[str, Any]]] = {}
        for name, block, row in rows:
            entry = {
                "arm": row.arm,
                "seeds": count_seeds(row),
                "items": row.num_items,
                "languages": list_languages(block),
                "cells": format_scores(block, row),
            }
            tables.setdefault(name, []).append(entry)
        block = rows[0][1]
        question = {"heading": heading(block), "chance": block.chance, "scores": block.headline}
        asked.append(question | {"tables": tables})
    return render(
        "study.html",
        title=study.name,
        notes=notes(blocks, mode),
        links={name: f"tables/{folder}/report.html" for name, folder in folders_of(blocks).items()},
        questions=asked,
        figures=[(caption, inline(figure)) for caption, figure in figures.values()],
    )


def to_json(study: Study, blocks: dict[str, list[Block]], mode: Mode) -> dict[str, Any]:
    """results.json: per table, benchmark and method the arms with estimate, range, change and every
    seed's scores.
    """

    def entry(row: Row) -> dict[str, Any]:
        scores = {}
        for name, e in row.scores.items():
            scores[name] = {
                "value": round(e.value, 6),
                "low": round(e.low, 6),
                "high": round(e.high, 6),
            }
            if e.sd is not None:
                scores[name]["sd"] = round(e.sd, 6)
            if e.change is not None:
                scores[name] |= {
                    "change": round(e.change.difference, 6),
                    "p": round(e.change.p, 6),
                    "clear": e.change.clear,
                }
        return {
            "arm": row.arm,
            "rule": row.is_baseline,
            "items": row.num_items,
            "scores": scores,
            "seeds": {
                str(seed): {name: round(value, 6) for name, value in values.items()}
                for seed, values in row.seed_scores.items()
            },
        }

    return {
        "format": FORMAT,
        "title": study.name,
        "mode": mode,
        "tables": {
            name: [
                {
                    "benchmark": block.benchmark,
                    "method": block.method,
                    "languages": block.languages,
                    "chance": block.chance,
                    "arms": [entry(row) for row in block.rows],
                }
                for block in several
                if block.tag is None
            ]
            for name, several in blocks.items()
        },
    }


def from_json(results: dict[str, Any]) -> dict[str, list[Block]]:
    """The blocks that `to_json` wrote, as far as it wrote them: no answers, and items of all tags
    together.
    """
    if results["format"] != FORMAT:
        raise UserError(
            f"results of a study in format {results['format']}, but this version reads {FORMAT}"
        )

    def read(entry: dict[str, Any]) -> Row:
        scores = {
            name: Estimate(
                score["value"],
                score["low"],
                score["high"],
                score.get("sd"),
                change=Change(score["change"], math.nan, math.nan, score["p"], score["clear"])
                if "change" in score
                else None,
            )
            for name, score in entry["scores"].items()
        }
        seeds = {int(seed): values for seed, values in entry["seeds"].items()}
        return Row(
            entry["arm"], tuple(seeds), entry["items"], scores, seeds, {}, [], {}, {}, entry["rule"]
        )

    return {
        table: [
            Block(
                block["benchmark"],
                block["method"],
                None,
                tuple(block["languages"]),
                max(entry["items"] for entry in block["arms"]),
                block["chance"],
                tuple(read(entry) for entry in block["arms"]),
            )
            for block in several
        ]
        for table, several in results["tables"].items()
    }
