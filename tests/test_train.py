"""A run from its first step to its last: resumed bit by bit, stopped by a signal, robust against damage and faults."""

import dataclasses
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from crossin_jax.checkpoint.store import Store
from crossin_jax.config import Lora, UserError
from crossin_jax.parallel import hosts
from crossin_jax.train import train
from tests.configs import tiny
from tests.helpers import config_in

REPOSITORY = Path(__file__).resolve().parent.parent


def read_arrays(folder: Path, step: int) -> dict[str, np.ndarray]:
    """Everything a checkpoint holds, as arrays by name."""
    import orbax.checkpoint as ocp
    state = folder / "checkpoints" / str(step) / "state"
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        names = checkpointer.metadata(state).item_metadata.tree
        return checkpointer.restore(state, args=ocp.args.PyTreeRestore(
            restore_args={name: ocp.RestoreArgs(restore_type=np.ndarray) for name in names}))


def read_losses(folder: Path) -> dict[int, float]:
    """The last recorded loss of every step."""
    losses = {}
    for record in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()):
        if "losses" in record:
            first = record["step"] - len(record["losses"]) + 1
            losses |= {first + i: loss for i, loss in enumerate(record["losses"])}
    return losses


def copy_run(run: Path, folder: Path, *, without: int | None = None) -> Path:
    """A copy of a run, as if it had been killed before the checkpoint of a step."""
    shutil.copytree(run, folder)
    if without:
        shutil.rmtree(folder / "checkpoints" / str(without))
    return folder


def test_losses_fall(pretrained, adapted):
    for run, fall in ((pretrained, 0.3), (adapted, 0.1)):
        losses = read_losses(run)
        assert sorted(losses) == [1, 2, 3, 4, 5, 6]
        assert losses[6] < losses[1] - fall
    records = [json.loads(line) for line in (adapted / "metrics.jsonl").read_text().splitlines()]
    held_out = [record for record in records if "held_out/loss" in record]
    assert set(held_out[-1]) == {"step", "held_out/loss", "held_out/loss/dev/en", "held_out/loss/dev/es"}
    shares = [value for name, value in records[0].items() if name.startswith("share/")]
    assert sum(shares) == pytest.approx(1)


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_resumed_run_equals_the_uninterrupted_one_bit_by_bit(kind, pretrained, adapted, tmp_path):
    run, variant = (pretrained, "pretrain") if kind == "full" else (adapted, str(pretrained / "model"))
    folder = copy_run(run, tmp_path / "run", without=6)
    (folder / "metrics.jsonl").unlink()
    train(config_in(folder, variant))
    expected, resumed = read_arrays(run, 6), read_arrays(folder, 6)
    assert expected.keys() == resumed.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(array, resumed[name], err_msg=name)
    assert sorted(read_losses(folder)) == [4, 5, 6]
    assert {s: read_losses(run)[s] for s in (4, 5, 6)} == read_losses(folder)
    positions = [json.loads((f / "checkpoints/6/data/metadata").read_text()) for f in (run, folder)]
    assert positions[0] == positions[1]


def test_a_stop_saves_and_leaves_with_75(pretrained, tmp_path, monkeypatch):
    monkeypatch.setattr(hosts.Preemption, "reached", lambda self, step: step == 2)
    with pytest.raises(SystemExit) as stop:
        train(config_in(tmp_path / "run"))
    assert stop.value.code == 75
    assert Store(tmp_path / "run").steps() == [2]
    monkeypatch.undo()
    train(config_in(tmp_path / "run"))
    for name, array in read_arrays(pretrained, 6).items():
        np.testing.assert_array_equal(array, read_arrays(tmp_path / "run", 6)[name], err_msg=name)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of Orbax: reads after a bad one
def test_a_damaged_checkpoint_is_named_and_skipped(pretrained, tmp_path, caplog):
    folder = copy_run(pretrained, tmp_path / "run")
    files = sorted((folder / "checkpoints/6/state").rglob("*"), key=lambda f: f.stat().st_size if f.is_file() else 0)
    files[-1].write_bytes(files[-1].read_bytes()[:100])
    train(config_in(folder))
    assert "checkpoints/6 is damaged and is skipped" in caplog.text
    for name, array in read_arrays(pretrained, 6).items():
        np.testing.assert_array_equal(array, read_arrays(folder, 6)[name], err_msg=name)


