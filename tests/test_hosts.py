"""The training program in processes of its own: one, two and four of them, stopped by signals,
short of disk.
"""

import os
import signal
import socket
import subprocess
import time

import numpy as np
import pytest

from crossin_jax.checkpoint.store import Store
from crossin_jax.ownership import OWNER
from tests.processes import finish, start_group, start_process, wait_for_steps
from tests.test_train import copy_run, read_arrays, read_losses

LONG = ("--config.train.steps=100000", "--config.train.checkpoint_every=100000")


def test_four_two_and_one_process_agree_with_eight_devices(pretrained, tmp_path):
    """Four processes train, with a quarter of the state each; two with halves, and one, go on from
    step 3.
    """
    expected = read_losses(pretrained)
    for process in start_group(tmp_path / "four", 4, "--config.mesh.fsdp=4"):
        finish(process)
    assert read_losses(tmp_path / "four").keys() == expected.keys()
    runs = [("four", 1)]
    for name, number in (("two", 2), ("one", 1)):
        folder = copy_run(tmp_path / "four", tmp_path / name, without=6)
        (folder / "metrics.jsonl").unlink()
        group = (
            start_group(folder, number, "--config.mesh.fsdp=2")
            if number > 1
            else [start_process(folder)]
        )
        outputs = [finish(process) for process in group]
        assert sum("trained: " in output for output in outputs) == 1  # process 0 speaks
        runs.append((name, 4))
    for name, first in runs:
        losses = read_losses(tmp_path / name)
        steps = range(first, 7)
        assert sorted(losses) == list(steps)
        np.testing.assert_allclose(
            [losses[s] for s in steps], [expected[s] for s in steps], rtol=1e-5
        )
        # Process 0 writes.
        assert (tmp_path / name / "metrics.jsonl").read_text().count("\n") == len(steps)


@pytest.mark.long
def test_a_process_that_never_starts_is_named(tmp_path):
    for process in start_group(tmp_path / "run", 3, "--start_timeout=15", come=(0, 2)):
        output = finish(process, 2)
        assert (
            "1 of 3 processes did not come within 15 s: 1; here are 0 (" in output
            and "Traceback" not in output
        )


def test_a_signal_to_one_process_stops_all_after_the_same_step(tmp_path):
    pair = start_group(tmp_path / "run", 2, *LONG)
    wait_for_steps(pair[0], tmp_path / "run", 3)
    pair[1].send_signal(signal.SIGTERM)
    pair[1].send_signal(signal.SIGTERM)
    for process in pair:
        output = finish(process, 75)
        assert "stopping: step " in output
    (step,) = Store(tmp_path / "run").steps()
    assert len(read_losses(tmp_path / "run")) == step


def test_the_others_leave_when_a_process_is_killed(tmp_path):
    """With the code that means "start again", the name of the lost process, and the step that is
    saved.
    """
    pair = start_group(tmp_path / "run", 2, "--config.train.steps=100000")
    wait_for_steps(pair[0], tmp_path / "run", 5)
    while not (tmp_path / "run/checkpoints/3").exists():  # it is written beside the steps
        assert pair[0].poll() is None
        time.sleep(0.05)
    pair[1].kill()
    finish(pair[1], -9)
    output = finish(pair[0], 75)
    assert f"process 1 ({socket.gethostname()}) was lost: its connection is closed; step " in output
    assert "Traceback" not in output and not (tmp_path / "run" / OWNER).exists()


def test_two_signals_save_once_and_programs_are_kept(tmp_path, monkeypatch):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    process = start_process(tmp_path / "run", *LONG, f"--compilation_cache={tmp_path}/compiled")
    wait_for_steps(process, tmp_path / "run", 3)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGTERM)
    finish(process, 75)
    (step,) = Store(tmp_path / "run").steps()
    assert len(read_losses(tmp_path / "run")) == step
    assert any(
        file.name.startswith("jit_train_step-") for file in (tmp_path / "compiled").iterdir()
    )


LISTENERS = [pytest.param(1, 0, marks=pytest.mark.long), (1, 1), (2, 0)]


@pytest.mark.parametrize(("number", "workers"), LISTENERS)
def test_ctrl_c_saves_the_step_under_way(number, workers, tmp_path):
    """A terminal sends SIGINT to every process of the group, the data workers included; the run
    saves and leaves.
    """
    arguments = (*LONG, f"--config.data.workers={workers}")
    group = (
        start_group(tmp_path / "run", number, *arguments)
        if number > 1
        else [start_process(tmp_path / "run", *arguments, new_session=True)]
    )
    wait_for_steps(group[0], tmp_path / "run", 3)
    if number == 1:
        os.killpg(group[0].pid, signal.SIGINT)
    else:
        group[0].send_signal(signal.SIGINT)
    outputs = [finish(process, 130 if i == 0 else 75) for i, process in enumerate(group)]
    (step,) = Store(tmp_path / "run").steps()
    assert f"step {step} is saved; the same command continues" in outputs[0]
    assert "Traceback" not in outputs[0]
    assert len(read_losses(tmp_path / "run")) == step
    # With another schedule the run is refused, which shows that it was found.
    steps = f"--config.train.steps={step}"
    assert "the configuration changed since this checkpoint" in finish(
        start_process(tmp_path / "run", steps), 2
    )


def test_a_second_run_on_a_folder_in_use_is_refused(tmp_path):
    """The refusal names host and process; the first run goes on and its settings stay; then the
    folder is free.
    """
    first = start_process(tmp_path / "run", *LONG)
    wait_for_steps(first, tmp_path / "run", 2)
    settings = (tmp_path / "run/config.json").read_bytes()
    for second in (
        start_process(tmp_path / "run", "--config.seed=7"),
        *start_group(tmp_path / "run", 2),
    ):
        output = finish(second, 2)
        assert "run is in use" in output and "Traceback" not in output
        if "process 0 says which" not in output:
            assert f"process {first.pid} on {socket.gethostname()} has used it since 20" in output
    assert (tmp_path / "run/config.json").read_bytes() == settings
    steps = len(read_losses(tmp_path / "run"))
    wait_for_steps(first, tmp_path / "run", steps + 2)
    first.kill()  # the system gives the lock back
    first.communicate()
    finish(start_process(tmp_path / "run"))
    assert not (tmp_path / "run" / OWNER).exists()


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 600 KiB, where this user may mount one."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(folder)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("this user may not mount a file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_named_and_leaves_the_last_whole_checkpoint(small_disk):
    output = finish(
        start_process(
            small_disk / "run", "--config.train.checkpoint_every=1", "--config.train.keep=9"
        ),
        2,
    )
    assert "a checkpoint could not be written; step" in output and "Traceback" not in output
    (*_, newest) = Store(small_disk / "run").steps()
    assert read_arrays(small_disk / "run", newest)["step"] == newest
