"""The generate program: folders, adapters and runs answer; streams; faults are one line."""

import dataclasses
import io
import json
import math
import shutil
import subprocess
import sys
import types

import numpy as np
import pytest

from crossin_jax import generate as program
from crossin_jax.config import UserError
from crossin_jax.data.pipeline import load_tokenizer
from crossin_jax.data.prompts import Renderer
from crossin_jax.export import export
from crossin_jax.generate import read_prompts
from crossin_jax.generation.chat import ChatModel, Text, load_chat_model
from tests.conftest import REPOSITORY
from tests.helpers import as_earlier_version
from tests.test_train import copy_run

QUESTIONS = [
    ("What is the currency of Peru?", ""),
    ("Name the capital", "France"),
    ("Say something", ""),
]


@pytest.fixture(scope="module")
def speaker(pretrained):
    return load_chat_model(str(pretrained / "model"), template="plain", batch_size=2)


def test_answers_stream_as_they_are_returned(speaker):
    heard = {}
    answers = speaker.answer(
        QUESTIONS, lambda i, text: heard.setdefault(i, []).append(text), max_new_tokens=20
    )
    assert ["".join(heard[i]) for i in range(3)] == answers and any(answers)
    assert speaker.answer(QUESTIONS[1:2], max_new_tokens=20) == answers[1:2]


def test_stops_are_cut_from_text_and_stream(speaker):
    (whole,) = speaker.answer(QUESTIONS[:1], max_new_tokens=20)
    stop = whole[3:6]
    heard = []
    (cut,) = speaker.answer(
        QUESTIONS[:1], lambda i, text: heard.append(text), max_new_tokens=20, stop=[stop]
    )
    assert cut == whole[: whole.find(stop)] == "".join(heard)


def test_a_run_an_export_and_an_adapter_on_its_base_say_the_same(pretrained, adapted, tmp_path):
    export(adapted, "peft", tmp_path / "adapter")
    base, template = str(pretrained / "model"), load_chat_model(str(adapted)).renderer.template_name
    options = {"max_new_tokens": 12}
    expected = load_chat_model(str(adapted), dtype="float32").answer(QUESTIONS, **options)
    on_base = load_chat_model(
        base, adapter=str(tmp_path / "adapter"), template=template, dtype="float32"
    )
    assert on_base.answer(QUESTIONS, **options) == expected
    assert (
        load_chat_model(str(tmp_path / "adapter"), template=template).answer(QUESTIONS, **options)
        == expected
    )
    with pytest.raises(UserError, match="weights of its own"):
        load_chat_model(str(adapted), adapter=str(tmp_path / "adapter"))
    with pytest.raises(UserError, match="did you mean alpaca"):
        load_chat_model(base, template="alpacca")


# ---- How a model is asked


@pytest.mark.parametrize(
    ("stored", "given"),
    [
        ({"template": "llama", "system": "Be brief."}, {}),
        ({"template": "llama", "system": "Be brief."}, {"system": "Be long."}),
        ({"template": "alpaca", "system": None}, {"template": "llama", "system": "Be long."}),
        ({"template": "plain", "system": None, "tokenization": "apart"}, {}),
        ({"template": "plain", "system": None, "tokenization": "apart"}, {"template": "alpaca"}),
    ],
    ids=str,
)
def test_a_run_is_asked_as_it_was_trained(stored, given, adapted, tmp_path):
    """Template, system prompt and tokenization are the run's own unless one says otherwise."""
    folder = as_earlier_version(copy_run(adapted, tmp_path / "run"))
    for file in folder.glob("checkpoints/*/config/metadata"):
        values = json.loads(file.read_text())
        values["data"] |= stored
        file.write_text(json.dumps(values))
        tokenizer = load_tokenizer(values["model"]["path"])
    wanted = {"tokenization": "joint"} | stored | given
    renderer = Renderer(
        tokenizer, wanted["template"], system=wanted["system"], tokenization=wanted["tokenization"]
    )
    asked = load_chat_model(str(folder), **given).renderer
    for question in QUESTIONS:
        expected = renderer.render_prompt(*question)
        np.testing.assert_array_equal(asked.render_prompt(*question), expected)
    text = asked.decode(asked.render_prompt(*QUESTIONS[0]))
    assert (wanted["system"] or "Below") in text or wanted["template"] == "plain"


