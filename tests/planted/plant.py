"""Plants faults in a copy of the repository, one at a time: do the tests notice them?

    python -m tests.planted.plant [--room ROOM] [--fault NAME] [--jobs N] [--list]

The faults stand in `faults.py` and `many_languages.py`. A fault says which code of a function is
replaced by which. Code is compared as a syntax tree, so the format of a file and its place in the
package may change. The tests of a fault run first without it. Exit code 0: every fault was noticed;
1: some were not, or could not be judged.
"""

import argparse
import ast
import dataclasses
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path

from tests.planted import faults as first_faults
from tests.planted import many_languages
from tests.planted.faults import Fault

REPOSITORY = Path(__file__).resolve().parents[2]
FAULTS = (*first_faults.FAULTS, *many_languages.FAULTS)
NOTICED = ("noticed", "time is up")  # the other outcomes are "unnoticed", "stale" and "broken"
LONGEST = 1800  # seconds for tests without a fault


class Stale(Exception):
    """A fault whose place is not found exactly once, or whose tests are not there."""


# ---- where a fault goes


@dataclasses.dataclass(frozen=True)
class Place:
    """Bytes `start` to `stop` of a file, which hold an expression or statements."""

    file: Path
    start: int
    stop: int
    line: int
    column: int
    is_expression: bool


def find_place(root: Path, fault: Fault) -> Place:
    """The one place of a fault: in its file, else where its package has a function of that name."""
    for test in fault.tests:
        if not (root / test.partition("::")[0]).is_file():
            raise Stale(f"{test} does not exist")
    name, _, function = fault.where.partition(":")
    named, package = root / name, (root / Path(name).parts[0]).rglob("*.py")
    for files in ([named] if named.is_file() else [], sorted(set(package) - {named})):
        found = {file: find_scopes(file.read_text("utf-8"), function) for file in files}
        if any(found.values()):
            places = [
                place
                for file, scopes in found.items()
                for scope in scopes
                for place in find_places(file, scope, fault)
            ]
            if len(places) == 1:
                return places[0]
            raise Stale(f"{fault.where} holds this {len(places)} times: {fault.old.strip()}")
    raise Stale(f"there is no {fault.where}")


def find_scopes(source: str, name: str) -> list[ast.AST]:
    """Definitions of a qualified name such as "Store.save": functions, classes and assignments."""
    found = []

    def visit(node: ast.AST, prefix: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                names, inner = [child.name], f"{prefix}{child.name}."
            else:
                names, inner = list(assigned_names(child)), prefix
            if name in [prefix + one for one in names]:
                found.append(child)
            visit(child, inner)

    visit(ast.parse(source), "")
    return found


def assigned_names(node: ast.AST) -> Iterator[str]:
    """The names that a statement such as `SMALL, MANY = 1, 8` or `step: int = 0` gives values."""
    if isinstance(node, ast.Assign | ast.AnnAssign):
        for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
            yield from (part.id for part in ast.walk(target) if isinstance(part, ast.Name))


def find_places(file: Path, scope: ast.AST, fault: Fault) -> Iterator[Place]:
    """Where the old code of a fault stands within a definition."""
    try:
        old, new = (
            ast.parse(textwrap.dedent(text).strip()).body for text in (fault.old, fault.new)
        )
    except SyntaxError as error:
        raise Stale(f"{error.text}: is no Python") from error
    is_expression = all(len(body) == 1 and isinstance(body[0], ast.Expr) for body in (old, new))
    if is_expression:
        found = [[node] for node in iterate_expressions(scope) if same_code(node, old[0].value)]
    else:
        found = [
            part for part in iterate_stretches(scope, len(old)) if all(map(same_code, part, old))
        ]
    lines = [0]  # where each begins, in bytes: so the columns of a syntax tree are counted
    for line in file.read_bytes().splitlines(keepends=True):
        lines.append(lines[-1] + len(line))
    for part in found:
        first, last = part[0], part[-1]
        yield Place(
            file,
            lines[first.lineno - 1] + first.col_offset,
            lines[last.end_lineno - 1] + last.end_col_offset,
            first.lineno,
            first.col_offset,
            is_expression,
        )


def iterate_expressions(node: ast.AST) -> Iterator[ast.expr]:
    """Every expression within a node, but not the parts of f-strings.

    Python 3.11 does not say where those stand.
    """
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.expr):
            yield child
        if not isinstance(child, ast.JoinedStr):
            yield from iterate_expressions(child)


