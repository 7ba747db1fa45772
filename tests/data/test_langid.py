"""Language identification on real parallel questions, and on texts that say nothing."""

import json
from collections import Counter

import pytest

from crossin_jax.config import Source
from crossin_jax.data.corpus import load_corpus
from crossin_jax.data.langid import identify, score_words
from crossin_jax.languages import LANGUAGES

SEAEVAL = ("en", "zh", "vi", "es", "id", "ms", "fil")


@pytest.mark.parametrize(("text", "code"), [
    ("What is the capital of France?", "en"), ("法国的首都是什么？", "zh"), ("Thủ đô của Pháp là gì?", "vi"),
    ("¿Cuál es la capital de Francia?", "es"), ("Apa ibu kota dari Prancis dan karena apa?", "id"),
    ("Apakah ibu negara bagi Perancis dan bahawa?", "ms"), ("Ano ang kabisera ng Pransiya?", "fil"),
    ("12 %", None), ("", None), ("Shen Kuo", None), ("Volkswagen 股", None)])
def test_short_texts(text, code):
    assert identify(text, SEAEVAL) == code


SCRIPTS = {"zh": "法", "ar": "ع", "el": "λ", "hi": "क", "ru": "ж", "th": "ก"}


@pytest.mark.parametrize("code", SCRIPTS)
def test_a_script_names_its_language_where_it_outweighs_latin_letters(code):
    """One Han character weighs as much as three letters; a letter of another script as one."""
    weight = 3 if code == "zh" else 1
    for n in (1, 4):
        for latin, told in (
            (0, code),
            (weight * n - 1, code),
            (weight * n, None),
            (weight * n + 1, None),
        ):
            text = f"{SCRIPTS[code] * n} 12 {'Q' * latin}。"
            assert identify(text, tuple(LANGUAGES)) == told, (text, told)
            assert identify(text, [other for other in LANGUAGES if other != code]) is None
    assert (
        identify(f"{SCRIPTS[code] * 3} {'ñ' * 3 * weight}", ("es", code)) == "es"
    )  # accents are letters


def test_of_two_scripts_the_one_with_more_letters_counts():
    assert identify("жжж λλ", ("ru", "el")) == "ru" and identify("жж λλλ", ("ru", "el")) == "el"


def test_a_name_in_latin_letters_leaves_a_chinese_sentence_chinese():
    assert identify("请问 Christopher Columbus 是哪一年出生的？", ("en", "zh", "es")) == "zh"
    assert identify("The word 河 is what they have for a river", ("en", "zh", "es")) == "en"


OWN = {"vi": "ở", "es": "ñ", "de": "ä", "ro": "ș", "tr": "ğ"}


@pytest.mark.parametrize("code", OWN)
def test_a_letter_of_its_own_outweighs_one_function_word(code):
    """But not two."""
    latin = [code, "en"]
    for letter in (OWN[code], OWN[code].upper()):
        assert (
            identify(f"Qqq{letter} the", latin) == code
            and identify(f"the qqq{letter} of", latin) == "en"
        )
        assert identify(f"qqq{letter}qqq", ("en", "fil")) is None
    assert score_words(f"Qqq{OWN[code]} the{OWN[code]}", latin) == {code: 3.0, "en": 0}


def test_words_are_counted_whole_and_in_any_case():
    """By hand: the, of and is, but not the "is" of a name; then that, the, of and the."""
    assert score_words("The OF is Isabel", ("en",)) == {"en": 3}
    assert score_words("that's the_of 2the", ("en", "zh", "de")) == {"en": 4, "de": 0}
    assert score_words("de la que", ("es", "ro", "en")) == {"es": 3, "ro": 2, "en": 0}


def test_of_languages_with_the_same_evidence_the_first_candidate_is_named():
    for candidates in (("id", "ms"), ("ms", "id"), ("en", "ms", "id"), ("fil", "id", "ms")):
        first = next(code for code in candidates if code in ("id", "ms"))
        assert identify("yang dan untuk pada", candidates) == first
    assert (
        identify("yang kerana", ("id", "ms")) == "ms"
        and identify("yang karena", ("ms", "id")) == "id"
    )
    assert identify("yang dan", ()) is None and identify("yang dan", ("zh", "ru")) is None


def test_only_candidates_are_named():
    assert identify("法国的首都", ("en", "es")) is None
    assert identify("Was ist die Hauptstadt von Frankreich?", ("en", "de")) == "de"


def test_seaeval_questions(shared):
    for name, least in (("cross_mmlu", 0.5), ("cross_logiqa", 0.95)):
        rows = json.loads((shared / "seaeval" / f"{name}.json").read_text(encoding="utf-8"))
        for code in SEAEVAL:
            found = Counter(identify(row[LANGUAGES[code]]["question"], SEAEVAL) for row in rows)
            # short Malay questions often have no word that Indonesian lacks
            assert found[code] / len(rows) >= (least if code == "ms" else 0.95), (name, code, found)


def test_xquad_contexts_in_all_its_languages(shared):
    codes = ("ar", "de", "el", "en", "es", "hi", "ro", "ru", "th", "tr", "vi", "zh")
    corpus = load_corpus(Source(name="x", path=str(shared / "xquad" / "xquad.{lang}.json"), limit=150), codes)
    for code in codes:
        found = sum(identify(record.texts[code].input, tuple(LANGUAGES)) == code for record in corpus)
        assert found / len(corpus) >= 0.97, (code, found)
