"""Rows of any layout become texts by language; faults drop a row and are counted."""

import hashlib
import itertools
import json

import pytest

from crossin_jax.config import Source, UserError
from crossin_jax.data.corpus import Corpus, Text, load_corpus
from tests.data.conftest import parallel_rows, write_lines

NAMES = {
    "instruction": ("instruction", "question", "prompt", "query"),
    "input": ("input", "context"),
    "output": ("output", "response", "answer", "completion", "text"),
}
FORMS = {"code": "{code}", "English name": "{name}"}
ENGLISH = {"en": "English", "zh": "Chinese", "es": "Spanish"}
LONGEST = 1_000_000


@pytest.fixture
def read(tmp_path):
    """Reads rows from a .jsonl file: (rows, languages, source settings) → corpus."""

    def load(rows: list[dict], codes=("en",), **settings) -> Corpus:
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return load_corpus(Source(name="rows", path=str(path), **settings), codes)

    return load


# ---- Columns


@pytest.mark.parametrize(
    ("field", "column"), [(f, c) for f, columns in NAMES.items() for c in columns]
)
def test_a_field_is_found_under_each_of_its_names(read, field, column):
    """In a plain row, in a language's group of columns, and in columns with a language's code."""
    texts = {"instruction": "q", "input": "i", "output": "a"}
    expected = Text(**texts)
    row = {column if name == field else name: text for name, text in texts.items()}
    assert read([{"id": 1, **row}])[0].texts == {"en": expected}
    assert read([{"id": 1, "en": row, "es": row}], ("en", "es"))[0].texts == {
        "en": expected,
        "es": expected,
    }
    for form in ("{column}_{code}", "{code}_{column}", "{column}.{code}", "{code}.{column}"):
        flat = {
            form.format(column=name, code=code): f"{text} {code}"
            for name, text in row.items()
            for code in ("en", "es")
        }
        assert read([{"id": 1, **flat}], ("en", "es"))[0].texts == {
            code: Text(*(f"{text} {code}" for text in texts.values())) for code in ("en", "es")
        }


@pytest.mark.parametrize("field", NAMES)
def test_of_several_names_the_first_that_has_a_value_counts(read, field):
    columns = NAMES[field]
    whole = {"instruction": "q", "output": "a"} | {column: f"by {column}" for column in columns}
    for absent in range(len(columns)):
        row = whole | dict.fromkeys(columns[:absent])
        assert getattr(read([{"id": 1, **row}])[0].texts["en"], field) == f"by {columns[absent]}"


def test_fields_name_the_columns(read):
    row = {
        "key": "k",
        "q": "question",
        "a": {"b": [{"c": "deep"}, {"c": "answer"}]},
        "a.b": "flat",
        "output": "no",
        "input": "no input",
        "tongue": "Spanish",
    }
    fields = {
        "id": "key",
        "instruction": "q",
        "output": "a.b.1.c",
        "input": "",
        "language": "tongue",
    }
    (record,) = read([row], ("en", "es"), fields=fields)
    assert record.id == "k" and record.texts == {"es": Text("question", "", "answer")}
    # A column's own name comes first.
    (record,) = read([row], fields=fields | {"output": "a.b", "language": ""})
    assert record.texts == {"en": Text("question", "", "flat")}
    for nowhere in ("a.b.2.c", "a.x", "q.0", "a.b.c"):
        assert read([row], fields=fields | {"output": nowhere, "language": ""}).dropped == {
            "empty output": 1
        }


def test_fields_name_the_columns_of_every_language(read):
    row = {
        "id": "r",
        **{f"{column}-{code}": f"{column} {code}" for column in "qia" for code in ("en", "zh")},
    }
    fields = {"instruction": "q-{lang}", "input": "i-{lang}", "output": "a-{lang}"}
    expected = {code: Text(f"q {code}", f"i {code}", f"a {code}") for code in ("en", "zh")}
    assert read([row], ("en", "zh"), fields=fields)[0].texts == expected
    with pytest.raises(UserError, match="columns id, q-en, .* name no language"):
        read([row], ("en", "zh"))


