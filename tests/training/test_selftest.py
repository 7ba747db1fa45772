"""The self-test of resuming passes where resuming works and fails where it does not."""

import dataclasses
import json

import jax
import pytest

from crossin_jax.checkpoint.store import Store
from crossin_jax.config import Mesh
from crossin_jax.data.loader import Loader
from crossin_jax.train import train
from crossin_jax.training import selftest
from tests.configs import tiny
from tests.helpers import config_in
from tests.processes import finish, start_process
from tests.test_train import copy_run


def test_on_the_users_machine_a_run_is_killed_and_continues_bit_by_bit(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/mine").write_text("untouched")
    output = finish(start_process(tmp_path / "run", "--selftest_resume", "--config.train.steps=none"))
    lines = output.splitlines()
    assert lines[-1] == ("selftest_resume: passed: killed after step 4, resumed from step 3; weights, moments, data "
                         "position and losses equal those of the uninterrupted run bit by bit")
    assert [file.name for file in tmp_path.rglob("*")] == ["run", "mine"]


@pytest.fixture
def start(pretrained, tmp_path):
    """Stands in for the child processes: the whole run, the killed one, and what continues it."""
    calls = []

    def start(more, log):
        calls.append(more)
        folder = tmp_path / "run.selftest" / ("whole" if len(calls) == 1 else "cut")
        assert more[0] == f"--config.output_dir={folder}"
        if len(calls) == 2:
            assert more[1:] == ["--kill_after=4"]
            lines = (copy_run(pretrained, folder, without=6) / "metrics.jsonl").read_text().splitlines(True)
            (folder / "metrics.jsonl").write_text("".join(lines[:4]))
            return -9
        if len(calls) == 1:
            copy_run(pretrained, folder)
        else:
            train(config_in(folder, train=dataclasses.replace(tiny.get_config().train, keep=9)))
        return 0

    return start


def lose_a_row(loader, state):
    loader.go_to((state["window"], state["row"] + 1))


@pytest.mark.parametrize(("broken", "words"), [
    (None, "passed"), (lose_a_row, "FAILED: losses after step 3"), ("moments", "FAILED: losses after step 3"),
    ("position", "FAILED: data position"), ("nothing", "took steps [1, 2, 3, 4, 5, 6], not 4 to 6")])
def test_a_broken_restore_fails(broken, words, start, tmp_path, monkeypatch, capsys):
    restore = Store.restore

    def without_moments(store, step, abstract, config=None):
        state, position = restore(store, step, abstract, config)
        state.optimizer = jax.tree.map(lambda leaf: leaf * 0, state.optimizer)
        return state, position

    if broken is lose_a_row:
        monkeypatch.setattr(Loader, "set_state", broken)
    elif broken == "moments":
        monkeypatch.setattr(Store, "restore", without_moments)
    elif broken == "nothing":
        monkeypatch.setattr(Store, "restore_newest", lambda *_: None)
    elif broken == "position":
        monkeypatch.setattr(Loader, "get_state", lambda loader: {"window": loader.position[0], "row": 0})
    code = selftest.run_selftest(str(tmp_path / "run"), process=0, start=start)
    output = capsys.readouterr().out
    assert code == (0 if broken is None else 1)
    assert words in output
    assert (tmp_path / "run.selftest").exists() == (broken is not None)


def test_a_machine_that_does_not_repeat_itself_is_told_apart(pretrained, tmp_path):
    folder = copy_run(pretrained, tmp_path / "cut")
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    records[1]["loss"] += 1e-6
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, records)))
    assert selftest.find_differences(pretrained, folder) == [
        "the losses before the kill differ already: this machine does not repeat its own computations"]


def test_arrays_are_compared_bit_by_bit(pretrained, tmp_path):
    other = train(config_in(copy_run(pretrained, tmp_path / "mesh", without=6), mesh=Mesh(fsdp=4, tensor=2)))
    states = [run / "checkpoints/6/state" for run in (pretrained, other)]
    assert selftest.compare_arrays(states[0], states[0]) == []
    assert any("trainable/embed_tokens/weight differs by up to " in fault for fault in selftest.compare_arrays(*states))
