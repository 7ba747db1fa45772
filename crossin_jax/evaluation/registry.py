"""The short names of published benchmarks: where each of them is, and what differs from file to
file.

Their columns are read by layout (`layouts.py`), so an entry says nothing about columns.
"""

import re
from dataclasses import dataclass

from crossin_jax.config import UserError, hint
from crossin_jax.paths import as_path


@dataclass(frozen=True, slots=True)
class Known:
    """A published benchmark.

    `hub` is ID, ID:CONFIGURATION or ID:FILE; {lang}, {split} and {part} stand for the language as
    the data set spells it, the split, and one of `parts` after another. `split` is the published
    one. `english` is where the English rows are, where they are elsewhere. The items of a benchmark
    that is not parallel are others in each language. Without `hub` it is read from a folder.
    """

    hub: str | None
    split: str = "test"
    parts: tuple[str, ...] = ("",)
    english: str | None = None
    is_parallel: bool = True
    remedy: str = ""


KNOWN: dict[str, Known] = {
    "cross_mmlu": Known("SeaEval/cross_mmlu:"),
    "cross_logiqa": Known("SeaEval/cross_logiqa:"),
    "cross_xquad": Known("SeaEval/cross_xquad:"),
    "global_mmlu": Known("CohereLabs/Global-MMLU:{lang}"),
    "global_mmlu_lite": Known("CohereLabs/Global-MMLU-Lite:{lang}"),
    "mmlu_prox": Known("li-lab/MMLU-ProX:{lang}"),
    "mmlu_prox_lite": Known("li-lab/MMLU-ProX-Lite:{lang}"),
    "mmmlu": Known("openai/MMMLU:{lang}", english="cais/mmlu:all"),
    "pmmeval_mlogiqa": Known("Qwen/P-MMEval:mlogiqa/{split}/{lang}.jsonl"),
    "pmmeval_mmmlu": Known(
        "Qwen/P-MMEval:mmmlu/{part}/{split}/mmlu_{lang}.jsonl", parts=("easy", "hard")
    ),
    # the answers of its test split are not public
    "xcsqa": Known("INK-USC/xcsr:X-CSQA-{lang}", split="validation"),
    "bmlama17": Known("JRQi/BMLAMA17:{lang}"),
    "bmlama53": Known("JRQi/BMLAMA53:{lang}"),
    "belebele": Known("facebook/belebele:{lang}"),
    "include": Known("CohereLabs/include-base-44:{lang}", is_parallel=False),
    "xcopa": Known("cambridgeltl/xcopa:{lang}"),
    "language_confusion": Known(
        None,
        remedy="git clone https://github.com/for-ai/language-confusion, and name "
        "language_confusion:language-confusion/test_sets",
    ),
}
_BY_LETTERS = {name.replace("_", ""): name for name in KNOWN}


def find_known(name: str) -> str | None:
    """The short name that a text means: "Global-MMLU-Lite" and "global_mmlu_lite" are one."""
    return _BY_LETTERS.get(re.sub(r"[-_ ]", "", name.lower()))


def split_name(name: str) -> tuple[str | None, str]:
    """(short name, folder or file) of SHORT:PATH, or of SHORT alone; (None, name) of others."""
    first, _, path = name.partition(":")
    known = find_known(first)
    return (known, path) if known else (None, name)


def refuse_unknown(name: str) -> UserError:
    """The error for a name that is no benchmark, with the nearest name or file."""
    path = as_path(name)
    files = [file.name for file in path.parent.iterdir()] if path.parent.is_dir() else []
    near = hint(path.name, [*KNOWN, "cross_world", *files])
    return UserError(
        f"benchmark {name!r}: no such file{near}; give a file, a folder, a path with {{lang}}, a "
        f"Hub id, or one of cross_world, {', '.join(KNOWN)}"
    )
