"""Expectations for one H100 80GB, by part, row and column.

Marks: M measured before (PyTorch 2.11, RESULTS.md), C counted from the code, P published, E estimated. They hold
for today's code; a compiled network is expected to be one compiled block for all layers.
"""

from typing import NamedTuple


class Prediction(NamedTuple):
    value: float
    mark: str


def measured(value: float) -> Prediction:
    return Prediction(value, "M")


def counted(value: float) -> Prediction:
    return Prediction(value, "C")


def published(value: float) -> Prediction:
    return Prediction(value, "P")


def estimated(value: float) -> Prediction:
    return Prediction(value, "E")


Columns = dict[str, Prediction]
PREDICTIONS: dict[str, dict[str, Columns]] = {
    "attention": {
        "5B, auto": {"forward TFLOP/s": estimated(413)},
        "5B, cudnn": {"forward TFLOP/s": published(413)},
        "5B, flash": {"forward TFLOP/s": published(324)},
        "5B, flash3": {"forward TFLOP/s": published(490)},
        "2B, auto": {"forward TFLOP/s": estimated(413)},
        "2B, cudnn": {"forward TFLOP/s": published(413)},
        "2B, flash": {"forward TFLOP/s": published(324)},
        "2B, flash3": {"forward TFLOP/s": published(490)},
    },
    "layer": {
        "5B, eager": {"launches": counted(37), "elementwise U": counted(48)},
        "5B, compiled": {"launches": counted(10), "elementwise U": counted(22)},
    },
    "networks": {
        "2B, ours": {"s a step": measured(0.607), "peak GiB": measured(4.62), "TFLOP/s": measured(396)},
        "2B, ours compiled": {"s a step": estimated(0.53)},
        "2B, diffusers": {"s a step": measured(0.624), "peak GiB": measured(4.79), "TFLOP/s": measured(385)},
        "5B, ours": {"s a step": measured(1.68), "peak GiB": measured(12.46), "TFLOP/s": measured(395)},
        "5B, ours compiled": {"s a step": estimated(1.39)},
        "5B, diffusers": {"s a step": measured(1.81), "peak GiB": measured(13.05), "TFLOP/s": measured(367)},
        "1.5, 81 frames, ours": {"s a step": estimated(7.2)},
        "1.5, 81 frames, ours compiled": {"s a step": estimated(6.6)},
    },
    "vae": {
        "encode, ours": {"s": measured(0.728), "peak GiB": counted(21.1)},
        "encode, diffusers, slices off": {"s": measured(1.04), "peak GiB": measured(29.0)},
        "decode, ours": {"s": measured(1.54), "peak GiB": counted(10.3)},
        "decode all chunks at once, ours": {"peak GiB": counted(33.4)},
        "decode, diffusers": {"s": measured(2.28), "peak GiB": measured(15.2)},
    },
    "training": {
        "2B, LoRA, all layers recomputed": {"s a step": measured(1.27), "peak GiB": measured(7.54)},
        "2B, LoRA, all recomputed but attention": {"s a step": estimated(1.09), "peak GiB": estimated(9.6)},
    },
}


def predicted(part: str, row: str, column: str) -> Prediction | None:
    """Return the expectation of a measurement, None without one."""
    return PREDICTIONS.get(part, {}).get(row, {}).get(column)
