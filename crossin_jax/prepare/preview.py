"""What the model will learn, token by token: in colour on a terminal, and as one HTML page.

Shape letter: T positions of a row.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from crossin_jax.data.kinds import Example
from crossin_jax.data.mixture import Mixture
from crossin_jax.data.packing import PackedWindows
from crossin_jax.data.prompts import Rendered, Renderer, RowFault
from crossin_jax.data.tokens import token_bytes
from crossin_jax.report.page import render

HERE = Path(__file__).parent
LEARNED, DIM, SPECIAL, RESET = "\x1b[30;42m", "\x1b[2m", "\x1b[1;35m", "\x1b[0m"
COLOURS = {"learned": LEARNED, "special": SPECIAL, "other": DIM}
# packed rows in a preview
SHOWN_ROWS = 4


@dataclass(frozen=True, slots=True)
class Token:
    """A token as it is shown; `kind` is "learned", "special" (in the prompt) or "other"."""

    id: int
    text: str
    kind: str


def show_pieces(renderer: Renderer, rendered: Rendered) -> list[str]:
    """Readable text of each token.

    A character that several tokens share is shown at the last of them: the three bytes of 河 give
    "", "", "河". Bytes that never become a character are written as \\xNN. So are those of a
    character that is cut by the border between prompt and answer.
    """
    pieces, pending = [], b""
    for t, i in enumerate(rendered.ids.tolist()):
        pending += token_bytes(
            renderer.id_to_token(i), renderer.is_byte_level, i in renderer.special_ids
        )
        # Whether learning begins or ends after this token.
        border = t + 1 == len(rendered.ids) or rendered.loss_mask[t + 1] != rendered.loss_mask[t]
        try:
            piece, pending = pending.decode(), b""
        except UnicodeDecodeError as error:
            cut = error.reason == "unexpected end of data" and not border
            piece = (
                pending[: error.start].decode()
                if cut
                else pending.decode("utf-8", "backslashreplace")
            )
            pending = pending[error.start :] if cut else b""
        pieces.append(piece)
    return pieces


def describe(example: Example, rendered: Rendered | RowFault, length: int) -> str:
    """One line about an example."""
    head = (
        f"{example.id}  {example.component}  {example.prompt_language} → {example.answer_language}"
    )
    if isinstance(rendered, RowFault):
        return f"{head}  refused: {rendered.reason}"
    over = f"  over-long for length {length}" if len(rendered.ids) - 1 > length else ""
    return f"{head}  {len(rendered.ids)} tokens, {int(rendered.loss_mask.sum())} learned{over}"


def to_terminal(
    renderer: Renderer,
    example: Example,
    rendered: Rendered | RowFault,
    *,
    length: int,
    colour: bool,
) -> str:
    """The tokens of an example, learned ones marked by colour or by «»; below them every id."""
    if isinstance(rendered, RowFault):
        return describe(example, rendered, length) + "\n"
    tokens = list_tokens(renderer, rendered)
    if colour:
        text = "".join(_paint(token.text, token.kind) for token in tokens)
        ids = " ".join(_paint(token.id, token.kind) for token in tokens)
    else:
        groups = groupby(tokens, key=lambda token: token.kind == "learned")
        joined = ((learned, "".join(token.text for token in group)) for learned, group in groups)
        text = "".join(f"«{part}»" if learned else part for learned, part in joined)
        ids = " ".join(
            f"{token.id}*" if token.kind == "learned" else str(token.id) for token in tokens
        )
    return f"{describe(example, rendered, length)}\n{text}\n{ids}\n"


def list_tokens(renderer: Renderer, rendered: Rendered) -> list[Token]:
    """The tokens of an example as they are shown; a line break is visible as ↵."""
    tokens = []
    pieces = show_pieces(renderer, rendered)
    for i, piece, learned in zip(rendered.ids.tolist(), pieces, rendered.loss_mask, strict=True):
        kind = "learned" if learned else "special" if i in renderer.special_ids else "other"
        tokens.append(Token(i, piece.replace("\n", "↵\n"), kind))
    return tokens


def _paint(text: object, kind: str) -> str:
    """The text in the colour of a kind."""
    style = COLOURS[kind]
    # Line by line: a terminal would fill the rest of a line with the colour.
    return f"{style}{text}{RESET}".replace("\n", f"{RESET}\n{style}")


def first_rows(windows: PackedWindows) -> list[tuple[list[int], int]]:
    """(lengths of the segments, free positions) of the first rows that training would see."""
    return [describe_row(segment_ids) for segment_ids in windows[0]["segment_ids"][:SHOWN_ROWS]]


def describe_row(segment_ids_T: np.ndarray) -> tuple[list[int], int]:
    """(lengths of the segments, free positions) of one packed row.

    Example: the segments 1 1 2 2 2 0 0 give ([2, 3], 2).
    """
    lengths = np.bincount(segment_ids_T)[1:].tolist()
    return lengths, len(segment_ids_T) - sum(lengths)


def row_to_terminal(lengths: list[int], free: int) -> str:
    """A packed row's segments between bars: "|312|99|5 free| 98.8% of 416 tokens real"."""
    total = sum(lengths) + free
    segments = "|".join(map(str, lengths))
    return f"|{segments}|{free} free| {sum(lengths) / total:.1%} of {total} tokens real"


def to_html(
    renderer: Renderer,
    pairs: Sequence[tuple[Example, Rendered | RowFault]],
    rows: Sequence[tuple[list[int], int]],
    length: int,
) -> str:
    """A self-contained page: learned tokens on green, ids under the pointer, rows as bars."""
    examples = []
    for example, rendered in pairs:
        tokens = [] if isinstance(rendered, RowFault) else list_tokens(renderer, rendered)
        examples.append((describe(example, rendered, length), tokens))
    template = renderer.template_name
    return render(
        "preview.html", HERE, template=template, hash=renderer.hash, examples=examples, rows=rows
    )


def take(mixture: Mixture, renderer: Renderer, count: int) -> list[tuple[Example, Any]]:
    """The first examples of the stream with their tokens."""
    examples = mixture.take(np.arange(count))
    return list(zip(examples, renderer.render_many(examples), strict=True))
