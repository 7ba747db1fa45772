"""Benchmarks by name: rows of a file, a folder or the Hub become items in the wanted languages."""

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from crossin_jax.config import Config, UserError
from crossin_jax.evaluation import layouts
from crossin_jax.evaluation.items import Benchmark, Item, Version
from crossin_jax.evaluation.layouts import Row
from crossin_jax.evaluation.registry import (
    KNOWN,
    AbsentBenchmark,
    Known,
    check_languages,
    refuse_unknown,
    split_name,
)
from crossin_jax.evaluation.sources import (
    Rows,
    has_split,
    is_hub_name,
    needs_network,
    read_hub,
    read_path,
)
from crossin_jax.guests import open_guest
from crossin_jax.languages import canonical, canonical_list, find_code, match, name_of

# Splits with examples for few-shot prompts, as published benchmarks call them
SHOT_SPLITS = ("dev", "validation")
# A published benchmark may have up to this share of faulty items, which are left out
MAX_LEFT_OUT = 0.05
# With a larger share of items whose gold answer differs between languages, the order of the choices
# differs on purpose
MAX_MOVED = 0.1

log = logging.getLogger(__name__)


def load_benchmark(
    name: str,
    languages: Sequence[str],
    *,
    limit: int | None = None,
    seed: int = 0,
    split: str | None = None,
    with_shots: bool = False,
) -> Benchmark:
    """Reads a benchmark in the given languages.

    `name` is a short name of `registry.KNOWN` (from the Hub, or SHORT:PATH), cross_world[:split]
    [/opaque] (embedded; `seed` parts its territories), a Hub id (ID or ID:CONFIGURATION), a file, a
    folder, or a path with {lang}; docs/evaluation.md has an example of each. The columns are read
    by `layouts`. `split` None is the published one. `limit` keeps the first items, of each language
    where the items differ. `with_shots` reads the examples of another split, where there is one.
    Faults raise `UserError` with file, item and language; of what is published, up to 5 % of the
    items are left out instead, and logged.
    """
    codes = canonical_list(languages, f"benchmark {name!r}")
    if not codes:
        raise UserError(f"benchmark {name!r}: no languages given; name at least one, e.g. en")
    if name.split(":")[0] == "cross_world":
        benchmark = _load_world(name, codes, seed)
    else:
        short, path = split_name(name)
        known = KNOWN[short] if short else None
        if short and not path:
            check_languages(short, codes)
        split = split or (known.split if known else "test")
        rows = _find_rows(name, short, path, codes, split)
        benchmark = _make_benchmark(rows, codes, known is None or known.is_parallel)
        if with_shots and benchmark.kind != "open":
            benchmark = _add_pool(benchmark, name, short, path, codes, split)
    return replace(benchmark, items=_limit(benchmark, limit))


def check_benchmarks(config: Config, files_may_come: bool = False) -> list[str]:
    """Refuses, before anything is trained, what `load_benchmark` would refuse afterwards, as far as
    that is known without the network: benchmarks on the Hub are not read.

    Returns the paths that do not exist, where `files_may_come` until they are needed.
    """
    absent = []
    evaluation = config.evaluation
    languages = evaluation.languages or config.data.languages
    for name in evaluation.benchmarks:
        short, path = split_name(name)
        if name.split(":")[0] == "cross_world":
            _, split, _ = _parse_world(name)
            try:
                open_guest("world").check_split(split, languages)
            except UserError as fault:
                raise UserError(f"benchmark {name!r}: {fault}") from None
        elif short and not path and KNOWN[short].hub:
            check_languages(short, languages)
        elif short or not needs_network(name):
            try:
                load_benchmark(name, languages, seed=config.seed, split=evaluation.split)
            except AbsentBenchmark:
                # Without a folder it may as well be a misspelt name.
                if not files_may_come or "/" not in name:
                    raise
                absent.append(name)
    return absent


def _parse_world(name: str) -> tuple[str, str, str]:
    """Label, split and subset: "cross_world:dev/opaque" has the split "dev" and the subset
    "opaque".
    """
    label = name if ":" in name else "cross_world:test"
    split = label.partition(":")[2]
    whole = split.removesuffix("/opaque")
    return label, whole, "all" if whole == split else "opaque"


def _load_world(name: str, codes: Sequence[str], seed: int) -> Benchmark:
    label, split, subset = _parse_world(name)
    rows = open_guest("world").world_benchmark(split, codes, seed, subset)
    items = [
        _read_item(_split_columns(row, number, codes), name) for number, row in enumerate(rows, 1)
    ]
    place = f"embedded world, seed {seed}"
    return _finish(Benchmark(label, tuple(items), tuple(codes), place), items)


