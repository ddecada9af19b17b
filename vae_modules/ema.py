"""The moving average of weights, by the path of the original."""

from sgm.modules.ema import LitEma

__all__ = ["LitEma"]
