"""The tool that plants faults: it finds their places and tells what the tests did not notice."""

import subprocess

import pytest

from tests.planted.faults import Fault
from tests.planted.plant import Stale, find_place, judge, main, plant

SHOP = '''"""A toy."""

RATE, LIMIT = 0.5, 3


class Till:
    names = ("a", "b")

    def total(self, prices, *, tax=0.25):
        # the sum, then what the state takes of it
        if len(prices) > LIMIT: return 0
        return sum(price for price in prices) * (1 + tax)  # ü

    def label(self):
        return f"{self.names[0]}!"


def outer(x):
    def inner(y):
        y += 1
        return y * 2

    return inner(x) - 1
'''

TEST = """from toy.shop import Till, outer


def test_total():
    assert Till().total([1, 2], tax=0.5) == 4.5


def test_outer():
    assert outer(1) == 3
"""

TESTS = ("tests/test_shop.py",)


def fault_of(
    function: str, old: str, new: str, *, name: str = "f", tests: tuple[str, ...] = TESTS
) -> Fault:
    return Fault(
        room="toy",
        name=name,
        what="",
        where=f"toy/shop.py:{function}",
        old=old,
        new=new,
        tests=tests,
    )


@pytest.fixture
def repository(tmp_path):
    """A repository with one module and one test file."""
    for name, text in {"toy/__init__.py": "", "toy/shop.py": SHOP, TESTS[0]: TEST}.items():
        (tmp_path / "house" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "house" / name).write_text(text)
    subprocess.run(["git", "init", "-q", str(tmp_path / "house")], check=True)
    return tmp_path / "house"


PLANTED = [
    (
        "Till.total",
        "sum(price for price in prices)",
        "max(prices)",
        "return (max(prices)) * (1 + tax)  # ü",
    ),
    ("Till.total", "1 + tax", "tax", "* ((tax))  # ü"),
    ("Till.total", "0.25", "0.5", "tax=(0.5)):"),
    (
        "Till.total",
        "len(prices) > LIMIT",
        "len(prices) >= LIMIT",
        "if (len(prices) >= LIMIT): return 0",
    ),
    ("Till.total", "return 0", "return 1", "if len(prices) > LIMIT: return 1"),
    ("Till.names", "('a', 'b')", "('b', 'a')", "    names = (('b', 'a'))\n"),
    ("RATE", "3", "4", "RATE, LIMIT = 0.5, (4)\n"),
    ("LIMIT", "RATE, LIMIT = 0.5, 3", "RATE, LIMIT = 1, 3", "RATE, LIMIT = 1, 3\n"),
    ("outer.inner", "y += 1", "", "        pass\n        return y * 2\n"),
    (
        "outer.inner",
        "y += 1\nreturn y * 2",
        "if y:\n    y = 1\nreturn y",
        "\n            y = 1\n        return y\n",
    ),
    ("Till.label", "f'{self.names[0]}!'", "self.names[1]", "return (self.names[1])\n"),
]


@pytest.mark.parametrize(("function", "old", "new", "words"), PLANTED)
def test_only_the_code_of_the_fault_changes(repository, function, old, new, words):
    """The planted text holds the new code; the lines before and after it are as they were."""
    fault = fault_of(function, old, new)
    place = find_place(repository, fault)
    planted = plant(place, fault).decode()
    assert words in planted
    before = SHOP.encode()
    assert planted.encode()[: place.start] == before[: place.start]
    assert planted.encode().endswith(before[place.stop :])


