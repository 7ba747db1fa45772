"""Cross-lingual instruction tuning and consistency evaluation of open language models on JAX.

`load_model(folder_or_hub_id)` gives a callable model; everything else is a program: `python -m crossin_jax.train` and
so on. Importing the package imports nothing heavy.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from crossin_jax.checkpoint.load import load_model

__version__ = "0.1.0"
__all__ = ["__version__", "load_model"]


def __getattr__(name: str) -> Any:
    if name == "load_model":
        from crossin_jax.checkpoint.load import load_model

        return load_model
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
