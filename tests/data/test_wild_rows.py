"""Rows as users bring them: what is read, refused, dropped and counted, and left unread and
named.
"""

import copy
import gzip
import json

import pyarrow as pa
import pyarrow.parquet
import pytest

from crossin_jax.config import Component, Data, Source, UserError
from crossin_jax.data.corpus import describe_losses, load_corpus
from crossin_jax.data.kinds import make_example
from crossin_jax.data.mixture import Mixture
from crossin_jax.data.prompts import Renderer
from crossin_jax.data.records import MASKED, to_turn
from tests.data.conftest import write_lines


@pytest.fixture
def read(tmp_path):
    """Reads rows of English: (rows, source settings) → corpus."""

    def load(*rows: dict, codes=("en",), **settings):
        path = write_lines(tmp_path / "rows.jsonl", rows)
        return load_corpus(Source(name="rows", path=path, **settings), codes)

    return load


def chat(*turns: tuple, **more) -> dict:
    """A row with a chat: ("user", "hi") or ("assistant", "ho", {"weight": 0})."""
    keys = ("role", "content")
    rows = [dict(zip(keys, turn[:2], strict=True)) | dict(*turn[2:]) for turn in turns]
    return {"messages": rows, **more}


def turns_of(corpus) -> tuple:
    (record,) = corpus
    return record.texts["en"].messages


ASKED = ("user", "q"), ("assistant", "a")


# ---- Columns whose type changes from row to row


@pytest.mark.parametrize(
    ("first", "last"),
    [
        ({"input": None}, {"input": "given"}),
        ({"meta": {"x": 1}}, {"meta": [1, "x"]}),
        ({"tags": []}, {"tags": [{"k": 1}]}),
        ({"score": "-0.2"}, {"score": 0.5}),
    ],
)
def test_a_column_may_change_its_type(first, last, read):
    """Others fix the type by the first rows (datasets #7222, #7322, #7092, #6106)."""
    row = {"instruction": "q", "output": "a"}
    corpus = read(
        *({"id": str(i), **row, **first} for i in range(3000)), {"id": "z", **row, **last}
    )
    assert len(corpus) == 3001
    assert corpus[3000].texts["en"].input == last.get("input", "")


# ---- Chats


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("User", "user"),
        ("HUMAN", "user"),
        ("prompter", "user"),
        ("Assistant", "assistant"),
        ("model", "assistant"),
        ("Bot", "assistant"),
        ("System", "system"),
        ("developer", "system"),
    ],
)
def test_roles_have_several_names(read, name, role):
    turns = {"system": [(name, "s"), *ASKED], "user": [(name, "q"), ASKED[1]]}
    row = chat(*turns.get(role, [ASKED[0], (name, "a")]))
    assert role in dict(turns_of(read(row)))


@pytest.mark.parametrize(
    ("turns", "reason"),
    [
        ([*ASKED, ("tool", "42"), ASKED[1]], "chat turn with role 'tool'"),
        ([ASKED[0], ("function_call", "{}"), ASKED[1]], "chat turn with role 'function_call'"),
        ([ASKED[0], ("observation", "x"), ASKED[1]], "chat turn with role 'observation'"),
        ([ASKED[0], (None, "a")], "chat turn with role 'None'"),
        ([("user", None), ASKED[1]], "chat turn without content"),
        ([("user", {"a": 1}), ASKED[1]], "content of a chat turn is an object, not text"),
        ([("user", 1.5), ASKED[1]], "content of a chat turn is a number, not text"),
        (
            [("user", [{"type": "image_url", "image_url": "x"}]), ASKED[1]],
            "chat turn with parts that are not text",
        ),
        (
            [("user", [{"type": "audio", "text": "x"}]), ASKED[1]],
            "chat turn with parts that are not text",
        ),
        (
            [ASKED[0], ("assistant", None, {"tool_calls": [{"id": 1}]}), ("user", "b"), ASKED[1]],
            "tool call in a chat turn",
        ),
        (
            [ASKED[0], ("assistant", "", {"function_call": {"name": "f"}})],
            "tool call in a chat turn",
        ),
        ([ASKED[0], ("assistant", None), *ASKED], "empty assistant turn"),
        ([ASKED[0], ("assistant", " "), *ASKED], "empty assistant turn"),
        ([ASKED[0], ("assistant", "a", {"weight": 0})], "chat of which no turn is learned"),
        (
            [ASKED[0], ("assistant", "a", {"weight": 0.5})],
            "chat turn with weight '0.5', which is neither 0 nor 1",
        ),
    ],
)
def test_chats_that_cannot_be_used_are_dropped_and_counted(read, turns, reason):
    corpus = read(chat(*turns), chat(*ASKED))
    assert corpus.dropped == {reason: 1} and len(corpus) == 1
    assert corpus.dropped_rows[reason][0].endswith("rows.jsonl, row 1 (en)")


