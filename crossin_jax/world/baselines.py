"""Choices made without knowing any fact, to be shown beside every model's score on Cross-World."""

from collections import Counter
from collections.abc import Callable, Sequence
from difflib import SequenceMatcher
from typing import Any

from crossin_jax.languages import name_of
from crossin_jax.world import facts

# By row and language the indices of the chosen choices: more than one in a tie, which a coin
# decides.
Choices = list[dict[str, tuple[int, ...]]]


def choose_by_string(rows: Sequence[dict[str, Any]], languages: Sequence[str]) -> Choices:
    """The choices with the longest substring in common with the territory's name.

    Many currencies and languages are named like their territory: France → French.
    """

    def rate(relation: str, territory: str, lang: str, choice: str) -> int:
        entity = facts.name("territory", territory, lang).casefold()
        matcher = SequenceMatcher(None, entity, choice.casefold(), autojunk=False)
        return matcher.find_longest_match().size

    return _choose(rows, languages, rate)


def choose_by_frequency(
    rows: Sequence[dict[str, Any]], languages: Sequence[str], seed: int = 0
) -> Choices:
    """The choices that answer the question for most training territories."""
    counts: Counter = Counter()
    for relation in {row["id"].split("/")[0] for row in rows}:
        for record in facts.world_records(f"train/{relation}", languages, seed):
            counts.update((relation, lang, text.output) for lang, text in record.texts.items())
    return _choose(
        rows, languages, lambda relation, _, lang, choice: counts[relation, lang, choice]
    )


def _choose(
    rows: Sequence[dict[str, Any]],
    languages: Sequence[str],
    rate: Callable[[str, str, str, str], float],
) -> Choices:
    """The choices with the highest rate(relation, territory, language, choice)."""

    def pick(row: dict[str, Any], lang: str) -> tuple[int, ...]:
        relation, territory = row["id"].split("/")
        # a choice is "(A) text"
        rates = [rate(relation, territory, lang, c[4:]) for c in row[name_of(lang)]["choices"]]
        return tuple(i for i, value in enumerate(rates) if value == max(rates))

    return [{lang: pick(row, lang) for lang in languages} for row in rows]
