"""A study goes on where it stopped, and reruns only what changed."""

import dataclasses
import json

import pytest

from crossin_jax import study as program
from crossin_jax.config import Cell, Study, UserError
from crossin_jax.study import cell_keys, is_done, run_study
from tests.helpers import config_in


@pytest.fixture
def study(tmp_path, pretrained):
    """Two arms over the pretrained model, evaluated on a few items."""
    def make(**second):
        first = config_in(tmp_path / "a", str(pretrained / "model"))
        other = config_in(tmp_path / "b", str(pretrained / "model"), name="other", **second)
        for config in (first, other):
            config.train = dataclasses.replace(config.train, steps=1, checkpoint_every=None)
            config.evaluation = dataclasses.replace(config.evaluation, method="choices", limit=2)
        return Study(name="tiny", output_dir=str(tmp_path), cells=(Cell(name="a", config=first),
                                                                    Cell(name="b", config=other, needs=("a",))))
    return make


def test_a_study_runs_goes_on_and_reruns_what_changed(study, monkeypatch):
    trained = []
    train = program.train
    monkeypatch.setattr(program, "train", lambda config: trained.append(config.name) or train(config))
    assert len(run_study(study(), slice(0, 1))) == 1  # as on the first of two pods
    assert trained == ["tiny_lora"]
    runs = run_study(study())
    assert trained == ["tiny_lora", "other"] and [run.name for run in runs] == ["tiny_lora", "other"]
    run_study(study())
    assert len(trained) == 2
    changed = study(seed=2)
    keys = cell_keys(changed)
    assert [is_done(cell, keys) for cell in changed.cells] == [True, False]
    run_study(changed)
    assert trained == ["tiny_lora", "other", "other"]


def test_a_changed_base_makes_its_cells_stale(study):
    before, after = study(), study()
    after.cells[0].config.optim = dataclasses.replace(after.cells[0].config.optim, learning_rate=1e-3)
    keys = cell_keys(before), cell_keys(after)
    assert keys[0]["b"] != keys[1]["b"]
    after.cells[0].config.optim = before.cells[0].config.optim
    after.cells[0].config.train.log_every = 77  # changes nothing that is learned
    assert cell_keys(after) == keys[0]


def test_order_of_cells_is_checked(study):
    cells = study().cells
    with pytest.raises(UserError, match="cell b needs a"):
        cell_keys(Study(name="x", output_dir="x", cells=cells[::-1]))


def test_a_key_is_written_whole(tmp_path):
    program.write_key(tmp_path / "done.json", "abc", seconds=1.0)
    assert json.loads((tmp_path / "done.json").read_text()) == {"key": "abc", "seconds": 1.0}
    assert program.read_key(tmp_path / "done.json") == "abc" and program.read_key(tmp_path / "none.json") is None
