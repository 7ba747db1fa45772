"""Faults that the tests must notice: small changes that do real harm without a word of complaint.

`where` is a file and a function, class or name in it. `old` stands there exactly once. Where `old`
and `new` are expressions, one replaces the other; else both are statements, and an empty `new`
leaves them out. `tests` are the files, kept few, that should notice.
"""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fault:
    """One small change of the package."""

    room: str
    name: str
    what: str  # what goes wrong, in a sentence
    where: str
    old: str
    new: str
    tests: tuple[str, ...]


FAULTS: tuple[Fault, ...] = ()
