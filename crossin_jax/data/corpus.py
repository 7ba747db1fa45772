"""Files and Hub data sets become parallel records: one row id, one text per language.

The texts are in an Arrow file: in memory for small sources, memory-mapped from a cache folder for
large ones. The index that joins the languages of a record is cached and mapped too.
"""

import json
import os
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from crossin_jax.config import Source, UserError
from crossin_jax.data.readers import File, find_files
from crossin_jax.data.records import (
    UNREAD,
    Record,
    Text,
    TextReader,
    TextRow,
    as_row,
    digest,
    hash_key,
)
from crossin_jax.guests import open_guest
from crossin_jax.languages import canonical_list
from crossin_jax.paths import as_path
from crossin_jax.process import temporary

CACHE_BYTES = 64 << 20  # sources larger than this go to the cache folder
# Rows of one Arrow batch: the text in row r is row r % BATCH_ROWS of batch r // BATCH_ROWS.
BATCH_ROWS = 2048
TEXT_COLUMNS = ("instruction", "input", "output", "messages")
# The joined index, one entry per record: the hash of its id, the row of each language's text (-1:
# none), how many earlier records have the same content, and the hash of its group.
INDEX = ("keys", "rows", "twice", "groups")
FORMAT = 3  # raised when the layout of the cache changes, or what is read from a row


def _count_earlier(keys: np.ndarray, languages: np.ndarray) -> np.ndarray:
    """How often the same (key, language) occurred before, for each row."""
    # Sorted by key and language, equal rows are neighbours. `starts` holds where each run of them
    # begins, and the distance from there is the count: keys a a b a → sorted a a a b → 0 1 2 0.
    order = np.lexsort((np.arange(len(keys)), languages, keys))
    same = np.zeros(len(keys), bool)
    same[1:] = (np.diff(keys[order]) == 0) & (np.diff(languages[order]) == 0)
    starts = np.where(same, 0, np.arange(len(keys)))
    counts = np.zeros(len(keys), np.int32)
    counts[order] = np.arange(len(keys)) - np.maximum.accumulate(starts)
    return counts


class Corpus(Sequence):
    """Parallel records by index, here from a list; `keys` (N,) uint64 hash the row ids, `has[code]`
    (N,) bool.

    `dropped` counts texts that cannot be used, by reason; their whole records are removed, and
    `dropped_rows` names some. `ignored` counts rows by what was not read of them, and
    `ignored_rows` names the first row of each. `groups` (N,) uint64 hash the values that
    `fields["group"]` keeps together. `masked_turns` counts the turns of chats that are read but not
    learned.
    """

    def __init__(self, name: str, records: Sequence[Record], *, place: str = ""):
        self.name, self.place = name, place or name
        self._records = records
        self.keys = np.array([hash_key(record.id) for record in records], np.uint64)
        self.languages = tuple(dict.fromkeys(code for record in records for code in record.texts))
        self.has = {
            code: np.array([code in record.texts for record in records], bool)
            for code in self.languages
        }
        self.groups: np.ndarray | None = None
        self.dropped: Counter[str] = Counter()
        self.dropped_rows: dict[str, list[str]] = {}
        self.ignored: Counter[str] = Counter()
        self.ignored_rows: dict[str, str] = {}
        self.masked_turns = 0
        rows = (
            json.dumps([r.id, code, *as_row(text)])
            for r in records
            for code, text in r.texts.items()
        )
        self.fingerprint = (
            f"{sum(int.from_bytes(digest(row), 'little') for row in rows) % 2**128:032x}"
        )
        if len(np.unique(self.keys)) < len(self.keys):
            twice = Counter(record.id for record in records).most_common(1)[0][0]
            raise UserError(
                f"{self.place}: id {twice!r} is used more than once; ids must be unique"
            )

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, i: int) -> Record:
        return self._records[i]

    def pick(self, i: int, codes: Sequence[str]) -> Record:
        """Record i in some of its languages; this reads less than `self[i]` from a file."""
        return self[i]

    def ids(self) -> Iterator[str]:
        """The row ids in order."""
        return (record.id for record in self._records)

    def describe_origin(self, i: int) -> str:
        """Where a row came from, for messages."""
        return f"{self.place}, row {i + 1}"


