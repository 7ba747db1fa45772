"""Benchmarks that are not parallel, and prompts without choices: what is measured, and what is
not.
"""

import gzip
import json
from dataclasses import replace

import numpy as np
import pytest

from crossin_jax.evaluation import metrics, separate
from crossin_jax.evaluation.benchmarks import load_benchmark
from crossin_jax.evaluation.predictions import Answer, ItemAnswers, Predictions, decode, encode
from crossin_jax.evaluation.seaeval import write_rows
from crossin_jax.evaluation.stats import resample
from crossin_jax.report.results import read_results, write_results
from crossin_jax.report.summary import Run, summarise
from crossin_jax.score import read_free_answers
from tests.evaluation.asking import ask, make_config
from tests.helpers import print_table

SEPARATE = {
    "en": [(0, (0,)), (1, (0, 1)), (1, (1,))],  # gold, candidates: right, a coin, right
    "es": [(0, (1,)), (1, (1,))],
    "zh": [(1, (0,))],
}


def separate_run(changes=None) -> Predictions:
    """Items of one language each; accuracy is 2.5 of 3, 1 of 2 and 0 of 1."""
    items = [
        ItemAnswers(
            f"{code}/{i}",
            {code: gold},
            2,
            {code: Answer((changes or {}).get(f"{code}/{i}", candidates))},
            ("culture: sensitive",) if i else (),
        )
        for code, answers in SEPARATE.items()
        for i, (gold, candidates) in enumerate(answers)
    ]
    return Predictions("include", "sum", 1, tuple(SEPARATE), tuple(items), "separate")


def open_run(texts: dict[str, list[str]]) -> Predictions:
    items = [
        ItemAnswers(f"{code}/{i}", {}, 0, {code: Answer((), "open", text)})
        for code, answers in texts.items()
        for i, text in enumerate(answers)
    ]
    return Predictions("confusion", "generate", 0, tuple(texts), tuple(items), "open")


def test_separate_items_have_accuracy_by_language_and_nothing_else():
    scores = separate.evaluate(separate_run())
    assert scores.flatten() == pytest.approx(
        {
            "accuracy": (2.5 / 3 + 0.5 + 0) / 3,
            "accuracy/en": 2.5 / 3,
            "accuracy/es": 0.5,
            "accuracy/zh": 0,
        }
    )
    assert scores.least.accuracy == pytest.approx((2 / 3 + 0.5) / 3)
    assert scores.most.accuracy == pytest.approx((1 + 0.5) / 3)
    assert scores.num_items == 6 and list(scores.coin_share) == ["en", "es", "zh"]
    strict = separate.evaluate(separate_run(), "strict")
    assert strict.accuracy == pytest.approx((2 / 3 + 0.5) / 3) and strict.least is None


def test_a_parallel_benchmark_is_measured_as_ever():
    items = [
        ItemAnswers(str(i), {"en": 0, "es": 0}, 2, {c: Answer((i % 2,)) for c in ("en", "es")})
        for i in range(4)
    ]
    run = Predictions("p", "sum", 1, ("en", "es"), tuple(items))
    assert separate.evaluate(run).flatten() == metrics.evaluate(run).flatten()


def test_resamples_weigh_each_language_by_itself():
    """Items of Spanish drawn twice change Spanish alone, and what is not drawn is left out."""
    run = separate_run()
    scores = separate.item_scores(run, others=("es", "zh"))
    weights = np.array([[1, 1, 1, 1, 1, 1], [0, 0, 1, 2, 1, 2], [1, 0, 0, 0, 0, 0]]) / 6
    found = {name: score.weigh(weights).tolist() for name, score in scores.items()}
    assert found["accuracy/en"] == pytest.approx([2.5 / 3, 1, 1])
    assert found["accuracy/es"] == pytest.approx([0.5, 1 / 3, 0])
    assert found["accuracy"] == pytest.approx([4 / 9, 4 / 9, 1])
    assert found["accuracy/others"] == pytest.approx([0.25, 1 / 6, 0])
    drawn = resample([run], separate.item_scores, seed=1, num_resamples=50)
    assert all(np.isfinite(values).all() for values in drawn.values())


def test_the_report_says_that_only_accuracy_is_measured(tmp_path):
    runs = [
        Run("base", 1, [separate_run()]),
        Run("tuned", 1, [separate_run({"zh/0": (1,), "es/0": (0,)})]),
    ]
    blocks = write_results(tmp_path, runs)
    assert [block.tag for block in blocks] == [None, "culture: sensitive"]
    assert blocks[0].headline == ("accuracy", "accuracy/en", "accuracy/others")
    assert blocks[0].rows[1].scores["accuracy/others"].value == 1
    assert not any("consistency" in name or "AC3" in name for name in blocks[0].rows[0].scores)
    assert "not parallel: accuracy only" in (tmp_path / "results.md").read_text()
    assert "not parallel: accuracy only" in (tmp_path / "report.html").read_text()
    assert [run.predictions for run in read_results(tmp_path)] == [run.predictions for run in runs]


def test_the_terminal_names_the_number_of_many_subsets():
    for count in (12, 13):
        run = separate_run()
        items = [
            replace(item, id=f"{item.id}/{i}", tags=(f"subject: {i}",))
            for i in range(count)
            for item in run.items
        ]
        table = print_table(summarise([Run("m", 1, [replace(run, items=tuple(items))])]))
        assert ("subject: 3" in table) is (count == 12)
        assert ("include: 13 subsets are in results.md" in table) is (count == 13)


