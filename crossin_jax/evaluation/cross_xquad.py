"""Builds a parallel multiple-choice set from XQuAD, in the manner of Cross-XQuAD: not SeaEval's official set.

XQuAD asks 1,190 questions about 240 paragraphs in 12 languages; the right choice here is its answer, the wrong ones are
answers to other questions about the same paragraph, the same ones in every language.
"""

import hashlib
import json
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from crossin_jax.config import UserError, hint
from crossin_jax.languages import LANGUAGES

XQUAD_LANGUAGES = ("ar", "de", "el", "en", "es", "hi", "ro", "ru", "th", "tr", "vi", "zh")
NUM_CHOICES = 4
SOURCE = "built from XQuAD by crossin_jax; NOT the official Cross-XQuAD of SeaEval, scores are not comparable with it"


class Question(NamedTuple):
    """One XQuAD question in all languages, and where it stands: (article, paragraph)."""

    id: str
    place: tuple[int, int]
    texts: dict[str, tuple[str, str, str]]  # language → context, question, answer

    def keys(self) -> dict[str, str]:
        """The answer by language, normalised for comparison."""
        return {code: normalise(answer) for code, (_, _, answer) in self.texts.items()}


def build_cross_xquad(folder: str | Path, languages: Sequence[str], seed: int = 0) -> list[dict[str, Any]]:
    """Rows in SeaEval's layout, with context and `source`, from the files xquad.LANG.json of a folder.

    A distractor differs from the answer and from the others in every language, by more than case, punctuation or
    articles, and neither contains the other; a paragraph with too few answers borrows those of the nearest paragraphs
    of its article, and of other articles after these. The gold letter is the same in all languages and each of the four
    equally frequent (± 1). A question draws by (seed, id): it gets the same distractors whatever other languages there
    are, unless a language makes two of them alike.
    """
    questions = read_questions(folder, languages)
    by_place: dict[tuple[int, int], list[Question]] = {}
    for question in questions:
        by_place.setdefault(question.place, []).append(question)
    ranked = sorted(questions, key=lambda question: _hash(seed, "gold", question.id))
    gold = {question.id: i % NUM_CHOICES for i, question in enumerate(ranked)}
    rows = []
    for question in questions:
        chosen = _draw_distractors(question, by_place, seed)
        chosen.insert(gold[question.id], question)
        row: dict[str, Any] = {"id": question.id, "source": SOURCE}
        for code, (context, text, _) in question.texts.items():
            choices = [f"({'ABCD'[i]}) {other.texts[code][2].strip()}" for i, other in enumerate(chosen)]
            row[LANGUAGES[code]] = {"context": context, "question": text, "choices": choices,
                                    "answer": choices[gold[question.id]]}
        rows.append(row)
    return rows


def _draw_distractors(question: Question, by_place: dict[tuple[int, int], list[Question]], seed: int) -> list[Question]:
    article, paragraph = question.place
    near = sorted(by_place, key=lambda place: (place[0] != article, abs(place[1] - paragraph), abs(place[0] - article)))
    chosen: list[Question] = []
    for place in near:
        others = sorted(by_place[place], key=lambda other: _hash(seed, question.id, other.id))
        for other in others:
            if other.id != question.id and not any(_alike(other, taken) for taken in (question, *chosen)):
                chosen.append(other)
            if len(chosen) == NUM_CHOICES - 1:
                return chosen
    raise UserError(f"XQuAD question {question.id}: fewer than {NUM_CHOICES - 1} other answers differ from its own; "
                    "use the whole of XQuAD")


def _alike(a: Question, b: Question) -> bool:
    """Whether two answers could both be right: equal after normalisation, or one within the other, in any language."""
    keys = b.keys()
    return any(_within(key, keys[code]) or _within(keys[code], key) for code, key in a.keys().items())


def _within(part: str, whole: str) -> bool:
    spaced = all(c.isascii() or unicodedata.category(c) != "Lo" for c in part)  # scripts that put spaces between words
    return f" {part} " in f" {whole} " if spaced else part in whole


def normalise(text: str) -> str:
    """Case, punctuation, width and articles (English, Spanish, German) taken away, as SQuAD's scorer does."""
    text = unicodedata.normalize("NFKC", text).casefold()
    bare = "".join(" " if unicodedata.category(c)[0] in "PZ" else c for c in text)
    words = re.sub(r"\b(a|an|the|el|la|los|las|un|una|der|die|das|ein|eine)\b", " ", bare).split()
    return " ".join(words) or " ".join(text.split())


def read_questions(folder: str | Path, languages: Sequence[str]) -> list[Question]:
    """The questions of all languages, in the order of the first one's file; UserError names file and question."""
    if not languages:
        raise UserError(f"languages is empty; XQuAD has {', '.join(XQUAD_LANGUAGES)}")
    for code in languages:
        if code not in XQUAD_LANGUAGES:
            raise UserError(f"languages: XQuAD has no {code!r}{hint(code, XQUAD_LANGUAGES)}; "
                            f"it has {', '.join(XQUAD_LANGUAGES)}")
    found: dict[str, dict[str, tuple[tuple[int, int], tuple[str, str, str]]]] = {}
    for code in languages:
        path = Path(folder).expanduser() / f"xquad.{code}.json"
        try:
            articles = json.loads(path.read_text(encoding="utf-8"))["data"]
            found[code] = {qa["id"]: ((a, p), (paragraph["context"], qa["question"], qa["answers"][0]["text"]))
                           for a, article in enumerate(articles) for p, paragraph in enumerate(article["paragraphs"])
                           for qa in paragraph["qas"]}
        except FileNotFoundError:
            raise UserError(f"{path} does not exist; put XQuAD's files there "
                            "(github.com/google-deepmind/xquad)") from None
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise UserError(f"{path}: not a file of XQuAD ({type(error).__name__}: {error})") from None
    first = languages[0]
    for code in languages:
        if other := found[code].keys() ^ found[first].keys():
            raise UserError(f"{Path(folder) / f'xquad.{code}.json'}: question {min(other)} stands in only one of "
                            f"{first} and {code}; take both files from the same release")
    return [Question(id, place, {code: found[code][id][1] for code in languages})
            for id, (place, _) in found[first].items()]


def _hash(*parts: Any) -> int:
    return int.from_bytes(hashlib.blake2b("\t".join(map(str, parts)).encode(), digest_size=8).digest())
