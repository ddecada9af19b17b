"""Attention blocks, under the original's path."""

from sgm.modules.attention import *  # noqa: F403
from sgm.modules.attention import __all__ as __all__
