"""What Cross-World gives away: choices made without knowing any fact, to be printed beside every model."""

from collections import Counter
from collections.abc import Sequence
from difflib import SequenceMatcher
from typing import Any

from crossin_jax.data import world
from crossin_jax.languages import LANGUAGES


def _best(values: list[float]) -> tuple[int, ...]:
    """Indices of the highest value; several are a coin between them."""
    return tuple(i for i, value in enumerate(values) if value == max(values))


def _shared_length(a: str, b: str) -> int:
    return SequenceMatcher(None, a.casefold(), b.casefold(), autojunk=False).find_longest_match().size


def choose_by_string(rows: Sequence[dict[str, Any]], languages: Sequence[str]) -> list[dict[str, tuple[int, ...]]]:
    """Per row and language the choices with the longest substring in common with the territory's name; all of a tie."""
    def pick(row: dict[str, Any], lang: str) -> tuple[int, ...]:
        entity = world.name("territory", row["id"].split("/")[1], lang)
        return _best([_shared_length(entity, choice[4:]) for choice in row[LANGUAGES[lang]]["choices"]])
    return [{lang: pick(row, lang) for lang in languages} for row in rows]


def choose_by_frequency(rows: Sequence[dict[str, Any]], languages: Sequence[str],
                        seed: int = 0) -> list[dict[str, tuple[int, ...]]]:
    """Per row and language the choices that answer most training territories' questions; all of a tie."""
    counts: Counter = Counter()
    for relation in {row["id"].split("/")[0] for row in rows}:
        for record in world.world_records(f"train/{relation}", languages, seed):
            counts.update((relation, lang, text.output) for lang, text in record.texts.items())

    def pick(row: dict[str, Any], lang: str) -> tuple[int, ...]:
        relation = row["id"].split("/")[0]
        return _best([counts[relation, lang, choice[4:]] for choice in row[LANGUAGES[lang]]["choices"]])
    return [{lang: pick(row, lang) for lang in languages} for row in rows]
