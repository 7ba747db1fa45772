"""Every layout gives the same records; every fault names file, row and remedy."""

import csv
import hashlib
import itertools
import json
import os
import pickle
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from crossin_jax.config import Source, UserError
from crossin_jax.data import corpus as corpus_module
from crossin_jax.data import readers
from crossin_jax.data.corpus import Corpus, Record, Text, load_corpus
from tests.data.conftest import parallel_rows, write_lines

CODES = ("en", "zh", "vi", "es")
ROWS = parallel_rows(40)


def load(path, languages=CODES, **settings) -> Corpus:
    return load_corpus(Source(name="rows", path=str(path), **settings), languages)


def texts_of(corpus) -> dict:
    return {record.id: record.texts for record in corpus}


EXPECTED = {row["id"]: {code: Text(**row[code]) for code in CODES} for row in ROWS}


def write_columns_json(folder):
    (folder / "rows.json").write_text(json.dumps(ROWS), encoding="utf-8")
    return "rows.json", {}


def write_jsonl(folder):
    write_lines(folder / "rows.jsonl", ROWS)
    return "rows.jsonl", {}


def write_language_files(folder):
    for code in CODES:
        rows = [{"id": row["id"], **row[code]} for row in ROWS]
        random.Random(code).shuffle(rows)  # ids join, whatever the order
        (folder / f"rows_{code}.json").write_text(
            json.dumps(rows, ensure_ascii=False), encoding="utf-8"
        )
    return "", {}


def write_pattern(folder):
    write_language_files(folder)
    return "rows_{lang}.json", {}


def write_flat_csv(folder):
    fields = [f"{field}_{code}" for code in CODES for field in ("instruction", "input", "output")]
    with open(folder / "rows.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ["id", *fields])
        writer.writeheader()
        for row in ROWS:
            writer.writerow(
                {"id": row["id"], **{name: row[name[-2:]][name[:-3]] for name in fields}}
            )
    return "rows.csv", {}


def write_long_parquet(folder):
    rows = [
        {
            "key": row["id"],
            "lang": code,
            "question": row[code]["instruction"],
            "context": row[code]["input"],
            "response": row[code]["output"],
        }
        for row in ROWS
        for code in CODES
    ]
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), folder / "rows.parquet")
    return "rows.parquet", {"fields": {"id": "key"}}


def write_english_names(folder):
    names = {"en": "English", "zh": "Chinese", "vi": "Vietnamese", "es": "Spanish"}
    write_lines(
        folder / "rows.jsonl",
        [{"id": row["id"], **{names[c]: row[c] for c in CODES}} for row in ROWS],
    )
    return "rows.jsonl", {"kind": "columns"}


def write_hub(folder):
    write_lines(folder / "train.jsonl", ROWS)
    return "", {"kind": "hub"}


LAYOUTS = [
    write_columns_json,
    write_jsonl,
    write_language_files,
    write_pattern,
    write_flat_csv,
    write_long_parquet,
    write_english_names,
    write_hub,
]


@pytest.mark.parametrize("write", LAYOUTS, ids=lambda write: write.__name__.removeprefix("write_"))
def test_every_layout_gives_the_same_records(write, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("CROSSIN_CACHE", str(tmp_path / "cache"))
    (tmp_path / "data").mkdir()
    path, settings = write(tmp_path / "data")
    corpus = load(tmp_path / "data" / path if path else tmp_path / "data", **settings)
    assert texts_of(corpus) == EXPECTED
    assert corpus.languages == CODES and not corpus.dropped
    assert list(corpus.ids()) == [record.id for record in corpus]
    reloaded = pickle.loads(pickle.dumps(corpus))
    assert reloaded[7] == corpus[7] and np.array_equal(reloaded.keys, corpus.keys)


CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]


def in_memory(records: list[dict], folder: Path) -> Corpus:
    """The rows as a list of records."""

    def read(row: dict) -> Text:
        turns = row.get("messages")
        return Text(
            row.get("instruction", "hi"),
            row.get("input", ""),
            row.get("output", "ho"),
            tuple((turn["role"], turn["content"]) for turn in turns) if turns else None,
        )

    return Corpus(
        "rows",
        [
            Record(row["id"], {code: read(text) for code, text in row.items() if code != "id"})
            for row in records
        ],
    )


