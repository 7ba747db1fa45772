"""Results as text: the tables of the terminal and of results.md."""

from collections.abc import Sequence

from crossin_jax.evaluation.metrics import Mode
from crossin_jax.evaluation.stats import SMALL, Change
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
from crossin_jax.tables import Table, format_markdown

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


def list_parts(tables: dict[str, Sequence[Block]], style: str = "text") -> list[str | Table]:
    """The headline scores of every table of a study, for `tables.print_parts`; an evaluation has
    one table without a name.

    With style "csv" every score of every way is a row of one table.
    """
    if style == "csv":
        named = any(tables)
        rows = [
            ((name,) if named else ()) + row
            for name, blocks in tables.items()
            for block in blocks
            for row in list_rows(block)
        ]
        return [Table((("table",) if named else ()) + CSV_HEAD, rows)]
    parts: list[str | Table] = []
    for name, blocks in tables.items():
        parts += [f"== {name}\n"] if name else []
        parts += _list_parts(blocks)
    return parts


def _list_parts(blocks: Sequence[Block]) -> list[str | Table]:
    """Of one table.

    Of several ways of choosing, the primary one has its table, with differences from the first arm;
    each other way has a line, with a note where its differences have another sign. Of many subsets,
    such as the 57 subjects of MMLU, only results.md has the tables.
    """
    benchmarks = {block.benchmark for block in blocks}
    tags: dict[str, set[str]] = {}
    for block in blocks:
        tags.setdefault(block.benchmark, set()).update({block.tag} if block.tag else ())
    many = {name: len(found) for name, found in tags.items() if len(found) > MAX_SUBSETS}
    parts: list[str | Table] = []
    for primary, others in group_ways(blocks):
        if primary.tag and primary.benchmark in many:
            continue
        # The items of a tag may also be a benchmark of their own, such as cross_world/opaque, which
        # has better distractors: only that one is shown.
        if f"{primary.benchmark}/{primary.tag}" in benchmarks:
            continue
        # Only AC3 and accuracy have their range, so that a row fits on a terminal.
        wide = ("accuracy", primary.main_score)
        table = [[label(row), *format_scores(primary, row, wide)] for row in primary.rows]
        head = ["", *map(describe_score, primary.headline)]
        parts += [describe_block(primary), Table(head, table), *describe_chance(primary)]
        if any(row.scores[name].change for row in primary.rows for name in row.scores):
            parts += ["", Table(*tabulate_changes(primary))]
        parts += [describe_way(other) for other in others]
        parts += [note for other in others for note in compare_signs(primary, other)]
        parts.append("")
    parts += [f"{name}: {count} subsets are in results.md\n" for name, count in many.items()]
    if any(len(ways) for _, ways in group_ways(blocks)):
        parts.append(f"{WHY_PRIMARY}; see docs/evaluation.md")
    return [*parts, *warn_of_few(blocks), explain_marks(blocks)]


# ---- Ways of choosing

# The first of these that was asked is the primary one.
PRIMARY = ("sum", "generate", "mean", "letter", "byte")
WHY_PRIMARY = (
    "the primary way is the summed log-likelihood: it needs no reader of free text and no "
    "normalisation"
)
CSV_HEAD = (
    *("benchmark", "tag", "method", "items", "arm", "seeds", "score"),
    *(
        "value",
        "low",
        "high",
        "sd",
        "chance",
        "difference",
        "difference_low",
        "difference_high",
        "p",
    ),
)


def group_ways(blocks: Sequence[Block]) -> list[tuple[Block, list[Block]]]:
    """(primary way of choosing, the other ways) of every benchmark and tag."""
    groups: dict[tuple[str, str | None], list[Block]] = {}
    for block in blocks:
        groups.setdefault((block.benchmark, block.tag), []).append(block)
    ranked = [
        sorted(ways, key=lambda b: PRIMARY.index(b.method) if b.method in PRIMARY else len(PRIMARY))
        for ways in groups.values()
    ]
    return [(ways[0], ways[1:]) for ways in ranked]