@pytest.mark.parametrize("form", FORMS)
def test_a_language_is_found_under_its_code_and_its_english_name(read, form):
    columns = {code: FORMS[form].format(code=code, name=ENGLISH[code]) for code in ("en", "zh")}
    row = {
        "id": "r",
        **{
            column: {"instruction": f"q {code}", "output": f"a {code}"}
            for code, column in columns.items()
        },
    }
    expected = {code: Text(f"q {code}", "", f"a {code}") for code in columns}
    assert read([row], ("en", "zh"))[0].texts == expected
    assert read([row], ("en", "zh"), kind="columns")[0].texts == expected
    lines = {"id": "r", **{column: f"line {code}" for code, column in columns.items()}}
    assert read([lines], ("en", "zh"))[0].texts == {
        code: Text("", "", f"line {code}") for code in columns
    }


# ---- Marks of languages


@pytest.mark.parametrize("column", ["language", "lang"])
@pytest.mark.parametrize(
    ("mark", "code"),
    [
        ("en", "en"),
        ("English", "en"),
        ("EN", "en"),
        ("en-GB", "en"),
        ("en_US", "en"),
        ("zh", "zh"),
        ("zh-CN", "zh"),
        ("zh_TW", "zh"),
        ("ZH_hant_HK", "zh"),
        ("zh-Hans-CN", "zh"),
        ("Chinese", "zh"),
        ("fil", "fil"),
        ("fil-PH", "fil"),
        ("es_419", "es"),
        ("de", None),
        ("de-AT", None),
        ("German", None),
        ("pt-BR", None),
    ],
)
def test_a_row_says_its_language(read, column, mark, code):
    """By code, English name, or code with region; rows in other languages are left out."""
    rows = [
        {"id": "r", column: mark, "instruction": "q", "output": "a"},
        {"id": "r", column: "Vietnamese", "instruction": "q", "output": "vi"},
    ]
    (record,) = read(rows, ("en", "zh", "fil", "es", "vi"))
    assert record.texts == ({code: Text("q", "", "a")} if code else {}) | {
        "vi": Text("q", "", "vi")
    }


# ---- Ids


def test_ids_are_text_and_a_zero_is_one(read):
    corpus = read([{"id": i, "output": "a"} for i in (0, 1, "01", 1.5, False)])
    assert [*corpus.ids()] == ["0", "1", "01", "1.5", "False"]
    assert [corpus.describe_origin(i).split(", ")[1] for i in range(5)] == [
        f"row {i}" for i in range(1, 6)
    ]


@pytest.mark.parametrize("nothing", [{}, {"id": None}, {"id": ""}])
def test_rows_without_an_id_are_named_by_their_content(read, nothing):
    row = {"instruction": "q", "output": "a", **nothing}
    ids = [*read([row, row | {"output": "b"}, row, row]).ids()]
    expected = hashlib.blake2b(
        json.dumps([["en", "q", "", "a", None]]).encode(), digest_size=8
    ).digest()
    name = f"{int.from_bytes(expected, 'little'):016x}"
    assert [ids[0], *ids[2:]] == [name, f"{name}-2", f"{name}-3"] and len({*ids}) == 4


def test_a_column_id_with_indonesian_names_no_row(read):
    """Rows are then named by their content, in all languages."""
    row = {code: {"instruction": f"q {code}", "output": "a"} for code in ("en", "id")}
    expected = hashlib.blake2b(
        json.dumps([[code, f"q {code}", "", "a", None] for code in ("en", "id")]).encode(),
        digest_size=8,
    ).digest()
    corpus = read([row], ("en", "id"))
    assert [*corpus.ids()] == [
        f"{int.from_bytes(expected, 'little'):016x}"
    ] and corpus.languages == ("en", "id")


def test_every_row_has_an_id_or_none_has(read):
    with pytest.raises(UserError, match="row 2: no id, unlike the rows before it"):
        read([{"id": "a", "output": "a"}, {"output": "b"}])
    with pytest.raises(UserError, match="row 2: an id, unlike the rows before it"):
        read([{"output": "b"}, {"id": "a", "output": "a"}])