def from_file(records: list[dict], folder: Path) -> Corpus:
    return load(write_lines(folder / "rows.jsonl", records))


def changed(row: int, code: str, **fields):
    return lambda rows: [
        {**r, code: {**r[code], **fields}} if i == row else r for i, r in enumerate(rows)
    ]


def swapped(rows: list[dict]) -> list[dict]:
    return [{"id": rows[0]["id"], "en": rows[0]["zh"], "zh": rows[0]["en"]}, *rows[1:]]


FINGERPRINTS = {
    **{field: changed(1, "zh", **{field: "other"}) for field in ("instruction", "input", "output")},
    "role": changed(2, "en", messages=[{"role": "system", "content": "x"}, *CHAT]),
    "turn": changed(2, "en", messages=[{**CHAT[0], "content": "other"}, CHAT[1]]),
    "id": lambda rows: [{**rows[0], "id": "other"}, *rows[1:]],
    "language": swapped,
    "row more": lambda rows: [*rows, {**rows[0], "id": "other"}],
    "row less": lambda rows: rows[1:],
    "language less": lambda rows: [{"id": rows[0]["id"], "en": rows[0]["en"]}, *rows[1:]],
    "dropped": changed(0, "zh", output="\0"),
}


@pytest.mark.parametrize("part", FINGERPRINTS)
@pytest.mark.parametrize("read", [in_memory, from_file])
def test_the_fingerprint_follows_every_part_of_the_texts_and_not_their_order(part, read, tmp_path):
    rows = parallel_rows(2, ("en", "zh")) + [
        {"id": "chat", "en": {"messages": CHAT}, "zh": {"messages": CHAT}}
    ]
    whole = read(rows, tmp_path).fingerprint
    assert (
        read(rows[::-1], tmp_path).fingerprint
        == whole
        != read(FINGERPRINTS[part](rows), tmp_path).fingerprint
    )


def test_the_fingerprint_counts_rows_that_are_alike(tmp_path):
    rows = [{"instruction": "q", "output": "a"}, {"instruction": "p", "output": "b"}]
    prints = [
        load(write_lines(tmp_path / "rows.jsonl", more), ("en",)).fingerprint
        for more in (rows, rows + rows[:1] * 2, rows + rows[1:] * 2)
    ]
    assert len(set(prints)) == 3


def test_the_fingerprint_names_the_part_that_is_read(tmp_path):
    path = write_lines(tmp_path / "rows.jsonl", ROWS)
    parts = [
        {},
        {"limit": 3},
        {"limit": 4},
        {"portion": (0.0, 0.5)},
        {"portion": (0.5, 1.0)},
        {"portion": (0.5, 1.0), "limit": 3},
    ]
    assert len({load(path, **part).fingerprint for part in parts}) == len(parts)
    text = {**ROWS[0], "en": {**ROWS[0]["en"], "output": "other"}}
    other = write_lines(tmp_path / "other.jsonl", [text, *ROWS[1:]])
    assert load(path, limit=39).fingerprint != load(other, limit=39).fingerprint


def test_large_sources_are_mapped_from_disk_and_reread_when_the_file_changes(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus_module, "CACHE_BYTES", 0)
    path = write_lines(tmp_path / "rows.jsonl", ROWS)
    source = Source(name="rows", path=path)
    first = load_corpus(source, CODES, cache=str(tmp_path / "cache"))
    assert texts_of(first) == EXPECTED
    monkeypatch.setattr(corpus_module, "_write_texts", None)  # a second reading may not parse again
    again = load_corpus(source, CODES, cache=str(tmp_path / "cache"))
    assert (
        again.fingerprint == first.fingerprint and pickle.loads(pickle.dumps(again))[3] == first[3]
    )
    monkeypatch.undo()
    monkeypatch.setattr(corpus_module, "CACHE_BYTES", 0)
    write_lines(tmp_path / "rows.jsonl", ROWS[:5])
    assert len(load_corpus(source, CODES, cache=str(tmp_path / "cache"))) == 5


