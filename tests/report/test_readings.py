"""Free answers as texts: another language than the question's, a second reader, prompts that do not
fit.
"""

import dataclasses
import json

import numpy as np
import pytest

from crossin_jax.config import Config, Data, Evaluation, UserError
from crossin_jax.data.pipeline import load_tokenizer
from crossin_jax.data.prompts import Renderer
from crossin_jax.evaluation.answers import align, read_choice
from crossin_jax.evaluation.benchmarks import load_benchmark
from crossin_jax.evaluation.predictions import ItemAnswers, Predictions, decode, encode
from crossin_jax.evaluation.runner import describe_benchmarks, load_benchmarks, run_benchmarks
from crossin_jax.languages import LANGUAGES
from crossin_jax.report.readings import read_answers
from crossin_jax.report.results import write_results
from crossin_jax.report.summary import Run

CHOICES = ("(A) Paris", "(B) Hanoi", "(C) Madrid", "(D) Manila")
WRITTEN = {  # language: what was written, with one answer whose language nobody could tell
    "en": ("The answer is (B), which was the capital of this country.", "B"),
    "vi": (
        "Câu trả lời đúng là B, vì đó là thủ đô của nước này.",
        "The answer is (A), which is not the capital.",
    ),
    "es": (
        "The answer is (B) and not the other one.",
        "No lo sé, porque la pregunta no es de las que se responden.",
    ),
}


def predictions_of(written) -> Predictions:
    """Free answers to two items, read by both readers."""
    items = tuple(
        ItemAnswers(
            f"q{i}",
            dict.fromkeys(written, 1),
            4,
            {
                language: dataclasses.replace(
                    align(CHOICES, texts[i]),
                    own=read_choice(CHOICES, texts[i], language).candidates,
                )
                for language, texts in written.items()
            },
        )
        for i in range(2)
    )
    return Predictions("made_up", "generate", 1, tuple(written), items)


def test_shares_by_hand():
    readings = read_answers([predictions_of(WRITTEN)])
    assert {code: (r.num_answers, r.identified, r.off_target) for code, r in readings.items()} == {
        "en": (2, 0.5, 0.0),
        "vi": (2, 1.0, 0.5),
        "es": (2, 1.0, 0.5),
    }
    assert {code: (r.own_certain, r.agreement) for code, r in readings.items()} == {
        "en": (1.0, 1.0),
        "vi": (1.0, 1.0),
        "es": (0.5, 1.0),
    }
    assert read_answers([predictions_of({"en": ("1", "2")})])["en"].off_target is None


def test_scored_choices_have_no_text_to_read():
    scored = predictions_of(WRITTEN)
    items = tuple(
        dataclasses.replace(
            item,
            answers={code: dataclasses.replace(a, text=None) for code, a in item.answers.items()},
        )
        for item in scored.items
    )
    assert read_answers([dataclasses.replace(scored, method="sum", items=items)]) == {}


def test_the_report_shows_them_and_they_come_back(tmp_path):
    predictions = predictions_of(WRITTEN)
    assert decode(encode(predictions)) == predictions
    write_results(tmp_path, [Run("base", 0, [predictions], {"device": "cpu"})])
    page, text = ((tmp_path / name).read_text() for name in ("report.html", "results.md"))
    assert (
        "Share of answers in another language than the question" in page
        and "identified: 50.0%" in page
    )
    row = next(
        line
        for line in text.splitlines()
        if line.startswith("|") and "Vietnamese" in line and "50.0%" in line
    )
    assert "100.0%" in row


class ChatModel:
    """An engine that reads 500 tokens."""

    max_length = 500

    def score(self, prompts, continuations, *, over_long, finished, progress):
        assert over_long == "skip"
        return [
            None
            if self.too_long(prompt, max(map(len, choices)) - 1)
            else -np.arange(len(choices), dtype=float)
            for prompt, choices in zip(prompts, continuations, strict=True)
        ]

    def generate(self, prompts, *, max_new_tokens, over_long, **_):
        assert over_long == "skip"
        return [None if self.too_long(prompt, max_new_tokens) else [] for prompt in prompts]

    def too_long(self, prompt, more):
        return len(prompt) + more > self.max_length


@pytest.mark.parametrize("method", ["choices", "generate"])
def test_prompts_that_do_not_fit_are_refused_or_counted(pretrained, tmp_path, method, caplog):
    words = " ".join(["long"] * 500)
    rows = [
        {
            "id": f"q{i}",
            **{
                LANGUAGES[code]: {
                    "question": "short" if (i, code) != (1, "es") else words,
                    "choices": ["one", "two"],
                    "answer": "one",
                }
                for code in ("en", "es")
            },
        }
        for i in range(3)
    ]
    (tmp_path / "b.json").write_text(json.dumps(rows))
    config = Config(
        data=Data(languages=("en", "es"), template="plain"),
        evaluation=Evaluation(
            benchmarks=(str(tmp_path / "b.json"),), method=method, prompts=(1,), max_new_tokens=4
        ),
    )
    renderer = Renderer(load_tokenizer(str(pretrained / "model")), "plain")
    with pytest.raises(
        UserError,
        match=r"(?s)item 'q1', Spanish: \d+ tokens with the answer; the model reads 500 "
        r"\(1 of 6 prompts are too long\).*evaluation.over_long=skip",
    ):
        run_benchmarks(config, ChatModel(), renderer, load_benchmarks(config), progress=False)
    config.evaluation.over_long = "skip"
    for predictions in run_benchmarks(
        config, ChatModel(), renderer, load_benchmarks(config), progress=False
    ):
        reasons = {
            (item.id, code): (a.reason, len(a.candidates))
            for item in predictions.items
            for code, a in item.answers.items()
        }
        assert reasons.pop(("q1", "es")) == ("too_long", 2)
        assert "too_long" not in {reason for reason, _ in reasons.values()} and len(reasons) == 5
    assert "skipped; each counts as any of its choices" in caplog.text


def test_the_shots_are_on_record():
    config = Config(
        seed=3,
        evaluation=Evaluation(benchmarks=("cross_world:test",), shots=2, languages=("en", "es")),
    )
    benchmark = load_benchmark("cross_world:test", ("en", "es"))
    shots = describe_benchmarks(config, [benchmark])[benchmark.name]["shots"]
    # Nothing is a shot for itself.
    assert len(shots["usual"]) == 2 and set(shots["others"]) >= set(shots["usual"])
    ids = {item.id for item in benchmark.items}
    assert {shot for drawn in shots["others"].values() for shot in drawn} <= ids
    assert (
        "shots"
        not in describe_benchmarks(
            dataclasses.replace(config, evaluation=Evaluation()), [benchmark]
        )[benchmark.name]
    )
