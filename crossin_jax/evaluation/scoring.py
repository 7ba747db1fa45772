"""Choices by likelihood: the token ids that are scored for a question, and which choice wins.

A choice is scored after a prompt, or in the gap of a sentence. As BMLAMA's authors do, whole
sentences with a candidate in the gap are compared by their mean log-likelihood per token:

    Vienna lies on the | Danube | .        −2.1 per token       chosen
    Vienna lies on the | Rhine  | .        −2.6
"""

from dataclasses import dataclass

import numpy as np

from crossin_jax.data.prompts import Renderer
from crossin_jax.evaluation.frames import Continuations
from crossin_jax.evaluation.items import MASK, Version
from crossin_jax.evaluation.layouts import LABEL
from crossin_jax.evaluation.predictions import Answer
from crossin_jax.generation.chat import common_prefix, find_border


@dataclass(frozen=True, slots=True)
class ScoredChoices:
    """A question as token ids: those of the prompt, and of each option that may follow it.

    The options are the `texts` of the choices, then their letters, if there are any. `methods` says
    which scores they have: "sum", "mean", "byte" of texts, "letter", or "sentence".
    """

    prompt: np.ndarray
    options: list[np.ndarray]
    texts: tuple[str, ...]
    methods: tuple[str, ...]


def split_choices(
    renderer: Renderer, instruction: str, input: str, continuations: Continuations
) -> ScoredChoices:
    """Splits the rendered answers where they begin to differ, so that all have the same prompt."""
    texts, letters = (
        [renderer.render_answer(instruction, input, text) for text in group]
        for group in (continuations.texts, continuations.letters)
    )
    border = find_border([*texts, *letters])
    options = [each.ids[border:] for each in texts]
    options += [each.ids[border:-1] for each in letters]  # without EOS
    prompt = (texts or letters)[0].ids[:border]
    methods = (*(("sum", "mean", "byte") if texts else ()), *(("letter",) if letters else ()))
    return ScoredChoices(prompt, options, continuations.texts, methods)


def split_gap(renderer: Renderer, version: Version, *, whole: bool) -> ScoredChoices:
    """The candidates for the gap of a sentence, as bare text without a template.

    `whole`: all tokens of the sentence count except the first one or BOS, as in BMLAMA's code. Else
    only the candidate counts, after the text before the gap; the text after it is left out.
    """
    before, after = version.question.split(MASK, 1)
    texts = tuple(LABEL.sub("", choice, count=1) for choice in version.choices)
    end = after if whole else ""
    ids = [renderer.encode_text(f"{before}{text}{end}") for text in texts]
    if whole:
        # Sentences that begin with the gap may share no first token, so then EOS is the prompt.
        border = 1 if common_prefix(ids) else 0
    else:
        border = common_prefix([renderer.encode_text(before.rstrip(" ")), *ids])
    prompt = ids[0][:border] if border else np.array([renderer.eos_id], np.int32)
    methods = ("sentence",) if whole else ("sum", "mean", "byte")
    return ScoredChoices(prompt, [each[border:] for each in ids], texts, methods)


# The sum favours short choices; per token and per byte correct for it in two ways:
#
#                   sum    tokens    per token    bytes    per byte
#     Rome          −6     2         −3.0         4        −1.5         chosen by the sum
#     Montevideo    −8     4         −2.0         10       −0.8         chosen by both others
def choose_likeliest(
    entry: ScoredChoices, values: np.ndarray | None, method: str, num_choices: int
) -> Answer:
    """The likeliest choice by a method; `values` are the summed log-likelihoods of all options,
    None: too long. Choices of equal text have equal scores, without rounding errors.
    """
    if values is None:
        return Answer(tuple(range(num_choices)), "too_long")
    scores, texts = _divide(entry, values, method), entry.texts
    if method == "letter":
        same: tuple[int, ...] = (int(np.argmax(scores)),)
    else:
        scores = scores[[texts.index(text) for text in texts]]
        best = texts[int(np.argmax(scores))]
        same = tuple(i for i, text in enumerate(texts) if text == best)
    reason = "matched" if len(same) == 1 else "tie"
    return Answer(same, reason, scores=tuple(float(score) for score in scores))


def _divide(entry: ScoredChoices, values: np.ndarray, method: str) -> np.ndarray:
    count = len(entry.texts)
    if method == "letter":
        return values[count:]
    sums = values[:count]
    if method in ("mean", "sentence"):
        return sums / [len(option) for option in entry.options[:count]]
    if method == "byte":
        return sums / [len(text.encode()) for text in entry.texts]
    return sums
