"""Output files: looked at before any work, and written whole or not at all."""

import os
import uuid
from pathlib import Path

from crossin_jax.config import UserError


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
