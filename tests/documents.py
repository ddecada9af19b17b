"""The documents of the repository for tests: headings and anchors, code blocks, links."""

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
LANGUAGES = ("zh", "ja")
TRANSLATED = ("README.md", "docs/sampling.md", "docs/fine_tuning.md", "docs/data.md")
FENCE = re.compile(r"^(`{3,}|~{3,})(.*?)\n(.*?)^\1[ \t]*$", re.MULTILINE | re.DOTALL)
HEADING = re.compile(r"^(#{1,6}) +(.+?)\s*$", re.MULTILINE)
LINK = re.compile(r"(?<!\\)\]\(\s*<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\s*\)|<(?:img|a)\b[^>]*\b(?:src|href)=\"([^\"]+)\"")


def documents() -> list[str]:
    """Return the paths of all documents that users read, from the repository root."""
    at_the_top = [path for path in ROOT.glob("*.md") if path.name != "LICENSE.md"]
    deeper = (*(ROOT / "docs").rglob("*.md"), ROOT / "assets/tiny/README.md", ROOT / "benchmarks/RESULTS.md")
    return sorted(str(path.relative_to(ROOT)) for path in (*at_the_top, *deeper))


@cache
def text(document: str) -> str:
    """Return the content of a document."""
    return (ROOT / document).read_text(encoding="utf-8")


def code_blocks(document: str) -> list[tuple[str, str]]:
    """Return the fenced blocks of code, each with its language."""
    return [(language.strip(), code) for _, language, code in FENCE.findall(text(document))]


def prose(document: str) -> str:
    """Return a document without its fenced blocks."""
    return FENCE.sub("", text(document))


def headings(document: str) -> list[tuple[int, str]]:
    """Return the headings, each with its level."""
    return [(len(marks), title) for marks, title in HEADING.findall(prose(document))]


def anchors(document: str) -> list[str]:
    """Return the anchors of the headings as GitHub makes them, in the order of the headings."""
    found: list[str] = []
    for _, title in headings(document):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title).replace("`", "")
        slug = re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")
        found.append(slug if slug not in found else f"{slug}-{found.count(slug)}")
    return found


def links(document: str) -> Iterator[tuple[str, str]]:
    """Yield the links into the repository: the path from its root, and the anchor or ""."""
    without_code = re.sub(r"`[^`\n]*`", "", prose(document))
    for target in (one or other for one, other in LINK.findall(without_code)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        place = (ROOT / document).parent / path if path else ROOT / document
        yield str(place.resolve().relative_to(ROOT)), anchor


def original_of(document: str) -> str:
    """Return the English document of a translation; other documents are returned as they are."""
    if match := re.fullmatch(r"(.*)_(?:zh|ja)\.md", document):
        return f"{match[1]}.md"
    return re.sub(r"^docs/(?:zh|ja)/", "docs/", document)


def translation_of(document: str, language: str) -> str:
    """Return where the translation of an English document is."""
    path = Path(document)
    if path.parent == Path():
        return f"{path.stem}_{language}.md"
    return str(path.parent / language / path.name)