def tabulate_changes(block: Block) -> tuple[list[str], list[list[str]]]:
    """Head and rows: difference from the first arm and p, for every score of the headline."""
    head = [f"difference from {block.rows[0].arm} (p)", *map(describe_score, block.headline)]
    rows = []
    for row in block.rows:
        changes = [row.scores[n].change if n in row.scores else None for n in block.headline]
        if any(changes):
            rows.append([label(row), *(format_change(change) for change in changes)])
    return head, rows


def format_change(change: Change | None) -> str:
    """+.034 (.012), or a dash; p below a thousandth is (<.001)."""
    if change is None:
        return "–"
    sign = "+" if change.difference >= 0 else ""
    p = "<.001" if change.p < 0.001 else number(change.p)
    return f"{sign}{number(change.difference)} ({p})".replace("-", "−")


def describe_way(block: Block) -> str:
    """Another way of choosing in one line: every arm's main score."""
    arms = [f"{label(row)} {format_score(row, block.main_score, False)}" for row in block.rows]
    return f"{method_name(block.method)}, {describe_score(block.main_score)}: {', '.join(arms)}"


def compare_signs(primary: Block, other: Block) -> list[str]:
    """A note where an arm is above the first one by one way of choosing, and below by the other."""
    others = {row.arm: row.scores.get(primary.main_score) for row in other.rows}
    changes = [
        (row.arm, row.scores[primary.main_score].change, others.get(row.arm))
        for row in primary.rows
        if primary.main_score in row.scores
    ]
    arms = [
        arm
        for arm, change, estimate in changes
        if change
        and estimate
        and estimate.change
        and change.difference * estimate.change.difference < 0
    ]
    if not arms:
        return []
    ways = f"{method_name(primary.method)} and {method_name(other.method)}"
    score = describe_score(primary.main_score)
    return [f"note: {ways} disagree in sign on {score} of {', '.join(arms)}"]


def describe_chance(block: Block) -> list[str]:
    """What blind guessing gives, score by score; nothing where there is nothing to choose."""
    if block.kind == "open":
        return []
    known = {"accuracy": block.chance} | block.chances
    values = ", ".join(f"{describe_score(name)} {number(value)}" for name, value in known.items())
    return [f"blind guessing: {values}"]


def warn_of_few(blocks: Sequence[Block]) -> list[str]:
    """A line where so few items were asked that they decide nothing."""
    few = min((block.num_items for block in blocks), default=SMALL)
    if few >= SMALL:
        return []
    return [
        f"fewer than {SMALL} items decide nothing, and a table here has {few}: such intervals are "
        "Wilson's, for consistency and AC3 too"
    ]


def list_rows(block: Block) -> list[tuple[object, ...]]:
    """The rows of CSV_HEAD for every arm and score of a block."""
    chances = {"accuracy": block.chance} | block.chances
    rows = []
    for row in block.rows:
        for name, e in row.scores.items():
            change = e.change
            changed = (
                (change.difference, change.low, change.high, change.p) if change else ("",) * 4
            )
            numbers = (e.value, e.low, e.high, e.sd, chances.get(name), *changed)
            rows.append(
                (
                    *(block.benchmark, block.tag or "", block.method, block.num_items),
                    *(label(row), len(row.seeds), name),
                    *(f"{x:.6g}" if isinstance(x, float) else "" for x in numbers),
                )
            )
    return rows


def to_markdown(title: str, blocks: Sequence[Block], mode: Mode) -> str:
    """results.md: one table per block, then every score by language and number of languages."""
    lines = [
        f"# {' '.join(title.split())}",
        "",
        f"{MODES_IN_WORDS[mode]} {explain_marks(blocks)}. "
        "AC3 says little without the accuracy beside it.",
        "",
        *(f"{' '.join(warn_of_few(blocks))}.\n" for _ in warn_of_few(blocks)),
    ]
    for block in blocks:
        lines += [
            f"## {' '.join(describe_block(block).split())}",
            "",
            *(part for line in describe_chance(block) for part in (f"B{line[1:]}.", "")),
            *format_markdown(
                ("", *map(describe_score, block.headline)),
                [(label(row), *format_scores(block, row)) for row in block.rows],
            ),
        ]
        head, changes = tabulate_changes(block)
        lines += ["", *format_markdown(head, changes)] if changes else []
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