def test_a_turn_that_is_no_object_is_counted(read):
    assert read({"messages": ["hi", "ho"]}, chat(*ASKED)).dropped == {
        "chat turn that is not an object with role and content": 1
    }


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ([{"type": "text", "text": "one"}], "one"),
        ([{"type": "text", "text": "one"}, {"type": "text", "text": "two"}], "one\ntwo"),
        ([{"text": "one"}], "one"),
        (["one", "two"], "one\ntwo"),
        (7, "7"),
    ],
)
def test_content_may_be_a_list_of_text_parts(read, content, text):
    assert turns_of(read(chat(("user", content), ASKED[1])))[0] == ("user", text)


@pytest.mark.parametrize("key", ["weight", "train", "training", "loss"])
@pytest.mark.parametrize("nothing", [0, False, 0.0])
def test_a_turn_of_no_weight_is_read_and_not_learned(read, key, nothing):
    corpus = read(
        chat(
            ASKED[0],
            ("assistant", "five", {key: nothing}),
            ("user", "?"),
            ("assistant", "four", {key: 1}),
        )
    )
    assert turns_of(corpus)[1::2] == ((MASKED, "five"), ("assistant", "four"))
    assert corpus[0].texts["en"].output == "four" and corpus.masked_turns == 1
    assert not corpus.ignored
    again = read({"messages": [to_turn(*turn) for turn in turns_of(corpus)]})
    assert turns_of(again) == turns_of(corpus)


def test_an_empty_turn_that_is_not_learned_stays(read):
    row = chat(ASKED[0], ("assistant", "", {"weight": 0}), *ASKED)
    assert turns_of(read(row))[1] == (MASKED, "")


@pytest.mark.parametrize("write", [json.dumps, repr, str])
def test_messages_may_be_json_or_pythons_repr(read, write):
    turns = chat(("user", 'it\'s "q"'), ASKED[1])["messages"]
    assert turns_of(read({"messages": write(turns)})) == (("user", 'it\'s "q"'), ASKED[1])


@pytest.mark.parametrize(
    "text", ["[{'role': 'user'} {'role': 'assistant'}]", "hi", "{", "__import__('os')"]
)
def test_messages_that_are_no_list_are_refused_with_their_row(read, text):
    with pytest.raises(UserError, match="row 1: messages is a text that is neither JSON nor"):
        read({"messages": text})


def test_prompt_and_completion_may_be_lists_of_turns(read):
    row = {"prompt": chat(ASKED[0])["messages"], "completion": chat(ASKED[1])["messages"]}
    assert turns_of(read(row)) == ASKED


@pytest.mark.parametrize("column", ["system", "system_prompt"])
def test_a_system_prompt_beside_a_row_is_part_of_it(read, column):
    system = ("system", "Be kind.")
    assert turns_of(read(chat(*ASKED, **{column: "Be kind."}))) == (system, *ASKED)
    same = chat(system, *ASKED, **{column: "Be kind."})
    assert turns_of(read(same)) == (system, *ASKED)
    other = chat(("system", "Be brief."), *ASKED, **{column: "Be kind."})
    assert read(other).dropped == {"two system prompts that differ": 1}
    plain = {"instruction": "q", "input": "i", "output": "a", column: "Be kind."}
    assert turns_of(read(plain)) == (system, ("user", "q\ni"), ASKED[1])
    assert turns_of(read(plain | {column: ""})) is None
    assert read(plain, fields={"system": ""}).ignored == {f"field '{column}'": 1}


