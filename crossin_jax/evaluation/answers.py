"""Which choice an answer means: SeaEval's rules reproduced to the letter, and beside them a stricter reading of ours.

SeaEval v0.1 reads an answer in two passes over its sentences; each sentence casts one vote. The first pass looks for a
whole choice "(B) Paris" or its label "(B)"; only where no sentence has one, the second looks for a bare letter or the
text of a choice. The choice with most votes wins; the two foremost of a tie, or all choices where nothing was found,
are left to a coin, which here is a value: `Answer.candidates`.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from crossin_jax.evaluation.predictions import Answer

LETTERS = "ABCDEFGHIJ"  # SeaEval labels at most ten choices
_SENTENCE = re.compile(r"[^!?。.]+[!?。.]?")
_NO_SENTENCE = "nothing here actually"  # what SeaEval reads in an answer of full stops alone
_TO_ENGLISH = tuple(zip("，。“”‘’！？【】《》（）", ",.\"\"''!?[]<>()", strict=True))
_EDGES = "(。$,|！\\!.？?)，；：…—·《》“”‘’{}[]（）、/\n\t\r\v\f "
_STAND_IN = " *&^%$asa "  # SeaEval's substitute for a bare "A", so that the article "a" is none


@dataclass(frozen=True, slots=True)
class _Keys:
    """What to look for, as (string, choice) in the order of preference: labels and choices, then letters and texts."""

    marked: dict[str, int]
    bare: dict[str, int]
    every: tuple[int, ...]


@lru_cache(maxsize=1 << 14)
def _keys(choices: tuple[str, ...]) -> _Keys:
    if not 1 <= len(choices) <= len(LETTERS):
        raise ValueError(f"{len(choices)} choices; SeaEval's rules know 1 to {len(LETTERS)}")
    marked: dict[str, int] = {}
    bare: dict[str, int] = {}
    for letter, choice in zip(LETTERS, choices, strict=False):
        index = choices.index(choice)  # equal choices are one choice, as in SeaEval
        for key in (choice, choice.lower(), choice.upper(), f"({letter})", f"({letter.lower()})"):
            marked[key] = index
        bare[_STAND_IN if letter == "A" else f" {letter.lower()} "] = index
        bare[choice[4:].lower()] = index
    # longest first; of a text with several sentences the first stands for all, in the place of the whole
    by_length = {_sentences(key)[0]: index for key, index in sorted(bare.items(), key=lambda item: -len(item[0]))}
    return _Keys(dict(sorted(marked.items(), key=lambda item: -len(item[0]))),
                 {key: index for key, index in by_length.items() if len(key) > 1}, tuple(range(len(choices))))


def _sentences(text: str) -> list[str]:
    return _SENTENCE.findall(text) or [_NO_SENTENCE]


def align(choices: Sequence[str], text: str) -> Answer:
    """The choices among which SeaEval v0.1 would pick after reading `text`.

    `candidates` are sorted indices into `choices` (1 to 10 strings, as a rule "(A) …"): one index where its rules
    decide, two for a tie, all where the answer is empty or nothing in it was recognised. The behaviour is that of
    github.com/SeaEval/TiGEr-Eval, `multichoice_align.py`, quirks included; see docs/evaluation.md.

    >>> align(["(A) Paris", "(B) Rome"], "I think it is (B).").candidates
    (1,)
    """
    keys = _keys(tuple(choices))
    if not text.strip():
        return Answer(keys.every, "empty", text)
    english = text
    if not text.isascii():
        for mark, replacement in _TO_ENGLISH:
            english = english.replace(mark, replacement)
    sentences = _sentences(english)
    votes = _marked_votes(keys.marked, sentences)
    if not votes:
        votes = [vote for sentence in sentences if (vote := _bare_vote(keys.bare, sentence)) is not None]
    if not votes:
        return Answer(keys.every, "unreadable", text)
    if votes.count(votes[0]) == len(votes):
        return Answer((votes[0],), "matched", text)
    (first, count), *rest = Counter(votes).most_common(2)  # equal counts: in the order of their first votes
    if rest and rest[0][1] == count:
        return Answer(tuple(sorted((first, rest[0][0]))), "tie", text)
    return Answer((first,), "matched", text)


def _marked_votes(keys: dict[str, int], sentences: list[str]) -> list[int]:
    """Each sentence's longest key, as written or in lower case; as written goes first among equals."""
    lowers = [sentence.lower() for sentence in sentences]
    anywhere = "\0".join((*sentences, *lowers))
    keys = {key: index for key, index in keys.items() if key in anywhere}  # mostly one or two of some twenty
    votes = []
    for sentence, lower in zip(sentences, lowers, strict=True) if keys else ():
        written = next(filter(sentence.__contains__, keys), None)
        lowered = next(filter(lower.__contains__, keys), None)
        if written is None or lowered is not None and len(lowered) > len(written):
            written = lowered
        if written is not None:
            votes.append(keys[written])
    return votes


