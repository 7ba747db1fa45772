"""Faults injected for real: programs are killed, disks fill up, files change and are damaged.

    python -m tests.faults.injected [--share 1.0] [--out FILE.md] [KIND ...]

Every case starts programs as a user does, on a CPU, with the tiny model of tests/configs/tiny.py,
in a temporary folder. Each must end as docs/reliability.md says: with its result, or with exit code
2 and at most three lines. `--share` makes fewer cases of each kind. The table that is printed
counts the cases; `--out` writes it to a file too. Exit code 1 where a case failed.
"""

import argparse
import datetime
import gzip
import hashlib
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
TINY = REPOSITORY / "tests/configs/tiny.py"
ROOT = Path(tempfile.mkdtemp(prefix="injected_"))
ENVIRONMENT = os.environ | {
    "JAX_PLATFORMS": "cpu",
    "PYTHONPATH": str(REPOSITORY),
    "CROSSIN_CACHE": str(ROOT / "corpora"),
    "TQDM_DISABLE": "1",
    "XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
}
LIMIT = 300  # seconds of one program
RESTRICTED = """
import resource, runpy, sys
limit = int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
del sys.argv[:2]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""
Case = tuple[str, Callable[[], str | None]]  # what is done, and a function that says what is wrong


# ---- Programs


def start(program: str, *arguments: object, limit: int | None = None, **env: str):
    """A program of the package; `limit` is how many bytes a file of it may have."""
    # The program restricts itself: a process with JAX must not fork, as `preexec_fn` would.
    limited = ("-c", RESTRICTED, str(limit)) if limit else ("-m",)
    return subprocess.Popen(
        [sys.executable, *limited, f"crossin_jax.{program}", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        env=ENVIRONMENT | env,
    )


def end(process: subprocess.Popen) -> tuple[int, str]:
    """(exit code, output) of a program."""
    try:
        output, _ = process.communicate(timeout=LIMIT)
    except subprocess.TimeoutExpired:
        process.kill()
        return -1, "does not end\n" + process.communicate()[0]
    return process.returncode, output


def run(program: str, *arguments: object, **options) -> tuple[int, str]:
    """Runs a program to its end."""
    return end(start(program, *arguments, **options))


def check_refusal(ended: tuple[int, str]) -> str | None:
    """What is wrong with how a program refused, else None."""
    code, output = ended
    said = output[output.find("error:") :].strip().splitlines() if "error:" in output else []
    if code == 2 and "Traceback" not in output and 1 <= len(said) <= 3:
        return None
    return f"exit code {code}: {output.strip()[-200:]!r}"


def check_success(ended: tuple[int, str]) -> str | None:
    """What is wrong with how a program ended that should have worked, else None."""
    return None if ended[0] == 0 else f"exit code {ended[0]}: {ended[1].strip()[-200:]!r}"


# ---- What the cases start from


def train_flags(folder: Path, *more: str) -> tuple[str, ...]:
    """A training run of six steps with checkpoints 3 and 6."""
    cache = f"--compilation_cache={ROOT / 'xla'}"
    return ("--config", str(TINY), f"--config.output_dir={folder}", cache, *more)


def sound() -> Path:
    """A folder with an undisturbed run, its export, built data and answers."""
    folder = ROOT / "sound"
    if not folder.exists():
        folder.mkdir()
        for name in COMMANDS:
            fault = check_success(run(*COMMANDS[name](folder)))
            assert fault is None, f"the undisturbed {name} failed: {fault}"
    return folder


COMMANDS: dict[str, Callable[[Path], tuple[str, ...]]] = {
    "train": lambda folder: ("train", *train_flags(folder / "run")),
    "export": lambda folder: (
        *("export", "--checkpoint", str(folder / "run"), "--format", "hf"),
        *("--out", str(folder / "model")),
    ),
    "prepare": lambda folder: (
        *("prepare", "build", "--config", f"{TINY}:{folder / 'model'}", "--file_format", "jsonl"),
        *("--out", str(folder / "data")),
    ),
    "evaluate": lambda folder: (
        *("evaluate", "--config", f"{TINY}:{folder / 'model'}", "--limit", "4"),
        *("--config.evaluation.method=choices", "--out", str(folder / "scores")),
    ),
}


def before(name: str, folder: Path) -> Path:
    """A new folder with what a program reads, as links to the undisturbed ones."""
    folder.mkdir()
    needs = {"export": ["run"], "prepare": ["model"], "evaluate": ["model"]}.get(name, [])
    for need in needs:
        shutil.copytree(sound() / need, folder / need)
    return folder


def result(name: str, folder: Path) -> object:
    """What a program made, as a value that does not depend on the place or the time."""
    if name == "train":
        seals = sorted(folder.glob("run/checkpoints/*/fingerprints/metadata"))
        arrays = {file.parts[-3]: json.loads(file.read_text())["arrays"] for file in seals}
        losses = re.findall(r'"loss": [^,]*', (folder / "run/metrics.jsonl").read_text())
        return arrays, losses
    if name == "evaluate":
        told = json.loads(gzip.decompress((folder / "scores/answers.json.gz").read_bytes()))
        return [run["predictions"] for run in told["runs"]]
    file = folder / {"export": "model/model.safetensors", "prepare": "data/mixture.jsonl"}[name]
    return hashlib.sha256(file.read_bytes()).hexdigest()


def finish(name: str, folder: Path) -> str | None:
    """The same command once more: it ends well, with the undisturbed result and no leftovers."""
    # An export that took its name before the kill is whole, and is not written again.
    is_done = name == "export" and (folder / "model").exists()
    if not is_done and (fault := check_success(run(*COMMANDS[name](folder)))):
        return f"again: {fault}"
    if result(name, folder) != result(name, sound()):
        return "the result differs from that of the undisturbed program"
    left = [path.name for path in folder.rglob(".*") if path.suffix in (".part", ".partial")]
    return f"left behind: {left}" if left else None


# ---- The kinds


def kills() -> Iterator[Case]:
    """SIGKILL at a random moment, then the same command."""
    draw = random.Random(0)
    for number in range(40):
        name = ("train", "train", "export", "prepare", "evaluate")[number % 5]
        yield f"{name}, kill {number}", partial(kill, name, draw.random())


def kill(name: str, part: float) -> str | None:
    folder = before(name, Path(tempfile.mkdtemp(dir=ROOT)) / "case")
    began = time.monotonic()
    process = start(*COMMANDS[name](folder))
    marks = {"train": "run/.owner.json", "export": ".model.partial"}
    mark = folder / marks.get(name, "none")
    limit = began + 4 + 12 * part
    while process.poll() is None and time.monotonic() < limit and not mark.exists():
        time.sleep(0.01)
    time.sleep(2 * part if name == "train" else 0.2 * part)
    process.kill()
    process.communicate()
    return finish(name, folder)


def full_disk() -> Iterator[Case]:
    """No file may grow beyond a size, as on a full disk; then the same command without limit."""
    for name in COMMANDS:
        for limit in (200, 5_000, 40_000):
            yield f"{name}, {limit:,} bytes", lambda n=name, b=limit: fill_disk(n, b)


def fill_disk(name: str, limit: int) -> str | None:
    folder = before(name, Path(tempfile.mkdtemp(dir=ROOT)) / "case")
    ended = run(*COMMANDS[name](folder), limit=limit)
    if ended[0] and (fault := check_refusal(ended)):
        return fault
    return finish(name, folder)


def places() -> Iterator[Case]:
    """Folders that cannot be written, and no HOME."""
    nowhere = "/proc/nowhere"
    folder = ROOT / "places"
    yield (
        "train without HOME",
        lambda: check_success(end(start("train", *train_flags(folder / "a"), HOME=""))),
    )
    yield (
        "output_dir cannot be made",
        lambda: check_refusal(run("train", *train_flags(Path(nowhere)))),
    )
    yield (
        "the cache of programs cannot be written",
        lambda: check_success(
            run("train", *train_flags(folder / "b", f"--compilation_cache={nowhere}"))
        ),
    )
    yield (
        "the cache of corpora cannot be written",
        lambda: check_success(
            run(*COMMANDS["prepare"](before("prepare", folder / "c")), CROSSIN_CACHE=nowhere)
        ),
    )
    for name, flag in (("export", "--out"), ("evaluate", "--out"), ("prepare", "--out")):
        yield (
            f"{name} {flag}={nowhere}",
            lambda name=name: check_refusal(run(*COMMANDS[name](sound())[:-1], nowhere)),
        )


def damage() -> Iterator[Case]:
    """Bytes that change in what programs keep: caches, predictions, results."""
    draw = random.Random(1)
    yield "compiled programs", lambda: damage_files("train", ROOT / "xla", draw)
    for pattern in ("predictions/*", "results.json", "answers.json.gz"):
        yield pattern, lambda p=pattern: damage_scores(p, draw)


def spoil(file: Path, draw: random.Random) -> None:
    content = bytearray(file.read_bytes())
    for _ in range(20):
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    file.write_bytes(bytes(content))


def damage_files(name: str, folder: Path, draw: random.Random) -> str | None:
    sound()
    for file in sorted(path for path in folder.rglob("*") if path.is_file())[:40]:
        spoil(file, draw)
    return finish(name, before(name, Path(tempfile.mkdtemp(dir=ROOT)) / "case"))


def damage_scores(pattern: str, draw: random.Random) -> str | None:
    folder = before("evaluate", Path(tempfile.mkdtemp(dir=ROOT)) / "case")
    shutil.copytree(sound() / "scores", folder / "scores")
    for file in filter(Path.is_file, sorted(folder.glob(f"scores/{pattern}"))):
        spoil(file, draw)
    ended = run(*COMMANDS["evaluate"](folder))
    if ended[0]:
        return check_refusal(ended)
    same = result("evaluate", folder) == result("evaluate", sound())
    return None if same else "other answers than those of the undisturbed program"


def changes() -> Iterator[Case]:
    """The base model changes between two runs of one command."""
    yield "another base, evaluate", lambda: change_base("evaluate")
    yield "another base, train", lambda: change_base("train")


def change_base(name: str) -> str | None:
    folder = before("evaluate", Path(tempfile.mkdtemp(dir=ROOT)) / "case")
    command = COMMANDS["evaluate"](folder)
    if name == "train":
        flags = train_flags(folder / "lora", "--config.train.checkpoint_every=3")
        command = ("train", "--config", f"{TINY}:{folder / 'model'}", *flags[2:])
    if fault := check_success(run(*command)):
        return fault
    if name == "train":
        shutil.rmtree(folder / "lora/checkpoints/6")
    file = folder / "model/model.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 64
    file.write_bytes(bytes(content))
    return check_refusal(run(*command))


def side_by_side() -> Iterator[Case]:
    """Two of one program at the same time in one folder: one is refused, the other is right."""
    for name in ("evaluate", "prepare", "train"):
        yield name, lambda name=name: start_two(name)


def start_two(name: str) -> str | None:
    folder = before(name, Path(tempfile.mkdtemp(dir=ROOT)) / "case")
    pair = [start(*COMMANDS[name](folder)) for _ in range(2)]
    ended = [end(process) for process in pair]
    for one in ended:
        if one[0] and (fault := check_refusal(one)):
            return fault
    return finish(name, folder) if any(code == 0 for code, _ in ended) else "both were refused"


def memory() -> Iterator[Case]:
    """2,000 steps and 5,000 prompts: the memory of the second half is that of the first."""
    yield "2,000 steps", many_steps
    yield "5,000 prompts", many_prompts


def many_steps() -> str | None:
    folder = ROOT / "steps"
    more = ("--config.train.steps=2000", "--config.train.checkpoint_every=1000")
    process = start("train", *train_flags(folder, *more, "--config.train.log_every=50"))
    peaks = {}
    while process.poll() is None:
        time.sleep(0.2)
        metrics = folder / "metrics.jsonl"
        steps = metrics.read_text().count('"loss"') * 50 if metrics.is_file() else 0
        peaks[steps] = read_memory(process.pid) or peaks.get(steps, 0)
    ended = end(process)
    first = max(value for step, value in peaks.items() if step <= 1000)
    last = max(value for step, value in peaks.items() if step > 1000)
    grown = last / first - 1
    return check_success(ended) or (None if grown < 0.05 else f"memory grew by {grown:.0%}")


def read_memory(pid: int) -> int:
    """Resident kB of a process, 0 where it has ended."""
    try:
        return int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[1])
    except (OSError, TypeError):
        return 0


PROMPTS = """
import os, sys
from crossin_jax.generation.chat import load_chat_model
model = load_chat_model(sys.argv[1], batch_size=16)
import re
def memory():
    return int(re.search(r"VmRSS:\\s+(\\d+)", open("/proc/self/status").read())[1])
