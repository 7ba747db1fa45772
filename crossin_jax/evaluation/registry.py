"""The short names of published benchmarks: where each of them is, and what differs from file to
file.

Their columns are read by layout (`layouts.py`), so an entry says nothing about columns.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from crossin_jax.config import UserError, hint
from crossin_jax.languages import find_code, match_spellings, name_of
from crossin_jax.paths import as_path


@dataclass(frozen=True, slots=True)
class Known:
    """A published benchmark.

    `hub` is ID, ID:CONFIGURATION or ID:FILE; {lang}, {split} and {part} stand for the language as
    the data set spells it, the split, and each of `parts`. `split` is the published one. `english`
    is the place of the English rows, if it is another. A benchmark that is not parallel has other
    items in each language. Without `hub` it is read from a folder.
    `languages` are those of a benchmark whose list is complete, so that others are refused without
    the network; empty where languages are still added.
    """

    hub: str | None
    split: str = "test"
    parts: tuple[str, ...] = ("",)
    english: str | None = None
    is_parallel: bool = True
    remedy: str = ""
    languages: str = ""


_SEAEVAL = "en zh id vi es ms fil"
_PMMEVAL = "en zh ar es fr ja ko pt th vi"
KNOWN: dict[str, Known] = {
    "cross_mmlu": Known("SeaEval/cross_mmlu:", languages=_SEAEVAL),
    "cross_logiqa": Known("SeaEval/cross_logiqa:", languages=_SEAEVAL),
    "cross_xquad": Known("SeaEval/cross_xquad:", languages="en zh vi es"),
    "global_mmlu": Known("CohereLabs/Global-MMLU:{lang}"),
    "global_mmlu_lite": Known("CohereLabs/Global-MMLU-Lite:{lang}"),
    "mmlu_prox": Known("li-lab/MMLU-ProX:{lang}"),
    "mmlu_prox_lite": Known("li-lab/MMLU-ProX-Lite:{lang}"),
    "mmmlu": Known(
        "openai/MMMLU:{lang}",
        english="cais/mmlu:all",
        languages="en ar bn de es-LA fr hi id it ja ko pt-BR sw yo zh",
    ),
    "pmmeval_mlogiqa": Known("Qwen/P-MMEval:mlogiqa/{split}/{lang}.jsonl", languages=_PMMEVAL),
    "pmmeval_mmmlu": Known(
        "Qwen/P-MMEval:mmmlu/{part}/{split}/mmlu_{lang}.jsonl",
        parts=("easy", "hard"),
        languages=_PMMEVAL,
    ),
    # the answers of its test split are not public
    "xcsqa": Known(
        "INK-USC/xcsr:X-CSQA-{lang}",
        split="validation",
        languages="en zh de es fr it ja nl pl pt ru ar vi hi sw ur",
    ),
    "bmlama17": Known(
        "JRQi/BMLAMA17:{lang}", languages="en fr nl es ru ja zh ko vi el hu he tr ca ar uk fa"
    ),
    "bmlama53": Known("JRQi/BMLAMA53:{lang}"),
    "belebele": Known("facebook/belebele:{lang}"),
    "include": Known("CohereLabs/include-base-44:{lang}", is_parallel=False),
    "xcopa": Known("cambridgeltl/xcopa:{lang}", languages="et ht id it qu sw ta th tr vi zh"),
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


def check_languages(short: str, codes: Sequence[str]) -> None:
    """Refuses a language that a published benchmark does not have."""
    has = KNOWN[short].languages.split()
    found = match_spellings({each: find_code(each) for each in has}, codes, with_varieties=True)
    for code in codes if has else ():
        if not found[code]:
            raise UserError(
                f"benchmark {short!r} has no {name_of(code)} ({code}), only {', '.join(has)}; "
                f"leave {code!r} out of evaluation.languages (by default data.languages)"
            )


class AbsentBenchmark(UserError):
    """A file of a benchmark is not there, and no published benchmark has its name."""


def refuse_unknown(name: str) -> AbsentBenchmark:
    """The error for a name that is no benchmark, with the nearest name or file."""
    path = as_path(name)
    files = [file.name for file in path.parent.iterdir()] if path.parent.is_dir() else []
    near = hint(path.name, [*KNOWN, "cross_world", *files])
    return AbsentBenchmark(
        f"benchmark {name!r}: no such file{near}\n"
        "give a file, a folder, a path with {lang}, a Hub id, or one of cross_world, "
        f"{', '.join(KNOWN)}"
    )
