"""The self-test of resuming passes where resuming works and fails where it does not."""

import dataclasses
import json
import sys

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from crossin_jax import selftest
from crossin_jax.checkpoint.store import Store
from crossin_jax.config import Mesh
from crossin_jax.data.loader import Loader
from crossin_jax.train import train
from tests.configs import tiny
from tests.helpers import config_in
from tests.processes import finish, start_process
from tests.test_train import copy_run


@pytest.mark.long
def test_on_the_users_machine_a_run_is_killed_and_continues_bit_by_bit(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/mine").write_text("untouched")
    output = finish(
        start_process(tmp_path / "run", "--selftest_resume", "--config.train.steps=none")
    )
    lines = output.splitlines()
    assert lines[-1] == (
        "selftest_resume: passed: killed after step 4, resumed from step 3; weights, moments, data "
        "position and losses equal those of the uninterrupted run bit by bit"
    )
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
            lines = (
                (copy_run(pretrained, folder, without=6) / "metrics.jsonl")
                .read_text()
                .splitlines(True)
            )
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


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        (None, "passed"),
        (lose_a_row, "FAILED: losses after step 3"),
        ("moments", "FAILED: losses after step 3"),
        ("position", "FAILED: data position"),
        ("nothing", "took steps [1, 2, 3, 4, 5, 6], not 4 to 6"),
    ],
)
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
        monkeypatch.setattr(
            Loader, "get_state", lambda loader: {"window": loader.position[0], "row": 0}
        )
    code = selftest.run_selftest(str(tmp_path / "run"), process=0, start=start)
    output = capsys.readouterr().out
    assert code == (0 if broken is None else 1)
    assert words in output
    assert (tmp_path / "run.selftest").exists() == (broken is not None)


CODES = [  # (what the whole run, the killed one and its continuation end with; exit code; runs)
    ((1,), 1, 1),
    ((2,), 2, 1),
    ((-9,), -9, 1),
    ((0, 0), 1, 2),
    ((0, 1), 1, 2),
    ((0, 2), 2, 2),
    ((0, 75), 75, 2),
    ((0, -9, 1), 1, 3),
    ((0, -9, 2), 2, 3),
    ((0, -9, 75), 75, 3),
]


@pytest.mark.parametrize(("codes", "expected", "runs"), CODES)
def test_a_run_that_ends_otherwise_than_it_should_fails(codes, expected, runs, tmp_path, capsys):
    """The first and the last end with 0; the one between is killed and must not end by itself."""
    calls = []

    def start(more, log):
        calls.append(more)
        return codes[len(calls) - 1]

    assert selftest.run_selftest(str(tmp_path / "run"), process=0, start=start) == expected
    words = capsys.readouterr().out.splitlines()[-1]
    assert words.startswith(f"selftest_resume: FAILED: a run ended with {codes[-1]}")
    assert len(calls) == runs
    assert [more[1:] for more in calls] == [[], ["--kill_after=4"], []][:runs]


def test_other_processes_start_their_children_and_say_nothing(tmp_path, capsys):
    """Process 0 compares and clears away; the folder is its own to remove."""
    (tmp_path / "run.selftest").mkdir()
    codes = iter((0, -9, 0))
    logs = []
    code = selftest.run_selftest(
        str(tmp_path / "run"),
        process=3,
        start=lambda more, log: logs.append(log.name) or next(codes),
    )
    assert code == 0 and not capsys.readouterr().out
    assert logs == ["run.selftest.3.log"] * 3 and (tmp_path / "run.selftest").is_dir()


CHILD = """
import json, os, sys
out = next(word for word in sys.argv if word.startswith("--config.name="))
flags = os.environ.get("XLA_FLAGS", "")
open(out.partition("=")[2], "w").write(json.dumps([sys.argv[1:], flags]))
print("the child's words")
code = int(sys.argv[1])
os.kill(os.getpid(), -code) if code < 0 else sys.exit(code)
"""


