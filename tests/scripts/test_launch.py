"""Launching: what the TPU script prints is pinned and, behind a stand-in for gcloud, carried out;
Slurm; Docker.
"""

import json
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent.parent
POD = REPOSITORY / "scripts/tpu/pod.py"
WHERE = ("--name=mine", "--zone=us-east5-b")
# a machine room of two workers: `ssh` runs the command in the home folder of each, `scp` copies
# from or to them
GCLOUD = """#!/usr/bin/env python3
import os, pathlib, shutil, subprocess, sys
room = pathlib.Path(os.environ["ROOM"])
with (room / "calls").open("a") as calls:
    print(*sys.argv[1:], file=calls)
flags = dict(a[2:].partition("=")[::2] for a in sys.argv[5:] if a.startswith("--"))
plain = [a for a in sys.argv[5:] if not a.startswith("--")]
workers = ["0", "1"] if flags.get("worker") == "all" else [flags.get("worker", "0")]
for worker in workers:
    home = room / worker
    home.mkdir(exist_ok=True)
    if sys.argv[4] == "ssh":
        environment = os.environ | {"HOME": str(home)}
        subprocess.run(["bash", "-c", flags["command"]], env=environment, cwd=home, check=True)
    elif sys.argv[4] == "scp":
        source, target = (
            home / path.partition(":")[2] if path.startswith("mine:") else pathlib.Path(path)
            for path in plain
        )
        target = target / source.name if target.is_dir() else target
        shutil.copytree(source, target) if source.is_dir() else shutil.copy(source, target)
"""


def dry_run(*arguments: str, where: tuple[str, ...] = WHERE) -> list[list[str]]:
    """The commands that are printed."""
    done = subprocess.run(
        [sys.executable, POD, *where, "--dry_run", *arguments],
        capture_output=True,
        text=True,
        env={"PATH": "/nonexistent"},
    )
    assert done.returncode == 0, done.stderr
    lines = shlex.split(done.stdout.replace("\ngcloud", " ;; gcloud").replace("\ngit", " ;; git"))
    return [list(filter(None, group.split("\0"))) for group in "\0".join(lines).split(";;")]


@pytest.mark.parametrize(
    ("arguments", "command"),
    [
        (
            ("create", "--type=v6e-16"),
            "tpu-vm create mine --version=v2-alpha-tpuv6e --accelerator-type=v6e-16 "
            "--zone=us-east5-b",
        ),
        (
            ("create", "--type=v5litepod-16", "--spot"),
            "tpu-vm create mine --version=v2-alpha-tpuv5-lite --accelerator-type=v5litepod-16 "
            "--spot --zone=us-east5-b",
        ),
        (
            ("create", "--type=v5p-32", "--queued"),
            "queued-resources create mine --node-id=mine "
            "--runtime-version=v2-alpha-tpuv5 --accelerator-type=v5p-32 --zone=us-east5-b",
        ),
        (
            ("create", "--type=v9-8", "--version=new"),
            "tpu-vm create mine --version=new --accelerator-type=v9-8 --zone=us-east5-b",
        ),
        (("status",), "tpu-vm describe mine '--format=value(state)' --zone=us-east5-b"),
        (
            ("status", "--queued"),
            "queued-resources describe mine '--format=value(state.state)' --zone=us-east5-b",
        ),
        (
            ("tail", "--worker=3"),
            "tpu-vm ssh mine --worker=3 '--command=tail -n 50 -F ~/crossin_jax.log' "
            "--zone=us-east5-b",
        ),
        (
            ("fetch", "runs/mine", "runs"),
            "tpu-vm scp --recurse mine:runs/mine runs --worker=0 --zone=us-east5-b",
        ),
        (("delete",), "tpu-vm delete mine --quiet --zone=us-east5-b"),
        (("delete", "--queued"), "queued-resources delete mine --force --quiet --zone=us-east5-b"),
    ],
)
def test_a_dry_run_prints_the_command(arguments, command):
    assert dry_run(*arguments) == [["gcloud", "compute", "tpus", *shlex.split(command)]]


def test_the_project_is_named_in_every_command():
    for arguments in (
        ("create", "--type=v4-8"),
        ("setup",),
        ("run", "true"),
        ("stop",),
    ):
        for command in dry_run(*arguments, where=(*WHERE, "--project=p")):
            assert command[0] == "git" or command[-1] == "--project=p"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("create", "--type=v9-8"), "no runtime is known for v9; known: v6e, v5p, v5litepod, v4"),
        (("run",), "run needs a command"),
        (("crate",), "invalid choice: 'crate'"),
    ],
)
def test_mistakes_are_refused(arguments, words):
    done = subprocess.run([sys.executable, POD, *WHERE, *arguments], capture_output=True, text=True)
    assert done.returncode == 2 and words in done.stderr


