"""Write docs/python_api.md from the docstrings of the public names of `cogvideox_sat`.

python tools/write_api_page.py            writes the page
python tools/write_api_page.py --check    writes nothing; exits with 1 if the page is not current
"""

import inspect
import logging
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "sat")]

from cogvideox_sat.commands.generated_page import run_page_tool  # noqa: E402

logger = logging.getLogger("write_api_page")

PAGE = ROOT / "docs" / "python_api.md"
HEAD = """# The Python interface

Written by `python tools/write_api_page.py` from the docstrings; do not edit it here.

```python
import cogvideox_sat as cv

with cv.load("tiny") as pipe:
    pipe("a large orange square moving right on a red background", seed=42).save("square.mp4")
```
"""
SECTIONS = ("Args", "Attributes", "Returns", "Raises")
CALL = "__call__"


def page() -> str:
    """Return the page's text."""
    import cogvideox_sat

    parts = [HEAD]
    for name in cogvideox_sat._NAMES:
        if not name.startswith("_"):
            parts += entry(name, getattr(cogvideox_sat, name), "##", f"cv.{name}")
    return "\n".join(parts).rstrip() + "\n"


def entry(name: str, value: Any, level: str, shown: str) -> Iterator[str]:
    """Yield the part of the page about a function, or about a class with its methods."""
    yield f"{level} {shown}\n"
    is_class = inspect.isclass(value)
    if callable(value) and not is_class:
        called = "pipe" if name == CALL else name
        yield f"```python\n{called}{signature(value)}\n```\n"
    yield from described(inspect.getdoc(value) or "")
    if is_class and not issubclass(value, BaseException):
        for member, function in vars(value).items():
            if member != CALL and (member.startswith("_") or not hasattr(function, "__doc__")):
                continue
            if isinstance(function, property):
                yield f"### {name}.{member}\n"
                yield from described(inspect.getdoc(function) or "")
            elif inspect.isfunction(function):
                title = "pipe(…)" if member == CALL else f"{name}.{member}"
                yield from entry(member, function, "###", title)


def signature(function: Any) -> str:
    """Return a signature without `self`, on several lines if it is long."""
    found = inspect.signature(function)
    parameters = [each for each in found.parameters.values() if each.name not in ("self", "misspelt")]
    found = found.replace(parameters=parameters)
    text = re.sub(r"\b(?:collections\.abc|typing|pathlib(?:\._local)?|numpy|cogvideox_sat(?:\.\w+)+)\.", "", str(found))
    return text if len(text) < 100 else broken(found, text)


def broken(found: inspect.Signature, text: str) -> str:
    """Return a long signature with one parameter per line."""
    lines, depth, start = [], 0, 1
    for index, char in enumerate(text):
        depth += char in "([{"
        depth -= char in ")]}"
        if (char == "," and depth == 1) or (char == ")" and depth == 0):
            lines.append(text[start:index].strip())
            start = index + 1
            if char == ")":
                break
    return "(\n" + "".join(f"    {line},\n" for line in lines if line) + ")" + text[start:]


def described(doc: str) -> Iterator[str]:
    """Yield a docstring as Markdown, with its sections as lists."""
    section = None
    for block in re.split(r"\n\s*\n", doc):
        first, _, rest = block.partition("\n")
        if first.rstrip(":") in SECTIONS and first.endswith(":"):
            section = first.rstrip(":")
            yield f"**{section}**\n"
            yield from items(rest)
        else:
            yield " ".join(line.strip() for line in block.splitlines()) + "\n"


def items(text: str) -> Iterator[str]:
    """Yield the entries of a section as a list."""
    lines = [" ".join(part.split()) for part in re.split(r"\n(?=    \S)", text) if part.strip()]
    for line in lines:
        name, colon, words = line.partition(": ")
        yield f"* `{name}`: {words}" if colon and re.fullmatch(r"[\w, *]+", name) else f"* {line}"
    yield ""


def main(arguments: Sequence[str] | None = None) -> int:
    return run_page_tool(arguments, __doc__, PAGE, page, logger)


if __name__ == "__main__":
    sys.exit(main())
