"""SeaEval's alignment: every published answer, the corner cases of its rules; and our own
reader.
"""

import gzip
import json
import unicodedata

import pytest

from crossin_jax.evaluation.answers import LETTERS, align, compare_readers, read_choice
from crossin_jax.evaluation.layouts import find_gold
from crossin_jax.languages import canonical

CITIES = ["(A) Paris", "(B) Rome", "(C) Oslo", "(D) Rome by night"]
TEN = [f"({letter}) {letter * 2}" for letter in LETTERS]

# what TiGEr-Eval picks, or tosses a coin between; run with its random.choice recorded
CASES = [
    # labels and whole choices; the longest counts, and of equally long ones the earlier choice
    (CITIES, "(B)", (1,)),
    (CITIES, "b) Rome", (1,)),
    (CITIES, "The answer is (b).", (1,)),
    (CITIES, "(B) Rome by night", (1,)),
    (CITIES, "(d) rome by night", (3,)),
    (CITIES, "(A) (B)", (0,)),
    (CITIES, "(B) (A)", (0,)),
    (["(B) first", "(A) second"], "(B)", (1,)),
    (["(B) first", "(A) second"], "(B) first", (0,)),
    # votes of sentences; of three equals the two that came first
    (CITIES, "(A). (B). (B).", (1,)),
    (CITIES, "(A). (B).", (0, 1)),
    (CITIES, "(C). (B). (A).", (1, 2)),
    (CITIES, "Paris. Rome. Paris.", (0,)),
    (CITIES, "Paris. Rome. Oslo", (0, 1)),
    # nothing said, nothing read
    (CITIES, "", (0, 1, 2, 3)),
    (CITIES, " \n", (0, 1, 2, 3)),
    (CITIES, "...", (0, 1, 2, 3)),
    (CITIES, "I do not know", (0, 1, 2, 3)),
    # bare letters: A only as a capital, so that an article is none (save at the start)
    (CITIES, "A", (0,)),
    (CITIES, "a", (0, 1, 2, 3)),
    (CITIES, "A city", (0,)),
    (CITIES, "b", (1,)),
    (CITIES, "It is B of course", (1,)),
    (CITIES, "B A", (0,)),
    (CITIES, "It costs $A", (0, 1, 2, 3)),
    (TEN, "J", (9,)),
    (TEN, "(j)", (9,)),
    (TEN, "hh, I think", (8,)),
    # texts of choices
    (CITIES, "it is Rome", (1,)),
    (CITIES, "ROME BY NIGHT", (3,)),
    (CITIES, "Rome, Paris", (0,)),
    (["(A) x", "(B) yy"], "x", (0, 1)),
    (["(A) x", "(B) yy"], "yy", (1,)),
    (["(A) ß", "(B) SS"], "ss", (1,)),
    (["(A) İzmir", "(B) Ankara"], "i̇zmir", (0,)),
    # punctuation: brackets of other scripts become ASCII in the answer, not in the choices; full
    # stops end sentences
    (CITIES, "（B）", (1,)),
    (CITIES, "（Ｂ）", (0, 1, 2, 3)),
    (CITIES, "【A】", (0,)),
    (CITIES, "答案是B。", (0, 1, 2, 3)),
    (CITIES, "答案是 B 。", (1,)),
    (["(A) 3.5", "(B) 3.7", "(C) 4"], "3.7", (0, 1, 2)),
    (["(A) 3.5", "(B) 3.7", "(C) 4"], "It is 4", (0, 1, 2)),
    (["(A) Who? Me", "(B) You"], "who? nobody", (0, 1)),
    (["(A) 他说：“好”", "(B) 不"], "他说：“好”", (0, 1)),
    # choices without labels, equal choices, empty choices
    (["yes", "no"], "no.", (1,)),
    (["same", "same", "other"], "same", (0,)),
    (["same", "other", "same"], "other. same.", (0, 1)),
    (["", ""], "x", (0,)),
    # an answer of full stops alone is read as the words "nothing here actually"
    (["yes", "no"], "?!", (1,)),
    (["(A) yes", "(B) no"], "?!", (1,)),
    (["(A) ", "(B) x"], "...", (0,)),
]


@pytest.mark.parametrize(("choices", "text", "candidates"), CASES)
def test_align_follows_seaeval(choices, text, candidates):
    assert align(choices, text).candidates == candidates
    assert align(tuple(choices), text).text == text


@pytest.mark.parametrize("word", ["Việt Nam", "café", "Ángel", "한국", "Ωμέγα"])
@pytest.mark.parametrize("forms", [("NFC", "NFD"), ("NFD", "NFC"), ("NFD", "NFD")])
def test_texts_that_look_the_same_are_the_same(word, forms):
    """Characters of the choice and of the answer may be composed or not."""
    choice, answer = (unicodedata.normalize(form, word) for form in forms)
    choices = [f"(A) {choice}", "(B) Oslo"]
    for text in (f"It is {answer}", f"(A) {answer}", answer):
        assert align(choices, text).candidates == (0,)
        assert align(choices, text).text == text
    assert read_choice(choices, answer).candidates == (0,)
    row = {"question": "q", "choices": choices, "answer": answer}
    assert find_gold(row["answer"], tuple(row["choices"]), "place") == 0


