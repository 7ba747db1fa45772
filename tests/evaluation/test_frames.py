"""Prompt frames beside SeaEval's: the harness's bare form, and wordings of the user's own."""

from pathlib import Path

import pytest

from crossin_jax.config import UserError
from crossin_jax.evaluation.frames import (
    COPA,
    Continuations,
    hash_frame,
    list_continuations,
    make_prompt,
    name_of_prompt,
)
from crossin_jax.evaluation.items import Version

CITY = Version(" Which city?\n", ("(A) Rome", "(B) Oslo {x}"), 1)
STORY = Version("Who came?", ("(A) Ann", "(B) Bo"), 0, "Ann came.")
OWN = """
[default]
prompt = "{context}Q: {question} {choices} A:"
choice = "<{text}>"
answer = "{text}"
before_answer = "="
between = " | "

[Chinese]
prompt = "{question}\\n{choices}\\n答案："
context = "{context}"
cause = "原因是什么？"
effect = "结果是什么？"
"""


@pytest.fixture
def own(tmp_path):
    (tmp_path / "own.toml").write_text(OWN)
    return str(tmp_path / "own.toml")


def test_the_harness_asks_as_its_task_files_say():
    """ "{{question.strip()}}\\nA. {{A}}\\nB. {{B}}\\nAnswer:", then " B"."""
    assert make_prompt(CITY, "harness") == "Which city?\nA. Rome\nB. Oslo {x}\nAnswer:"
    assert make_prompt(STORY, "harness") == "Ann came.\nWho came?\nA. Ann\nB. Bo\nAnswer:"
    assert make_prompt(CITY, "harness", [STORY, CITY]) == (
        "Ann came.\nWho came?\nA. Ann\nB. Bo\nAnswer: A\n\n"
        "Which city?\nA. Rome\nB. Oslo {x}\nAnswer: B\n\n"
        "Which city?\nA. Rome\nB. Oslo {x}\nAnswer:"
    )
    assert list_continuations(CITY, "harness") == Continuations(letters=("A", "B"))
    assert name_of_prompt("harness") == "harness"


def test_seaevals_answers_have_labels_and_bare_ones_have_none():
    letters = ("(A)", "(B)")
    assert list_continuations(CITY, 1) == Continuations(("(A) Rome", "(B) Oslo {x}"), letters)
    assert list_continuations(CITY, 0) == Continuations(("Rome", "Oslo {x}"))


def test_a_file_words_each_language(own):
    assert make_prompt(CITY, own, [STORY], language="vi") == (
        "Ann came.\nQ: Who came? <Ann>\n<Bo> A:=Ann | Q: Which city? <Rome>\n<Oslo {x}> A:"
    )
    assert make_prompt(CITY, own, language="zh") == "Which city?\nA. Rome\nB. Oslo {x}\n答案："
    for code in ("zh", "zh-Hant"):  # the language's wording serves its varieties
        assert make_prompt(STORY, own, language=code) == "Who came?\nA. Ann\nB. Bo\n答案："
    assert list_continuations(CITY, own, "vi") == Continuations(texts=("Rome", "Oslo {x}"))
    assert list_continuations(CITY, own, "zh") == Continuations(letters=("A", "B"))
    assert name_of_prompt(own) == "own"


@pytest.mark.parametrize(("kind", "words"), [("cause", "原因是什么？"), ("effect", "结果是什么？")])
def test_a_file_words_the_questions_of_xcopa(own, kind, words):
    version = Version(COPA[kind], ("(A) a", "(B) b"), 0, "It rained.")
    assert make_prompt(version, own, language="zh").startswith(words)
    assert COPA[kind] in make_prompt(version, own, language="vi")
    assert COPA[kind] in make_prompt(version, "harness", language="zh")


def test_the_example_of_the_documentation_is_the_harness_and_chinese(tmp_path):
    page = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text()
    block = page.split("```toml\n")[1].split("```")[0]
    (tmp_path / "doc.toml").write_text("\n".join(line[2:] for line in block.splitlines()))
    name = str(tmp_path / "doc.toml")
    assert make_prompt(STORY, name, [CITY]) == make_prompt(STORY, "harness", [CITY])
    assert make_prompt(STORY, name, language="zh").endswith(
        "问题：Who came?\nA. Ann\nB. Bo\n答案："
    )


def test_every_word_of_a_frame_is_in_its_hash(tmp_path):
    hashes = {hash_frame(prompt) for prompt in (1, 2, 3, 4, 5, "harness")}
    for i, line in enumerate(OWN.splitlines()):
        if " = " in line:
            changed = OWN.replace(line, f'{line.rstrip()[:-1]}!"')
            (tmp_path / f"{i}.toml").write_text(changed)
            hashes.add(hash_frame(str(tmp_path / f"{i}.toml")))
    assert len(hashes) == 6 + OWN.count(" = ")
    (tmp_path / "same.json").write_text("{}")
    (tmp_path / "own.toml").write_text(OWN)
    assert hash_frame(str(tmp_path / "own.toml")) not in hashes


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[default", r"not TOML"),
        ("[Klingonese]\nprompt = '{question}'", r"\[Klingonese\]: not a language"),
        ("prompt = '{question}'", "not a language; a frame has a table per language"),
        ("[zh]\npromt = '{question}'", r"no field 'promt'; did you mean prompt\?"),
        ("[zh]\nprompt = 'Ask.'", r"\[zh\]: prompt lacks {question}"),
        ("[zh]\nchoice = '{letter}'", r"\[zh\]: choice lacks {text}"),
        ("[zh]\nanswer = 'B'", "answer lacks {letter} or {text}"),
        ("[zh]\nanswer = 3", r"\[zh\]: answer=3 is a int"),
        ("", "an empty frame"),
    ],
)
def test_faults_of_a_file(tmp_path, text, words):
    (tmp_path / "bad.toml").write_text(text)
    with pytest.raises(UserError, match=rf"bad\.toml.*{words}"):
        make_prompt(CITY, str(tmp_path / "bad.toml"), language="zh")


def test_a_language_without_a_wording(tmp_path):
    (tmp_path / "one.json").write_text('{"en": {}}')
    assert make_prompt(CITY, f"{tmp_path}/one.json", language="en-GB").endswith("Answer:")
    with pytest.raises(UserError, match=r"no wording in 'vi'; add \[vi\] or \[default\]"):
        make_prompt(CITY, f"{tmp_path}/one.json", language="vi")
    with pytest.raises(UserError, match="no such file"):
        make_prompt(CITY, f"{tmp_path}/none.toml")
