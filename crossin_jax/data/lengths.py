"""Which languages lose rows to `data.length`, reported before the first step.

A script with few tokens in the vocabulary needs several times the tokens for the same question, so
one length may keep all English rows and drop most Vietnamese ones.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from crossin_jax.config import Data
from crossin_jax.data.mixture import Mixture
from crossin_jax.data.prompts import Renderer, RowFault
from crossin_jax.languages import name_of

SAMPLE = 2048  # examples that are measured
REPORTED_SHARE = 0.02  # of lost rows, from which a language is named
KEPT_SHARE = 0.99  # of rows, which the proposed length keeps


@dataclass(frozen=True)
class Lengths:
    """Tokens of the examples of one prompt language; `lost` of them are longer than a row."""

    tokens: np.ndarray
    lost: int


def measure_lengths(mixture: Mixture, renderer: Renderer, length: int) -> dict[str, Lengths]:
    """By prompt language, the lengths of the first `SAMPLE` examples, in positions of a row."""
    examples = mixture[:SAMPLE]
    by_language: dict[str, list[int]] = {}
    for example, rendered in zip(examples, renderer.render_many(examples), strict=True):
        if not isinstance(rendered, RowFault):
            by_language.setdefault(example.prompt_language, []).append(len(rendered.ids) - 1)
    return {
        language: Lengths(np.array(sizes), sum(size > length for size in sizes))
        for language, sizes in by_language.items()
    }


def describe_lost(
    mixture: Mixture, held_out: Mixture | None, renderer: Renderer, data: Data, context: int
) -> list[str]:
    """A line per prompt language that loses over 2 % of its rows, then the length that keeps 99 %.

    Another line says where held-out losses by language are not over the same questions. `context`
    is how many tokens the model reads. No lines: little is lost.
    """
    found = measure_lengths(mixture, renderer, data.length)
    verb = "are shortened or dropped" if data.over_long == "shorten_input" else "are dropped"
    lines = [
        f"prompts in {name_of(language)}: {lengths.lost / len(lengths.tokens):.0%} of "
        f"{len(lengths.tokens)} are longer than data.length={data.length} and {verb}"
        for language, lengths in found.items()
        if lengths.lost > REPORTED_SHARE * len(lengths.tokens)
    ]
    if lines:
        lines.append(propose_length([lengths.tokens for lengths in found.values()], context))
    asked = measure_lengths(held_out, renderer, data.length) if held_out else {}
    if len({lengths.lost for lengths in asked.values()}) > 1:
        counts = ", ".join(
            f"{language} {len(lengths.tokens) - lengths.lost} of {len(lengths.tokens)}"
            for language, lengths in asked.items()
        )
        lines.append(f"held-out losses by language are not over the same questions: {counts}")
    return lines


def propose_length(several: Sequence[np.ndarray], context: int) -> str:
    """The length of rows that keeps 99 % of the examples of every language, in words."""
    need = max(float(np.quantile(tokens, KEPT_SHARE, method="inverted_cdf")) for tokens in several)
    step = 128 if need > 128 else 8  # what attention kernels divide rows into
    length = math.ceil(need / step) * step
    if length > context:
        return f"data.length={length} would keep 99 % of every language; the model reads {context}"
    return f"data.length={length} keeps 99 % of every language"
