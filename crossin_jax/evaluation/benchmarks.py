"""Parallel multiple-choice benchmarks: where their items come from, and how they are asked."""

import random
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from crossin_jax.config import UserError, hint
from crossin_jax.files import content_hash, read_json, read_json_lines
from crossin_jax.guests import open_guest
from crossin_jax.languages import (
    canonical,
    canonical_list,
    find_code,
    find_files,
    flores_code,
    match,
    name_of,
)

HUB = {
    "cross_mmlu": "SeaEval/cross_mmlu",
    "cross_logiqa": "SeaEval/cross_logiqa",
    "cross_xquad": "SeaEval/cross_xquad",
}
LETTERS = "ABCDEFGHIJ"
MIN_CHOICES, MAX_CHOICES = 2, len(LETTERS)
ENDINGS = (".json", ".jsonl", ".json.gz", ".jsonl.gz")
LABEL = re.compile(r"\s*\(([A-J])\)\s*")

# SeaEval v0.1, word for word: scores depend on them. (opening, empty lines between the parts)
_SIMPLY = "Simply select the answer, no explanations required."
PROMPTS: dict[int, tuple[str, bool]] = {
    1: ("Respond to the question by selecting the most appropriate answer.", True),
    2: (
        "Kindly choose the correct answer from the options provided for the multiple-choice "
        "question.",
        False,
    ),
    3: ("Solve the multi-choice question by selecting the accurate answer.", False),
    4: (
        "Please answer the following multiple-choice question by selecting the correct option.",
        True,
    ),
    5: (
        "As an expert, your task is to solve the following multiple-choice question. "
        "Identify the correct response among the given choices.",
        True,
    ),
}


@dataclass(frozen=True, slots=True)
class Version:
    """An item in one language; choices carry their label, "(A) …", and `answer` is the index of the
    gold choice.
    """

    question: str
    choices: tuple[str, ...]
    answer: int
    context: str | None = None


@dataclass(frozen=True, slots=True)
class Item:
    """One parallel item: its version by language code, and the subsets it belongs to."""

    id: str
    versions: dict[str, Version]
    tags: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Benchmark:
    """Parallel items; `pool` holds those that shots may come from: all, even where `items` are
    limited to the first.
    """

    name: str
    items: tuple[Item, ...] = field(repr=False)
    languages: tuple[str, ...]
    source: str
    pool: tuple[Item, ...] = field(default=(), repr=False)

    @property
    def fingerprint(self) -> str:
        """A short hash of the items asked: results with different ones do not belong into one
        table.
        """
        return content_hash(
            [
                [
                    item.id,
                    {
                        c: [v.question, v.choices, v.answer, v.context]
                        for c, v in item.versions.items()
                    },
                    *item.tags,
                ]
                for item in self.items
            ]
        )


# ── prompts ───────────────────────────────────────────────────────────────────────────────────────


def make_prompt(
    version: Version, number: int, shots: Sequence[Version] = (), *, benchmark: str = ""
) -> str:
    """The text that asks an item: SeaEval's prompt 1 to 5, its few-shot form where there are shots,
    or 0 for no frame.

    The few-shot form is one for all five numbers and ends after "Answer:"; its answers count up to
    their first newline. `benchmark` matters to Cross-XQuAD, whose prompt 1 asks for "the choice".
    Number 0 is the bare question, after its context if it has one; it takes no shots. Source:
    SeaEval v0.1, src/dataset_src/cross_*.py.
    """
    if number == 0:
        if shots:
            raise UserError(
                "evaluation.shots: a benchmark asked by its bare questions takes no solved "
                "examples; use 0"
            )
        return (
            version.question
            if version.context is None
            else f"{version.context}\n\n{version.question}"
        )
    if number not in PROMPTS:
        raise UserError(
            f"prompt {number}: SeaEval has 1 to {len(PROMPTS)}, and 0 is the bare question"
        )
    if shots:
        solved = [
            f"{_frame(shot, True)}\n\nAnswer:\n{shot.choices[shot.answer]}\n\n" for shot in shots
        ]
        return "".join(solved) + _frame(version, True) + "\n\nAnswer:\n"
    opening, airy = PROMPTS[number]
    simply = (
        _SIMPLY.replace("answer", "choice") if number == 1 and "xquad" in benchmark else _SIMPLY
    )
    return f"{opening} {simply}" + ("\n\n" if airy else "\n") + _frame(version, airy)


def _frame(version: Version, airy: bool) -> str:
    parts = [("Question", version.question), ("Choices", "\n".join(version.choices))]
    if version.context is not None:
        parts.insert(0, ("Context", version.context))
    return ("\n\n" if airy else "\n").join(f"{name}:\n{text}" for name, text in parts)


