"""Answers on disk as they come, so that an interrupted evaluation has lost none of them."""

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from crossin_jax.files import Lines


def ask_missing(
    file: Path | None,
    count: int,
    ask: Callable[[list[int], Callable[[int, Any], None]], list[Any]],
) -> list[Any]:
    """The answers to `count` prompts; those that `file` has are not asked again.

    `ask(numbers, finished)` answers the prompts with these numbers, and calls `finished(k, answer)`
    as soon as numbers[k] is answered. The caller removes the file when all is stored elsewhere.
    """
    known = read(file) if file else {}
    left = [i for i in range(count) if i not in known]
    # Process 0 alone writes. It cannot answer before the other processes have read the file, since
    # all of them compute every answer.
    writes = file is not None and jax.process_index() == 0
    if not writes:
        answers = ask(left, lambda k, answer: None)
    else:
        file.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.closing(Lines(file)) as lines:

            def finished(k: int, answer: Any) -> None:
                lines.write(json.dumps([left[k], answer]))

            answers = ask(left, finished)
    known |= dict(zip(left, answers, strict=True))
    return [known[i] for i in range(count)]


def read(file: Path) -> dict[int, Any]:
    """The answers in a file by number; a last line that is not whole is cut off."""
    known: dict[int, Any] = {}
    whole = b""
    for line in file.read_bytes().splitlines(keepends=True) if file.is_file() else ():
        try:
            i, answer = json.loads(line)
        except (ValueError, TypeError):
            break
        if not line.endswith(b"\n"):
            break
        known[i] = answer
        whole += line
    if file.is_file() and jax.process_index() == 0:
        file.write_bytes(whole)
    return known
