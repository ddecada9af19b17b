"""Mark cases of parametrized tests that only `tests/run.sh --all` runs."""

from typing import Any

import pytest


def long(*values: Any) -> Any:
    """Return a case that takes seconds and is alike to another case of its test."""
    return pytest.param(*values, marks=pytest.mark.long)


def others_long(first: Any, *others: Any) -> list[Any]:
    """Return the cases of a parameter, of which all but the first are long."""
    return [first, *(long(*case) if isinstance(case, tuple) else long(case) for case in others)]
