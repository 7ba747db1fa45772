"""The first hour of a new user, with a small model: each stumble that was found is one assertion.

One run of six LoRA steps, one evaluation with its untuned model, one dry run. scripts/first_hour.sh
plays the same with a real model.
"""

import csv
import dataclasses
import json
import os
import re
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import crossin_jax
from crossin_jax import evaluate as evaluate_program
from crossin_jax.checkpoint.store import read_config
from crossin_jax.checks import check
from crossin_jax.config import Cell, Component, Config, Lora, Source, Study, UserError
from crossin_jax.data.pipeline import open_mixture
from crossin_jax.export import export
from crossin_jax.study.__main__ import main as study_main
from crossin_jax.study.run import run_study
from crossin_jax.train import train
from tests.helpers import ONE_PROCESS, config_in


@pytest.fixture(scope="module")
def hour(pretrained, tmp_path_factory):
    """A run on data that one length does not fit, evaluated, with what the programs said."""
    folder = tmp_path_factory.mktemp("hour")
    config = config_in(folder / "run", str(pretrained / "model"))
    config.data = dataclasses.replace(config.data, length=36)
    config.model = dataclasses.replace(config.model, compute_dtype="auto")
    config.evaluation = dataclasses.replace(config.evaluation, method="choices", limit=4)
    said = folder / "said.txt"
    with pytest.MonkeyPatch.context() as patch, said.open("w") as file:
        patch.setattr(sys, "stderr", file)
        patch.setattr(sys, "stdout", file)
        patch.setattr("logging.Logger.warning", lambda _, text, *a, **__: print(text % a))
        patch.setattr("logging.warning", lambda text, *a: print(text % a))
        run = train(check(config))
        print("--- evaluated")
        flags = dict.fromkeys(("out", "limit", "languages", "prompts"))
        settings = evaluate_program.config_of_run(str(run))
        evaluate_program.main(
            settings,
            SimpleNamespace(
                **flags, **ONE_PROCESS, checkpoint=str(run), untuned=True, format="text"
            ),
        )
    training, evaluation = said.read_text().split("--- evaluated\n")
    return SimpleNamespace(
        config=config, run=run, training=training, evaluation=evaluation, folder=folder
    )


