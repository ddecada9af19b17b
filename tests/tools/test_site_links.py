"""Links between documents lead to pages of the site, and its navigation has all pages."""

import re

import pytest
import yaml

from documents import ROOT, documents, links
from tools.site_links import OTHERS, on_page_markdown, site_path, with_site_links


@pytest.mark.parametrize(
    ("page", "link", "expected"),
    [
        ("limits.md", "../benchmarks/RESULTS.md#one-device-run", "benchmarks/RESULTS.md#one-device-run"),
        ("zh/data.md", "../../SECURITY.md", "../SECURITY.md"),
        ("zh/data.md", "../sampling.md#seeds", "../sampling.md#seeds"),
        ("index.md", "../README.md", "index.md"),
        ("tiny_model.md", "../assets/tiny/README.md", "assets/tiny/card.md"),
        ("tiny_model.md", "../assets/tiny/contact_sheet.png", "assets/tiny/contact_sheet.png"),
        ("SECURITY.md", "docs/data.md", "data.md"),
        ("benchmarks/RESULTS.md", "../docs/data.md", "../data.md"),
        ("data.md", "#seeds", "#seeds"),
        ("data.md", "https://example.org/a.md", "https://example.org/a.md"),
    ],
)
def test_links_of_a_page(page, link, expected):
    assert with_site_links(f"see [it]({link}).", page) == f"see [it]({expected})."


def test_pages_are_told_by_their_files():
    class Page:
        class file:
            src_uri = "limits.md"

    assert on_page_markdown("[all](../SECURITY.md)", Page) == "[all](SECURITY.md)"


def test_documents_that_pages_link_to_are_in_the_site():
    linked = {path for page in documents() if page.startswith("docs/") for path, _ in links(page)}
    outside = {path for path in linked if path.endswith(".md") and not path.startswith("docs/")}
    assert outside - {"README.md", "README_zh.md", "README_ja.md"} <= set(OTHERS)
    assert len({site_path(name) for name in OTHERS}) == len(OTHERS)


def test_the_navigation_has_all_pages():
    text = re.sub(r"!!python\S+( \{.*\})?", "", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    pages = set(named(yaml.safe_load(text)["nav"]))
    there = {page.removeprefix("docs/") for page in documents() if page.startswith("docs/")}
    assert there == pages


def named(entry: object) -> list[str]:
    """Return the pages of a part of the navigation."""
    if isinstance(entry, str):
        return [entry]
    return [page for part in (entry.values() if isinstance(entry, dict) else entry) for page in named(part)]
