"""Files, folders and Hub data sets as a stream of rows; an error names the file, the row and the
remedy.
"""

import ast
import csv
import io
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from crossin_jax.config import Source, UserError, hint
from crossin_jax.files import (
    explain_faults,
    open_unpacked,
    read_json,
    read_json_lines,
    read_lines,
    refuse_utf16,
)
from crossin_jax.languages import find_files as find_language_files
from crossin_jax.paths import as_path, is_bucket

ENDINGS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".parquet": "parquet",
    ".csv": "csv",
    ".tsv": "csv",
}
# A JSON file up to this size is parsed at once. Its faults then carry line and column.
WHOLE_FILE_BYTES = 64 << 20
BLOCK = 1 << 20  # characters that are read at once from a larger file
SPACES = " \t\r\n"
# The columns that may hold a field. Where a row has several of them, the first one counts.
ALIASES: dict[str, tuple[str, ...]] = {
    "group": (),  # only a column that the user names
    "id": ("id",),
    "language": ("language", "lang"),
    "messages": ("messages", "conversations", "conversation"),
    "system": ("system", "system_prompt"),
    "history": ("history",),
    "instruction": ("instruction", "question", "prompt", "query", "inputs"),
    "input": ("input", "context"),
    "output": ("output", "response", "answer", "completion", "text", "answers", "targets"),
}
# What pandas and others write in a CSV file for a value that is missing; "None" and "NA" may be
# answers.
MISSING_CELLS = ("NaN", "nan", "null", "NULL")
SQUAD = "squad."  # columns that `_flatten_squad` adds to the rows start with it
EMPTY: tuple[Any, ...] = (None, "", [], {})


class File(NamedTuple):
    """One input of a source; `language` is None where the rows themselves say it."""

    path: str
    language: str | None
    layout: str  # jsonl | json | parquet | csv | hub


# What a path may be, and the files that it becomes for the languages en and zh:
#
#     data/alpaca.jsonl           that file; its rows or its columns say the language
#     data/alpaca_{lang}.jsonl    data/alpaca_en.jsonl and data/alpaca_zh.jsonl
#     data/                       data/NAME_en.json and data/NAME_zh.json
#     org/name, kind "hub"        one data set of the Hub; org/name-{lang} is one for each language
def find_files(source: Source, codes: Sequence[str]) -> list[File]:
    """Resolves `source.path` to existing inputs, one per language where the path or the folder is
    split by language.
    """
    place = f"data source {source.name or source.path!r}"
    if not source.path:
        raise UserError(
            f"{place}: path is empty; give a file, a folder, a pattern with {{lang}}, or a Hub id"
        )
    if source.kind == "hub":
        if "{lang}" not in source.path:
            return [File(source.path, None, "hub")]
        return [File(source.path.replace("{lang}", code), code, "hub") for code in codes]
    if "{lang}" in source.path:
        found = find_language_files(source.path, codes)
        if missing := [code for code in codes if not found[code]]:
            raise UserError(
                f"{place}: no file {source.path.replace('{lang}', missing[0])} for language "
                f"{missing[0]!r}; add it, or leave {missing[0]!r} out of the languages"
            )
        return _one_per_language(source, found, place)
    path = as_path(source.path)
    if not path.exists():
        near = (
            hint(path.name, [p.name for p in path.parent.iterdir()]) if path.parent.is_dir() else ""
        )
        raise UserError(f"{place}: {path} does not exist{near}; paths start at {Path.cwd()}")
    if source.kind == "folder" and not path.is_dir():
        raise UserError(
            f"{place}: kind='folder', but {path} is a file; give the folder of NAME_LANG.json files"
        )
    if not path.is_dir():
        return [File(str(path), None, _find_layout(source, path, place))]
    endings = [ending + packed for ending in ENDINGS for packed in ("", ".gz")]
    found = find_language_files(source.path, codes, endings)
    present = [code for code in codes if found[code]]
    if not present:
        names = ", ".join(p.name for p in sorted(path.iterdir())[:5]) or "nothing"
        raise UserError(
            f"{place}: {path} holds no NAME_LANG.json (or .jsonl, .parquet, .csv) for "
            f"{', '.join(codes)}; it holds {names}"
        )
    if missing := [code for code in codes if not found[code]]:
        raise UserError(
            f"{place}: {path} has no file for language {missing[0]!r} (NAME_{missing[0]}.json); "
            f"add it, or set languages=({', '.join(map(repr, present))},)"
        )
    return _one_per_language(source, found, place)


