"""Read the sizes in `video_size`, and choose one of them for a source."""

import math
from collections.abc import Sequence
from typing import Any

from cogvideox_sat.latent_geometry import SPACE_FACTOR
from sgm.errors import UserError

SAME_RATIO = 0.02  # logarithms of equal aspect ratios differ by less, as sizes are rounded to multiples of 16


def nearest_size(height: int, width: int, sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Return the (height, width) for a source.

    It is the nearest in aspect ratio; among equally near ones the largest that the source covers without enlarging,
    else the smallest.
    """
    distances = [abs(math.log(width * h / (height * w))) for h, w in sizes]
    nearest = [size for size, far in zip(sizes, distances, strict=True) if far <= min(distances) + SAME_RATIO]
    covered = [size for size in nearest if size[0] * size[1] <= height * width]
    return max(covered, key=math.prod) if covered else min(nearest, key=math.prod)


def parse_sizes(video_size: Any) -> list[tuple[int, int]]:
    """Return the (height, width) pairs in `video_size`, one or several.

    Raises:
        UserError: the value is something else.
    """
    several = isinstance(video_size, Sequence) and video_size and all(isinstance(size, Sequence) for size in video_size)
    sizes = video_size if several else [video_size]
    for size in sizes:
        sides = size if isinstance(size, Sequence) else ()
        if len(sides) != 2 or not all(type(side) is int and side > 0 and side % SPACE_FACTOR == 0 for side in sides):
            raise UserError(
                f"data: video_size: got {video_size}; expected [height, width] or a list of such, in multiples of "
                f"{SPACE_FACTOR} pixels"
            )
    return [tuple(size) for size in sizes]