@pytest.fixture
def cached(monkeypatch, tmp_path):
    """Reads a source as a large one, through a cache folder."""
    monkeypatch.setattr(corpus_module, "CACHE_BYTES", 0)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))

    def read(cache: str = "cache", codes=("en", "zh"), **settings):
        source = Source(**{"name": "rows", "path": str(tmp_path / "rows.jsonl")} | settings)
        try:
            corpus = load_corpus(source, codes, cache=str(tmp_path / cache))
        except UserError as error:
            return str(error)
        places = [corpus.describe_origin(i) for i in range(len(corpus))]
        return (
            [*corpus],
            corpus.keys.tolist(),
            corpus.languages,
            corpus.fingerprint,
            corpus.dropped,
            corpus.dropped_rows,
            places,
        )

    return read


def write_apart(folder: Path) -> str:
    """A file per language, whose rows have ids that meet otherwise than their places do."""
    for code, ids in (("en", "abc"), ("zh", "bca")):
        write_lines(
            folder / f"apart_{code}.jsonl",
            [{"id": i, "instruction": f"{code} {i}", "output": "x"} for i in ids],
        )
    return str(folder / "apart_{lang}.jsonl")


def write_splits(folder: Path) -> str:
    (folder / "hub").mkdir()
    for name, start in (("train", 0), ("test", 100)):
        write_lines(folder / "hub" / f"{name}.jsonl", parallel_rows(3, start=start))
    return str(folder / "hub")


# What is changed between two readings through one cache → (settings, changed settings)
CACHED = {
    "languages in use": lambda d: ({}, {"codes": ("en", "vi")}),
    "order of the languages": lambda d: ({}, {"codes": ("zh", "en")}),
    "source.languages": lambda d: ({}, {"languages": ("en", "vi")}),
    "source.fields": lambda d: ({}, {"fields": {"instruction": "output", "output": "instruction"}}),
    "source.join": lambda d: ({"path": write_apart(d)}, {"join": "position"}),
    "source.split": lambda d: ({"path": write_splits(d), "kind": "hub"}, {"split": "test"}),
    "source.kind": lambda d: ({}, {"kind": "messages"}),
    "layout": lambda d: ({}, {"kind": "csv"}),
    "source.path": lambda d: ({}, {"path": write_lines(d / "more.jsonl", parallel_rows(9))}),
    "source.portion": lambda d: ({}, {"portion": (0.5, 1.0)}),
    "source.limit": lambda d: ({"limit": 7}, {"limit": 5}),
}


@pytest.mark.parametrize("part", CACHED)
def test_a_cached_source_is_read_anew_where_a_setting_says_otherwise(cached, tmp_path, part):
    """What comes through a filled cache is what comes through an empty one."""
    write_lines(tmp_path / "rows.jsonl", ROWS)
    settings, changes = CACHED[part](tmp_path)
    before, after = cached(**settings), cached(**settings | changes)
    assert not isinstance(before, str) and before != after
    assert after == cached("empty", **settings | changes)
    assert before == cached(**settings)


def touch(path: Path, text: str, seconds: int) -> None:
    """Writes a file as if it were written at a time."""
    path.write_text(text)
    os.utime(path, (seconds, seconds))


@pytest.mark.parametrize("change", ["time", "size", "folder"])
def test_a_cached_source_is_read_anew_where_a_file_differs(cached, tmp_path, change):
    """By its size, its time, or its folder alone; also where it is one of several."""
    path = write_apart(tmp_path)
    old, new = (
        '{"id": "a", "instruction": "i", "output": "x"}\n',
        '{"id": "a", "instruction": "i", "output": "y"}\n',
    )
    for code in ("en", "zh"):
        touch(tmp_path / f"apart_{code}.jsonl", old, 1000)
    before = cached(path=path)
    if change == "folder":
        (tmp_path / "copy").mkdir()
        path = str(tmp_path / "copy" / "apart_{lang}.jsonl")
        touch(tmp_path / "copy" / "apart_en.jsonl", old, 1000)
    zh = Path(path.replace("{lang}", "zh"))
    touch(zh, new + " " * (change == "size"), 2000 if change == "time" else 1000)
    after = cached(path=path)
    assert before != after == cached("empty", path=path) and after[0][0].texts["zh"].output == "y"


def test_a_hub_data_set_in_a_folder_is_read_anew_where_a_file_in_it_differs(cached, tmp_path):
    (tmp_path / "set" / "data").mkdir(parents=True)
    file = tmp_path / "set" / "data" / "train.jsonl"
    found = []
    for output in ("first", "second"):
        write_lines(file, [{"id": "a", "en": {"instruction": "q", "output": output}}])
        found.append(cached(path=str(tmp_path / "set"), kind="hub")[0][0].texts["en"].output)
    assert found == ["first", "second"]


