"""Every layout gives the same records; every fault names file, row and remedy."""

import csv
import json
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
        (folder / f"rows_{code}.json").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
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
            writer.writerow({"id": row["id"], **{name: row[name[-2:]][name[:-3]] for name in fields}})
    return "rows.csv", {}


def write_long_parquet(folder):
    rows = [{"key": row["id"], "lang": code, "question": row[code]["instruction"], "context": row[code]["input"],
             "response": row[code]["output"]} for row in ROWS for code in CODES]
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), folder / "rows.parquet")
    return "rows.parquet", {"fields": {"id": "key"}}


def write_english_names(folder):
    names = {"en": "English", "zh": "Chinese", "vi": "Vietnamese", "es": "Spanish"}
    write_lines(folder / "rows.jsonl", [{"id": row["id"], **{names[c]: row[c] for c in CODES}} for row in ROWS])
    return "rows.jsonl", {"kind": "columns"}


def write_hub(folder):
    write_lines(folder / "train.jsonl", ROWS)
    return "", {"kind": "hub"}


LAYOUTS = [write_columns_json, write_jsonl, write_language_files, write_pattern, write_flat_csv, write_long_parquet,
           write_english_names, write_hub]


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


def test_fingerprint_follows_the_text_and_not_the_order(tmp_path):
    shuffled, changed = ROWS[::-1], [{**ROWS[0], "en": {**ROWS[0]["en"], "output": "other"}}, *ROWS[1:]]
    prints = [load(write_lines(tmp_path / f"{i}.jsonl", rows)).fingerprint
              for i, rows in enumerate([ROWS, shuffled, changed])]
    assert prints[0] == prints[1] != prints[2]