def test_a_model_is_asked_by_its_chat_template_else_by_alpaca(pretrained, tmp_path):
    """A template that one gives goes first."""
    base = shutil.copytree(pretrained / "model", tmp_path / "model")
    for name in ("prompt.json", "chat_template.jinja"):  # a model of others has no prompt of ours
        (base / name).unlink(missing_ok=True)
    file = base / "tokenizer_config.json"
    values = json.loads(file.read_text())
    values.pop("chat_template", None)
    file.write_text(json.dumps(values))
    assert load_chat_model(str(base)).renderer.template_name == "alpaca"
    values["chat_template"] = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    file.write_text(json.dumps(values))
    asked = load_chat_model(str(base), system="Be brief.").renderer
    assert asked.template_name == "chat"
    assert asked.decode(asked.render_prompt("Who?")).endswith(
        "[system]Be brief.[user]Who?[assistant]"
    )
    assert load_chat_model(str(base), template="plain").renderer.template_name == "plain"


def test_a_tokenizer_with_more_tokens_than_the_model(pretrained, tmp_path):
    """Added tokens are refused in the prompt that has one; a larger vocabulary is one of another
    model.
    """
    folder = shutil.copytree(pretrained / "model", tmp_path / "tokenizer")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    one = tokenizer["added_tokens"][0] | {"special": False}
    tokenizer["added_tokens"] += [{**one, "id": 400 + i, "content": f"<new{i}>"} for i in range(9)]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    speaker = load_chat_model(str(pretrained / "model"), tokenizer=str(folder), template="plain")
    assert len(speaker.answer([("Name", "")], max_new_tokens=2)) == 1
    with pytest.raises(UserError, match="prompt 1: token id 403 is outside the model's vocabulary"):
        speaker.answer([("Name", ""), ("Name <new3>", "")], max_new_tokens=2)
    tokenizer["model"]["vocab"]["qqq"] = 400
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(
        UserError, match="tokenizer: 401 tokens, but the model's vocabulary has 400"
    ):
        load_chat_model(str(pretrained / "model"), tokenizer=str(folder))


# ---- What appears on the screen


def test_no_part_of_a_stop_text_is_ever_shown(speaker):
    """Stops that begin with a token; what has appeared is always the beginning of the answer."""
    prompt = speaker.renderer.render_prompt(*QUESTIONS[0])
    (ids,) = speaker.engine.generate([prompt], max_new_tokens=30, progress=False)
    whole = speaker.renderer.decode(ids)
    begins = {len(speaker.renderer.decode(ids[:n])) for n in range(1, len(ids) - 3)}
    tried = 0
    for place in begins:
        stop, heard = whole[place : place + 6], [""]
        if whole.index(stop) not in begins:
            continue
        (answer,) = speaker.answer(
            QUESTIONS[:1],
            lambda _, text, heard=heard: heard.append(heard[-1] + text),
            max_new_tokens=30,
            stop=["never", stop],
        )
        assert answer == whole[: whole.index(stop)] == heard[-1]
        assert all(answer.startswith(text) for text in heard), stop
        tried += 1
    assert tried > 5


@dataclasses.dataclass
class Teller:
    """Stands in for an engine: tells given tokens one at a time, and returns so many of each."""

    tokens: list[list[int]]
    max_length: int = 40
    kept: int | None = None

    def generate(self, prompts, *, max_new_tokens, stream, **options):
        self.asked = max_new_tokens
        for step in range(max(map(len, self.tokens))):
            for i, ids in enumerate(self.tokens):
                if stream and step < len(ids):
                    stream(i, ids[step : step + 1])
        return [ids[: self.kept] for ids in self.tokens]


