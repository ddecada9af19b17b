"""The building blocks that configurations name."""

from sgm.modules.encoders.modules import GeneralConditioner

__all__ = ["GeneralConditioner"]
