"""Read JSON from untrusted files."""

import json
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
