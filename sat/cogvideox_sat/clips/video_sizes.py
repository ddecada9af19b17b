"""The sizes of clips: what `video_size` says, and which of several sizes a source gets."""

import math
from collections.abc import Sequence
from typing import Any

from cogvideox_sat.latent_geometry import SPACE_FACTOR
from sgm.errors import UserError

SAME_RATIO = 0.02  # aspect ratios whose logarithms differ by less are the same: sizes are rounded to multiples of 16


def nearest_size(height: int, width: int, sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Return the size for a source: nearest in aspect ratio, then the largest that need not be enlarged, else the
    smallest."""
    distances = [abs(math.log(width * h / (height * w))) for h, w in sizes]
    nearest = [size for size, far in zip(sizes, distances, strict=True) if far <= min(distances) + SAME_RATIO]
    covered = [size for size in nearest if size[0] * size[1] <= height * width]
    return max(covered, key=math.prod) if covered else min(nearest, key=math.prod)


def parse_sizes(video_size: Any) -> list[tuple[int, int]]:
    """Return the (height, width) that `video_size` names, one or several.

    Raises:
        UserError: the value is something else.
    """
    several = isinstance(video_size, Sequence) and video_size and all(isinstance(size, Sequence) for size in video_size)
    sizes = video_size if several else [video_size]
    for size in sizes:
        sides = size if isinstance(size, Sequence) else ()
        if len(sides) != 2 or not all(type(side) is int and side > 0 and side % SPACE_FACTOR == 0 for side in sides):
            raise UserError(
                f"data: video_size is {video_size}; expected [height, width] or a list of such, in multiples of "
                f"{SPACE_FACTOR} pixels"
            )
    return [tuple(size) for size in sizes]
