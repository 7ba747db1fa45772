"""The scoring program: real logs, SeaEval's layout both ways, and every fault a log can have."""

import csv
import gzip
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from crossin_jax.config import UserError
from crossin_jax.evaluation.items import Item, Version
from crossin_jax.evaluation.predictions import Answer, ItemAnswers, Predictions
from crossin_jax.evaluation.seaeval import read_log, write_json, write_log
from crossin_jax.score import main
from crossin_jax.tables import STYLES

CHOICES = ["(A) one", "(B) two", "(C) three"]


def version(prediction="(B)", answer="(B) two", choices=CHOICES):
    return {
        "question": "1 + 1?",
        "choices": list(choices),
        "answer": answer,
        "model_prediction": prediction,
    }


def row(id="test_1", **versions):
    return {"id": id} | (versions or {"English": version(), "Chinese": version("(A). (B).")})


def write(folder, rows, name="log.json"):
    path = folder / name
    path.write_text(json.dumps(rows))
    return path


def score(log, **options):
    return main(
        SimpleNamespace(
            **{
                "log": str(log),
                "answers": None,
                "mode": "expectation",
                "rankc": "softmax",
                "out": None,
                "alignments": None,
                "seed": 0,
                "few_shot": "auto",
                "format": "text",
            }
            | {key: str(value) if key != "seed" else value for key, value in options.items()}
        )
    )