def test_reasons():
    assert align(CITIES, "(B)").reason == "matched"
    assert align(CITIES, "(A). (B)").reason == "tie"
    assert align(CITIES, "\t").reason == "empty"
    assert align(CITIES, "?").reason == "unreadable"


def test_more_than_ten_choices_are_refused():
    with pytest.raises(ValueError, match="11 choices"):
        align(["x"] * 11, "x")


def test_every_published_answer(shared):
    """14,742 answers of seven models in seven languages (docs/results.md)."""
    num_answers = 0
    for log in sorted((shared / "seaeval" / "logs").glob("*/*/*.json.gz")):
        rows = json.loads(gzip.decompress(log.read_bytes()))
        expected = json.loads(
            log.with_name(log.name.replace(".json.gz", "_aligned.json")).read_text()
        )
        for row, picks in zip(rows, expected, strict=True):
            for language in row.keys() - {"id"}:
                got = align(row[language]["choices"], row[language]["model_prediction"]).candidates
                pick = picks[language]
                assert got == (tuple(sorted(pick)) if isinstance(pick, list) else (pick,)), (
                    log,
                    row["id"],
                    language,
                )
                num_answers += 1
    assert num_answers == 14_742


@pytest.mark.parametrize(
    ("language", "text"),
    [
        ("en", "Answer: B"),
        ("en", "The correct answer is **B**."),
        ("en", "B"),
        ("en", "b)"),
        ("en", "**B.** Rome"),
        ("en", "Ｂ"),
        ("en", "(Ｂ)"),
        ("en", "ROME!"),
        ("en", "I would go with option B."),
        ("en", "The answer is Rome"),
        ("en", "The correct answer is (B). Option A is wrong because (C)"),
        ("id", "Jawaban: B"),
        ("id", "Jawabannya adalah (b)"),
        ("ms", "Jawapan: B."),
        ("fil", "Ang tamang sagot ay B"),
        ("vi", "Đáp án đúng là B"),
        ("es", "La respuesta correcta es la B."),
        ("zh", "答案：B"),
        ("zh", "正确答案是（Ｂ）"),
        ("zh", "选B"),
        ("zh", "乙"),
        ("zh", "答案：乙"),
        ("ru", "Ответ: Б"),
        ("ru", "Ответ: B"),
        ("th", "คำตอบคือ ข"),
        ("ar", "الجواب هو ب"),
        ("el", "Απάντηση: Β"),
        ("hi", "उत्तर: ख"),
        ("tr", "Cevap: B"),
        ("de", "Die Antwort ist B."),
        ("ro", "Răspuns: B"),
    ],
)
def test_reader_finds_the_letter(language, text):
    answer = read_choice(CITIES, text, language)
    assert (answer.candidates, answer.reason) == ((1,), "matched")


@pytest.mark.parametrize(
    ("text", "reason", "candidates"),
    [
        ("A city in Italy", "unreadable", (0, 1, 2, 3)),
        ("An answer a day", "unreadable", (0, 1, 2, 3)),
        ("Answer: E", "unreadable", (0, 1, 2, 3)),
        ("Romeo", "unreadable", (0, 1, 2, 3)),
        (" ", "empty", (0, 1, 2, 3)),
        ("It is rome by night", "matched", (3,)),
        ("Paris or Rome", "tie", (0, 1)),
        ("Answer: A, or rather answer: C", "tie", (0, 2)),
        ("either (C) or (D)", "tie", (2, 3)),
    ],
)
def test_reader_does_not_guess(text, reason, candidates):
    answer = read_choice(CITIES, text)
    assert (answer.reason, answer.candidates) == (reason, candidates)


def test_reader_knows_texts_without_spaces():
    assert read_choice(["(A) 北京", "(B) 上海"], "我认为是上海市", "zh").candidates == (1,)
    assert read_choice(["(A) 3.5", "(B) 3"], "3.5").candidates == (0,)


def test_readers_compared(shared):
    answers = [
        (CITIES, "(B)", "en"),
        (CITIES, "A city", "en"),
        (CITIES, "", "en"),
        (CITIES, "(A) (B)", "en"),
        (CITIES, "The answer is (C), not (A)", "en"),
    ]
    readings = compare_readers(answers)
    assert readings.num_answers == 5
    assert readings.seaeval_certain == 4 / 5
    assert readings.ours_certain == 3 / 5  # not "A city", and nothing
    assert readings.agreement == 2 / 3  # SeaEval reads the last as (A)
    assert compare_readers([]).agreement is None

    log = shared / "seaeval" / "logs" / "llama_2_7b_chat" / "cross_mmlu" / "zero_shot_p1.json.gz"
    rows = json.loads(gzip.decompress(log.read_bytes()))
    real = compare_readers(
        (v["choices"], v["model_prediction"], canonical(k))
        for row in rows
        for k, v in row.items()
        if k != "id"
    )
    assert real.agreement > 0.99 and real.ours_certain > real.seaeval_certain
