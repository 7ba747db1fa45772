"""Consistency and AC3 of anybody's predictions: a dictionary or a data frame of items and
languages.
"""

from collections.abc import Mapping
from typing import Any

from crossin_jax.config import UserError
from crossin_jax.evaluation.metrics import Scores, evaluate
from crossin_jax.evaluation.predictions import Answer, ItemAnswers, Predictions

GOLD = "gold"


def consistency(table: Any, *, size: int | None = None) -> float:
    """The share of sets of `size` languages that choose alike, averaged over items: consistency_s
    of SeaEval.

    `table` is {item: {language: choice}}, or a pandas data frame with a row per item and a column
    per language. A choice is any value that names it in every language, such as "B". None or NaN is
    no
    answer: it agrees with nothing. A column "gold" is left out. `size` None is 3, or 2 where there
    are two languages. Raises `UserError` for a table without two languages.
    Example: `consistency({"q1": {"en": "A", "zh": "A"}, "q2": {"en": "A", "zh": "B"}})` is 0.5.
    """
    return _pick(_score(table, None), size, "consistency")


def ac3(table: Any, gold: Any = None, *, size: int | None = None) -> float:
    """AC3_s, the harmonic mean of accuracy and consistency_s; `table` and `size` as in
    `consistency`.

    `gold` is {item: right choice} or a pandas series; None takes the column "gold" of the table.
    Raises `UserError` where an item has no right choice.
    """
    rows = _rows(table)
    answers = (
        {item: row.get(GOLD) for item, row in rows.items()}
        if gold is None
        else gold.to_dict()
        if hasattr(gold, "to_dict")
        else gold
    )
    missing = [item for item in rows if _is_missing(answers.get(item))]
    if missing:
        raise UserError(
            f"item {missing[0]!r} has no right choice ({len(missing)} of {len(rows)}); pass gold, "
            'e.g. ac3(table, {"q1": "B"}), or a column "gold" in the table'
        )
    return _pick(_score(table, answers), size, "ac3")


def _rows(table: Any) -> dict[Any, Mapping[str, Any]]:
    rows = table.to_dict("index") if hasattr(table, "iloc") else table
    is_table = isinstance(rows, Mapping) and rows
    if not is_table or not all(isinstance(row, Mapping) for row in rows.values()):
        raise UserError(
            "pass {item: {language: choice}}, or a pandas data frame with a row per item and a "
            "column per language"
        )
    return dict(rows)


def _is_missing(choice: Any) -> bool:
    return choice is None or choice != choice  # NaN is not itself


def _score(table: Any, gold: Mapping[Any, Any] | None) -> Scores:
    """The scores of a table; without right choices those that need them are without meaning."""
    rows = _rows(table)
    languages = tuple(dict.fromkeys(name for row in rows.values() for name in row if name != GOLD))
    if len(languages) < 2:
        raise UserError(f"languages: {', '.join(languages) or 'none'}; agreement needs two or more")
    items = []
    for item, row in rows.items():
        absent = [name for name in languages if name not in row]
        if absent:
            raise UserError(f"item {item!r} has no entry for {absent[0]}; write None for no answer")
        given = [row[name] for name in languages] + ([gold[item]] if gold else [])
        numbers: dict[Any, int] = {}
        for choice in given:
            if not _is_missing(choice):
                numbers.setdefault(choice, len(numbers))
        count = max(2, len(numbers))
        right = numbers[gold[item]] if gold else 0
        answers = {
            name: Answer(tuple(range(count)), "unreadable")
            if _is_missing(row[name])
            else Answer((numbers[row[name]],))
            for name in languages
        }
        items.append(ItemAnswers(str(item), dict.fromkeys(languages, right), count, answers, ()))
    predictions = Predictions("table", "generate", 0, languages, tuple(items))
    return evaluate(predictions, "strict")


def _pick(scores: Scores, size: int | None, name: str) -> float:
    by_size = getattr(scores, name)
    size = min(3, max(by_size)) if size is None else size
    if size not in by_size:
        raise UserError(f"size={size}: sets have from 2 to {max(by_size)} languages here")
    return by_size[size]
