"""Programs in processes of their own, alone or several as one run over loopback."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
TINY = ("--config", str(REPOSITORY / "tests/configs/tiny.py"))
QUICK = os.environ["XLA_FLAGS"].partition(" ")[2]  # conftest's, without the number of devices

# torch is no dependency, but transformers imports it where it is installed, which would be half of
# these seconds
WITHOUT_TORCH = """import runpy, sys
sys.modules["torch"] = None
runpy.run_module("crossin_jax." + sys.argv.pop(1), run_name="__main__")"""


def start_process(
    folder: Path,
    *arguments: str,
    devices: int = 1,
    config: tuple[str, ...] = TINY,
    new_session: bool = False,
) -> subprocess.Popen:
    """The training program."""
    arguments = (*config, f"--config.output_dir={folder}", *arguments)
    return start_program("train", *arguments, devices=devices, new_session=new_session)


def start_program(
    name: str, *arguments: str, devices: int = 1, new_session: bool = False
) -> subprocess.Popen:
    """A program of the package; its output and errors are one text. In a new session it leads a
    process group.
    """
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(REPOSITORY),
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} {QUICK}",
    }
    return subprocess.Popen(
        [sys.executable, "-c", WITHOUT_TORCH, name, *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=new_session,
    )


def start_group(
    folder: Path, number: int, *arguments: str, come: range | None = None
) -> list[subprocess.Popen]:
    """Training processes of one run on this machine; `come` are those that are started."""
    return [start_process(folder, *arguments, *place) for place in make_places(number, come)]


def make_places(number: int, come: range | None = None) -> list[list[str]]:
    """The flags of each process of a run on this machine."""
    coordinator = f"localhost:{free_port()}"
    return [
        [f"--coordinator={coordinator}", f"--num_processes={number}", f"--process_id={i}"]
        for i in come or range(number)
    ]


def free_port() -> int:
    """A port that nobody listens on at the moment."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def finish(process: subprocess.Popen, code: int = 0) -> str:
    """The output of a process that must end with this exit code."""
    output, _ = process.communicate(timeout=240)
    assert process.returncode == code, output
    return output


def wait_for_steps(process: subprocess.Popen, folder: Path, count: int) -> None:
    """Returns when a run has reported that many steps."""
    lines = folder / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (lines.is_file() and lines.read_text().count("\n") >= count):
        assert time.monotonic() < deadline and process.poll() is None, process.communicate()[0]
        time.sleep(0.1)
