"""How a process is told to stop: at once, or after the phase that saves; what is half written
goes.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.processes import REPOSITORY

# Writes a file under a temporary name, with a saving phase around it or not.
PROGRAM = """
import signal, sys, time
from pathlib import Path
if sys.argv[1] == "nohup":
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
from crossin_jax import process
process.listen()
def work():
    with process.temporary(Path("half")) as half:
        half.mkdir()
        (half / "data").write_text("x")
        print("ready", flush=True)
        if sys.argv[1] == "blocked":  # a library that holds the interpreter, as the compiler does
            import ctypes
            ctypes.PyDLL(None).usleep(400_000)
        while not (sys.argv[1] == "saves" and process.is_told_to_stop()):
            time.sleep(0.02)
        time.sleep(0.3)
if sys.argv[1] == "saves":
    with process.deferred_stop():
        work()
    Path("saved").touch()
    time.sleep(0.1)
    process.check_stop()
work()
"""


def start(folder: Path, phase: str) -> subprocess.Popen:
    program = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, phase],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert program.stdout.readline() == "ready\n"
    return program


ENDS = [  # (phase, signals, exit code, line, whether it has saved)
    ("plain", ("TERM",), 75, "stopped by SIGTERM", False),
    ("plain", ("HUP",), 75, "stopped by SIGHUP", False),
    ("plain", ("INT",), 130, "stopped by the keyboard", False),
    ("plain", ("TERM", "INT"), 75, "stopped by SIGTERM", False),
    ("blocked", ("TERM",), 75, "stopped by SIGTERM", False),
    ("saves", ("TERM",), 75, None, True),
    ("saves", ("TERM", "TERM", "HUP", "TERM"), 75, None, True),
    ("saves", ("INT",), 130, "stopping: the run saves after this step; press Ctrl-C again", True),
    ("saves", ("TERM", "INT"), 130, "stopping: the run saves after this step", True),
    ("saves", ("INT", "INT"), 130, "stopped by the keyboard", False),
]


@pytest.mark.parametrize(("phase", "signals", "code", "line", "saves"), ENDS)
def test_a_signal_ends_a_process_with_one_line(phase, signals, code, line, saves, tmp_path):
    """With a documented code, and nothing half written."""
    program = start(tmp_path, phase)
    for name in signals:
        program.send_signal(getattr(signal, f"SIG{name}"))
        time.sleep(0.05)
    output, errors = program.communicate(timeout=20)
    assert (program.returncode, output) == (code, "")
    lines = errors.split("\n")
    assert lines == [""] if line is None else any(text.startswith(line) for text in lines)
    assert "Traceback" not in errors
    assert [file.name for file in tmp_path.iterdir()] == (["saved"] if saves else [])


def test_a_signal_that_is_ignored_from_the_start_stays_ignored(tmp_path):
    """nohup: the terminal may close."""
    program = start(tmp_path, "nohup")
    program.send_signal(signal.SIGHUP)
    time.sleep(0.2)
    assert program.poll() is None
    program.send_signal(signal.SIGTERM)
    assert "stopped by SIGTERM" in program.communicate(timeout=20)[1]


@pytest.mark.parametrize("name", ["TERM", "INT"])
def test_a_signal_while_a_program_is_imported(name, tmp_path):
    """The seconds before the first line of a program runs."""
    program = subprocess.Popen(
        [sys.executable, "-X", "importtime", "-m", "crossin_jax.generate", "--help"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    seen = ""
    while seen.rpartition("|")[2].strip() != "crossin_jax":
        seen = program.stderr.readline()
    program.send_signal(getattr(signal, f"SIG{name}"))
    output, errors = program.communicate(timeout=60)
    assert program.returncode == {"TERM": 75, "INT": 130}[name]
    assert "Traceback" not in errors and not output
