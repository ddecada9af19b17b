"""Tell what a function of somebody else's takes."""

import inspect
from collections.abc import Callable
from typing import Any


def accepts(function: Callable[..., Any], name: str) -> bool:
    """Return whether a function takes the keyword `name`, by itself or among any others."""
    kinds = inspect.Parameter
    parameters = inspect.signature(function).parameters
    if any(parameter.kind is kinds.VAR_KEYWORD for parameter in parameters.values()):
        return True
    return name in parameters and parameters[name].kind in (kinds.POSITIONAL_OR_KEYWORD, kinds.KEYWORD_ONLY)
