"""The words that tables and pages use for scores, methods and modes."""

from crossin_jax.languages import CODES, LANGUAGES

METHODS = {"generate": "free answers", "sum": "choice by summed log-likelihood",
           "mean": "choice by log-likelihood per token", "byte": "choice by log-likelihood per byte",
           "letter": "choice by log-likelihood of its letter", "rule": "rules without a model"}
MODES_IN_WORDS = {
    "expectation": "Answers that fit several choices count in proportion (the exact expectation over SeaEval's coins).",
    "seaeval": "Answers that fit several choices are decided by a seeded coin, as in SeaEval.",
    "strict": "Answers that fit several choices count as wrong and as agreeing with nothing.",
}


def method_name(method: str) -> str:
    """A method in words."""
    return METHODS.get(method, method)


def language_name(code: str) -> str:
    """The English name of a language code; a column name is one already."""
    return LANGUAGES.get(code, code)


def language_code(name: str) -> str:
    """The code of a language, for narrow places."""
    return CODES.get(name, name)


def percent(share: float | None) -> str:
    """12.5%, or a dash where there is nothing to take a share of."""
    return "–" if share is None else f"{share:.1%}"


def describe_score(name: str) -> str:
    """The heading of a score: "accuracy/en" is English, "AC3_3" stays."""
    if name == "accuracy/others":
        return "Other languages"
    _, _, language = name.partition("/")
    return language_name(language) if language else name[0].upper() + name[1:]
