"""Output files and folders: checked before any work, written whole or not at all, used by one process at a time."""

import contextlib
import datetime
import errno
import fcntl
import json
import logging
import os
import socket
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from crossin_jax.config import UserError

OWNER = ".owner.json"


def check_output(flag: str, path: Path) -> None:
    """Refuses a file that cannot be written, before hours are spent on what belongs in it."""
    if path.is_dir():
        raise UserError(f"{flag}={path}: a folder; name a file in it")
    if path.exists() and not path.is_file():  # replacing /dev/null would break the machine
        raise UserError(f"{flag}={path}: not a regular file; name another")
    if not path.parent.is_dir():
        raise UserError(f"{flag}={path}: the folder {path.parent} does not exist; make it first")
    if not os.access(path.parent, os.W_OK):
        raise UserError(f"{flag}={path}: the folder {path.parent} is not writable; choose another")


def write_whole(path: Path, content: str | bytes) -> None:
    """Replaces a file, or leaves the old one; several processes and hosts may write the same at once."""
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.part")
    try:
        part.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


@contextlib.contextmanager
def own_folder(folder: Path) -> Iterator[None]:
    """Keeps other processes out of a folder; raises `UserError` that names the one that is using it already.

    The lock is a POSIX record lock: the system releases it when its process ends, however it ends, and it works over
    NFS. Where a file system has no locks, a warning says so and the folder is used without one.
    """
    file = open_lock(folder / OWNER)
    if file is not None:
        started = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
        file.write(json.dumps({"host": socket.gethostname(), "process": os.getpid(), "started": started}))
        file.flush()
    try:
        yield
    finally:
        if file is not None:
            (folder / OWNER).unlink(missing_ok=True)  # before the lock is released, so that it is still ours
            file.close()


def open_lock(path: Path) -> TextIO | None:
    """The locked, empty file at a path, or None where its file system has no locks."""
    while True:
        file = path.open("a+")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                file.close()
                logging.warning("%s: this file system has no locks; let no other run use it", path.parent)
                return None
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise
            refuse_folder(path)
        # Compare by stat: opening and closing the file once more would release the lock.
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            file.truncate(0)
            return file
        file.close()  # its last owner removed it between our two calls


def refuse_folder(path: Path) -> None:
    """Raises `UserError` with what the lock file says of its owner."""
    try:
        owner = json.loads(path.read_text())
        who = f"process {owner['process']} on {owner['host']} has used it since {owner['started']}"
    except (OSError, ValueError, KeyError, TypeError):
        who = "another process is starting there"
    raise UserError(f"{path.parent} is in use: {who}\nwait until it ends, stop it, or name another output_dir")
