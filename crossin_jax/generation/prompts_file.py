"""Many prompts from a file, many answers into a file: at the engine's speed, and an interrupted run
goes on.

    {"id": 7, "prompt": "Name a river."}
    {"id": 7, "prompt": "Name a river.", "generated": "The Seine.", "cut": false, "by": "5f1c…"}

Line i of the output answers line i of the input and has all its fields.
"""

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from crossin_jax.checkpoint.fingerprint import fingerprint
from crossin_jax.config import UserError
from crossin_jax.files import check_output, content_hash, parse_json, read_json, read_json_lines
from crossin_jax.generation.chat import ChatModel, Prompt, read_turns

ADDED = ("generated", "cut", "by")
ROUNDS = 8  # prompts of a part, per row that decodes: parts are written whole


def read_messages(path: str | Path) -> list[dict[str, str]]:
    """The turns in a JSON file: a list of them, or an object with a list "messages"."""
    value = read_json(path, what="a conversation")
    messages = value.get("messages") if isinstance(value, dict) else value
    try:
        read_turns(messages)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return messages


def read_rows(path: str | Path) -> list[tuple[dict[str, Any], Prompt]]:
    """(row, prompt) of each line of a JSON Lines file; `UserError` names the line that has none."""
    rows = []
    for number, row in read_json_lines(path):
        place = f"{path}, row {number}"
        if not isinstance(row, dict):
            raise UserError(f'{place}: not an object; write {{"prompt": "Name a river."}}')
        if taken := [name for name in ADDED if name in row]:
            raise UserError(
                f"{place}: the field {taken[0]!r} is one that the output adds; rename it"
            )
        try:
            rows.append((row, read_prompt(row)))
        except UserError as error:
            raise UserError(f"{place}: {error}") from None
    if not rows:
        raise UserError(
            f'{path}: no prompts; write one object per line: {{"prompt": "Name a river."}}'
        )
    return rows


def read_prompt(row: dict[str, Any]) -> Prompt:
    """The prompt of a row: its "messages", its "instruction" with "input", or its "prompt"."""
    if "messages" in row:
        read_turns(row["messages"])
        return row["messages"]
    for name in ("prompt", "instruction"):
        if isinstance(row.get(name), str):
            return row[name], str(row.get("input") or "")
    raise UserError(
        "it has no text prompt or instruction and no list messages "
        f"(it has: {', '.join(map(str, row)) or 'nothing'})"
    )


def answer_file(
    model: ChatModel, prompts: Path, out: Path, *, seed: int, batch_size: int, **options: Any
) -> int:
    """Answers what `out` does not have yet; returns the number of lines in it.

    Row i draws by seed + i. A prompt that the model cannot read has the answer null.
    """
    check_output("--out", out)
    rows = read_rows(prompts)
    weights = fingerprint(model.engine.params)
    by = content_hash([weights, model.renderer.hash, seed, sorted(options.items())])[:12]
    done = find_done(out, [row for row, _ in rows], by)
    if done:
        print(f"{out} has {done} of {len(rows)} answers; it goes on", file=sys.stderr)
    size = ROUNDS * batch_size
    # A lone half of a pair of surrogates is written as JSON's own escape of it.
    with (
        out.open("a", encoding="utf-8", errors="backslashreplace") as file,
        tqdm(total=len(rows), initial=done, desc="generate", unit="prompt", disable=None) as bar,
    ):
        for start in range(done, len(rows), size):
            part = rows[start : start + size]
            answers = model.answer(
                [prompt for _, prompt in part],
                seeds=[seed + start + i for i in range(len(part))],
                over_long="skip",
                progress=False,
                **options,
            )
            for (row, _), text in zip(part, answers, strict=True):
                added = dict(zip(ADDED, (text, text is not None and text.is_cut, by), strict=True))
                file.write(json.dumps(row | added, ensure_ascii=False) + "\n")
            file.flush()
            bar.update(len(part))
    return len(rows)


def find_done(out: Path, rows: Sequence[dict[str, Any]], by: str) -> int:
    """The number of rows that a file answers; a last line that is not whole is cut off.

    Raises `UserError` for a file of other prompts, of another model or of other settings.
    """
    if not out.exists():
        return 0
    remedy = "name another --out, or delete the file"
    done = end = 0
    with out.open("rb") as file:
        for line in file:
            if not line.endswith(b"\n"):
                break
            place = f"{out}, row {done + 1}"
            found = parse_json(
                line.decode("utf-8", "replace"), place, dict, "an answer", f"; {remedy}"
            )
            if (
                done == len(rows)
                or {k: v for k, v in found.items() if k not in ADDED} != rows[done]
            ):
                raise UserError(f"{place}: not an answer to that row of --prompts\n{remedy}")
            if found.get("by") != by:
                raise UserError(f"{place}: from another model or with other settings\n{remedy}")
            done, end = done + 1, end + len(line)
    os.truncate(out, end)
    return done
