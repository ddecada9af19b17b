"""Process a tensor in overlapping tiles of its height and width, and blend the results."""

from collections.abc import Callable
from dataclasses import astuple, dataclass

import torch
from torch import Tensor

OVERLAP = 0.25
"""The least share of a tile's side that overlaps with its neighbour."""


@dataclass(frozen=True)
class Tile:
    """Rows [top, top + height) and columns [left, left + width)."""

    top: int
    left: int
    height: int
    width: int

    def of(self, x: Tensor) -> Tensor:
        """Return this part of `x` (..., height, width), a view."""
        return x[..., self.top : self.top + self.height, self.left : self.left + self.width]

    def __mul__(self, factor: int) -> "Tile":
        """Return the same part of an image that is `factor` times as large."""
        return Tile(*(factor * each for each in astuple(self)))


def cover(height: int, width: int, size: int) -> list[Tile]:
    """Return tiles of `size` x `size` that cover the image, evenly spread.

    A side no longer than `size` is not cut.
    """
    rows, columns = _starts(height, size), _starts(width, size)
    return [Tile(top, left, min(size, height), min(size, width)) for top in rows for left in columns]


def process(grid: list[Tile], x: Tensor, operation: Callable[[int, Tensor], Tensor], factor: tuple[int, int]) -> Tensor:
    """Apply `operation` to each tile, and blend the results.

    `operation` takes the index of the tile and its part of `x`. The image is `factor[0]` times as large as the grid in
    `x`, and `factor[1]` times as large in the results. The result in an overlap is the mean of the tiles, with weights
    that fall linearly towards the edges of a tile.
    """
    if len(grid) == 1:
        return operation(0, x)
    places = [tile * factor[1] for tile in grid]
    height = max(place.top + place.height for place in places)
    width = max(place.left + place.width for place in places)
    weight = _pyramid(places[0], x.device)
    total_weight = torch.zeros((height, width), device=x.device)
    for place in places:
        place.of(total_weight).add_(weight)
    blended = None
    for index, (tile, place) in enumerate(zip(grid, places, strict=True)):
        y = operation(index, (tile * factor[0]).of(x))
        if blended is None:
            blended = y.new_zeros((*y.shape[:-2], height, width))
        place.of(blended).add_(y * (weight / place.of(total_weight)).to(y.dtype))
    return blended


def _starts(length: int, size: int) -> list[int]:
    if length <= size:
        return [0]
    step = size - int(size * OVERLAP)
    gaps = -(-(length - size) // step)
    return [round(index * (length - size) / gaps) for index in range(gaps + 1)]


def _pyramid(tile: Tile, device: torch.device) -> Tensor:
    """Return weights (height, width), float32, that rise from each edge over the overlap."""

    def ramp(length: int) -> Tensor:
        position = torch.arange(length, device=device, dtype=torch.float32) + 0.5
        return torch.minimum(position, length - position).clamp_max(max(1.0, length * OVERLAP))

    return ramp(tile.height)[:, None] * ramp(tile.width)
