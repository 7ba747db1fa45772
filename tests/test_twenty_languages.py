"""Twenty languages at once, each in another spelling: a mixture, twenty steps of training, and a
benchmark.
"""

import dataclasses
import json

import numpy as np
import pytest

from crossin_jax.checks import check
from crossin_jax.config import Component, Data, Evaluation, Source
from crossin_jax.data.pipeline import open_pipeline
from crossin_jax.evaluate import evaluate
from crossin_jax.evaluation.metrics import evaluate as score
from crossin_jax.languages import canonical_list, name_of
from crossin_jax.prepare import audit_report
from crossin_jax.prepare.audit import audit
from crossin_jax.train import train
from tests.helpers import config_in

SPELLINGS = [
    "en",
    "zho_Hans",
    "French",
    "sw",
    "JA",
    "arb_Arab",
    "pt-BR",
    "zh-TW",
    "hin_Deva",
    "sr-Latn",
    "Amharic",
    "yor",
    "ko_KR",
    "DEUTSCH",
    "srp_Cyrl",
    "fil",
    "uk",
    "Zulu",
    "lao_Laoo",
    "acq_Arab",
]
CODES = canonical_list(SPELLINGS, "languages")


@pytest.fixture(scope="module")
def config(pretrained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("twenty")
    rows = [
        {
            "id": f"r{i}",
            # columns in the spellings above; the texts only have to be told apart
            **{
                spelling: {"instruction": f"{code} {i}?", "input": "", "output": f"{code} {i}!"}
                for spelling, code in zip(SPELLINGS, CODES, strict=True)
            },
        }
        for i in range(200)
    ]
    (folder / "rows.json").write_text(json.dumps(rows, ensure_ascii=False))
    (folder / "bench").mkdir()
    for spelling, code in zip(SPELLINGS, CODES, strict=True):
        items = [
            {"id": f"q{i}", "question": f"{code} {i}?", "choices": ["a", "b"], "answer": "b"}
            for i in range(2)
        ]
        (folder / "bench" / f"test_{spelling}.json").write_text(json.dumps(items))
    usual = config_in(folder / "run", str(pretrained / "model"))
    return check(
        dataclasses.replace(
            usual,
            data=Data(
                languages=tuple(SPELLINGS),
                sources=(Source(name="s", path=str(folder / "rows.json")),),
                components=(
                    Component(kind="x2x", source="s", tag="sentence"),
                    Component(kind="trans", source="s", request="prompt"),
                ),
                length=192,
                template="plain",
            ),
            train=dataclasses.replace(usual.train, steps=20, checkpoint_every=20),
            evaluation=Evaluation(
                benchmarks=(str(folder / "bench"),),
                method="choices",
                prompts=(1,),
                batch_size=40,
                cache_dtype="float32",
            ),
        )
    )


def test_the_mixture_asks_in_the_language_of_each_prompt(config):
    assert config.data.languages == CODES and len(CODES) == 20
    mixture = open_pipeline(config).mixture
    examples = [mixture.make(*draw) for draw in mixture.draw(np.arange(len(mixture))).tolist()]
    assert {e.prompt_language for e in examples if e.component == "x2x"} == set(CODES)
    french = [e for e in examples if e.component == "x2x" and e.prompt_language == "fr"]
    assert french and all(" Réponds en " in e.instruction for e in french)
    report = audit(mixture, open_pipeline(config).renderer, config.data, limit=20)
    # neither Lao nor Ta'izzi-Adeni Arabic has a sentence, and CLDR has no name of the latter
    english = mixture.count_english_requests()
    assert {"lo", "acq"} <= set(english)
    assert sum(english.values()) == sum(
        e.prompt_language != "en"
        and ("Answer in " in e.instruction or "Translate the " in e.instruction)
        for e in examples
    )
    assert report["english_requests"] == english and all(
        f"{code} {count}" in audit_report.to_markdown(report) for code, count in english.items()
    )


def test_training_and_a_benchmark_run_in_all_of_them(config, tmp_path, caplog):
    folder = train(config)
    counts = open_pipeline(config).mixture.count_english_requests()
    listed = ", ".join(f"{code} {count}" for code, count in counts.items())
    assert f"so they ask in English: {listed}" in caplog.text
    assert (folder / "checkpoints" / "20").is_dir()
    found, _ = evaluate(config, folder, tmp_path)
    predictions = next(each for each in found if each.method == "sum")
    assert predictions.languages == CODES and len(predictions.items) == 2
    scores = score(predictions, "expectation").flatten()
    assert {f"accuracy/{code}" for code in CODES} <= set(scores) and "consistency_20" in scores
    assert name_of("acq") == "Ta'izzi-Adeni Arabic"
