"""The benchmark built from XQuAD: parallel, unambiguous, balanced, and honest about what it is."""

import json
from collections import Counter

import pytest

from crossin_jax.config import UserError
from crossin_jax.languages import LANGUAGES
from crossin_jax.prepare.cross_xquad import NOTICE, XQUAD_LANGUAGES, build_cross_xquad

ANSWERS = {
    "en": ["1961", "in 1961", "Rome", "rome.", "Oslo", "the Rhine"],
    "es": ["1961", "en 1961", "Roma", "Roma", "Oslo", "el Rin"],
}
NEXT = {"en": ["Bern", "Graz"], "es": ["Berna", "Graz"]}


def write(folder, code, answers, more=(), ids="q"):
    def paragraph(number, texts):
        return {
            "context": f"{code} paragraph {number}",
            "qas": [
                {
                    "id": f"{ids}{number}{i}",
                    "question": f"{code} {number}.{i}?",
                    "answers": [{"text": t}],
                }
                for i, t in enumerate(texts)
            ],
        }

    data = {"data": [{"title": "t", "paragraphs": [paragraph(0, answers), paragraph(1, more)]}]}
    (folder / f"xquad.{code}.json").write_text(json.dumps(data))


@pytest.fixture
def folder(tmp_path):
    for code, answers in ANSWERS.items():
        write(tmp_path, code, answers, NEXT[code])
    return tmp_path


def gold(row, code):
    version = row[LANGUAGES[code]]
    return version["choices"].index(version["answer"])


def concepts(row, code):
    """Which answers the choices are, by their number."""
    texts = ANSWERS[code] + NEXT[code]
    return [texts.index(choice[4:]) for choice in row[LANGUAGES[code]]["choices"]]


def test_choices_are_the_same_answers_in_every_language_and_never_twice(folder):
    rows = build_cross_xquad(folder, ["en", "es"])
    assert len(rows) == 8
    for row in rows:
        fold = {2: 2, 3: 2}  # "Rome" and "rome." are one answer
        en, es = ([fold.get(i, i) for i in concepts(row, code)] for code in ("en", "es"))
        assert en == es and len(set(en)) == 4
        assert gold(row, "en") == gold(row, "es")
        assert [choice[:4] for choice in row["English"]["choices"]] == [
            "(A) ",
            "(B) ",
            "(C) ",
            "(D) ",
        ]
        assert row["source"] == NOTICE and "not SeaEval" in NOTICE


def test_own_paragraph_comes_first_and_fillers_are_tagged(folder):
    for row in build_cross_xquad(folder, ["en", "es"]):
        paragraphs = {0 if i < 6 else 1 for i in concepts(row, "en")}
        own = 0 if row["English"]["context"].endswith("0") else 1
        assert ("other_paragraph" in row["tags"]) == (paragraphs != {own})
        # Two questions there: two fillers each.
        assert (own == 1) == ("other_paragraph" in row["tags"])


def test_overlapping_texts_are_the_last_resort(folder):
    rows = {row["id"]: row for row in build_cross_xquad(folder, ["en"])}
    # Rome, Oslo, Rhine suffice.
    assert "overlapping" not in rows["q00"]["tags"] and "(in 1961)" not in str(rows["q00"])
    write(folder, "en", ["1961", "in 1961", "Oslo", "Bern"])
    row = build_cross_xquad(folder, ["en"])[0]
    assert row["tags"] == ["overlapping"]


def test_an_overlap_in_one_language_counts_in_all(folder):
    write(folder, "en", ["1961", "Oslo", "Rome", "Bern", "Kyiv"])
    write(folder, "es", ["1961", "Oslo", "Roma", "Berna", "en 1961"])
    row = build_cross_xquad(folder, ["en", "es"])[0]
    assert (
        "(B) Kyiv" not in str(row)
        and not row["tags"]
        and "Kyiv" not in str(row["English"]["choices"])
    )


def test_draws_depend_on_the_seed_alone(folder):
    first, same, other = (build_cross_xquad(folder, ["en", "es"], seed) for seed in (0, 0, 1))
    assert first == same != other


@pytest.mark.parametrize(
    ("break_it", "words"),
    [
        (
            lambda f: (f / "xquad.es.json").unlink(),
            "xquad.es.json: no such file; XQuAD's file of 'es' belongs there",
        ),
        (lambda f: (f / "xquad.es.json").write_text("{"), "xquad.es.json: not JSON at column 2"),
        (lambda f: (f / "xquad.es.json").write_text('{"data": [{}]}'), "KeyError: 'paragraphs'"),
        (
            lambda f: write(f, "es", ANSWERS["es"], NEXT["es"], ids="other"),
            "'other00' is not in every language",
        ),
        (
            lambda f: write(f, "es", [" ", *ANSWERS["es"][1:]], NEXT["es"]),
            "'q00': an empty context, question or answer",
        ),
        (lambda f: [write(f, code, ["a", "b", "a."]) for code in ANSWERS], "has 1 other answers"),
    ],
)
def test_faults_name_file_and_question(folder, break_it, words):
    break_it(folder)
    with pytest.raises(UserError) as error:
        build_cross_xquad(folder, ["en", "es"])
    assert words in str(error.value)


def test_a_language_that_xquad_lacks_is_refused(folder):
    with pytest.raises(UserError, match="XQuAD has no 'id'"):
        build_cross_xquad(folder, ["en", "id"])


def test_all_questions_of_xquad_in_all_its_languages(shared):
    rows = build_cross_xquad(shared / "xquad" / "xquad.{lang}.json", XQUAD_LANGUAGES)
    assert len(rows) == 1190
    positions = {code: [gold(row, code) for row in rows] for code in XQUAD_LANGUAGES}
    assert all(each == positions["en"] for each in positions.values())
    assert sorted(Counter(positions["en"]).values()) == [297, 297, 298, 298]
    for code in XQUAD_LANGUAGES:
        assert all(len(set(row[LANGUAGES[code]]["choices"])) == 4 for row in rows)
    tags = Counter(tag for row in rows for tag in row["tags"])
    # Paragraphs with fewer than four distinct answers.
    assert tags == {
        "other_paragraph": 83,
        "overlapping": 26,
    }


def test_the_benchmark_loader_reads_the_rows(folder, tmp_path):
    from crossin_jax.evaluation.benchmarks import load_benchmark

    rows = build_cross_xquad(folder, ["en", "es"])
    (tmp_path / "mine.json").write_text(json.dumps(rows))
    benchmark = load_benchmark(str(tmp_path / "mine.json"), ["en", "es"])
    assert [item.tags for item in benchmark.items] == [tuple(row["tags"]) for row in rows]
    assert all(
        item.versions["es"].answer == gold(row, "es")
        for item, row in zip(benchmark.items, rows, strict=True)
    )