def iterate_stretches(scope: ast.AST, length: int) -> Iterator[list[ast.stmt]]:
    """Every so many statements of a definition that follow each other, and the definition
    itself.
    """
    if length == 1:
        yield [scope]
    for node in ast.walk(scope):
        for _, body in ast.iter_fields(node):
            if isinstance(body, list) and body and isinstance(body[0], ast.stmt):
                yield from (body[i : i + length] for i in range(len(body) - length + 1))


def same_code(one: ast.AST, other: ast.AST) -> bool:
    """Whether two pieces of code differ in nothing but their looks."""
    return type(one) is type(other) and ast.unparse(one) == ast.unparse(other)


def plant(place: Place, fault: Fault) -> bytes:
    """The text of the file with the fault in it; everything else stays as it is."""
    new = textwrap.dedent(fault.new).strip()
    if place.is_expression:
        new = f"({new})"
    else:
        new = textwrap.indent(new or "pass", " " * place.column).lstrip()
    text = place.file.read_bytes()
    text = text[: place.start] + new.encode() + text[place.stop :]
    try:
        ast.parse(text)
    except SyntaxError as error:
        raise Stale(f"{fault.where}: the new code does not fit there: {error}") from error
    return text


# ---- whether the tests notice it


@dataclasses.dataclass(frozen=True)
class Run:
    """A run of pytest: its exit code, None where it was stopped, and the first test that failed."""

    code: int | None
    seconds: float
    failed: str
    output: str