def test_stored_answers_without_a_kind_are_parallel():
    stored = encode(separate_run())
    assert decode(stored) == separate_run()
    del stored["kind"]
    assert decode(stored).kind == "parallel"


# ── prompts without choices ───────────────────────────────────────────────────────────────────────

ENGLISH = "This is an answer of more than five words."
SPANISH = "Esta es una respuesta que tiene más de cinco palabras."
RUSSIAN = "Это ответ, в котором больше пяти русских слов."
MIXED = "Это ответ, в котором больше пяти русских слов и answer."


def test_pass_rates_are_means_over_languages():
    run = open_run(
        {"en": [ENGLISH, SPANISH, "Yes."], "es": [SPANISH], "ru": [RUSSIAN, MIXED, ENGLISH]}
    )
    rates = separate.evaluate(run).flatten()
    assert rates == pytest.approx(
        {
            "line_pass": (0.5 + 1 + 2 / 3) / 3,  # "Yes." has no line that counts
            "line_pass/en": 0.5,
            "line_pass/es": 1,
            "line_pass/ru": 2 / 3,
            "word_pass": 0.5,
            "word_pass/ru": 0.5,
        }
    )
    (block,) = summarise([Run("m", 1, [run])])
    assert block.headline == ("line_pass", "word_pass") and block.kind == "open"
    assert block.rows[0].scores["word_pass"].value == pytest.approx(0.5)
    assert block.rows[0].readings["ru"].line_pass == pytest.approx(2 / 3)


def test_published_answers_have_the_published_rates(shared):
    folder = shared / "language_confusion"
    expected = json.loads((folder / "expected.json").read_text())
    texts: dict[str, list[str]] = {}
    with gzip.open(folder / "llama-2-instruct.jsonl.gz") as file:
        for row in map(json.loads, file):
            if (row["task"], row["source"]) == ("monolingual", "aya_human_annotated"):
                texts.setdefault(row["language"], []).append(row["completion"])
    rates = separate.evaluate(open_run(texts)).flatten()
    assert len(texts) > 3
    for code in texts:
        published = expected[f"llama-2-instruct|monolingual|aya_human_annotated|{code}"]
        assert rates[f"line_pass/{code}"] == pytest.approx(published["lpr"], abs=1e-6)
        if "wpr" in published:
            assert rates[f"word_pass/{code}"] == pytest.approx(published["wpr"], abs=1e-6)


@pytest.mark.parametrize("method", ["choices", "generate"])
def test_the_benchmarks_prompts_are_asked_as_they_are(shared, tokenizer, tmp_path, method):
    """No frame, no shots, no request for a language; the answer is the text."""
    name = f"language_confusion:{shared / 'language_confusion' / 'prompts.jsonl.gz'}"
    config = make_config(name, languages=("es", "zh"), method=method, limit=3, shots=2)
    (predictions,), engine = ask(config, tokenizer, write=lambda text: f"{ENGLISH}\n{text[:9]}")
    benchmark = load_benchmark(name, ("es", "zh"), limit=3)
    assert predictions.kind == "open" and len(predictions.items) == 6
    for ids, item in zip(engine.prompts, benchmark.items, strict=True):
        (version,) = item.versions.values()
        text = engine.renderer.decode(engine.renderer.render_prompt(version.question))
        assert engine.renderer.decode(ids) == text
    assert all("\n" in a.text for item in predictions.items for a in item.answers.values())
    whole = load_benchmark(name, ("en", "zh", "vi", "es", "id"))
    assert len(whole.items) == 2096
    tags = {tag for item in whole.items for tag in item.tags}
    assert {"task: monolingual", "task: crosslingual", "source: aya", "source: okapi"} <= tags

    blocks = write_results(tmp_path, [Run("m", 1, [predictions])], benchmarks=[benchmark])
    assert blocks[0].rows[0].scores["line_pass/es"].value == 0
    assert "Blind guessing" not in (tmp_path / "results.md").read_text()
    write_rows(tmp_path / "log.jsonl", benchmark.items, predictions)
    columns, answers = read_free_answers(tmp_path / "log.jsonl")
    assert columns == ["task", "source"] and len(answers) == 6
    assert {language for _, language, _ in answers} == {"es", "zh"}


def test_the_clone_of_the_repository_is_read_as_it_is(tmp_path):
    """test_sets/TASK/SOURCE/LANGUAGE.csv; not every source has every language."""
    for place in ("monolingual/aya/zh", "monolingual/okapi/es", "crosslingual/okapi/es"):
        file = tmp_path / f"{place}.csv"
        file.parent.mkdir(parents=True, exist_ok=True)
        code = file.stem
        file.write_text(f'prompt,language,source\n"Say, or\nsing.",{code},{file.parts[-2]}\n')
    benchmark = load_benchmark(f"language_confusion:{tmp_path}", ("es", "zh"))
    assert (benchmark.name, benchmark.kind, len(benchmark.items)) == (
        "language_confusion",
        "open",
        3,
    )
    assert benchmark.items[0].tags == ("task: crosslingual", "source: okapi")
    assert benchmark.items[0].versions["es"].question == "Say, or\nsing."