@pytest.mark.parametrize("stops", [["\nUser:"], ["\nUser:", "#"], ["#", "\nUser:"]], ids=str)
@pytest.mark.parametrize("told", range(1, 6))
def test_the_beginning_of_a_stop_text_waits_until_it_is_known_to_be_none(stops, told, speaker):
    """So many characters of a stop come before the engine finds it and takes them back."""
    renderer = speaker.renderer
    ids = speaker.tokenizer("Paris is old" + "\nUser:"[:told], add_special_tokens=False).input_ids
    kept = next(n for n in range(len(ids)) if renderer.decode(ids[:n]) == "Paris is old")
    teller, shown = Teller([ids], kept=kept), [""]
    found = ChatModel(teller, renderer, None).answer(
        QUESTIONS[:1], lambda _, text: shown.append(shown[-1] + text), max_new_tokens=9, stop=stops
    )
    assert found == ["Paris is old"] == [shown[-1]]
    assert len(shown[-2]) > 4  # what cannot begin a stop does not wait
    for text in shown:
        assert found[0].startswith(text)


def test_a_character_of_several_tokens_appears_whole(speaker):
    """Two answers at once, token by token: no replacement character is ever shown."""
    texts = ["東京 est grand", "¿Qué? 胡志明市"]
    renderer = speaker.renderer
    tokens = [speaker.tokenizer(text, add_special_tokens=False).input_ids for text in texts]
    pieces = [[], []]
    found = ChatModel(Teller(tokens), renderer, None).answer(
        QUESTIONS[:2], lambda i, text: pieces[i].append(text), max_new_tokens=9
    )
    assert found == texts == ["".join(parts) for parts in pieces]
    assert all("\ufffd" not in text for parts in pieces for text in parts)
    assert all(len([text for text in parts if text]) > 4 for parts in pieces)  # as it is made


def test_an_answer_is_as_long_as_one_asks_and_the_model_reads(speaker):
    """With a prompt that leaves no room the engine is asked for one token, and refuses."""
    lengths = [len(speaker.renderer.render_prompt("a" * n)) for n in (1, 30, 90)]
    for limit in (5, 30):
        teller = Teller([[5]] * 3)
        ChatModel(teller, speaker.renderer, None).answer(
            [("a" * n, "") for n in (1, 30, 90)], max_new_tokens=limit
        )
        assert teller.asked == [max(1, min(limit, 40 - length)) for length in lengths]
    assert lengths[0] + 5 < 40 < lengths[0] + 40 and lengths[2] > 40


# ---- The program's flags

FLAGS = {
    "model": "m",
    "adapter": None,
    "base": None,
    "tokenizer": None,
    "template": None,
    "system": None,
    "prompt": [],
    "input": "",
    "max_new_tokens": 8,
    "temperature": 0.0,
    "top_k": None,
    "top_p": None,
    "seed": 0,
    "stop": [],
    "dtype": "auto",
    "chat": False,
    "messages": None,
    "prompts": None,
    "out": None,
    "batch_size": 4,
}


@pytest.fixture
def say(monkeypatch, capsys):
    """Runs the program with a speaker in place of the model; returns what it writes."""

    def say(speaker, text="", **changes):
        monkeypatch.setattr(program, "load_chat_model", lambda *options, **named: speaker)
        monkeypatch.setattr("sys.stdin", io.StringIO(text))
        program.main(types.SimpleNamespace(**FLAGS | changes))
        return capsys.readouterr().out

    return say


TEXTS = [text for text, _ in QUESTIONS]


@pytest.mark.parametrize("way", ["one", "several", "typed"])
def test_draws_follow_the_seed_however_one_asks(way, speaker, say):
    """One --prompt, several, or lines of standard input: a prompt's answer is the same in all."""

    def ask(seed):
        given = {
            "one": {"prompt": TEXTS[:1]},
            "several": {"prompt": TEXTS},
            "typed": {"text": "\n".join(TEXTS)},
        }[way]
        return say(speaker, seed=seed, temperature=1.0, **given)

    first, again, other = ask(3), ask(3), ask(4)
    assert first == again != other
    for question in QUESTIONS[: 1 if way == "one" else 3]:
        (answer,) = speaker.answer(
            [(question[0], "")], max_new_tokens=8, temperature=1.0, seeds=[3]
        )
        assert answer and answer in first


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"stop": [""]}, "an empty entry"),
        ({"stop": ["a", ""]}, "an empty entry"),
        *(({"temperature": value}, "temperature=") for value in (math.nan, 1e-38, -1.0, math.inf)),
        ({"top_p": 0.5}, "no effect at temperature=0"),
    ],
    ids=str,
)
def test_settings_without_sense_are_refused_before_the_model_is_loaded(given, told, say):
    with pytest.raises(UserError, match=told):
        say(None, **given)