def test_a_cached_source_is_parsed_once_whatever_is_taken_of_it(cached, tmp_path, monkeypatch):
    """Name, portion and limit pick from one entry; dropped rows are still counted."""
    write_lines(
        tmp_path / "rows.jsonl",
        [*ROWS, {"id": "faulty", "en": {"instruction": "q", "output": " "}}],
    )
    first = cached()
    assert (
        first == cached()
        and first[4] == {"empty output": 1}
        and "row 41 (en)" in first[5]["empty output"][0]
    )
    assert cached(name="other") == first and len(cached(limit=3)[0]) == 3
    halves = [record for part in ((0.0, 0.5), (0.5, 1.0)) for record in cached(portion=part)[0]]
    assert sorted(halves, key=lambda record: int(record.id[1:])) == first[0]
    assert len([*(tmp_path / "cache").iterdir()]) == 1
    # As a later release may write it.
    monkeypatch.setattr(corpus_module, "FORMAT", corpus_module.FORMAT + 1)
    assert cached() == first and len([*(tmp_path / "cache").iterdir()]) == 2
    monkeypatch.setattr(corpus_module, "CACHE_BYTES", 1 << 30)
    assert cached() == first  # as from memory


@pytest.mark.parametrize("read", [in_memory, from_file])
def test_records_are_found_by_their_place_from_either_end(tmp_path, read):
    corpus = read(ROWS[:3], tmp_path)
    assert [corpus[i].id for i in (0, 2, -1, -3)] == ["r0", "r2", "r2", "r0"]
    for i in (3, -4):
        with pytest.raises(IndexError):
            corpus[i]
    assert corpus.describe_origin(1).endswith("row 2") and [*corpus.ids()] == ["r0", "r1", "r2"]
    assert corpus.pick(1, ("zh",)).texts["zh"] == corpus[1].texts["zh"]


def test_small_sources_stay_in_memory_and_large_ones_go_to_the_cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("CROSSIN_CACHE", str(tmp_path / "cache"))
    path = write_lines(tmp_path / "rows.jsonl", ROWS)
    monkeypatch.setattr(corpus_module, "CACHE_BYTES", os.path.getsize(path))
    load(path)
    assert not (tmp_path / "cache").exists()
    monkeypatch.setattr(corpus_module, "CACHE_BYTES", os.path.getsize(path) - 1)
    load(path)
    assert len([*(tmp_path / "cache").iterdir()]) == 1


def test_stopped_caching_leaves_nothing_that_counts_as_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus_module, "CACHE_BYTES", 0)
    path = write_lines(tmp_path / "rows.jsonl", ROWS)
    with open(path, "a") as file:
        file.write("{not json")
    with pytest.raises(UserError, match="row 41"):
        load_corpus(Source(name="rows", path=path), CODES, cache=str(tmp_path / "cache"))
    assert not list((tmp_path / "cache").iterdir())


def test_memory_does_not_grow_with_the_text(tmp_path):
    filler = "The quick brown fox jumps over the lazy dog. " * 12
    rows = (
        {
            "id": f"r{i}",
            **{code: {"instruction": f"{i} {filler}", "output": str(i)} for code in ("en", "es")},
        }
        for i in range(60_000)
    )
    path = write_lines(tmp_path / "big.jsonl", rows)
    assert Path(path).stat().st_size > 64 << 20
    code = """
import sys
import numpy, pyarrow, tqdm
from crossin_jax.config import Source
from crossin_jax.data.corpus import load_corpus
def used():
    return int(open("/proc/self/status").read().split("RssAnon:")[1].split()[0]) / 1024
before = used()
corpus = load_corpus(Source(name="big", path=sys.argv[1]), ("en", "es"), cache=sys.argv[2])
assert len(corpus) == 60_000
assert all(corpus[i].texts["es"].output == str(i) for i in range(0, 60_000, 30))
print(used() - before)
"""
    command = [sys.executable, "-c", code, path, str(tmp_path / "cache")]
    first, again = (
        float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        for _ in range(2)
    )
    assert first < 60 and again < 8, (first, again)  # MiB, of 67 MiB of text; 53 and 6 of 815 MiB


