"""Results on disk and on screen: results.json, results.md, report.html, answers.json.gz, and a table for the terminal.

results.json: {"format", "title", "mode", "level", "resamples", "provenance", "runs": [{"name", "seed", "provenance"}],
"blocks": [summary.Block as an object]}; docs/evaluation.md explains every score in it.
"""

import gzip
import json
import zlib
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from crossin_jax.config import UserError
from crossin_jax.evaluation.benchmarks import Benchmark, load_benchmark
from crossin_jax.evaluation.figures import number, text_width
from crossin_jax.evaluation.metrics import Mode
from crossin_jax.evaluation.page import build_page
from crossin_jax.evaluation.predictions import Predictions, decode, encode
from crossin_jax.evaluation.summary import LEVEL, NUM_RESAMPLES, Block, Estimate, Row, Run, summarise
from crossin_jax.evaluation.wording import MODES_IN_WORDS, describe_score, language_name, method_name, percent
from crossin_jax.outputs import write_whole

FORMAT = 1
ANSWERS = "answers.json.gz"

__all__ = ["Run", "print_table", "read_pair", "read_results", "write_results"]


def write_results(folder: str | Path, runs: Sequence[Run], provenance: dict[str, Any] | None = None, *,
                  baselines: dict[str, list[Predictions]] | None = None, mode: Mode = "expectation",
                  title: str | None = None, benchmarks: Sequence[Benchmark] = ()) -> list[Block]:
    """Writes the results of several runs into a folder, each file whole or not at all; returns what they say.

    The first run's arm is the one that others are compared with. `baselines` are answers by rules without a model.
    `benchmarks` give the page its questions; without them it shows those of Cross-World alone. Raises UserError where
    the folder cannot be written.
    """
    folder, title = Path(folder), title or "Cross-lingual evaluation"
    blocks = summarise(runs, baselines, mode)
    results = {"format": FORMAT, "title": title, "mode": mode, "level": LEVEL, "resamples": NUM_RESAMPLES,
               "provenance": provenance or {},
               "runs": [{"name": run.name, "seed": run.seed, "provenance": run.provenance} for run in runs],
               "blocks": [asdict(block) for block in blocks]}
    page = build_page(title, blocks, runs, _find_texts(runs, benchmarks), mode, provenance or {})
    answers = [{"name": run.name, "seed": run.seed, "provenance": run.provenance,
                "predictions": [encode(predictions) for predictions in run.predictions]} for run in runs]
    contents = {"results.json": _to_json(results, indent=1), "results.md": to_markdown(title, blocks, mode).encode(),
                "report.html": page.encode("utf-8", "replace"),
                ANSWERS: gzip.compress(_to_json({"format": FORMAT, "runs": answers}), mtime=0)}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, raw in contents.items():
            write_whole(folder / name, raw)
    except OSError as error:
        raise UserError(f"{folder}: results cannot be written ({error.strerror}); name another folder") from None
    return blocks


def read_results(folder: str | Path) -> list[Run]:
    """The runs that `write_results` left in a folder, answers included; UserError where there are none."""
    file = Path(folder) / ANSWERS
    try:
        stored = json.loads(gzip.decompress(file.read_bytes()))
        if stored["format"] != FORMAT:
            raise UserError(f"{file}: format {stored['format']}, but this version reads {FORMAT}; evaluate again")
        return [Run(run["name"], run["seed"], [decode(p) for p in run["predictions"]], run["provenance"])
                for run in stored["runs"]]
    except FileNotFoundError:
        raise UserError(f"{file} does not exist; give a folder that evaluate wrote its results to") from None
    except (OSError, EOFError, ValueError, KeyError, TypeError, zlib.error) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{file}: damaged ({type(error).__name__}: {error}); evaluate again") from None


def read_pair(first: str | Path, second: str | Path) -> list[Run]:
    """The runs of two result folders, for a before and after: the first folder's first arm is the one compared with.

    Arms of the same name take their folder's. Raises UserError where the folders share no benchmark and method.
    """
    pair = read_results(first), read_results(second)
    asked = [{(p.benchmark, p.method) for run in runs for p in run.predictions} for runs in pair]
    if not asked[0] & asked[1]:
        names = [", ".join(sorted({f"{benchmark} ({method})" for benchmark, method in each})) for each in asked]
        raise UserError(f"nothing to compare: {first} holds {names[0]}\n{second} holds {names[1]}\n"
                        "evaluate both on the same benchmark by the same method")
    taken = {run.name for run in pair[0]} & {run.name for run in pair[1]}
    return [replace(run, name=f"{run.name} ({folder})") if run.name in taken else run
            for folder, runs in zip((first, second), pair, strict=True) for run in runs]


def _to_json(value: Any, indent: int | None = None) -> bytes:
    return json.dumps(value, ensure_ascii=False, indent=indent).encode("utf-8", "surrogatepass") + b"\n"


def _find_texts(runs: Sequence[Run], benchmarks: Sequence[Benchmark]) -> dict[str, Benchmark]:
    """The questions by benchmark, as the first run saw them."""
    texts = {benchmark.name: benchmark for benchmark in reversed(benchmarks)}
    for run in runs[:1]:
        for predictions in run.predictions:
            name = predictions.benchmark
            if name not in texts and name.startswith("cross_world"):
                texts[name] = load_benchmark(name, predictions.languages, seed=run.seed)
    return texts


