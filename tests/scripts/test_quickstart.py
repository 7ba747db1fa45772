"""scripts/quickstart.sh and setup.sh say what they do from the first second, with a pip that is
not there.
"""

import os
import shutil
import subprocess

import pytest

from tests.conftest import REPOSITORY

PIP = """#!/bin/sh
echo "$@" >>"$ROOM/calls"
case "$*" in
*pip*) echo "Collecting jax>=0.10.2 (from crossin_jax)"; echo "  Downloading jax.whl"
       echo "Collecting flax"; echo "Installing collected packages: jax, flax"
       exit "$PIP_CODE" ;;
*study*) echo "the study runs" ;;
esac
"""


@pytest.fixture
def room(tmp_path, monkeypatch):
    """A checkout with a .venv whose Python only notes its calls."""
    shutil.copytree(REPOSITORY / "scripts", tmp_path / "scripts")
    for name in ("setup.py", "pyproject.toml"):
        shutil.copy(REPOSITORY / name, tmp_path)
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/bin/python").write_text(PIP)
    (tmp_path / ".venv/bin/python").chmod(0o755)
    monkeypatch.setenv("ROOM", str(tmp_path))
    monkeypatch.setenv("PIP_CODE", "0")
    monkeypatch.delenv("PYTHON", raising=False)
    return tmp_path


def run(room, *command):
    return subprocess.run(command, cwd=room, capture_output=True, text=True, env=os.environ)


def test_the_quickstart_says_what_will_come_and_shows_every_package(room):
    said = run(room, "scripts/quickstart.sh", "--seeds=1").stdout
    steps = ("about 5 minutes", "1. install", "2. pretrain", "3. tune", "4. print", "  jax>=0.10.2")
    places = [said.index(words) for words in (*steps, "  flax", "unpacking", "the study runs")]
    assert places == sorted(places) and "Downloading" not in said
    calls = (room / "calls").read_text().splitlines()
    assert "--no-compile" in calls[0] and calls[1].endswith("configs/quickstart.py --seeds=1")
    # Installed once: the second run starts at once.
    assert "flax" not in run(room, "scripts/quickstart.sh").stdout


def test_a_failed_installation_ends_the_quickstart_and_is_tried_again(room, monkeypatch):
    monkeypatch.setenv("PIP_CODE", "1")
    done = run(room, "scripts/quickstart.sh")
    assert done.returncode and "the study runs" not in done.stdout
    monkeypatch.setenv("PIP_CODE", "0")
    assert "the study runs" in run(room, "scripts/quickstart.sh").stdout


def test_torch_of_the_tests_may_be_missing(room):
    """Its CPU build comes first, and is no reason to stop."""
    assert run(room, "scripts/setup.sh", "test").returncode == 0
    calls = (room / "calls").read_text().splitlines()
    assert [call.split()[-1] for call in calls] == ["torch==2.13.0", ".[test]"]