def test_large_json_lists_are_streamed(tmp_path, monkeypatch):
    (tmp_path / "rows.json").write_text(json.dumps(ROWS, indent=1), encoding="utf-8")
    monkeypatch.setattr(readers, "WHOLE_FILE_BYTES", 0)
    assert texts_of(load(tmp_path / "rows.json")) == EXPECTED
    (tmp_path / "broken.json").write_text(json.dumps(ROWS)[:-40])
    with pytest.raises(UserError, match=r"broken.json, row \d+: not JSON"):
        load(tmp_path / "broken.json")


def test_join_by_position_needs_equal_lengths_and_no_ids(tmp_path):
    for code in ("en", "zh"):
        (tmp_path / f"alpaca_{code}.json").write_text(
            json.dumps([row[code] for row in ROWS]), encoding="utf-8"
        )
    corpus = load(tmp_path, ("en", "zh"), join="position")
    assert [record.texts["zh"].output for record in corpus] == [row["zh"]["output"] for row in ROWS]
    (tmp_path / "alpaca_zh.json").write_text(
        json.dumps([row["zh"] for row in ROWS[:-1]]), encoding="utf-8"
    )
    with pytest.raises(
        UserError, match="disagree in their number of rows.*en.json: 40.*zh.json: 39"
    ):
        load(tmp_path, ("en", "zh"), join="position")
    with pytest.raises(UserError, match="no id to join the languages by.*join='position'"):
        load(tmp_path, ("en", "zh"))


def test_rows_without_ids_are_named_by_content(tmp_path):
    rows = [row["en"] for row in ROWS] + [ROWS[0]["en"]]  # one row twice
    one, two = (
        load(write_lines(tmp_path / f"{i}.jsonl", r), ("en",))
        for i, r in enumerate([rows, rows[::-1]])
    )
    assert set(one.ids()) == set(two.ids()) and len(set(one.ids())) == 41
    assert sum(record_id.endswith("-2") for record_id in one.ids()) == 1


def by_hash(ids: list[str]) -> list[str]:
    """Row ids in the order of the first eight bytes of BLAKE2b."""

    def key(row_id: str) -> int:
        return int.from_bytes(hashlib.blake2b(row_id.encode(), digest_size=8).digest(), "little")

    return sorted(ids, key=key)


@pytest.mark.parametrize("n", [1, 2, 3, 7, 40])
def test_portion_and_limit_take_rows_in_hash_order(tmp_path, n):
    """Parts that meet leave no row out and share none; the file's order stays."""
    ids = [row["id"] for row in ROWS[:n]]
    for rows in (ROWS[:n], ROWS[:n][::-1]):
        path = write_lines(tmp_path / "rows.jsonl", rows)
        for borders in ((0.0, 1.0), (0.0, 0.5, 1.0), (0.0, 0.3, 0.35, 0.9, 1.0)):
            parts = [[*load(path, portion=part).ids()] for part in itertools.pairwise(borders)]
            assert [row for part in parts for row in by_hash(part)] == by_hash(ids)
            assert all(
                abs(len(part) - n * (b - a)) <= 1
                for part, (a, b) in zip(parts, itertools.pairwise(borders), strict=True)
            )
            assert all(part == [row["id"] for row in rows if row["id"] in part] for part in parts)
        for limit in (1, 2, 30, 50):
            assert by_hash([*load(path, limit=limit).ids()]) == by_hash(ids)[:limit]
            half = by_hash([*load(path, portion=(0.5, 1.0)).ids()])
            assert by_hash([*load(path, portion=(0.5, 1.0), limit=limit).ids()]) == half[:limit]


def test_a_part_of_the_embedded_world_is_taken_as_of_a_file():
    whole = load_corpus(Source(name="w", kind="world", split="dev"), ("en",), seed=3)
    part = load_corpus(
        Source(name="w", kind="world", split="dev", portion=(0.25, 0.75), limit=5), ("en",), seed=3
    )
    ids = [*whole.ids()]
    first = round(0.25 * len(ids))
    assert (
        sorted(part.ids()) == sorted(by_hash(ids)[first : first + 5])
        and part.fingerprint != whole.fingerprint
    )
    assert part.keys.tolist() == [
        int.from_bytes(hashlib.blake2b(i.encode(), digest_size=8).digest(), "little")
        for i in part.ids()
    ]


