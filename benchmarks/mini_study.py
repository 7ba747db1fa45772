"""Tables and figures of docs/mini_study.md, from the archived results of the miniature study.

    python benchmarks/mini_study.py
    python benchmarks/mini_study.py --archive runs/mini_study   (archives that folder first)

Rewrites what is between <!-- NAME --> and <!-- end --> in the page, and
docs/figures/mini_study_*.png. Means and standard deviations are over the seeds that every row of a
table has.
"""

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.archive import Blocks, archive, fill, read_results, read_seconds
from configs.mini_study import CONDITIONS, CONTROLLED, VOLUMES, get_study, volume_table
from crossin_jax.report import figures as study_figures
from crossin_jax.report import heat_maps
from crossin_jax.report.summary import OTHERS, Block, Row
from crossin_jax.report.wording import mark, number
from crossin_jax.study import report as study_report

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks/results/2026-11-26-mini-study"
PAGE = ROOT / "docs/mini_study.md"
ALL, OPAQUE, DEVELOPMENT = "cross_world:test", "cross_world:test/opaque", "cross_world:dev"
SCORES = {
    "accuracy": "accuracy",
    "accuracy/en": "English",
    OTHERS: "other languages",
    "consistency_3": "consistency₃",
    "AC3_3": "AC3₃",
}
WAYS = {"sum": "summed", "mean": "per token"}


def spread(values: list[float]) -> str:
    """Mean ± sample standard deviation."""
    mean = number(statistics.mean(values)).replace("-", "−")
    return mean + (f" ± {number(statistics.stdev(values))}" if len(values) > 1 else "")


def shared(*blocks: Block) -> list[int]:
    """The seeds that every arm of these blocks has."""
    return sorted(
        set.intersection(
            *(set(row.seeds) for block in blocks for row in block.rows if not row.is_baseline)
        )
    )


def of(row: Row, score: str, seeds: list[int]) -> list[float]:
    """A score by seed."""
    return [row.seed_scores[seed][score] for seed in seeds]


def arms(block: Block) -> dict[str, Row]:
    """The rows of models by arm."""
    return {row.arm: row for row in block.rows if not row.is_baseline}


