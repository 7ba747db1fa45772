"""Translation: what is missing is filled once, resumed after a stop, and flagged where it looks
wrong.
"""

import json
import sys

import pytest

from crossin_jax.config import Source, UserError
from crossin_jax.data.corpus import load_corpus
from crossin_jax.prepare.translate import Cache, fill, find_flags, request, run_command
from tests.data.conftest import parallel_rows, write_lines

CODES = ("en", "zh", "es")


def translator(calls):
    def translate(texts, source, target):
        calls.append((len(texts), source, target))
        return [f" {target}:{text} " for text in texts]

    return translate


@pytest.fixture
def corpus(tmp_path):
    rows = parallel_rows(6, ("en", "zh"))
    del rows[2]["zh"], rows[4]["zh"]
    return load_corpus(Source(name="s", path=write_lines(tmp_path / "rows.jsonl", rows)), CODES)


def test_only_what_is_missing_is_translated(corpus, tmp_path):
    calls = []
    out = tmp_path / "full.jsonl"
    counts = fill(corpus, CODES, "en", translator(calls), out, engine="e1")
    full = load_corpus(Source(name="s", path=str(out)), CODES)
    assert list(full.ids()) == list(corpus.ids()) and full.languages == CODES
    for before, after in zip(corpus, full, strict=True):
        assert all(after.texts[code] == text for code, text in before.texts.items())
    assert full[2].texts["zh"].instruction == f"zh:{corpus[2].texts['en'].instruction}"
    assert full[4].texts["zh"].input == "" and full[0].texts["es"].input == "es:en input 0"
    assert counts["zh: records filled"] == 2 and counts["es: records filled"] == 6
    again = []
    fill(corpus, CODES, "en", translator(again), out, engine="e1")
    assert again == []  # all of it from the cache
    fill(corpus, CODES, "en", translator(again), out, engine="another")
    assert again  # another engine's translations are not ours