def _one_per_language(source: Source, found: dict[str, list[Path]], place: str) -> list[File]:
    for code, paths in found.items():
        if len(paths) > 1:
            raise UserError(
                f"{place}: {', '.join(p.name for p in paths)} could all be {code!r}; "
                f"give one file per language, or a path with {{lang}}"
            )
    return [File(str(p), code, _find_layout(source, p, place)) for code, (p,) in found.items()]


def _split_name(path: Path) -> tuple[str, str]:
    """(name, ending) of a file, without ".gz"."""
    name = Path(path.name.removesuffix(".gz"))
    return name.stem, name.suffix


def _find_layout(source: Source, path: Path, place: str) -> str:
    """The layout that the source names, else that of the file's ending."""
    if source.kind in ("jsonl", "json", "parquet", "csv"):
        return source.kind
    ending = _split_name(path)[1]
    if ending not in ENDINGS:
        raise UserError(
            f"{place}: the ending {ending!r} of {path} is not one of {', '.join(ENDINGS)}; set kind"
        )
    return ENDINGS[ending]


class Fields:
    """The columns of a row, or of one language's part of it, and which of them have been read."""

    # `TextReader` asks for fields. A column with a value that it never asked for is reported:
    #
    #     row       {"id": 1, "question": "Why?", "answer": "So.", "topic": "x", "note": null}
    #     asked     id, instruction → question, output → answer
    #     unread    topic (note has no value)

    def __init__(self, row: dict[str, Any], mapped: dict[str, str], is_csv: bool):
        self.row, self.mapped, self.is_csv = row, mapped, is_csv
        self.read: set[str] = set()

    def get(self, name: str) -> Any:
        """The value of a column; None where it is missing, also as NaN."""
        value = self.row.get(name)
        if value is None or value != value or self.is_csv and value in MISSING_CELLS:
            return None
        self.read.add(name)
        return value

    def find(self, field: str) -> Any:
        """The value of a field: in the column that the user maps to it (a dotted path, or "" for
        none), else in the first of its aliases that has a value.
        """
        mapped = self.mapped.get(field)
        if mapped is None:
            values = (self.get(name) for name in ALIASES[field])
            return next((value for value in values if value is not None), None)
        return self.follow(mapped)

    def follow(self, path: str) -> Any:
        """The value of a column, or of a part of one: "instances.0.input"."""
        value = self.get(path)
        if value is None and "." in path:
            first, *rest = path.split(".")
            value = self.get(first)
            for part in rest:
                index = int(part) if isinstance(value, list) and part.isdigit() else part
                try:
                    value = value[index]
                except (KeyError, IndexError, TypeError):
                    return None
        return value

    def columns(self, field: str) -> tuple[str, ...]:
        """The columns that may hold a field."""
        mapped = self.mapped.get(field)
        return ALIASES[field] if mapped is None else (mapped, mapped.partition(".")[0])

    def missing_cells(self) -> Iterator[str]:
        """A line for each cell that counts as missing, since "nan" may have been meant as text."""
        for name, value in self.row.items() if self.is_csv else ():
            if value in MISSING_CELLS:
                yield f"cells {value!r} of {name!r}, taken for missing values"

    def unread(self) -> Iterator[str]:
        """The columns that have a value and that were not read."""
        for name, value in self.row.items():
            if name in self.read:
                continue
            is_missing = value in EMPTY or value != value or self.is_csv and value in MISSING_CELLS
            if not is_missing and not name.startswith(SQUAD):
                yield name


# CSV and Parquet files often hold a list as a text: '["a", "b"]' by JSON, "['a', 'b']" by pandas.
def parse_list(value: Any) -> Any:
    """The list in a text that JSON or Python's `repr` wrote; other values, and other texts, as they
    are.
    """
    if not isinstance(value, str):
        return value
    for parse in (json.loads, ast.literal_eval):
        try:
            found = parse(value)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        if isinstance(found, list):
            return found
    return value


def parse_pairs(value: Any) -> list[tuple[str, str]] | None:
    """Turns of a history of [question, answer] pairs; None where the value is something else."""
    pairs = parse_list(value if value is not None else [])
    if not isinstance(pairs, list):
        return None
    turns = []
    for pair in pairs:
        if not isinstance(pair, list) or [type(text) for text in pair] != [str, str]:
            return None
        turns += [("user", pair[0]), ("assistant", pair[1])]
    return turns


