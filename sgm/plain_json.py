"""Read JSON from untrusted files, and write JSON that every program reads."""

import json
import math
from typing import Any


def has_half_characters(text: str) -> bool:
    """Return whether a text has half of a surrogate pair, such as `\\ud83d` alone.

    No tokenizer takes such a text.
    """
    return any("\ud800" <= character <= "\udfff" for character in text)


def parse_json(text: str | bytes) -> Any:
    """Return the content of a JSON text.

    Raises:
        json.JSONDecodeError: it is not JSON, nested too deep, or has a number of thousands of digits.
        UnicodeDecodeError: it is not UTF-8 text.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise json.JSONDecodeError("nested too deep", "", 0) from None
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise
    except ValueError as error:
        raise json.JSONDecodeError(str(error), "", 0) from error


def standard_json(content: Any) -> str:
    """Return content as indented JSON that ends a line, with null for infinity and NaN.

    Python would write `Infinity` and `NaN`, which other programs refuse, since they are not JSON.
    """
    return json.dumps(_with_null(content), indent=2, allow_nan=False) + "\n"


def _with_null(node: Any) -> Any:
    """Return the node with None in place of numbers that are not finite."""
    if isinstance(node, dict):
        return {key: _with_null(value) for key, value in node.items()}
    if isinstance(node, list | tuple):
        return [_with_null(value) for value in node]
    return None if isinstance(node, float) and not math.isfinite(node) else node