class Workplaces:
    """Copies of the repository, each beside a link to `shared`; tests run in them."""

    def __init__(self, repository: Path, number: int):
        self._folder = tempfile.TemporaryDirectory(prefix="planted_")
        self._free: queue.SimpleQueue[Path] = queue.SimpleQueue()
        self._running: set[subprocess.Popen] = set()
        listed = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=repository,
            check=True,
            capture_output=True,
            text=True,
        ).stdout.split("\0")
        for i in range(number):
            copy = Path(self._folder.name) / str(i) / repository.name
            for name in listed:
                if (repository / name).is_file():
                    (copy / name).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy2(repository / name, copy / name)
            if (repository.parent / "shared").exists():
                (copy.parent / "shared").symlink_to(repository.parent / "shared")
            self._free.put(copy)

    def __enter__(self) -> "Workplaces":
        return self

    def __exit__(self, *_: object) -> None:
        self._folder.cleanup()

    def stop(self) -> None:
        """Ends every run."""
        for process in tuple(self._running):
            stop(process)

    def run(self, tests: Sequence[str], limit: float, fault: Fault | None = None) -> Run:
        """Runs tests in a copy, with a fault in it or as it is, for at most `limit` seconds."""
        copy = self._free.get()
        try:
            if fault is None:
                return self._run(copy, tests, limit)
            place = find_place(copy, fault)
            before, planted = place.file.read_bytes(), plant(place, fault)
            place.file.write_bytes(planted)
            try:
                return self._run(copy, tests, limit)
            finally:
                place.file.write_bytes(before)
        finally:
            self._free.put(copy)

    def _run(self, copy: Path, tests: Sequence[str], limit: float) -> Run:
        # no compiled files: Python goes by size and second of the source, which may agree
        ours = {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": str(copy)}
        environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")} | ours
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-n", "0", *tests]
        start = time.monotonic()
        process = subprocess.Popen(
            command,
            cwd=copy,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        self._running.add(process)
        try:
            output, code = process.communicate(timeout=limit)[0], process.returncode
        except subprocess.TimeoutExpired:
            stop(process)
            output, code = process.communicate()[0], None
        finally:
            self._running.discard(process)
        failed = re.search(r"^(?:FAILED|ERROR) (.*?)(?:\[| - |$)", output, re.MULTILINE)
        return Run(code, time.monotonic() - start, failed.group(1) if failed else "", output)


def stop(process: subprocess.Popen) -> None:
    """Ends a process and those that it started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def judge(
    repository: Path, faults: Sequence[Fault], *, jobs: int = 1, least: float = 120
) -> dict[Fault, str]:
    """Plants each fault and tells its outcome.

    A run is stopped after five times as long as its tests take without a fault, or `least` seconds.
    """
    outcomes: dict[Fault, str] = {}

    def tell(fault: Fault, outcome: str, words: str) -> None:
        outcomes[fault] = outcome
        shown = outcome if outcome in NOTICED else outcome.upper()
        print(f"{shown:10}  {fault.room}/{fault.name}: {words}", flush=True)

    by_tests: dict[tuple[str, ...], list[Fault]] = {}
    for fault in faults:
        if is_there(repository, fault, tell):
            by_tests.setdefault(fault.tests, []).append(fault)
    with Workplaces(repository, jobs) as places, ThreadPoolExecutor(jobs) as pool:
        try:
            sound = {pool.submit(places.run, tests, LONGEST): tests for tests in by_tests}
            judged: dict[Future, Fault] = {}
            waiting = set(sound)
            while waiting:
                done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                for future in done:
                    run = future.result()
                    if future in judged:
                        tell(judged[future], *read_outcome(run))
                    elif run.code == 0:
                        limit = max(least, 5 * run.seconds)
                        more = {
                            pool.submit(places.run, fault.tests, limit, fault): fault
                            for fault in by_tests[sound[future]]
                        }
                        judged |= more
                        waiting |= set(more)
                    else:
                        seen = run.failed or run.output[-500:]
                        for fault in by_tests[sound[future]]:
                            tell(fault, "broken", f"its tests do not pass without it: {seen}")
        finally:  # also where the program itself is told to stop
            pool.shutdown(wait=False, cancel_futures=True)
            places.stop()
    return outcomes


def is_there(repository: Path, fault: Fault, tell) -> bool:
    """Whether a fault can be planted; tells where it cannot."""
    try:
        plant(find_place(repository, fault), fault)
        return True
    except Stale as error:
        tell(fault, "stale", str(error))
        return False


def read_outcome(run: Run) -> tuple[str, str]:
    """The outcome of a run with a fault, and a word on it."""
    if run.code is None:
        return "time is up", f"stopped after {run.seconds:.0f} s"
    if run.code == 0:
        return "unnoticed", f"{run.seconds:.0f} s"
    if run.code in (3, 4, 5):  # pytest: internal error, wrong command line, no tests
        return "broken", f"pytest ended with {run.code}: {run.output[-500:]}"
    return "noticed", f"{run.seconds:.0f} s, {run.failed or f'ended with {run.code}'}"


def make_table(outcomes: dict[Fault, str]) -> Iterator[str]:
    """Lines with the number of faults by room and outcome."""
    count = Counter(
        (room, "noticed" if outcome in NOTICED else outcome)
        for fault, outcome in outcomes.items()
        for room in (fault.room, "all")
    )
    names = ("noticed", "unnoticed", "stale", "broken")
    yield f"{'room':16}" + "".join(f"{name:>11}" for name in names)
    for room in (*sorted({fault.room for fault in outcomes}), "all"):
        yield f"{room:16}" + "".join(f"{count[room, name]:>11}" for name in names)


def choose(faults: Iterable[Fault], rooms: Sequence[str], names: Sequence[str]) -> list[Fault]:
    """The faults of some rooms, or of some names; all where neither is given."""
    return [
        fault
        for fault in faults
        if not (rooms or names) or fault.room in rooms or fault.name in names
    ]


def main(
    arguments: Sequence[str] | None = None,
    *,
    faults: Sequence[Fault] = FAULTS,
    repository: Path = REPOSITORY,
) -> int:
    """The program."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--room", action="append", default=[], help="only the faults of this room; may be repeated"
    )
    parser.add_argument(
        "--fault", action="append", default=[], help="only the fault of this name; may be repeated"
    )
    parser.add_argument("--jobs", type=int, default=1, help="runs at once (default: 1)")
    parser.add_argument(
        "--list", action="store_true", help="say where each fault goes, and run nothing"
    )
    options = parser.parse_args(arguments)
    chosen = choose(faults, options.room, options.fault)
    if not chosen:
        parser.error(f"no such fault; rooms: {', '.join(sorted({fault.room for fault in faults}))}")
    if options.list:
        stale = []
        for fault in chosen:
            if is_there(repository, fault, lambda fault, *words: stale.append(": ".join(words))):
                place = find_place(repository, fault)
                where = f"{place.file.relative_to(repository)}:{place.line}"
                print(f"{fault.room}/{fault.name}  {where}  {fault.what}")
            else:
                print(f"{fault.room}/{fault.name}  {stale[-1]}")
        return bool(stale)
    outcomes = judge(repository, chosen, jobs=options.jobs)
    print("\n".join(["", *make_table(outcomes)]))
    return 0 if all(outcome in NOTICED for outcome in outcomes.values()) else 1


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the copies are removed
    sys.exit(main())
