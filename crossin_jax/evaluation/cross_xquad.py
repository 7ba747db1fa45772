"""A Cross-XQuAD-like benchmark from XQuAD's parallel questions. It is not SeaEval's set, whose choices differ.

Distractors are answers to other questions on the same paragraph, the same ones in every language; where a paragraph has
too few answers, the nearest paragraphs of its article fill up. Scores on it do not compare with published ones.
"""

import hashlib
import json
import random
import unicodedata
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from crossin_jax.config import UserError, hint
from crossin_jax.languages import LANGUAGES

XQUAD_LANGUAGES = ("ar", "de", "el", "en", "es", "hi", "ro", "ru", "th", "tr", "vi", "zh")
NOTICE = "built from XQuAD by crossin_jax; not SeaEval's Cross-XQuAD"
NUM_CHOICES = 4


@dataclass(slots=True)
class _Question:
    """A question by language, with its place: (number of the article, number of the paragraph in it)."""

    place: tuple[int, int]
    context: dict[str, str] = field(default_factory=dict)
    question: dict[str, str] = field(default_factory=dict)
    answer: dict[str, str] = field(default_factory=dict)
    plain: dict[str, str] = field(default_factory=dict)


def build_cross_xquad(folder: str | Path, languages: Sequence[str], seed: int = 0,
                      ids: Collection[str] | None = None) -> list[dict[str, Any]]:
    """Rows in SeaEval's layout, one per question of XQuAD (1,190), with four parallel choices and the paragraph.

    `ids` names the questions to ask, e.g. those held out from training; distractors may be answers to any question.
    `folder` holds xquad.LANG.json files in SQuAD's layout, or is a path with {lang}. Choices are distinct in every
    language. The gold position is the same in every language, and each position is gold equally often (within one).
    Draws are hashes of (seed, question id). `tags`: "other_paragraph" where a distractor had to come from another
    paragraph, "overlapping" where a distractor's text holds the answer's, or is held by it, in some language. Raises
    UserError for a language that XQuAD lacks, a missing or damaged file, and files that are not parallel.
    """
    questions = _read(folder, languages)
    by_article: dict[int, list[str]] = {}
    for key, question in questions.items():
        by_article.setdefault(question.place[0], []).append(key)
    chosen_keys = [key for key in questions if ids is None or key in ids]
    shuffled = sorted(chosen_keys, key=lambda key: _hash(seed, "gold", key))
    places = {key: i % NUM_CHOICES for i, key in enumerate(shuffled)}
    rows = []
    for key in chosen_keys:
        question = questions[key]
        chosen = _draw(key, questions, by_article[question.place[0]], seed)
        if len(chosen) < NUM_CHOICES - 1:
            raise UserError(f"{folder}, question {key!r}: its article has {len(chosen)} other answers; an item needs "
                            f"{NUM_CHOICES - 1}: leave the article out")
        tags = [tag for tag, holds in (
            ("other_paragraph", any(other.place != question.place for other in chosen)),
            ("overlapping", any(_overlap(question, other) for other in chosen))) if holds]
        chosen.insert(places[key], question)
        row: dict[str, Any] = {"id": key, "source": NOTICE, "tags": tags}
        for code in languages:
            choices = [f"({letter}) {each.answer[code]}" for letter, each in zip("ABCD", chosen, strict=True)]
            row[LANGUAGES[code]] = {"context": question.context[code], "question": question.question[code],
                                    "choices": choices, "answer": choices[places[key]]}
        rows.append(row)
    return rows


def _draw(key: str, questions: dict[str, _Question], article: Sequence[str], seed: int) -> list[_Question]:
    """Up to three distractors: own paragraph before others by their distance, texts apart before overlapping ones."""
    question = questions[key]
    others = [questions[other] for other in article if other != key]
    random.Random(_hash(seed, "draw", key)).shuffle(others)
    others.sort(key=lambda other: (abs(other.place[1] - question.place[1]), _overlap(question, other)))
    chosen: list[_Question] = []
    for other in others:
        if len(chosen) < NUM_CHOICES - 1 and all(_differ(other, taken) for taken in (question, *chosen)):
            chosen.append(other)
    return chosen


def _differ(a: _Question, b: _Question) -> bool:
    return all(a.plain[code] != b.plain[code] for code in a.plain)


def _overlap(a: _Question, b: _Question) -> bool:
    return any(a.plain[code] in b.plain[code] or b.plain[code] in a.plain[code] for code in a.plain)


def _hash(*parts: Any) -> int:
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "big")


def _plain(text: str) -> str:
    """The text without case, width and punctuation; all of it where nothing else is in it."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join("".join(c if unicodedata.category(c)[0] in "LMN" else " " for c in folded).split()) or folded


def file_pattern(folder: str | Path) -> str:
    """The files of a folder of XQuAD as one path with {lang}, or the path itself where it has {lang} already."""
    return str(folder) if "{lang}" in str(folder) else str(Path(folder) / "xquad.{lang}.json")


def _read(folder: str | Path, languages: Sequence[str]) -> dict[str, _Question]:
    if not languages:
        raise UserError(f"cross_xquad from {folder}: no languages; name some of {', '.join(XQUAD_LANGUAGES)}")
    questions: dict[str, _Question] = {}
    for code in languages:
        if code not in XQUAD_LANGUAGES:
            raise UserError(f"cross_xquad: XQuAD has no {code!r}{hint(code, XQUAD_LANGUAGES)}; "
                            f"use some of {', '.join(XQUAD_LANGUAGES)}")
        path = Path(file_pattern(folder).replace("{lang}", code)).expanduser()
        try:
            articles = json.loads(path.read_text(encoding="utf-8-sig"))["data"]
            found = [((a, p), paragraph["context"], qa["id"], qa["question"], qa["answers"][0]["text"])
                     for a, article in enumerate(articles) for p, paragraph in enumerate(article["paragraphs"])
                     for qa in paragraph["qas"]]
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}; XQuAD's file of {code!r} belongs there") from None
        except (ValueError, LookupError, TypeError) as error:
            fault = f"{type(error).__name__}: {error}"
            raise UserError(f"{path}: not in SQuAD's layout ({fault}); fetch it again") from None
        keys = {key for _, _, key, _, _ in found}
        if missing := sorted(keys ^ questions.keys()) if questions else []:
            raise UserError(f"{path}: question {missing[0]!r} is not in every language ({len(missing)} such); "
                            f"use files of one release")
        for place, context, key, text, answer in found:
            if not all(isinstance(value, str) and value.strip() for value in (context, text, answer)):
                raise UserError(f"{path}, question {key!r}: an empty context, question or answer")
            question = questions.setdefault(key, _Question(place))
            question.context[code], question.question[code] = context, text
            question.answer[code], question.plain[code] = answer.strip(), _plain(answer)
    return questions
