"""A part of the generated bad input; `python -m tests.faults.inputs` tries as many cases as
wanted.
"""

import pytest

from tests.faults.inputs import ALL, judge, run_kind

CASES = 60  # of each kind: above 1,500 in all


@pytest.mark.parametrize("name", ALL)
def test_bad_input_is_read_or_refused_in_a_few_lines(name, monkeypatch, tmp_path):
    monkeypatch.setenv("CROSSIN_CACHE", str(tmp_path))
    counts, failures = run_kind(name, CASES)
    assert not failures, "\n".join(failures)
    assert counts["refused"] > counts["read"] / 10 and counts.total() >= CASES * 0.9


def test_there_are_enough_kinds():
    assert len(ALL) * CASES >= 1500


def test_the_judge_sees_tracebacks_and_long_messages():
    def fail():
        raise KeyError("x")

    assert judge(fail).startswith("FAIL: KeyError at test_inputs.py:")
    assert judge(lambda: None) == "read"
