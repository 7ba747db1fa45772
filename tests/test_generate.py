"""The generate program: folders, adapters and runs answer; streams; faults are one line."""

import io
import subprocess
import sys

import pytest

from crossin_jax.config import UserError
from crossin_jax.export import export
from crossin_jax.generate import open_speaker, read_prompts
from tests.conftest import REPOSITORY

QUESTIONS = [("What is the currency of Peru?", ""), ("Name the capital", "France"), ("Say something", "")]


@pytest.fixture(scope="module")
def speaker(pretrained):
    return open_speaker(str(pretrained / "model"), template="plain", batch_size=2)


def test_answers_stream_as_they_are_returned(speaker):
    heard = {}
    answers = speaker.answer(QUESTIONS, lambda i, text: heard.setdefault(i, []).append(text), max_new_tokens=20)
    assert ["".join(heard[i]) for i in range(3)] == answers and any(answers)
    assert speaker.answer(QUESTIONS[1:2], max_new_tokens=20) == answers[1:2]


def test_stops_are_cut_from_text_and_stream(speaker):
    whole, = speaker.answer(QUESTIONS[:1], max_new_tokens=20)
    stop = whole[3:6]
    heard = []
    cut, = speaker.answer(QUESTIONS[:1], lambda i, text: heard.append(text), max_new_tokens=20, stop=[stop])
    assert cut == whole[:whole.find(stop)] == "".join(heard)


def test_a_run_an_export_and_an_adapter_on_its_base_say_the_same(pretrained, adapted, tmp_path):
    export(adapted, "peft", tmp_path / "adapter")
    base, template = str(pretrained / "model"), open_speaker(str(adapted)).renderer.template_name
    options = {"max_new_tokens": 12}
    expected = open_speaker(str(adapted), dtype="float32").answer(QUESTIONS, **options)
    on_base = open_speaker(base, adapter=str(tmp_path / "adapter"), template=template, dtype="float32")
    assert on_base.answer(QUESTIONS, **options) == expected
    assert open_speaker(str(tmp_path / "adapter"), template=template).answer(QUESTIONS, **options) == expected
    with pytest.raises(UserError, match="weights of its own"):
        open_speaker(str(adapted), adapter=str(tmp_path / "adapter"))
    with pytest.raises(UserError, match="did you mean alpaca"):
        open_speaker(base, template="alpacca")


def test_prompts_come_from_pipe_and_keyboard(monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("one\n\ntwo\n"))
    assert list(read_prompts(False)) == ["one", "two"]
    monkeypatch.setattr("sys.stdin", io.StringIO("one\n\ntwo\n"))
    assert list(read_prompts(True)) == ["one"] and capsys.readouterr().out == "> > "


def run(*arguments, text=None):
    return subprocess.run([sys.executable, "-m", "crossin_jax.generate", *map(str, arguments)], capture_output=True,
                          text=True, input=text, cwd=REPOSITORY)


def test_the_program_answers_and_says_what_is_wrong(pretrained, speaker):
    base = ["--model", pretrained / "model", "--template", "plain", "--max_new_tokens", 8]
    found = run(*base, text=f"{QUESTIONS[0][0]}\n")
    assert found.returncode == 0, found.stderr
    assert found.stdout.strip() == speaker.answer(QUESTIONS[:1], max_new_tokens=8)[0].strip()
    for arguments, words in [((), "--model is missing"), ((*base, "--top_k", 5, "-p", "a"), "temperature above 0")]:
        found = run(*arguments)
        assert found.returncode == 2 and words in found.stderr and "Traceback" not in found.stderr, found.stderr