def test_another_experiment_is_refused(pretrained, adapted, tmp_path):
    changed = dataclasses.replace(tiny.get_config().optim, learning_rate=1e-3)
    with pytest.raises(UserError, match=r"optim.learning_rate: 0.01 -> 0.001"):
        train(config_in(copy_run(pretrained, tmp_path / "a"), optim=changed))
    with pytest.raises(UserError, match="lora.rank: 4 -> 8"):
        train(config_in(copy_run(adapted, tmp_path / "b"), str(pretrained / "model"),
                        lora=Lora(rank=8, alpha=8.0, dropout=0.1, modules_to_save=())))


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    optim = dataclasses.replace(tiny.get_config().optim, learning_rate=1e25, clip_norm=None)
    with pytest.raises(UserError, match=r"step \d is not finite; there is no checkpoint yet"):
        train(config_in(tmp_path / "run", optim=optim))


def test_a_tokenizer_of_another_model_is_refused(pretrained, tmp_path):
    config = config_in(tmp_path / "run", str(pretrained / "model"))
    folder = shutil.copytree(pretrained / "tokenizer", tmp_path / "tokenizer")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    for i in range(30):
        tokenizer["added_tokens"].append({**tokenizer["added_tokens"][0], "id": 400 + i, "content": f"<new{i}>"})
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    config.model.tokenizer = str(folder)
    with pytest.raises(UserError, match="430 tokens, but the model's vocabulary has 400"):
        train(config)


def test_benchmarks_and_profiler_run_during_training(adapted, pretrained, tmp_path):
    config = config_in(tmp_path / "run", str(pretrained / "model"))
    config.train = dataclasses.replace(config.train, benchmark_every=3)
    config.evaluation = dataclasses.replace(config.evaluation, method="choices", limit=4)
    train(config, profile_steps=(2, 3))
    records = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    scored = [record for record in records if "cross_world:dev/sum/p0/AC3_2" in record]
    assert [record["step"] for record in scored] == [3, 6]
    assert all(0 <= record["cross_world:dev/sum/p0/accuracy/es"] <= 1 for record in scored)
    assert list((tmp_path / "run/profile").rglob("*.xplane.pb"))
    assert read_losses(tmp_path / "run") == read_losses(adapted)  # asking changes nothing


# ---- Processes

def start_process(folder: Path, *arguments: str, devices: int = 1) -> subprocess.Popen:
    """The training program in a process of its own."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(REPOSITORY),
                                "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    command = [sys.executable, "-m", "crossin_jax.train", "--config", str(REPOSITORY / "tests/configs/tiny.py"),
               f"--config.output_dir={folder}", *arguments]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen) -> str:
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    return output


def test_one_device_and_two_processes_agree_with_eight_devices(pretrained, tmp_path):
    assert jax.device_count() == 8
    with socket.socket() as free:
        free.bind(("localhost", 0))
        coordinator = f"localhost:{free.getsockname()[1]}"
    pair = [start_process(tmp_path / "two", f"--coordinator={coordinator}", "--num_processes=2", f"--process_id={i}")
            for i in range(2)]
    for process in pair:
        finish(process)
    finish(start_process(tmp_path / "one"))
    expected = read_losses(pretrained)
    for name in ("one", "two"):
        losses = read_losses(tmp_path / name)
        np.testing.assert_allclose([losses[s] for s in sorted(expected)], [expected[s] for s in sorted(expected)],
                                   rtol=1e-5)


def test_sigterm_saves_and_the_same_command_continues(tmp_path):
    process = start_process(tmp_path / "run", "--config.train.steps=100000", "--config.train.checkpoint_every=100000")
    lines = tmp_path / "run" / "metrics.jsonl"
    deadline = time.time() + 120
    while not (lines.is_file() and lines.read_text().count("\n") > 3):
        assert time.time() < deadline and process.poll() is None
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 75, output
    (step,) = Store(tmp_path / "run").steps()
    assert len(read_losses(tmp_path / "run")) == step


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 600 KiB, where this user may mount one."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("this user may not mount a file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_named_and_leaves_the_last_whole_checkpoint(small_disk):
    process = start_process(small_disk / "run", "--config.train.checkpoint_every=1", "--config.train.keep=9")
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 2, output
    assert "a checkpoint could not be written; step" in output and "Traceback" not in output
    (*_, newest) = Store(small_disk / "run").steps()
    assert read_arrays(small_disk / "run", newest)["step"] == newest
