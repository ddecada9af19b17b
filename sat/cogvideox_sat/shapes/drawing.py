"""Draw scenes of moving shapes: positions over time, outlines and background."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from cogvideox_sat.shapes.scenes import COLOURS, LAYOUTS, PLAIN, SIZES, Item, Scene

GROWTH = (0.55, 1.3)  # radius of a growing shape at the start and at the end, relative to the radius of its size
# Largest distance of a path, down and right, from its middle, relative to the shorter side.
REACH = {
    "moving left": (0, 0.14),
    "moving right": (0, 0.14),
    "moving up": (0.14, 0),
    "moving down": (0.14, 0),
    "moving in a circle": (0.13, 0.13),
    "moving in a spiral": (0.16, 0.16),
    "bouncing": (0.14, 0),
}
SHADE = 0.65  # factor from the background's colour to the pattern's colour
LIGHT_BLACK = 0.3  # the pattern's colour for black, for which no darker colour exists


def draw(scene: Scene, frames: int, height: int, width: int, begin: float = 0.0) -> Tensor:
    """Return the clip (frames, 3, height, width) in [-1, 1], with antialiased edges.

    Args:
        begin: the time at which the clip begins; a clip that begins at 0.5 continues from the middle of one that begins
            at 0.
    """
    return draw_moments(scene, (begin + torch.linspace(0, 1, frames)).tolist(), height, width)


def draw_moments(scene: Scene, moments: Sequence[float], height: int, width: int) -> Tensor:
    """Return the frames (moments, 3, height, width) in [-1, 1] at the given times.

    Time 0 is the start of the clip and 1 its end. After time 1, all motions continue, so that a shape with a straight
    path leaves the picture.
    """
    picture = draw_background(scene.background, scene.pattern, height, width)
    for item, place in zip(scene.items, LAYOUTS[scene.layout], strict=True):
        inside = coverage(item, place, moments, height, width)[:, None]
        picture = picture + inside * (torch.tensor(COLOURS[item.colour])[:, None, None] - picture)
    if picture.dim() == 3:
        picture = picture.expand(len(moments), -1, -1, -1)
    return picture * 2 - 1


# ---------------------------------------------------------------------------------------------------------------------
# Background
# ---------------------------------------------------------------------------------------------------------------------


def draw_background(colour: str, pattern: str, height: int, width: int) -> Tensor:
    """Return the background (3, height, width) in [0, 1]."""
    base, other = torch.tensor(COLOURS[colour]), torch.tensor(shade(colour))
    share = pattern_mask(pattern, height, width)
    return base[:, None, None] + share * (other - base)[:, None, None]


def shade(colour: str) -> tuple[float, ...]:
    """Return the second colour of a pattern: red, green and blue in [0, 1]."""
    return (LIGHT_BLACK,) * 3 if colour == "black" else tuple(SHADE * part for part in COLOURS[colour])


def pattern_mask(pattern: str, height: int, width: int) -> Tensor:
    """Return the share (height, width) of the second colour in each pixel, in [0, 1].

    The period is a quarter of the shorter side.
    """
    cell = max(1, round(min(height, width) / 8))
    rows, columns = torch.arange(height), torch.arange(width)
    if pattern == PLAIN:
        return torch.zeros(height, width)
    if pattern == "striped":
        return (columns // cell % 2).float().expand(height, -1)
    if pattern == "checkered":
        return ((rows[:, None] // cell + columns // cell) % 2).float()
    # A dot fills every second cell of every second row of cells.
    down, right = (((side + 0.5) % (2 * cell) - cell / 2) for side in (rows[:, None], columns))
    return (cell / 2 + 0.5 - torch.hypot(down, right)).clamp(0, 1)


# ---------------------------------------------------------------------------------------------------------------------
# Shapes
# ---------------------------------------------------------------------------------------------------------------------


def coverage(item: Item, place: Sequence[float], moments: Sequence[float], height: int, width: int) -> Tensor:
    """Return the share (moments, height, width) of each pixel, in [0, 1], that a shape covers."""
    track = torch.tensor([position(item, place, moment, height, width) for moment in moments])
    row, column, radius = track.T[:, :, None, None]
    rows, columns = torch.arange(height)[:, None] + 0.5, torch.arange(width) + 0.5
    return (0.5 - distance(item.shape, rows - row, columns - column, radius)).clamp(0, 1)


def position(
    item: Item, place: Sequence[float], progress: float, height: int, width: int
) -> tuple[float, float, float]:
    """Return (row, column, radius) of the shape in pixels at the time `progress` in [0, 1].

    The shape does not leave its part of the picture before the end of the clip.
    """
    top, left, high, wide = (part * side for part, side in zip(place, (height, width) * 2, strict=True))
    shorter = min(height, width)
    size = SIZES[item.size] * shorter
    radius, largest = size, size
    if item.motion in ("growing", "shrinking"):
        grown = progress if item.motion == "growing" else 1 - progress
        largest = min(size * GROWTH[1], high / 2, wide / 2)
        radius = min(size * (GROWTH[0] + grown * (GROWTH[1] - GROWTH[0])), largest)
    room = (high / 2 - largest, wide / 2 - largest)
    reach = [min(part * shorter, free) for part, free in zip(REACH.get(item.motion, (0, 0)), room, strict=True)]
    if item.motion in ("moving in a circle", "moving in a spiral"):
        reach = [min(reach)] * 2
    down, right = (
        middle * (free - far) + way * far
        for middle, free, far, way in zip(_middle(item), room, reach, _way(item, progress), strict=True)
    )
    return top + high / 2 + down, left + wide / 2 + right, radius


def _middle(item: Item) -> tuple[float, float]:
    """Return the middle of the path, down and right, from -1 to 1 within the available room."""
    first, second = 2 * item.phase - 1, item.offset
    if item.motion in ("moving left", "moving right"):
        return second, first
    if item.motion == "moving in a circle":
        # The phase is the angle of the start. Its digits after the first one serve as a further random number.
        return 2 * (10 * item.phase % 1) - 1, second
    return first, second


def _way(item: Item, progress: float) -> tuple[float, float]:
    """Return the position on the path, down and right, each from -1 to 1."""
    if item.motion == "moving in a circle":
        angle = 2 * math.pi * (item.phase + progress)
        return math.sin(angle), math.cos(angle)
    if item.motion == "moving in a spiral":  # from the centre outwards, with one turn
        angle = 2 * math.pi * progress
        return progress * math.sin(angle), progress * math.cos(angle)
    if item.motion == "bouncing":  # slow at the top, like a falling object
        return 1 - 2 * abs(math.cos(math.pi * progress)), 0
    along = 2 * progress - 1
    ways = {"moving left": (0, -along), "moving right": (0, along), "moving up": (-along, 0), "moving down": (along, 0)}
    return ways.get(item.motion, (0, 0))


def distance(shape: str, down: Tensor, right: Tensor, radius: Tensor) -> Tensor:
    """Return the distance of pixels from the shape in pixels; negative inside.

    The value is exact only near the edge, where it is used.
    """
    if shape == "circle":
        return torch.hypot(down, right) - radius
    if shape == "ring":
        return (torch.hypot(down, right) - 0.75 * radius).abs() - 0.25 * radius
    down, right = (down, right.abs()) if shape in ("triangle", "star") else (down.abs(), right.abs())
    if shape == "square":
        return torch.maximum(down, right) - 0.8 * radius
    if shape == "cross":
        longer, shorter = torch.maximum(down, right), torch.minimum(down, right)
        return torch.maximum(longer - radius, shorter - 0.3 * radius)
    if shape == "triangle":  # equilateral, with a horizontal base: the largest of the distances from its three sides
        slanted = right * math.sin(math.pi / 3) - down * math.cos(math.pi / 3)
        return torch.maximum(down, slanted) - radius / 2
    return _star_distance(down, right, radius)


def _star_distance(down: Tensor, right: Tensor, radius: Tensor) -> Tensor:
    """Return the distance from a five-pointed star with a point at the top."""
    # Fold the plane into the tenth between a point and the notch beside it, where the outline is one straight line.
    angle = torch.atan2(right, -down).remainder(2 * math.pi / 5)
    angle = torch.minimum(angle, 2 * math.pi / 5 - angle)
    away = torch.hypot(down, right)
    along, beside = away * torch.cos(angle), away * torch.sin(angle)
    notch_along, notch_beside = 0.42 * math.cos(math.pi / 5), 0.42 * math.sin(math.pi / 5)
    length = math.hypot(1 - notch_along, notch_beside)
    return (notch_beside * (along - radius) + (1 - notch_along) * beside) / length
