"""What a benchmark is made of: items, each in one or several languages, with choices and a gold
answer.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from crossin_jax.files import content_hash

LETTERS = "ABCDEFGHIJ"
MIN_CHOICES, MAX_CHOICES = 2, len(LETTERS)
# The place of the answer in a sentence, as BMLAMA writes it
MASK = "<mask>"
# What can be measured. parallel: accuracy and consistency. separate: accuracy by language, because
# the items or the order of their choices differ from language to language. open: prompts without
# choices, whose answers are measured as texts.
KINDS = ("parallel", "separate", "open")


@dataclass(frozen=True, slots=True)
class Version:
    """An item in one language; choices carry their label, "(A) …".

    `answer` is the index of the gold choice. A prompt without choices has no answer, None.
    """

    question: str
    choices: tuple[str, ...]
    answer: int | None
    context: str | None = None


@dataclass(frozen=True, slots=True)
class Item:
    """One item: its version by language code, and the subsets it belongs to."""

    id: str
    versions: dict[str, Version]
    tags: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Benchmark:
    """The items to be asked, in these languages, and how they are to be measured.

    `pool` holds those that shots may come from: all, even where `items` are limited to the first,
    or those of another split (`has_own_pool`). `kind` is one of KINDS, and `note` says why it is
    not parallel. With `is_cloze`, a question is a sentence with MASK in the place of the answer.
    `num_left_out` published items were not fit to be asked.
    """

    name: str
    items: tuple[Item, ...] = field(repr=False)
    languages: tuple[str, ...]
    source: str
    pool: tuple[Item, ...] = field(default=(), repr=False)
    kind: str = "parallel"
    note: str = ""
    is_cloze: bool = False
    has_own_pool: bool = False
    num_left_out: int = 0

    @property
    def fingerprint(self) -> str:
        """A short hash of the items: results of different ones cannot be compared."""
        return content_hash(
            [
                [
                    item.id,
                    {
                        c: [v.question, v.choices, v.answer, v.context]
                        for c, v in item.versions.items()
                    },
                    *item.tags,
                ]
                for item in self.items
            ]
        )


def with_items(benchmark: Benchmark, items: Sequence[Item]) -> Benchmark:
    """The same benchmark with fewer items; shots still come from the whole pool."""
    return replace(benchmark, items=tuple(items))