def _limit(benchmark: Benchmark, limit: int | None) -> tuple[Item, ...]:
    """The first items, of each language where the items of the languages differ."""
    if limit is None or benchmark.kind == "parallel":
        return benchmark.items[:limit]
    first = [
        [item for item in benchmark.items if code in item.versions][:limit]
        for code in benchmark.languages
    ]
    return tuple({item.id: item for items in first for item in items}.values())


# An item is a row, whose languages are columns, or it is a row in every language:
#
#     SeaEval     {"id": "7", "English": {"question": …, "choices": …, "answer": …}, "Chinese": {…}}
#     MMLU        {"id": "7", "language": "zh", "question": …, "choices": […], "answer": 1}
#     BMLAMA      zh.tsv, row 7: Prompt, Ans, Candidate Ans
#
# ── rows ──────────────────────────────────────────────────────────────────────────────────────────


def _find_rows(name: str, short: str | None, path: str, codes: Sequence[str], split: str) -> Rows:
    if short is None:
        rows = read_path(name, codes, split)
        if rows is None and is_hub_name(name):
            rows = read_hub(name, codes, split)
        if rows is None:
            raise refuse_unknown(name)
        return rows
    known = KNOWN[short]
    if path:
        rows = read_path(path, codes, split)
        if rows is None:
            raise UserError(f"benchmark {name!r}: {path} does not exist")
    elif known.hub is None:
        raise UserError(f"benchmark {name!r} is not on the Hub: {known.remedy}")
    else:
        rows = _read_known(known, codes, split)
    rows.label, rows.is_published = short, True
    return rows


def _read_known(known: Known, codes: Sequence[str], split: str) -> Rows:
    """The rows of a published benchmark; English may be in a data set of its own."""
    if known.english is None or "en" not in codes:
        return read_hub(known.hub, codes, split, known.parts)
    rows = read_hub(known.english, ["en"], split)
    rows.rows = [("en", part, row) for _, part, row in rows.rows]
    if others := [code for code in codes if code != "en"]:
        rows.rows += read_hub(known.hub, others, split, known.parts).rows
    return rows


def _add_pool(
    benchmark: Benchmark, name: str, short: str | None, path: str, codes: Sequence[str], split: str
) -> Benchmark:
    """The benchmark with the items of its dev or validation split as examples, if it has one."""
    place = path or KNOWN[short].hub if short else name
    for other in SHOT_SPLITS:
        if other == split or not has_split(place, codes, other):
            continue
        rows = _find_rows(name, short, path, codes, other)
        pool = _make_benchmark(rows, codes, benchmark.kind == "parallel").items
        renamed = tuple(replace(item, id=f"{other}: {item.id}") for item in pool)
        return replace(benchmark, pool=renamed, has_own_pool=True)
    return benchmark


# ── items ─────────────────────────────────────────────────────────────────────────────────────────


class RawItem(NamedTuple):
    """An item whose rows are not yet read."""

    key: str
    codes: Sequence[str]  # the languages that it must have
    rows: dict[str, Any]  # by language
    whole: Row | None = None  # the row of which they are columns


def _make_benchmark(rows: Rows, codes: Sequence[str], is_parallel: bool) -> Benchmark:
    first = rows.rows[0][2] if rows.rows else {}
    kind = "open" if layouts.is_open(first) else "parallel" if is_parallel else "separate"
    if not layouts.holds_one_language(first):
        raw_items = [
            _split_columns(row, number, codes) for number, (_, _, row) in enumerate(rows.rows, 1)
        ]
    elif kind == "parallel":
        raw_items = _join_languages(_by_language(rows, codes), rows.place, codes)
    else:
        raw_items = _keep_apart(_by_language(rows, codes))
    items, faults = _read_items(raw_items, rows)
    note = "" if is_parallel else "the items of each language are its own"
    benchmark = Benchmark(
        rows.label,
        tuple(items),
        tuple(codes),
        rows.place,
        kind=kind,
        note=note,
        is_cloze=layouts.is_candidates(first),
        num_left_out=len(faults),
    )
    return _finish(benchmark, items)


