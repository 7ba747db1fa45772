"""Language confusion: how many answers stay in the wanted language, line by line and word by word.

Definitions of Marchisio et al. 2024 (arXiv 2406.20052). A line counts if it has five words. An
answer passes by lines if each of them is in the wanted language; answers without such a line are
left out. Of the answers that pass by lines, an answer passes by words if it has no English word;
languages in Latin letters have no such rate, because they share words with English.
"""

import functools
import gzip
import re
import string
import warnings
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from crossin_jax.data.langid import can_detect, identify, is_in
from crossin_jax.languages import is_spaced, script_of

MIN_WORDS, MIN_SCORE = 5, 0.3
# Punctuation goes, so that "water." is a word of the list
PUNCTUATION = str.maketrans({**dict.fromkeys(string.punctuation + "،", ""), "—": " "})


@dataclass(frozen=True, slots=True)
class PassRates:
    """Shares of answers; None where there is nothing to take a share of.

    `num_counted` answers have a line that counts. `line_accuracy` is the mean over answers of the
    share of their lines that are in the wanted language; `line_pass` and `word_pass` are the two
    rates.
    """

    num_answers: int
    num_counted: int
    line_accuracy: float | None
    line_pass: float | None
    word_pass: float | None


def measure_confusion(answers: Iterable[str], language: str) -> PassRates:
    """The pass rates of answers that should be in a language, given by its code."""
    num_answers = 0
    accuracies: list[float] = []
    are_english: list[bool] = []  # of the answers that pass by lines: has it an English word?
    knows = can_detect(language)
    for answer in answers:
        num_answers += 1
        words = {line: split_words(line, language) for line in split_lines(answer)}
        lines = [line for line in split_lines(answer) if len(words[line]) >= MIN_WORDS]
        if not lines or not knows:
            continue
        accuracies.append(sum(is_in(line, language, MIN_SCORE) for line in lines) / len(lines))
        if accuracies[-1] == 1:
            are_english.append(
                any(word.strip() in english_words() for line in lines for word in words[line])
            )
    word_pass = None
    if accuracies and script_of(language) != "Latn":
        # by the definition no answer fails by words where none passes by lines
        word_pass = 1 - sum(are_english) / max(1, len(are_english))
    return PassRates(
        num_answers,
        len(accuracies),
        _mean(accuracies),
        _mean([accuracy == 1 for accuracy in accuracies]),
        word_pass,
    )


def measure_off_target(answers: Sequence[str], language: str) -> tuple[float | None, float | None]:
    """The share of answers whose language can be detected, and of those the share in another
    language than the wanted one.
    """
    detected = [code for answer in answers if (code := identify(answer, language)) is not None]
    share = len(detected) / len(answers) if answers else None
    return share, (1 - detected.count(language) / len(detected) if detected else None)


def average(rates: Iterable[PassRates]) -> PassRates:
    """The mean of each rate over groups of answers, whatever their sizes; groups without a rate
    are left out.
    """
    rates = list(rates)

    def mean(name: str) -> float | None:
        return _mean([value for each in rates if (value := getattr(each, name)) is not None])

    return PassRates(
        sum(each.num_answers for each in rates),
        sum(each.num_counted for each in rates),
        *map(mean, ("line_accuracy", "line_pass", "word_pass")),
    )


def measure_groups(
    answers: Iterable[tuple[tuple[str, ...], str, str]],
) -> dict[tuple[str, ...], PassRates]:
    """Pass rates of answers given as (group, language, text), with means over sources, languages,
    and all.

    A group is e.g. (model, task, source). The keys are (*group, language); in a mean, "all" stands
    for the source, for the language, or for both: then it is the mean of the languages' means, as
    in the paper.
    """
    texts: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for group, language, text in answers:
        texts[(*group, language)].append(text)
    rates = {key: measure_confusion(found, key[-1]) for key, found in texts.items()}
    by_source, by_language = defaultdict(list), defaultdict(list)
    for key, rate in rates.items():
        *outer, language = key
        if outer:
            by_source[(*outer, "all")].append(rate)
            outer[-1] = "all"
        by_language[(*outer, language)].append(rate)
    means = {key: average(found) for key, found in (*by_source.items(), *by_language.items())}
    overall = defaultdict(list)
    for key in by_language:
        overall[(*key[:-1], "all")].append(means[key])
    return rates | means | {key: average(found) for key, found in overall.items()}


# ---- Lines and words


def split_lines(answer: str) -> list[str]:
    """The lines of an answer without punctuation; a base model that goes on with another question
    is cut there.
    """
    return answer.split("\nQ:")[0].strip().translate(PUNCTUATION).split("\n")


def split_words(line: str, language: str) -> Sequence[str]:
    """The words of a line. Chinese words are those of jieba, as in the paper.

    Of other languages without spaces, two characters count as a word. (The paper splits Japanese
    with fugashi.)
    """
    if is_spaced(language):
        return line.split()
    if language.split("-")[0] == "zh":
        return list(_jieba().cut(line))
    return re.findall(r"[A-Za-z0-9]+|[^\sA-Za-z0-9]{1,2}", line)


@functools.cache
def _jieba():
    with warnings.catch_warnings():
        # Python warns of its regular expressions when it compiles the file for the first time.
        warnings.simplefilter("ignore")
        import jieba

    jieba.setLogLevel("ERROR")  # it reports its own start
    return jieba


@functools.cache
def english_words() -> frozenset[str]:
    """The lower-case words of four letters and more in the benchmark's list
    (for-ai/language-confusion, Apache 2.0).
    """
    packed = Path(__file__).with_name("english_words.txt.gz").read_bytes()
    return frozenset(gzip.decompress(packed).decode("utf-8").split("\n"))


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