def first_answer(value: Any) -> Any:
    """The first of SQuAD's answers: {"text": […]}, or a list of texts or of {"text": …}."""
    if isinstance(value, dict) and isinstance(value.get("text"), list):
        value = value["text"]
    if isinstance(value, list):
        value = value[0] if value else ""
    return value["text"] if isinstance(value, dict) and "text" in value else value


def is_chat(value: Any) -> bool:
    """Whether a value is a list of turns."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(turn, dict) and ("role" in turn or "from" in turn) for turn in value)
    )


def read_rows(file: File, split: str = "train") -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (row number from 1, row) of one input in its own order.

    Only a JSON file up to `WHOLE_FILE_BYTES` is in memory as a whole.
    """
    readers = {
        "jsonl": _read_json,
        "json": _read_json,
        "parquet": _read_parquet,
        "csv": _read_csv,
    }
    rows = _read_hub(file.path, split) if file.layout == "hub" else readers[file.layout](file)
    for number, row in rows:
        if not isinstance(row, dict):
            raise UserError(
                f"{file.path}, row {number}: rows are objects with named fields, not "
                f"{type(row).__name__}"
            )
        yield number, row


def _read_json(file: File) -> Iterator[tuple[int, Any]]:
    """The rows of JSON Lines, of a list, of {"data": list}, or of SQuAD's articles.

    The content decides, since many files named .json hold one object per line.
    """
    path = file.path
    if _holds_lines(file):
        yield from read_json_lines(path)
        return
    if as_path(path).stat().st_size > WHOLE_FILE_BYTES:
        yield from _stream_json(path)
        return
    content = read_json(path)
    if isinstance(content, dict) and isinstance(content.get("data"), list):
        content = content["data"]
    if not isinstance(content, list):
        raise UserError(
            f"{path}: expected a list of rows, got {type(content).__name__}; "
            f"a .jsonl file holds one object per line"
        )
    if content and isinstance(content[0], dict) and "paragraphs" in content[0]:
        content = _flatten_squad(content, path)
    yield from enumerate(content, 1)


def _holds_lines(file: File) -> bool:
    """Whether each line is an object by itself, as in JSON Lines.

    The first line that is not empty decides, and where it leaves this open, the layout does.
    """
    with explain_faults(file.path), open_unpacked(file.path) as opened:
        # A list may be one line of gigabytes, so a line is read only up to `BLOCK`.
        lines = iter(lambda: opened.readline(BLOCK), b"")
        texts = (line.decode("utf-8-sig", "replace").strip(SPACES) for line in lines)
        refuse_utf16(opened.peek(4)[:4], file.path)
        first = next(filter(None, texts), "")
        if not first.startswith("{"):
            return file.layout == "jsonl" and not first.startswith("[")
        try:
            json.loads(first)
        except (ValueError, RecursionError):  # an object over several lines, or a fault
            return file.layout == "jsonl"
        return file.layout == "jsonl" or any(texts)


def _stream_json(path: str) -> Iterator[tuple[int, Any]]:
    """The elements of a top-level list, one at a time; about one element and one block are in
    memory.
    """
    # The buffer holds the text that is read but not yet parsed. Where it ends within a row, one
    # more block is read and the row is parsed again:
    #
    #     file      [{"a": 1}, {"a": 2}, {"a": 3}]
    #     block 1   [{"a": 1}, {"a"              row 1 and the beginning of row 2
    #     buffer    {"a": 2}, {"a": 3}]          that beginning with block 2: rows 2 and 3
    decoder, number = json.JSONDecoder(), 0

    def fault(reason: str) -> UserError:
        return UserError(f"{path}, row {number + 1}: not JSON ({reason})")

    # Bytes that are not UTF-8 become surrogates here; the corpus finds them row by row.
    with (
        open_unpacked(path) as unpacked,
        io.TextIOWrapper(unpacked, encoding="utf-8", errors="surrogateescape") as file,
    ):
        buffer = file.read(BLOCK).lstrip("\ufeff" + SPACES)
        while not buffer and (block := file.read(BLOCK)):
            buffer = block.lstrip(SPACES)
        if not buffer.startswith("["):
            raise UserError(
                f"{path}: a JSON file above {WHOLE_FILE_BYTES >> 20} MiB must be a list of rows; "
                f"convert it to .jsonl"
            )
        buffer, is_after_row = buffer[1:], False
        while True:
            buffer = buffer.lstrip(SPACES)
            if not buffer:
                if not (buffer := file.read(BLOCK)):
                    raise fault("the list does not end")
            elif buffer[0] == "]" and (is_after_row or not number):
                rest = buffer[1:]
                while not rest.strip(SPACES) and (rest := file.read(BLOCK)):
                    pass
                if rest.strip(SPACES):
                    raise fault("text after the end of the list")
                return
            elif is_after_row:
                if buffer[0] != ",":
                    raise fault("no comma after the row before")
                buffer, is_after_row = buffer[1:], False
            else:
                try:
                    row, end = decoder.raw_decode(buffer)
                except json.JSONDecodeError as error:
                    # A row that the buffer cuts fails at the end of the buffer, or within a string.
                    is_cut = error.pos > len(buffer) - 16 or error.msg.startswith("Unterminated")
                    more = file.read(max(BLOCK, len(buffer))) if is_cut else ""
                    if not more:
                        raise fault(error.msg) from None
                    buffer += more
                    continue
                except (ValueError, RecursionError) as error:
                    raise fault(str(error).partition(";")[0][:80]) from None
                number, buffer, is_after_row = number + 1, buffer[end:], True
                yield number, row


