"""Check the first lines of docstrings: their length, end and first words.

    python tests/prose.py               prints violations, and exits with 1 if there are any

The rules of prose are in CONTRIBUTING.md. ruff checks the blank line after the first line, and its imperative mood.
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("benchmarks", "sat", "sgm", "tests", "tools", "vae_modules")
LONGEST = 88  # characters
FRAGMENTS = ("How", "Of", "Raises", "That", "The one", "What", "Where", "Whether", "Which")
Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def docstrings(source: str) -> Iterator[tuple[int, str]]:
    """Yield the line number and the text of each docstring in a source file."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, Documented) and (text := ast.get_docstring(node)) is not None:
            yield node.body[0].lineno, text


def problem_of(docstring: str) -> str | None:
    """Return the problem of a docstring's first line, with what to do; None without one."""
    first = docstring.partition("\n")[0].rstrip()
    if begin := next((words for words in FRAGMENTS if first.startswith(f"{words} ")), None):
        return f"begins with {begin!r}; name the result by a verb phrase such as 'Return the …'"
    if len(first) > LONGEST:
        return f"the first line has {len(first)} characters; shorten it to at most {LONGEST}"
    if not first.endswith("."):
        return "the first line does not end with a period; make it one sentence"
    return None


def wrong(root: Path = ROOT) -> list[str]:
    """Return a line for each docstring with a problem."""
    files = sorted([*root.glob("*.py"), *(file for folder in FOLDERS for file in (root / folder).rglob("*.py"))])
    lines = []
    for file in files:
        path = file.relative_to(root)
        for line, text in docstrings(file.read_text(encoding="utf-8")):
            if problem := problem_of(text):
                lines.append(f"{path}:{line}: {problem}")
    return lines


if __name__ == "__main__":
    found = wrong()
    sys.stdout.writelines(f"{line}\n" for line in found)
    sys.exit(1 if found else 0)
