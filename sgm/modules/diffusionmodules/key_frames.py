"""Choose the frames that condition a network in training, and add noise to them."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sgm import randomness
from sgm.errors import UserError, shown

KINDS = ("first", "first_last", "random")


class KeyFrameDraws:
    """Draws the latent frames of each clip that condition a network, in training.

    Args:
        weights: the `conditioning` of a model's configuration, relative frequencies by kind. `first`: the first frame;
            `first_last`: the first and the last; `random`: any number of frames, at least one.

    Raises:
        UserError: `weights` is something else.
    """

    def __init__(self, weights: Any):
        numbers = isinstance(weights, Mapping) and all(
            type(weight) in (int, float) and 0 <= weight < math.inf for weight in weights.values()
        )
        if not (numbers and set(weights) <= set(KINDS) and sum(weights.values()) > 0):
            raise UserError(
                f"model.conditioning: got {shown(weights)}; expected weights of {', '.join(KINDS)}, such as "
                "{first: 1, first_last: 2}"
            )
        self.weights = {kind: float(weights.get(kind, 0)) for kind in KINDS}

    @property
    def first_alone(self) -> bool:
        """Return whether the first frame is always the only condition."""
        return not (self.weights["first_last"] or self.weights["random"])

    @property
    def usual(self) -> str:
        """Return the kind that is drawn most often, for validation, which is deterministic."""
        return max(KINDS[:2], key=self.weights.__getitem__)

    def draw(self, count: int, frames: int) -> Tensor:
        """Return a mask of the conditioning frames: bool (count, frames), on the CPU."""
        draws = torch.stack([randomness.uniform(count, purpose="key frames") for _ in range(frames + 3)], dim=1)
        kind = randomness.chosen(draws[:, 0], [self.weights[name] for name in KINDS])
        told = draws[:, 3:] < draws[:, 1:2]
        told |= torch.arange(frames) == (draws[:, 2:3] * frames).long()  # at least one frame
        for number, name in enumerate(KINDS[:2]):
            told[kind == number] = self.of_kind(name, frames)
        return told

    def of_kind(self, kind: str, frames: int) -> Tensor:
        """Return the mask of `first` or `first_last`: bool (frames,)."""
        told = torch.zeros(frames, dtype=torch.bool)
        told[0] = True
        if kind == "first_last":
            told[-1] = True
        return told


def noise_pictures(pictures: Tensor, purpose: str = "first frame") -> Tensor:
    """Return pictures (b, 3, n, height, width) plus noise, log σ ~ N(−3, 0.5²) per sample.

    The noise makes the network robust to imperfect conditions in sampling.
    """
    sigma = (0.5 * randomness.normal(pictures.shape[:1], purpose=f"{purpose} level") - 3.0).exp()
    noise = randomness.normal(pictures.shape, purpose=f"{purpose} noise", device=pictures.device, dtype=pictures.dtype)
    return pictures + noise * sigma.to(noise)[:, None, None, None, None]
