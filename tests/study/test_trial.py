"""A study in miniature: what cannot be opened is named, the rest is counted and timed."""

import csv
import dataclasses
import json
from pathlib import Path

import pytest

from crossin_jax.config import Cell, Source, Study, UserError
from crossin_jax.data.loader import make_loader
from crossin_jax.data.pipeline import open_pipeline
from crossin_jax.study import trial
from crossin_jax.study.__main__ import main
from crossin_jax.study.trial import format_hours, time_steps, try_cells
from tests.helpers import config_in, study_flags


def make_study(folder: Path, model: str, **changes) -> Study:
    """Two arms on one model, the second with its untuned model."""
    cells = []
    for name in ("a", "b"):
        config = config_in(folder / name, model, name=name)
        config.evaluation = dataclasses.replace(
            config.evaluation, untuned=name == "b", method="both", limit=3
        )
        config.data = dataclasses.replace(config.data, **changes.get(name, {}))
        cells.append(Cell(name=name, config=config))
    return Study(name="tiny", output_dir=str(folder), cells=tuple(cells))


def test_everything_is_counted_and_nothing_is_left_behind(pretrained, tmp_path):
    study = make_study(tmp_path, str(pretrained / "model"))
    found = try_cells(study, study.cells, times=False)
    config = study.cells[0].config
    data = open_pipeline(config)
    loader = make_loader(
        data.mixture, data.renderer, config.data, batch_size=config.train.batch_size, seed=1
    )
    epochs = 6 / loader.steps_per_epoch
    assert found["a"].steps == 6 and found["a"].examples == round(epochs * len(data.mixture))
    assert found["a"].tokens == round(epochs * loader.tokens_per_epoch)
    # 3 items in 2 languages, by likelihood and by free answers; twice where the untuned model is
    # asked too
    assert (found["a"].prompts, found["b"].prompts) == (12, 24)
    assert found["a"].training_hours is None and not list(tmp_path.iterdir())


@pytest.mark.parametrize("what", ["data", "model", "benchmark", "batch"])
def test_a_cell_that_cannot_be_opened_is_named_before_anything_runs(what, pretrained, tmp_path):
    absent = (Source(name="facts", path="/nowhere/{lang}.jsonl"),)
    changes = {"b": {"sources": absent}} if what == "data" else {}
    study = make_study(tmp_path, str(pretrained / "model"), **changes)
    config = study.cells[1].config
    if what == "model":
        config.model.path = str(tmp_path / "absent")
    elif what == "benchmark":
        config.evaluation.benchmarks = ("/nowhere/questions.json",)
    elif what == "batch":
        config.train.batch_size = 7
        config.mesh.fsdp = 2
        config.mesh.data = 4
    with pytest.raises(UserError, match=r"^cell b: .*(nowhere|absent|batch_size=7)") as error:
        try_cells(study, study.cells, times=False)
    assert str(error.value).count("\n") <= 2
    assert not (tmp_path / "a").exists()


def test_hours_are_steps_and_prompts_times_their_seconds(pretrained, tmp_path, monkeypatch):
    """Cells that compute alike are timed once; the untuned model is asked once for its base."""
    trained = []

    def train(config):
        trained.append((config.train.steps, config.train.eval_every, config.data.eval_sources))
        folder = Path(config.output_dir)
        folder.mkdir(exist_ok=True)
        left = {1: None, 2: 6.0, 3: 8.0, 4: 1.0, 5: 0.0}  # a step takes 2, 4 and 1 seconds
        lines = [{"step": step, "seconds_left": value} for step, value in left.items()]
        (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
        return folder

    monkeypatch.setattr(trial, "train", train)
    seconds = [{"choices": 1.0, "generate": 10.0}, {"choices": 2.0, "generate": 20.0}]
    monkeypatch.setattr(trial, "time_prompts", lambda *_: seconds)
    study = make_study(tmp_path, str(pretrained / "model"))
    for cell in study.cells:
        cell.config.evaluation.untuned = True
        cell.config.evaluation.benchmarks *= 2
    found = try_cells(study, study.cells)
    assert trained == [(5, None, ())]
    per_step = (6 / 3 + 8 / 2 + 1) / 3
    for name, times in (("a", 2), ("b", 1)):
        assert found[name].training_hours == pytest.approx(6 * per_step / 3600)
        assert found[name].evaluation_hours == pytest.approx(times * 6 * 33 / 3600)
    assert found["a"].hours == found["a"].training_hours + found["a"].evaluation_hours


def test_the_program_prints_a_line_per_cell_and_refuses_with_the_cell(
    pretrained, tmp_path, monkeypatch, capsys
):
    study = make_study(tmp_path, str(pretrained / "model"))
    monkeypatch.setattr("crossin_jax.study.__main__.read_study", lambda _: study)
    main(study_flags())
    lines = capsys.readouterr().out.splitlines()
    assert "6 steps" in lines[1] and "12 prompts" in lines[1] and "24 prompts" in lines[2]
    assert lines[3].startswith("2 of 2 cells to do")
    main(study_flags(time=False, format="csv"))
    said = capsys.readouterr()
    rows = list(csv.reader(said.out.splitlines()))
    assert [row[2] for row in rows] == ["cell", "a", "b"] and {len(row) for row in rows} == {5}
    assert said.err.startswith("2 of 2 cells to do")
    (tmp_path / "a/audit").mkdir(parents=True)
    main(study_flags(time=False))  # what `prepare audit` has written is no result
    (tmp_path / "a/thesis.txt").write_text("work")
    with pytest.raises(UserError, match="was not made by a study"):
        main(study_flags())


@pytest.mark.parametrize(
    ("hours", "text"), [(0.001, "0.06 min"), (0.5, "30 min"), (1.26, "1.3 h"), (31.4, "31 h")]
)
def test_hours_have_two_digits(hours, text):
    assert format_hours(hours) == text


def test_the_first_and_the_last_step_are_not_timed(tmp_path):
    lines = [{"step": 1}, {"step": 2, "seconds_left": 3.0}, {"step": 5, "seconds_left": 0.0}]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert time_steps(tmp_path) == 1.0
