"""Files, folders and Hub data sets as a stream of rows; a fault names the file, the row and the remedy."""

import csv
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from crossin_jax.config import Source, UserError, hint

ENDINGS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".parquet": "parquet", ".csv": "csv", ".tsv": "csv"}
WHOLE_FILE_BYTES = 64 << 20  # a JSON file up to this size is parsed at once: its faults then carry line and column


class File(NamedTuple):
    """One input of a source; `language` is None where the rows themselves say it."""

    path: str
    language: str | None
    layout: str  # jsonl | json | parquet | csv | hub


def find_files(source: Source, codes: Sequence[str]) -> list[File]:
    """Resolves `source.path` to existing inputs, one per language where the path or the folder is split by language."""
    place = f"data source {source.name or source.path!r}"
    if not source.path:
        raise UserError(f"{place}: path is empty; give a file, a folder, a pattern with {{lang}}, or a Hub id")
    if source.kind == "hub":
        split_by_language = "{lang}" in source.path
        return [File(source.path.replace("{lang}", code), code if split_by_language else None, "hub")
                for code in (codes if split_by_language else codes[:1])]
    if "{lang}" in source.path:
        files = [(code, Path(source.path.replace("{lang}", code)).expanduser()) for code in codes]
        missing = [code for code, path in files if not path.exists()]
        if missing:
            raise UserError(f"{place}: no file {files[codes.index(missing[0])][1]} for language {missing[0]!r}; "
                            f"add it, or leave {missing[0]!r} out of the languages")
        return [File(str(path), code, _layout(source, path, place)) for code, path in files]
    path = Path(source.path).expanduser()
    if not path.exists():
        near = hint(path.name, [p.name for p in path.parent.iterdir()]) if path.parent.is_dir() else ""
        raise UserError(f"{place}: {path} does not exist{near}; paths start at {Path.cwd()}")
    if source.kind == "folder" and not path.is_dir():
        raise UserError(f"{place}: kind='folder', but {path} is a file; give the folder of NAME_LANG.json files")
    if not path.is_dir():
        return [File(str(path), None, _layout(source, path, place))]
    found = {}
    for code in codes:
        matches = sorted(p for p in path.iterdir() if p.suffix in ENDINGS
                         and (p.stem == code or p.stem.endswith((f"_{code}", f".{code}", f"-{code}"))))
        if len(matches) > 1:
            raise UserError(f"{place}: {', '.join(p.name for p in matches)} could all be {code!r}; "
                            f"give one file per language, or a path with {{lang}}")
        if matches:
            found[code] = matches[0]
    if not found:
        names = ", ".join(p.name for p in sorted(path.iterdir())[:5]) or "nothing"
        raise UserError(f"{place}: {path} holds no NAME_LANG.json (or .jsonl, .parquet, .csv) for {', '.join(codes)}; "
                        f"it holds {names}")
    missing = [code for code in codes if code not in found]
    if missing:
        raise UserError(f"{place}: {path} has no file for language {missing[0]!r} (NAME_{missing[0]}.json); "
                        f"add it, or set languages=({', '.join(repr(c) for c in found)},)")
    return [File(str(p), code, _layout(source, p, place)) for code, p in found.items()]


def _layout(source: Source, path: Path, place: str) -> str:
    if source.kind in ("jsonl", "json", "parquet", "csv"):
        return source.kind
    if path.suffix not in ENDINGS:
        raise UserError(f"{place}: the ending {path.suffix!r} of {path} is not one of {', '.join(ENDINGS)}; set kind")
    return ENDINGS[path.suffix]