def test_large_sources_are_mapped_from_disk_and_reread_when_the_file_changes(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus_module, "CACHE_BYTES", 0)
    path = write_lines(tmp_path / "rows.jsonl", ROWS)
    source = Source(name="rows", path=path)
    first = load_corpus(source, CODES, cache=str(tmp_path / "cache"))
    assert texts_of(first) == EXPECTED
    monkeypatch.setattr(corpus_module, "_write_texts", None)  # a second reading may not parse again
    again = load_corpus(source, CODES, cache=str(tmp_path / "cache"))
    assert again.fingerprint == first.fingerprint and pickle.loads(pickle.dumps(again))[3] == first[3]
    monkeypatch.undo()
    monkeypatch.setattr(corpus_module, "CACHE_BYTES", 0)
    write_lines(tmp_path / "rows.jsonl", ROWS[:5])
    assert len(load_corpus(source, CODES, cache=str(tmp_path / "cache"))) == 5


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
    rows = ({"id": f"r{i}", **{code: {"instruction": f"{i} {filler}", "output": str(i)} for code in ("en", "es")}}
            for i in range(60_000))
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
assert len(corpus) == 60_000 and all(corpus[i].texts["es"].output == str(i) for i in range(0, 60_000, 30))
print(used() - before)
"""
    command = [sys.executable, "-c", code, path, str(tmp_path / "cache")]
    first, again = (float(subprocess.run(command, capture_output=True, text=True, check=True).stdout) for _ in range(2))
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
        (tmp_path / f"alpaca_{code}.json").write_text(json.dumps([row[code] for row in ROWS]), encoding="utf-8")
    corpus = load(tmp_path, ("en", "zh"), join="position")
    assert [record.texts["zh"].output for record in corpus] == [row["zh"]["output"] for row in ROWS]
    (tmp_path / "alpaca_zh.json").write_text(json.dumps([row["zh"] for row in ROWS[:-1]]), encoding="utf-8")
    with pytest.raises(UserError, match="disagree in their number of rows.*en.json: 40.*zh.json: 39"):
        load(tmp_path, ("en", "zh"), join="position")
    with pytest.raises(UserError, match="no id to join the languages by.*join='position'"):
        load(tmp_path, ("en", "zh"))


def test_rows_without_ids_are_named_by_content(tmp_path):
    rows = [row["en"] for row in ROWS] + [ROWS[0]["en"]]  # one row twice
    one, two = (load(write_lines(tmp_path / f"{i}.jsonl", r), ("en",)) for i, r in enumerate([rows, rows[::-1]]))
    assert set(one.ids()) == set(two.ids()) and len(set(one.ids())) == 41
    assert sum(record_id.endswith("-2") for record_id in one.ids()) == 1


def test_limit_takes_the_same_rows_in_any_order(tmp_path):
    chosen = [set(load(write_lines(tmp_path / f"{i}.jsonl", rows), limit=n).ids())
              for i, (rows, n) in enumerate([(ROWS, 10), (ROWS[::-1], 10), (ROWS, 20)])]
    assert chosen[0] == chosen[1] < chosen[2] and len(chosen[0]) == 10


def test_portions_part_the_rows(tmp_path):
    path = write_lines(tmp_path / "rows.jsonl", ROWS)
    one, two = (load(path, portion=portion) for portion in ((0.0, 0.5), (0.5, 1.0)))
    assert set(one.ids()) | set(two.ids()) == set(EXPECTED) and not set(one.ids()) & set(two.ids())
    assert one.fingerprint != two.fingerprint and len(load(path, portion=(0.5, 1.0), limit=3)) == 3


def test_languages_may_be_missing_but_are_known(tmp_path):
    rows = [{k: v for k, v in row.items() if k != "vi" or i} for i, row in enumerate(ROWS)]
    corpus = load(write_lines(tmp_path / "rows.jsonl", rows))
    assert set(corpus[0].texts) == {"en", "zh", "es"} and not corpus.has["vi"][0] and corpus.has["vi"][1:].all()


def test_the_column_id_holds_row_ids_unless_it_holds_indonesian(tmp_path):
    codes = ("en", "id")
    plain = load(write_lines(tmp_path / "a.jsonl", parallel_rows(3, ("en",))), codes)
    assert list(plain.ids()) == ["r0", "r1", "r2"] and plain.languages == ("en",)
    rows = [{"key": row["id"], "en": row["en"], "id": row["es"]} for row in ROWS]
    for fields in ({}, {"id": "key"}):
        corpus = load(write_lines(tmp_path / "b.jsonl", rows), codes, fields=fields)
        assert corpus.languages == codes and corpus[0].texts["id"].output == ROWS[0]["es"]["output"]


def test_chats_keep_their_turns(tmp_path):
    chat = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}, {"from": "human", "value": "and?"},
            {"from": "gpt", "value": "so"}]
    corpus = load(write_lines(tmp_path / "chat.jsonl", [{"conversations": chat}]), ("en",))
    text = corpus[0].texts["en"]
    assert text.messages == (("user", "hi"), ("assistant", "ho"), ("user", "and?"), ("assistant", "so"))
    assert (text.instruction, text.output) == ("and?", "so")
    assert load(write_lines(tmp_path / "bad.jsonl", [{"conversations": chat[:3]}]), ("en",)).dropped == {
        "chat turns out of order": 1}
    with pytest.raises(UserError, match="role 'robot'"):
        load(write_lines(tmp_path / "worse.jsonl", [{"messages": [{"role": "robot", "content": ""}]}]), ("en",))


def test_documented_drops_are_counted_with_their_whole_record(tmp_path):
    rows = parallel_rows(6, ("en", "zh"))
    rows[1]["zh"]["output"] = "  "
    rows[2]["en"]["input"] = "a\0b"
    rows[3]["zh"]["input"] = "长" * 1_700_000  # a 5 MB row
    rows[4]["en"]["output"] = "\ud83d"
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    corpus = load(tmp_path / "rows.jsonl", ("en", "zh"))
    assert [record.id for record in corpus] == ["r0", "r5"]
    assert corpus.dropped == {"empty output": 1, "NUL character": 1, "over 1000000 characters": 1, "lone surrogate": 1}
    assert corpus.dropped_rows["empty output"] == [f"{tmp_path}/rows.jsonl, row 2 (zh)"]


def good(i: int) -> str:
    return json.dumps({"id": i, "instruction": "q", "output": "a"}) + "\n"


@pytest.mark.parametrize(("name", "content", "settings", "message"), [
    ("a.jsonl", good(1) + "{oops\n", {}, r"a.jsonl, row 2: not JSON .*one object per line"),
    ("a.json", '[{"output": "a",}]', {}, r"a.json, line 1: not JSON"),
    ("a.json", '{"id": 1}', {}, r"a.json: expected a list of rows"),
    ("a.jsonl", "[1]\n", {}, r"row 1: rows are objects"),
    ("a.jsonl", good(1).encode() + b'{"output": "caf\xe9"}\n', {}, r"a.jsonl, row 2: byte 0xe9 is not UTF-8.*iconv"),
    ("a.json", b'[\n{"output": "caf\xe9"}]', {}, r"a.json, line 2: byte 0xe9 is not UTF-8"),
    ("a.csv", b"instruction,output\nq,caf\xe9\n", {}, r"row 2: byte 0xe9 is not UTF-8"),
    ("a.csv", "instruction,output\nq,a,b\n", {}, r"row 1: more cells than the 2 of the header"),
    ("a.csv", "instruction,output\nq\n", {}, r"row 1: fewer cells"),
    ("a.jsonl", good(1) + good(1), {}, r"row 2: id '1' was already used in .*row 1; ids must be unique"),
    ("a.jsonl", good(1) + '{"instruction": "q", "output": "a"}\n', {}, r"row 2: no id, unlike the rows before it"),
    ("a.jsonl", '{"foo": 1}\n', {}, r"no instruction and no output among the columns foo"),
    ("a.jsonl", '{"instruction": "q", "output": ["a"]}\n', {}, r"row 1: output is a list, not text.*dotted path"),
    ("a.jsonl", good(1), {"fields": {"outptu": "a"}}, r"fields has no 'outptu'; did you mean output\?"),
    ("a.jsonl", good(1), {"languages": ("xx",)}, r"'xx' is not a known language"),
    ("a.jsonl", good(1), {"languages": ("en", "zh")}, r"columns id, instruction, output name no language"),
    ("a.jsonl", good(1), {"kind": "messages"}, r"row 1: kind='messages', but it has no list messages"),
    ("a.jsonl", good(1), {"kind": "columns"}, r"row 1: kind='columns', but it has no column group for any of en"),
    ("a.json", "[" + good(1) + "]", {"kind": "squad"}, r"row 1: kind='squad', but it has no question and context"),
    ("a.jsonl", good(1), {"kind": "folder"}, r"kind='folder', but .*a.jsonl is a file"),
    ("a.txt", good(1), {}, r"the ending '.txt' .* set kind"),
    ("a.parquet", b"PAR1 nothing", {}, r"a.parquet: not a whole Parquet file"),
])
def test_faults_name_file_row_and_remedy(name, content, settings, message, tmp_path):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message) as error:
        load(path, **{"languages": ("en",)} | settings)
    assert str(error.value).count("\n") < 3


@pytest.mark.parametrize(("path", "settings", "message"), [
    ("absent.jsonl", {}, r"absent.jsonl does not exist"),
    ("rwos.jsonl", {}, r"did you mean rows.jsonl\?"),
    ("rows_{lang}.json", {}, r"no file .*rows_zh.json for language 'zh'"),
    ("folder", {}, r"has no file for language 'zh'.*set languages=\('en',\)"),
    ("empty", {}, r"holds no NAME_LANG.json"),
])
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
    corpus = load(shared / "alpaca" / "seed_tasks.jsonl", languages=("en",),
                  fields={"input": "instances.0.input", "output": "instances.0.output"})
    assert len(corpus) == 175 and corpus[3].texts["en"].input == '"All Asians are smart!"'
