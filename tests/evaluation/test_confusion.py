"""Line and word pass rates: by hand, against the published definitions, and on published
answers.
"""

import gzip
import json

import pytest

from crossin_jax.evaluation.confusion import (
    PassRates,
    average,
    english_words,
    measure_confusion,
    measure_groups,
    measure_off_target,
    split_words,
)
from crossin_jax.evaluation.during_training import _measure_texts
from crossin_jax.evaluation.predictions import Answer, ItemAnswers, Predictions

FR, EN = "La capitale de la France est Paris", "The capital of France is Paris"
RU = "Столица Франции это город Париж"


@pytest.mark.parametrize(
    ("answers", "language", "counted", "accuracy", "line_pass", "word_pass"),
    [
        ([FR, EN], "fr", 2, 0.5, 0.5, None),
        ([f"{FR}.\n{EN}.", FR], "fr", 2, 0.75, 0.5, None),
        ([f"{FR}\n\nOui, voilà.\n"], "fr", 1, 1.0, 1.0, None),  # a line of two words does not count
        (["Oui.", "", "Paris est là."], "fr", 0, None, None, None),
        ([f"{FR}\nQ: {EN}"], "fr", 1, 1.0, 1.0, None),  # another question is cut
        ([RU, f"{RU} because"], "ru", 2, 1.0, 1.0, 0.5),
        ([f"{RU} Paris"], "ru", 1, 1.0, 1.0, 1.0),  # a name is no word of the list
        ([f"{RU} (water)."], "ru", 1, 1.0, 1.0, 0.0),  # punctuation goes
        ([EN], "ru", 1, 0.0, 0.0, 1.0),  # by the definition
        (["法国的首都是巴黎这座城市", "The capital of France is Paris"], "zh", 2, 0.5, 0.5, 1.0),
        ([FR], "ha", 0, None, None, None),  # the model does not know Hausa
    ],
)
def test_rates_by_hand(answers, language, counted, accuracy, line_pass, word_pass):
    rates = PassRates(len(answers), counted, accuracy, line_pass, word_pass)
    assert measure_confusion(answers, language) == rates


def test_off_target_names_any_language():
    """French, Portuguese and Italian are not Spanish; a letter says nothing."""
    answers = [
        "La capital de Francia es París, claro",
        FR,
        "A capital da França é Paris, claro",
        "B",
    ]
    assert measure_off_target(answers, "es") == (0.75, pytest.approx(2 / 3))
    assert measure_off_target(["B"], "es") == (0.0, None) and measure_off_target([], "es") == (
        None,
        None,
    )


def test_words_of_languages_without_spaces():
    assert split_words("法国的首都是巴黎 Paris", "zh")[:2] == ["法国", "的"]
    assert split_words("首都は東京です", "ja") == ["首都", "は東", "京で", "す"]
    assert split_words("la ville", "fr") == ["la", "ville"]


def test_the_word_list_has_lower_case_words_of_four_letters():
    words = english_words()
    assert (
        len(words) > 60_000
        and {"water", "because"} <= words
        and not {"the", "Paris", "paris"} & words
    )
    assert all(len(word) > 3 and word.islower() for word in words)


def test_means_are_over_groups_whatever_their_sizes():
    one, two = PassRates(1, 1, 1.0, 1.0, None), PassRates(9, 8, 0.5, 0.0, 0.25)
    assert average([one, two]) == PassRates(10, 9, 0.75, 0.5, 0.25)
    assert average([PassRates(1, 0, None, None, None)]) == PassRates(1, 0, None, None, None)


def test_training_reports_them_where_answers_are_texts():
    def answer(text):
        return Answer((0,), "matched", text)

    items = [
        ItemAnswers(f"q{i}", {"fr": 0, "ru": 0}, 2, {"fr": answer(text), "ru": answer(other)})
        for i, (text, other) in enumerate([(FR, RU), (EN, "B")])
    ]
    free = Predictions("b", "generate", 1, ("fr", "ru"), tuple(items))
    assert dict(_measure_texts(free)) == {
        "off_target/fr": 0.5,
        "line_pass/fr": 0.5,
        "off_target/ru": 0.0,
        "line_pass/ru": 1.0,
        "word_pass/ru": 1.0,
    }
    scored = [ItemAnswers("q", {"fr": 0}, 2, {"fr": answer(None)})]
    assert not dict(_measure_texts(Predictions("b", "sum", 1, ("fr",), tuple(scored))))


def test_published_answers_have_their_published_rates(shared):
    """A third of the published groups; `benchmarks/language_confusion.py` prints all 294 lines."""
    folder = shared / "language_confusion"
    expected = json.loads((folder / "expected.json").read_text())
    languages = ("ar", "hi", "zh", "fr", "id")
    with gzip.open(folder / "llama-2-instruct.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [row for row in map(json.loads, file) if row["language"] in languages]
    found = measure_groups(
        (("llama-2-instruct", row["task"], row["source"]), row["language"], row["completion"])
        for row in rows
    )
    checked = [key for key in found if key[-1] != "all"]
    assert len(checked) > 25
    for key in checked:
        rates, published = found[key], expected["|".join(key)]
        assert rates.line_accuracy == pytest.approx(published["acc"], abs=1e-6), key
        assert rates.line_pass == pytest.approx(published["lpr"], abs=1e-6), key
        assert (rates.word_pass is None) == ("wpr" not in published)
        if rates.word_pass is not None:
            assert rates.word_pass == pytest.approx(published["wpr"], abs=1e-6), key
