"""A benchmark like Cross-XQuAD, made from XQuAD's parallel questions.

It is not SeaEval's set, whose choices differ, so its scores do not compare with published ones.
Distractors are answers to other questions about the same paragraph, the same ones in every
language. If a paragraph has too few answers, the nearest paragraphs of its article add theirs.
"""

import hashlib
import random
import unicodedata
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from crossin_jax.config import UserError, hint
from crossin_jax.files import read_json
from crossin_jax.languages import canonical_list, find_files, name_of

XQUAD_LANGUAGES = ("ar", "de", "el", "en", "es", "hi", "ro", "ru", "th", "tr", "vi", "zh")
NOTICE = "built from XQuAD by crossin_jax; not SeaEval's Cross-XQuAD"
NUM_CHOICES = 4


@dataclass(slots=True)
class _Question:
    """A question by language; `place` is (number of the article, number of the paragraph in it)."""

    place: tuple[int, int]
    context: dict[str, str] = field(default_factory=dict)
    question: dict[str, str] = field(default_factory=dict)
    answer: dict[str, str] = field(default_factory=dict)
    # the answer without case and punctuation, to compare answers
    plain: dict[str, str] = field(default_factory=dict)


def build_cross_xquad(
    folder: str | Path, languages: Sequence[str], seed: int = 0, ids: Collection[str] | None = None
) -> list[dict[str, Any]]:
    """Rows in SeaEval's layout, one per question of XQuAD (1,190), with four parallel choices.

    `ids` are the questions to ask, e.g. those held out from training; distractors may be answers to
    any question. `folder` has xquad.LANG.json files in SQuAD's layout, or is a path with {lang}.
    Choices are distinct in every language. The gold position is the same in every language, and
    each position is gold equally often (within one). Draws are hashes of (seed, question id).

    `tags`: "other_paragraph" if a distractor comes from another paragraph; "overlapping" if in some
    language a distractor's text contains the answer's, or the answer's contains it. Raises
    UserError for a language that XQuAD lacks, a missing or damaged file, and files that are not
    parallel.
    """
    languages = canonical_list(languages, "cross_xquad")
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
            raise UserError(
                f"{folder}, question {key!r}: its article has {len(chosen)} other answers; "
                f"an item needs {NUM_CHOICES - 1}: leave the article out"
            )
        tags = []
        if any(other.place != question.place for other in chosen):
            tags.append("other_paragraph")
        if any(_overlap(question, other) for other in chosen):
            tags.append("overlapping")
        chosen.insert(places[key], question)
        row: dict[str, Any] = {"id": key, "source": NOTICE, "tags": tags}
        for code in languages:
            choices = [
                f"({letter}) {each.answer[code]}"
                for letter, each in zip("ABCD", chosen, strict=True)
            ]
            row[name_of(code)] = {
                "context": question.context[code],
                "question": question.question[code],
                "choices": choices,
                "answer": choices[places[key]],
            }
        rows.append(row)
    return rows


def _draw(
    key: str, questions: dict[str, _Question], article: Sequence[str], seed: int
) -> list[_Question]:
    """Up to three distractors: the nearest paragraphs first, and overlapping texts last."""
    question = questions[key]
    others = [questions[other] for other in article if other != key]
    # Sorting is stable, so that the shuffled order decides between others of the same rank.
    random.Random(_hash(seed, "draw", key)).shuffle(others)
    others.sort(
        key=lambda other: (abs(other.place[1] - question.place[1]), _overlap(question, other))
    )
    chosen: list[_Question] = []
    for other in others:
        if len(chosen) < NUM_CHOICES - 1 and all(
            _differ(other, taken) for taken in (question, *chosen)
        ):
            chosen.append(other)
    return chosen


def _differ(a: _Question, b: _Question) -> bool:
    return all(a.plain[code] != b.plain[code] for code in a.plain)


def _overlap(a: _Question, b: _Question) -> bool:
    return any(a.plain[code] in b.plain[code] or b.plain[code] in a.plain[code] for code in a.plain)


def _hash(*parts: Any) -> int:
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "big")


def _plain(text: str) -> str:
    """The text without case, width and punctuation; a text of punctuation alone stays."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    # categories of Unicode: letters, marks (such as Hindi vowel signs) and numbers
    kept = "".join(c if unicodedata.category(c)[0] in "LMN" else " " for c in folded)
    return " ".join(kept.split()) or folded


def file_pattern(folder: str | Path) -> str:
    """The files in a folder of XQuAD as one path with {lang}; a path with {lang} stays."""
    return str(folder) if "{lang}" in str(folder) else str(Path(folder) / "xquad.{lang}.json")


def _read(folder: str | Path, languages: Sequence[str]) -> dict[str, _Question]:
    if not languages:
        raise UserError(
            f"cross_xquad from {folder}: no languages; name some of {', '.join(XQUAD_LANGUAGES)}"
        )
    questions: dict[str, _Question] = {}
    for code in languages:
        if code not in XQUAD_LANGUAGES:
            raise UserError(
                f"cross_xquad: XQuAD has no {code!r}{hint(code, XQUAD_LANGUAGES)}; "
                f"use some of {', '.join(XQUAD_LANGUAGES)}"
            )
        pattern = file_pattern(folder)
        path = next(
            iter(find_files(pattern, [code])[code]),
            Path(pattern.replace("{lang}", code)).expanduser(),
        )
        remedy = f"XQuAD's file of {code!r} belongs there"
        try:
            articles = read_json(path, expect=dict, what="XQuAD's file", remedy=remedy)["data"]
            found = [
                ((a, p), paragraph["context"], qa["id"], qa["question"], qa["answers"][0]["text"])
                for a, article in enumerate(articles)
                for p, paragraph in enumerate(article["paragraphs"])
                for qa in paragraph["qas"]
            ]
        except (LookupError, TypeError) as error:
            fault = f"{type(error).__name__}: {error}"
            raise UserError(f"{path}: not in SQuAD's layout ({fault}); fetch it again") from None
        keys = {key for _, _, key, _, _ in found}
        if missing := sorted(keys ^ questions.keys()) if questions else []:
            raise UserError(
                f"{path}: question {missing[0]!r} is not in every language ({len(missing)} such); "
                f"use files of one release"
            )
        for place, context, key, text, answer in found:
            if not all(
                isinstance(value, str) and value.strip() for value in (context, text, answer)
            ):
                raise UserError(f"{path}, question {key!r}: an empty context, question or answer")
            question = questions.setdefault(key, _Question(place))
            question.context[code], question.question[code] = context, text
            question.answer[code], question.plain[code] = answer.strip(), _plain(answer)
    return questions
