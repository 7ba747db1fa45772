"""How a question is worded: SeaEval's five prompts, the bare form of lm-evaluation-harness, and the
user's own frames.

A prompt is a number (1 to 5, SeaEval's), "harness", or a TOML or JSON file with wordings by
language:

    [default]
    prompt = "{context}{question}\\n{choices}\\nAnswer:"
    [zh]
    prompt = "{context}问题：{question}\\n{choices}\\n答案："
"""

import dataclasses
import functools
import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crossin_jax.config import UserError, hint
from crossin_jax.evaluation.items import LETTERS, MASK, Version
from crossin_jax.evaluation.layouts import COPA, LABEL
from crossin_jax.files import check_fields, content_hash, decode_text, read_bytes, read_json
from crossin_jax.languages import find_code
from crossin_jax.paths import as_path

HARNESS = "harness"
GAP = "___"  # what a question shows in the place of the answer

# SeaEval v0.1, word for word: scores depend on them. (opening, empty lines between the parts)
_SIMPLY = "Simply select the answer, no explanations required."
PROMPTS: dict[int, tuple[str, bool]] = {
    1: ("Respond to the question by selecting the most appropriate answer.", True),
    2: (
        "Kindly choose the correct answer from the options provided for the multiple-choice "
        "question.",
        False,
    ),
    3: ("Solve the multi-choice question by selecting the accurate answer.", False),
    4: (
        "Please answer the following multiple-choice question by selecting the correct option.",
        True,
    ),
    5: (
        "As an expert, your task is to solve the following multiple-choice question. "
        "Identify the correct response among the given choices.",
        True,
    ),
}


@dataclass(frozen=True, slots=True)
class Continuations:
    """The answers whose likelihood is scored after a prompt, one for each choice, in their order.

    `texts` end with EOS, `letters` do not. Either may be empty.
    """

    texts: tuple[str, ...] = ()
    letters: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Wording:
    """The words around a question in one language; the fields are filled where they have braces.

    `choice` is the form of one choice; {choices} in the prompt is a line for each. `answer` is what
    is scored, "{letter}", or with {text} the text of a choice; solved examples show it after
    `before_answer`. `context` fills {context} where an item has one. `between` separates solved
    examples. `cause` and `effect` are the questions of XCOPA.
    """

    prompt: str = "{context}{question}\n{choices}\nAnswer:"
    choice: str = "{letter}. {text}"
    answer: str = "{letter}"
    before_answer: str = " "
    context: str = "{context}\n"
    between: str = "\n\n"
    cause: str = COPA["cause"]
    effect: str = COPA["effect"]


# Prompt 1 for an item without a context:
#
#     Respond to the question by selecting the most appropriate answer. Simply select the answer, …
#
#     Question:
#     Which city is in Peru?
#
#     Choices:
#     (A) Rome
#     (B) Lima
def make_prompt(
    version: Version,
    prompt: int | str,
    shots: Sequence[Version] = (),
    *,
    benchmark: str = "",
    language: str = "en",
) -> str:
    """The text that asks an item: SeaEval's prompt 1 to 5, its few-shot form where there are shots,
    0 for no frame, "harness", or a file of wordings.

    SeaEval's few-shot form is one for all five numbers and ends after "Answer:"; its answers count
    up to their first newline. `benchmark` matters to Cross-XQuAD, whose prompt 1 asks for "the
    choice". Number 0 is the bare question, after its context if it has one; it takes no shots.
    `language` chooses the wording of a file. Source: SeaEval v0.1, src/dataset_src/cross_*.py.
    """
    if isinstance(prompt, str):
        return _word(version, _wording_in(prompt, language), shots)
    if prompt == 0:
        if shots:
            raise UserError(
                "evaluation.shots: a benchmark asked by its bare questions takes no solved "
                "examples; use 0"
            )
        return "\n\n".join(filter(None, (version.context, version.question)))
    if prompt not in PROMPTS:
        raise UserError(
            f"prompt {prompt}: SeaEval has 1 to {len(PROMPTS)}, and 0 is the bare question"
        )
    if shots:
        solved = [
            f"{_frame(shot, True)}\n\nAnswer:\n{shot.choices[shot.answer]}\n\n" for shot in shots
        ]
        return "".join(solved) + _frame(version, True) + "\n\nAnswer:\n"
    opening, is_spaced = PROMPTS[prompt]
    simply = (
        _SIMPLY.replace("answer", "choice") if prompt == 1 and "xquad" in benchmark else _SIMPLY
    )
    return f"{opening} {simply}" + ("\n\n" if is_spaced else "\n") + _frame(version, is_spaced)


def list_continuations(version: Version, prompt: int | str, language: str = "en") -> Continuations:
    """The answers that are scored after a prompt. A bare question shows no letters, so its choices
    are scored by their text.
    """
    bare = tuple(LABEL.sub("", choice, count=1) for choice in version.choices)
    if prompt == 0:
        return Continuations(texts=bare)
    if isinstance(prompt, int):
        return Continuations(version.choices, tuple(choice[:3] for choice in version.choices))
    wording = _wording_in(prompt, language)
    filled = tuple(
        _fill(wording.answer, letter=letter, text=text)
        for letter, text in zip(LETTERS, bare, strict=False)
    )
    if "{text}" in wording.answer:
        return Continuations(texts=filled)
    return Continuations(letters=filled)