def _finish(benchmark: Benchmark, items: Sequence[Item]) -> Benchmark:
    """The benchmark with its items, as "separate" where their choices are not in the same order."""
    if not items:
        raise UserError(f"{benchmark.source}: no items in it")
    seen: set[str] = set()
    for item in items:
        if item.id in seen:
            raise UserError(
                f"{benchmark.source}: two items have the id {item.id!r}; "
                "ids are unique within a benchmark"
            )
        seen.add(item.id)
    moved = sum(len({version.answer for version in item.versions.values()}) > 1 for item in items)
    if benchmark.kind == "parallel" and moved > MAX_MOVED * len(items):
        note = "the choices are in another order in each language"
        log.warning(
            "%s: %s (%d of %d gold answers), so only accuracy can be measured",
            benchmark.source,
            note,
            moved,
            len(items),
        )
        benchmark = replace(benchmark, kind="separate", note=note)
    return replace(benchmark, items=tuple(items), pool=tuple(items))


def _read_items(raw_items: Iterable[RawItem], rows: Rows) -> tuple[list[Item], list[UserError]]:
    """The items, and why some are left out, as a few of a published benchmark may be."""
    items, faults = [], []
    for raw in raw_items:
        try:
            items.append(_read_item(raw, rows.place))
        except UserError as fault:
            if not rows.is_published:
                raise
            faults.append(fault)
    if len(faults) > MAX_LEFT_OUT * (len(items) + len(faults)):
        raise faults[0]
    if faults:
        log.warning(
            "%s: %d of %d items are left out in every language, such as %s",
            rows.place,
            len(faults),
            len(items) + len(faults),
            faults[0],
        )
    return items, faults


def _by_language(rows: Rows, codes: Sequence[str]) -> Iterator[tuple[str, str, Row]]:
    """The rows in wanted languages. Where a file has "zh" and "zh-TW", only the first serves
    "zh".
    """
    marks = []
    for code, _, row in rows.rows:
        mark = code or row.get("dialect") or row.get("language") or row.get("lang")
        if mark is None:
            raise UserError(
                f"{rows.place}, item {row.get('id')!r}: the row does not say its language; add a "
                "field language, or give one file per language with {lang} in the path"
            )
        marks.append((mark, canonical(mark, f"{rows.place}, item {row.get('id')!r}")))
    present = {code for _, code in marks}
    for (_, part, row), (mark, code) in zip(rows.rows, marks, strict=True):
        wanted = match(mark, codes)
        if wanted and (wanted == code or wanted not in present):
            yield wanted, part, row


def _join_languages(
    rows: Iterable[tuple[str, str, Row]], place: str, codes: Sequence[str]
) -> Iterator[RawItem]:
    """Items of rows in one language each, which are joined by id, or by position without ids."""
    merged: dict[str, dict[str, Row]] = {}
    counts: dict[tuple[str, str], int] = {}
    for code, part, row in rows:
        counts[code, part] = counts.get((code, part), 0) + 1
        key = layouts.id_of(row) or str(counts[code, part])
        versions = merged.setdefault(f"{part}/{key}" if part else key, {})
        if code in versions:
            raise UserError(
                f"{place}, item {key!r}, {code}: given twice; ids are unique within a language"
            )
        versions[code] = row if not part else {"difficulty": part} | row
    if not merged:
        raise UserError(f"{place}: no rows in {', '.join(codes)}")
    for key, versions in merged.items():
        yield RawItem(key, codes, versions)


def _keep_apart(rows: Iterable[tuple[str, str, Row]]) -> Iterator[RawItem]:
    """Items of one row each, in one language."""
    counts: dict[str, int] = {}
    for code, _, row in rows:
        counts[code] = counts.get(code, 0) + 1
        yield RawItem(f"{code}/{counts[code]}", [code], {code: row})


def _split_columns(row: Row, number: int, codes: Sequence[str]) -> RawItem:
    """An item whose languages are columns, by name or code in any spelling: "Chinese", "zh"."""
    columns = {
        find_code(key) or key: value for key, value in row.items() if isinstance(value, dict)
    }
    return RawItem(str(row.get("id", number)), codes, columns, row)


def _read_item(raw: RawItem, place: str) -> Item:
    """The item in all its languages; `UserError` where one is missing or cannot be read."""
    key, codes, rows, whole = raw
    place = f"{place}, item {key!r}"
    versions: dict[str, Version] = {}
    for code in codes:
        if code not in rows:
            raise UserError(
                f"{place}: no {name_of(code)} ({code}) version; "
                f"it has {', '.join(rows) or 'none'}: add it, or leave {code!r} out of the "
                "languages"
            )
        versions[code] = layouts.read_version(rows[code], f"{place}, {name_of(code)}", key)
    sizes = {code: len(version.choices) for code, version in versions.items()}
    if len(set(sizes.values())) > 1:
        listed = ", ".join(f"{code}: {size}" for code, size in sizes.items())
        raise UserError(f"{place}: languages differ in their number of choices ({listed})")
    return Item(key, versions, layouts.tags_of(whole or rows[codes[0]], place))
