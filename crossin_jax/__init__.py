"""Cross-lingual instruction tuning and consistency evaluation of open language models on JAX.

`load_model(folder_or_hub_id_or_run)` gives a model that answers, scores and computes logits;
docs/python.md shows this and the other functions. Everything else is a program, such as
`python -m crossin_jax.train`; `python -m crossin_jax` lists them.
"""

import importlib
import sys
from typing import TYPE_CHECKING, Any

from crossin_jax import process

if TYPE_CHECKING:
    from crossin_jax.data.pipeline import open_mixture as Mixture
    from crossin_jax.evaluation.anybody import ac3, consistency
    from crossin_jax.generation.model import load_model

# Name → (module, its name there). A module is imported when one of its names is first used: the
# package itself must not wait for JAX.
_LATE = {
    "load_model": ("generation.model", "load_model"),
    "Mixture": ("data.pipeline", "open_mixture"),
    "consistency": ("evaluation.anybody", "consistency"),
    "ac3": ("evaluation.anybody", "ac3"),
}

# `python -m crossin_jax.NAME` imports this file first, and jax for seconds after it: a signal must
# not meet an interpreter that answers with a traceback. Meanwhile Python has "-m" as the program's
# name.
if sys.argv[:1] == ["-m"]:
    process.listen()

__version__ = "0.1.0"
__all__ = ["Mixture", "__version__", "ac3", "consistency", "load_model"]


def __getattr__(name: str) -> Any:
    # Called for names that the module lacks.
    if name in _LATE:
        module, inner = _LATE[name]
        return getattr(importlib.import_module(f"crossin_jax.{module}"), inner)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    # Completion in a notebook asks for these names; without this it would not offer them.
    return sorted({*globals(), *__all__})