def read_rows(file: File, split: str = "train") -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (row number from 1, row) of one input in its own order, holding a bounded part of it in memory."""
    readers = {"jsonl": _read_jsonl, "json": _read_json, "parquet": _read_parquet, "csv": _read_csv}
    rows = _read_hub(file.path, split) if file.layout == "hub" else readers[file.layout](file.path)
    for number, row in rows:
        if not isinstance(row, dict):
            raise UserError(f"{file.path}, row {number}: rows are objects with named fields, not {type(row).__name__}")
        yield number, row


def _decode(raw: bytes, path: str, number: int, unit: str = "row") -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}, {unit} {number}: byte {raw[error.start]:#04x} is not UTF-8; "
                        f"convert the file, e.g. iconv -f latin1 -t utf-8") from None


def _read_jsonl(path: str) -> Iterator[tuple[int, Any]]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            text = _decode(line, path, number).lstrip("\ufeff")
            if not text.strip():
                continue
            try:
                yield number, json.loads(text)
            except json.JSONDecodeError as error:
                raise UserError(f"{path}, row {number}: not JSON ({error.msg}, column {error.colno}); "
                                f"a .jsonl file holds one object per line") from None


def _read_json(path: str) -> Iterator[tuple[int, Any]]:
    if Path(path).stat().st_size > WHOLE_FILE_BYTES:
        yield from _stream_json(path)
        return
    raw = Path(path).read_bytes()
    try:
        content = json.loads(raw.decode("utf-8").lstrip("\ufeff"))
    except UnicodeDecodeError as error:
        _decode(raw, path, raw.count(b"\n", 0, error.start) + 1, unit="line")
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {error.lineno}: not JSON ({error.msg}, column {error.colno})") from None
    if isinstance(content, dict) and isinstance(content.get("data"), list):
        content = content["data"]
    if not isinstance(content, list):
        raise UserError(f"{path}: expected a list of rows, got {type(content).__name__}; "
                        f"a .jsonl file holds one object per line")
    if content and isinstance(content[0], dict) and "paragraphs" in content[0]:
        content = _flatten_squad(content)
    yield from enumerate(content, 1)


def _stream_json(path: str) -> Iterator[tuple[int, Any]]:
    """The elements of a top-level list, one at a time."""
    decoder, buffer, number = json.JSONDecoder(), "", 0
    with open(path, encoding="utf-8", errors="surrogateescape") as file:  # escapes are found by the corpus, row by row
        buffer = file.read(1 << 20).lstrip("\ufeff \t\r\n")
        if not buffer.startswith("["):
            raise UserError(f"{path}: a JSON file above {WHOLE_FILE_BYTES >> 20} MiB must be a list of rows; "
                            f"convert it to .jsonl")
        buffer = buffer[1:]
        while True:
            buffer = buffer.lstrip(", \t\r\n")
            if buffer.startswith("]"):
                return
            try:
                row, end = decoder.raw_decode(buffer)
            except json.JSONDecodeError as error:
                more = file.read(max(1 << 20, len(buffer)))
                if not more:
                    raise UserError(f"{path}, row {number + 1}: not JSON ({error.msg})") from None
                buffer += more
                continue
            number, buffer = number + 1, buffer[end:]
            yield number, row


def _flatten_squad(articles: list[dict]) -> list[dict]:
    return [{"id": str(qa["id"]), "instruction": qa["question"], "input": paragraph["context"],
             "output": qa["answers"][0]["text"] if qa.get("answers") else ""}
            for article in articles for paragraph in article["paragraphs"] for qa in paragraph["qas"]]


def _read_csv(path: str) -> Iterator[tuple[int, Any]]:
    csv.field_size_limit(1 << 30)
    delimiter = "\t" if path.endswith(".tsv") else ","
    with open(path, "rb") as file:
        lines = (_decode(line, path, n).lstrip("\ufeff" if n == 1 else "") for n, line in enumerate(file, 1))
        reader = csv.DictReader(lines, delimiter=delimiter, strict=True)
        try:
            for number, row in enumerate(reader, 1):
                if None in row or None in row.values():
                    more = "more" if None in row else "fewer"
                    raise UserError(f"{path}, row {number}: {more} cells than the {len(reader.fieldnames or ())} "
                                    f"of the header; quote cells that hold {delimiter!r} or line breaks")
                yield number, row
        except csv.Error as error:
            raise UserError(f"{path}, line {reader.line_num}: {error}; quote cells that hold {delimiter!r}") from None


def _read_parquet(path: str) -> Iterator[tuple[int, Any]]:
    import pyarrow
    import pyarrow.parquet
    try:
        file, number = pyarrow.parquet.ParquetFile(path, memory_map=True), 0
        for batch in file.iter_batches(batch_size=1024):
            for row in batch.to_pylist():
                yield (number := number + 1), row
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise UserError(f"{path}: not a whole Parquet file ({str(error).splitlines()[0]})") from None


def _read_hub(path: str, split: str) -> Iterator[tuple[int, Any]]:
    import datasets
    name, _, configuration = path.partition(":")
    try:
        rows = datasets.load_dataset(name, configuration or None, split=split)
    except Exception as error:  # the library raises many kinds; all of them mean: not readable under this name
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"Hub data set {path!r}, split {split!r}: {reason}; "
                        f"check the name (ID or ID:CONFIGURATION), the split, and the connection") from None
    for number, row in enumerate(rows, 1):
        yield number, _unnest_answers(row)


def _unnest_answers(row: dict[str, Any]) -> dict[str, Any]:
    """SQuAD rows of the Hub keep their answers as {"text": [...]}; other rows pass through."""
    answers = row.get("answers")
    if isinstance(answers, dict) and answers.get("text") and "output" not in row and "answer" not in row:
        return {**row, "answer": answers["text"][0]}
    return row