def grid(heads: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [" | ".join(heads), "|".join(["---"] * len(heads)), *(" | ".join(row) for row in rows)]
    return "\n".join(f"| {line} |" if "---|" not in line else f"|{line}|" for line in lines)


def show_arms(blocks: Blocks, way: str) -> str:
    """Every arm and rule on all items, then on the opaque ones."""
    rows = []
    for benchmark, items in ((ALL, "all"), (OPAQUE, "opaque")):
        block = study_report.find(blocks["LoRA"], benchmark, way)
        seeds = shared(block)
        for row in block.rows:
            told = (
                [number(row.scores[name].value) for name in SCORES]
                if row.is_baseline
                else [spread(of(row, name, seeds)) + mark(row.scores[name]) for name in SCORES]
            )
            rows.append([items, row.arm, *told])
    return grid(["items", "arm", *SCORES.values()], rows)


def compare(blocks: Blocks, tables: dict[str, str], chosen: tuple[str, ...], score: str) -> str:
    """One score of some arms in several tables, on all and on opaque items, by both ways of
    choosing.
    """
    rows = []
    for benchmark, items in ((ALL, "all"), (OPAQUE, "opaque")):
        for way, words in WAYS.items():
            found = {
                head: study_report.find(blocks[table], benchmark, way)
                for table, head in tables.items()
            }
            for arm in chosen:
                known = {head: arms(block)[arm] for head, block in found.items()}
                seeds = sorted(set.intersection(*(set(row.seeds) for row in known.values())))
                rows.append(
                    [items, words, arm, *(spread(of(row, score, seeds)) for row in known.values())]
                )
    return grid(["items", "chosen by log-likelihood", "arm", *tables.values()], rows)


def show_question(blocks: Blocks, benchmark: str, conditions: dict[str, tuple[str, str]]) -> str:
    """Pairs minus monolingual control: mean ± sd over seeds, and in how many of them above zero.

    A condition is a table and the ending of its arms' names.
    """
    rows = []
    for condition, (table, ending) in conditions.items():
        for way, words in WAYS.items():
            known = arms(study_report.find(blocks[table], benchmark, way))
            seeds = shared(study_report.find(blocks[table], benchmark, way))
            control = known[f"mono{ending}"]
            row = [condition, words, spread(of(control, OTHERS, seeds))]
            for arm in ("x2x", "x2x_same"):
                for score in (OTHERS, "AC3_3"):
                    gaps = [
                        a - b
                        for a, b in zip(
                            of(known[arm + ending], score, seeds),
                            of(control, score, seeds),
                            strict=True,
                        )
                    ]
                    row.append(f"{spread(gaps)} ({sum(gap > 0 for gap in gaps)}/{len(gaps)})")
            rows.append(row)
    return grid(
        [
            "condition",
            "chosen",
            "mono: other languages",
            "x2x − mono: other languages",
            "x2x − mono: AC3₃",
            "x2x_same − mono: other languages",
            "x2x_same − mono: AC3₃",
        ],
        rows,
    )


def show_seconds() -> str:
    """What a cell took, by kind: the quickest and the middle one."""
    kinds: dict[str, list[tuple[int, int]]] = {}
    for cell, wall, cpu in read_seconds(RESULTS):
        name = cell.split("/")
        kind = (
            "base model"
            if len(name) == 2
            else "arm, 40 steps"
            if "steps40" in name[1]
            else "arm, full fine-tuning"
            if name[1].endswith("-full")
            else "arm, LoRA"
        )
        kind += ", seven languages" if name[0].startswith("7-") else ""
        kinds.setdefault(kind, []).append((wall, cpu))
    return grid(
        ["cell", "cells", "seconds: quickest", "seconds: median", "CPU seconds: median"],
        [
            [
                kind,
                str(len(told)),
                str(min(told)[0]),
                f"{statistics.median(w for w, _ in told):.0f}",
                f"{statistics.median(c for _, c in told):.0f}",
            ]
            for kind, told in kinds.items()
        ],
    )


def pieces(blocks: Blocks) -> dict[str, Callable[[], str]]:
    """What each place in the pages shows."""
    volumes = {volume_table(volume): f"{volume:.0%}" for volume in VOLUMES}
    conditions = {table: (table, "") for table in CONDITIONS if table in blocks}
    tags = {"with the tag": ("LoRA", ""), "no tag": ("no tag", ", no tag")}
    return {
        "main, summed": lambda: show_arms(blocks, "sum"),
        "main, per token": lambda: show_arms(blocks, "mean"),
        "full": lambda: compare(
            blocks, {"LoRA": "LoRA", "full fine-tuning": "full"}, ("base", *CONTROLLED), "AC3_3"
        ),
        "full, others": lambda: compare(
            blocks, {"LoRA": "LoRA", "full fine-tuning": "full"}, ("base", *CONTROLLED), OTHERS
        ),
        "volumes": lambda: compare(blocks, volumes, CONTROLLED, "AC3_3"),
        "seven": lambda: compare(
            blocks,
            {"LoRA": "four languages", "seven languages": "seven languages"},
            ("base", *CONTROLLED),
            "AC3_3",
        ),
        "seven, others": lambda: compare(
            blocks,
            {"LoRA": "four languages", "seven languages": "seven languages"},
            ("base", *CONTROLLED),
            OTHERS,
        ),
        "question": lambda: show_question(blocks, ALL, conditions),
        "question, opaque": lambda: show_question(blocks, OPAQUE, conditions),
        "tag": lambda: show_question(blocks, ALL, tags),
        "tag, opaque": lambda: show_question(blocks, OPAQUE, tags),
        "beyond": lambda: show_beyond(blocks),
        "tuning": lambda: show_tuning(blocks),
        "seconds": show_seconds,
    }


def show_tuning(blocks: Blocks) -> str:
    """Learning rates on the development territories, all items."""
    rows: dict[str, list[str]] = {}
    shown = (OTHERS, "AC3_3")
    for way in WAYS:
        block = study_report.find(blocks["tuning, development territories"], DEVELOPMENT, way)
        for arm, row in arms(block).items():
            rows.setdefault(arm, []).extend(spread(of(row, name, shared(block))) for name in shown)
    heads = [f"{SCORES[name]}, {words}" for words in WAYS.values() for name in shown]
    return grid(["arm and rate", *heads], [[arm, *told] for arm, told in rows.items()])


def show_beyond(blocks: Blocks) -> str:
    """The arms that the paper leaves open, by summed log-likelihood."""
    rows = []
    for benchmark, items in ((ALL, "all"), (OPAQUE, "opaque")):
        block = study_report.find(blocks["beyond the paper"], benchmark, "sum")
        rows += [
            [items, arm, *(spread(of(row, name, shared(block))) for name in SCORES)]
            for arm, row in arms(block).items()
        ]
    return grid(["items", "arm", *SCORES.values()], rows)


def figures(blocks: Blocks) -> Iterator[tuple[str, Any]]:
    """(name, figure)."""
    study = get_study()
    here = {name: study_report.find(several, ALL, "sum") for name, several in blocks.items()}
    [(title, points)], [contrast] = study.curves.items(), study.contrasts
    yield (
        "volumes",
        study_figures.draw_curves(title, {x: here[table] for x, table in points.items()}),
    )
    yield (
        "question",
        study_figures.draw_contrast(
            contrast, {table: here[table] for table in CONDITIONS if table in here}
        ),
    )
    yield (
        "languages",
        heat_maps.draw_languages(
            {name: here[name] for name in ("LoRA", "full fine-tuning", "seven languages")}
        ),
    )


def main() -> None:
    """Rewrites the page and the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--archive", type=Path, help="folder of a finished study whose results are kept first"
    )
    if folder := parser.parse_args().archive:
        archive(folder, RESULTS)
    blocks = read_results(RESULTS)
    PAGE.write_text(fill(PAGE.read_text(encoding="utf-8"), pieces(blocks)), encoding="utf-8")
    for name, figure in figures(blocks):
        (ROOT / f"docs/figures/mini_study_{name}.png").write_bytes(study_figures.to_png(figure))


if __name__ == "__main__":
    main()
