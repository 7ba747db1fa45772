"""The layouts of benchmark rows: by its columns, a row of one language becomes a question with
choices, a gold answer, a context, an id and labels.

No data set is known by its name here. What is read, first come first served:

    choices          mc_answer1 …, option_a …, option_0 …, A …, choice1 …; a list: choices, options
    nested           question: {stem, choices: {label, text}}, answerKey
    candidates       Prompt with <mask>, Ans, "Candidate Ans" joined by ", " or as a list
    prompt alone     a benchmark without choices
"""

import functools
import random
import re
import unicodedata
from collections.abc import Iterator, Sequence
from typing import Any

from crossin_jax.config import UserError
from crossin_jax.data.readers import parse_list
from crossin_jax.evaluation.items import LETTERS, MASK, MAX_CHOICES, MIN_CHOICES, Version

Row = dict[str, Any]

LABEL = re.compile(r"\s*\(([A-J])\)\s*")
# Columns of one choice each; the part in brackets orders them.
CHOICE_COLUMNS = tuple(
    map(
        re.compile, (r"mc_answer(\d)", r"option_([a-j])", r"option_(\d)", r"([A-J])", r"choice(\d)")
    )
)
# The cells of columns for which a question has no choice
MISSING = ("", "N/A", "nan", "NaN", "null", "None")
QUESTIONS = ("question", "Question", "Prompt", "prompt")
CONTEXTS = ("context", "passage", "flores_passage", "premise")
# The gold answer, and the number from which it counts the choices
GOLDS = {
    "correct_answer_num": 1,
    **dict.fromkeys(("answer", "Answer", "answerKey", "answer_index", "label"), 0),
}
IDS = ("id", "sample_id", "question_id")
# XCOPA names the kind of question in place of its text. These are COPA's own words.
COPA = {"cause": "What was the cause of this?", "effect": "What happened as a result?"}
# Columns with labels, and what a subset of the report is called after
LABELS = {
    "subject_category": "category",
    "category": "category",
    "domain": "domain",
    "subject": "subject",
    "Subject": "subject",
    "cultural_sensitivity_label": "culture",
    "regional_feature": "region",
    "difficulty": "difficulty",
}
OPEN_LABELS = {"task": "task", "source": "source"}
WORDS = {"culture": {"CS": "sensitive", "CA": "agnostic", "-": None}}


def holds_one_language(row: Row) -> bool:
    """Whether a row is a question in one language; otherwise it has an object per language."""
    return any(name in row for name in QUESTIONS)


def is_candidates(row: Row) -> bool:
    """Whether a row has a sentence and candidates for its gap."""
    return "Prompt" in row and "Candidate Ans" in row


def is_open(row: Row) -> bool:
    """Whether a row is a prompt without choices."""
    return ("prompt" in row or "Prompt" in row) and not is_candidates(row) and not _choices(row)


def id_of(row: Row) -> str | None:
    """The id that the languages of an item share; None where rows meet by their position."""
    for name in IDS:
        if row.get(name) not in (None, ""):
            return str(row[name])
    return f"{row['link']}#{row.get('question_number')}" if "link" in row else None


def tags_of(row: Row, place: str) -> tuple[str, ...]:
    """The subsets of the report that an item belongs to: its `tags`, and its labels as "subject:
    anatomy".
    """
    tags = row.get("tags") or []
    if not isinstance(tags, list | tuple):
        raise UserError(f"{place}: tags={tags!r:.60} is not a list; give a list of texts")
    found = dict.fromkeys(map(str, tags))
    # a candidate's "Subject" is whom the sentence is about
    labels = {} if is_candidates(row) else OPEN_LABELS if is_open(row) else LABELS
    for column, name in labels.items():
        value = row.get(column)
        if isinstance(value, str) and value.strip():
            word = WORDS.get(name, {}).get(value, value.replace("_", " "))
            found |= {f"{name}: {word}": None} if word else {}
    return tuple(found)