# ── tables ───────────────────────────────────────────────────────────────────────────────────────────────────────────

def describe_block(block: Block) -> str:
    """The block's heading in one line."""
    only = f", only items tagged {block.tag}" if block.tag else ""
    return f"{block.benchmark}{only}: {method_name(block.method)}, {block.num_items} items, {' '.join(block.languages)}"


def format_estimate(estimate: Estimate, *, with_range: bool = True) -> str:
    """.512 [.471, .554]▲ or, over seeds, .512 ± .021▲; the mark says: clearly above or below the first arm."""
    text = number(estimate.value)
    if with_range:
        text += f" ± {number(estimate.sd)}" if estimate.sd is not None else \
            f" [{number(estimate.low)}, {number(estimate.high)}]"
    return text + mark(estimate)


def mark(estimate: Estimate) -> str:
    """▲ or ▼ where the score differs clearly from the first arm's."""
    change = estimate.change
    return "" if change is None or not change.clear else "▲" if change.difference > 0 else "▼"


def explain_marks(blocks: Sequence[Block]) -> str:
    """What ranges and marks mean in these tables."""
    rows = [row for block in blocks for row in block.rows if not row.is_baseline]
    over_seeds = any(len(row.seeds) > 1 for row in rows)
    ranges = "± standard deviation over seeds" if over_seeds else "[95 % interval over items]"
    if len({row.arm for row in rows}) < 2:
        return ranges
    return f"{ranges}; ▲ ▼ above or below {rows[0].arm}, p < 0.05 by paired bootstrap over items" + (
        " and the same sign in every seed" if over_seeds else "")


def print_table(runs: Sequence[Run], *, baselines: dict[str, list[Predictions]] | None = None,
                mode: Mode = "expectation") -> str:
    """The headline scores of every block as text for the terminal; those by bytes stand in results.md."""
    blocks = [block for block in summarise(runs, baselines, mode) if block.method != "byte"]
    lines, names = [], {block.benchmark for block in blocks}
    for block in blocks:
        if f"{block.benchmark}/{block.tag}" in names:  # a benchmark of its own, with better distractors
            continue
        table = [["", *map(describe_score, block.headline)]]
        table += [[row.arm + (" (rule)" if row.is_baseline else ""), *_cells(block, row)] for row in block.rows]
        lines += [describe_block(block), *_align(table), ""]
    return "\n".join([*lines, explain_marks(blocks)])


def _cells(block: Block, row: Row) -> list[str]:
    wide = {"accuracy", block.headline[-1]}  # AC3 stands beside accuracy, both with their range
    return [format_estimate(row.scores[name], with_range=name in wide) if name in row.scores else "–"
            for name in block.headline]


def _align(table: list[list[str]]) -> list[str]:
    """Columns of equal width, the first flush left; wide characters count twice."""
    widths = [max(map(text_width, column)) for column in zip(*table, strict=True)]
    return ["  ".join(cell + " " * (width - text_width(cell)) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in table]


def to_markdown(title: str, blocks: Sequence[Block], mode: Mode) -> str:
    """results.md: one table per block, then every score by language and number of languages."""
    lines = [f"# {_cell(title)}", "", f"{MODES_IN_WORDS[mode]} {explain_marks(blocks)}. "
             "AC3 says little without the accuracy beside it.", ""]
    for block in blocks:
        names = block.headline
        lines += [f"## {_cell(describe_block(block))}", "", f"Blind guessing: {number(block.chance)}.", "",
                  "| | " + " | ".join(describe_score(name) for name in names) + " |", "|---" * (len(names) + 1) + "|"]
        lines += [f"| {_cell(row.arm)}{' (rule)' if row.is_baseline else ''} | " + " | ".join(
            format_estimate(row.scores[name]) if name in row.scores else "–" for name in names) + " |"
            for row in block.rows]
        rest = [name for name in block.rows[0].scores if name not in names]
        if rest:
            lines += ["", "| | " + " | ".join(_cell(row.arm) for row in block.rows) + " |",
                      "|---" * (len(block.rows) + 1) + "|"]
            lines += [f"| {describe_score(name)} | " + " | ".join(
                format_estimate(row.scores[name], with_range=False) if name in row.scores else "–"
                for row in block.rows) + " |" for name in rest]
        lines += _language_table(block)
        lines.append("")
    return "\n".join(lines)


def _language_table(block: Block) -> list[str]:
    """By language: answers without one clear choice, in another language, and what our own reader says of them."""
    rows = [(row, code) for row in block.rows for code in block.languages if code in row.readings]
    if block.tag or not rows:
        return []
    heads = ("", "language", "no clear choice", "language told", "in another language", "second reader certain",
             "agrees")
    lines = ["", "| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for row, code in rows:
        reading = row.readings[code]
        values = (sum(row.coin_share[code].values()), reading.identified, reading.off_target, reading.own_certain,
                  reading.agreement)
        lines.append(f"| {_cell(row.arm)} | {language_name(code)} | " + " | ".join(map(percent, values)) + " |")
    return lines


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())
