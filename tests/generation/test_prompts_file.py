"""Prompts from a file, answers into a file: every field stays, and an interrupted run goes on."""

import json

import pytest

from crossin_jax.config import UserError
from crossin_jax.generation.chat import ChatModel, load_chat_model
from crossin_jax.generation.prompts_file import answer_file, read_messages, read_rows

OPTIONS = {"max_new_tokens": 4, "temperature": 1.0, "top_k": None, "top_p": None, "stop": []}
ROWS = [
    {"prompt": "What is the currency of Peru?", "id": 1},
    {"instruction": "Name the capital", "input": "Frankreich", "tags": ["é", {"a": None}]},
    {"messages": [{"role": "user", "content": "¿Qué?"}], "lone": "\ud800"},
    {"prompt": "a" * 9000},
    {"prompt": "What is the currency of Peru?", "id": 5},
]


@pytest.fixture(scope="module")
def speaker(pretrained):
    return load_chat_model(str(pretrained / "model"), template="plain", batch_size=2)


@pytest.fixture
def prompts(tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps(row) + "\n\n" for row in ROWS))
    return file


def read(file):
    return [json.loads(line) for line in file.read_text("utf-8", "surrogatepass").splitlines()]


def run(speaker, prompts, out, **changes):
    options = {"seed": 3, "batch_size": 2} | OPTIONS | changes
    return answer_file(speaker, prompts, out, **options)


def test_every_row_keeps_its_fields_and_gets_its_answer(speaker, prompts, tmp_path):
    assert run(speaker, prompts, tmp_path / "out.jsonl") == 5
    rows = read(tmp_path / "out.jsonl")
    assert [{k: row[k] for k in given} for row, given in zip(rows, ROWS, strict=True)] == ROWS
    assert all(list(row)[-3:] == ["generated", "cut", "by"] for row in rows)
    assert rows[3]["generated"] is None and not rows[3]["cut"]  # longer than the model reads
    asked = [row.get("prompt") for row in ROWS]
    expected = [
        speaker.answer([prompt], seeds=[3 + i], **OPTIONS)[0]
        for i, prompt in enumerate(asked)
        if prompt and i != 3
    ]
    assert [rows[0]["generated"], rows[4]["generated"]] == expected
    assert expected[0] != expected[1]  # the same prompt twice: two draws
    assert [row["cut"] for row in rows if row["generated"] is not None].count(True) >= 1


class Stopping(ChatModel):
    """Is interrupted after its first part."""

    def answer(self, *arguments, **options):
        if calls:
            raise KeyboardInterrupt
        calls.append(1)
        return super().answer(*arguments, **options)


calls: list[int] = []


def test_an_interrupted_run_goes_on_where_it_stopped(speaker, tmp_path, monkeypatch, capsys):
    """What is written stays, a line cut in the middle is made again, and the result is the same."""
    monkeypatch.setattr("crossin_jax.generation.prompts_file.ROUNDS", 1)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    run(speaker, prompts, tmp_path / "whole.jsonl")
    out = tmp_path / "out.jsonl"
    calls.clear()
    with pytest.raises(KeyboardInterrupt):
        run(Stopping(speaker.engine, speaker.renderer, speaker.tokenizer), prompts, out)
    assert len(read(out)) == 2
    with out.open("a") as file:
        file.write('{"prompt": "half')
    capsys.readouterr()
    assert run(speaker, prompts, out) == 5
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert "2 of 5 answers; it goes on" in capsys.readouterr().err
    assert run(speaker, prompts, out) == 5  # nothing is left to do
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"max_new_tokens": 5}, "row 1: from another model or with other settings"),
        ({"seed": 4}, "row 1: from another model or with other settings"),
        ({"rows": ROWS[1:]}, "row 1: not an answer to that row"),
        ({"rows": ROWS[:4]}, "row 5: not an answer to that row"),
    ],
    ids=str,
)
def test_answers_to_other_prompts_are_not_continued(change, words, speaker, prompts, tmp_path):
    out = tmp_path / "out.jsonl"
    run(speaker, prompts, out)
    before = out.read_bytes()
    if "rows" in change:
        prompts.write_text("".join(json.dumps(row) + "\n" for row in change.pop("rows")))
    with pytest.raises(UserError, match=words):
        run(speaker, prompts, out, **change)
    assert out.read_bytes() == before


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no prompts"),
        ('{"prompt": "a"}\n[1]\n', "row 2: not an object"),
        ('{"prompt": "a"}\n{"text": "b"}\n', "row 2: it has no text prompt .*it has: text"),
        ('{"prompt": 3}\n', "row 1: it has no text prompt"),
        ('{"prompt": "a", "cut": 1}\n', "row 1: the field 'cut'"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}\n', "row 1: the last turn"),
        ('{"prompt": "a"\n', "row 1: not JSON"),
    ],
)
def test_a_row_without_a_prompt_is_named(text, words, tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text(text)
    with pytest.raises(UserError, match=words):
        read_rows(file)


def test_a_conversation_is_a_list_of_turns_or_an_object_with_messages(tmp_path):
    file, turns = tmp_path / "chat.json", [{"role": "user", "content": "Hello"}]
    for value in (turns, {"messages": turns, "id": 1}):
        file.write_text(json.dumps(value))
        assert read_messages(file) == turns
    file.write_text('{"prompt": "a"}')
    with pytest.raises(UserError, match=r"chat\.json: 'None' is not a prompt"):
        read_messages(file)
