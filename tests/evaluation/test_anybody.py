"""Consistency and AC3 of anybody's predictions."""

import math
import types

import pytest

import crossin_jax
from crossin_jax.config import UserError
from crossin_jax.evaluation.metrics import ac3 as harmonic

TABLE = {
    "q1": {"en": "A", "zh": "A", "vi": "A"},
    "q2": {"en": "B", "zh": "A", "vi": "B"},
    "q3": {"en": "C", "zh": "D", "vi": "E"},
}


class Frame:
    """What is used of a pandas data frame."""

    iloc = None

    def __init__(self, rows):
        self.rows = rows

    def to_dict(self, orient="series"):
        assert orient == "index"
        return self.rows


@pytest.mark.parametrize("make", [dict, Frame], ids=["dict", "frame"])
def test_consistency_is_the_share_of_sets_that_agree(make):
    """Pairs agree in 3, 1 and 0 of 3 cases, all three languages in 1 of 3 items."""
    assert crossin_jax.consistency(make(TABLE)) == pytest.approx(1 / 3)
    assert crossin_jax.consistency(make(TABLE), size=2) == pytest.approx(4 / 9)
    two = {item: {name: row[name] for name in ("en", "zh")} for item, row in TABLE.items()}
    assert crossin_jax.consistency(make(two)) == pytest.approx(1 / 3)


@pytest.mark.parametrize("none", [None, math.nan], ids=str)
def test_no_answer_agrees_with_nothing_and_is_wrong(none):
    table = {"q": {"en": "A", "zh": none, "vi": none}}
    assert crossin_jax.consistency(table) == crossin_jax.consistency(table, size=2) == 0
    assert crossin_jax.ac3(table, {"q": "A"}, size=2) == 0
    assert crossin_jax.consistency({"q": {"en": "A", "zh": "A", "vi": none}}, size=2) == 1 / 3


def test_ac3_takes_the_right_choices_from_an_argument_or_a_column():
    gold = {"q1": "A", "q2": "B", "q3": "X"}
    expected = harmonic(5 / 9, 1 / 3)
    assert crossin_jax.ac3(TABLE, gold) == pytest.approx(expected)
    with_column = {item: row | {"gold": gold[item]} for item, row in TABLE.items()}
    assert crossin_jax.ac3(with_column) == crossin_jax.ac3(Frame(with_column))
    assert crossin_jax.ac3(with_column) == pytest.approx(expected)
    assert crossin_jax.consistency(with_column) == pytest.approx(1 / 3)
    series = types.SimpleNamespace(to_dict=lambda: gold)
    assert crossin_jax.ac3(Frame(TABLE), series) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: crossin_jax.consistency({}), "pass {item"),
        (lambda: crossin_jax.consistency([{"en": "A"}]), "pass {item"),
        (lambda: crossin_jax.consistency({"q": "A"}), "pass {item"),
        (lambda: crossin_jax.consistency({"q": {"en": "A"}}), "two or more"),
        (lambda: crossin_jax.consistency({"q": {"en": 1, "zh": 1}, "r": {"en": 1}}), "for zh"),
        (lambda: crossin_jax.consistency(TABLE, size=4), "from 2 to 3"),
        (lambda: crossin_jax.ac3(TABLE), "'q1' has no right choice"),
        (lambda: crossin_jax.ac3(TABLE, {"q1": "A", "q2": "A"}), "'q3' .*1 of 3"),
    ],
)
def test_what_is_no_table_is_refused_with_the_remedy(call, words):
    with pytest.raises(UserError, match=words):
        call()