def _bare_vote(keys: dict[str, int], sentence: str) -> int | None:
    sentence = f" {sentence.strip(_EDGES)} ".replace(" A ", _STAND_IN).lower()
    key = next(filter(sentence.__contains__, keys), None)
    return None if key is None else keys[key]


# What announces an answer, and what merely names a choice ("option B is wrong"), by language; English is tried too.
_ANNOUNCE = {
    "en": ("answer", "correct choice", "correct option"),
    "zh": ("答案", "正确选项", "正確選項", "应选", "故选", "我选"),
    "vi": ("đáp án", "câu trả lời", "trả lời", "phương án đúng", "lựa chọn đúng"),
    "es": ("respuesta", "opción correcta", "alternativa correcta"),
    "id": ("jawaban", "jawabannya", "pilihan yang benar"),
    "ms": ("jawapan", "jawapannya", "pilihan yang betul"), "fil": ("sagot", "kasagutan", "tamang pagpipilian"),
    "ar": ("الإجابة", "الجواب"), "de": ("antwort", "lösung"), "el": ("απάντηση",), "hi": ("उत्तर", "जवाब"),
    "ro": ("răspuns", "răspunsul"), "ru": ("ответ",), "th": ("คำตอบ", "ตอบ"), "tr": ("cevap", "yanıt"),
}
_NAME = {
    "en": ("option", "choice"), "zh": ("选项", "選項", "选择", "选"), "vi": ("lựa chọn", "phương án", "chọn"),
    "es": ("opción", "alternativa"), "id": ("pilihan", "opsi"), "ms": ("pilihan", "opsyen"),
    "fil": ("pagpipilian", "opsyon"), "ar": ("الخيار",), "de": ("option",), "el": ("επιλογή",), "hi": ("विकल्प",),
    "ro": ("opțiunea", "varianta"), "ru": ("вариант",), "th": ("ตัวเลือก", "ข้อ"), "tr": ("seçenek",),
}
# How a language letters its own lists, where not a, b, c.
_NATIVE = {"zh": "甲乙丙丁戊己庚辛壬癸", "ar": "أبجدهوزحطي", "el": "ΑΒΓΔΕΖΗΘΙΚ", "hi": "कखगघङचछजझञ",
           "ru": "АБВГДЕЖЗИК", "th": "กขคงจฉชซฌญ"}
_LINKS = (r"(?:\s|[:=*_\"'`\-–]|\b(?:is|are|would|be|should|the|correct|right|final|option|choice|es|la|el|correcta|"
          r"opción|là|đúng|adalah|ialah|yang|benar|betul|tepat|opsi|pilihan|ay|ang|tamang|ist|este|είναι)\b|"
          r"是|为|為|應為|应为|选|選|项|項|है|คือ|هي|هو){0,12}")


