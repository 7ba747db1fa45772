"""A cell counts as done only while the files that its settings name hold what they held."""

import dataclasses
import json
import os
import shutil

import pytest

from crossin_jax.config import Cell, Component, Config, Data, Evaluation, Lora, Model, Source, Study
from crossin_jax.study import run as program
from crossin_jax.study.inputs import find_changed_input, identify_inputs
from crossin_jax.study.run import cell_keys, evaluation_key, is_done, write_key
from tests.test_evaluate import replace_weights


@pytest.fixture
def config(tmp_path):
    """A configuration whose every kind of path lies in a folder."""
    for name in (
        "base/model.safetensors",
        "base/nested/tokenizer.json",
        "base/README.md",
        "adapter/adapter_model.safetensors",
        "rows.jsonl",
        "by_language/rows.en.jsonl",
        "by_language/rows.zh.jsonl",
        "held_out.jsonl",
        "template.json",
        "part.json",
        "asked.json",
        "questions.json",
    ):
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"content of {name}")
    path = str(tmp_path)
    return Config(
        output_dir=f"{path}/run",
        model=Model(path=f"{path}/base", tokenizer="org/tokenizer"),
        lora=Lora(path=f"{path}/adapter"),
        data=Data(
            sources=(
                Source(name="a", path=f"{path}/rows.jsonl"),
                Source(name="b", path=f"{path}/by_language/rows.{{lang}}.jsonl"),
            ),
            components=(Component(source="a", template=f"{path}/part.json"), Component(source="b")),
            eval_sources=(Source(name="c", path=f"{path}/held_out.jsonl"),),
            template=f"{path}/template.json",
        ),
        evaluation=Evaluation(
            benchmarks=("cross_mmlu", f"{path}/questions.json"), template=f"{path}/asked.json"
        ),
    )


CHANGES = {
    "base/model.safetensors": "training",
    "base/nested/tokenizer.json": "training",
    "base/added.safetensors": "training",
    "base/README.md": None,
    "base/.cache": None,
    "adapter/adapter_model.safetensors": "training",
    "rows.jsonl": "training",
    "by_language/rows.zh.jsonl": "training",
    "by_language/rows.vi.jsonl": "training",
    "held_out.jsonl": "training",
    "template.json": "training",
    "part.json": "training",
    "asked.json": "evaluation",
    "questions.json": "evaluation",
}


@pytest.mark.parametrize("name", CHANGES)
def test_changed_content_is_named_in_its_part(name, config, tmp_path):
    """Also where the new file has the size and the time of the old one."""
    known = {
        part: json.loads(json.dumps(identify_inputs(config, part)))
        for part in ("training", "evaluation")
    }
    file = tmp_path / name
    before = file.read_text() if file.exists() else "new"
    times = file.stat().st_mtime_ns if file.exists() else 0
    file.write_text(before.swapcase())
    os.utime(file, ns=(times, times))
    for part, inputs in known.items():
        expected = str(file) if CHANGES[name] == part else None
        assert find_changed_input(config, part, inputs) == expected
    file.write_text(before)  # a touched file has not changed, and one that came is still there
    for part, inputs in known.items():
        came = CHANGES[name] == part and before == "new"
        assert find_changed_input(config, part, inputs) == (str(file) if came else None)


def test_files_that_are_gone_have_not_changed_and_known_ones_are_not_read(
    config, tmp_path, monkeypatch
):
    known = identify_inputs(config, "training")
    monkeypatch.setattr("crossin_jax.study.inputs._hash_file", lambda *_: pytest.fail("read"))
    assert find_changed_input(config, "training", known) is None
    shutil.rmtree(tmp_path / "base")
    (tmp_path / "rows.jsonl").unlink()
    assert find_changed_input(config, "training", known) is None
    assert find_changed_input(config, "training", None) is None  # of an earlier version


def test_a_cell_is_done_while_its_files_are_what_they_were(config, tmp_path):
    cell = Cell(name="a", config=dataclasses.replace(config, lora=None))
    keys = cell_keys(Study(name="x", output_dir=str(tmp_path), cells=(cell,)))
    (tmp_path / "run").mkdir()
    done, key = tmp_path / "run/done.json", evaluation_key(cell, keys)
    inputs = {
        **identify_inputs(cell.config, "training"),
        **identify_inputs(cell.config, "evaluation"),
    }
    for name in ("base/model.safetensors", "questions.json"):
        write_key(done, key, inputs=inputs)
        assert is_done(cell, keys)
        content = (tmp_path / name).read_text()
        (tmp_path / name).write_text("other")
        assert not is_done(cell, keys)
        write_key(done, key)  # an earlier version knew no files
        assert is_done(cell, keys)
        (tmp_path / name).write_text(content)


@pytest.mark.long
def test_a_study_trains_anew_on_replaced_weights(pretrained, tmp_path, monkeypatch, capsys):
    """The old model's scores do not come back under the new weights."""
    from tests.helpers import config_in

    shutil.copytree(pretrained / "model", tmp_path / "base")
    config = config_in(tmp_path / "cell", str(tmp_path / "base"))
    config.train = dataclasses.replace(config.train, steps=1, checkpoint_every=None)
    config.evaluation = dataclasses.replace(config.evaluation, method="choices", limit=2)
    study = Study(
        name="x", output_dir=str(tmp_path / "study"), cells=(Cell(name="a", config=config),)
    )
    trained, train = [], program.train
    monkeypatch.setattr(program, "train", lambda config: trained.append(1) or train(config))
    scores = []
    for factor in (1.0, 1.0, 1.25):
        replace_weights(tmp_path / "base", factor)
        (run,) = program.run_study(study)
        items = run.predictions[0].items
        scores.append([a.scores for item in items for a in item.answers.values()])
    assert len(trained) == 2 and scores[0] == scores[1] != scores[2]
    assert f"cell a: {tmp_path / 'base/model.safetensors'} changed" in capsys.readouterr().err
