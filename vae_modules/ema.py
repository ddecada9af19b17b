"""The moving average of weights, under the original's path."""

from sgm.modules.ema import LitEma

__all__ = ["LitEma"]
