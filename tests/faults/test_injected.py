"""The program that injects faults, and the page that says what they do."""

import ast
import json
import re
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY
from tests.faults import injected

PAGE = REPOSITORY / "docs/reliability.md"


def test_the_page_names_tests_that_exist():
    """Each promise has its test, by file and function, or by file and kind of injected fault."""
    text = PAGE.read_text()
    named = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", text)
    assert len(named) > 15
    for file, function in named:
        tree = ast.parse((REPOSITORY / file).read_text())
        known = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        assert not function or function in known, f"{file}::{function}"
    kinds = set(re.findall(r"`tests/faults/injected.py` (\w+)", text))
    assert kinds <= injected.KINDS.keys()


@pytest.mark.parametrize(
    ("ended", "is_fine"),
    [
        ((2, "step 1\nerror: a: no such file\nmake it first\n"), True),
        ((2, "error: a\nb\nc\nd\n"), False),
        ((2, "Traceback (most recent call last)\nerror: x"), False),
        ((2, "nothing is said"), False),
        ((1, "error: x"), False),
        ((-1, "does not end\n"), False),
        ((0, ""), False),
    ],
)
def test_a_refusal_is_judged(ended, is_fine):
    assert (injected.check_refusal(ended) is None) == is_fine
    assert (injected.check_success(ended) is None) == (ended[0] == 0)


def test_there_are_enough_cases():
    cases = {name: list(kind()) for name, kind in injected.KINDS.items()}
    assert len(cases["kills"]) >= 40 and all(cases.values())
    assert len({said for name in cases for said, _ in cases[name]}) == sum(map(len, cases.values()))


def test_a_program_that_may_write_little_is_refused_in_three_lines():
    """As on a full disk: the smallest of the injected faults, with a program of seconds."""
    log = Path(injected.ROOT) / "log.json"
    version = {"question": "Which?", "choices": ["(A) a", "(B) b"], "answer": "(A) a"}
    answered = version | {"model_prediction": "(A) a"}
    log.write_text(json.dumps([{"id": "1", "English": answered, "Chinese": answered}]))
    command = ("score", "--log", log, "--out", injected.ROOT / "score.json")
    assert injected.check_refusal(injected.run(*command, limit=100)) is None
    assert not (injected.ROOT / "score.json").exists()
    assert injected.check_success(injected.run(*command)) is None
