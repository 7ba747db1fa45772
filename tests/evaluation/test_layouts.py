"""Layouts: the columns of every published benchmark become the same question, here one about
Vienna.
"""

import math

import pytest

from crossin_jax.config import UserError
from crossin_jax.evaluation.items import Version
from crossin_jax.evaluation.layouts import (
    COPA,
    id_of,
    is_open,
    read_version,
    split_candidates,
    tags_of,
)

QUESTION, CHOICES = "Which river?", ["Rhine", "Elbe", "Danube"]
VERSION = Version(QUESTION, ("(A) Rhine", "(B) Elbe", "(C) Danube"), 2)
COLUMNS = {
    "global_mmlu": {"question": QUESTION, "answer": "C"}
    | {f"option_{letter}": text for letter, text in zip("abc", CHOICES, strict=True)},
    "mmlu_prox": {"question": QUESTION, "answer": "C", "answer_index": 2}
    | dict.fromkeys([f"option_{i}" for i in range(10)])
    | {f"option_{i}": text for i, text in enumerate(CHOICES)},
    "mmlu_prox, N/A": {"question": QUESTION, "answer": "C", "answer_index": 2}
    | dict.fromkeys([f"option_{i}" for i in range(10)], "N/A")
    | {f"option_{i}": text for i, text in enumerate(CHOICES)},
    "mmlu_prox, NaN": {"question": QUESTION, "answer_index": 2.0}
    | dict.fromkeys([f"option_{i}" for i in range(10)], math.nan)
    | {f"option_{i}": text for i, text in enumerate(CHOICES)},
    "mmmlu": {"Question": QUESTION, "Answer": "C", "Subject": "geography"}
    | dict(zip("ABC", CHOICES, strict=True)),
    "mlogiqa": {"question": QUESTION, "options": CHOICES, "label": 2},
    "mlogiqa as text": {"question": QUESTION, "options": repr(CHOICES), "label": "2"},
    "mmlu_pro": {"question": QUESTION, "options": CHOICES, "answer": "C", "answer_index": 2},
    "xcsqa": {
        "question": {"stem": QUESTION, "choices": {"label": list("ABC"), "text": CHOICES}},
        "answerKey": "C",
    },
    "xcsqa, objects": {
        "question": {
            "stem": QUESTION,
            "choices": [
                {"label": label, "text": text} for label, text in zip("XYZ", CHOICES, strict=True)
            ],
        },
        "answerKey": "Z",
    },
    "arc": {
        "question": QUESTION,
        "choices": {"label": ["1", "2", "3"], "text": CHOICES},
        "answerKey": "3",
    },
    "include": {"question": QUESTION, "answer": 2, "subject": "geography"}
    | {f"option_{letter}": text for letter, text in zip("abc", CHOICES, strict=True)},
    "include as CSV": {"question": QUESTION, "answer": "2"}
    | {f"option_{letter}": text for letter, text in zip("abc", CHOICES, strict=True)},
    "mmlu": {"question": QUESTION, "choices": CHOICES, "answer": 2},
    "belebele, numbers": {"question": QUESTION, "correct_answer_num": 3}
    | {f"mc_answer{i}": text for i, text in enumerate(CHOICES, 1)},
    "belebele": {"question": QUESTION, "correct_answer_num": "3"}
    | {f"mc_answer{i}": text for i, text in enumerate(CHOICES, 1)},
}


@pytest.mark.parametrize("columns", COLUMNS)
def test_every_layout_gives_the_same_question(columns):
    assert read_version(COLUMNS[columns], "file, item 1") == VERSION


@pytest.mark.parametrize("name", ["context", "passage", "flores_passage"])
def test_a_context_has_any_of_its_names(name):
    assert read_version(COLUMNS["mlogiqa"] | {name: "Read."}, "").context == "Read."


@pytest.mark.parametrize("kind", COPA)
def test_xcopa_asks_for_cause_or_effect(kind):
    row = {"premise": "It rained.", "choice1": "A.", "choice2": "B.", "question": kind, "label": 1}
    assert read_version(row, "") == Version(COPA[kind], ("(A) A.", "(B) B."), 1, "It rained.")


def test_a_letter_names_a_column_even_where_a_choice_is_a_letter():
    row = {"Question": "Which grade?", "A": "D", "B": "A", "C": "B", "D": "C", "Answer": "A"}
    assert read_version(row, "").answer == 0
    numbers = {"question": "How many?", "answer": "1"}
    options = {f"option_{letter}": str(i + 1) for i, letter in enumerate("abc")}
    assert read_version(numbers | options, "").answer == 1
    assert read_version(numbers | {"choices": ["3", "2", "1"]}, "").answer == 2