def test_real_log_end_to_end(shared, tmp_path):
    log = shared / "seaeval" / "logs" / "mistral_7b_v0_1" / "cross_mmlu" / "five_shot_p1.json.gz"
    out, alignments = tmp_path / "score.json", tmp_path / "aligned.json"
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "crossin_jax.score",
            "--log",
            log,
            "--out",
            out,
            f"--alignments={alignments}",
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    assert (
        "150 items, 7 languages" in done.stdout
        and "accuracy/Filipino" in done.stdout
        and done.stderr == ""
    )
    published = json.loads(log.with_name("five_shot_p1_score.json").read_text())
    scores = json.loads(out.read_text())
    ours = scores.pop("crossin_jax")
    assert scores == published and list(scores) == list(published)
    assert (
        ours["num_items"] == 150
        and ours["least"]["AC3_3"] == ours["most"]["AC3_3"] == published["AC3_3"]
    )
    low, high = ours["intervals_95"]["AC3_3"]
    assert low < published["AC3_3"] < high
    assert ours["readers"]["English"]["agreement"] == 1
    assert json.loads(alignments.read_text()) == json.loads(
        log.with_name("five_shot_p1_aligned.json").read_text()
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["aligned.json", "score.json"]


@pytest.mark.parametrize("style", STYLES)
def test_scores_and_rates_are_printed_in_every_style(style, tmp_path, capsys):
    log = write(tmp_path, [row(f"q{i}") for i in range(3)])
    answers = tmp_path / "answers.jsonl"
    answers.write_text('{"language": "en", "text": "The capital is Lima, as everybody knows."}\n')
    marks = {
        "text": ("score  95 %: low", "language  answers"),
        "markdown": ("| score | 95 %: low |", "| language | answers |"),
        "latex": (r" & score & 95 \%: low", r"language & answers"),
        "csv": (",score,95 %: low,high", "language,answers,"),
    }[style]
    score(log, format=style)
    said = capsys.readouterr()
    assert marks[0] in said.out and "accuracy/English" in said.out.replace("\\", "")
    if style == "csv":
        assert "3 items" in said.err
        rows = list(csv.DictReader(said.out.splitlines()))
        assert float(rows[0]["95 %: low"]) <= float(rows[0]["score"]) <= float(rows[0]["high"])
    score("", answers=answers, format=style)
    assert marks[1] in capsys.readouterr().out


def test_equal_choices_of_a_log_are_a_tie(tmp_path):
    """Without a text the likeliest choice counts, and all choices that look like it."""
    choices = ["(A) Rom", "(B) Oslo", "(C) Rom"]
    for scores, candidates in (
        ([-1.0, -2.0, -1.1], (0, 2)),
        ([-1.2, -2.0, -1.1], (0, 2)),
        ([-1.0, -0.5, -1.0], (1,)),
    ):
        rows = [{"English": version(answer=choices[1], choices=choices)}]
        del rows[0]["English"]["model_prediction"]
        rows[0]["English"]["log_likelihoods"] = scores
        found = read_log(write(tmp_path, rows)).items[0].answers["English"]
        assert (found.candidates, found.scores) == (candidates, tuple(scores))
        assert found.reason == ("tie" if len(candidates) > 1 else "matched")


def test_every_mode_on_a_log_with_coins(shared, tmp_path, capsys):
    log = shared / "seaeval" / "logs" / "llama_2_7b_chat" / "cross_mmlu" / "zero_shot_p1.json.gz"
    results = {}
    for mode in ("expectation", "seaeval", "strict"):
        score(log, mode=mode, out=tmp_path / "out.json", alignments=tmp_path / "aligned.json")
        results[mode] = json.loads((tmp_path / "out.json").read_text())
        assert results[mode]["crossin_jax"]["mode"] == mode
        table = capsys.readouterr().out
        assert "tie 13.9%" in table and ("least   most" in table) == (mode == "expectation")
    assert results["strict"]["overall_acc"] < results["expectation"]["overall_acc"]
    assert (
        results["expectation"]["crossin_jax"]["least"]["accuracy"]
        == results["strict"]["overall_acc"]
    )
    expected = json.loads(log.with_name("zero_shot_p1_aligned.json").read_text())
    assert json.loads((tmp_path / "aligned.json").read_text()) == expected
    score(log, mode="seaeval", seed=1, out=tmp_path / "other.json")
    assert (
        json.loads((tmp_path / "other.json").read_text())["overall_acc"]
        != results["seaeval"]["overall_acc"]
    )


def test_small_log_by_hand(tmp_path):
    log = write(tmp_path, [row(), row("test_2", English=version(""), Chinese=version("(B)"))])
    score(log, out=tmp_path / "out.json", alignments=tmp_path / "aligned.json")
    scores = json.loads((tmp_path / "out.json").read_text())
    assert scores["language_acc"] == {"English": (1 + 1 / 3) / 2, "Chinese": (1 / 2 + 1) / 2}
    assert scores["consistency_score_2"] == pytest.approx((1 / 2 + 1 / 3) / 2)
    assert scores["detailed_consistency_score"]["2_combine"].keys() == {"English,Chinese"}
    assert json.loads((tmp_path / "aligned.json").read_text()) == [
        {"id": "test_1", "English": 1, "Chinese": [0, 1]},
        {"id": "test_2", "English": [0, 1, 2], "Chinese": 1},
    ]


def test_columns_of_any_name_ten_choices_tags_and_ids(tmp_path):
    ten = [f"({letter}) x{letter}" for letter in "ABCDEFGHIJ"]
    rows = [
        {
            "id": 7,
            "subject": "sums",
            "tags": ["opaque"],
            "Klingon": version("(J)", "(J) xJ", ten),
            "Old Norse": version("xj", "(J) xJ", ten),
        }
    ]
    predictions = read_log(write(tmp_path, rows))
    assert predictions.languages == ("Klingon", "Old Norse") and predictions.benchmark == "log"
    (item,) = predictions.items
    assert (item.id, item.num_choices, item.tags) == ("7", 10, ("opaque",))
    assert item.gold["Klingon"] == 9 and item.answers["Old Norse"].candidates == (9,)
    score(tmp_path / "log.json", alignments=tmp_path / "a.json.gz")
    assert json.loads(gzip.decompress((tmp_path / "a.json.gz").read_bytes())) == [
        {"id": 7, "Klingon": 9, "Old Norse": 9}
    ]


def test_five_shot_answers_end_at_their_first_line_break(tmp_path):
    rows = [
        row(
            English=version("(B) two\n\nQuestion:\nAnd 2?\n\nAnswer:\n(A). (A). (A)."),
            Chinese=version("\n(B)"),
        )
    ]
    for name, few_shot, candidates in (
        ("five_shot_p1.json", "auto", (1, [0, 1, 2])),
        ("cross_mmlu_few_shot.json", "auto", (1, [0, 1, 2])),
        ("zero_shot.json", "auto", (0, 1)),
        ("zero_shot.json", "yes", (1, [0, 1, 2])),
        ("five_shot_p1.json", "no", (0, 1)),
    ):
        score(write(tmp_path, rows, name), few_shot=few_shot, alignments=tmp_path / "a.json")
        assert json.loads((tmp_path / "a.json").read_text()) == [
            {"id": "test_1", "English": candidates[0], "Chinese": candidates[1]}
        ], name


def without(key):
    return {k: v for k, v in version().items() if k != key}


FAULTS = {
    "object": ({"English": version()}, ["holds an object, but a log is a list", "list"]),
    "nothing": ([], ["empty list"]),
    "row": ([row(), "x"], ["row 2", "'x'"]),
    "no languages": ([{"id": "test_1"}], ["no row has a language"]),
    "missing language": (
        [row(), row("test_2", English=version())],
        ["'test_2'", "Chinese missing", "add it"],
    ),
    "null language": (
        [row(), row("test_2", English=version(), Chinese=None)],
        ["'test_2'", "Chinese missing"],
    ),
    "no gold": ([row(English=without("answer"))], ["'test_1'", "English", "no gold"]),
    "other gold": (
        [row(English=version(answer="(D) four"))],
        ["'test_1'", "English", "'(D) four'", "among"],
    ),
    "no choices": ([row(English=without("choices"))], ["'test_1'", "English", "choices=None"]),
    "one choice": (
        [row(English=version(choices=CHOICES[:1]))],
        ["English", "1 choices", "2 to 10"],
    ),
    "eleven choices": (
        [row(English=version(choices=CHOICES * 4))],
        ["English", "12 choices", "2 to 10"],
    ),
    "odd choices": (
        [row(Chinese=version(), English=version(choices=CHOICES[:2]))],
        ["'test_1'", "Chinese 3, English 2", "parallel"],
    ),
    "no prediction": (
        [row(English=without("model_prediction"))],
        ["'test_1'", "English", "no model_prediction"],
    ),
    "null prediction": (
        [row(English=version(None))],
        ["'test_1'", "English", "model_prediction=None"],
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faulty_rows_name_item_and_language(fault, tmp_path):
    rows, words = FAULTS[fault]
    log = write(tmp_path, rows)
    with pytest.raises(UserError) as error:
        score(log, out=tmp_path / "out.json", alignments=tmp_path / "aligned.json")
    for word in [str(log), *words]:
        assert word in str(error.value)
    assert len(str(error.value).splitlines()) <= 3
    assert [p.name for p in tmp_path.iterdir()] == ["log.json"]


def test_faulty_files(tmp_path):
    whole = gzip.compress(json.dumps([row()] * 50).encode())
    bad = {
        "cut.json.gz": (whole[:-20], "damaged gzip"),
        "head.json.gz": (b"xx" + whole, "not UTF-8"),  # its first bytes are not those of gzip
        "flip.json.gz": (whole[:60] + bytes([whole[60] ^ 255]) + whole[61:], "damaged gzip"),
        "cut.json": (b'[{"id": 1,\n "Eng', "line 2"),
        "binary.json": (b"\xff\xfe", "UTF-16"),
        "deep.json": (b"[" * 100_000, "nested too deeply"),
    }
    for name, (content, words) in bad.items():
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(UserError, match=words) as error:
            score(path)
        assert str(path) in str(error.value)
    with pytest.raises(UserError, match="no such file"):
        score(tmp_path / "none.json")
    with pytest.raises(UserError, match="a folder; name a file in it"):
        score(tmp_path)


def test_outputs_are_checked_before_any_work(tmp_path):
    log = write(tmp_path, [row()])
    before = log.read_bytes()
    for options, words in [
        ({"out": log}, "same file as --log"),
        ({"out": tmp_path}, "a folder"),
        ({"out": "/dev/null"}, "not a regular file"),
        ({"out": tmp_path / "no" / "out.json"}, "does not exist"),
        ({"out": tmp_path / "x.json", "alignments": tmp_path / "x.json"}, "same file as --out"),
        ({"mode": "expected"}, "did you mean expectation"),
    ]:
        with pytest.raises(UserError, match=words):
            score(log, **options)
    with pytest.raises(UserError, match="--log is missing"):
        score("")
    assert log.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["log.json"]


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "out.json"
    path.write_text("old")

    def full(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(UserError, match="No space left"):
        write_json(path, {"a": 1})
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["out.json"]


def test_program_exits_with_two_and_no_traceback(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "crossin_jax.score", f"--log={tmp_path / 'none.json'}"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and done.stdout == ""
    assert (
        done.stderr.startswith("error: ")
        and "none.json" in done.stderr
        and "Traceback" not in done.stderr
    )


def test_written_log_reads_back(tmp_path):
    items = [
        Item(
            "one",
            {code: Version("1 + 1?", tuple(CHOICES), 1, context) for code in ("en", "zh")},
            ("opaque",),
        )
        for context in ("In base 10.",)
    ]
    answers = {
        "en": Answer((1,), "matched", "I say (B)."),
        "zh": Answer((2,), scores=(-3.0, -2.0, -1.0)),
    }
    predictions = Predictions(
        "sums",
        "generate",
        1,
        ("en", "zh"),
        (ItemAnswers("one", {"en": 1, "zh": 1}, 3, answers, ("opaque",)),),
    )
    write_log(tmp_path / "log.json.gz", items, predictions)
    (written,) = json.loads(gzip.decompress((tmp_path / "log.json.gz").read_bytes()))
    assert written["English"] == {
        "question": "1 + 1?",
        "context": "In base 10.",
        "choices": CHOICES,
        "answer": "(B) two",
        "model_prediction": "I say (B).",
    }
    back = read_log(tmp_path / "log.json.gz", benchmark="sums")
    (item,) = back.items
    assert back.languages == ("English", "Chinese") and item.tags == ("opaque",)
    assert item.answers["English"].candidates == (1,) and item.answers["Chinese"].candidates == (2,)


def test_any_free_answers_have_pass_rates(tmp_path, capsys):
    """Rows as JSON Lines and as CSV; languages in any spelling; a mean over sources, then over
    languages.
    """
    rows = [
        {"source": "a", "language": "French", "completion": "La capitale de la France est Paris"},
        {"source": "b", "language": "fra_Latn", "completion": "The capital of France is Paris"},
        {"source": "a", "language": "ru", "completion": "Столица Франции это город Париж because"},
    ]
    lines, table = tmp_path / "a.jsonl", tmp_path / "a.csv"
    lines.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    table.write_text("\n".join(",".join(row) for row in ([*rows[0]], *map(dict.values, rows))))
    found = []
    for path in (lines, table):
        out, none = tmp_path / "out", dict.fromkeys(("log", "alignments"))
        flags = SimpleNamespace(answers=str(path), out=out, format="text", **none)
        assert main(flags) == 0
        found.append(json.loads((tmp_path / "out").read_text())["rates"])
        assert "word pass" in capsys.readouterr().out
    assert found[0] == found[1]
    rates = {(r["source"], r["language"]): (r["line_pass"], r["word_pass"]) for r in found[0]}
    assert rates == {
        ("a", "fr"): (1.0, None),
        ("b", "fr"): (0.0, None),
        ("a", "ru"): (1.0, 0.0),
        ("all", "fr"): (0.5, None),
        ("all", "ru"): (1.0, 0.0),
        ("a", "all"): (1.0, 0.0),
        ("b", "all"): (0.0, None),
        ("all", "all"): (0.75, 0.0),
    }


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "x", "not a known ending"),
        ("a.jsonl", "", "no answers in it"),
        ("a.jsonl", '{"language": "fr", "txt": "x"}', "row 1: no text; columns: language, txt"),
        ("a.jsonl", '{"text": "x"}', "row 1: no language"),
        ("a.jsonl", '{"language": "zz", "text": "x"}', "row 1: 'zz' is not a known language"),
    ],
)
def test_answers_that_cannot_be_read_are_refused(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    flags = SimpleNamespace(
        answers=str(tmp_path / name), log=None, alignments=None, out=None, format="text"
    )
    with pytest.raises(UserError, match=message):
        main(flags)