class ArrowCorpus(Corpus):
    """Records joined from one Arrow file that holds a row per (record, language), in memory or in a
    cache folder.
    """

    def __init__(self, name: str, content: Any, meta: dict[str, Any]):
        self.name, self.place, self._content, self._meta = name, meta["place"], content, meta
        self._codes = tuple(meta["codes"])
        self.fingerprint = meta["fingerprint"]
        self.ignored, self.ignored_rows = Counter(meta["ignored"]), meta["ignored_rows"]
        self.masked_turns = meta["masked_turns"]
        self._open()
        if "dropped" in meta:  # the index was saved
            self.dropped, self.dropped_rows = Counter(meta["dropped"]), meta["dropped_rows"]
            self.keys, self._rows, self._twice, self.groups = (
                np.asarray(np.load(f"{content}/{part}.npy", mmap_mode="r")) for part in INDEX
            )
            self._find_languages()
        else:
            self._join()

    def _open(self) -> None:
        import pyarrow as pa

        source = (
            pa.memory_map(f"{self._content}/texts.arrow")
            if isinstance(self._content, str)
            else self._content
        )
        with pa.ipc.open_file(source) as reader:
            self._batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]

    def _column(self, name: str, dtype: Any) -> np.ndarray:
        parts = [batch.column(name).to_numpy() for batch in self._batches]
        return np.concatenate(parts).astype(dtype) if parts else np.zeros(0, dtype)

    def _join(self) -> None:
        """Groups the texts by key; records keep the order in which their key first appeared."""
        # The texts, one row of the Arrow file each:             Records: the row of each text
        #
        #     row  key  language                                      en  zh
        #      0    b    en                                      b     0   2
        #      1    a    en                                      a     1   -
        #      2    b    zh
        keys, languages = self._column("key", np.uint64), self._column("language", np.uint8)
        twice = _count_earlier(keys, languages)
        if twice.any() and not self._meta["named_by_content"]:
            b = int(np.argmax(twice > 0))
            a = int(np.argmax((keys == keys[b]) & (languages == languages[b])))
            raise UserError(
                f"{self._text_place(b)}: id {self._cell(a, 'id')!r} was already used in "
                f"{self._text_place(a)}; ids must be unique ({int((twice > 0).sum())} repeated)"
            )
        # Rows without an id are named by their content, so equal rows need different keys.
        keys = keys + twice.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        unique, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
        order = np.argsort(first, kind="stable")
        rank = np.empty_like(order)
        rank[order] = np.arange(len(order))
        record = rank[inverse]
        self.keys, self._twice = unique[order], twice[first[order]]
        self._rows = np.full((len(unique), len(self._codes)), -1, np.int32)
        self._rows[record, languages] = np.arange(len(keys))
        # The group of a record is that of its text in the first language it has.
        first_text = self._rows[np.arange(len(unique)), (self._rows >= 0).argmax(axis=1)]
        self.groups = self._column("group", np.uint64)[first_text]
        self._drop(record, self._column("fault", np.uint16))
        self._find_languages()

    def save(self, folder: Path) -> None:
        """Writes the index and what was dropped beside the texts, so that they are joined once."""
        for part, values in zip(INDEX, self._columns(), strict=True):
            np.save(folder / f"{part}.npy", values)
        meta = self._meta | {"dropped": dict(self.dropped), "dropped_rows": self.dropped_rows}
        (folder / "meta.json").write_text(json.dumps(meta))

    def _drop(self, record: np.ndarray, faults: np.ndarray) -> None:
        """Removes records with an unusable text in any language; counts them, and names some."""
        self.dropped, self.dropped_rows = Counter(), {}
        for row in np.flatnonzero(faults):
            reason = self._meta["reasons"][faults[row]]
            self.dropped[reason] += 1
            if self.dropped[reason] <= 5:
                code = self._codes[self._cell(int(row), "language")]
                self.dropped_rows.setdefault(reason, []).append(
                    f"{self._text_place(int(row))} ({code})"
                )
        keep = np.ones(len(self.keys), bool)
        keep[record[faults > 0]] = False
        self._keep(keep)

    def _columns(self) -> tuple[np.ndarray, ...]:
        """What is known per record, in the order of INDEX."""
        return self.keys, self._rows, self._twice, self.groups

    def _keep(self, rows: np.ndarray) -> None:
        self.keys, self._rows, self._twice, self.groups = (c[rows] for c in self._columns())

    def _find_languages(self) -> None:
        self.has = {code: self._rows[:, j] >= 0 for j, code in enumerate(self._codes)}
        self.has = {code: mask for code, mask in self.has.items() if mask.any()}
        self.languages = tuple(self.has)

    def take(self, rows: np.ndarray) -> "ArrowCorpus":
        """Keeps these records, in place."""
        self._keep(rows)
        self._find_languages()
        self.fingerprint = digest(f"{self.fingerprint} {int(self.keys.sum())} of {len(rows)}").hex()
        return self

    def _cell(self, row: int, column: str) -> Any:
        return self._batches[row // BATCH_ROWS].column(column)[row % BATCH_ROWS].as_py()

    def _text_place(self, row: int) -> str:
        return f"{self._meta['files'][self._cell(row, 'file')]}, row {self._cell(row, 'number')}"

    def __getitem__(self, i: int) -> Record:
        if not -len(self) <= i < len(self):
            raise IndexError(f"record {i} of {len(self)}")
        return self.pick(i, self._codes)

    def pick(self, i: int, codes: Sequence[str]) -> Record:
        texts = {}
        for code in codes:
            row = int(self._rows[i, self._codes.index(code)])
            if row < 0:
                continue
            batch, k = self._batches[row // BATCH_ROWS], row % BATCH_ROWS
            *fields, messages = (batch.column(name)[k].as_py() for name in TEXT_COLUMNS)
            texts[code] = Text(
                *fields, tuple(map(tuple, json.loads(messages))) if messages else None
            )
        return Record(self._id(i), texts)

    def _id(self, i: int) -> str:
        row_id = self._cell(int(self._rows[i][self._rows[i] >= 0][0]), "id")
        return f"{row_id}-{self._twice[i] + 1}" if self._twice[i] else row_id

    def ids(self) -> Iterator[str]:
        return (self._id(i) for i in range(len(self)))

    def describe_origin(self, i: int) -> str:
        return self._text_place(int(self._rows[i][self._rows[i] >= 0][0]))

    def __getstate__(self) -> dict[str, Any]:  # workers open the file again
        return {k: v for k, v in self.__dict__.items() if k != "_batches"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()


# The way of a source from its files to records:
#
#     files ─ readers ─► rows ─ TextReader ─► texts ─► Arrow file ─ join by key ─► ArrowCorpus
#
# The Arrow file of a small source is in memory. That of a large source or of a Hub data set is
# CACHE/HASH/texts.arrow, where HASH is of everything that decides what is read. The index is saved
# beside it.
def load_corpus(
    source: Source, languages: Sequence[str], *, seed: int = 0, cache: str | None = None
) -> Corpus:
    """Reads a source; rows with an empty output, a NUL or over a million characters are dropped and
    counted.

    Raises `UserError` with file, row and remedy for what cannot be read. `cache` is the folder of
    memory-mapped copies of large sources (default: $CROSSIN_CACHE, else
    ~/.cache/crossin_jax/corpora).
    """
    codes = canonical_list(source.languages or languages, f"data source {source.name!r}")
    if source.kind == "world":
        records = open_guest("world").world_corpus(source.split, codes, seed)
        corpus = Corpus(source.name, records, place=f"the embedded world ({source.split})")
        return _take_portion(corpus, source)
    files = find_files(source, codes)
    is_hub = source.kind == "hub"
    if is_hub or sum(as_path(file.path).stat().st_size for file in files) > CACHE_BYTES:
        corpus = _open_cached(source, codes, files, cache)
    else:
        import pyarrow as pa

        sink = pa.BufferOutputStream()
        meta = _write_texts(source, codes, files, sink)
        corpus = ArrowCorpus(source.name, sink.getvalue(), meta)
    _check_unread(corpus, source)
    return _take_portion(corpus, source)


# Rows are taken in hash order of their ids, groups in hash order of the value that they share. So a
# portion keeps its rows when files are joined or sorted differently:
#
#     portion=(0, 0.5)                                        ids          c a f | e b d
#     portion=(0, 0.5), fields={"group": "paragraph"}         paragraphs   P3 P1 | P2 P4
def _take_portion(corpus: Corpus, source: Source) -> Corpus:
    """The rows of the source's portion, up to its limit."""
    order = np.argsort(corpus.keys, kind="stable")
    if not source.fields.get("group"):
        first, last = (round(share * len(corpus)) for share in source.portion)
        chosen = order[first:last]
    else:
        if corpus.groups is None:
            raise UserError(
                f"source {source.name!r}: fields has a group, but {corpus.place} has no columns"
            )
        names, rank = np.unique(corpus.groups, return_inverse=True)
        first, last = (round(share * len(names)) for share in source.portion)
        chosen = order[(rank[order] >= first) & (rank[order] < last)]
    chosen = np.sort(chosen[: source.limit])
    if len(chosen) == len(corpus):
        return corpus
    if isinstance(corpus, ArrowCorpus):
        return corpus.take(chosen)
    return Corpus(corpus.name, [corpus[int(i)] for i in chosen], place=corpus.place)


def describe_losses(corpus: Corpus) -> str:
    """One line about what is not used: "dropped: 3 empty output; not read: field 'topic' (90
    rows)"; "" where all is used.
    """
    parts = {
        "dropped": [f"{n} {reason}" for reason, n in corpus.dropped.items()],
        "not read": [f"{what} ({n} rows)" for what, n in corpus.ignored.most_common()],
    }
    return "; ".join(f"{name}: {', '.join(found)}" for name, found in parts.items() if found)


def _check_unread(corpus: Corpus, source: Source) -> None:
    """Refuses columns and rows that are not read, where the source says so."""
    if source.fields.get(UNREAD) == "refuse" and corpus.ignored:
        raise UserError(
            f"source {source.name!r} refuses what is not read: {describe_losses(corpus)}\n"
            f"first: {next(iter(corpus.ignored_rows.values()))}\n"
            f"map it with `fields`, take it out of the data, or leave fields[{UNREAD!r}] out"
        )


def _open_cached(
    source: Source, codes: Sequence[str], files: list[File], cache: str | None
) -> ArrowCorpus:
    """The corpus of a large source from its cache folder, which is written where it is absent."""
    folder = Path(
        cache or os.environ.get("CROSSIN_CACHE", "~/.cache/crossin_jax/corpora")
    ).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    # These settings do not change what is read.
    settings = {k: v for k, v in asdict(source).items() if k not in ("name", "limit", "portion")}
    stamps = [(file, *_stamp(as_path(file.path))) for file in files]
    path = folder / digest(json.dumps([FORMAT, settings, codes, stamps])).hex()
    if not path.is_dir():
        _write_cached(source, codes, files, path)
    return ArrowCorpus(source.name, str(path), json.loads((path / "meta.json").read_text()))


def _stamp(path: Path) -> list[tuple[str, int, int]]:
    """Name, size and time of a file, or of each file in a folder: a changed file has others."""
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    return [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files if f.is_file()]


def _write_cached(source: Source, codes: Sequence[str], files: list[File], path: Path) -> None:
    """Writes the cache folder of a source under another name, and renames it when it is whole."""
    import pyarrow as pa

    with temporary(Path(tempfile.mkdtemp(dir=path.parent, suffix=".part"))) as part:
        with pa.OSFile(str(part / "texts.arrow"), "wb") as sink:
            meta = _write_texts(source, codes, files, sink)
        ArrowCorpus(source.name, str(part), meta).save(part)
        try:
            os.rename(part, path)
        except OSError:
            if not path.is_dir():  # else another process has written it meanwhile
                raise


def _write_texts(
    source: Source, codes: Sequence[str], files: list[File], sink: Any
) -> dict[str, Any]:
    """Streams every text of the source into one Arrow file; returns what is known beside it."""
    import pyarrow as pa
    from tqdm import tqdm

    numbers = {  # in the order of TextRow
        "key": pa.uint64(),
        "group": pa.uint64(),
        "language": pa.uint8(),
        "file": pa.uint16(),
        "number": pa.uint32(),
        "fault": pa.uint16(),
    }
    schema = pa.schema(numbers | dict.fromkeys(("id", *TEXT_COLUMNS), pa.string()))
    reader = TextReader(source, codes, files)
    rows: list[TextRow] = []
    fingerprint = 0
    with pa.ipc.new_file(sink, schema) as writer:

        def flush() -> None:
            columns = zip(*rows, strict=True)
            arrays = [pa.array(c, f.type) for c, f in zip(columns, schema, strict=True)]
            writer.write_batch(pa.record_batch(arrays, schema=schema))
            rows.clear()

        # A sum of hashes does not depend on the order of the rows.
        for row in tqdm(reader, desc=f"read {source.name}", unit=" texts", delay=2, leave=False):
            text = [codes[row.language], row.id, row.instruction, row.input, row.output]
            content = json.dumps([*text, row.messages])
            fingerprint += int.from_bytes(digest(content), "little")
            rows.append(row)
            if len(rows) == BATCH_ROWS:
                flush()
        if rows:
            flush()
    return {
        "place": source.path,
        "codes": list(codes),
        "files": [file.path for file in files],
        "named_by_content": bool(reader.named_by_content),
        "reasons": [*reader.reasons],
        "ignored": dict(reader.ignored),
        "ignored_rows": reader.ignored_rows,
        "masked_turns": reader.masked_turns,
        "fingerprint": f"{fingerprint % 2**128:032x}",
    }
