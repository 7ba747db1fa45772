"""What the host decides: which prompts share a program and a prefix, and where an answer stops.

Shape letters: B rows of a batch · P tokens of a shared prefix.
"""

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from crossin_jax.config import UserError

# Lengths are rounded up to buckets: 4, 5, 6, 7, 8, 10, 12, 14, 16, 20 … (four per doubling). A new
# bucket is one more compilation; the next one is at most 25 % longer.
_FINE = tuple(sorted(scale << k for scale in (4, 5, 6, 7) for k in range(16)))
LENGTH_BUCKETS = tuple(size for size in _FINE if size >= 16)
TAIL_BUCKETS = (0, 1, 2, 3, *_FINE)  # tokens of a continuation after its first
CHOICE_BUCKETS = (1, 2, 4, 5, 6, 8, 10, 12, 16, 24, 32, 48, 64, 128)
PROGRAM_COST = 4096  # padding, in tokens, that one more program must save
MIN_SHARED = 32  # tokens that a common prefix saves per prompt before it is worth its own pass
MIN_SHARING = 4  # prompts

Stop = str | Sequence[int]


@dataclass(frozen=True, slots=True)
class Group:
    """Prompts, by index, that begin with the same tokens; each has at least one more."""

    prefix: np.ndarray  # (P,) int32; empty where nothing is shared
    members: tuple[int, ...]


def bucket(size: int, buckets: Sequence[int]) -> int:
    """The smallest bucket that holds `size`."""
    i = bisect_left(buckets, size)
    assert i < len(buckets), f"{size} is longer than every bucket of {buckets}"
    return buckets[i]


def choose_buckets(sizes: Sequence[int], buckets: Sequence[int], weight: int = 1) -> list[int]:
    """A bucket for each size with the least total cost: `weight` times the padding, plus
    `PROGRAM_COST` per bucket.
    """
    # Three prompts of 10 tokens and twenty of 500, with buckets 16 and 512: two programs pad
    # little, but one program of 512 pads only 3 * 496 tokens more and saves a compilation.
    #
    # Dynamic programming over the buckets in use, shortest first. The sizes of a run of
    # neighbouring buckets are padded to the last of them:  16 20 24 | 28 32 | 40  ->  24, 32 and
    # 40. best[i] = (the least cost of the first i buckets, where their last run starts)
    counts = Counter(bucket(size, buckets) for size in sizes)
    used = sorted(counts)
    best = [(0, 0)]
    for i, size in enumerate(used, 1):
        members, options = 0, []
        for start in range(i - 1, -1, -1):
            members += counts[used[start]]
            options.append((best[start][0] + weight * members * size + PROGRAM_COST, start))
        best.append(min(options))
    chosen, end = {}, len(used)
    while end:
        start = best[end][1]
        chosen |= dict.fromkeys(used[start:end], used[end - 1])
        end = start
    return [chosen[bucket(size, buckets)] for size in sizes]


def by_bucket(
    items: Sequence, sizes: Sequence[int], buckets: Sequence[int], weight: int = 1
) -> list[tuple[int, list]]:
    """(bucket, the items that it holds) for every bucket that `choose_buckets` chooses, smallest
    first.
    """
    groups: dict[int, list] = {}
    for item, size in zip(items, choose_buckets(sizes, buckets, weight), strict=True):
        groups.setdefault(size, []).append(item)
    return sorted(groups.items())


def cut_into_batches(items: Sequence, size: int) -> list:
    """Batches of at most `size` items, in order."""
    return [items[start : start + size] for start in range(0, len(items), size)]


def power_of_two(size: int) -> int:
    """The smallest power of two that is not below `size`; 0 for 0."""
    return 1 << (size - 1).bit_length() if size else 0


def share_prefixes(prompts: Sequence[np.ndarray], share: bool = True) -> list[Group]:
    """Groups that save the most tokens when each group's common prefix is read once; every prompt
    is in one group.

    `share` False: one group without a prefix.
    """
    # Sorted prompts with a common beginning are neighbours. Prompts of two few-shot tasks that
    # share their first 40 tokens:
    #
    #     preamble | shots of task 1 | question a     a range of prompts either shares the shortest
    #     preamble | shots of task 1 | question b     prefix that all neighbours have ("preamble"),
    #     preamble | shots of task 2 | question c     or is split where neighbours share little
    #     preamble | shots of task 2 | question d     more, and each part is solved by itself.
    #
    # Of the two, the one that saves more tokens wins.
    order = sorted(range(len(prompts)), key=lambda i: prompts[i].astype(">i4").tobytes())
    shared = [common_length(prompts[a], prompts[b]) for a, b in zip(order, order[1:], strict=False)]

    def split(low: int, high: int, floor: int) -> Iterator[tuple[int, int]]:
        """Ranges of order[low:high] whose neighbours share at least `floor` tokens."""
        start = low
        for i in range(low, high):
            if i + 1 == high or shared[i] < floor:
                yield start, i + 1
                start = i + 1

    def best(low: int, high: int) -> tuple[int, list[tuple[int, int, int]]]:
        """Tokens saved by the best grouping of a range, and its (low, high, prefix length)."""
        if high - low < MIN_SHARING:
            return 0, []
        # at least one token of each prompt must be left: its logits give the first answer token
        length = min(*shared[low : high - 1], *(len(prompts[i]) - 1 for i in order[low:high]))
        whole = length * (high - low - 1) if length >= MIN_SHARED else 0
        parts = [best(*part) for part in split(low, high, length + MIN_SHARED)]
        saved_by_parts = sum(saved for saved, _ in parts)
        if whole >= saved_by_parts:
            return whole, [(low, high, length)] if whole else []
        return saved_by_parts, [group for _, groups in parts for group in groups]

    groups, rest = [], set(order)
    for low, high, length in best(0, len(order))[1] if share else ():
        groups.append(Group(prompts[order[low]][:length], tuple(order[low:high])))
        rest -= set(groups[-1].members)
    if rest:
        groups.append(Group(np.zeros(0, np.int32), tuple(sorted(rest))))
    return groups


