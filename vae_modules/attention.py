"""Attention blocks, by the path of the original."""

from sgm.modules.attention import *  # noqa: F403
from sgm.modules.attention import __all__ as __all__