@pytest.mark.parametrize(
    ("columns", "changes", "words"),
    [
        ("xcsqa", {"answerKey": ""}, "no gold answer"),  # its test split
        ("mlogiqa", {"label": -1}, "-1 is not among"),
        ("mmmlu", {"Answer": "D"}, "'D' is not among"),
        ("global_mmlu", {"option_b": ""}, "list of texts"),  # six German rows of X-CSQA
        ("mlogiqa", {"options": ["x"]}, "1 choices"),
        ("mlogiqa", {"question": None}, "no question"),
        ("mmmlu", {"A": 5}, "list of texts"),
    ],
)
def test_faults_name_the_item(columns, changes, words):
    with pytest.raises(UserError, match=f"file, item 1: .*{words}"):
        read_version(COLUMNS[columns] | changes, "file, item 1")


@pytest.mark.parametrize(
    ("row", "key"),
    [
        ({"id": 0}, "0"),
        ({"sample_id": "anatomy/test/1"}, "anatomy/test/1"),
        ({"question_id": 70}, "70"),
        ({"link": "http://x", "question_number": 2}, "http://x#2"),
        ({"id": ""}, None),
        ({"idx": 3}, None),
    ],
)
def test_ids(row, key):
    assert id_of(row) == key


def test_labels_become_subsets():
    row = COLUMNS["global_mmlu"] | {
        "subject": "high_school_physics",
        "subject_category": "STEM",
        "cultural_sensitivity_label": "CS",
    }
    expected = ("category: STEM", "subject: high school physics", "culture: sensitive")
    assert tags_of(row, "") == expected
    assert tags_of(row | {"cultural_sensitivity_label": "-", "tags": ["x"]}, "") == (
        "x",
        *expected[:2],
    )
    assert tags_of(COLUMNS["mmmlu"], "") == ("subject: geography",)
    prompt = {"prompt": "Say.", "task": "monolingual", "source": "aya"}
    assert tags_of(prompt, "") == ("task: monolingual", "source: aya") and is_open(prompt)
    assert tags_of(COLUMNS["mlogiqa"] | {"source": "aya"}, "") == ()


# ── candidates ────────────────────────────────────────────────────────────────────────────────────


def gap(prompt="Vienna lies on the <mask>.", gold="Danube", candidates="Rhine, Elbe, Danube"):
    return {"Prompt": prompt, "Ans": gold, "Candidate Ans": candidates, "Subject": "Vienna"}


def test_candidates_are_shuffled_alike_in_every_language_and_differently_in_every_item():
    english = [read_version(gap(), "", str(key)) for key in range(60)]
    german = gap("Wien liegt an der <mask>.", "Donau", "Rhein, Elbe, Donau")
    others = [read_version(german, "", str(key)) for key in range(60)]
    assert [v.answer for v in english] == [v.answer for v in others]
    assert {v.answer for v in english} == {0, 1, 2}
    for version in english:
        assert version.choices[version.answer][4:] == "Danube"
        assert sorted(choice[4:] for choice in version.choices) == ["Danube", "Elbe", "Rhine"]
    assert tags_of(gap(), "") == ()  # the subject of a sentence is no label


@pytest.mark.parametrize(
    ("value", "gold", "expected"),
    [
        ("Rhine, Elbe", "Elbe", ["Rhine", "Elbe"]),
        ("Rome, Washington, D.C., Oslo", "Washington, D.C.", ["Rome", "Washington, D.C.", "Oslo"]),
        ("['Rome', 'Washington, D.C.']", "Rome", ["Rome", "Washington, D.C."]),
        (["Rome", "Oslo"], "Rome", ["Rome", "Oslo"]),
    ],
)
def test_candidates_are_joined_by_commas_or_are_a_list(value, gold, expected):
    assert split_candidates(value, gold) == expected


def test_copies_without_a_mask_get_one():
    row = gap("Vienna lies on the", " Danube.", "[' Rhine.', ' Elbe.', ' Danube.']")
    assert read_version(row, "", "7") == read_version(gap(), "", "7")
    chinese = gap("维也纳位于", "多瑙河。", "['莱茵河。', '多瑙河。']")
    assert read_version(chinese, "", "7").question == "维也纳位于<mask>。"


def test_of_equal_candidates_the_last_is_gold():
    """Languages meet by position, and gold is at the end."""
    twice = gap(candidates="Danube, Elbe, Danube")
    for key in map(str, range(20)):
        expected = read_version(gap(), "", key).answer
        assert read_version(twice, "", key).answer == expected
    with pytest.raises(UserError, match="item 1: the gold answer 'Inn' is not among"):
        read_version(gap(gold="Inn"), "item 1")
