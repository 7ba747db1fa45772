"""Who may import whom: lower layers know nothing of higher ones, the core knows no guest, and there
is no circle.

The layers are those of docs/architecture.md, lowest first. Imports inside functions count too.
"""

import ast

import pytest

from tests.architecture import (
    GUESTS,
    PAGE,
    PROGRAMS,
    find_imports,
    find_layer,
    find_modules,
    replace_picture,
)


def is_part_of(name: str, packages: tuple[str, ...]) -> bool:
    """Whether a module is one of these packages or lies in one."""
    return any(name == package or name.startswith(package + ".") for package in packages)


MODULES = find_modules()
EDGES = {
    (name, imported)
    for name, path in MODULES.items()
    for imported in find_imports(name, path, MODULES)
}


def is_breach(importer: str, imported: str) -> bool:
    """Whether an import goes upward, or from the core into a guest or a program."""
    if find_layer(imported) > find_layer(importer):
        return True
    return is_part_of(imported, GUESTS + PROGRAMS) and not is_part_of(importer, GUESTS)


def test_imports_go_downward():
    breaches = sorted(edge for edge in EDGES if is_breach(*edge))
    assert not breaches, "\n".join(
        f"{importer} imports {imported}" for importer, imported in breaches
    )


def test_no_module_imports_itself_through_others():
    reached = {
        name: {imported for importer, imported in EDGES if importer == name} for name in MODULES
    }
    changed = True
    while changed:
        changed = False
        for known in reached.values():
            more = set().union(*(reached[other] for other in known)) - known if known else set()
            if more:
                known |= more
                changed = True
    circles = sorted(name for name, known in reached.items() if name in known)
    assert not circles, circles


@pytest.mark.parametrize("library", ["torch", "jax"])
def test_libraries_stay_where_they_belong(library):
    """torch is for tests and benchmarks; what reads and mixes data runs without jax."""
    for name, path in MODULES.items():
        if library == "jax" and find_layer(name) > find_layer("data"):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = (
                [alias.name for alias in node.names]
                if isinstance(node, ast.Import)
                else [node.module or ""]
                if isinstance(node, ast.ImportFrom)
                else []
            )
            assert not any(imported.split(".")[0] == library for imported in names), (
                f"{name} imports {library}"
            )


def test_the_picture_shows_the_imports():
    text = PAGE.read_text(encoding="utf-8")
    assert replace_picture(text) == text, "draw it anew: python -m tests.architecture"