def test_a_stopped_run_goes_on_where_it_was(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr("crossin_jax.prepare.translate.BATCH", 3)
    out, calls = tmp_path / "full.jsonl", []

    def failing(texts, source, target):
        if len(calls) == 3:
            raise KeyboardInterrupt
        return translator(calls)(texts, source, target)

    with pytest.raises(KeyboardInterrupt):
        fill(corpus, CODES, "en", failing, out, engine="e1")
    assert not out.exists()
    with open(tmp_path / "full.jsonl.cache.jsonl", "a") as file:
        file.write('{"key": "cut off by a cra')  # as a crash leaves it
    done = sum(n for n, *_ in calls)
    counts = fill(corpus, CODES, "en", translator(calls), out, engine="e1")
    assert sum(counts[f"{code}: texts from the cache"] for code in CODES) == done
    total = sum(counts[f"{code}: texts translated"] for code in CODES) + done
    assert (
        total
        == sum(n for n, *_ in calls)
        == len(
            {*map(str, calls)} and (tmp_path / "full.jsonl.cache.jsonl").read_text().splitlines()
        )
        - 1
    )


@pytest.mark.parametrize(
    ("translation", "target", "flags"),
    [
        ("塞纳河流经法国首都巴黎的市中心地带。", "zh", []),
        ("The river Seine flows through the city of Paris", "zh", ["copied source"]),
        ("", "zh", ["empty"]),
        ("塞纳", "zh", ["length ratio 0.13"]),
        ("El río Sena fluye por la ciudad de París", "zh", ["language es"]),
        ("El río Sena fluye por la ciudad de París", "es", []),
    ],
)
def test_suspicious_translations(translation, target, flags):
    assert find_flags(
        "The river Seine flows through the city of Paris", translation, "en", target
    ) == flags or (
        flags == ["language es"]
        and "language es"
        in find_flags("The river Seine flows through the city of Paris", translation, "en", target)
    )


@pytest.mark.parametrize(
    ("source", "target", "expected"),
    [("en", "fil", 1.0), ("en", "zh", 0.32), ("zh", "en", 1 / 0.32), ("de", "ar", 0.87 / 1.14)],
)
@pytest.mark.parametrize("ratio", [2.9, 3.1, 1 / 2.9, 1 / 3.1])
def test_a_translation_is_flagged_from_three_times_the_expected_length(
    source, target, expected, ratio
):
    """And below a third of it; a language needs more characters than another for the same text."""
    text, translation = "q" * 1000, "w" * round(1000 * expected * ratio)  # of no language
    flags = find_flags(text, translation, source, target)
    assert [flag.split(" ")[0] for flag in flags] == ["length"] * (not 1 / 3 <= ratio <= 3)


def test_short_texts_are_not_judged():
    """Names and numbers are alike in many languages."""
    for length in (19, 20):
        for translation, flag in (("q" * length, "copied"), ("w", "length")):
            flags = find_flags("q" * length, translation, "en", "es")
            assert [flag.split(" ")[0] for flag in flags] == [flag] * (length == 20)
    assert find_flags(" ", "anything", "en", "es") == [] and find_flags("q", "\n", "en", "es") == [
        "empty"
    ]


def test_indonesian_and_malay_pass_for_one_another():
    malay = "Kerajaan berkata bahawa syarikat itu mempunyai pejabat di bandar kerana universiti"
    english = (
        "The government said that the company has an office in the city because of the university"
    )
    assert find_flags(english, malay, "en", "id") == [] == find_flags(english, malay, "en", "ms")
    assert find_flags(english, malay, "en", "fil") == ["language ms"]


@pytest.mark.parametrize("change", ["engine", "source", "target", "text"])
def test_a_cached_translation_is_that_of_its_engine_languages_and_text(tmp_path, change):
    asked = []

    def translate(texts, source, target):
        asked.extend(texts)
        return [f"{target} {text}" for text in texts]

    def run(engine="e", source="en", target="es", text="hello"):
        row = {"id": "r", source: {"instruction": "q", "output": text}}
        path = write_lines(tmp_path / "rows.jsonl", [row])
        corpus = load_corpus(Source(name="s", path=path), (source, target))
        fill(corpus, (source, target), source, translate, tmp_path / "out.jsonl", engine=engine)
        full = load_corpus(Source(name="s", path=str(tmp_path / "out.jsonl")), (target,))
        assert full[0].texts[target].output == f"{target} {text}"
        return asked.copy()

    assert run() == ["q", "hello"] and run() == ["q", "hello"]
    new = {"engine": "other", "source": "zh", "target": "vi", "text": "bye"}[change]
    assert run(**{change: new}) == [
        "q",
        "hello",
        *(["bye"] if change == "text" else ["q", "hello"]),
    ]


def test_a_command_is_told_text_and_languages(tmp_path):
    """It answers with texts, with objects that hold a text, or with plain lines."""
    script = tmp_path / "tell.py"
    script.write_text(
        "import json, sys\nfor line in sys.stdin: print(json.dumps({'text': line.strip()}))\n"
    )
    told = run_command(f"{sys.executable} {script}")(["a", "河"], "en", "zh")
    assert [json.loads(line) for line in told] == [
        {"text": text, "source": "en", "target": "zh"} for text in "a河"
    ]
    script.write_text("print('plain words')")
    assert run_command(f"{sys.executable} {script}")(["a"], "en", "zh") == ["plain words"]


def test_an_instruction_tuned_model_is_asked_by_the_languages_names():
    assert request("zh", "fil") == (
        "Translate the following text from Chinese into Filipino. Answer with the translation only."
    )


def test_real_translations_are_rarely_flagged_and_mixed_up_ones_mostly(shared):
    codes = ("en", "zh", "vi", "es", "de", "ru", "ar", "th")
    corpus = load_corpus(
        Source(name="x", path=str(shared / "xquad" / "xquad.{lang}.json"), limit=150), codes
    )
    for code in codes[1:]:
        right = sum(
            bool(find_flags(r.texts["en"].input, r.texts[code].input, "en", code)) for r in corpus
        )
        wrong = sum(
            bool(
                find_flags(
                    r.texts["en"].input, r.texts["es" if code != "es" else "vi"].input, "en", code
                )
            )
            for r in corpus
        )
        assert right <= 3 and wrong >= 145, (code, right, wrong)


def test_flags_stay_with_their_row(corpus, tmp_path):
    out = tmp_path / "full.jsonl"
    counts = fill(corpus, CODES, "en", lambda texts, source, target: texts, out, engine="copy")
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert (
        all("copied source" in row["flags"]["es"] for row in rows) and "zh" not in rows[0]["flags"]
    )
    assert counts["es: flagged copied"] == 6 and len(rows) == 6


def test_chats_are_translated_turn_by_turn(tmp_path):
    row = {
        "id": "c",
        "en": {
            "messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
        },
    }
    corpus = load_corpus(
        Source(name="s", path=write_lines(tmp_path / "rows.jsonl", [row])), ("en", "es")
    )
    fill(corpus, ("en", "es"), "en", translator([]), tmp_path / "out.jsonl", engine="e")
    full = load_corpus(Source(name="s", path=str(tmp_path / "out.jsonl")), ("en", "es"))
    assert full[0].texts["es"].messages == (("user", "es:hi"), ("assistant", "es:ho"))


def test_external_commands_answer_line_by_line(tmp_path):
    script = tmp_path / "mt.py"
    script.write_text(
        "import json, sys\nfor line in sys.stdin:\n    row = json.loads(line)\n"
        "    print(json.dumps(row['target'] + '|' + row['text'], ensure_ascii=False))\n"
    )
    translate = run_command(f"{sys.executable} {script}")
    assert translate(["a\nb", "ñ 河"], "en", "es") == ["es|a\nb", "es|ñ 河"]
    script.write_text("import sys; sys.exit('no model here')")
    with pytest.raises(UserError, match="ended with code 1: no model here"):
        translate(["a"], "en", "es")


SEPARATORS = ["one\u2028two", "one\u2029two", "one\x85two", "one\x0ctwo", "one\x1etwo"]


@pytest.mark.parametrize(
    "dump", ["json.dumps(text)", "json.dumps(text, ensure_ascii=False)", "text"]
)
def test_only_a_line_feed_ends_a_line_of_a_command(tmp_path, dump):
    """Whether the command writes JSON or the plain text; Windows' line ends are no part of it."""
    script = tmp_path / "mt.py"
    script.write_text(
        "import json, sys\nfor line in sys.stdin.buffer:\n    text = json.loads(line)['text']\n"
        f"    sys.stdout.buffer.write(({dump} + '\\r\\n').encode())\n"
    )
    assert run_command(f"{sys.executable} {script}")(SEPARATORS, "en", "es") == SEPARATORS


def test_cached_translations_keep_their_separators(tmp_path):
    cache = Cache(tmp_path / "c.jsonl", "e")
    cache.add([(str(i), text) for i, text in enumerate(SEPARATORS)])
    assert Cache(tmp_path / "c.jsonl", "e").entries == cache.entries


def test_translators_that_lose_lines_and_rows_without_pivot_are_refused(corpus, tmp_path):
    with pytest.raises(UserError, match="gave 0 translations for"):
        fill(corpus, CODES, "en", lambda *_: [], tmp_path / "o.jsonl", engine="e")
    with pytest.raises(UserError, match="some rows have no 'zh' to translate from"):
        fill(corpus, CODES, "zh", translator([]), tmp_path / "o.jsonl", engine="e")
