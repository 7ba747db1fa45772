"""Which choice an answer means: SeaEval's rules, and a stricter reader of our own.

SeaEval v0.1 reads an answer in two passes over its sentences, and each sentence has one vote. The
rules are reproduced exactly. The first pass looks for a whole choice "(B) Paris" or its label
"(B)". Only if no sentence has one, the second pass looks for a bare letter or the text of a choice.
The choice with the most votes wins. A coin decides between the two first of a tie, or between all
choices if nothing was found. Here the coin is not tossed: `Answer.candidates` are the choices that
it would decide between.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from crossin_jax.evaluation.predictions import Answer
from crossin_jax.languages import ENTRIES, Language, is_spaced

# SeaEval labels at most ten choices.
LETTERS = "ABCDEFGHIJ"
_SENTENCE = re.compile(r"[^!?。.]+[!?。.]?")
# what SeaEval reads in an answer of full stops alone
_NO_SENTENCE = "nothing here actually"
_TO_ENGLISH = tuple(zip("，。“”‘’！？【】《》（）", ",.\"\"''!?[]<>()", strict=True))
_EDGES = "(。$,|！\\!.？?)，；：…—·《》“”‘’{}[]（）、/\n\t\r\v\f "
# SeaEval replaces a bare "A" by this before it lowers the case, so that the article "a" is no
# choice.
_STAND_IN = " *&^%$asa "


@dataclass(frozen=True, slots=True)
class _Keys:
    """Strings to look for and the choice that each means, in the order of preference."""

    # first pass: labels and whole choices, "(B)", "(B) Paris"
    marked: dict[str, int]
    # second pass: letters and texts, " b ", "paris"
    bare: dict[str, int]
    every: tuple[int, ...]


@lru_cache(maxsize=1 << 14)
def _keys(choices: tuple[str, ...]) -> _Keys:
    choices = tuple(map(compose, choices))
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
    # The longest key first. Of a text with several sentences only the first sentence is looked for,
    # at the place in the order that the whole text has.
    by_length = {
        _sentences(key)[0]: index
        for key, index in sorted(bare.items(), key=lambda item: -len(item[0]))
    }
    return _Keys(
        dict(sorted(marked.items(), key=lambda item: -len(item[0]))),
        {key: index for key, index in by_length.items() if len(key) > 1},
        tuple(range(len(choices))),
    )


def compose(text: str) -> str:
    """The text in Unicode's composed form (NFC), where texts that look alike are equal.

    "ế" is one character, or "e" with two marks after it. SeaEval compares characters; no answer
    that it published has another form than its choices.
    """
    return unicodedata.normalize("NFC", text)


def _sentences(text: str) -> list[str]:
    return _SENTENCE.findall(text) or [_NO_SENTENCE]


# "It may be (A). But (B) fits. So (B)!" has three sentences with the votes A B B: B wins. "Both (A)
# and (B)." is one sentence and has one vote: A, the first of two keys of equal length.
def align(choices: Sequence[str], text: str) -> Answer:
    """The choices that SeaEval v0.1 would decide between after reading `text`.

    `candidates` are sorted indices into `choices` (1 to 10 strings, usually "(A) …"): one if the
    rules decide, two for a tie, all if the answer is empty or nothing in it was recognised. The
    behaviour is that of github.com/SeaEval/TiGEr-Eval, `multichoice_align.py`, with its quirks; see
    docs/evaluation.md.

    >>> align(["(A) Paris", "(B) Rome"], "I think it is (B).").candidates
    (1,)
    """
    keys = _keys(tuple(choices))
    if not text.strip():
        return Answer(keys.every, "empty", text)
    english = text
    if not text.isascii():
        english = compose(text)
        for mark, replacement in _TO_ENGLISH:
            english = english.replace(mark, replacement)
    sentences = _sentences(english)
    votes = _marked_votes(keys.marked, sentences)
    if not votes:
        votes = [
            vote for sentence in sentences if (vote := _bare_vote(keys.bare, sentence)) is not None
        ]
    if not votes:
        return Answer(keys.every, "unreadable", text)
    if votes.count(votes[0]) == len(votes):
        return Answer((votes[0],), "matched", text)
    # Choices with equal counts are in the order of their first votes.
    (first, count), *rest = Counter(votes).most_common(2)
    if rest and rest[0][1] == count:
        return Answer(tuple(sorted((first, rest[0][0]))), "tie", text)
    return Answer((first,), "matched", text)


def _marked_votes(keys: dict[str, int], sentences: list[str]) -> list[int]:
    """Each sentence's longest key, as written or in lower case; of equal ones the written one."""
    lowers = [sentence.lower() for sentence in sentences]
    # Usually one or two of about twenty keys are anywhere in the answer: only they are looked for
    # in each sentence.
    anywhere = "\0".join((*sentences, *lowers))
    keys = {key: index for key, index in keys.items() if key in anywhere}
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


# Words between an announcement and its letter: "the answer is option B".
_LINKS = (
    r"(?:\s|[:=*_\"'`\-–]|\b(?:is|are|would|be|should|the|correct|right|final|option|choice|"
    r"es|la|el|correcta|opción|là|đúng|adalah|ialah|yang|benar|betul|tepat|opsi|pilihan|"
    r"ay|ang|tamang|ist|este|είναι)\b|"
    r"是|为|為|應為|应为|选|選|项|項|है|คือ|هي|هو){0,12}"
)