@lru_cache(maxsize=256)
def _patterns(language: str, num_choices: int) -> tuple[tuple[re.Pattern[str], ...], dict[str, int]]:
    """Patterns of an announced, a leading, and a bracketed or named letter; and the choice that each letter means."""
    index = {letter: i for i, letter in enumerate(LETTERS[:num_choices])}
    index |= {unicodedata.normalize("NFKC", c): i for i, c in enumerate(_NATIVE.get(language, "")[:num_choices])}
    index |= {letter.lower(): i for letter, i in tuple(index.items())}
    letter = f"([{''.join(map(re.escape, index))}])"
    # a bare letter stands alone; but Chinese and Thai write on without a space, and then the article "a" is none
    alone = r"(?![A-Za-z0-9'’])(?!\s+[a-z])" if language in ("zh", "th") else r"(?![^\W_])(?!['’])(?!\s+[a-z])"

    def after(words: dict[str, tuple[str, ...]]) -> str:
        either = sorted({*words["en"], *words.get(language, ())}, key=len, reverse=True)
        either = [unicodedata.normalize("NFKC", word) for word in either]
        heads = "|".join((r"(?<![^\W\d_])" if word[0].isascii() else "") + re.escape(word) for word in either)
        return rf"(?i:{heads}){_LINKS}(?:[(\[]{letter}[)\]]|{letter}{alone})"

    leading = rf"\A[\s\"'*_`]*(?:[(\[]{letter}[)\]]|{letter}(?:[\"'*_`]*\s*[).:,、]|[\"'*_`\s]*\Z|[\"'*_`]*\s*\n))"
    named = rf"\({letter}\)|{after(_NAME)}"
    return tuple(re.compile(pattern) for pattern in (after(_ANNOUNCE), leading, named)), index


@lru_cache(maxsize=1 << 14)
def _plain_texts(choices: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(_plain(re.sub(r"^\s*[(（]?[A-JＡ-Ｊ][)）.:：]\s*", "", choice)) for choice in choices)


def _plain(text: str) -> str:
    """Words alone, folded, one space between them and one at each end; so a phrase is found by its spaces."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    words = "".join(c if unicodedata.category(c)[0] in "LMN" else "" if c in "'’" else " " for c in folded).split()
    return f" {' '.join(words)} "


def read_choice(choices: Sequence[str], text: str, language: str = "en") -> Answer:
    """Our own reading of an answer, stricter than SeaEval's: what it does not plainly say stays unreadable.

    In this order, and the first that finds something decides: a letter announced as the answer ("Jawaban: B",
    "答案：Ｂ"), a letter that opens the answer ("B.", "(b)"), letters in brackets or named ("option B"), the text of a
    choice as whole words. Full-width letters and the language's own (甲, ก, أ) count. Two findings on one level are a
    tie.
    `language` is a code of `crossin_jax.languages`; others get the English rules.
    """
    choices = tuple(choices)
    if not text.strip():
        return Answer(tuple(range(len(choices))), "empty", text)
    patterns, index = _patterns(language, len(choices))
    plain = unicodedata.normalize("NFKC", text)
    found = next(filter(None, ({_letter(match, index) for match in pattern.finditer(plain)} for pattern in patterns)),
                 None)
    if not found:
        found = _mentioned(_plain_texts(choices), _plain(text), spaced=language not in ("zh", "th"))
    if not found:
        return Answer(tuple(range(len(choices))), "unreadable", text)
    return Answer(tuple(sorted(found)), "matched" if len(found) == 1 else "tie", text)


def _letter(match: re.Match[str], index: dict[str, int]) -> int:
    return index[next(group for group in match.groups() if group)]


def _mentioned(texts: tuple[str, ...], answer: str, *, spaced: bool) -> set[int]:
    """Choices whose text the answer holds, without those that only lie inside a longer one."""
    if not spaced:
        texts, answer = tuple(text.replace(" ", "") for text in texts), answer.replace(" ", "")
    found: set[int] = set()
    for i in sorted(range(len(texts)), key=lambda i: -len(texts[i])):
        if texts[i].strip() and texts[i] in answer:
            found.add(i)
            answer = answer.replace(texts[i], "  |  ")
    return found


@dataclass(frozen=True, slots=True)
class Readings:
    """How often each of two readers is certain of a choice, and how often they agree where both are; n answers."""

    num_answers: int
    seaeval_certain: float
    ours_certain: float
    agreement: float | None  # of the answers where both are certain; None where there are none


def compare_readers(answers: Iterable[tuple[Sequence[str], str, str]]) -> Readings:
    """`align` beside `read_choice` on triples of choices, answer text and language code."""
    pairs = [(align(choices, text).candidates, read_choice(choices, text, language).candidates)
             for choices, text, language in answers]
    both = [first == second for first, second in pairs if len(first) == len(second) == 1]
    share = max(len(pairs), 1)
    return Readings(len(pairs), sum(len(first) == 1 for first, _ in pairs) / share,
                    sum(len(second) == 1 for _, second in pairs) / share, sum(both) / len(both) if both else None)