@pytest.mark.parametrize("write", [list, json.dumps, repr])
def test_a_history_beside_a_row_is_a_chat(read, write):
    row = {"instruction": "q", "output": "a", "history": write([["q0", "a0"], ["q1", "a1"]])}
    assert turns_of(read(row)) == (
        ("user", "q0"),
        ("assistant", "a0"),
        ("user", "q1"),
        ("assistant", "a1"),
        *ASKED,
    )
    assert turns_of(read(row | {"history": []})) is None


@pytest.mark.parametrize("history", ["in 1789", [["only one"]], [[1, 2]], {"a": "b"}])
def test_a_history_of_another_meaning_is_named(read, history):
    corpus = read({"instruction": "q", "output": "a", "history": history})
    assert turns_of(corpus) is None and corpus.ignored == {"field 'history'": 1}


def test_rows_as_public_data_sets_have_them(read):
    """LMSYS-Chat-1M, Aya, OpenOrca and UltraChat: their columns are found, the others are named."""
    lmsys = chat(*ASKED)
    lmsys = {"conversation_id": "x", "conversation": lmsys["messages"], "language": "English"}
    assert turns_of(read(lmsys)) == ASKED
    aya = {"inputs": "q", "targets": "a", "language": "Filipino", "annotation_type": "original"}
    corpus = read(aya, codes=("en", "fil"))
    assert corpus[0].texts["fil"].output == "a" and corpus.ignored == {"field 'annotation_type'": 1}
    orca = {"id": "1", "system_prompt": "S", "question": "q", "response": "a"}
    assert turns_of(read(orca)) == (("system", "S"), *ASKED)


def test_keys_that_a_table_format_fills_with_null_mean_nothing(read):
    """Parquet gives every turn the keys of all turns."""
    nothing = dict.fromkeys(("tool_calls", "weight", "name", "from", "value"))
    corpus = read(chat((*ASKED[0], nothing), (*ASKED[1], nothing | {"weight": 1.0})))
    assert turns_of(corpus) == ASKED and not corpus.ignored and not corpus.dropped


# ---- Values


@pytest.mark.parametrize("missing", [None, float("nan"), ""])
@pytest.mark.parametrize("field", ["instruction", "input", "output"])
def test_missing_values_are_missing(read, missing, field):
    row = {"instruction": "q", "input": "i", "output": "a"} | {field: missing}
    corpus = read(row)
    if field == "output":
        assert corpus.dropped == {"empty output": 1}
    else:
        assert getattr(corpus[0].texts["en"], field) == ""


def test_a_row_without_any_value_is_counted(read):
    rows = {"instruction": None, "output": None}, {"instruction": "q", "output": "a"}
    assert read(*rows).dropped == {"empty output": 1}


@pytest.mark.parametrize("cell", ["NaN", "nan", "null", ""])
def test_missing_cells_of_a_table_are_missing(tmp_path, cell):
    path = tmp_path / "rows.csv"
    path.write_text(f"instruction,input,output\nq,{cell},a\nq,i,{cell}\nq,None,NA\n")
    corpus = load_corpus(Source(name="c", path=str(path)), ("en",))
    assert [r.texts["en"].input for r in corpus] == ["", "None"]
    assert corpus[1].texts["en"].output == "NA" and corpus.dropped == {"empty output": 1}
    names = [
        f"cells {cell!r} of {name!r}, taken for missing values" for name in ("input", "output")
    ]
    assert corpus.ignored == (dict.fromkeys(names, 1) if cell else {})