def draw_shot_items(
    benchmark: Benchmark, item: Item, num_shots: int, seed: int
) -> tuple[Item, ...]:
    """The items solved before `item`: the first of an order drawn by the seed that do not have its
    context (or question) in any language. So nearly all prompts of a language begin alike, and the
    engine reads that once."""
    if not num_shots:
        return ()
    pool = sorted(benchmark.pool or benchmark.items, key=lambda other: other.id)
    chosen: list[Item] = []
    for other in random.Random(f"shots/{seed}").sample(pool, len(pool)):
        if len(chosen) < num_shots and other.id != item.id and not _same_text(item, other):
            chosen.append(other)
    if len(chosen) < num_shots:
        raise UserError(
            f"{benchmark.source}, item {item.id!r}: evaluation.shots={num_shots}, but only "
            f"{len(chosen)} other items have another context; use fewer shots"
        )
    return tuple(chosen)


def draw_shots(
    benchmark: Benchmark, item: Item, language: str, num_shots: int, seed: int
) -> tuple[Version, ...]:
    """`draw_shot_items` in one language: every language of an item sees the same ones."""
    return tuple(
        shot.versions[language] for shot in draw_shot_items(benchmark, item, num_shots, seed)
    )


def list_shots(benchmark: Benchmark, num_shots: int, seed: int) -> dict[str, Any]:
    """The ids of the shots for the record: those of most items, and those of the items that have
    others.
    """
    drawn = {
        item.id: tuple(shot.id for shot in draw_shot_items(benchmark, item, num_shots, seed))
        for item in benchmark.items
    }
    usual = max(drawn.values(), key=list(drawn.values()).count)
    return {
        "usual": list(usual),
        "others": {key: list(ids) for key, ids in drawn.items() if ids != usual},
    }


def _same_text(a: Item, b: Item) -> bool:
    def text(version: Version) -> str:
        return version.question if version.context is None else version.context

    return any(
        text(version) == text(b.versions[code])
        for code, version in a.versions.items()
        if code in b.versions
    )


# ── loading ───────────────────────────────────────────────────────────────────────────────────────


def load_benchmark(
    name: str, languages: Sequence[str], *, limit: int | None = None, seed: int = 0
) -> Benchmark:
    """Reads a benchmark in the given languages.

    `name` is cross_mmlu, cross_logiqa or cross_xquad (from the Hub), cross_world[:split][/opaque]
    (embedded; `seed` parts its territories), a Hub id (ID or ID:CONFIGURATION, split test), a .json
    or .jsonl file (also .gz) with all languages, a path with {lang}, or a folder of NAME_LANG.json
    files. Rows are SeaEval's (an object per language with question, choices, answer and maybe
    context), MMLU's (question, choices, answer as index, letter or text) or Belebele's. `limit`
    keeps the first items. Faults raise `UserError` with file, item and language.
    """
    codes = canonical_list(languages, f"benchmark {name!r}")
    if not codes:
        raise UserError(f"benchmark {name!r}: no languages given; name at least one, e.g. en")
    if name.split(":")[0] == "cross_world":
        label, source = name if ":" in name else "cross_world:test", f"embedded world, seed {seed}"
        split, subset = label.partition(":")[2], "all"
        if split.endswith("/opaque"):
            split, subset = split.removesuffix("/opaque"), "opaque"
        items = [
            _read_item(row, name, codes)
            for row in open_guest("world").world_benchmark(split, codes, seed, subset)
        ]
    else:
        label, source, items = _load_elsewhere(name, codes)
    if not items:
        raise UserError(f"{source}: no items in it")
    seen: set[str] = set()
    for item in items:
        if item.id in seen:
            raise UserError(
                f"{source}: two items have the id {item.id!r}; ids are unique within a benchmark"
            )
        seen.add(item.id)
    return Benchmark(label, tuple(items[:limit]), codes, source, tuple(items))


