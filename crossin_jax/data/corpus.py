"""Files and Hub data sets become parallel records: one row id, one text per language."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Text:
    """One language's version of a record; `messages` is the whole chat as (role, text) where the source has several turns."""

    instruction: str
    input: str
    output: str
    messages: tuple[tuple[str, str], ...] | None = None


@dataclass(frozen=True, slots=True)
class Record:
    """One row: `texts` maps a language code to that language's version."""

    id: str
    texts: dict[str, Text]
