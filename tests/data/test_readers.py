"""Files of every kind give the rows that were written into them."""

import csv
import json

import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crossin_jax.config import Source, UserError
from crossin_jax.data import readers
from crossin_jax.data.corpus import load_corpus
from crossin_jax.data.readers import find_files, read_rows

TEXT = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), max_size=12)
ROWS = st.lists(
    st.fixed_dictionaries(dict.fromkeys(("id", "instruction", "output"), TEXT)),
    min_size=1,
    max_size=8,
)
ODD = [
    'quoted "word"',
    "comma, semicolon; tab\t",
    "line\nbreak",
    "carriage\r return\r\n",
    " spaces ",
    "\ufeffmark",
    "\u2028",
    "河 ñ 🙂",
    "",
    "'",
    "\\n",
]


def read(path, **source) -> list[dict]:
    """The rows of a file by the numbers that they have in messages."""
    (file,) = find_files(Source(path=str(path), **source), ("en",))
    numbers, rows = zip(*read_rows(file), strict=True)
    assert numbers == tuple(range(1, len(rows) + 1))
    return list(rows)


def write(folder, form: str, rows: list[dict]):
    path = folder / f"rows.{form}"
    if form in ("csv", "tsv"):
        with open(path, "w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, [*rows[0]], delimiter="\t" if form == "tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    elif form == "parquet":
        pyarrow.parquet.write_table(pa.Table.from_pylist(rows), path)
    elif form in ("jsonl", "ndjson"):
        path.write_text(
            "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
        )
    else:
        path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    return path


@pytest.mark.parametrize("form", ["jsonl", "ndjson", "json", "csv", "tsv", "parquet"])
@settings(max_examples=25, deadline=None)
@given(rows=ROWS)
def test_a_file_gives_the_rows_that_were_written(form, tmp_path_factory, rows):
    """Quotes, delimiters and line breaks inside of texts included."""
    rows = [*rows, *({"id": text, "instruction": text, "output": "a"} for text in ODD)]
    path = write(tmp_path_factory.mktemp("rows"), form, rows)
    assert read(path) == rows


@pytest.mark.parametrize("form", ["jsonl", "json", "csv", "tsv"])
def test_a_byte_order_mark_is_no_part_of_the_first_column(tmp_path, form):
    rows = [{"id": "a", "output": "b"}, {"id": "c", "output": "d"}]
    path = write(tmp_path, form, rows)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert read(path) == rows


def test_empty_lines_count_in_the_numbers_of_rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"id": 1}\n\n  \n{"id": 2}')
    (file,) = find_files(Source(path=str(path)), ("en",))
    assert [*read_rows(file)] == [(1, {"id": 1}), (4, {"id": 2})]


@pytest.mark.parametrize("kind", ["json", "jsonl", "csv", "parquet"])
def test_a_kind_decides_over_the_ending(tmp_path, kind):
    rows = [{"id": "a", "output": "b"}]
    path = write(tmp_path, kind, rows)
    for name in ("rows.txt", "rows", "rows.data.json" if kind != "json" else "rows.csv"):
        assert read(path.rename(tmp_path / name), kind=kind) == rows
        path = tmp_path / name


def test_a_large_json_list_is_read_in_pieces(tmp_path, monkeypatch):
    """Rows, long characters and escapes lie across the borders of the pieces."""
    rows = [{"id": str(i), "output": f'{i} 河 \\ " ]}} {"ñ" * (i % 977)}'} for i in range(6000)]
    path = write(tmp_path, "json", rows)
    path.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    assert path.stat().st_size > 5 << 20
    monkeypatch.setattr(readers, "WHOLE_FILE_BYTES", path.stat().st_size)
    whole = read(path)
    monkeypatch.setattr(readers, "WHOLE_FILE_BYTES", path.stat().st_size - 1)
    assert read(path) == whole == rows
    path.write_text("\ufeff \n[]")
    monkeypatch.setattr(readers, "WHOLE_FILE_BYTES", 0)
    (file,) = find_files(Source(path=str(path)), ("en",))
    assert [*read_rows(file)] == []
    path.write_text('{"data": []}')
    with pytest.raises(UserError, match="must be a list of rows; convert it to .jsonl"):
        [*read_rows(file)]