def test_languages_may_be_missing_but_are_known(tmp_path):
    rows = [{k: v for k, v in row.items() if k != "vi" or i} for i, row in enumerate(ROWS)]
    corpus = load(write_lines(tmp_path / "rows.jsonl", rows))
    assert (
        set(corpus[0].texts) == {"en", "zh", "es"}
        and not corpus.has["vi"][0]
        and corpus.has["vi"][1:].all()
    )


def test_the_column_id_holds_row_ids_unless_it_holds_indonesian(tmp_path):
    codes = ("en", "id")
    plain = load(write_lines(tmp_path / "a.jsonl", parallel_rows(3, ("en",))), codes)
    assert list(plain.ids()) == ["r0", "r1", "r2"] and plain.languages == ("en",)
    rows = [{"key": row["id"], "en": row["en"], "id": row["es"]} for row in ROWS]
    for fields in ({}, {"id": "key"}):
        corpus = load(write_lines(tmp_path / "b.jsonl", rows), codes, fields=fields)
        assert corpus.languages == codes and corpus[0].texts["id"].output == ROWS[0]["es"]["output"]


def test_chats_keep_their_turns(tmp_path):
    chat = [
        {"from": "human", "value": "hi"},
        {"from": "gpt", "value": "ho"},
        {"from": "human", "value": "and?"},
        {"from": "gpt", "value": "so"},
    ]
    corpus = load(write_lines(tmp_path / "chat.jsonl", [{"conversations": chat}]), ("en",))
    text = corpus[0].texts["en"]
    assert text.messages == (
        ("user", "hi"),
        ("assistant", "ho"),
        ("user", "and?"),
        ("assistant", "so"),
    )
    assert (text.instruction, text.output) == ("and?", "so")
    assert load(
        write_lines(tmp_path / "bad.jsonl", [{"conversations": chat[:3]}]), ("en",)
    ).dropped == {"chat turns out of order": 1}
    robot = [{"role": "robot", "content": "beep"}, {"role": "assistant", "content": "a"}]
    path = write_lines(tmp_path / "worse.jsonl", [{"messages": robot}])
    assert load(path, ("en",)).dropped == {"chat turn with role 'robot'": 1}


def test_documented_drops_are_counted_with_their_whole_record(tmp_path):
    rows = parallel_rows(6, ("en", "zh"))
    rows[1]["zh"]["output"] = "  "
    rows[2]["en"]["input"] = "a\0b"
    rows[3]["zh"]["input"] = "长" * 1_700_000  # a 5 MB row
    rows[4]["en"]["output"] = "\ud83d"
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    corpus = load(tmp_path / "rows.jsonl", ("en", "zh"))
    assert [record.id for record in corpus] == ["r0", "r5"]
    assert corpus.dropped == {
        "empty output": 1,
        "NUL character": 1,
        "over 1000000 characters": 1,
        "lone surrogate": 1,
    }
    assert corpus.dropped_rows["empty output"] == [f"{tmp_path}/rows.jsonl, row 2 (zh)"]


def good(i: int) -> str:
    return json.dumps({"id": i, "instruction": "q", "output": "a"}) + "\n"


