"""What the host decides: which prompts share a program and a prefix, and where an answer stops."""

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

_FINE = tuple(sorted(scale << k for scale in (4, 5, 6, 7) for k in range(16)))  # 4, 5, 6, 7, 8, 10, 12, 14, 16, 20 …
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


def coarsen(sizes: Sequence[int], buckets: Sequence[int], weight: int = 1) -> list[int]:
    """A bucket for each size, chosen so that padding, `weight` times, and `PROGRAM_COST` per bucket in use are least
    together."""
    counts = Counter(bucket(size, buckets) for size in sizes)
    used = sorted(counts)
    best = [(0, 0)]  # for the first i buckets: their cost, and how many of them come before the last one chosen
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


def power_of_two(size: int) -> int:
    """The smallest power of two that is not below `size`; 0 for 0."""
    return 1 << (size - 1).bit_length() if size else 0


def share_prefixes(prompts: Sequence[np.ndarray]) -> list[Group]:
    """Groups that save the most tokens when each group's common prefix is read once; every prompt is in one group."""
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
        length = min(shared[low:high - 1])
        length = min(length, min(len(prompts[i]) for i in order[low:high]) - 1)
        whole = length * (high - low - 1) if length >= MIN_SHARED else 0
        parts = [best(*part) for part in split(low, high, length + MIN_SHARED)]
        apart = sum(saved for saved, _ in parts)
        if whole >= apart:
            return whole, [(low, high, length)] if whole else []
        return apart, [group for _, groups in parts for group in groups]

    groups, rest = [], set(order)
    for low, high, length in (best(0, len(order))[1] if order else ()):
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


def leave_out_beginnings(choices: Sequence[np.ndarray]) -> tuple[list[int], list[int]]:
    """The choices that are no beginning of another, and for every choice the place among those of one that begins so.

    The letter "(A)" is read off the choice "(A) Paris".
    """
    kept: list[int] = []
    for i in sorted(range(len(choices)), key=lambda i: -len(choices[i])):
        if not any(common_length(choices[k], choices[i]) == len(choices[i]) for k in kept):
            kept.append(i)
    kept.sort()
    return kept, [next(place for place, k in enumerate(kept) if common_length(choices[k], choice) == len(choice))
                  for choice in choices]


def pad(rows: Sequence[np.ndarray], length: int, value: int) -> np.ndarray:
    """Right-padded rows, (B, length) int32."""
    out = np.full((len(rows), length), value, np.int32)
    for row, tokens in zip(out, rows, strict=True):
        row[:len(tokens)] = tokens
    return out


def find_stop(answer: list[int], added: int, stop: Sequence[Stop],
              detokenize: Callable[[list[int]], str] | None) -> int | None:
    """How many tokens of an answer stand before its first stop, or None; the last `added` tokens are new.

    Before a stop that is a text: as few tokens as hold the text before it.
    """
    ends, texts = [], [entry for entry in stop if isinstance(entry, str)]
    for ids in (list(entry) for entry in stop if not isinstance(entry, str)):
        first = max(0, len(answer) - added - len(ids) + 1)
        ends += [i for i in range(first, len(answer) - len(ids) + 1) if answer[i:i + len(ids)] == ids][:1]
    if texts and added:
        text = detokenize(answer)
        starts = [start for start in (text.find(entry) for entry in texts) if start >= 0]
        if starts:
            kept = text[:min(starts)]
            ends.append(next(k for k in range(len(answer) + 1) if detokenize(answer[:k]).startswith(kept)))
    return min(ends, default=None)