def test_a_stop_may_be_a_special_token(speaker):
    """The answer ends before it, on the screen too; other special tokens are never shown."""
    ids = speaker.tokenizer("Paris</s> is<s> old", add_special_tokens=False).input_ids
    renderer = speaker.renderer
    for stop, expected in ((["</s>"], "Paris"), (["<s>"], "Paris is"), (["x"], "Paris is old")):
        shown = [""]
        found = ChatModel(Teller([ids]), renderer, None).answer(
            QUESTIONS[:1],
            lambda _, text, shown=shown: shown.append(shown[-1] + text),
            max_new_tokens=9,
            stop=stop,
        )
        assert found == [expected] == [shown[-1]]
        assert all(expected.startswith(text) for text in shown)


class Listener:
    """Notes how it is asked."""

    def answer(self, prompts, write=None, **options):
        self.asked = [*getattr(self, "asked", ()), (prompts, options)]
        for i in range(len(prompts) if write else 0):
            write(i, f"answer {i}")
        return [f"answer {i}" for i in range(len(prompts))]


@pytest.mark.parametrize(
    "flag",
    [
        {"max_new_tokens": 3},
        {"temperature": 0.5},
        {"top_k": 4, "temperature": 0.5},
        {"top_p": 0.5, "temperature": 0.5},
        {"stop": ["a", "b"]},
    ],
    ids=str,
)
def test_every_flag_of_an_answer_reaches_it(flag, say):
    """For one prompt, for several, and for prompts from standard input."""
    expected = {
        "max_new_tokens": 8,
        "temperature": 0.0,
        "top_k": None,
        "top_p": None,
        "stop": [],
    } | flag
    for given, text in ((["q"], ""), (["q", "r"], ""), ([], "q\nr\n")):
        listener = Listener()
        written = say(listener, text, prompt=given, input="in", seed=5, **flag)
        names = given or ["q", "r"]
        assert [prompt for prompts, _ in listener.asked for prompt in prompts] == [
            (name, "in") for name in names
        ]
        for prompts, options in listener.asked:
            assert options == expected | {"seeds": [5] * len(prompts)}
        assert written == (
            "> q\nanswer 0\n\n> r\nanswer 1\n\n" if len(given) > 1 else "answer 0\n" * len(names)
        )


def test_every_flag_of_the_model_reaches_it(monkeypatch):
    names = {
        "adapter": "a",
        "tokenizer": "t",
        "template": "plain",
        "system": "s",
        "dtype": "bfloat16",
    }
    opened = []
    monkeypatch.setattr(
        program,
        "load_chat_model",
        lambda *given, **named: opened.append((given, named)) or Listener(),
    )
    for prompts, rows in ((["q"], 1), (["q"] * 3, 3), (["q"] * 20, 8)):
        program.main(types.SimpleNamespace(**FLAGS | names | {"prompt": prompts}))
        assert opened[-1] == (("m",), names | {"batch_size": rows})


def test_prompts_come_from_pipe_and_keyboard(monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("one\n\ntwo\n"))
    assert list(read_prompts(False)) == ["one", "two"]
    monkeypatch.setattr("sys.stdin", io.StringIO("one\n\ntwo\n"))
    assert list(read_prompts(True)) == ["one"] and capsys.readouterr().out == "> > "


# ---- Conversations, files, and answers that were cut


class Chat(Listener):
    """Answers with the number of turns that it was given, and reads at most six of them."""

    engine = types.SimpleNamespace(max_length=7)

    def render(self, messages):
        return messages

    def answer(self, prompts, write=None, **options):
        turns = [turn["content"] for turn in prompts[0]]
        self.asked = [*getattr(self, "asked", ()), turns]
        text = Text(f"{len(turns)} turns")
        text.is_cut = "long" in turns[-1]
        write(0, text)
        return [text]


def test_a_conversation_keeps_its_turns_until_it_is_reset(say, capsys):
    chat = Chat()
    written = say(chat, "one\ntwo\n/reset\nthree\n", chat=True)
    assert chat.asked == [["one"], ["one", "1 turns", "two"], ["three"]]
    assert written == "1 turns\n3 turns\n1 turns\n"


