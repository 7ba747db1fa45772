"""Cross-lingual instruction tuning and consistency evaluation of open language models on JAX.

`load_model(folder_or_hub_id_or_run)` gives a callable model. Everything else is a program, such as
`python -m crossin_jax.train`; `python -m crossin_jax` lists them.
"""

import sys
from typing import TYPE_CHECKING, Any

from crossin_jax import process

if TYPE_CHECKING:
    from crossin_jax.checkpoint.open import load_model

# `python -m crossin_jax.NAME` imports this file first, and jax for seconds after it: a signal must
# not meet an interpreter that answers with a traceback. Meanwhile Python has "-m" as the program's
# name.
if sys.argv[:1] == ["-m"]:
    process.listen()

__version__ = "0.1.0"
__all__ = ["__version__", "load_model"]


def __getattr__(name: str) -> Any:
    # Called for names that the module lacks. So JAX is imported with the first use of load_model.
    if name == "load_model":
        from crossin_jax.checkpoint.open import load_model

        return load_model
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    # Completion in a notebook asks for these names; without this it would not offer load_model.
    return sorted({*globals(), *__all__})
