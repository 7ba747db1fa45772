"""The real-data configuration: XQuAD, the real Llama-2 tokenizer, a checkpoint that transformers
wrote.
"""

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from crossin_jax.cli import load_config_file
from crossin_jax.evaluate import evaluate
from crossin_jax.train import train

pytestmark = pytest.mark.long
REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def run(shared, tmp_path_factory):
    """(config, folder) after a few steps of `configs/xquad_llama.py`, stopped and continued on the
    way.
    """
    folder = tmp_path_factory.mktemp("xquad")
    subprocess.run(
        [
            sys.executable,
            str(REPOSITORY / "scripts/make_small_llama.py"),
            "--width=16",
            f"--tokenizer={shared / 'tokenizers/llama2'}",
            f"--out={folder / 'model'}",
        ],
        check=True,
        capture_output=True,
        timeout=120,
    )
    config = load_config_file(f"{REPOSITORY}/configs/xquad_llama.py:{shared}")
    config.output_dir, config.model.path = str(folder / "run"), str(folder / "model")
    config.data.length = 512
    config.data.eval_sources = tuple(
        dataclasses.replace(s, limit=8) for s in config.data.eval_sources
    )
    config.optim = dataclasses.replace(config.optim, learning_rate=1e-2)
    config.train = dataclasses.replace(
        config.train,
        steps=6,
        batch_size=8,
        eval_every=3,
        log_every=1,
        checkpoint_every=3,
        loss_chunk=64,
    )
    run = train(config)
    before = read_held_out(run)
    shutil.rmtree(run / "checkpoints/6")  # as if it had been killed after step 3
    return config, train(config), before


def read_held_out(run) -> list[dict]:
    """The records of a run's log that have the loss on held-out questions."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if "held_out/loss" in record]


def test_the_loss_on_held_out_questions_falls(run):
    _, folder, before = run
    first, _, last = before
    assert [record["step"] for record in before] == [0, 3, 6]
    assert read_held_out(folder) == before  # the continued run says what the whole run said
    for language in ("en", "zh", "vi", "es"):
        assert (
            last[f"held_out/loss/held_out/{language}"]
            < first[f"held_out/loss/held_out/{language}"] - 0.02
        )


def test_real_benchmarks_are_answered(run, tmp_path):
    config, folder, _ = run
    config.evaluation = dataclasses.replace(
        config.evaluation, limit=2, max_new_tokens=2, languages=("en", "zh")
    )
    predictions, _ = evaluate(config, folder, tmp_path)
    asked = [(p.benchmark, p.method) for p in predictions]
    methods = ("sum", "mean", "byte", "letter", "generate")
    assert asked == [
        (name, method) for name in ("cross_mmlu", "cross_logiqa") for method in methods
    ]
