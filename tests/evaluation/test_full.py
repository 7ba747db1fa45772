"""Whole benchmarks through the program: every item, from weights to the report."""

import dataclasses
import json
import subprocess
import sys

import pytest

from crossin_jax.config import Config, Data, Evaluation, Model
from crossin_jax.data.pipeline import train_tokenizer
from crossin_jax.evaluate import evaluate, write_run
from crossin_jax.evaluation.benchmarks import load_benchmark
from crossin_jax.report.results import read_results
from crossin_jax.report.summary import Run
from tests.conftest import REPOSITORY
from tests.helpers import config_in

pytestmark = pytest.mark.long
FOUR = ("en", "zh", "vi", "es")


def report_of(config: Config, checkpoint, out) -> dict:
    """The evaluated configuration's results.json, after what every report must hold was
    looked at.
    """
    predictions, source = evaluate(config, checkpoint, out)
    write_run(config, Run(config.name, config.seed, predictions, source), out)
    assert read_results(out)[0].predictions == predictions
    assert (out / "report.html").stat().st_size > 50_000 and (out / "results.md").exists()
    return json.loads((out / "results.json").read_text())


def test_a_random_llama_on_all_of_cross_mmlu_and_cross_logiqa(shared, tmp_path):
    """It knows nothing: accuracy is that of blind guessing, and what is counted is all there is."""
    files = [str(shared / "seaeval" / name) for name in ("cross_mmlu.json", "cross_logiqa.json")]
    lines = [
        text
        for file in files
        for item in load_benchmark(file, FOUR).items
        for version in item.versions.values()
        for text in (version.question, version.context or "", *version.choices)
    ]
    # Few pieces: half of the work would be logits of the rest.
    train_tokenizer(lines, 4000, tmp_path / "tokenizer")
    subprocess.run(
        [
            sys.executable,
            str(REPOSITORY / "scripts/make_small_llama.py"),
            "--width=16",
            f"--tokenizer={tmp_path / 'tokenizer'}",
            f"--out={tmp_path / 'model'}",
        ],
        check=True,
        capture_output=True,
        timeout=120,
    )
    asked = {}
    for file, method in zip(files, ("choices", "generate"), strict=True):
        config = Config(
            name="random",
            model=Model(path=str(tmp_path / "model"), compute_dtype="float32"),
            data=Data(languages=FOUR, template="alpaca"),
            evaluation=Evaluation(
                benchmarks=(file,),
                method=method,
                prompts=(1,),
                max_new_tokens=2,
                batch_size=64,
                cache_dtype="float32",
            ),
        )
        blocks = report_of(config, None, tmp_path / method)["blocks"]
        asked |= {
            (block["num_items"], block["method"]): block["rows"][0]["scores"] for block in blocks
        }
    assert set(asked) == {(150, method) for method in ("sum", "mean", "byte", "letter")} | {
        (176, "generate")
    }
    for scores in asked.values():
        assert {f"accuracy/{code}" for code in FOUR} < set(scores) and "AC3_4" in scores
        assert scores["accuracy"]["value"] == pytest.approx(0.25, abs=0.1)


def test_the_miniature_model_on_all_of_cross_world(adapted, pretrained, tmp_path):
    config = config_in(adapted, str(pretrained / "model"))
    config.evaluation = dataclasses.replace(
        config.evaluation, benchmarks=("cross_world:test",), limit=None, batch_size=64
    )
    blocks = report_of(config, adapted, tmp_path / "out")["blocks"]
    assert {(block["method"], block["tag"]) for block in blocks} >= {
        ("sum", None),
        ("sum", "opaque"),
        ("generate", None),
    }
    whole = next(block for block in blocks if (block["method"], block["tag"]) == ("sum", None))
    assert whole["num_items"] > 150 and set(whole["languages"]) == {"en", "es"}
