"""List the programs of this package: python -m crossin_jax"""

import ast
import sys
from pathlib import Path

from crossin_jax import __version__
from crossin_jax.cli import fail
from crossin_jax.config import hint

# In the order of use.
PROGRAMS = (
    ("prepare", "train", "evaluate", "generate", "export")
    + ("study", "plan")
    + ("score", "harness")
)


def main() -> None:
    """Prints every program with the first sentence of its documentation."""
    words = [word for word in sys.argv[1:] if not word.startswith("-")]
    if words:
        name = words[0]
        if name not in PROGRAMS:
            fail(f"{name!r} is not a program of crossin_jax{hint(name, PROGRAMS)}")
        fail(f"write a dot between the package and the program: python -m crossin_jax.{name}")
    print(f"crossin_jax {__version__}: cross-lingual instruction tuning and evaluation on JAX\n")
    for name in PROGRAMS:
        print(f"  python -m crossin_jax.{name:<9} {describe(name)}")
    print("\nAdd --help for the flags and settings of a program.")


def describe(name: str) -> str:
    """The first paragraph of a program's documentation, from its source: nothing is imported."""
    folder = Path(__file__).parent
    file = folder / f"{name}.py"
    source = file if file.is_file() else folder / name / "__main__.py"
    tree = ast.parse(source.read_text(encoding="utf-8"))
    first = (ast.get_docstring(tree) or "").partition("\n\n")[0]
    return " ".join(first.split())


if __name__ == "__main__":
    main()
