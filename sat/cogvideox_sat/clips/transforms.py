"""Bring decoded frames to the size of a bucket: resize to cover it, crop, and mirror."""

import random
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor
from torch.nn import functional as F

from sgm.seeds import hashed_seed

MIDDLE = 0.5


class Placement(NamedTuple):
    """Position of the crop of a picture, and its mirroring.

    Attributes:
        top, left: position of the crop among all possible ones, 0 for the first, 1 for the last.
        mirrored: left and right are exchanged.
    """

    top: float = MIDDLE
    left: float = MIDDLE
    mirrored: bool = False


CENTRED = Placement()


@dataclass(frozen=True)
class Framing:
    """Rules for cropping and mirroring the clips of a data set.

    Attributes:
        reshape_mode: one of `clips.options.RESHAPE_MODES`.
        flip: the share of the clips that is mirrored, from 0 to 1.
    """

    reshape_mode: str = "center"
    flip: float = 0.0

    def placement(self, seed: int) -> Placement:
        """Return the placement of all frames of the clip whose sample has this seed."""
        top, left, mirrored = MIDDLE, MIDDLE, False
        if self.reshape_mode != "center":
            chance = random.Random(hashed_seed(seed, "crop"))
            top, left = chance.random(), chance.random()
        if self.flip:
            mirrored = random.Random(hashed_seed(seed, "flip")).random() < self.flip
        return Placement(top, left, mirrored)


def cover(frames: Tensor, height: int, width: int, placement: Placement = CENTRED) -> Tensor:
    """Return frames (n, 3, h, w) as (n, 3, height, width) in the same dtype, not contiguous.

    Frames are resized (antialiased bicubic, aspect ratio kept) to cover the size, and cropped to it.
    """
    h, w = frames.shape[-2:]
    scale = max(height / h, width / w)
    size = max(height, round(h * scale)), max(width, round(w * scale))
    if size != (h, w):
        frames = F.interpolate(frames, size=size, mode="bicubic", antialias=True)
    top, left = _offset(size[0] - height, placement.top), _offset(size[1] - width, placement.left)
    frames = frames[..., top : top + height, left : left + width]
    return frames.flip(-1) if placement.mirrored else frames


def _offset(excess: int, place: float) -> int:
    """Return how many of `excess` pixels are cropped before the picture."""
    return excess // 2 if place == MIDDLE else min(int(place * (excess + 1)), excess)
