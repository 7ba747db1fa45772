"""Answers on disk as they come, so that an interrupted evaluation has lost none of them."""

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from crossin_jax.files import Lines
from crossin_jax.parallel import hosts


def ask_missing(
    file: Path | None,
    count: int,
    ask: Callable[[list[int], Callable[[int, Any], None]], list[Any]],
) -> list[Any]:
    """The answers to `count` prompts; those that `file` has are not asked again.

    `ask(numbers, finished)` answers the prompts with these numbers, and calls `finished(k, answer)`
    as soon as numbers[k] is answered. The caller removes the file when all is stored elsewhere.
    """
    known, whole = read(file) if file else ({}, b"")
    left = [i for i in range(count) if i not in known]
    # Process 0 alone writes, once all have read: with other answers at hand, a process would ask
    # other questions, and the others would wait for it forever.
    if file is not None:
        hosts.barrier("kept answers are read")
    if file is None or jax.process_index():
        answers = ask(left, lambda k, answer: None)
    else:
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.is_file():
            file.write_bytes(whole)
        with contextlib.closing(Lines(file)) as lines:

            def finished(k: int, answer: Any) -> None:
                lines.write(json.dumps([left[k], answer]))

            answers = ask(left, finished)
    known |= dict(zip(left, answers, strict=True))
    return [known[i] for i in range(count)]


def read(file: Path) -> tuple[dict[int, Any], bytes]:
    """The answers in a file by number, and its bytes without a last line that is not whole."""
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
    return known, whole