@lru_cache(maxsize=256)
def _patterns(
    language: str, num_choices: int
) -> tuple[tuple[re.Pattern[str], ...], dict[str, int]]:
    """Patterns of a letter, and the choice that each letter means.

    The letter is announced ("The answer is B"), leading ("B."), or bracketed or named ("option B").
    """
    index = {letter: i for i, letter in enumerate(LETTERS[:num_choices])}
    # What announces an answer, and what merely names a choice ("option B is wrong"). English is
    # tried too.
    english = ENTRIES["en"]
    own = ENTRIES.get(language, Language(language))
    index |= {unicodedata.normalize("NFKC", c): i for i, c in enumerate(own.letters[:num_choices])}
    index |= {letter.lower(): i for letter, i in tuple(index.items())}
    letter = f"([{''.join(map(re.escape, index))}])"
    # A bare letter must be a word of its own: "a" before a word is the English article. But
    # Chinese, Japanese and Thai continue without a space.
    alone = (
        r"(?![A-Za-z0-9'’])(?!\s+[a-z])"
        if not is_spaced(language)
        else r"(?![^\W_])(?!['’])(?!\s+[a-z])"
    )

    def after(words: list[str]) -> str:
        either = sorted(set(words), key=len, reverse=True)
        either = [unicodedata.normalize("NFKC", word) for word in either]
        heads = "|".join(
            (r"(?<![^\W\d_])" if word[0].isascii() else "") + re.escape(word) for word in either
        )
        return rf"(?i:{heads}){_LINKS}(?:[(\[]{letter}[)\]]|{letter}{alone})"

    announced = after([*english.announce, *own.announce])
    quotes = r"[\"'*_`]*"
    ends = rf"{quotes}\s*[).:,、]|[\"'*_`\s]*\Z|{quotes}\s*\n"
    leading = rf"\A[\s\"'*_`]*(?:[(\[]{letter}[)\]]|{letter}(?:{ends}))"
    named = rf"\({letter}\)|{after([*english.option, *own.option])}"
    return tuple(re.compile(pattern) for pattern in (announced, leading, named)), index


@lru_cache(maxsize=1 << 14)
def _plain_texts(choices: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(
        _plain(re.sub(r"^\s*[(（]?[A-JＡ-Ｊ][)）.:：]\s*", "", choice)) for choice in choices
    )


def _plain(text: str) -> str:
    """The words alone, without case: " a b ". With a space at each end, only whole words match."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    words = "".join(
        c if unicodedata.category(c)[0] in "LMN" else "" if c in "'’" else " " for c in folded
    ).split()
    return f" {' '.join(words)} "


def read_choice(choices: Sequence[str], text: str, language: str = "en") -> Answer:
    """Our own reading of an answer, stricter than SeaEval's: an unclear answer is unreadable.

    It looks for these in turn, and the first that is found decides: a letter announced as the
    answer ("Jawaban: B", "答案：Ｂ"), a letter that begins the answer ("B.", "(b)"), letters in
    brackets or named ("option B"), the text of a choice as whole words. Full-width letters and the
    language's own letters (甲, ก, أ) count. Two different findings of one kind are a tie.
    `language` is a code of `crossin_jax.languages`; others get the English rules.
    """
    choices = tuple(choices)
    if not text.strip():
        return Answer(tuple(range(len(choices))), "empty", text)
    patterns, index = _patterns(language, len(choices))
    plain = unicodedata.normalize("NFKC", text)
    found = next(
        filter(
            None,
            ({_letter(match, index) for match in pattern.finditer(plain)} for pattern in patterns),
        ),
        None,
    )
    if not found:
        found = _mentioned(_plain_texts(choices), _plain(text), spaced=is_spaced(language))
    if not found:
        return Answer(tuple(range(len(choices))), "unreadable", text)
    return Answer(tuple(sorted(found)), "matched" if len(found) == 1 else "tie", text)


def _letter(match: re.Match[str], index: dict[str, int]) -> int:
    return index[next(group for group in match.groups() if group)]


def _mentioned(texts: tuple[str, ...], answer: str, *, spaced: bool) -> set[int]:
    """Choices whose text is in the answer, without those that are only part of a longer one."""
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
    """How often each of two readers is certain of a choice, and how often they agree."""

    num_answers: int
    seaeval_certain: float
    ours_certain: float
    # of the answers where both are certain; None if there are none
    agreement: float | None


def compare_readers(answers: Iterable[tuple[Sequence[str], str, str]]) -> Readings:
    """`align` beside `read_choice` on triples of choices, answer text and language code."""
    pairs = [
        (align(choices, text).candidates, read_choice(choices, text, language).candidates)
        for choices, text, language in answers
    ]
    both = [first == second for first, second in pairs if len(first) == len(second) == 1]
    share = max(len(pairs), 1)
    return Readings(
        len(pairs),
        sum(len(first) == 1 for first, _ in pairs) / share,
        sum(len(second) == 1 for _, second in pairs) / share,
        sum(both) / len(both) if both else None,
    )
