"""The pages: short lines, a short first page, links and pictures that exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
GENERATED = ["candidates.md"]  # by tools/docs


def prose(page: Path) -> list[str]:
    """Lines outside tables, code, and parts between two comments, which are generated."""
    lines, code, made = [], False, False
    for line in page.read_text(encoding="utf-8").splitlines():
        if line.startswith("```"):
            code = not code
        elif line.startswith("<!--"):
            made = "end" not in line
        elif not code and not made and not line.lstrip().startswith("|"):
            lines.append(line)
    return lines


def test_the_first_page_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 130


@pytest.mark.parametrize("page", [p for p in PAGES if p.name not in GENERATED], ids=lambda page: page.name)
def test_lines_of_prose_have_at_most_120_characters(page):
    assert [line for line in prose(page) if len(line) > 120] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_every_page_of_docs_is_in_the_table_of_contents():
    contents = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    assert [page.name for page in PAGES[1:] if page.name != "index.md" and f"]({page.name})" not in contents] == []


@pytest.mark.parametrize("picture", sorted((ROOT / "docs" / "figures").glob("*.png")), ids=lambda path: path.name)
def test_a_picture_has_at_most_60_kb(picture):
    assert picture.stat().st_size <= 60_000
