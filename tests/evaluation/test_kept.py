"""An interrupted evaluation keeps every answered prompt."""

import json

import pytest

from crossin_jax.evaluation import kept
from crossin_jax.evaluation.kept import ask_missing


def interrupted(after):
    """Answers a number by its square; stops after so many."""

    def ask(numbers, finished):
        for k, number in enumerate(numbers):
            if k == after:
                raise KeyboardInterrupt
            finished(k, [number**2, 0.1 + number])
        return [[number**2, 0.1 + number] for number in numbers]

    return ask


ANSWERS = [[i**2, 0.1 + i] for i in range(6)]


@pytest.mark.parametrize("torn", ["", "[4, [16", "[4, [16, 4.1]]", "[4]\n"])
def test_only_what_is_missing_is_asked_again(torn, tmp_path):
    """Whatever the last line holds of an answer that was being written."""
    file, asked = tmp_path / "new/file.part", []
    with pytest.raises(KeyboardInterrupt):
        ask_missing(file, 6, interrupted(2))
    with file.open("a") as lines:
        lines.write(torn)

    def ask(numbers, finished):
        asked.append(numbers)
        return interrupted(None)(numbers, finished)

    assert ask_missing(file, 6, ask) == ANSWERS and asked == [[2, 3, 4, 5]]
    assert [json.loads(line)[0] for line in file.read_text().splitlines()] == list(range(6))
    assert ask_missing(file, 6, interrupted(0)) == ANSWERS  # nothing is left


def test_answers_may_come_in_any_order_and_be_none(tmp_path):
    def ask(numbers, finished):
        for k in (2, 0):
            finished(k, numbers[k])
        return [numbers[0], None, numbers[2]]

    file = tmp_path / "file.part"
    assert ask_missing(file, 3, ask) == [0, None, 2]
    assert ask_missing(file, 3, lambda numbers, _: [None] if numbers == [1] else 1 / 0) == [
        0,
        None,
        2,
    ]
    assert ask_missing(None, 3, ask) == [0, None, 2]


def test_a_torn_line_is_cut_off_when_all_processes_have_read(tmp_path, monkeypatch):
    file, seen = tmp_path / "file.part", []
    file.write_text("[0, 7]\n[1, ")
    monkeypatch.setattr(kept.hosts, "barrier", lambda name: seen.append(file.read_text()))
    assert ask_missing(file, 2, lambda numbers, _: [8]) == [7, 8]
    assert seen == ["[0, 7]\n[1, "] and file.read_text() == "[0, 7]\n"
