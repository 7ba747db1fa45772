"""Results as text: the tables of the terminal and of results.md."""

from collections.abc import Sequence

from crossin_jax.evaluation.metrics import Mode
from crossin_jax.report.summary import Block, Estimate, Row
from crossin_jax.report.wording import (
    KINDS_IN_WORDS,
    MAX_SIZE,
    MODES_IN_WORDS,
    describe_score,
    group_scores,
    language_name,
    mark,
    method_name,
    number,
    percent,
)
from crossin_jax.tables import format_markdown, format_table

# Subsets of a benchmark that the terminal shows
MAX_SUBSETS = 12
READING_HEADS = (
    "",
    "language",
    "no clear choice",
    "language identified",
    "in another language",
    "second reader certain",
    "agrees",
    "lines pass",
    "words pass",
)


def print_table(blocks: Sequence[Block]) -> str:
    """The headline scores of every block, for the terminal.

    The choice by bytes is only in results.md, and so are subsets where a benchmark has many, such
    as the 57 subjects of MMLU.
    """
    blocks = [block for block in blocks if block.method != "byte"]
    benchmarks = {block.benchmark for block in blocks}
    tags: dict[str, set[str]] = {}
    for block in blocks:
        tags.setdefault(block.benchmark, set()).update({block.tag} if block.tag else ())
    many = {name: len(found) for name, found in tags.items() if len(found) > MAX_SUBSETS}
    lines = []
    for block in blocks:
        if block.tag and block.benchmark in many:
            continue
        # The items of a tag may also be a benchmark of their own, such as cross_world/opaque, which
        # has better distractors: only that one is shown.
        if f"{block.benchmark}/{block.tag}" in benchmarks:
            continue
        # Only AC3 and accuracy have their range, so that a row fits on a terminal.
        wide = ("accuracy", block.main_score)
        table = [["", *map(describe_score, block.headline)]]
        table += [[label(row), *format_scores(block, row, wide)] for row in block.rows]
        lines += [describe_block(block), *format_table(table), ""]
    lines += [f"{name}: {count} subsets are in results.md\n" for name, count in many.items()]
    return "\n".join([*lines, explain_marks(blocks)])


def to_markdown(title: str, blocks: Sequence[Block], mode: Mode) -> str:
    """results.md: one table per block, then every score by language and number of languages."""
    lines = [
        f"# {' '.join(title.split())}",
        "",
        f"{MODES_IN_WORDS[mode]} {explain_marks(blocks)}. "
        "AC3 says little without the accuracy beside it.",
        "",
    ]
    for block in blocks:
        lines += [
            f"## {' '.join(describe_block(block).split())}",
            "",
            *([f"Blind guessing: {number(block.chance)}.", ""] if block.kind != "open" else []),
            *format_markdown(
                ("", *map(describe_score, block.headline)),
                [(label(row), *format_scores(block, row)) for row in block.rows],
            ),
        ]
        shown = {name for names in group_scores(block.rows[0].scores).values() for name in names}
        rest = [name for name in block.rows[0].scores if name in shown - {*block.headline}]
        if rest:
            rows = [
                (describe_score(name), *(format_score(row, name, False) for row in block.rows))
                for name in rest
            ]
            lines += ["", *format_markdown(("", *(row.arm for row in block.rows)), rows)]
        lines += [*readings_table(block), ""]
    return "\n".join(lines)


def readings_table(block: Block) -> list[str]:
    """By language: unclear answers, answers in another language, and a second reader's view."""
    rows = [(row, code) for row in block.rows for code in block.languages if code in row.readings]
    if block.tag or not rows:
        return []
    table = []
    for row, code in rows:
        reading = row.readings[code]
        shares = (
            sum(row.coin_share.get(code, {}).values()),
            reading.identified,
            reading.off_target,
            reading.own_certain,
            reading.agreement,
            reading.line_pass,
            reading.word_pass,
        )
        table.append((row.arm, language_name(code), *map(percent, shares)))
    return ["", *format_markdown(READING_HEADS, table)]


# ---- Parts


def describe_block(block: Block) -> str:
    """The heading of a block in one line."""
    only = f", only items tagged {block.tag}" if block.tag else ""
    items = f"{block.num_items} items, {list_languages(block)}"
    kind = f" ({KINDS_IN_WORDS[block.kind]})" if block.kind in KINDS_IN_WORDS else ""
    return f"{block.benchmark}{only}: {method_name(block.method)}, {items}{kind}"


def list_languages(block: Block) -> str:
    """The codes of the languages, or their number where a line has no room for them."""
    few = len(block.languages) <= MAX_SIZE
    return " ".join(block.languages) if few else f"{len(block.languages)} languages"


def label(row: Row) -> str:
    """The name of an arm; a rule is marked as one."""
    return row.arm + (" (rule)" if row.is_baseline else "")


def format_scores(block: Block, row: Row, wide: Sequence[str] | None = None) -> list[str]:
    """The headline scores of a row; those in `wide` have their range (default: all)."""
    return [format_score(row, name, wide is None or name in wide) for name in block.headline]


def format_score(row: Row, name: str, with_range: bool = True) -> str:
    """One score of a row, or a dash if the row has none."""
    return format_estimate(row.scores[name], with_range=with_range) if name in row.scores else "–"


def format_estimate(estimate: Estimate, *, with_range: bool = True) -> str:
    """.512 [.471, .554]▲ or, over seeds, .512 ± .021▲; the mark compares with the first arm."""
    interval = f" [{number(estimate.low)}, {number(estimate.high)}]"
    span = interval if estimate.sd is None else f" ± {number(estimate.sd)}"
    return number(estimate.value) + span * with_range + mark(estimate)


def explain_marks(blocks: Sequence[Block]) -> str:
    """The meaning of ranges and marks in these tables."""
    rows = [row for block in blocks for row in block.rows if not row.is_baseline]
    over_seeds = any(len(row.seeds) > 1 for row in rows)
    ranges = "± standard deviation over seeds" if over_seeds else "[95 % interval over items]"
    if len({row.arm for row in rows}) < 2:
        return ranges
    sign = " and the same sign in every seed" if over_seeds else ""
    return (
        f"{ranges}; ▲ ▼ above or below {rows[0].arm}, p < 0.05 by paired bootstrap over items{sign}"
    )
