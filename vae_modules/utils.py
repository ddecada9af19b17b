"""The small functions of `sgm.util`, under the original's path."""

from typing import Any

from sgm import util
from sgm.util import get_obj_from_str, instantiate_from_config

__all__ = ["get_obj_from_str", "instantiate_from_config"]


def __getattr__(name: str) -> Any:
    """Return the attribute of `sgm.util` with that name."""
    if name.startswith("_"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(util, name)