def test_missing_values_of_parquet_are_missing(tmp_path):
    table = {
        "instruction": ["q", None, "q"],
        "score": [1.0, float("nan"), None],
        "output": ["a", "b", None],
    }
    pyarrow.parquet.write_table(pa.table(table), tmp_path / "rows.parquet")
    corpus = load_corpus(Source(name="c", path=str(tmp_path / "rows.parquet")), ("en",))
    assert [r.texts["en"].instruction for r in corpus] == ["q", ""]
    assert corpus.ignored == {"field 'score'": 1} and corpus.dropped == {"empty output": 1}


@pytest.mark.parametrize(
    ("value", "reason"),
    [(1.5, "a number"), (True, "true or false"), (False, "true or false")],
)
def test_values_of_other_types_are_not_made_into_text(read, value, reason):
    corpus = read({"instruction": "q", "output": value}, {"instruction": "q", "output": 42})
    assert corpus.dropped == {f"output is {reason}, not text": 1}
    assert corpus[0].texts["en"].output == "42"


@pytest.mark.parametrize(
    "answers",
    [{"text": ["R", "S"], "answer_start": [1, 2]}, ["R", "S"], [{"text": "R"}, {"text": "S"}]],
)
def test_answers_give_the_first(read, answers):
    row = {"id": "1", "question": "q", "context": "c", "answers": answers}
    corpus = read(row, row | {"id": "2", "answers": {"text": [], "answer_start": []}})
    assert [r.texts["en"].output for r in corpus] == ["R"] and not corpus.ignored
    assert corpus.dropped == {"empty output": 1}
    assert read(row | {"answer": "own"})[0].texts["en"].output == "own"


# ---- What is not read


def test_fields_that_nobody_reads_are_named_once_with_their_rows(read, tmp_path):
    rows = [
        {"instruction": "q", "output": "a", "topic": "x", "score": 0, "empty": "", "none": None},
        {"instruction": "q", "output": "a", "topic": "y", "list": []},
        chat(
            ("user", "q", {"name": "Ann", "tool_calls": []}), ("assistant", "a", {"thinking": "x"})
        ),
    ]
    corpus = read(*rows)
    assert corpus.ignored == {
        "field 'topic'": 2,
        "field 'score'": 1,
        "field 'messages[].name'": 1,
        "field 'messages[].thinking'": 1,
    }
    assert corpus.ignored_rows["field 'topic'"].endswith("rows.jsonl, row 1")
    assert "not read: field 'topic' (2 rows), field 'score' (1 rows)" in describe_losses(corpus)
    groups = {"id": "1", "en": {"output": "a", "by": "me"}, "es": {"output": "a", "by": "me"}}
    assert read(groups | {"url": "u"}, codes=("en", "es")).ignored == {
        "field 'by'": 1,
        "field 'url'": 1,
    }


def test_reading_can_refuse_what_it_does_not_know(read):
    row = {"instruction": "q", "output": "a"}
    refuse = {"unread": "refuse"}
    assert len(read(row, fields=refuse)) == 1
    with pytest.raises(UserError, match=r"field 'topic' \(2 rows\)\nfirst: .*row 2\n"):
        read(row, row | {"topic": "x"}, row | {"topic": "y"}, fields=refuse)
    with pytest.raises(UserError, match="fields\\['unread'\\]='stop' is not one of count, refuse"):
        read(row, fields={"unread": "stop"})


def test_what_is_not_read_stands_in_the_manifest_and_not_in_its_hash(read):
    def manifest(**more):
        corpus = read({"instruction": "q", "output": "a", **more})
        data = Data(components=(Component(kind="base", source="r"),), languages=("en",))
        return Mixture(data, {"r": corpus}, seed=1).manifest()

    plain, named = manifest(), manifest(topic="x")
    assert "ignored" not in plain and named["ignored"] == {"r": {"field 'topic'": 1}}
    assert plain["hash"] == named["hash"]


def test_a_source_without_a_usable_row_says_why(read):
    corpus = read({"instruction": "q", "output": ""}, {"instruction": "q", "output": 0.5})
    data = Data(components=(Component(kind="base", source="r"),), languages=("en",))
    with pytest.raises(
        UserError, match="no rows in en .dropped: 1 empty output, 1 output is a number"
    ):
        Mixture(data, {"r": corpus}, seed=1)


