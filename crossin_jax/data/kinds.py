"""Kinds of examples: how a record becomes one instruction example, with the directions and tags of
the CrossIn paper.

`KINDS` has one entry per kind. Configurations, the mixture and the audit read the entry and know no
kind by its name, so a new kind is a new entry (see CONTRIBUTING.md).

Shape letters: N examples that are drawn together · C languages of data.languages.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from crossin_jax.config import TAGS, Component
from crossin_jax.data.records import ANSWERING, MASKED, Record, Text
from crossin_jax.languages import name_of, request_language, request_translation

Indices = np.ndarray  # (N,) int64: positions in `data.languages`


@dataclass(frozen=True, slots=True)
class Example:
    """One example as text. Kind "text" has only an `output`; for a chat, `messages` count."""

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
        """(instruction, input, answer, is it learned) of each question and answer.

        A system text goes before the first question.
        """
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


# A hash is used instead of a random generator. A generator has a state, so its 1000th number needs
# the 999 before it. A hash needs the row alone: mix_bits(row, key) is the same on every host, in
# every worker and after a restart, in any order of the rows.
def mix_bits(words: np.ndarray | int, key: int = 0) -> np.ndarray:
    """SplitMix64 of uint64 words under a key: uniform, and the same on every machine."""
    z = np.atleast_1d(np.asarray(words, np.uint64)) ^ np.uint64(key)
    z = z + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


class Draws:
    """What a kind can draw for N examples of one component.

    `words` (N,) uint64 are a hash for each example, and `weights_NC` the weight of each language. A
    decision mixes the hash with its own salt. A salt never changes: with another one the same seed
    would draw other examples.
    """

    def __init__(
        self, component: Component, words: np.ndarray, weights_NC: np.ndarray, pivot: int | None
    ):
        self.component, self._words = component, words
        self._weights_NC, self._pivot = weights_NC, pivot

    @property
    def pivot(self) -> Indices:
        """The pivot language for every example."""
        return np.full(len(self._words), self._pivot)

    def language(self, salt: int, *, besides: Indices | None = None) -> Indices:
        """A language for each example, with probability proportional to its weight, but not
        `besides`.
        """
        weights_NC = self._weights_NC
        if besides is not None:
            weights_NC = weights_NC.copy()
            weights_NC[np.arange(len(besides)), besides] = 0
        # A uniform level in [0, total) falls between two cumulative weights. Weights 1, 0, 2 have
        # the bounds 1, 1, 3: levels below 1 give language 0, the others give language 2. A level is
        # made of the upper 53 bits of the hash, as many as a float64 holds.
        bounds_NC = np.cumsum(weights_NC, axis=1)
        level = (mix_bits(self._words, salt) >> np.uint64(11)) * 2.0**-53 * bounds_NC[:, -1]
        return (level[:, None] >= bounds_NC).sum(axis=1)

    def coin(self, salt: int) -> np.ndarray:
        """True or False for each example, with equal probability."""
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
    """Names the wanted language in a prompt, in one of the styles of `data.tag`; returns
    (instruction, input).

    "input" puts the tag after the input, and after the instruction where there is no input. In the
    form of the released builder, "input_released", the tag alone is then the input.
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
    """Whether a request is in English because languages.toml has no sentence in the prompt's
    language.
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
        chat = _merge_chats(prompt, pair.answer, *languages, pair.tag)
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


def _merge_chats(
    prompt: Text, answer: Text, answer_language: str, prompt_language: str, style: str
) -> tuple[tuple[str, str], ...]:
    """A chat of the user's turns in one language, each with the tag, and the assistant's turns in
    the other.
    """
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
    """What differs between the kinds of examples."""

    draw: Callable[[Draws], tuple[Indices, Indices]]  # → prompt and answer language of each example
    make: Callable[[Pair], Content] = _ask
    needs_pivot: bool = False  # one side is always in `data.pivot`
    # Which languages can be drawn: "none"; "all"; "others", all but the pivot; "named", the pivot
    # only if it has a weight
    drawn: str = "others"
    draws_two: bool = False  # two different languages, unless `allow_same`
    # A record may lack languages: draws are among those that it has. Other kinds refuse it.
    fills_gaps: bool = False
    has_prompt: bool = True  # a template surrounds it
    tags: tuple[str, ...] = TAGS  # tag styles that have an effect
    # The instruction is a sentence of ours, "Translate …"; the record's texts are the input.
    own_request: bool = False


KINDS: dict[str, Kind] = {
    "base": Kind(
        draw=lambda draws: (draws.pivot, draws.pivot),
        needs_pivot=True,
        drawn="none",
        tags=("none", "sentence"),  # no bracketed tag: rows stay as they are
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
    entry = KINDS[kind]
    pair = Pair(
        record.texts[prompt_language],
        record.texts[answer_language],
        prompt_language,
        answer_language,
        tag if tag in entry.tags else "none",
        translate_what,
        request,
    )
    return Example(
        record.id, component or kind, prompt_language, answer_language, *entry.make(pair)
    )
