"""Links of the documentation lead to files and headings that exist, and the named tests exist."""

import re

import pytest

from tests.conftest import REPOSITORY

PAGES = sorted(
    [*REPOSITORY.glob("*.md"), *REPOSITORY.glob("docs/**/*.md")]
    + [*REPOSITORY.glob("benchmarks/results/*.md")]
)


def anchors(page):
    """The anchors of a page's headings, as GitHub makes them."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_links_and_named_tests_exist(page):
    text = page.read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith("https://"):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), f"{link}: no such file"
        assert not anchor or anchor in anchors(target), f"{link}: no such heading"
    for file, name in re.findall(r"`?(tests/[\w/]+\.py)(?:::(\w+))?", text):
        assert (REPOSITORY / file).exists(), file
        code = (REPOSITORY / file).read_text(encoding="utf-8")
        assert not name or f"def {name}(" in code, f"{file}::{name}"