@pytest.mark.parametrize("mark", ["Elvish", "mixed", "zz", "12"])
def test_marks_that_are_no_language_are_refused_with_their_value(read, mark):
    rows = [{"language": m, "instruction": "q", "output": "a"} for m in ("English", mark, mark)]
    with pytest.raises(
        UserError, match=rf"row 2: '{mark}' is not a known language \(2 rows in all"
    ):
        read(*rows)
    corpus = read(*rows, fields={"unread": "count"})
    assert len(corpus) == 1
    assert corpus.ignored == {f"rows in '{mark}', which is not a known language": 2}


def test_rows_in_languages_that_the_source_does_not_read_are_counted(read):
    rows = [
        {"language": m, "instruction": "q", "output": "a"} for m in ("en", "German", "fr", "fr")
    ]
    corpus = read(*rows)
    assert len(corpus) == 1 and corpus.ignored == {
        "rows in 'German', which the source does not read": 1,
        "rows in 'fr', which the source does not read": 2,
    }


# ---- Files

ROWS = [{"instruction": "one\u2028two\x85three", "output": f"a\u2029{i}"} for i in range(3)]


def as_lines(rows) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl", "rows.json.gz", "rows.jsonl.gz"])
@pytest.mark.parametrize("pack", [bytes, gzip.compress])
@pytest.mark.parametrize("form", [as_lines, json.dumps, lambda rows: json.dumps(rows, indent=1)])
def test_the_content_of_a_file_decides_and_not_its_ending(tmp_path, name, pack, form):
    """Lines or a list, compressed or not; separators of Unicode are no ends of lines."""
    path = tmp_path / name
    path.write_bytes(pack(form(ROWS).encode()))
    corpus = load_corpus(Source(name="c", path=str(path)), ("en",))
    assert [r.texts["en"].output for r in corpus] == [row["output"] for row in ROWS]
    assert corpus[0].texts["en"].instruction == ROWS[0]["instruction"]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv"])
def test_utf_16_is_named_as_such(tmp_path, encoding, name):
    text = "instruction,output\nq,a\n" if name.endswith("csv") else as_lines(ROWS)
    (tmp_path / name).write_bytes(text.encode(encoding))
    with pytest.raises(UserError, match=rf"{name}.*: UTF-16 or UTF-32.*iconv -f utf-16"):
        load_corpus(Source(name="c", path=str(tmp_path / name)), ("en",))


def test_a_compressed_table_is_read(tmp_path):
    (tmp_path / "rows.tsv.gz").write_bytes(gzip.compress(b"instruction\toutput\nq\ta,b\n"))
    corpus = load_corpus(Source(name="c", path=str(tmp_path / "rows.tsv.gz")), ("en",))
    assert corpus[0].texts["en"].output == "a,b"


def test_one_object_over_several_lines_is_no_file_of_rows(tmp_path):
    (tmp_path / "rows.json").write_text(json.dumps({"train": ROWS}, indent=1))
    with pytest.raises(UserError, match="rows.json: expected a list of rows, got dict"):
        load_corpus(Source(name="c", path=str(tmp_path / "rows.json")), ("en",))


# ---- Groups


def squad(tmp_path, code: str):
    """Three articles of two paragraphs of two questions."""
    articles = [
        {
            "paragraphs": [
                {
                    "context": f"{code} context {a}{p}",
                    "qas": [
                        {"id": f"{a}{p}{q}", "question": "q", "answers": [{"text": "a"}]}
                        for q in range(2)
                    ],
                }
                for p in range(2)
            ]
        }
        for a in range(3)
    ]
    (tmp_path / f"x.{code}.json").write_text(json.dumps({"data": articles}))


