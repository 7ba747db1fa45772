"""The layers of the package, and the picture of them in docs/architecture.md.

    python -m tests.architecture        draws the picture anew

`tests/test_layers.py` checks the imports against LAYERS, and the picture against the imports.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import crossin_jax

PACKAGE = Path(crossin_jax.__file__).parent
PAGE = PACKAGE.parent / "docs" / "architecture.md"

# A module belongs to the entry with the longest matching prefix.
LAYERS = (
    (
        "settings",
        "config",
        "languages",
        "process",
        "ownership",
        "files",
        "paths",
        "tables",
        "guests",
        "models.modules",
    ),
    ("data",),
    ("checks",),
    ("cli",),
    ("parallel", "provenance", "training.telemetry"),
    ("models", "generation.sampling", "training.optim", "checkpoint.hf_map"),
    ("training", "checkpoint", "generation"),
    ("evaluation",),
    ("report",),
    ("train", "evaluate", "score", "generate", "export", "harness", "selftest", "prepare", "study")
    + ("plan", "world", "__main__"),
)
# Programs that need rooms of their own; they may call other programs, as a study trains and
# evaluates.
GUESTS = ("prepare", "study", "plan", "world", "selftest")
PROGRAMS = ("train", "evaluate", "score", "generate", "export", "harness", "__main__")
STARTING = ("checks", "cli")  # what every program starts with


def find_modules() -> dict[str, Path]:
    """Every module of the package, by its name without "crossin_jax."."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return {name: path for name, path in found.items() if name}


def find_imports(name: str, path: Path, modules: dict[str, Path]) -> Iterator[str]:
    """The modules of the package that a module imports."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative import"
            names = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
        for imported in names:
            short = imported.removeprefix("crossin_jax.")
            if imported.startswith("crossin_jax.") and short in modules and short != name:
                yield short


def find_layer(name: str) -> int:
    """The number of a module's layer."""
    matching = [
        (len(entry), number)
        for number, layer in enumerate(LAYERS)
        for entry in layer
        if name == entry or name.startswith(entry + ".")
    ]
    assert matching, f"crossin_jax.{name} belongs to no layer: add it to LAYERS, or move it"
    return max(matching)[1]


def draw_picture() -> str:
    """A diagram of the packages with the imports between them, then every module with its first
    line.
    """
    modules = find_modules()
    edges = {
        (group_of(name), group_of(imported))
        for name, path in modules.items()
        for imported in find_imports(name, path, modules)
    }
    groups = sorted({group_of(name) for name in modules}, key=lambda group: (rank(group), group))
    lines = ["```mermaid", "flowchart TD"]
    lines += [f"  {group}" for group in groups]
    lines += [f"  {a} --> {b}" for a, b in sorted(shorten(edges))]
    lines += ["```", ""]
    for group in groups:
        members = sorted(name for name in modules if group_of(name) == group)
        whole = f": {first_line(modules[group])}" if group in modules else ""
        lines += [f"**{group}**{whole}", ""]
        lines += [
            f"- `{name}`: {first_line(modules[name])}"
            for name in members
            if name != group and not name.endswith("__main__")
        ]
        lines += [""]
    return "\n".join(lines)


def group_of(name: str) -> str:
    """The node of the diagram that a module belongs to: its package, or its kind where it lies on
    top.
    """
    top = name.partition(".")[0]
    if top in PROGRAMS:
        return "programs"
    if top in STARTING:
        return "starting"
    return top if (PACKAGE / top).is_dir() else "guests" if top in GUESTS else "base"


def rank(group: str) -> int:
    """The place of a node from the top: programs first."""
    members = [name for name in find_modules() if group_of(name) == group]
    return -max(find_layer(name) for name in members)


def shorten(edges: set[tuple[str, str]]) -> set[tuple[str, str]]:
    """The edges without those that a longer way replaces, and without edges from a node to
    itself.
    """
    edges = {(a, b) for a, b in edges if a != b}
    reached = {a: {b for x, b in edges if x == a} for a in {a for a, _ in edges}}
    for _ in range(len(reached)):
        for known in reached.values():
            known |= set().union(*(reached.get(b, set()) for b in known)) if known else set()
    return {
        (a, b)
        for a, b in edges
        if not any(
            b in reached.get(c, ())
            for x, c in edges
            if x == a and c != b and a not in reached.get(c, ())
        )
    }


def first_line(path: Path) -> str:
    """The first paragraph of a module's docstring, in one line."""
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return " ".join(docstring.partition("\n\n")[0].split())


def replace_picture(text: str) -> str:
    """A page with its picture drawn anew."""
    return re.sub(
        r"(<!-- picture -->\n).*?(<!-- end of picture -->)",
        lambda found: f"{found[1]}{draw_picture()}\n{found[2]}",
        text,
        flags=re.DOTALL,
    )


if __name__ == "__main__":
    PAGE.write_text(replace_picture(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
