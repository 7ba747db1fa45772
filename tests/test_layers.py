"""Who may import whom: lower layers know nothing of higher ones, the core knows no guest, and there is no circle.

The layers are those of docs/architecture.md, lowest first. Imports inside functions count too.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import crossin_jax

PACKAGE = Path(crossin_jax.__file__).parent

# A module belongs to the entry with the longest matching prefix.
LAYERS = (
    ("config", "checks", "languages", "outputs", "provenance"),
    ("program",),
    ("data",),
    ("parallel", "training.telemetry"),
    ("models", "generation.sampling", "training.optim", "checkpoint.hf_map"),
    ("training", "checkpoint", "generation"),
    ("evaluation",),
    ("train", "evaluate", "score", "generate", "export", "harness", "report", "prepare", "study", "study_cost", "plan",
     "tune"),
)
# Programs that need rooms of their own; they may call other programs, as a study trains and evaluates.
GUESTS = ("prepare", "study", "study_cost", "plan", "tune")
PROGRAMS = tuple(name for name in LAYERS[-1] if name not in GUESTS)

# What has yet to be changed: (importing module, imported module). Only ever remove lines.
BREACHES = frozenset({
    ("evaluate", "score"),
    ("evaluation.harness", "generate"),
    ("program", "parallel.topology"),
    ("training.telemetry", "models.spec"),
})
CIRCLES = ("data.corpus", "data.crosslingual", "data.world", "plan", "tune")
JAX_BELOW_DATA = ("provenance",)


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
    matching = [(len(entry), number) for number, layer in enumerate(LAYERS) for entry in layer
                if name == entry or name.startswith(entry + ".")]
    assert matching, f"crossin_jax.{name} belongs to no layer: add it to LAYERS, or move it"
    return max(matching)[1]


def is_part_of(name: str, packages: tuple[str, ...]) -> bool:
    """Whether a module is one of these packages or lies in one."""
    return any(name == package or name.startswith(package + ".") for package in packages)


MODULES = find_modules()
EDGES = {(name, imported) for name, path in MODULES.items() for imported in find_imports(name, path, MODULES)}


def is_breach(importer: str, imported: str) -> bool:
    """Whether an import goes upward, or from the core into a guest or a program."""
    if find_layer(imported) > find_layer(importer):
        return True
    return is_part_of(imported, GUESTS + PROGRAMS) and not is_part_of(importer, GUESTS)


def test_imports_go_downward():
    breaches = {edge for edge in EDGES if is_breach(*edge)}
    new = sorted(breaches - BREACHES)
    assert not new, "\n".join(f"{importer} imports {imported}" for importer, imported in new)
    assert breaches == BREACHES, f"these breaches are gone; take them off the list: {sorted(BREACHES - breaches)}"


def test_no_module_imports_itself_through_others():
    reached = {name: {imported for importer, imported in EDGES if importer == name} for name in MODULES}
    changed = True
    while changed:
        changed = False
        for known in reached.values():
            more = set().union(*(reached[other] for other in known)) - known if known else set()
            if more:
                known |= more
                changed = True
    circles = sorted(name for name, known in reached.items() if name in known)
    assert circles == sorted(CIRCLES), circles


@pytest.mark.parametrize("library", ["torch", "jax"])
def test_libraries_stay_where_they_belong(library):
    """torch is for tests and benchmarks; what reads and mixes data runs without jax."""
    for name, path in MODULES.items():
        if library == "jax" and find_layer(name) > find_layer("data"):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [
                node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if name not in JAX_BELOW_DATA:
                assert not any(imported.split(".")[0] == library for imported in names), f"{name} imports {library}"