# Rows come in three layouts. The first has an item per row, the others a row per item and language:
#
#     SeaEval     {"id": "7", "English": {"question": …, "choices": …, "answer": …}, "Chinese": {…}}
#     MMLU        {"id": "7", "language": "zh", "question": …, "choices": […], "answer": 1}
#     Belebele    {"link": …, "question_number": 1, "dialect": "zho_Hans", "mc_answer1": …, …}
def _load_elsewhere(name: str, codes: Sequence[str]) -> tuple[str, str, list[Item]]:
    """(label, source, items) of a file, of a file per language, or of a Hub data set."""
    path = Path(name).expanduser()
    if "{lang}" in name or path.is_dir():
        files = _files_by_language(name, path, codes)
        rows = [(code, row) for code, file in files.items() for row in _read_file(file)]
        label = path.stem.replace("{lang}", "").rstrip("_-. ") or path.parent.name
        return label, name, _join(rows, name, codes)
    if path.exists():
        rows, label, source = _read_file(path), path.name.split(".")[0], str(path)
    elif name in HUB or (
        "/" in name and not name.startswith((".", "/", "~")) and not name.endswith(ENDINGS)
    ):
        source = HUB.get(name, name)
        rows = _read_hub(source, codes)
        label = name.split(":")[-1].split("/")[-1]
    else:
        known = [
            *HUB,
            "cross_world",
            *([p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []),
        ]
        raise UserError(
            f"benchmark {name!r}: no such file{hint(path.name, known)}; give {', '.join(HUB)}, "
            f"cross_world, a Hub id, or a file that ends in {', '.join(ENDINGS)}"
        )
    # A row with a question of its own is in one language; otherwise it has an object per language.
    if rows and {"question", "choices"} & rows[0].keys():
        return label, source, _join(_split_by_language(rows, source, codes), source, codes)
    items = [_read_item(row, source, codes, number) for number, row in enumerate(rows, 1)]
    return label, source, items


def _files_by_language(name: str, path: Path, codes: Sequence[str]) -> dict[str, Path]:
    """The file of each language, whose name has the language in any spelling: mmlu_zh.json,
    mmlu_ZH-CN.json.
    """
    files = find_files(name, codes, ENDINGS)
    for code, found in files.items():
        if not found:
            want = name.replace("{lang}", code) if "{lang}" in name else path / f"NAME_{code}.json"
            raise UserError(
                f"benchmark {name!r}: no file {want} for language {code!r}; "
                f"add it, or leave {code!r} out of the languages"
            )
        if len(found) > 1:
            raise UserError(
                f"benchmark {name!r}: {', '.join(p.name for p in found)} could all be {code!r}; "
                f"keep one file per language"
            )
    return {code: found[0] for code, found in files.items()}


def _read_file(path: Path) -> list[dict[str, Any]]:
    """The rows of a .json list, a {"data": list} object or a .jsonl file, compressed or not."""
    if ".jsonl" in path.name:
        content = [value for _, value in read_json_lines(path)]
    else:
        content = read_json(path)
    if isinstance(content, dict) and isinstance(content.get("data"), list):
        content = content["data"]
    if not isinstance(content, list) or not all(isinstance(row, dict) for row in content):
        raise UserError(
            f"{path}: a benchmark is a list of objects, one per item; see docs/evaluation.md"
        )
    return content


def _read_hub(source: str, codes: Sequence[str]) -> list[dict[str, Any]]:
    from crossin_jax.data.readers import File, read_rows

    if "belebele" in source.lower() and ":" not in source:  # one configuration per language
        return [
            row
            for code in codes
            for _, row in read_rows(File(f"{source}:{flores_code(code)}", code, "hub"), "test")
        ]
    return [row for _, row in read_rows(File(source, None, "hub"), "test")]


def _split_by_language(
    rows: list[dict[str, Any]], place: str, codes: Sequence[str]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows in wanted languages. Where a file has "zh" and "zh-TW", only the first serves
    "zh".
    """
    marks = []
    for row in rows:
        mark = row.get("dialect") or row.get("language") or row.get("lang")
        if mark is None:
            raise UserError(
                f"{place}, item {row.get('id')!r}: the row does not say its language; add a "
                f"field language, or give one file per language with {{lang}} in the path"
            )
        marks.append((mark, canonical(mark, f"{place}, item {row.get('id')!r}")))
    present = {code for _, code in marks}
    for row, (mark, code) in zip(rows, marks, strict=True):
        wanted = match(mark, codes)
        if wanted and (wanted == code or wanted not in present):
            yield wanted, row


def _join(
    rows: Iterable[tuple[str, dict[str, Any]]], place: str, codes: Sequence[str]
) -> list[Item]:
    """Rows of one language each become items: they meet by id, or by position where no row
    has one.
    """
    merged: dict[str, dict[str, Any]] = {}
    counts: dict[str, int] = {}
    for code, row in rows:
        counts[code] = counts.get(code, 0) + 1
        key = str(
            row.get("id")
            or (f"{row['link']}#{row.get('question_number')}" if "link" in row else counts[code])
        )
        item = merged.setdefault(key, {"id": key, "tags": row.get("tags", ())})
        if code in item:
            raise UserError(
                f"{place}, item {key!r}, {code}: given twice; ids are unique within a language"
            )
        item[code] = row
    if not merged:
        raise UserError(f"{place}: no rows in {', '.join(codes)}")
    return [_read_item(row, place, codes) for row in merged.values()]


def _read_item(
    row: dict[str, Any], place: str, codes: Sequence[str], number: int | None = None
) -> Item:
    item_id = str(row.get("id", number))
    versions: dict[str, Version] = {}
    # a language's column has its name or code in any spelling: "Chinese", "zh", "zho_Hans"
    columns = {
        find_code(key) or key: value for key, value in row.items() if isinstance(value, dict)
    }
    for code in codes:
        version = columns.get(code)
        if version is None:
            present = list(columns)
            raise UserError(
                f"{place}, item {item_id!r}: no {name_of(code)} ({code}) version; "
                f"it has {', '.join(present) or 'none'}: add it, or leave {code!r} out of the "
                "languages"
            )
        versions[code] = _read_version(version, f"{place}, item {item_id!r}, {name_of(code)}")
    sizes = {code: len(version.choices) for code, version in versions.items()}
    if len(set(sizes.values())) > 1:
        listed = ", ".join(f"{code}: {size}" for code, size in sizes.items())
        raise UserError(
            f"{place}, item {item_id!r}: languages differ in their number of choices ({listed})"
        )
    tags = row.get("tags") or []
    if not isinstance(tags, list | tuple):
        raise UserError(
            f"{place}, item {item_id!r}: tags={tags!r:.60} is no list; give a list of texts"
        )
    return Item(item_id, versions, tuple(map(str, tags)))


def _read_version(row: dict[str, Any], place: str) -> Version:
    """One language's question from a SeaEval, MMLU or Belebele object."""
    if "mc_answer1" in row:
        choices = [row[key] for key in sorted(row) if re.fullmatch(r"mc_answer\d", key)]
        answer, context = _number(row.get("correct_answer_num")), row.get("flores_passage")
    else:
        choices, answer, context = row.get("choices"), row.get("answer"), row.get("context")
    question = row.get("question")
    if not isinstance(question, str) or not question.strip():
        raise UserError(f"{place}: no question")
    if not isinstance(choices, (list, tuple)) or not all(
        isinstance(c, str) and c.strip() for c in choices
    ):
        raise UserError(f"{place}: choices must be a list of texts, got {choices!r:.80}")
    if not MIN_CHOICES <= len(choices) <= MAX_CHOICES:
        raise UserError(
            f"{place}: {len(choices)} choices; an item has {MIN_CHOICES} to {MAX_CHOICES}"
        )
    labels = [LABEL.match(choice) for choice in choices]
    if not all(
        label and label[1] == letter for label, letter in zip(labels, LETTERS, strict=False)
    ):
        choices = [
            f"({letter}) {choice.strip()}" for letter, choice in zip(LETTERS, choices, strict=False)
        ]
    return Version(question, tuple(choices), _find_gold(answer, tuple(choices), place), context)


def _number(value: Any) -> int | None:
    """Belebele counts choices from 1 and may write the number as a text."""
    return int(value) - 1 if str(value).strip().isdigit() else None


def _find_gold(answer: Any, choices: tuple[str, ...], place: str) -> int:
    """The index that a gold answer means: an index from 0, a letter, or a choice with or without
    its label.
    """
    if answer is None or answer == "":
        raise UserError(f"{place}: no gold answer; every version needs its `answer`")
    if isinstance(answer, int) and not isinstance(answer, bool):
        if 0 <= answer < len(choices):
            return answer
    elif isinstance(answer, str):
        for matches in _readings(answer.strip(), choices):
            if len(matches) == 1:
                return matches[0]
            if matches:
                raise UserError(
                    f"{place}: the gold answer {answer!r} stands twice among the choices"
                )
    raise UserError(
        f"{place}: the gold answer {answer!r} is not among the choices {' | '.join(choices)}"
    )


def _readings(answer: str, choices: tuple[str, ...]) -> Iterator[list[int]]:
    # NFC: a letter with its marks may be one character or several, and looks the same.
    answer = unicodedata.normalize("NFC", answer)
    texts = [unicodedata.normalize("NFC", choice.strip()) for choice in choices]
    yield [i for i, text in enumerate(texts) if text == answer]
    yield [i for i, text in enumerate(texts) if LABEL.sub("", text, count=1) == answer]
    yield [i for i in range(len(texts)) if answer.strip("().") == LETTERS[i]]
    yield [int(answer)] if answer.isdigit() and int(answer) < len(texts) else []


def with_items(benchmark: Benchmark, items: Sequence[Item]) -> Benchmark:
    """The same benchmark with fewer items; shots still come from the whole pool."""
    return replace(benchmark, items=tuple(items))