def test_an_id_may_come_once_per_language(read):
    rows = [
        {"id": i, "lang": code, "output": f"{i} {code}"}
        for i, code in itertools.product("ba", ("en", "es"))
    ]
    assert [record.texts["es"].output for record in read(rows, ("en", "es"))] == ["b es", "a es"]
    with pytest.raises(
        UserError,
        match=r"row 5: id 'b' was already used in .*row 2; ids must be unique \(1 repeated",
    ):
        read([*rows, rows[1]], ("en", "es"))


def test_files_joined_by_position_keep_their_pairs(tmp_path):
    """Also where a row of the first file comes twice; columns that look like ids do not matter."""
    for code in ("en", "zh"):
        write_lines(
            tmp_path / f"x_{code}.jsonl",
            [
                {"id": code, "instruction": f"{i if code == 'zh' else i % 2}", "output": code}
                for i in range(4)
            ],
        )
    source = Source(name="x", path=str(tmp_path / "x_{lang}.jsonl"), join="position")
    corpus = load_corpus(source, ("en", "zh"))
    assert [(r.texts["en"].instruction, r.texts["zh"].instruction) for r in corpus] == [
        ("0", "0"),
        ("1", "1"),
        ("0", "2"),
        ("1", "3"),
    ]
    ids = [*corpus.ids()]
    assert ids[2:] == [f"{ids[0]}-2", f"{ids[1]}-2"]


def test_records_come_in_the_order_in_which_their_ids_first_appear(tmp_path, read):
    order = [row["id"] for row in parallel_rows(30)]
    assert [*read(parallel_rows(30)[::-1]).ids()] == order[::-1]
    for code, ids in (("en", order[::3]), ("zh", order[::-1])):
        write_lines(tmp_path / f"y_{code}.jsonl", [{"id": i, "output": f"{code} {i}"} for i in ids])
    corpus = load_corpus(Source(name="y", path=str(tmp_path / "y_{lang}.jsonl")), ("en", "zh"))
    assert [*corpus.ids()] == order[::3] + [i for i in order[::-1] if i not in order[::3]]
    assert all(record.texts["zh"].output == f"zh {record.id}" for record in corpus)


# ---- Chats


def turn(role: str, text: str) -> dict:
    return {"role": role, "content": text}


ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}


@pytest.mark.parametrize("column", ["messages", "conversations"])
@pytest.mark.parametrize("keys", [("role", "content"), ("from", "value")])
@pytest.mark.parametrize("as_text", [True, False])
def test_chats_are_read_in_each_of_their_forms(read, column, keys, as_text):
    for user, assistant in (("user", "assistant"), ("human", "gpt"), ("human", "assistant")):
        turns = [
            dict(zip(keys, pair, strict=True))
            for pair in (
                ("system", "S"),
                (user, "one"),
                (assistant, "Seine"),
                (user, "two"),
                (assistant, "Sena"),
            )
        ]
        for kind in ("auto", "messages"):
            (record,) = read(
                [{"id": 1, column: json.dumps(turns) if as_text else turns, "output": "not this"}],
                kind=kind,
            )
            assert record.texts["en"] == Text(
                "two",
                "",
                "Sena",
                (
                    ("system", "S"),
                    ("user", "one"),
                    ("assistant", "Seine"),
                    ("user", "two"),
                    ("assistant", "Sena"),
                ),
            )


@pytest.mark.parametrize("nothing", [[], None, {"count": 2}, 2])
def test_a_column_of_messages_without_turns_is_no_chat(read, nothing):
    (record,) = read([{"id": 1, "messages": nothing, "instruction": "q", "output": "a"}])
    assert record.texts["en"] == Text("q", "", "a")


@pytest.mark.parametrize(
    ("roles", "is_kept"),
    [
        ("ua", True),
        ("sua", True),
        ("uaua", True),
        ("suasua", True),
        ("suaua", True),
        ("au", False),
        ("u", False),
        ("a", False),
        ("uua", False),
        ("uaa", False),
        ("uau", False),
        ("s", False),
        ("auau", False),
        ("uaau", False),
    ],
)
def test_a_chat_goes_back_and_forth_and_ends_with_an_answer(read, roles, is_kept):
    names = {"u": "user", "a": "assistant", "s": "system"}
    corpus = read(
        [
            {"id": 1, "messages": [turn(names[role], "x") for role in roles]},
            {"id": 2, "messages": [turn("user", "q"), turn("assistant", "a")]},
        ]
    )
    assert [*corpus.ids()] == ["1", "2"][not is_kept :]
    assert corpus.dropped == ({} if is_kept else {"chat turns out of order": 1})


