"""The pages: short lines, a short first page, links and pictures that exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NOT_YET_SHORT = {
    "candidates.md",
    "design.md",
    "export.md",
    "log.md",
    "models.md",
    "serving.md",
    "tracking.md",
    "trust.md",
}


def prose(page: Path) -> list[str]:
    """Lines outside tables and code."""
    lines, code = [], False
    for line in page.read_text().splitlines():
        if line.startswith("```"):
            code = not code
        elif not code and not line.lstrip().startswith("|"):
            lines.append(line)
    return lines


def test_the_first_page_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 130


@pytest.mark.parametrize("page", [p for p in PAGES if p.name not in NOT_YET_SHORT], ids=lambda page: page.name)
def test_lines_of_prose_have_at_most_120_characters(page):
    assert [line for line in prose(page) if len(line) > 120] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_every_page_of_docs_is_in_the_table_of_contents():
    contents = (ROOT / "docs" / "index.md").read_text()
    assert [page.name for page in PAGES[1:] if page.name != "index.md" and f"]({page.name})" not in contents] == []


@pytest.mark.parametrize("picture", sorted((ROOT / "docs" / "figures").glob("*.png")), ids=lambda path: path.name)
def test_a_picture_has_at_most_60_kb(picture):
    assert picture.stat().st_size <= 60_000
