"""One owner per folder: the second process is refused, and a dead owner gives the folder up."""

import json
import os
import socket
import subprocess
import sys
import threading
import time

import pytest

from crossin_jax import ownership
from crossin_jax.config import UserError
from crossin_jax.ownership import OWNER, own, own_output
from tests.processes import REPOSITORY

HOLD = """
import sys, time
from pathlib import Path
from crossin_jax import ownership, process
ownership.BEAT = float(sys.argv[2])
process.listen()
with ownership.own(Path(sys.argv[1])):
    print("owns", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def hold():
    """Starts a process that owns a folder; all are ended afterwards."""
    started = []

    def hold(folder, beat: float = 10.0) -> subprocess.Popen:
        process = subprocess.Popen(
            [sys.executable, "-c", HOLD, str(folder), str(beat)],
            env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        assert process.stdout.readline() == "owns\n", process.communicate()
        return process

    yield hold
    for process in started:
        process.kill()
        process.communicate()


def test_a_second_process_is_refused_with_the_name_of_the_first(hold, tmp_path):
    first = hold(tmp_path / "run")
    with pytest.raises(UserError) as refusal, own(tmp_path / "run"):
        pass
    assert str(refusal.value).startswith(
        f"{tmp_path / 'run'} is in use: process {first.pid} on {socket.gethostname()} has used it "
        "since 20"
    )
    first.kill()
    first.communicate()
    with own(tmp_path / "run"):  # at once: the system knows that it is dead
        assert json.loads((tmp_path / "run" / OWNER).read_text())["process"] == os.getpid()
    assert not any((tmp_path / "run").iterdir())


def test_a_folder_in_which_nothing_was_written_is_gone(tmp_path):
    """Also the folders above it that were made for it, and only those."""
    with own(tmp_path / "a/b/run"):
        (tmp_path / "a/b/run/checkpoints").mkdir()
    assert not any(tmp_path.iterdir())
    with pytest.raises(UserError), own(tmp_path / "a/b"):
        (tmp_path / "a/b/written").touch()
        raise UserError("refused")
    assert [file.name for file in (tmp_path / "a/b").iterdir()] == ["written"]


def test_an_owner_that_is_stopped_still_owns_and_one_that_ends_does_not(hold, tmp_path):
    tmp_path.joinpath("mine").touch()
    first = hold(tmp_path)
    first.send_signal(19)  # SIGSTOP
    with pytest.raises(UserError), own(tmp_path):
        pass
    first.send_signal(18)  # SIGCONT
    first.terminate()
    assert first.wait(10) == 75 and [file.name for file in tmp_path.iterdir()] == ["mine"]


@pytest.fixture
def elsewhere(monkeypatch):
    """As seen from another host, where only signs of life count."""
    monkeypatch.setattr(ownership, "find_machine", lambda: "another")
    monkeypatch.setattr(ownership, "SILENCE", 0.5)


def test_on_another_host_a_sign_of_life_refuses_and_silence_gives_the_folder_up(
    hold, elsewhere, tmp_path
):
    first = hold(tmp_path, beat=0.1)
    with pytest.raises(UserError), own(tmp_path):
        pass
    first.kill()
    first.communicate()
    start = time.monotonic()
    with own(tmp_path):
        assert time.monotonic() - start > 0.4
    assert not any(tmp_path.iterdir())


def test_an_owner_that_lost_its_folder_leaves(hold, elsewhere, tmp_path):
    """A host that hung for a minute comes back, and finds that another process works there."""
    first = hold(tmp_path, beat=0.1)
    first.send_signal(19)
    with own(tmp_path):
        first.send_signal(18)
        assert first.wait(10) == 2
        assert "is in use: process" in first.stderr.read()
        assert (tmp_path / OWNER).exists()


@pytest.mark.parametrize(
    "note", ["", "[]", "{", '{"host": "h", "process": 1, "started": "yesterday"}', "\0" * 99]
)
def test_a_note_that_nobody_renews_is_replaced(note, elsewhere, tmp_path):
    """An earlier version's, a damaged one, or an empty one of a full disk."""
    (tmp_path / OWNER).write_text(note)
    with own(tmp_path):
        assert json.loads((tmp_path / OWNER).read_text())["process"] == os.getpid()


def test_of_several_that_find_a_dead_owner_one_gets_the_folder(elsewhere, tmp_path, monkeypatch):
    """Whichever of them removes the note of the dead first."""
    (tmp_path / OWNER).write_text('{"host": "h", "process": 1, "started": "yesterday"}')
    inside, refused, lock = [], [], threading.Lock()
    monkeypatch.setattr(ownership.Owner, "held", set())

    def compete():
        try:
            owner = ownership.Owner(tmp_path / OWNER)
            owner.claim()
            with lock:
                inside.append(owner)
        except UserError:
            with lock:
                refused.append(1)

    threads = [threading.Thread(target=compete) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(inside) == 1 and len(refused) == 5
    inside[0].release()


def test_a_process_may_own_a_folder_twice_and_a_file_beside_it(tmp_path):
    """A study owns the folder in which it trains; an export owns a name."""
    with own(tmp_path), own(tmp_path):
        (tmp_path / "x").touch()
        with own_output(tmp_path / "model"):
            found = sorted(file.name for file in tmp_path.iterdir())
            assert found == [f".model{OWNER}", OWNER, "x"]
    assert [file.name for file in tmp_path.iterdir()] == ["x"]


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"), own(tmp_path / "file/run"):
        pass
    assert [file.name for file in tmp_path.iterdir()] == ["file"]