@pytest.mark.parametrize(("group", "length"), [("paragraph", 2), ("article", 1), ("input", 2)])
def test_a_portion_goes_by_group(tmp_path, group, length):
    """No paragraph or article stands on both sides, every row on one, in every language alike."""
    for code in ("en", "es"):
        squad(tmp_path, code)
    source = dict(name="x", path=str(tmp_path / "x.{lang}.json"), fields={"group": group})
    for cut in (0.3, 0.5, 0.9):
        first, second = (
            load_corpus(Source(**source, portion=portion), ("en", "es"))
            for portion in ((0.0, cut), (cut, 1.0))
        )
        sides = [{i[:length] for i in corpus.ids()} for corpus in (first, second)]
        assert not sides[0] & sides[1] and len(first) + len(second) == 12
        assert {*first.ids()} | {*second.ids()} == {
            *load_corpus(Source(**source), ("en", "es")).ids()
        }
        assert not first.ignored
    limited = load_corpus(Source(**source, portion=(0.0, 0.5), limit=3), ("en", "es"))
    assert len(limited) == 3 and {*limited.ids()} <= {
        *load_corpus(Source(**source, portion=(0.0, 0.5)), ("en", "es")).ids()
    }


def test_a_group_may_be_any_column(read):
    rows = [{"id": i, "url": f"u{i // 4}", "output": "a"} for i in range(40)]
    source = {"fields": {"group": "url"}}
    halves = [read(*rows, portion=p, **source) for p in ((0.0, 0.5), (0.5, 1.0))]
    urls = [{int(i) // 4 for i in corpus.ids()} for corpus in halves]
    assert not urls[0] & urls[1] and [len(u) for u in urls] == [5, 5]
    with pytest.raises(UserError, match="row 1: no value under 'site', the field of the group"):
        read(*rows, fields={"group": "site"})


def test_the_embedded_world_has_no_groups():
    source = Source(name="w", kind="world", fields={"group": "id"}, portion=(0.0, 0.5))
    with pytest.raises(UserError, match="fields has a group, but the embedded world"):
        load_corpus(source, ("en",))


# ---- What becomes of a turn that is not learned


@pytest.mark.parametrize("template", ["alpaca", "chatml", "plain"])
@pytest.mark.parametrize("tokenization", ["joint", "apart"])
def test_a_masked_turn_has_its_tokens_and_no_loss(read, tokenizer, template, tokenization):
    """Its tokens and its end are those of a learned turn; only the mask differs."""
    renderer = Renderer(tokenizer, template, tokenization=tokenization)
    row = chat(ASKED[0], ("assistant", "five"), ("user", "?"), ("assistant", "four"))
    whole = renderer.render(make_example(read(row)[0], "base", "en", "en", tag="none"))
    row["messages"][1]["weight"] = 0
    masked = renderer.render(make_example(read(row)[0], "base", "en", "en", tag="none"))
    assert masked.ids.tolist() == whole.ids.tolist()
    learned = renderer.decode(masked.ids[masked.loss_mask])
    assert "four" in learned and "five" not in learned and "five" in renderer.decode(masked.ids)
    assert (
        masked.loss_mask.sum() < whole.loss_mask.sum()
        and not (masked.loss_mask > whole.loss_mask).any()
    )


def test_a_masked_turn_in_the_tokenizers_own_template(read, tokenizer):
    own = copy.deepcopy(tokenizer)
    own.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    renderer = Renderer(own, "chat")
    row = chat(ASKED[0], ("assistant", "five", {"weight": 0}), ("user", "?"), ("assistant", "four"))
    rendered = renderer.render(make_example(read(row)[0], "base", "en", "en", tag="none"))
    assert renderer.decode(rendered.ids[rendered.loss_mask]).strip() == "four"
    assert "assistant\nfive" in renderer.decode(rendered.ids)


def test_a_masked_turn_keeps_its_mask_in_other_languages(read):
    rows = [
        chat(ASKED[0], ("assistant", f"{i}", {"weight": i}), *ASKED)["messages"] for i in (0, 1)
    ]
    record = read({"id": "1", "en": {"messages": rows[0]}, "es": rows[1]}, codes=("en", "es"))[0]
    for prompt, answer in (("en", "es"), ("es", "en")):
        example = make_example(record, "x2x", prompt, answer, tag="none")
        assert example.messages[1] == record.texts[answer].messages[1]
