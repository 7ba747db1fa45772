"""What the model will learn, token by token: in colour on a terminal, and as one HTML page."""

import html
from collections.abc import Sequence
from typing import Any

import numpy as np

from crossin_jax.data.crosslingual import Example
from crossin_jax.data.mixture import Mixture
from crossin_jax.data.prompts import Rendered, Renderer, RowFault, token_bytes

LEARNED, DIM, SPECIAL, RESET = "\x1b[30;42m", "\x1b[2m", "\x1b[1;35m", "\x1b[0m"
STYLE = """body{font:15px/1.7 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem;color:#222}
h2{font-size:1rem;margin:2rem 0 .3rem}pre{white-space:pre-wrap;background:#f6f6f6;padding:.7rem;border-radius:6px}
.l{background:#b7e4c7}.s{color:#8a2be2;font-weight:600}.t{border-left:1px solid #ddd}.bar{display:flex;height:1.4rem}
.bar div{background:#b7e4c7;border-right:2px solid #fff;font-size:.7rem;text-align:center;overflow:hidden}
.bar .e{background:#eee}"""


def show_pieces(renderer: Renderer, rendered: Rendered) -> list[str]:
    """Readable text of each token; a character cut into several tokens stands at its last one.

    Bytes that no character completes, also where learning starts in its midst, are written as \\xNN.
    """
    pieces, pending = [], b""
    for t, i in enumerate(rendered.ids.tolist()):
        pending += token_bytes(renderer.id_to_token(i), renderer.is_byte_level, i in renderer.special_ids)
        border = t + 1 == len(rendered.ids) or rendered.learned[t + 1] != rendered.learned[t]
        try:
            piece, pending = pending.decode(), b""
        except UnicodeDecodeError as error:
            cut = error.reason == "unexpected end of data" and not border
            piece = pending[:error.start].decode() if cut else pending.decode("utf-8", "backslashreplace")
            pending = pending[error.start:] if cut else b""
        pieces.append(piece)
    return pieces


def describe(example: Example, rendered: Rendered | RowFault, length: int) -> str:
    """One line about an example."""
    head = f"{example.id}  {example.component}  {example.prompt_language} → {example.answer_language}"
    if isinstance(rendered, RowFault):
        return f"{head}  refused: {rendered.reason}"
    over = f"  over-long for length {length}" if len(rendered.ids) - 1 > length else ""
    return f"{head}  {len(rendered.ids)} tokens, {int(rendered.learned.sum())} learned{over}"


def to_terminal(renderer: Renderer, example: Example, rendered: Rendered | RowFault, *, length: int,
                colour: bool) -> str:
    """The tokens of an example, learned ones marked by colour or by «»; below them every id."""
    if isinstance(rendered, RowFault):
        return describe(example, rendered, length) + "\n"
    text, ids, inside = [], [], False
    for i, piece, learned in zip(rendered.ids, show_pieces(renderer, rendered), rendered.learned, strict=True):
        shown = piece.replace("\n", "↵\n")
        if not colour and learned != inside:
            text.append("«" if learned else "»")
            inside = bool(learned)
        style = LEARNED if learned else SPECIAL if int(i) in renderer.special_ids else DIM
        text.append(f"{style}{shown}{RESET}".replace("\n", f"{RESET}\n{style}") if colour else shown)
        ids.append(f"{style}{i}{RESET}" if colour else f"{i}*" if learned else str(i))
    return f"{describe(example, rendered, length)}\n{''.join(text)}{'»' if inside else ''}\n{' '.join(ids)}\n"


def describe_row(row: dict[str, np.ndarray]) -> tuple[list[int], int]:
    """(lengths of the segments, free positions) of one packed row."""
    lengths = np.bincount(row["segment_ids"])[1:].tolist()
    return lengths, len(row["segment_ids"]) - sum(lengths)


def row_to_terminal(lengths: list[int], free: int) -> str:
    """A packed row's segments between bars, e.g. "|312|99|5 free| 98.8 % real"."""
    total = sum(lengths) + free
    return f"|{'|'.join(map(str, lengths))}|{free} free| {sum(lengths) / total:.1%} of {total} tokens real"


def to_html(renderer: Renderer, pairs: Sequence[tuple[Example, Rendered | RowFault]],
            rows: Sequence[tuple[list[int], int]], length: int) -> str:
    """A self-contained page: learned tokens on green, the id of each token under the pointer, rows as bars."""
    blocks = []
    for example, rendered in pairs:
        blocks.append(f"<h2>{html.escape(describe(example, rendered, length))}</h2>")
        if isinstance(rendered, RowFault):
            continue
        spans = []
        for i, piece, learned in zip(rendered.ids, show_pieces(renderer, rendered), rendered.learned, strict=True):
            kind = "t l" if learned else "t s" if int(i) in renderer.special_ids else "t"
            shown = html.escape(piece).replace("\n", "↵\n")
            spans.append(f'<span class="{kind}" title="{i}">{shown}</span>')
        ids = " ".join(map(str, rendered.ids))
        blocks.append(f"<pre>{''.join(spans)}</pre><details><summary>ids</summary><code>{ids}</code></details>")
    blocks.append("<h2>First packed rows: one block per example, grey is padding</h2>")
    for lengths, free in rows:
        total = sum(lengths) + free
        cells = [f'<div style="width:{100 * n / total:.2f}%">{n}</div>' for n in lengths]
        blocks.append(f'<div class="bar">{"".join(cells)}<div class="e" style="width:{100 * free / total:.2f}%">'
                      f"{free or ''}</div></div>")
    return (f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Preview of the mixture</title>'
            f"<style>{STYLE}</style><h1>Preview of the mixture</h1><p>Template {html.escape(renderer.template_name)}, "
            f'hash {renderer.hash}. <span class="l">Green</span> is learned.</p>{"".join(blocks)}</html>\n')


def take(mixture: Mixture, renderer: Renderer, count: int) -> list[tuple[Example, Any]]:
    """The first examples of the stream with their tokens."""
    examples = mixture.take(np.arange(count))
    return list(zip(examples, renderer.render_many(examples), strict=True))
