"""One owner per folder: a file names the process that writes there, and others are refused until it
ends.

The file is the lock. Its owner rewrites it every few seconds, so it works where locks do not: on
file systems that several hosts share, and in buckets, where it is an object that only one process
can create.
"""

import contextlib
import datetime
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from crossin_jax.config import UserError
from crossin_jax.paths import absolute, is_bucket
from crossin_jax.process import cleanup, leave

OWNER = ".owner.json"
BEAT = 10.0  # seconds between the signs of life that an owner writes
SILENCE = 60.0  # seconds without one, after which an owner on another host counts as dead


@contextlib.contextmanager
def own(folder: Path, name: str = OWNER) -> Iterator[None]:
    """Keeps other processes out of a folder, which is made; raises `UserError` that names the one
    that uses it.

    The owner is written in a file of the folder, and gives a sign of life every `BEAT` seconds by
    rewriting it. This needs no locks, so it works on shared file systems and in buckets. An
    owner on this machine that no longer runs is known at once; one on another host is given
    `SILENCE` seconds. If the block fails in a folder that this call made and nothing was written,
    the folder is removed.
    """
    folder = absolute(folder)
    if folder / name in Owner.held:  # a study owns the folder of the cell that it trains
        yield
        return
    new = []  # a bucket has no folders
    if not is_bucket(folder):
        new = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    owner = Owner(folder / name)

    def release() -> None:
        owner.release()
        for path in (folder / "checkpoints", *new):
            with contextlib.suppress(OSError):  # it is absent, or holds something
                path.rmdir()

    with cleanup(release):
        folder.mkdir(parents=True, exist_ok=True)
        owner.claim()
        yield


def own_output(path: Path) -> contextlib.AbstractContextManager[None]:
    """The same for one file or folder to be written: its owner is noted beside it."""
    return own(path.parent, f".{path.name}{OWNER}")


class Owner:
    """The file that says which process owns a folder."""

    held: set[Path] = set()

    def __init__(self, file: Path):
        self._file = file
        self._over = threading.Event()
        self._lock = threading.RLock()
        self._beats = 0
        self._self = {
            "host": socket.gethostname(),
            "process": os.getpid(),
            "started": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
            "machine": find_machine(),
            "birth": find_birth(os.getpid()),
            "token": uuid.uuid4().hex,
        }

    def claim(self) -> None:
        """Writes the file where there is none, or where its owner is dead."""
        while True:
            try:
                self._write(os.O_CREAT | os.O_EXCL)
                break
            except FileExistsError:
                pass
            owner = read_owner(self._file)
            if owner is None:
                continue  # it was released between our two calls
            if owner["token"] == self._self["token"]:
                break  # a bucket has our file, and its answer was lost
            if is_alive(owner, self._file):
                refuse(owner, self._file)
            if read_owner(self._file) == owner:
                self._file.unlink(missing_ok=True)
        # Two processes may have found the same dead owner. Each removed a file and wrote its own;
        # the later one removed that of the earlier, which sees it now.
        time.sleep(0.05)
        owner = read_owner(self._file)
        if owner is None or owner["token"] != self._self["token"]:
            refuse(owner or {}, self._file)
        self.held.add(self._file)
        threading.Thread(target=self._keep_alive, name="owner", daemon=True).start()

    def _write(self, flags: int) -> None:
        self._beats += 1
        # Always of the same length and written in place by one call: a reader on another host sees
        # an open file change at once, but a renamed one only when its directory cache expires.
        text = json.dumps(self._self | {"beat": f"{self._beats:012}"}) + "\n"
        if is_bucket(self._file):  # one put each; the bucket itself refuses a second owner
            (self._file.create if flags & os.O_EXCL else self._file.write_bytes)(text.encode())
            return
        file = os.open(self._file, flags | os.O_WRONLY, 0o644)
        try:
            os.write(file, text.encode())
        except OSError:
            self._file.unlink(missing_ok=True)
            raise
        finally:
            os.close(file)

    def _keep_alive(self) -> None:
        while not self._over.wait(BEAT):
            # A file system that does not answer for a while is no reason to stop.
            with self._lock, contextlib.suppress(OSError):
                if self._over.is_set():
                    return
                owner = read_owner(self._file)
                if owner and owner["token"] != self._self["token"]:
                    leave(2, f"error: {describe_owner(owner, self._file)}; this run stops")
                self._write(0 if owner else os.O_CREAT | os.O_EXCL)

    def release(self) -> None:
        """Removes the file if it is still ours."""
        with self._lock, contextlib.suppress(OSError):
            self._over.set()
            if self._file in self.held:
                self.held.remove(self._file)
                owner = read_owner(self._file)
                if owner and owner["token"] == self._self["token"]:
                    self._file.unlink()


def read_owner(file: Path) -> dict[str, Any] | None:
    """What a process wrote about itself, with a token; None where there is no file."""
    for _ in range(5):
        try:
            owner = json.loads(file.read_bytes())
            return {"token": ""} | owner
        except FileNotFoundError:
            return None
        except (ValueError, TypeError):  # its owner is writing it
            time.sleep(0.05)
    return {"token": ""}


def is_alive(owner: dict[str, Any], file: Path) -> bool:
    """Whether the owner of a folder still runs; it may take `SILENCE` seconds to see."""
    if owner.get("machine") and owner["machine"] == find_machine():
        return owner["birth"] is not None and find_birth(owner["process"]) == owner["birth"]
    logging.warning(
        "%s; waiting up to %g s for a sign of life", describe_owner(owner, file), SILENCE
    )
    # Clocks of two hosts may differ, so that only a change of the file counts.
    deadline = time.monotonic() + SILENCE
    while time.monotonic() < deadline:
        time.sleep(min(BEAT / 10, SILENCE / 10))
        if read_owner(file) != owner:
            return True
    return False


def find_machine() -> str:
    """This boot of this machine and its space of process numbers; empty where the system does not
    say.
    """
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.stat('/proc/self/ns/pid').st_ino}"
    return ""


def find_birth(process: int) -> str | None:
    """When a process of this machine was started, in ticks since boot: numbers are used again. None
    for a dead one.
    """
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]


def describe_owner(owner: dict[str, Any], file: Path) -> str:
    """One line: the folder, and the process that owns it."""
    place = file.parent / file.name.removesuffix(OWNER)[1:]
    if not {"process", "host", "started"} <= owner.keys():
        return f"{place} is in use: another process is starting there"
    return (
        f"{place} is in use: process {owner['process']} on {owner['host']} has used it since "
        f"{owner['started']}"
    )


def refuse(owner: dict[str, Any], file: Path) -> None:
    """Raises the `UserError` of a folder that is in use."""
    raise UserError(
        f"{describe_owner(owner, file)}\nwait until it ends, stop it, or name another folder"
    )