@pytest.mark.parametrize("code", [0, 1, 2, 75, -9])
def test_children_run_the_same_command_with_a_short_run(code, tmp_path, monkeypatch, capsys):
    """Length, saving and output are the self-test's; every other setting is the user's."""
    (tmp_path / "child.py").write_text(CHILD)
    mine = [
        str(code),
        f"--config.name={tmp_path}/told.json",
        "--config.optim.learning_rate=0.1",
        "--config.mesh.fsdp=2",
        "--coordinator=host:1",
    ]
    theirs = [
        "--selftest_resume",
        "--config.train.steps=999",
        "--config.train.checkpoint_every=1",
        "--config.output_dir=runs/x",
        "--noresume",
        "--profile_steps=1,2",
        "--wandb",
        "--config.train.log_every=50",
        "--config.train.keep=1",
        "--config.train.keep_every=2",
        "--config.train.eval_every=3",
        "--config.train.benchmark_every=3",
        "--config.train.tensorboard=true",
    ]
    monkeypatch.setattr(
        sys, "orig_argv", [sys.executable, str(tmp_path / "child.py"), *mine, *theirs]
    )
    monkeypatch.setenv("XLA_FLAGS", "--xla_of_the_user=1")
    log = tmp_path / "child.log"
    assert selftest.start_child(["--config.output_dir=here", "--kill_after=4"], log) == code
    arguments, flags = json.loads((tmp_path / "told.json").read_text())
    assert arguments == [
        *mine,
        "--config.train.steps=6",
        "--config.train.checkpoint_every=3",
        "--config.train.log_every=1",
        "--config.train.keep=9",
        "--config.train.keep_every=none",
        "--config.train.eval_every=none",
        "--config.train.benchmark_every=none",
        "--config.train.tensorboard=false",
        "--config.output_dir=here",
        "--kill_after=4",
    ]
    assert flags.split() == ["--xla_of_the_user=1", "--xla_gpu_deterministic_ops=true"]
    assert not log.exists() and ("the child's words" in capsys.readouterr().err) == (code > 0)


def write_state(folder, arrays):
    """A checkpoint's arrays."""
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as writer:
        writer.save(folder, arrays)
    return folder


ARRAY = np.array([0.0, 1.0, 3.5], np.float32)
CHANGED = [  # (array of the other run, what is said)
    (ARRAY, None),
    (np.nextafter(ARRAY, np.float32(9)), "b differs by up to"),
    (np.array([-0.0, 1.0, 3.5], np.float32), "b differs by up to 0"),
    (ARRAY.astype(np.float64), "b differs by up to 0"),
    (np.array([0.0, 1.0, 7.5], np.float32), "b differs by up to 4"),
]


@pytest.mark.parametrize(("other", "words"), CHANGED)
def test_one_bit_of_one_array_is_a_difference(other, words, tmp_path):
    """Rounding, the sign of zero and the precision count; what is alike is not named."""
    one = write_state(tmp_path / "one", {"a": np.arange(4), "b": ARRAY})
    two = write_state(tmp_path / "two", {"a": np.arange(4), "b": other})
    faults = selftest.compare_arrays(one, two)
    assert [fault.startswith(words) for fault in faults] == ([True] if words else [])


def test_an_array_of_one_run_only_is_a_difference(tmp_path):
    """Whichever of the two has it."""
    one = write_state(tmp_path / "one", {"a": ARRAY, "b": ARRAY})
    two = write_state(tmp_path / "two", {"a": ARRAY})
    for pair in ((one, two), (two, one)):
        assert selftest.compare_arrays(*pair) == ["arrays: {'b'} are in one run only"]


def test_a_machine_that_does_not_repeat_itself_is_told_apart(pretrained, tmp_path):
    folder = copy_run(pretrained, tmp_path / "cut")
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    records[1]["loss"] += 1e-6
    (folder / selftest.KILLED_LOG).write_text("\n".join(map(json.dumps, records)))
    assert selftest.find_differences(pretrained, folder) == [
        "the losses before the kill differ already: this machine does not repeat its own "
        "computations"
    ]


def test_arrays_are_compared_bit_by_bit(pretrained, tmp_path):
    other = train(
        config_in(copy_run(pretrained, tmp_path / "mesh", without=6), mesh=Mesh(fsdp=4, tensor=2))
    )
    states = [run / "checkpoints/6/state" for run in (pretrained, other)]
    assert selftest.compare_arrays(states[0], states[0]) == []
    assert any(
        "trainable/embed_tokens/weight differs by up to " in fault
        for fault in selftest.compare_arrays(*states)
    )