def hash_frame(prompt: int | str) -> str:
    """A short hash of all words of a prompt, to tell apart results that were asked differently."""
    if isinstance(prompt, str):
        words: Any = {
            code: dataclasses.asdict(wording) for code, wording in read_frame(prompt).items()
        }
    else:
        words = [prompt, _SIMPLY, *PROMPTS.get(prompt, ())]
    return content_hash(words)


def name_of_prompt(prompt: int | str) -> int | str:
    """What results call a prompt: its number, or the name of its file without the ending."""
    return Path(prompt).stem if isinstance(prompt, str) else prompt


def read_frame(name: str) -> dict[str, Wording]:
    """The wordings of a frame by language code; "default" is for every other language."""
    if name == HARNESS:
        return {"default": Wording()}
    path = as_path(name)
    # Read once, although every question asks for it; again if it changes between two evaluations.
    return _read_file(name, path.stat().st_mtime_ns if path.exists() else 0)


@functools.lru_cache(maxsize=64)
def _read_file(name: str, _: int) -> dict[str, Wording]:
    path = as_path(name)
    if path.suffix == ".json":
        tables = read_json(path, expect=dict, what="a frame")
    else:
        try:
            tables = tomllib.loads(decode_text(read_bytes(path), name))
        except tomllib.TOMLDecodeError as error:
            raise UserError(f"{name}: not TOML ({error})") from None
    known = list(Wording.__dataclass_fields__)
    wordings = {}
    for key, table in tables.items():
        code = key if key == "default" else find_code(key)
        place = f"{name}, [{key}]"
        if code is None or not isinstance(table, dict):
            raise UserError(f"{place}: not a language; a frame has a table per language or default")
        for field in table:
            if field not in known:
                raise UserError(
                    f"{place}: no field {field!r}{hint(field, known)}; it has {', '.join(known)}"
                )
        check_fields(table, dict.fromkeys(known, (str, {"may_be_empty": True})), place)
        wordings[code] = Wording(**table)
        _check(wordings[code], place)
    if not wordings:
        raise UserError(f"{name}: an empty frame; give a table [default] with a prompt")
    return wordings


def _check(wording: Wording, place: str) -> None:
    needs = {"prompt": ("{question}",), "choice": ("{text}",), "context": ("{context}",)}
    for field, braces in needs.items():
        for brace in braces:
            if brace not in getattr(wording, field):
                raise UserError(f"{place}: {field} lacks {brace}")
    if "{letter}" not in wording.answer and "{text}" not in wording.answer:
        raise UserError(f"{place}: answer lacks {{letter}} or {{text}}")


def _wording_in(name: str, language: str) -> Wording:
    wordings = read_frame(name)
    found = wordings.get(language) or wordings.get(language.split("-")[0])
    if found is None and "default" not in wordings:
        raise UserError(
            f"{name}: no wording in {language!r}; add [{language}] or [default]; "
            f"it has {', '.join(wordings)}"
        )
    return found or wordings["default"]


def _word(version: Version, wording: Wording, shots: Sequence[Version]) -> str:
    """A question after its solved examples, in the words of a frame."""
    parts = [_ask(shot, wording) + _solve(shot, wording) for shot in shots]
    return wording.between.join([*parts, _ask(version, wording)])


def _ask(version: Version, wording: Wording) -> str:
    choices = [
        _fill(wording.choice, letter=letter, text=LABEL.sub("", choice, count=1))
        for letter, choice in zip(LETTERS, version.choices, strict=False)
    ]
    context = _fill(wording.context, context=version.context) if version.context else ""
    question = {COPA[kind]: getattr(wording, kind) for kind in COPA}.get(
        version.question, version.question.strip()
    )
    return _fill(wording.prompt, context=context, question=question, choices="\n".join(choices))


def _solve(shot: Version, wording: Wording) -> str:
    text = LABEL.sub("", shot.choices[shot.answer], count=1)
    return wording.before_answer + _fill(wording.answer, letter=LETTERS[shot.answer], text=text)


def _fill(form: str, **values: str) -> str:
    """A form with its braces filled; braces within the values stay as they are."""
    return re.sub(r"\{(\w+)\}", lambda found: values.get(found[1], found[0]), form)


def _frame(version: Version, is_spaced: bool) -> str:
    """SeaEval's form of an item: its context, question and choices under headings."""
    parts = [("Question", version.question), ("Choices", "\n".join(version.choices))]
    if version.context is not None:
        parts.insert(0, ("Context", version.context))
    return ("\n\n" if is_spaced else "\n").join(f"{name}:\n{text}" for name, text in parts)


def show_gap(version: Version) -> Version:
    """A sentence with a gap as a question that a reader understands."""
    return dataclasses.replace(version, question=version.question.replace(MASK, GAP))