def test_a_conversation_that_is_too_long_forgets_its_oldest_exchange(say):
    chat = Chat()
    say(chat, "".join(f"q{i}\n" for i in range(5)), chat=True)
    assert [len(turns) for turns in chat.asked] == [1, 3, 5, 5, 5]
    assert chat.asked[-1][0] == "q2"


def test_messages_of_a_file_are_answered_and_may_go_on(say, tmp_path):
    turns = [
        {"role": role, "content": text}
        for role, text in [("system", "Be brief."), ("user", "Hello")]
    ]
    (tmp_path / "chat.json").write_text(json.dumps(turns))
    chat = Chat()
    assert say(chat, messages=str(tmp_path / "chat.json")) == "2 turns\n"
    say(chat, "and?\n", messages=str(tmp_path / "chat.json"), chat=True)
    assert chat.asked[-1] == ["Be brief.", "Hello", "2 turns", "and?"]


def test_an_answer_that_was_cut_is_marked_beside_it(monkeypatch, capsys):
    monkeypatch.setattr(program, "load_chat_model", lambda *_, **__: Chat())
    monkeypatch.setattr("sys.stdin", io.StringIO("short\nlong\n"))
    program.main(types.SimpleNamespace(**FLAGS | {"chat": True}))
    out, err = capsys.readouterr()
    assert out == "1 turns\n3 turns\n" and err.count("[cut here; --max_new_tokens") == 1


def test_a_cut_answer_has_no_half_character(speaker):
    """Cut after any number of tokens: the text is the beginning of the whole one."""
    text = "東京 ¿Qué? 胡志明市"
    ids = speaker.tokenizer(text, add_special_tokens=False).input_ids
    for limit in range(1, len(ids)):
        (found,) = ChatModel(Teller([ids[:limit]], max_length=400), speaker.renderer, None).answer(
            QUESTIONS[:1], max_new_tokens=limit
        )
        assert text.startswith(found) and "\ufffd" not in found and found.is_cut


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"prompt": ["a"], "chat": True}, "--prompt and --chat or --messages"),
        ({"prompts": "p.jsonl"}, "needs --out"),
        ({"out": "o.jsonl"}, "needs --prompts"),
        ({"prompts": "p.jsonl", "out": "o.jsonl", "chat": True}, "different ways"),
        ({"chat": True, "input": "a"}, "--input goes with --prompt"),
        ({"prompts": "absent.jsonl", "out": "o.jsonl"}, "absent.jsonl"),
        ({"messages": "absent.json"}, "absent.json"),
    ],
    ids=str,
)
def test_ways_of_asking_that_do_not_go_together_are_refused_before_the_model_is_loaded(
    given, words, say
):
    with pytest.raises(UserError, match=words):
        say(None, **given)


def run(*arguments, text=None):
    return subprocess.run(
        [sys.executable, "-m", "crossin_jax.generate", *map(str, arguments)],
        capture_output=True,
        text=True,
        input=text,
        cwd=REPOSITORY,
    )


def test_the_program_answers_and_says_what_is_wrong(pretrained, speaker, tmp_path):
    base = ["--model", pretrained / "model", "--template", "plain", "--max_new_tokens", 8]
    found = run(*base, text=f"{QUESTIONS[0][0]}\n")
    assert found.returncode == 0, found.stderr
    assert found.stdout.strip() == speaker.answer(QUESTIONS[:1], max_new_tokens=8)[0].strip()
    rows, out = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    rows.write_text(json.dumps({"prompt": QUESTIONS[0][0], "id": 7}) + "\n")
    many = run(*base, "--prompts", rows, "--out", out)
    assert many.stdout == f"1 answers: {out}\n", many.stderr
    row = json.loads(out.read_text())
    assert row["id"] == 7 and row["generated"].strip() == found.stdout.strip()
    for arguments, words in [
        ((), "--model is missing"),
        ((*base, "--top_k", 5, "-p", "a"), "temperature above 0"),
    ]:
        found = run(*arguments)
        assert (
            found.returncode == 2 and words in found.stderr and "Traceback" not in found.stderr
        ), found.stderr
