"""The exception that a command line prints as a single line, and functions for such lines."""

import re
import reprlib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake that the user can correct.

    The message is one line and says what is wrong, where, and what to do.
    """


def some(names: Iterable[object], shown: int = 3) -> str:
    """Return the first few of `names` and the number of others, for a message."""
    texts = [str(name) for name in names]
    more = f" ... and {len(texts) - shown} more" if len(texts) > shown else ""
    return ", ".join(texts[:shown]) + more


def shown(value: object, most: int = 80) -> str:
    """Return the `repr` of a value for a message, cut if it is long."""
    text = repr(value) if isinstance(value, str) else _SHORT.repr(value)
    return text if len(text) <= most else f"{text[: most - 4]} ..."


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 200


def printable(text: str) -> str:
    """Return a text such as a file's name on one line, with unprintable characters escaped."""
    text = text.encode("utf-8", "backslashreplace").decode()
    return re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]", lambda match: repr(match[0])[1:-1], text)


def one_line(text: str, most: int = 2000) -> str:
    """Return a message cut to `most` characters, without line breaks and control characters."""
    text = re.sub(r"[\x00-\x1f\x7f-\x9f]", lambda match: " " if match[0] == "\n" else repr(match[0])[1:-1], text)
    return text if len(text) <= most else f"{text[:most]} ..."