seen = []
for part in range(5):
    # the same lengths in every part, so that later parts need no program of another shape
    texts = [(f"Name {i} " * (1 + i % 7), "") for i in range(1000, 2000)]
    model.answer(texts, max_new_tokens=4)
    seen.append((memory(), model.engine.compilations))
print(seen)
"""


def many_prompts() -> str | None:
    command = [sys.executable, "-c", PROMPTS, str(sound() / "model")]
    ended = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=600)
    if ended.returncode:
        return ended.stderr[-200:]
    seen = json.loads(ended.stdout.strip().splitlines()[-1].replace("(", "[").replace(")", "]"))
    (early, programs), (late, programs_late) = seen[1], seen[-1]
    if programs != programs_late:
        return f"{programs} compiled programs after 2,000 prompts, {programs_late} after 5,000"
    return None if late < 1.05 * early else f"memory grew from {early} to {late} kB"


KINDS = {
    function.__name__: function
    for function in (kills, full_disk, places, damage, changes, side_by_side, memory)
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("kinds", nargs="*", default=list(KINDS))
    parser.add_argument("--share", type=float, default=1.0, help="of the cases of each kind")
    parser.add_argument("--out", type=Path, help="file for the table")
    options = parser.parse_args()
    lines = ["| kind | what is done | cases | as promised |", "|---|---|---|---|"]
    failed = []
    try:
        for name in options.kinds:
            cases = list(KINDS[name]())
            cases = cases[: max(1, round(options.share * len(cases)))]
            faults = []
            for said, attempt in cases:
                fault = attempt()
                faults += [f"{name}: {said}: {fault}"] if fault else []
                print(f"{name}: {said}: {fault or 'ok'}", file=sys.stderr, flush=True)
            failed += faults
            done = KINDS[name].__doc__.strip().rstrip(".")
            lines.append(f"| {name} | {done} | {len(cases)} | {len(cases) - len(faults)} |")
    finally:
        shutil.rmtree(ROOT, ignore_errors=True)
    table = "\n".join([*lines, *(["", *failed] if failed else [])])
    print(table)
    if options.out:
        head = f"# Injected faults, {datetime.date.today()}, {os.cpu_count()} CPU cores\n\n"
        options.out.write_text(head + table + "\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
