"""Processing a tensor in overlapping tiles of its height and width, blended where they meet."""

from collections.abc import Callable
from dataclasses import astuple, dataclass

import torch
from torch import Tensor

OVERLAP = 0.25
"""The part of a tile, along each side, that it at least shares with its neighbour."""


@dataclass(frozen=True)
class Tile:
    """Rows [top, top + height) and columns [left, left + width)."""

    top: int
    left: int
    height: int
    width: int

    def of(self, x: Tensor) -> Tensor:
        """This part (view) of `x` (..., height, width)."""
        return x[..., self.top : self.top + self.height, self.left : self.left + self.width]

    def __mul__(self, factor: int) -> "Tile":
        """The same part of an image that is `factor` times as large."""
        return Tile(*(factor * each for each in astuple(self)))


def cover(height: int, width: int, size: int) -> list[Tile]:
    """Tiles of `size` x `size` that cover the image, evenly spread. A side no longer than `size` is not cut."""
    rows, columns = _starts(height, size), _starts(width, size)
    return [Tile(top, left, min(size, height), min(size, width)) for top in rows for left in columns]


def process(grid: list[Tile], x: Tensor, operation: Callable[[int, Tensor], Tensor], factor: tuple[int, int]) -> Tensor:
    """Apply `operation` (index of the tile, its part of `x`) to each tile, and blend the results.

    The image is `factor[0]` times as large as the grid in `x`, and `factor[1]` times as large in the results. Where
    tiles overlap, the result is their mean, with weights that fall linearly towards the edges of a tile.
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
    """(height, width) float32: rises from each edge over the width of the overlap, flat in the middle."""

    def ramp(length: int) -> Tensor:
        position = torch.arange(length, device=device, dtype=torch.float32) + 0.5
        return torch.minimum(position, length - position).clamp_max(max(1.0, length * OVERLAP))

    return ramp(tile.height)[:, None] * ramp(tile.width)