# Two rows that mean the same version, ("Which city is in Peru?", ("(A) Rome", "(B) Lima"), answer
# 1):
#
#     {"question": "Which city is in Peru?", "choices": ["Rome", "Lima"], "answer": "B"}
#     {"question": "Which city is in Peru?", "option_a": "Rome", "option_b": "Lima", "answer": 1}
def read_version(row: Row, place: str, key: str = "") -> Version:
    """One language's question from a row of any layout.

    `key` names the item; it orders the candidates of a gap. Raises UserError with `place`.
    """
    if is_candidates(row):
        return _read_candidates(row, place, key)
    nested = row.get("question")
    if isinstance(nested, dict):  # the columns of X-CSQA lie one level deeper
        row = {**row, "choices": nested.get("choices"), "question": nested.get("stem")}
    question = next((row[name] for name in QUESTIONS if row.get(name) is not None), None)
    if not isinstance(question, str) or not question.strip():
        raise UserError(f"{place}: no question")
    context = next((row[name] for name in CONTEXTS if row.get(name)), None)
    if is_open(row):
        return Version(question, (), None, context)
    if "premise" in row:
        question = COPA.get(question, question)
    choices, labels = _choices(row) or (row.get("choices"), None)
    _check_choices(choices, place)
    gold = _gold(row, labels)
    shown = label_choices(choices)
    return Version(question, shown, find_gold(gold, shown, place), context)


def label_choices(choices: Sequence[str]) -> tuple[str, ...]:
    """The choices as "(A) …", whether or not they have these labels already."""
    found = [LABEL.match(choice) for choice in choices]
    pairs = zip(found, LETTERS, strict=False)
    if all(label and label[1] == letter for label, letter in pairs):
        return tuple(choices)
    return tuple(
        f"({letter}) {choice.strip()}" for letter, choice in zip(LETTERS, choices, strict=False)
    )


def find_gold(answer: Any, choices: tuple[str, ...], place: str) -> int:
    """The index that a gold answer means: an index from 0, a letter, or a choice with or without
    its label.
    """
    if answer is None or answer == "":
        raise UserError(f"{place}: no gold answer; every version needs its `answer`")
    if isinstance(answer, int) and not isinstance(answer, bool):
        if 0 <= answer < len(choices):
            return answer
    elif isinstance(answer, str):
        for matches in _find_matches(answer.strip(), choices):
            if len(matches) == 1:
                return matches[0]
            if matches:
                raise UserError(f"{place}: the gold answer {answer!r} is twice among the choices")
    raise UserError(
        f"{place}: the gold answer {answer!r} is not among the choices {' | '.join(choices)}"
    )


def _find_matches(answer: str, choices: tuple[str, ...]) -> Iterator[list[int]]:
    # NFC: a letter with its marks may be one character or several, and looks the same.
    answer = unicodedata.normalize("NFC", answer)
    texts = [unicodedata.normalize("NFC", choice.strip()) for choice in choices]
    yield [i for i, text in enumerate(texts) if text == answer]
    yield [i for i, text in enumerate(texts) if LABEL.sub("", text, count=1) == answer]
    yield [i for i in range(len(texts)) if answer.strip("().") == LETTERS[i]]
    yield [int(answer)] if answer.isdigit() and int(answer) < len(texts) else []


def _choices(row: Row) -> tuple[list[Any], Sequence[str] | None] | None:
    """The choices of a row, and what its gold answer may call them; None where it has none.

    Labels are None where a gold answer may also be the text of a choice.
    """
    for pattern in CHOICE_COLUMNS:
        columns = sorted(name for name in row if pattern.fullmatch(name))
        if len(columns) >= MIN_CHOICES:
            choices = [row[name] for name in columns]
            while choices and _is_missing(choices[-1]):
                choices.pop()
            return choices, LETTERS[: len(choices)]
    for name in ("choices", "options"):
        value = _parse_list(row.get(name))
        if isinstance(value, dict) and {"label", "text"} <= value.keys():
            return list(value["text"]), list(value["label"])
        if isinstance(value, list | tuple) and value and isinstance(value[0], dict):
            texts = [entry.get("text") for entry in value]
            return texts, [str(entry.get("label")) for entry in value]
        if value is not None:
            return value, None
    return None


def _parse_list(value: Any) -> Any:
    is_list = isinstance(value, str) and value.lstrip().startswith("[")
    return parse_list(value) if is_list else value


