"""Kinds of examples: how a record becomes one instruction example, with the directions and tags of
the CrossIn paper.

`KINDS` has one entry per kind. Configurations, the mixture and the audit read the entry and know no
kind by its name, so a new kind is a new entry (see CONTRIBUTING.md).

Shape letters: N examples that are drawn together · C languages of data.languages.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from crossin_jax.config import TAGS, Component
from crossin_jax.data.records import ANSWERING, MASKED, Record, Text
from crossin_jax.languages import name_of, request_language, request_translation

Indices = np.ndarray  # (N,) int64: positions in `data.languages`


@dataclass(frozen=True, slots=True)
class Example:
    """What one training sequence says: for kind "text" only `output`, for a chat its `messages`."""

    id: str
    component: str
    prompt_language: str
    answer_language: str
    instruction: str
    input: str
    output: str
    messages: tuple[tuple[str, str], ...] | None = None

    @property
    def exchanges(self) -> list[tuple[str, str, str, bool]]:
        """(instruction, input, answer, is it learned) of each; a system text opens the first."""
        if not self.messages:
            return [(self.instruction, self.input, self.output, True)]
        exchanges, pending = [], ""
        for role, text in self.messages:
            if role in ANSWERING:
                exchanges.append((pending, "", text, role != MASKED))
                pending = ""
            else:
                pending = f"{pending}\n\n{text}" if pending else text
        return exchanges


# ---- How a pair of languages is drawn


# A hash takes the place of a random generator. A generator has a state, so its 1000th number needs
# the 999 before it. A hash gives the number of any row alone: mix_bits(row, key) is the same on
# every host, in every worker and after a restart, in whatever order the rows are asked for.
def mix_bits(words: np.ndarray | int, key: int = 0) -> np.ndarray:
    """SplitMix64 of uint64 words under a key: uniform, and the same on every machine."""
    z = np.atleast_1d(np.asarray(words, np.uint64)) ^ np.uint64(key)
    z = z + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


class Draws:
    """The draws of n units of one component: everything is a hash of the unit, so that nothing
    depends on its neighbours.

    Each decision has its own salt. A salt never changes: another one would draw other examples for
    the same seed.
    """

    def __init__(
        self,
        component: Component,
        make_words: Callable[[], np.ndarray],
        weights_NC: np.ndarray,
        pivot: int | None,
    ):
        self.component, self._make_words = component, make_words
        self.weights_NC, self._pivot = weights_NC, pivot

    @cached_property
    def _words(self) -> np.ndarray:  # (N,) uint64, one per unit; kinds that draw nothing never ask
        return self._make_words()

    @property
    def pivot(self) -> Indices:
        """The pivot language for every unit."""
        return np.full(len(self.weights_NC), self._pivot)

    def language(self, salt: int, *, besides: Indices | None = None) -> Indices:
        """A language per unit, with probability proportional to its weight, other than
        `besides`.
        """
        weights_NC = self.weights_NC
        if besides is not None:
            weights_NC = weights_NC.copy()
            weights_NC[np.arange(len(besides)), besides] = 0
        # A uniform level in [0, total) falls between two cumulative weights: weights 1, 0, 2 are
        # the bounds 1, 1, 3,
        # so levels below 1 give language 0 and the others language 2.
        # The level is the upper 53 bits of the hash as a float in [0, 1): float64 holds no more.
        bounds_NC = np.cumsum(weights_NC, axis=1)
        level = (mix_bits(self._words, salt) >> np.uint64(11)) * 2.0**-53 * bounds_NC[:, -1]
        return (level[:, None] >= bounds_NC).sum(axis=1)

    def coin(self, salt: int) -> np.ndarray:
        """True or False per unit, with equal probability."""
        return (mix_bits(self._words, salt) & np.uint64(1)).astype(bool)


LANGUAGE, SECOND_LANGUAGE, DIRECTION = 2, 3, 4  # the salts in use


def _draw_two(draws: Draws) -> tuple[Indices, Indices]:
    first = draws.language(LANGUAGE)
    besides = None if draws.component.allow_same else first
    return first, draws.language(SECOND_LANGUAGE, besides=besides)


def _draw_direction(draws: Draws) -> tuple[Indices, Indices]:
    other, direction = draws.language(LANGUAGE), draws.component.translate
    if direction == "both":
        to_pivot = draws.coin(DIRECTION)
        return np.where(to_pivot, other, draws.pivot), np.where(to_pivot, draws.pivot, other)
    return (draws.pivot, other) if direction == "en2x" else (other, draws.pivot)


# ---- How the example is made


def add_tag(
    instruction: str, input: str, answer_language: str, prompt_language: str, style: str
) -> tuple[str, str]:
    """Names the wanted language in a prompt; returns (instruction, input). Styles: see `data.tag`.

    "input" puts the tag after the input, and after the instruction where there is no input;
    "input_released" is the released builder's form, which makes an input of the tag alone.
    """
    if style == "none":
        return instruction, input
    if style == "sentence":
        gap = "" if instruction.endswith(("。", "？", "！")) else " "
        return instruction + gap + request_language(prompt_language, answer_language)[0], input
    tag = f"\n[{answer_language}]"
    if style == "instruction" or style == "input" and not input:
        return instruction + tag, input
    assert style in ("input", "input_released"), style
    return instruction, input + tag


def asks_in_english(component: Component, tag: str, pair: tuple[str, str]) -> bool:
    """Whether a request is in English for want of a sentence in the prompt's language
    (languages.toml).
    """
    kind = KINDS[component.kind]
    if kind.own_request:
        is_asked = component.request == "prompt" and pair[0] != "en"
        return is_asked and request_translation(*pair) is None
    style = component.tag or tag
    return style == "sentence" and style in kind.tags and not request_language(*pair)[1]


# What each kind makes of a record, for prompt language en and answer language zh:
#
#     record         en: Name it. | A river | Seine            zh: 请说出。 | 一条河 | 塞纳河
#     x2x, en2x      Name it. | A river [zh]         → 塞纳河
#     same (zh)      请说出。 | 一条河 [zh]             → 塞纳河
#     trans          Translate … into Chinese. | Name it. → 请说出。
#     text (zh)                                      → 塞纳河
class Pair(NamedTuple):
    """The two sides of an example, and the settings that shape it."""

    prompt: Text
    answer: Text
    prompt_language: str
    answer_language: str
    tag: str  # a style of `add_tag`; "none" where the kind has no place for the configured one
    translate_what: str
    request: str  # "english" or "prompt": the language in which a translation is asked for


Content = tuple[str, str, str, tuple[tuple[str, str], ...] | None]  # see the fields of Example


def _ask(pair: Pair) -> Content:
    """The prompt of one language, with the tag, and the answer of the other."""
    prompt, languages = pair.prompt, (pair.answer_language, pair.prompt_language)
    instruction, input = add_tag(prompt.instruction, prompt.input, *languages, pair.tag)
    chat = None
    if prompt.messages is not None:
        chat = _join_chat(prompt, pair.answer, *languages, pair.tag)
    return instruction, input, pair.answer.output, chat


def _translate(pair: Pair) -> Content:
    """The text to translate as input, after the request."""
    request = None
    if pair.request == "prompt" and pair.prompt_language != "en":
        request = request_translation(pair.prompt_language, pair.answer_language)
    if request is None:
        unit = "sentence" if pair.translate_what == "instruction" else "text"
        request = f"Translate the following {unit} into {name_of(pair.answer_language)}."
    sides = (_join_text(side, pair.translate_what) for side in (pair.prompt, pair.answer))
    return request, *sides, None


def _continue(pair: Pair) -> Content:
    """No prompt: every token of the text is learned."""
    return "", "", pair.answer.output, None


def _join_text(text: Text, what: str) -> str:
    parts = (
        (text.instruction,)
        if what == "instruction"
        else (text.instruction, text.input, text.output)
    )
    return "\n\n".join(filter(None, parts))


def _join_chat(
    prompt: Text, answer: Text, answer_language: str, prompt_language: str, style: str
) -> tuple[tuple[str, str], ...]:
    """The prompt's user turns, each with the tag, and the answer's assistant turns."""
    style = "input" if style == "input_released" else style
    turns = []
    replies = [turn for turn in answer.messages or () if turn[0] in ANSWERING]
    rest = iter(replies or [("assistant", answer.output)])
    for role, text in prompt.messages or ():
        if role in ANSWERING:
            turns.append(next(rest, (role, text)))
        elif role == "user":
            turns.append(
                (role, "".join(add_tag(text, "", answer_language, prompt_language, style)))
            )
        else:
            turns.append((role, text))
    return tuple(turns)


# ---- The table


@dataclass(frozen=True, kw_only=True)
class Kind:
    """What sets one kind of example apart."""

    draw: Callable[[Draws], tuple[Indices, Indices]]  # → prompt and answer language of each unit
    make: Callable[[Pair], Content] = _ask
    needs_pivot: bool = False  # one side is always in `data.pivot`
    # Which languages can be drawn: "none"; "all"; "others", all but the pivot; "named", the pivot
    # only if it has a weight
    drawn: str = "others"
    draws_two: bool = False  # two different languages, unless `allow_same`
    fills_gaps: bool = (
        False  # draws among the languages that a record has; others need every language
    )
    has_prompt: bool = True  # a template surrounds it
    tags: tuple[str, ...] = TAGS  # tag styles that have an effect
    own_request: bool = (
        False  # the instruction is our own English; only the input is in the prompt's language
    )


KINDS: dict[str, Kind] = {
    "base": Kind(
        draw=lambda draws: (draws.pivot, draws.pivot),
        needs_pivot=True,
        drawn="none",
        tags=("none", "sentence"),  # rows stay as they are; a sentence reads as part of a question
    ),
    "en2x": Kind(draw=lambda draws: (draws.pivot, draws.language(LANGUAGE)), needs_pivot=True),
    "x2en": Kind(draw=lambda draws: (draws.language(LANGUAGE), draws.pivot), needs_pivot=True),
    "x2x": Kind(draw=_draw_two, drawn="all", draws_two=True),
    "same": Kind(draw=lambda draws: (draws.language(LANGUAGE),) * 2, drawn="named"),
    "trans": Kind(
        draw=_draw_direction, make=_translate, needs_pivot=True, tags=(), own_request=True
    ),
    "text": Kind(
        draw=lambda draws: (draws.language(LANGUAGE),) * 2,
        make=_continue,
        drawn="all",
        fills_gaps=True,
        has_prompt=False,
        tags=(),
    ),
}


def make_example(
    record: Record,
    kind: str,
    prompt_language: str,
    answer_language: str,
    *,
    tag: str,
    translate_what: str = "instruction",
    request: str = "english",
    component: str | None = None,
) -> Example:
    """Joins the prompt of one language with the answer of another, as the kind says; KeyError where
    one is absent.
    """
    facts = KINDS[kind]
    pair = Pair(
        record.texts[prompt_language],
        record.texts[answer_language],
        prompt_language,
        answer_language,
        tag if tag in facts.tags else "none",
        translate_what,
        request,
    )
    return Example(
        record.id, component or kind, prompt_language, answer_language, *facts.make(pair)
    )