@pytest.fixture
def room(tmp_path, monkeypatch):
    """A machine room whose gcloud, scontrol and srun are stand-ins."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/gcloud").write_text(GCLOUD)
    for name, code in (("srun", "$SRUN_CODE"), ("scontrol", "0")):
        (tmp_path / f"bin/{name}").write_text(
            f'#!/bin/sh\necho {name} "$@" >>$ROOM/calls\nexit {code}\n'
        )
    for file in (tmp_path / "bin").iterdir():
        file.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    monkeypatch.setenv("ROOM", str(tmp_path))
    return tmp_path


def pod(*arguments: str) -> None:
    subprocess.run(
        [sys.executable, POD, *WHERE, *arguments], check=True, stdout=subprocess.DEVNULL, timeout=30
    )


def wait_for(file: Path, text: str) -> str:
    deadline = time.monotonic() + 20
    while not (file.is_file() and text in file.read_text()):
        assert time.monotonic() < deadline, file.read_text() if file.is_file() else file
        time.sleep(0.05)
    return file.read_text()


def test_run_stop_and_fetch_reach_every_worker(room):
    for worker in "01":
        (room / worker / "crossin_jax/.venv/bin").mkdir(parents=True)
        (room / worker / "crossin_jax/.venv/bin/train").write_text(
            '#!/bin/bash\ntrap "echo saved; exit 75" TERM\necho in $PWD: "$@"\nwhile :; do sleep '
            "0.05; done\n"
        )
        (room / worker / "crossin_jax/.venv/bin/train").chmod(0o755)
    pod("run", "train", "--config", "configs/mine.py", "--config.name=two words")
    for worker in "01":
        log = wait_for(room / worker / "crossin_jax.log", "two words")
        assert (
            log
            == f"in {room}/{worker}/crossin_jax: --config configs/mine.py --config.name=two words\n"
        )
    pod("stop")
    for worker in "01":
        wait_for(room / worker / "crossin_jax.log", "saved")
    pod("fetch", "crossin_jax.log", str(room / "fetched"))
    assert "saved" in (room / "fetched").read_text()


def test_setup_sends_the_committed_files_and_installs_them(room, monkeypatch):
    """The installer itself is a stand-in; the archive, the copies and the shell around it are
    real.
    """
    commands = dry_run("setup")
    assert [command[:4] for command in commands[1:]] == [
        ["gcloud", "compute", "tpus", "tpu-vm"]
    ] * 2
    scripts = [command[-2].removeprefix("--command=") for command in commands[2:]]
    for script in scripts:
        assert subprocess.run(["bash", "-n", "-c", script]).returncode == 0
    (room / "bin/git").write_text(
        '#!/bin/sh\necho git "$@" >>$ROOM/calls\ntar -czf /tmp/crossin_jax.tar.gz -C $ROOM/src .\n'
    )
    (room / "bin/git").chmod(0o755)
    (room / "src/scripts").mkdir(parents=True)
    (room / "src/scripts/setup.sh").write_text('#!/bin/sh\necho "$PYTHON $@" >$HOME/installed\n')
    (room / "src/scripts/setup.sh").chmod(0o755)
    pod("setup")
    assert [(room / worker / "installed").read_text() for worker in "01"] == [
        "python3 tpu gcs\n"
    ] * 2
    assert (
        "git archive --format=tar.gz --output=/tmp/crossin_jax.tar.gz HEAD"
        in (room / "calls").read_text()
    )


@pytest.mark.parametrize(("code", "again"), [(75, True), (0, False), (2, False)])
def test_slurm_queues_a_run_again_that_was_told_to_stop(code, again, room, monkeypatch):
    for name, value in (("SRUN_CODE", code), ("SLURM_SUBMIT_DIR", REPOSITORY), ("SLURM_JOB_ID", 7)):
        monkeypatch.setenv(name, str(value))
    script = REPOSITORY / "scripts/slurm/train.sbatch"
    done = subprocess.run(["bash", script, "--config", "configs/mine.py"])
    assert done.returncode == code
    calls = (room / "calls").read_text().splitlines()
    assert calls == [
        "srun --kill-on-bad-exit=0 .venv/bin/python -m crossin_jax.train --config configs/mine.py",
        *(["scontrol requeue 7"] if again else []),
    ]
    # srun's processes get it, not this shell.
    assert "#SBATCH --signal=TERM@120" in script.read_text()


def test_the_image_names_what_there_is():
    text = (REPOSITORY / "scripts/docker/Dockerfile").read_text()
    for sources in re.findall(r"^COPY (.+) \S+$", text, re.MULTILINE):
        assert all((REPOSITORY / source).exists() for source in sources.split())
    extras = re.search(
        r"extras_require={(.*?)\n    }", (REPOSITORY / "setup.py").read_text(), re.DOTALL
    ).group(1)
    assert all(
        f'"{extra}"' in extras for extra in (re.search(r"ARG EXTRA=(\w+)", text).group(1), "tpu")
    )
    entry, command = (
        json.loads(re.search(rf"^{word} (.+)$", text, re.MULTILINE).group(1))
        for word in ("ENTRYPOINT", "CMD")
    )
    done = subprocess.run(
        [sys.executable, *entry[1:], *command], capture_output=True, text=True, cwd=REPOSITORY
    )
    assert done.returncode == 0 and "--config.optim.learning_rate" in done.stdout
