"""One report over all tables of a study: scores with marks, curves over tables, arms against a control, heat maps.

results.md and report.html show every table; results.json holds what they show, with every seed's scores;
tables/NAME has each table's own report, with the items.
"""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from crossin_jax.config import Study, UserError
from crossin_jax.evaluation import study_figures
from crossin_jax.evaluation.figures import number
from crossin_jax.evaluation.metrics import Mode
from crossin_jax.evaluation.predictions import Predictions
from crossin_jax.evaluation.report import explain_marks, format_estimate, write_results
from crossin_jax.evaluation.summary import Block, Change, Estimate, Row, Run
from crossin_jax.evaluation.wording import MODES_IN_WORDS, describe_score, method_name
from crossin_jax.outputs import write_whole

FORMAT = 1
HIDDEN = ("byte",)  # ways of choosing that only the tables' own reports show
STYLE = """
:root { color-scheme: light dark; --line: #8886; --soft: #888; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 0 auto; padding: 20px 16px 60px; }
h1 { line-height: 1.2; } h2 { margin: 44px 0 4px; font-size: 1.25rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }
th, td { padding: 4px 14px 4px 0; text-align: left; white-space: nowrap; border-top: 1px solid var(--line); }
tr.group th { padding-top: 14px; } td b { font-weight: 600; } .soft, caption { color: var(--soft); }
figure { margin: 18px 0; overflow-x: auto; } figure svg { background: #fff; border-radius: 8px; max-width: 100%;
  min-width: 560px; height: auto; }
"""


@dataclass(frozen=True, slots=True)
class Table:
    """The runs that stand together; the first arm is the one that others are compared with."""

    name: str
    runs: Sequence[Run]
    baselines: dict[str, list[Predictions]]


def write_study(folder: Path, study: Study, tables: Sequence[Table], mode: Mode) -> dict[str, list[Block]]:
    """Writes the study's report and each table's own; returns the blocks by table."""
    blocks = {}
    for table in tables:
        blocks[table.name] = write_results(folder / "tables" / slug(table.name), table.runs, baselines=table.baselines,
                                           mode=mode, title=f"{study.name}: {table.name}")
    figures = {name: (caption, study_figures.to_svg(figure))
               for name, (caption, figure) in draw_figures(study, blocks).items()}
    contents = {"results.json": json.dumps(to_json(study, blocks, mode), indent=1, ensure_ascii=False),
                "results.md": to_markdown(study, blocks, mode), "report.html": to_html(study, blocks, mode, figures)}
    contents |= {f"figures/{name}.svg": svg for name, (_, svg) in figures.items()}
    for name, text in contents.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, text)
    return blocks


def slug(name: str) -> str:
    """A name as part of a path: lower case, words joined by dashes."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower().replace("%", "percent")).strip("-")


def questions(blocks: dict[str, list[Block]]) -> list[tuple[str, str]]:
    """(benchmark, method) of every table to show, in order; a tag that is a benchmark of its own is left out."""
    asked = [(block.benchmark, block.method) for several in blocks.values() for block in several]
    return [key for key in dict.fromkeys(asked) if key[1] not in HIDDEN]


def find(blocks: Sequence[Block], benchmark: str, method: str) -> Block | None:
    """A table's block of a benchmark and method, on all items."""
    return next((block for block in blocks if (block.benchmark, block.method, block.tag) == (benchmark, method, None)),
                None)


def draw_figures(study: Study, blocks: dict[str, list[Block]]) -> dict[str, tuple[str, Any]]:
    """(caption, figure) by file name: curves, contrasts and heat maps of every benchmark, by its first method."""
    figures: dict[str, tuple[str, Any]] = {}
    first = dict(reversed([(benchmark, method) for benchmark, method in questions(blocks)]))
    for benchmark, method in reversed(first.items()):
        here = {name: block for name, several in blocks.items() if (block := find(several, benchmark, method))}
        what = f"{benchmark}, {method_name(method)}"
        for title, points in study.curves.items():
            known = {x: here[table] for x, table in points.items() if table in here}
            if len(known) > 1:
                figures[slug(f"{title} {benchmark}")] = (f"{title}: {what}", study_figures.draw_curves(title, known))
        for contrast in study.contrasts:
            known = {table: here[table] for table in contrast.tables if table in here}
            if known:
                figures[slug(f"{contrast.title} {benchmark}")] = (
                    f"{contrast.title}: {what}; a dot per seed, the bar is their mean",
                    study_figures.draw_contrast(contrast, known))
        figures[slug(f"languages {benchmark}")] = (f"Accuracy by language: {what}", study_figures.draw_languages(here))
    return figures


# ---- Tables

def rows_of(blocks: dict[str, list[Block]], benchmark: str, method: str) -> list[tuple[str, Block, Row]]:
    """(table, block, row) of everything that was asked this way."""
    return [(name, block, row) for name, several in blocks.items()
            if (block := find(several, benchmark, method)) for row in block.rows]


def cells(block: Block, row: Row) -> list[str]:
    """The headline scores of a row."""
    return [format_estimate(row.scores[name]) if name in row.scores else "–" for name in block.headline]


def notes(blocks: dict[str, list[Block]], mode: Mode) -> str:
    """How the tables are to be read."""
    everything = [block for several in blocks.values() for block in several]
    return (f"{MODES_IN_WORDS[mode]} {explain_marks(everything)}. The first arm of each table is the one compared "
            "with. AC3 says little without the accuracy beside it.")


