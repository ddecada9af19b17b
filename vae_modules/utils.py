"""The small functions of `sgm.util`, by the path of the original."""

from typing import Any

from sgm import util
from sgm.util import get_obj_from_str, instantiate_from_config

__all__ = ["get_obj_from_str", "instantiate_from_config"]


def __getattr__(name: str) -> Any:
    """Return what `sgm.util` has by that name."""
    if name.startswith("_"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(util, name)
