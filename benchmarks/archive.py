"""Archived results of studies, and pages of docs/ whose tables are made from them.

What stands between <!-- NAME --> and <!-- end --> in a page is the table of that name.
"""

import json
import lzma
import re
import tarfile
from collections.abc import Callable
from pathlib import Path

from crossin_jax.report.summary import Block
from crossin_jax.study import report

Blocks = dict[str, list[Block]]


def archive(folder: Path, results: Path) -> None:
    """Keeps of a study's folder: its tables, every cell's results with their provenance, and what
    cells took.
    """
    results.mkdir(exist_ok=True)
    (results / "results.md").write_bytes((folder / "results.md").read_bytes())
    (results / "results.json.xz").write_bytes(lzma.compress((folder / "results.json").read_bytes()))
    with tarfile.open(results / "cells_json.tar.xz", "w:xz") as tar:
        for file in sorted(folder.glob("seed*/**/evaluation*/results.json")):
            tar.add(file, file.relative_to(folder))
    lines = []
    for file in sorted(folder.glob("seed*/**/done.json"), key=lambda file: file.stat().st_mtime):
        seed, *names = file.parent.relative_to(folder).parts
        told = json.loads(file.read_text())
        lines.append(
            f"{'/'.join(names)}/{seed.removeprefix('seed')} {told['seconds']:.0f} s wall "
            f"{told['cpu_seconds']:.0f} s cpu\n"
        )
    (results / "cells.txt").write_text("".join(lines))


def read_results(results: Path) -> Blocks:
    """The study's blocks by table."""
    return report.from_json(json.loads(lzma.decompress((results / "results.json.xz").read_bytes())))


def read_seconds(results: Path) -> list[tuple[str, int, int]]:
    """(cell, wall seconds, processor seconds) of every cell, in the order in which they ended."""
    lines = (results / "cells.txt").read_text(encoding="utf-8").splitlines()
    told = [re.fullmatch(r"(\S+) (\d+) s wall (\d+) s cpu", line) for line in lines]
    return [(line[1], int(line[2]), int(line[3])) for line in told if line]


def fill(text: str, pieces: dict[str, Callable[[], str]]) -> str:
    """A page with every table anew."""
    return re.sub(
        r"<!-- (.+?) -->\n.*?<!-- end -->",
        lambda found: f"<!-- {found[1]} -->\n{pieces[found[1]]()}\n<!-- end -->",
        text,
        flags=re.S,
    )
