"""Inspect the signatures of functions from other projects."""

import inspect
from collections.abc import Callable
from typing import Any


def accepts(function: Callable[..., Any], name: str) -> bool:
    """Return whether a function takes the keyword `name`, as a parameter or by `**kwargs`."""
    kinds = inspect.Parameter
    parameters = inspect.signature(function).parameters
    if any(parameter.kind is kinds.VAR_KEYWORD for parameter in parameters.values()):
        return True
    return name in parameters and parameters[name].kind in (kinds.POSITIONAL_OR_KEYWORD, kinds.KEYWORD_ONLY)
