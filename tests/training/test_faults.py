"""What is told of a step that is not finite: its rows and their examples."""

import json

import pytest

from crossin_jax.training.faults import describe_fault

EXAMPLES = [[f"facts/{row}a", f"facts/{row}b"] for row in range(8)]


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ([3], "rows 3 of the batch: facts/3a; facts/3b; all in "),
        ([0, 7], "rows 0, 7 of the batch: facts/0a; facts/0b; facts/7a …; all in "),
        ([1, 2, 3, 4], "rows 1, 2, 3, 4 of the batch: facts/1a; facts/1b; facts/2a …; all in "),
        (
            [1, 2, 3, 4, 5],
            "rows 1, 2, 3, 4 … of the batch: facts/1a; facts/1b; facts/2a …; all in ",
        ),
        ([], "every row's loss is finite, the gradient is not; the batch is listed in "),
    ],
)
def test_a_fault_names_its_rows_and_lists_the_batch(bad, words, tmp_path):
    """One line names the first rows and examples; the file has every row with its examples."""
    assert describe_fault(tmp_path, 5, bad, EXAMPLES) == f"{words}{tmp_path / 'fault.json'}"
    assert json.loads((tmp_path / "fault.json").read_text()) == {
        "step": 5,
        "rows": [
            {"row": i, "finite": i not in bad, "examples": names}
            for i, names in enumerate(EXAMPLES)
        ],
    }
