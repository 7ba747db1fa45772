"""The words and numbers that tables, figures and pages use for scores, methods and modes."""

import re
from collections.abc import Iterable

from crossin_jax.languages import find_code, name_of
from crossin_jax.report.summary import Estimate
from crossin_jax.tables import text_width

METHODS = {
    "generate": "free answers",
    "sum": "choice by summed log-likelihood",
    "mean": "choice by log-likelihood per token",
    "byte": "choice by log-likelihood per byte",
    "letter": "choice by log-likelihood of its letter",
    "sentence": "candidate by log-likelihood per token of the whole sentence",
    "rule": "rules without a model",
}
KINDS_IN_WORDS = {
    "separate": "not parallel: accuracy only",
    "open": "prompts without choices: are the answers in their language?",
}
SCORES = {
    "accuracy/others": "Other languages",
    "rankc": "RankC",
    "agreement": "Agreement",
    "agreement_right": "Agreement where one is right",
    "transfer": "Transfer from English",
    "conductivity": "Conductivity from English",
    "line_pass": "Lines pass",
    "word_pass": "Words pass",
}
# The largest s of consistency_s and AC3_s in tables of all scores, and how many languages are
# named in one line
MAX_SIZE = 12
MODES_IN_WORDS = {
    "expectation": "Answers that fit several choices count in proportion (the exact expectation "
    "over SeaEval's random draws).",
    "seaeval": "Answers that fit several choices are decided by a seeded random draw, "
    "as in SeaEval.",
    "strict": "Answers that fit several choices count as wrong and as agreeing with nothing.",
}
REASONS = {
    "tie": "tie",
    "empty": "empty",
    "unreadable": "not read",
    "too_long": "question too long",
}


def method_name(method: str) -> str:
    """A method in words."""
    return METHODS.get(method, method)


def reason_name(reason: str) -> str:
    """Why an answer has no clear choice, in words."""
    return REASONS.get(reason, reason)


def language_name(code: str) -> str:
    """The English name of a language code; a column name is one already."""
    return name_of(code)


def language_code(name: str) -> str:
    """The code of a language, for narrow places."""
    return find_code(name) or name


def number(value: float) -> str:
    """Three decimals without the leading zero, as in the paper's tables: .512."""
    text = f"{value:.3f}"
    return text.replace("0.", ".", 1) if text.startswith(("0.", "-0.")) else text


def percent(share: float | None) -> str:
    """A share as 12.5%, or a dash if there is none."""
    return "–" if share is None else f"{share:.1%}"


def shorten(text: str, width: int) -> str:
    """The text in at most `width` columns; … shows that it was cut."""
    if text_width(text) <= width:
        return text
    kept = ""
    for char in text:
        if text_width(kept + char) > width - 1:
            break
        kept += char
    return kept.rstrip() + "…"


def describe_score(name: str) -> str:
    """The heading of a score: "accuracy/en" is English, "transfer/es" is Transfer to Spanish."""
    measure, _, language = name.partition("/")
    if name in SCORES:
        return SCORES[name]
    if not language:
        return name[0].upper() + name[1:]
    if measure == "accuracy":
        return language_name(language)
    if measure in ("line_pass", "word_pass"):
        return f"{SCORES[measure]}, {language_name(language)}"
    return f"{measure[0].upper()}{measure[1:]} to {language_name(language)}"


def group_scores(names: Iterable[str]) -> dict[str, list[str]]:
    """The names of scores by heading, for tables of all scores.

    Of consistency and AC3, s = 2 to MAX_SIZE is shown; results.json has every s.
    """
    groups: dict[str, list[str]] = {}
    for name in names:
        measure, _, language = name.partition("/")
        size = re.fullmatch(r"(consistency|AC3)_(\d+)", name)
        if size and int(size[2]) > MAX_SIZE:
            continue
        heading = "Overall"
        if size:
            heading = "By number of languages s"
        elif language and name not in SCORES:
            heading = {"accuracy": "Accuracy by language"}.get(measure, SCORES.get(measure))
        groups.setdefault(heading or measure, []).append(name)
    return groups


def mark(estimate: Estimate) -> str:
    """▲ or ▼ if the score is clearly above or below the first arm's."""
    change = estimate.change
    return "" if change is None or not change.clear else "▲" if change.difference > 0 else "▼"


def spread(estimate: Estimate) -> str:
    """± .021 over seeds, else the 95 % interval as .471 to .554."""
    if estimate.sd is not None:
        return f"± {number(estimate.sd)}"
    return f"{number(estimate.low)} to {number(estimate.high)}"


def explain(estimate: Estimate) -> str:
    """The tooltip of a score."""
    parts = [f"95 % interval over items {number(estimate.low)} to {number(estimate.high)}"]
    if estimate.least is not None and estimate.most is not None:
        parts.append(f"random draws could give {number(estimate.least)} to {number(estimate.most)}")
    if change := estimate.change:
        sign = "+" if change.difference >= 0 else ""
        parts.append(
            f"against the first model {sign}{number(change.difference)} "
            f"[{number(change.low)}, {number(change.high)}], p = {change.p:.3g}"
        )
    return "; ".join(parts)