@pytest.mark.parametrize(
    ("name", "content", "settings", "message"),
    [
        ("a.jsonl", good(1) + "{oops\n", {}, r"a.jsonl, row 2: not JSON .*one object per line"),
        ("a.json", '[{"output": "a",}]', {}, r"a.json: not JSON at column 17"),
        ("a.json", '{"id": 1}', {}, r"a.json: expected a list of rows"),
        ("a.jsonl", "[1]\n", {}, r"row 1: rows are objects"),
        (
            "a.jsonl",
            good(1).encode() + b'{"output": "caf\xe9"}\n',
            {},
            r"a.jsonl, row 2: byte 0xe9 is not UTF-8.*iconv",
        ),
        ("a.json", b'[\n{"output": "caf\xe9"}]', {}, r"a.json, line 2: byte 0xe9 is not UTF-8"),
        ("a.csv", b"instruction,output\nq,caf\xe9\n", {}, r"row 2: byte 0xe9 is not UTF-8"),
        ("a.csv", "instruction,output\nq,a,b\n", {}, r"row 1: more cells than the 2 of the header"),
        ("a.csv", "instruction,output\nq\n", {}, r"row 1: fewer cells"),
        (
            "a.jsonl",
            good(1) + good(1),
            {},
            r"row 2: id '1' was already used in .*row 1; ids must be unique",
        ),
        (
            "a.jsonl",
            good(1) + '{"instruction": "q", "output": "a"}\n',
            {},
            r"row 2: no id, unlike the rows before it",
        ),
        ("a.jsonl", '{"foo": 1}\n', {}, r"no instruction and no output among the columns foo"),
        (
            "a.jsonl",
            '{"instruction": "q", "output": ["a"]}\n',
            {},
            r"row 1: output is a list, not text.*dotted path",
        ),
        (
            "a.jsonl",
            good(1),
            {"fields": {"outptu": "a"}},
            r"fields has no 'outptu'; did you mean output\?",
        ),
        ("a.jsonl", good(1), {"languages": ("xx",)}, r"'xx' is not a known language"),
        (
            "a.jsonl",
            good(1),
            {"languages": ("en", "zh")},
            r"columns id, instruction, output name no language",
        ),
        (
            "a.jsonl",
            good(1),
            {"kind": "messages"},
            r"row 1: kind='messages', but it has no list messages",
        ),
        (
            "a.jsonl",
            good(1),
            {"kind": "columns"},
            r"row 1: kind='columns', but it has no column group for any of en",
        ),
        (
            "a.json",
            "[" + good(1) + "]",
            {"kind": "squad"},
            r"row 1: kind='squad', but it has no question and context",
        ),
        ("a.jsonl", good(1), {"kind": "folder"}, r"kind='folder', but .*a.jsonl is a file"),
        ("a.txt", good(1), {}, r"the ending '.txt' .* set kind"),
        ("a.parquet", b"PAR1 nothing", {}, r"a.parquet: not a whole Parquet file"),
    ],
)
def test_faults_name_file_row_and_remedy(name, content, settings, message, tmp_path):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message) as error:
        load(path, **{"languages": ("en",)} | settings)
    assert str(error.value).count("\n") < 3


@pytest.mark.parametrize(
    ("path", "settings", "message"),
    [
        ("absent.jsonl", {}, r"absent.jsonl does not exist"),
        ("rwos.jsonl", {}, r"did you mean rows.jsonl\?"),
        ("rows_{lang}.json", {}, r"no file .*rows_zh.json for language 'zh'"),
        ("folder", {}, r"has no file for language 'zh'.*set languages=\('en',\)"),
        ("empty", {}, r"holds no NAME_LANG.json"),
    ],
)
def test_absent_files_name_what_is_there(path, settings, message, tmp_path):
    write_lines(tmp_path / "rows.jsonl", ROWS)
    for folder in ("folder", "empty"):
        (tmp_path / folder).mkdir()
    for file in (tmp_path / "rows_en.json", tmp_path / "folder" / "rows_en.json"):
        file.write_text("[]")
    with pytest.raises(UserError, match=message):
        load(tmp_path / path, ("en", "zh"), **settings)


def test_hub_faults_name_the_data_set(tmp_path):
    with pytest.raises(UserError, match="Hub data set 'nobody/nothing', split 'train'"):
        load_corpus(Source(name="x", kind="hub", path="nobody/nothing"), ("en",))


def test_lists_of_records_refuse_repeated_ids():
    with pytest.raises(UserError, match="'a' is used more than once"):
        Corpus("x", [Record("a", {"en": Text("", "", "x")})] * 2)


def test_xquad_reads_in_four_languages(shared):
    corpus = load(shared / "xquad" / "xquad.{lang}.json")
    assert len(corpus) == 1190 and corpus.languages == CODES and not corpus.dropped
    record = next(record for record in corpus if record.id == "56d6f3500d65d21400198290")
    assert record.texts["zh"].output == "24 次"
    assert record.texts["zh"].instruction == "2015年黑豹队的防守有多少次拦截记录？"
    folder = load(shared / "xquad", limit=50)
    assert len(folder) == 50 and all(texts_of(corpus)[i] == t for i, t in texts_of(folder).items())


def test_alpaca_seeds_read_through_dotted_paths(shared):
    corpus = load(
        shared / "alpaca" / "seed_tasks.jsonl",
        languages=("en",),
        fields={"input": "instances.0.input", "output": "instances.0.output"},
    )
    assert len(corpus) == 175 and corpus[3].texts["en"].input == '"All Asians are smart!"'
