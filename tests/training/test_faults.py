"""What is told of a batch whose loss is not finite."""

import json

import pytest

from crossin_jax.training.faults import describe_fault

EXAMPLES = [
    ["a x2x en>zh", "b base en>en"],
    ["ü x2x zh>es"],
    [],
    ["d", "e", "f", "g"],
    ["h"],
    ["i"],
]
ROWS = [  # (bad rows, the line that names them; FILE is where all are listed)
    ([0], "rows 0 of the batch: a x2x en>zh; b base en>en; all in FILE"),
    ([1, 4], "rows 1, 4 of the batch: ü x2x zh>es; h; all in FILE"),
    ([3], "rows 3 of the batch: d; e; f …; all in FILE"),
    (
        [0, 1, 3, 4, 5],
        "rows 0, 1, 3, 4 … of the batch: a x2x en>zh; b base en>en; ü x2x zh>es …; all in FILE",
    ),
    ([], "every row's loss is finite, the gradient is not; the batch is listed in FILE"),
]


@pytest.mark.parametrize(("bad", "words"), ROWS)
def test_the_bad_rows_and_their_examples_are_named(bad, words, tmp_path):
    """Four rows and three examples in the line; every row of the batch in the file."""
    line = describe_fault(tmp_path, 17, bad, EXAMPLES)
    assert line == words.replace("FILE", str(tmp_path / "fault.json"))
    told = json.loads((tmp_path / "fault.json").read_text(encoding="utf-8"))
    assert told["step"] == 17
    assert told["rows"] == [
        {"row": i, "finite": i not in bad, "examples": names} for i, names in enumerate(EXAMPLES)
    ]