def test_training_says_what_a_newcomer_must_know(hour):
    said = hour.training
    assert "products in float32" in said  # by what the device computes fast
    assert f"step 0/6 starts a new run in {hour.run}" in said
    assert re.search(r"prompts in \w+: \d+% of \d+ are longer than data.length=36", said)
    assert re.search(r"data.length=\d+ keeps 99 % of every language", said)
    assert said.index("keeps 99 %") < said.index("step 1/6")
    assert read_config(hour.run).model.compute_dtype == "float32"  # recorded
    records = [json.loads(line) for line in (hour.run / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if "held_out/loss" in r] == [0, 6]  # before step 1 too
    assert [r["step"] for r in records if "loss" in r] == [1, 2, 3, 4, 5, 6]


def test_an_evaluation_needs_only_the_run_and_shows_the_untuned_model(hour):
    lines = hour.evaluation.splitlines()
    rows = [line.split()[0] for line in lines if re.match(r"(untuned|tiny_lora) .*\[", line)]
    assert rows[:2] == ["untuned", "tiny_lora"]
    assert any(line.startswith("difference from untuned (p)") for line in lines)
    assert any(line.startswith("blind guessing: Accuracy .") and "AC3_2" in line for line in lines)
    assert any("items decide nothing" in line and "Wilson" in line for line in lines)
    assert "[.000, .000]" not in hour.evaluation
    others = [line for line in lines if line.startswith("choice by log-likelihood per")]
    tables = [line for line in lines if ": choice by summed log-likelihood" in line]
    # The primary way has a table for all items and one for a tag; the others have a line each.
    assert len(tables) == 2 and len(others) == 2 * len(tables)
    assert "the primary way is the summed log-likelihood" in hour.evaluation
    assert "docs/evaluation.md" in hour.evaluation


def test_models_have_folders_of_their_own_and_compare(hour, monkeypatch, capsys):
    """README's --compare works as shown: the base beside the run."""
    settings = evaluate_program.config_of_run(str(hour.run))
    flags = dict.fromkeys(("checkpoint", "out", "limit", "languages", "prompts", "untuned"))
    before = (hour.run / "evaluation/results.json").read_bytes()
    evaluate_program.main(settings, SimpleNamespace(**flags, **ONE_PROCESS, format="text"))
    assert (hour.run / "evaluation/results.json").read_bytes() == before
    pair = {"compare": str(hour.run / "evaluation-untuned"), "after": str(hour.run / "evaluation")}
    capsys.readouterr()
    for style, mark in {
        "latex": r"\begin{tabular}",
        "markdown": "|---",
        "csv": ",difference,",
    }.items():
        evaluate_program.compare(SimpleNamespace(**pair, out=None, format=style))
        said = capsys.readouterr()
        assert mark in said.out
        # What is beside the tables is a comment of LaTeX, and not in the csv.
        assert {"latex": "\n% report: ", "csv": "", "markdown": "\nreport: "}[style] in said.out
        if style == "csv":
            assert len({len(row) for row in csv.reader(said.out.splitlines())}) == 1
            assert said.err.startswith("report: ")
    results = json.loads((hour.run / "evaluation/comparison/results.json").read_text())
    assert [run["name"] for run in results["runs"]] == ["untuned", "tiny_lora"]


def test_exports_name_no_path_that_was_not_given(hour, monkeypatch, tmp_path):
    out = export(hour.run, "peft", tmp_path / "adapter")
    adapter = json.loads((out / "adapter_config.json").read_text())
    given = hour.config.model.path
    assert adapter["base_model_name_or_path"] == given
    assert f'base_model: "{given}"' in (out / "README.md").read_text()


def test_python_in_ten_lines(hour):
    model = crossin_jax.load_model(hour.run, progress=False)
    chat = [{"role": "user", "content": "Name a river."}]
    answers = model.generate(["Name a river.", chat], max_new_tokens=3)
    assert answers[0] == answers[1] and hasattr(answers[0], "is_cut")
    assert model.score("Name a river.", ["Seine", "Rhine"]).shape == (2,)
    assert model([[1, 2, 3]]).shape[:2] == (1, 3)
    assert len(crossin_jax.Mixture(hour.config)[0:10]) == 10
    assert crossin_jax.consistency({"q": {"en": 1, "zh": 1}}) == 1
    assert crossin_jax.ac3({"q": {"en": 1, "zh": 1, "gold": 1}}) == pytest.approx(1)
    assert {"load_model", "Mixture", "ac3", "consistency"} <= set(dir(crossin_jax))


def test_a_dry_run_opens_everything(hour, monkeypatch, capsys):
    study = Study(
        name="hour",
        output_dir=str(hour.folder / "study"),
        cells=(
            Cell(
                name="x2x",
                config=dataclasses.replace(hour.config, output_dir=str(hour.folder / "study/x2x")),
            ),
        ),
    )
    monkeypatch.setattr("crossin_jax.study.__main__.read_study", lambda _: study)
    flags = dict.fromkeys(("cells", "topology", "budget"))
    arguments = SimpleNamespace(**flags, dry_run=True, report_only=False, time=True, format="text")
    study_main(arguments)
    out = capsys.readouterr().out
    assert re.search(r"6 steps, [\d,]+ examples, [\d,]+ tokens, 8 prompts: [\d.]+ (min|h)", out)
    assert re.search(r"in all \([\d.e-]+ min of training, [\d.e-]+ min of evaluation\)", out)
    study.cells[0].config.data.sources = (Source(name="facts", path="/nowhere/a.jsonl"),)
    with pytest.raises(UserError, match="cell x2x: .*/nowhere/a.jsonl"):
        study_main(arguments)
    assert not (hour.folder / "study").exists()


def test_languages_without_english_need_no_pivot():
    config = Config(model=dataclasses.replace(Config().model, path="m"))
    config.data.languages = ("es", "id")
    config.data.sources = (Source(name="facts", kind="world", split="train"),)
    config.data.components = (Component(kind="x2x", source="facts"),)
    mixture = open_mixture(check(config))
    assert {mixture[i].prompt_language for i in range(20)} == {"es", "id"}
    config.data.components = (Component(kind="en2x", source="facts"),)
    with pytest.raises(UserError, match="pivot"):
        check(config)


def test_a_language_that_a_benchmark_lacks_is_refused_before_anything_is_read(tmp_path):
    """By `train` and by a study; the model and the data of this configuration do not exist."""
    config = config_in(tmp_path / "run", str(tmp_path / "no model"))
    config.data = dataclasses.replace(config.data, languages=("en", "ko"))
    cells = tuple(
        Cell(name=name, config=dataclasses.replace(config, output_dir=str(tmp_path / name)))
        for name in ("a", "b")
    )
    cells[0].config.evaluation = dataclasses.replace(config.evaluation, benchmarks=())
    study = Study(name="hour", output_dir=str(tmp_path / "study"), cells=cells)
    for start in (lambda: train(config), lambda: run_study(study)):
        with pytest.raises(UserError, match="benchmark 'cross_world:dev': .* has no 'ko'; .*\\Z"):
            start()
    assert not any(tmp_path.iterdir())


def test_names_of_other_libraries_are_understood():
    with pytest.raises(UserError, match="did you mean .*rank"):
        Lora(r=8)
    with pytest.raises(UserError, match="did you mean .*learning_rate"):
        type(Config().optim)(lr=1e-4)


def test_what_train_prints_next_can_be_typed(hour):
    """The command is complete: its program exists and its flags are known."""
    from crossin_jax.train import next_command

    words = shlex.split(next_command(hour.config, hour.run))
    assert words[:4] == ["python", "-m", "crossin_jax.evaluate", "--checkpoint"]
    assert Path(words[4]).is_dir() and len(words) == 5
    assert evaluate_program.config_of_run(words[4]).name == "tiny_lora"
    assert os.path.samefile(words[4], hour.run)
