"""The self-test of resuming: a run that is killed and continued against one that is not, bit by
bit.

Every host starts the training program as a child three times, so that the kill is a real one and
nothing survives in memory; the children of all hosts find each other as those of any run do.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from crossin_jax.checkpoint.fingerprint import find_damage
from crossin_jax.checkpoint.store import read_item
from crossin_jax.paths import absolute, is_bucket, move
from crossin_jax.process import remove

STEPS, SAVED, KILLED = 6, 3, 4  # a run of six steps, saved after the third, killed after the fourth
KILLED_LOG = "metrics.killed.jsonl"  # what the killed run recorded
OVERRIDES = {
    "train.steps": STEPS,
    "train.checkpoint_every": SAVED,
    "train.log_every": 1,
    "train.keep": 9,
    "train.keep_every": "none",
    "train.eval_every": "none",
    "train.benchmark_every": "none",
    "train.tensorboard": "false",
}


def run_selftest(
    output_dir: str, *, process: int, start: Callable[[list[str], Path], int] | None = None
) -> int:
    """Tests in a folder beside `output_dir`, prints a verdict on process 0, and returns the exit
    code: 0 or 1.
    """
    jax.config.update("jax_platforms", "cpu")  # the accelerator belongs to the children
    folder = absolute(output_dir)
    folder = folder.with_name(folder.name + ".selftest")
    start = start or start_child
    logs = Path(tempfile.gettempdir()) if is_bucket(folder) else folder.parent
    if process == 0:
        remove(folder)
    for name, kill, expected in (
        ("whole", [], 0),
        ("cut", [f"--kill_after={KILLED}"], None),
        ("cut", [], 0),
    ):
        say(process, f"{'continuing' if name == 'cut' and not kill else 'running'} {folder / name}")
        code = start(
            [f"--config.output_dir={folder / name}", *kill],
            logs / f"{folder.name}.{process}.log",
        )
        if kill and process == 0 and (folder / name / "metrics.jsonl").exists():
            # The continued run cuts its log to the checkpoint that it continues.
            move(folder / name / "metrics.jsonl", folder / name / KILLED_LOG)
        if code == 2 or expected == 0 and code or expected is None and code >= 0:
            say(process, f"FAILED: a run ended with {code}; its output is above")
            return code or 1
    faults = find_differences(folder / "whole", folder / "cut") if process == 0 else []
    if faults:
        say(
            process,
            f"FAILED: {'; '.join(faults[:4])}{' …' if len(faults) > 4 else ''}\n  both runs are "
            f"in {folder}",
        )
        return 1
    say(
        process,
        f"passed: killed after step {KILLED}, resumed from step {SAVED}; weights, moments, data "
        "position and losses equal those of the uninterrupted run bit by bit",
    )
    if process == 0:
        remove(folder)
    return 0


def say(process: int, text: str) -> None:
    """Prints a line of the self-test, on process 0."""
    if process == 0:
        print(f"selftest_resume: {text}", flush=True)


def start_child(more: list[str], log: Path) -> int:
    """Runs this command once more with other settings; its output is shown only where it fails by
    itself.
    """
    names = (
        "--config.output_dir=",
        "--selftest_resume",
        "--noresume",
        "--profile_steps",
        "--wandb",
        *(f"--config.{name}=" for name in OVERRIDES),
    )
    command = [argument for argument in sys.orig_argv[1:] if not argument.startswith(names)]
    command = [
        sys.executable,
        *command,
        *(f"--config.{name}={value}" for name, value in OVERRIDES.items()),
        *more,
    ]
    # GPUs add up in any order unless they are told not to; other backends do not know the flag's
    # subject
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_deterministic_ops=true".strip()
    with log.open("w+") as output:
        code = subprocess.run(
            command, env=os.environ | {"XLA_FLAGS": flags}, stdout=output, stderr=output
        ).returncode
        output.seek(0)
        if code > 0:
            print(output.read()[-2000:], file=sys.stderr)
    log.unlink()
    return code


def find_differences(whole: Path, cut: Path) -> list[str]:
    """What differs between the last checkpoints of two runs and the losses on the way; empty where
    nothing does.
    """
    expected = read_losses(whole / "metrics.jsonl")
    first, after = dict(read_losses(cut / KILLED_LOG)), read_losses(cut / "metrics.jsonl")
    if any(first[step] != loss for step, loss in expected[:SAVED]):
        return [
            "the losses before the kill differ already: this machine does not repeat its own "
            "computations"
        ]
    faults = []
    if [step for step, _ in after] != list(range(SAVED + 1, STEPS + 1)):
        faults.append(
            f"the continued run took steps {[step for step, _ in after]}, not {SAVED + 1} to "
            f"{STEPS}"
        )
    elif after != expected[SAVED:]:
        faults.append(f"losses after step {SAVED}: {expected[SAVED:]} against {after}")
    folders = [run / f"checkpoints/{STEPS}" for run in (whole, cut)]
    if damaged := [f"{folder}: {lost[0]}" for folder in folders if (lost := find_damage(folder))]:
        return [*faults, f"a checkpoint is not what was saved: {damaged[0]}"]
    positions = [read_item(folder, "data") for folder in folders]
    if positions[0] != positions[1]:
        faults.append(f"data position: {positions[0]} against {positions[1]}")
    return faults + compare_arrays(*(folder / "state" for folder in folders))


def compare_arrays(whole: Path, cut: Path) -> list[str]:
    """Arrays of two checkpoints that differ in a bit; one array at a time is in memory."""
    faults = []
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        names = [sorted(reader.metadata(state).item_metadata.tree) for state in (whole, cut)]
        if names[0] != names[1]:
            return [f"arrays: {set(names[0]) ^ set(names[1])} are in one run only"]
        for name in names[0]:
            one, other = (read_array(reader, state, name) for state in (whole, cut))
            if one.dtype != other.dtype or one.tobytes() != other.tobytes():
                distance = np.abs(one.astype(np.float64) - other.astype(np.float64)).max()
                faults.append(f"{name} differs by up to {distance:.3g}")
    return faults


def read_array(reader: Any, state: Path, name: str) -> np.ndarray:
    """One array of a checkpoint."""
    restore_args = {name: ocp.RestoreArgs(restore_type=np.ndarray)}
    return reader.restore(
        state,
        args=ocp.args.PyTreeRestore(
            item={name: 0}, restore_args=restore_args, partial_restore=True
        ),
    )[name]


def read_losses(file: Path) -> list[tuple[int, float]]:
    """(step, loss) as they were recorded, one a step."""
    records = map(json.loads, file.read_text().splitlines())
    return [(record["step"], record["loss"]) for record in records if "losses" in record]