def test_a_fault_is_found_in_another_format_and_another_file(repository):
    """Line breaks, quotes, comments and the file may change."""
    fault = fault_of("Till.total", "sum(price for price in prices) * (1 + tax)", "1")
    moved = SHOP.replace(
        "sum(price for price in prices) * (1 + tax)",
        "(\n            sum(\n                price  # each\n                for price in prices\n"
        "            )\n            * (1 + tax)\n        )",
    ).replace('("a", "b")', "('a', 'b')")
    (repository / "toy/shop.py").rename(repository / "toy/till.py")
    (repository / "toy/till.py").write_text("import os\n" + moved)
    assert find_place(repository, fault).file.name == "till.py"
    assert (
        "return (\n            (1)\n        )  # ü"
        in plant(find_place(repository, fault), fault).decode()
    )
    (repository / "toy/deep").mkdir()
    (repository / "toy/till.py").rename(repository / "toy/deep/till.py")
    assert find_place(repository, fault).file.parent.name == "deep"


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (fault_of("Till.total", "sum(prices)", "0"), "holds this 0 times: sum"),
        (fault_of("Till.total", "prices", "[]"), "holds this 2 times: prices"),
        (fault_of("Till.sum", "1", "0"), "there is no toy/shop.py:Till.sum"),
        (
            fault_of("Till.total", "1 + tax", "tax", tests=("tests/test_till.py::test_x",)),
            "test_till.py::test_x does not",
        ),
        (fault_of("outer.inner", "return y * 2", "y ="), "is no Python"),
    ],
)
def test_a_fault_that_cannot_be_planted_is_stale(repository, fault, words):
    """What is not found once, or has no tests, is named with its place."""
    with pytest.raises(Stale, match=words):
        plant(find_place(repository, fault), fault)


@pytest.mark.long
def test_what_the_tests_do_not_notice_is_told(repository, capsys):
    """Outcomes, the table and the exit code; the repository itself is left as it is."""
    faults = (
        fault_of("Till.total", "1 + tax", "tax", name="tax"),
        fault_of("LIMIT", "0.5", "1", name="rate"),
        fault_of("Till.total", "prices", "[]", name="twice"),
    )
    outcomes = judge(repository, faults, jobs=2)
    said = capsys.readouterr().out
    assert [outcomes[fault] for fault in faults] == ["noticed", "unnoticed", "stale"]
    assert "tests/test_shop.py::test_total" in said and "UNNOTICED   toy/rate" in said
    assert main(["--fault", "rate"], faults=faults, repository=repository) == 1
    table = capsys.readouterr().out.splitlines()[-2:]
    assert [line.split() for line in table] == [
        ["toy", "0", "1", "0", "0"],
        ["all", "0", "1", "0", "0"],
    ]
    assert main(["--fault", "tax"], faults=faults, repository=repository) == 0
    assert (repository / "toy/shop.py").read_text() == SHOP
    assert not list(repository.rglob("__pycache__"))


@pytest.mark.long
def test_a_run_that_does_not_end_counts_as_noticed(repository, capsys):
    """It is stopped, with all processes that it started, and told as such."""
    fault = fault_of("outer", "inner(x)", "__import__('time').sleep(60)")
    assert judge(repository, [fault], least=2) == {fault: "time is up"}
    assert "time is up  toy/f: stopped after " in capsys.readouterr().out


def test_tests_that_fail_without_a_fault_judge_nothing(repository, capsys):
    """A broken test never counts as one that notices."""
    (repository / TESTS[0]).write_text(TEST + "\n\ndef test_broken():\n    raise OSError\n")
    fault = fault_of("Till.total", "1 + tax", "tax")
    assert judge(repository, [fault]) == {fault: "broken"}
    assert "do not pass without it: tests/test_shop.py::test_broken" in capsys.readouterr().out


def test_the_list_says_where_each_fault_goes(repository, capsys):
    """--list runs nothing; its exit code tells of stale faults."""
    good, gone = (
        fault_of("outer.inner", "y * 2", "y", name="good"),
        fault_of("gone", "1", "2", name="gone"),
    )
    assert main(["--list"], faults=(good,), repository=repository) == 0
    assert capsys.readouterr().out.startswith("toy/good  toy/shop.py:21")
    assert main(["--list"], faults=(good, gone), repository=repository) == 1
    assert "toy/gone  stale: there is no toy/shop.py:gone" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["--fault", "unknown"], faults=(good,), repository=repository)