def heading(block: Block) -> str:
    """The benchmark and method in one line."""
    return f"{block.benchmark}: {method_name(block.method)}"


def to_markdown(study: Study, blocks: dict[str, list[Block]], mode: Mode) -> str:
    """results.md: per benchmark and method one table with every arm of every table."""
    lines = [f"# {study.name}", "", notes(blocks, mode), ""]
    for benchmark, method in questions(blocks):
        rows = rows_of(blocks, benchmark, method)
        block = rows[0][1]
        lines += [f"## {heading(block)}", "", f"Blind guessing: {number(block.chance)}.", "",
                  "| table | arm | seeds | items | " + " | ".join(describe_score(n) for n in block.headline) + " |",
                  "|---" * (len(block.headline) + 4) + "|"]
        for name, block, row in rows:
            seeds = "rule" if row.is_baseline else str(len(row.seeds))
            told = [name, row.arm, seeds, str(row.num_items), *cells(block, row)]
            lines.append("| " + " | ".join(text.replace("|", "\\|") for text in told) + " |")
        lines.append("")
    return "\n".join(lines)


def to_html(study: Study, blocks: dict[str, list[Block]], mode: Mode, figures: dict[str, tuple[str, str]]) -> str:
    """The page: tables, then figures, all inside one file."""
    out = ['<!doctype html><html lang="en"><head><meta charset="utf-8">'
           '<meta name="viewport" content="width=device-width, initial-scale=1">'
           f"<title>{escape(study.name)}</title><style>{STYLE}</style></head><body><h1>{escape(study.name)}</h1>"
           f'<p class="soft">{escape(notes(blocks, mode))}</p><p>Items and intervals: ' + " · ".join(
               f'<a href="tables/{slug(name)}/report.html">{escape(name)}</a>' for name in blocks) + "</p>"]
    for benchmark, method in questions(blocks):
        rows = rows_of(blocks, benchmark, method)
        block, last = rows[0][1], None
        heads = "".join(f"<th>{escape(describe_score(name))}</th>" for name in block.headline)
        out.append(f'<h2>{escape(heading(block))}</h2><div class="wide"><table><caption>blind guessing scores '
                   f"{number(block.chance)}</caption><tr><th></th><th>seeds</th>{heads}</tr>")
        for name, block, row in rows:
            if name != last:
                out.append(f'<tr class="group"><th colspan="{len(block.headline) + 2}">{escape(name)} <span '
                           f'class="soft">{row.num_items} items, {escape(" ".join(block.languages))}</span></th></tr>')
                last = name
            out.append(f"<tr><td>{escape(row.arm)}</td><td>{'rule' if row.is_baseline else len(row.seeds)}</td>"
                       + "".join(f"<td>{escape(text)}</td>" for text in cells(block, row)) + "</tr>")
        out.append("</table></div>")
    out.append("<h2>Figures</h2>")
    out += [f"<figure><figcaption>{escape(caption)}</figcaption>{svg[svg.index('<svg'):]}</figure>"
            for caption, svg in figures.values()]
    return "".join([*out, "</body></html>\n"])


def to_json(study: Study, blocks: dict[str, list[Block]], mode: Mode) -> dict[str, Any]:
    """results.json: per table, benchmark and method the arms with estimate, range, change and every seed's scores."""
    def entry(row: Row) -> dict[str, Any]:
        scores = {}
        for name, e in row.scores.items():
            scores[name] = {"value": round(e.value, 6), "low": round(e.low, 6), "high": round(e.high, 6)}
            if e.sd is not None:
                scores[name]["sd"] = round(e.sd, 6)
            if e.change is not None:
                scores[name] |= {"change": round(e.change.difference, 6), "p": round(e.change.p, 6),
                                 "clear": e.change.clear}
        return {"arm": row.arm, "rule": row.is_baseline, "items": row.num_items, "scores": scores,
                "seeds": {str(seed): {name: round(value, 6) for name, value in told.items()}
                          for seed, told in row.seed_scores.items()}}
    return {"format": FORMAT, "title": study.name, "mode": mode, "tables": {name: [
        {"benchmark": block.benchmark, "method": block.method, "languages": block.languages, "chance": block.chance,
         "arms": [entry(row) for row in block.rows]}
        for block in several if block.tag is None] for name, several in blocks.items()}}


def from_json(results: dict[str, Any]) -> dict[str, list[Block]]:
    """The blocks that `to_json` wrote, as far as it wrote them: no answers, and items of all tags together."""
    if results["format"] != FORMAT:
        raise UserError(f"results of a study in format {results['format']}, but this version reads {FORMAT}")

    def read(entry: dict[str, Any]) -> Row:
        scores = {name: Estimate(told["value"], told["low"], told["high"], told.get("sd"), change=Change(
            told["change"], math.nan, math.nan, told["p"], told["clear"]) if "change" in told else None)
            for name, told in entry["scores"].items()}
        seeds = {int(seed): told for seed, told in entry["seeds"].items()}
        return Row(entry["arm"], tuple(seeds), entry["items"], scores, seeds, {}, [], {}, {}, entry["rule"])
    return {table: [Block(told["benchmark"], told["method"], None, tuple(told["languages"]),
                          max(entry["items"] for entry in told["arms"]), told["chance"],
                          tuple(read(entry) for entry in told["arms"])) for told in several]
            for table, several in results["tables"].items()}
