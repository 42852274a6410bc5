"""The pages of docs/: each is in the table of contents, and no link leads nowhere. ``make docs`` holds the rest."""

import re

from tests.conftest import REPOSITORY

PAGES = sorted((REPOSITORY / "docs").glob("*.md"))


def test_every_page_is_in_the_table_of_contents() -> None:
    index = (REPOSITORY / "docs" / "index.md").read_text()
    listed = [line for block in re.findall(r"```\{toctree\}\n(.*?)```", index, re.S) for line in block.splitlines()]
    named = [line for line in listed if line and not line.startswith((":", "api/"))]
    assert sorted([*named, "index"]) == [page.stem for page in PAGES]


def test_links_lead_to_files() -> None:
    for page in (
        *PAGES,
        REPOSITORY / "README.md",
        REPOSITORY / "CONTRIBUTING.md",
        REPOSITORY / "examples" / "README.md",
    ):
        for link in re.findall(r"\]\(([^)#\s]+)", page.read_text()):
            assert link.startswith("https://") or (page.parent / link).exists(), f"{page.name}: {link}"


def test_readme_is_short() -> None:
    assert len((REPOSITORY / "README.md").read_text().splitlines()) <= 150