@pytest.mark.parametrize("block", [3, 1 << 20])
@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('[{"a": 1} {"a": 2}]', "row 2: not JSON .no comma after the row before"),
        ('[{"a": 1},, {"a": 2}]', "row 2: not JSON"),
        ('[{"a": 1}, ]', "row 2: not JSON"),
        ('[, {"a": 1}]', "row 1: not JSON"),
        ('[{"a": 1}] more', "row 2: not JSON .text after the end of the list"),
        ('[{"a": 1}', "row 2: not JSON .the list does not end"),
        ('[{"a": 1},', "row 2: not JSON .the list does not end"),
        ('[{"a": tru}]', "row 1: not JSON"),
        ('[{"a": "x', "row 1: not JSON"),
    ],
)
def test_a_streamed_list_is_as_strict_as_a_whole_one(tmp_path, monkeypatch, block, content, words):
    """The same text is refused below and above the size from which a file is streamed, in blocks of
    any size.
    """
    path = tmp_path / "rows.json"
    path.write_text(content)
    (file,) = find_files(Source(path=str(path)), ("en",))
    with pytest.raises(UserError, match="not JSON"):
        [*read_rows(file)]
    monkeypatch.setattr(readers, "WHOLE_FILE_BYTES", 0)
    monkeypatch.setattr(readers, "BLOCK", block)
    with pytest.raises(UserError, match=words):
        [*read_rows(file)]