def _is_missing(value: Any) -> bool:
    return value is None or value != value or isinstance(value, str) and value.strip() in MISSING


def _check_choices(choices: Any, place: str) -> None:
    if not isinstance(choices, list | tuple) or not all(
        isinstance(choice, str) and choice.strip() for choice in choices
    ):
        raise UserError(f"{place}: choices must be a list of texts, got {choices!r:.80}")
    if not MIN_CHOICES <= len(choices) <= MAX_CHOICES:
        raise UserError(
            f"{place}: {len(choices)} choices; an item has {MIN_CHOICES} to {MAX_CHOICES}"
        )


def _gold(row: Row, labels: Sequence[str] | None) -> Any:
    """The gold answer as `find_gold` reads it; an index where it names a column or label."""
    name = next((name for name in GOLDS if not _is_missing(row.get(name))), None)
    if name is None:
        return None
    gold = row[name]
    if GOLDS[name] and str(gold).strip().isdigit():  # the number may be a text
        return int(gold) - GOLDS[name]
    if isinstance(gold, float) and gold.is_integer():
        gold = int(gold)  # a column with an empty cell makes numbers of pandas floats
    if not isinstance(gold, str):
        return gold
    # "A" is a column here, even where the text of another choice is "A"
    if labels is not None and gold.strip() in labels:
        return list(labels).index(gold.strip())
    is_index = labels is not None or name in ("label", "answer_index")
    return int(gold) if is_index and gold.strip().isdigit() else gold


# ── candidates for the gap of a sentence ──────────────────────────────────────────────────────────


def _read_candidates(row: Row, place: str, key: str) -> Version:
    prompt, gold = row["Prompt"], row.get("Ans")
    candidates = split_candidates(row["Candidate Ans"], gold)
    if not isinstance(prompt, str) or not prompt.strip():
        raise UserError(f"{place}: no question")
    _check_choices(candidates, place)
    if not isinstance(gold, str) or gold not in candidates:
        raise UserError(
            f"{place}: the gold answer {gold!r} is not among the candidates "
            f"{' | '.join(candidates)}"
        )
    # Candidates correspond by position, so of two that are equal after translation the last is
    # gold: the files have it at the end.
    answer = len(candidates) - 1 - candidates[::-1].index(gold)
    sentence, candidates = _open_gap(prompt, candidates)
    # The gold candidate is the last one in every row of the files. It must not be known by its
    # letter, so the candidates are shuffled, in every language alike.
    order = _shuffle(key, len(candidates))
    shown = label_choices([candidates[i] for i in order])
    return Version(sentence, shown, order.index(answer))


@functools.lru_cache(maxsize=1 << 14)
def _shuffle(key: str, count: int) -> list[int]:
    order = list(range(count))
    random.Random(f"candidates/{key}").shuffle(order)
    return order


def split_candidates(value: Any, gold: Any) -> list[str]:
    """The candidates in a text where ", " joins them, or in a list or the text of one.

    A gold answer that contains a comma itself stays whole.
    """
    found = _parse_list(value)
    if isinstance(found, list):
        return found
    if not isinstance(found, str):
        return []
    parts = found.split(", ")
    names = gold.split(", ") if isinstance(gold, str) else []
    for start in range(len(parts) if len(names) > 1 else 0):
        if parts[start : start + len(names)] == names:
            return [*parts[:start], gold, *parts[start + len(names) :]]
    return parts


def _open_gap(prompt: str, candidates: list[str]) -> tuple[str, list[str]]:
    """A sentence with one MASK, and candidates without what they share.

    Some copies of BMLAMA on the Hub have "Paris is the capital of" and the candidates " France.",
    " Peru.": these become "Paris is the capital of <mask>." and "France", "Peru".
    """
    if MASK in prompt:
        return prompt, [candidate.strip() for candidate in candidates]
    gap = " " if all(candidate.startswith(" ") for candidate in candidates) else ""
    ends = {candidate[-1] for candidate in candidates}
    end = ends.pop() if len(ends) == 1 else ""
    if unicodedata.category(end or "a")[0] != "P":
        end = ""
    stripped = [candidate.removesuffix(end).strip() for candidate in candidates]
    return f"{prompt.rstrip()}{gap}{MASK}{end}", stripped