def common_length(a: np.ndarray, b: np.ndarray) -> int:
    """How many leading tokens two prompts share."""
    size = min(len(a), len(b))
    differ = np.flatnonzero(a[:size] != b[:size])
    return int(differ[0]) if len(differ) else size


def common_prefix(sequences: Sequence[np.ndarray]) -> int:
    """How many leading ids all sequences share."""
    shortest = min(map(len, sequences))
    differ = (np.stack([s[:shortest] for s in sequences]) != sequences[0][:shortest]).any(0)
    return int(np.argmax(differ)) if differ.any() else shortest


# Choices as token ids, 0: [5], 1: [5 8], 2: [7]. Choice 0 begins choice 1, so 1 and 2 are read, and
# the result is ([1, 2], [0, 0, 1]): choice 0 is read from the first of them.
def drop_prefix_choices(choices: Sequence[np.ndarray]) -> tuple[list[int], list[int]]:
    """The choices that do not begin another choice, and for every choice its index among those from
    which it is read.

    The score of "(A)" is read off the first tokens of "(A) Paris".
    """

    def begins(i: int, k: int) -> bool:
        return common_length(choices[k], choices[i]) == len(choices[i])

    kept: list[int] = []
    for i in sorted(range(len(choices)), key=lambda i: -len(choices[i])):
        if not any(begins(i, k) for k in kept):
            kept.append(i)
    kept.sort()
    return kept, [[begins(i, k) for k in kept].index(True) for i in range(len(choices))]


def pad(rows: Sequence[np.ndarray], length: int, value: int) -> np.ndarray:
    """Right-padded rows, (B, length) int32."""
    out = np.full((len(rows), length), value, np.int32)
    for row, tokens in zip(out, rows, strict=True):
        row[: len(tokens)] = tokens
    return out


def check_stops(stop: Sequence[Stop], detokenize: Callable[[list[int]], str] | None) -> None:
    """Refuses a stop that every answer has, and texts that cannot be looked for."""
    for entry in stop:
        if not len(entry):
            raise UserError(
                f"stop={list(stop)!r} has an empty entry, which would end every answer at once; "
                "leave it out"
            )
    if any(isinstance(entry, str) for entry in stop) and detokenize is None:
        raise UserError(f"stop={list(stop)!r} holds texts; pass detokenize, or stops as token ids")


def find_stop(
    answer: list[int],
    added: int,
    stop: Sequence[Stop],
    detokenize: Callable[[list[int]], str] | None,
) -> int | None:
    """How many tokens of an answer are kept because of its first stop, or None; the last `added`
    tokens are new.

    A stop of token ids is left out. A stop text is kept whole: `cut_at_stop` removes it from the
    decoded text.
    """
    # Tokens and stop texts end at different places. With the stop "\nQ:"
    #
    #     tokens     Par | is | .\nQ | : no      with 3 tokens "\nQ" would stay in the answer,
    #     kept       Par | is | .\nQ | : no      since its text would not show the stop
    #     text       Paris.                      (after cut_at_stop)
    ends = []  # (tokens before the stop, tokens kept)
    texts = [entry for entry in stop if isinstance(entry, str)]
    for ids in (list(entry) for entry in stop if not isinstance(entry, str)):
        # it was not there before the new tokens came, so it ends in one of them
        first = max(0, len(answer) - added - len(ids) + 1)
        places = range(first, len(answer) - len(ids) + 1)
        ends += [(i, i) for i in places if answer[i : i + len(ids)] == ids][:1]
    if texts and added:
        text = detokenize(answer)
        if found := [(text.index(entry), entry) for entry in texts if entry in text]:
            start, entry = min(found)

            def count_tokens(text: str) -> int:
                return next(
                    n for n in range(len(answer) + 1) if detokenize(answer[:n]).startswith(text)
                )

            ends.append((count_tokens(text[:start]), count_tokens(text[:start] + entry)))
    return min(ends)[1] if ends else None


def cut_at_stop(text: str, stops: Sequence[str]) -> str:
    """The text before the first stop text in it."""
    return text[: min((text.index(stop) for stop in stops if stop in text), default=len(text))]
