"""Suggest a known name for an unknown one, in messages."""

import difflib
from collections.abc import Collection


def nearest(
    name: str,
    known: Collection[str],
    prefix: str = "",
    otherwise: str = "; --help lists them all",
    least: float = 0.5,
) -> str:
    """Return the end of a message about an unknown name.

    Args:
        known: the names to choose from.
        prefix: text before the suggested name, such as `--`.
        otherwise: the end of the message if no known name is similar.
        least: difflib's ratio that a suggestion has at least, from 0 to 1.
    """
    matches = difflib.get_close_matches(name, known, n=1, cutoff=least)
    return f"; did you mean {prefix}{matches[0]}?" if matches else otherwise