@pytest.mark.parametrize("block", [1, 7, 1 << 20])
def test_a_streamed_list_has_the_same_rows(tmp_path, monkeypatch, block):
    rows = [{"id": i, "text": 'é"]},[{' * i, "list": [1, {"a": []}]} for i in range(9)]
    path = tmp_path / "rows.json"
    path.write_text(f" {json.dumps(rows, indent=1)}\n \n", encoding="utf-8")
    (file,) = find_files(Source(path=str(path)), ("en",))
    monkeypatch.setattr(readers, "WHOLE_FILE_BYTES", 0)
    monkeypatch.setattr(readers, "BLOCK", block)
    assert [*read_rows(file)] == list(enumerate(rows, 1))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", "[]"),
        ("a.json", '{"data": []}'),
        ("a.jsonl", ""),
        ("a.jsonl", "\n"),
        ("a.csv", "id,output\n"),
        ("a.tsv", ""),
    ],
)
def test_a_file_may_hold_no_rows(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    corpus = load_corpus(Source(name="x", path=str(tmp_path / name)), ("en",))
    assert len(corpus) == 0 and corpus.languages == () and [*corpus] == []


def test_a_file_in_an_absent_folder_is_named(tmp_path):
    with pytest.raises(UserError, match="nowhere/a.jsonl does not exist; paths start at"):
        find_files(Source(path=str(tmp_path / "nowhere" / "a.jsonl")), ("en",))


def test_squad_files_are_questions_with_the_first_answer(tmp_path):
    def qa(i, *answers):
        return {
            "id": i,
            "question": f"q{i}",
            "answers": [{"text": text, "answer_start": 0} for text in answers],
        }

    articles = [
        {
            "title": "t",
            "paragraphs": [
                {"context": "c1", "qas": [qa(1, "a", "b"), qa(2, "d")]},
                {"context": "c2", "qas": [qa(3)]},
            ],
        },
        {"title": "u", "paragraphs": [{"context": "c3", "qas": [qa(4, "e")]}]},
    ]
    (tmp_path / "x.json").write_text(json.dumps({"version": "1", "data": articles}))
    for kind in ("auto", "squad"):
        assert [tuple(row.values()) for row in read(tmp_path / "x.json", kind=kind)] == [
            ("1", "q1", "c1", "a", "0", "0.0"),
            ("2", "q2", "c1", "d", "0", "0.0"),
            ("3", "q3", "c2", "", "0", "0.1"),
            ("4", "q4", "c3", "e", "1", "1.0"),
        ]
        corpus = load_corpus(Source(name="x", path=str(tmp_path / "x.json"), kind=kind), ("en",))
        assert [*corpus.ids()] == ["1", "2", "4"] and corpus.dropped == {"empty output": 1}
        assert corpus[0].texts["en"].input == "c1"


def test_hub_rows_in_squad_s_layout_give_their_first_answer(tmp_path, monkeypatch):
    """From the split that is named; rows with an answer of their own keep it."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("CROSSIN_CACHE", str(tmp_path / "cache"))
    (tmp_path / "set").mkdir()
    for split in ("train", "test"):
        rows = [
            {
                "id": f"{split}{i}",
                "question": "q",
                "context": "c",
                "answers": {"text": [f"{split} {i}", "other"], "answer_start": [0, 1]},
            }
            for i in range(2)
        ]
        write(tmp_path / "set", "jsonl", rows).rename(tmp_path / "set" / f"{split}.jsonl")
    for split in ("train", "test"):
        corpus = load_corpus(
            Source(name="x", kind="hub", path=str(tmp_path / "set"), split=split), ("en",)
        )
        assert {record.id: record.texts["en"].output for record in corpus} == {
            f"{split}{i}": f"{split} {i}" for i in range(2)
        }


# ---- Which files


@pytest.mark.parametrize(
    ("name", "codes", "found"),
    [
        ("rows_en.json", ("en",), "en"),
        ("rows-en.jsonl", ("en",), "en"),
        ("rows.en.csv", ("en",), "en"),
        ("en.parquet", ("en",), "en"),
        ("open.json", ("en",), None),
        ("xen.json", ("en",), None),
        ("rows_en.txt", ("en",), None),
        ("rows_en", ("en",), None),
        ("en_rows.json", ("en",), None),
        ("rows_en.json.bak", ("en",), None),
        ("rows_fil.tsv", ("fil",), "fil"),
        ("a_zh_en.json", ("en",), "en"),
        ("rows_EN.json", ("en",), "en"),
        ("rows_eng_Latn.jsonl.gz", ("en",), "en"),
        ("rows_Simplified Chinese.json", ("zh",), "zh"),
        ("rows_zho_Hant.json", ("en",), None),
    ],
)
def test_a_folder_s_files_are_told_by_how_their_names_end(tmp_path, name, codes, found):
    (tmp_path / name).write_text("[]")
    source = Source(path=str(tmp_path))
    if found:
        (file,) = find_files(source, codes)
        assert file.language == found and file.path == str(tmp_path / name)
    else:
        with pytest.raises(UserError, match=rf"holds no NAME_LANG.json .* for en; it holds {name}"):
            find_files(source, codes)


def test_a_folder_gives_one_file_per_language_in_their_order(tmp_path):
    for name in ("a_zh.csv", "a_en.json", "b-es.jsonl", "open.json", "other.txt"):
        (tmp_path / name).write_text("[]")
    files = find_files(Source(path=str(tmp_path), kind="folder"), ("zh", "en", "es"))
    assert [(file.language, file.layout) for file in files] == [
        ("zh", "csv"),
        ("en", "json"),
        ("es", "jsonl"),
    ]
    (tmp_path / "b_en.json").write_text("[]")
    with pytest.raises(
        UserError, match="a_en.json, b_en.json could all be 'en'; give one file per language"
    ):
        find_files(Source(path=str(tmp_path)), ("zh", "en"))


def test_a_pattern_gives_the_file_of_each_language(tmp_path):
    for code in ("en", "zh"):
        (tmp_path / code).mkdir()
        (tmp_path / code / f"x.{code}.jsonl").write_text('{"output": "a"}\n')
    pattern = str(tmp_path / "{lang}" / "x.{lang}.jsonl")
    files = find_files(Source(path=pattern), ("zh", "en"))
    assert [(file.language, file.path, file.layout) for file in files] == [
        (code, pattern.replace("{lang}", code), "jsonl") for code in ("zh", "en")
    ]
    assert [
        (file.path, file.language, file.layout)
        for file in find_files(Source(path="org/set-{lang}", kind="hub"), ("zh", "en"))
    ] == [(f"org/set-{code}", code, "hub") for code in ("zh", "en")]
    assert find_files(Source(path="org/set", kind="hub"), ("zh", "en")) == [
        ("org/set", None, "hub")
    ]
    with pytest.raises(UserError, match="path is empty; give a file, a folder, a pattern"):
        find_files(Source(name="s"), ("en",))