# An article holds paragraphs, and a paragraph holds questions. A row is one question:
#
#     {"paragraphs": [{"context": C, "qas": [{"id": 7, "question": Q, "answers": [{"text": A}]}]}]}
#
#     → {"id": "7", "instruction": Q, "input": C, "output": A, "squad.paragraph": "0.0", …}
def _flatten_squad(articles: list[dict], path: str) -> list[dict]:
    """One row per question, with the numbers of its article and paragraph (the same in parallel
    files).
    """
    try:
        return [
            {
                "id": str(qa["id"]),
                "instruction": qa["question"],
                "input": paragraph["context"],
                "output": qa["answers"][0]["text"] if qa.get("answers") else "",
                "squad.article": f"{a}",
                "squad.paragraph": f"{a}.{p}",
            }
            for a, article in enumerate(articles)
            for p, paragraph in enumerate(article["paragraphs"])
            for qa in paragraph["qas"]
        ]
    except (LookupError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path}: not in SQuAD's layout ({type(error).__name__}: {error}); fetch it again"
        ) from None


def _read_csv(file: File) -> Iterator[tuple[int, Any]]:
    csv.field_size_limit(1 << 30)
    path = file.path
    delimiter = "\t" if _split_name(Path(path))[1] == ".tsv" else ","
    lines = (line for _, line in read_lines(path))
    reader = csv.DictReader(lines, delimiter=delimiter, strict=True)
    try:
        reader.fieldnames = _repair_header(reader.fieldnames)
        for number, row in enumerate(reader, 1):
            if None in row or None in row.values():
                more = "more" if None in row else "fewer"
                raise UserError(
                    f"{path}, row {number}: {more} cells than the {len(reader.fieldnames or ())} "
                    f"of the header; quote cells that hold {delimiter!r} or line breaks"
                )
            yield number, row
    except csv.Error as error:
        raise UserError(
            f"{path}, line {reader.line_num}: {error}; quote cells that hold {delimiter!r}"
        ) from None


def _repair_header(names: Sequence[str] | None) -> list[str]:
    """BMLAMA-17's Chinese file has a tab within the name of its column "Candidate Ans"."""
    return re.sub("(?<=\tCandidate)\t(?=Ans\t)", " ", "\t".join(names or ())).split("\t")


def _read_parquet(source: File) -> Iterator[tuple[int, Any]]:
    import pyarrow
    import pyarrow.parquet

    path = source.path
    try:
        content = as_path(path).open("rb") if is_bucket(path) else path
        file, number = pyarrow.parquet.ParquetFile(content, memory_map=True), 0
        for batch in file.iter_batches(batch_size=1024):
            for row in batch.to_pylist():
                yield (number := number + 1), row
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise UserError(
            f"{path}: not a whole Parquet file ({str(error).splitlines()[0]})"
        ) from None


def _read_hub(path: str, split: str) -> Iterator[tuple[int, Any]]:
    import datasets

    name, _, configuration = path.partition(":")
    try:
        rows = datasets.load_dataset(name, configuration or None, split=split)
    except Exception as error:  # the library raises many types
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"Hub data set {path!r}, split {split!r}: {reason}; "
            f"check the name (ID or ID:CONFIGURATION), the split, and the connection"
        ) from None
    yield from enumerate(rows, 1)