# ---- Faults

BAD = {
    "NUL character": "\0",
    "lone surrogate": "\ud83d",
    f"over {LONGEST} characters": "x" * LONGEST,
}


@pytest.mark.parametrize("reason", BAD)
@pytest.mark.parametrize("place", ["instruction", "input", "output", 0, 1, 2, 3, 4])
def test_a_fault_anywhere_in_a_text_drops_its_record_and_is_counted(read, reason, place):
    """In any field of a row, and in any turn of a chat."""

    def row(i: str, bad: str = "") -> dict:
        if isinstance(place, str):
            text = {"instruction": "q", "input": "i", "output": "a"}
            return {"id": i, "en": text, "es": text | {place: f"b{bad}c"}}
        turns = [turn(role, "t") for role in ("system", "user", "assistant", "user", "assistant")]
        turns[place] = turn(turns[place]["role"], f"b{bad}c")
        return {"id": i, "en": {"output": "plain"}, "es": {"messages": turns}}

    corpus = read([row("r0"), row("r1", BAD[reason]), row("r2")], ("en", "es"))
    assert [*corpus.ids()] == ["r0", "r2"] and set(corpus[1].texts) == {"en", "es"}
    assert corpus.dropped == {reason: 1} and corpus.dropped_rows.keys() == {reason}
    assert corpus.dropped_rows[reason][0].endswith("rows.jsonl, row 2 (es)")


def test_the_longest_text_is_still_read(read):
    """A text counts with all its fields, a chat with all its turns, each once."""
    for more, kept in ((0, True), (1, False)):
        long = "长" * (LONGEST - 30 + more)
        chat = [
            turn("user", "q" * 20),
            turn("assistant", "a" * 5),
            turn("user", long),
            turn("assistant", "a" * 5),
        ]
        for text in (
            {"instruction": long, "input": "i" * 20, "output": "o" * 10},
            {"messages": chat},
        ):
            assert len(read([{"id": 1, **text}, {"id": 2, "output": "a"}])) == 1 + kept


@pytest.mark.parametrize("empty", ["", " ", "\n\t", "\u3000", None])
def test_an_answer_without_a_character_is_dropped(read, empty):
    chat = [turn("user", "q"), turn("assistant", "a"), turn("user", "q"), turn("assistant", empty)]
    corpus = read(
        [
            {"id": 1, "instruction": "q", "output": empty},
            {"id": 2, "instruction": empty, "output": "a"},
            {"id": 3, "messages": chat},
        ]
    )
    assert [*corpus.ids()] == ["2"] and corpus.dropped == {"empty output": 2}


def test_the_first_five_places_of_a_fault_are_named_and_all_are_counted(read):
    rows = [{"id": i, "output": "" if i % 2 else "a\0" if i % 4 == 0 else "a"} for i in range(40)]
    corpus = read(rows)
    assert corpus.dropped == {"empty output": 20, "NUL character": 10}
    numbers = {
        reason: [place.split("row ")[1] for place in places]
        for reason, places in corpus.dropped_rows.items()
    }
    assert numbers == {
        "empty output": [f"{2 * k} (en)" for k in range(1, 6)],
        "NUL character": [f"{4 * k + 1} (en)" for k in range(5)],
    }
    assert [*corpus.ids()] == [str(i) for i in range(2, 40, 4)]
    assert [corpus.describe_origin(k).split("row ")[1] for k in range(3)] == ["3", "7", "11"]


def test_both_languages_of_a_dropped_record_may_be_at_fault(read):
    corpus = read(
        [{"id": 1, "en": {"output": ""}, "es": {"output": "\0"}}, {"id": 2, "en": {"output": "a"}}],
        ("en", "es"),
    )
    assert corpus.dropped == {"empty output": 1, "NUL character": 1} and [*corpus.ids()] == ["2"]
