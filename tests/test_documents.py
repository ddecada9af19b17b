"""Links in documents lead somewhere, code is valid, and translations follow the English."""

import ast
import re
import subprocess
from collections import Counter

import pytest

from documents import (
    LANGUAGES,
    ROOT,
    TRANSLATED,
    anchors,
    code_blocks,
    documents,
    headings,
    links,
    original_of,
    text,
    translation_of,
)

TRANSLATIONS = [(page, translation_of(page, language)) for page in TRANSLATED for language in LANGUAGES]


@pytest.mark.parametrize("document", documents())
def test_links_lead_somewhere(document):
    for path, anchor in links(document):
        assert (ROOT / path).exists(), f"{document} links to {path}"
        if anchor:
            assert anchor in anchors(path), f"{document} links to {path}#{anchor}"


@pytest.mark.parametrize("document", documents())
def test_code_can_be_read(document):
    for language, code in code_blocks(document):
        if language == "python" and document == "docs/python_api.md" and not code.startswith("import "):
            ast.parse(f"def {code.strip()}: ...")
        elif language == "python":
            ast.parse(code)
        elif language == "bash":
            subprocess.run(["bash", "-n"], input=code, text=True, check=True)


def test_readme_is_short():
    assert len(text("README.md").splitlines()) <= 150


def test_every_page_is_linked_from_the_readme_and_the_index():
    pages = {str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md")} - {"docs/index.md"}
    for document in ("README.md", "docs/index.md"):
        assert not pages - {path for path, _ in links(document)}, document


@pytest.mark.parametrize(("original", "translation"), TRANSLATIONS)
def test_a_translation_has_the_code_headings_and_links_of_the_original(original, translation):
    assert [level for level, _ in headings(translation)] == [level for level, _ in headings(original)]
    assert code_blocks(translation) == code_blocks(original)
    assert linked(translation) == linked(original)


def linked(document: str) -> Counter[tuple[str, int | None]]:
    """Return the links of a document, as English documents and numbers of headings.

    Links to the document in another language are left out.
    """
    found: Counter[tuple[str, int | None]] = Counter()
    for path, anchor in links(document):
        if original_of(path) == original_of(document) and path != document:
            continue
        number = anchors(path).index(anchor) if anchor else None
        found[original_of(path), number] += 1
    return found


def test_what_the_checks_read():
    assert "knobs-of-the-sampler" in anchors("docs/sampling.md")
    assert ("docs/sampling.md", "") in set(links("README.md"))
    assert ("docs/sampling.md", "memory") in set(links("docs/troubleshooting.md"))
    assert any(language == "bash" and "inference.sh" in code for language, code in code_blocks("README.md"))
    assert original_of("README_zh.md") == "README.md"
    assert original_of("docs/ja/data.md") == "docs/data.md" == original_of("docs/data.md")
    assert translation_of("docs/data.md", "zh") == "docs/zh/data.md"


ROW = re.compile(r"^\| `(.+?)` \|", re.MULTILINE)


def listed_errors() -> list[str]:
    return [line for line in ROW.findall(text("docs/troubleshooting.md")) if line != "line"]


def messages() -> list[str]:
    """Return the texts of the programs, with NUL for each value in them."""
    found = []
    for folder in ("sat", "sgm", "vae_modules", "tools"):
        for file in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.JoinedStr):
                    parts = [part.value if isinstance(part, ast.Constant) else "\0" for part in node.values]
                    found.append("".join(map(str, parts)))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(re.sub(r"%[a-z]", "\0", node.value))
    return [*found, *(ROOT / "tools/setup_environment.sh").read_text(encoding="utf-8").splitlines()]


@pytest.mark.slow
def test_listed_errors_are_those_of_the_programs():
    lines, known = listed_errors(), messages()
    assert len(lines) > 30
    parts = {line: [part for part in line.split("…") if part.strip()] for line in lines}
    missing = [line for line in lines if not any(in_order(parts[line], message) for message in known)]
    assert not missing, "docs/troubleshooting.md lists what no program says"
    assert not [line for line in lines if max(map(len, parts[line])) < 10], "too little to find the line by"


def in_order(parts: list[str], message: str) -> bool:
    """Return whether a message has the parts of a line, one after the other."""
    place = 0
    for part in parts:
        place = message.find(part, place)
        if place < 0:
            return False
        place += len(part)
    return True


def test_a_line_that_no_program_says_is_seen():
    assert in_order(["load is ", ": name"], "load is missing: name the checkpoint")
    assert not in_order([": name", "load is "], "load is missing: name the checkpoint")


def test_the_image_is_made_by_the_steps_of_the_guide():
    steps = re.findall(r"^RUN (pip .*)$", (ROOT / "Dockerfile").read_text(encoding="utf-8"), re.MULTILINE)
    guide = [line for _, code in code_blocks("docs/installing.md") for line in code.splitlines()]
    assert len(steps) == 2
    assert not [step for step in steps if step.replace(" --no-cache-dir", "") not in guide]


def test_the_image_holds_what_the_package_is_built_from():
    copied = re.findall(r"^COPY (.*) \S+$", (ROOT / "Dockerfile").read_text(encoding="utf-8"), re.MULTILINE)
    files = {file for line in copied for file in line.split()}
    requirements = set(re.findall(r'"([\w/]*requirements[\w-]*\.txt)"', (ROOT / "pyproject.toml").read_text()))
    assert {"pyproject.toml", "setup.py", "README.md", "sat", "sgm", "vae_modules", "configs", "assets"} <= files
    assert requirements <= files
    assert all((ROOT / file).exists() for file in files)
