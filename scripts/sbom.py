"""The packages that crossin_jax needs, with what they need in turn: a software bill of materials
(CycloneDX 1.5).

python scripts/sbom.py docs/sbom.json        writes it, from the versions that are installed here
python scripts/sbom.py --requirements        prints NAME==VERSION lines, e.g. for pip-audit
"""

import ast
import json
import sys
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

SETUP = Path(__file__).resolve().parent.parent / "setup.py"


def read_requirements() -> list[str]:
    """The names in `install_requires` of setup.py."""
    for node in ast.walk(ast.parse(SETUP.read_text(encoding="utf-8"))):
        if isinstance(node, ast.keyword) and node.arg == "install_requires":
            lines = ast.literal_eval(node.value)
            return [canonicalize_name(Requirement(line).name) for line in lines]
    raise AssertionError(f"{SETUP}: no install_requires")


def find_packages(names: list[str]) -> dict[str, Distribution]:
    """The installed distributions with these names, and those that they need in turn, by name."""
    found: dict[str, Distribution] = {}
    queue = list(names)
    while queue:
        name = queue.pop()
        try:
            package = distribution(name)
        except PackageNotFoundError:
            continue  # needed on other platforms only, or by an extra that is not installed
        found[name] = package
        for line in package.requires or ():
            requirement = Requirement(line)
            needed = canonicalize_name(requirement.name)
            is_for_here = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
            if is_for_here and needed not in found:
                queue.append(needed)
    return dict(sorted(found.items()))


def describe(name: str, package: Distribution) -> dict:
    """A package as a component of CycloneDX."""
    fields = package.metadata
    license_ = fields.get("License-Expression") or fields.get("License") or "not stated"
    if len(license_) > 80:  # some packages put the whole text there
        license_ = license_.strip().split("\n")[0][:80]
    return {
        "type": "library",
        "name": name,
        "version": package.version,
        "purl": f"pkg:pypi/{name}@{package.version}",
        "licenses": [{"license": {"name": license_}}],
    }


def main() -> None:
    """Writes the file that is named, or prints the requirements."""
    packages = find_packages(read_requirements())
    if sys.argv[1:] == ["--requirements"]:
        print("\n".join(f"{name}=={package.version}" for name, package in packages.items()))
        return
    (path,) = sys.argv[1:]
    bill = {
        "bomFormat": "CycloneDX",
        "specVersion": "1.5",
        "version": 1,
        "metadata": {"component": {"type": "application", "name": "crossin_jax"}},
        "components": [describe(name, package) for name, package in packages.items()],
    }
    Path(path).write_text(json.dumps(bill, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
