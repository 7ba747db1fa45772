"""Solved examples before a question: the same items in every language, drawn by a seed."""

import random
from collections import Counter
from functools import lru_cache
from typing import Any

from crossin_jax.config import UserError
from crossin_jax.evaluation.items import Benchmark, Item, Version


# The drawn order is 8 3 5 1 …, and two shots are wanted. Item 7 is shown 8 and 3, and so is nearly
# every other item. Item 3 is shown 8 and 5: it must not see its own answer.
def draw_shot_items(
    benchmark: Benchmark, item: Item, num_shots: int, seed: int
) -> tuple[Item, ...]:
    """The items solved before `item`, in an order drawn by the seed.

    Those of another split that share most labels with the item go first, as MMLU's five examples
    are of the question's subject. Of the benchmark itself it is the first that do not have the
    item's context (or question) in any language. So nearly all prompts of a language begin alike,
    and the engine reads that once.
    """
    if not num_shots:
        return ()
    pool = benchmark.pool or benchmark.items
    order = [pool[i] for i in _draw_order(tuple(other.id for other in pool), seed)]
    if benchmark.has_own_pool:
        order.sort(key=lambda other: -len({*other.tags} & {*item.tags}))
    chosen: list[Item] = []
    for other in order:
        if len(chosen) == num_shots:
            break
        is_fit = item.versions.keys() <= other.versions.keys()
        if is_fit and other.id != item.id and not _same_text(item, other):
            chosen.append(other)
    if len(chosen) < num_shots:
        raise UserError(
            f"{benchmark.source}, item {item.id!r}: evaluation.shots={num_shots}, but only "
            f"{len(chosen)} other items have another context; use fewer shots"
        )
    return tuple(chosen)


def draw_shots(
    benchmark: Benchmark, item: Item, language: str, num_shots: int, seed: int
) -> tuple[Version, ...]:
    """`draw_shot_items` in one language: every language of an item sees the same ones."""
    return tuple(
        shot.versions[language] for shot in draw_shot_items(benchmark, item, num_shots, seed)
    )


def list_shots(benchmark: Benchmark, num_shots: int, seed: int) -> dict[str, Any]:
    """The ids of the shots for the record: those of most items, and those of the items that have
    others.
    """
    drawn = {
        item.id: tuple(shot.id for shot in draw_shot_items(benchmark, item, num_shots, seed))
        for item in benchmark.items
    }
    ((usual, _),) = Counter(drawn.values()).most_common(1)
    return {
        "usual": list(usual),
        "others": {key: list(ids) for key, ids in drawn.items() if ids != usual},
    }


@lru_cache(maxsize=8)
def _draw_order(ids: tuple[str, ...], seed: int) -> list[int]:
    """Indices of items in the order of the draw, whatever their order in the file."""
    by_id = sorted(range(len(ids)), key=ids.__getitem__)
    return random.Random(f"shots/{seed}").sample(by_id, len(by_id))


def _same_text(a: Item, b: Item) -> bool:
    def text(version: Version) -> str:
        return version.question if version.context is None else version.context

    return any(
        text(version) == text(b.versions[code])
        for code, version in a.versions.items()
        if code in b.versions
    )
