"""Recognise what a video of moving shapes shows: the inverse of `shapes.drawing`.

Only the pixels are used. The video is compared with what `drawing` would draw: first with every background; then, where
it differs from the best background, with every shape of the same area at the same position. The path and growth of the
shape tell the motion. Blurred edges and colours that are wrong by a tenth are tolerated. What resembles nothing is
called "none".
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cogvideox_sat.shapes.drawing import GROWTH, distance, pattern_mask, shade
from cogvideox_sat.shapes.scenes import COLOURS, PATTERNS, PLAIN, SIZES, Item, Scene

NONE = "none"  # the answer if nothing fits
SHORTER_SIDE = 64  # pixels; other videos are scaled to this size

LEAST_GROUND = 0.4  # smallest share of a video's pixels that resemble its background
UNLIKE = 0.25  # smallest distance in [0, 1]^3 of a shape's colour from the background
CAP = 0.25  # largest distance that counts for a background; farther pixels belong to shapes of any colour
LEAST_AREA = 12  # smallest number of pixels of a shape in a frame
EDGE_SHARE = 0.6  # smallest share of a colour's pixels within two pixels of another colour, of which it may be the edge
ASIDE = 0.45  # largest distance of a mixture of two colours from the straight line between them
WORST_FIT = 0.35  # largest difference from the best outline, as a share of the shape's area
STILL = 3.0  # pixels; a shape that moves less stands still
CHANGED = 1.4  # factor; a radius that changes less is constant
WORST_WAY = 0.35  # largest share of the path's variance that the best motion may leave unexplained


class Track(NamedTuple):
    """The path of a shape, in the frames in which it is seen.

    Args:
        moments: (n,), time since the start of the video, in clips.
        rows, columns: (n,), centre of the shape in pixels.
        areas: (n,) in pixels.
    """

    moments: Tensor
    rows: Tensor
    columns: Tensor
    areas: Tensor


def judge(frames: Tensor, clips: float = 1.0) -> Scene:
    """Return the scene that a video shows.

    Args:
        frames: (t, 3, h, w) in [-1, 1].
        clips: length of the video in clips; a motion runs once in the time of a clip.

    Returns:
        The background, and two, one or no items, the larger one first. "none" replaces what is not recognised. Phases,
        offsets and the layout are not determined.
    """
    pixels = _resized((frames.float().clamp(-1, 1) + 1) / 2)
    background, pattern, ground = find_background(pixels)
    if (_distances(pixels, ground) < CAP).float().mean() < LEAST_GROUND:
        return Scene((), NONE, NONE)
    layers = find_layers(pixels, ground, background)
    items = tuple(_find_item(colour, cover, clips) for colour, cover in layers)
    return Scene(items, background, pattern)


def _resized(pixels: Tensor) -> Tensor:
    """Return pixels (t, 3, h, w) in [0, 1], scaled to `SHORTER_SIDE`."""
    scale = SHORTER_SIDE / min(pixels.shape[-2:])
    if scale == 1:
        return pixels
    size = [round(side * scale) for side in pixels.shape[-2:]]
    return F.interpolate(pixels, size=size, mode="bilinear", antialias=True).clamp(0, 1)


# ---------------------------------------------------------------------------------------------------------------------
# Background
# ---------------------------------------------------------------------------------------------------------------------


def find_background(pixels: Tensor) -> tuple[str, str, Tensor]:
    """Return the background's colour, pattern and picture, in the video's own colours.

    Args:
        pixels: (t, 3, h, w) in [0, 1].

    Returns:
        The picture has the shape (3, h, w).
    """
    masks = {pattern: pattern_mask(pattern, *pixels.shape[-2:]) for pattern in (PLAIN, *PATTERNS)}
    pictures = {(colour, pattern): _ground(colour, mask) for colour in COLOURS for pattern, mask in masks.items()}
    errors = {key: _error(pixels, picture) for key, picture in pictures.items()}
    colour, _ = min(errors, key=errors.__getitem__)
    # If the video's colours are wrong by up to half a pattern's contrast, only the shifted pictures show the pattern.
    everywhere = torch.ones_like(masks[PLAIN], dtype=torch.bool)
    shifted = {name: pictures[colour, name] + _shift(pixels, pictures[colour, name], everywhere) for name in masks}
    pattern = min(shifted, key=lambda name: _error(pixels, shifted[name]))
    mask, picture = masks[pattern], shifted[pattern]
    first, second = (_shift(pixels, picture, part) for part in (mask <= 0.5, mask > 0.5))
    return colour, pattern, picture + first + mask * (second - first)


def _ground(colour: str, mask: Tensor) -> Tensor:
    """Return the picture (3, h, w) of a background, from its colour and its pattern's mask."""
    first, second = (torch.tensor(values)[:, None, None] for values in (COLOURS[colour], shade(colour)))
    return first + mask * (second - first)


def _error(pixels: Tensor, picture: Tensor) -> float:
    """Return the mean squared colour distance of a video from a picture, each at most `CAP`."""
    return _distances(pixels, picture).square().clamp(max=CAP**2).mean().item()


def _shift(pixels: Tensor, picture: Tensor, where: Tensor) -> Tensor:
    """Return the mean colour difference (3, 1, 1) from a picture, within a mask.

    The mask is (h, w) or (t, h, w). Only pixels that resemble the picture count.
    """
    off = (pixels - picture).movedim(1, -1)[(_distances(pixels, picture) < CAP) & where]
    return off.median(dim=0).values[:, None, None] if len(off) else torch.zeros(3, 1, 1)


def _distances(pixels: Tensor, colours: Tensor) -> Tensor:
    """Return the Euclidean colour distances (t, h, w) of a video from a picture or a colour."""
    return (pixels - colours).square().sum(dim=1).sqrt()


# ---------------------------------------------------------------------------------------------------------------------
# Shapes apart from the background
# ---------------------------------------------------------------------------------------------------------------------


def find_layers(pixels: Tensor, ground: Tensor, background: str) -> list[tuple[str, Tensor]]:
    """Return the colour and coverage (t, h, w) in [0, 1] of each shape, the larger one first."""
    names = [name for name in COLOURS if name != background]
    colours = torch.tensor([COLOURS[name] for name in names])
    nearest, label = torch.cdist(pixels.movedim(1, -1), colours).min(dim=-1)
    to_ground = _distances(pixels, ground)
    label[(nearest > to_ground) | (to_ground < UNLIKE)] = -1
    layers = []
    for _ in range(2):
        index = _main_colour([label == index for index in range(len(names))], colours, ground)
        if index is None:
            break
        mask = label == index
        colour = colours[index][:, None, None]
        cover = _cover(pixels, ground, colour + _shift(pixels, colour, mask))
        piece = _largest_piece(cover * _widened(mask))
        layers.append((names[index], piece))
        label[_widened(piece > 0.3)] = -1
    return layers


def _main_colour(masks: list[Tensor], colours: Tensor, ground: Tensor) -> int | None:
    """Return the index of the mask (t, h, w) of the largest shape.

    None: no mask has a shape in at least half of the frames.
    """
    # The edges of a shape have mixed colours, which may look like a third colour. Therefore its inner part counts.
    weights = [(_inner(mask).sum() + 0.1 * mask.sum()).item() for mask in masks]
    often = [2 * (mask.sum(dim=(1, 2)) >= LEAST_AREA).sum().item() >= len(mask) for mask in masks]
    order = sorted((index for index in range(len(masks)) if often[index]), key=lambda index: -weights[index])
    if len(order) < 2:
        return order[0] if order else None
    one, other = order[:2]
    if max(_beside(masks[one], masks[other]), _beside(masks[other], masks[one])) < EDGE_SHARE:
        return one
    # Check whether the colour nearer to the background is an edge of the other: a mixture with the background's colour.
    middle = ground.mean(dim=(1, 2))
    nearer, farther = sorted((one, other), key=lambda index: (colours[index] - middle).norm().item())
    way, partway = colours[farther] - middle, colours[nearer] - middle
    aside = partway - (partway @ way) / (way @ way) * way
    return farther if aside.norm() < ASIDE else one


def _beside(mask: Tensor, other: Tensor) -> float:
    """Return the share of a mask's pixels (t, h, w) within two pixels of another mask."""
    return ((mask & _widened(other)).sum() / mask.sum()).item()


def _widened(mask: Tensor) -> Tensor:
    """Return a mask (t, h, w) extended by two pixels."""
    return F.max_pool2d(mask.float(), 5, stride=1, padding=2) > 0


def _inner(mask: Tensor) -> Tensor:
    """Return the pixels (t, h, w) whose neighbours are in the mask, too."""
    return -F.max_pool2d(-mask.float(), 3, stride=1, padding=1) > 0


def _cover(pixels: Tensor, ground: Tensor, colour: Tensor) -> Tensor:
    """Return the position (t, h, w) of each pixel between the background, 0, and a colour, 1.

    Args:
        colour: (3, 1, 1).
    """
    way = colour - ground
    return (((pixels - ground) * way).sum(dim=1) / way.square().sum(dim=0).clamp(min=1e-6)).clamp(0, 1)


def _largest_piece(cover: Tensor) -> Tensor:
    """Return the coverage without pieces that are not connected to its most solid spot."""
    mask = (cover > 0.5).float()
    solid = F.avg_pool2d(cover, 5, stride=1, padding=2) * mask
    piece = (solid == solid.amax(dim=(1, 2), keepdim=True)).float() * mask
    for _ in range(sum(cover.shape[1:])):
        grown = F.max_pool2d(piece, 3, stride=1, padding=1) * mask
        if torch.equal(grown, piece):
            break
        piece = grown
    return cover * _widened(piece)


# ---------------------------------------------------------------------------------------------------------------------
# Outline, size and motion
# ---------------------------------------------------------------------------------------------------------------------


def _find_item(colour: str, cover: Tensor, clips: float) -> Item:
    """Return the item of a colour, by its coverage (t, h, w) in [0, 1].

    Args:
        clips: see `judge`.
    """
    areas = cover.sum(dim=(1, 2))
    seen = areas >= LEAST_AREA
    if 2 * seen.sum() < len(seen):
        return Item(NONE, colour, NONE, NONE)
    cover, areas = cover[seen], areas[seen]
    rows, columns = _grid(cover)
    moments = torch.linspace(0, clips, len(seen))[seen]
    down, right = ((cover * place).sum(dim=(1, 2)) / areas for place in (rows, columns))
    track = Track(moments, down, right, areas)
    shape = find_shape(cover, track)
    motion = find_motion(track) if len(moments) > 1 else NONE
    size = NONE
    if shape != NONE:
        radius = (areas / _unit_areas()[shape]).sqrt()
        middling = radius.mean() / (sum(GROWTH) / 2) if motion in ("growing", "shrinking") else radius.median()
        parts = middling.item() / min(cover.shape[1:])
        size = min(SIZES, key=lambda name: abs(math.log(SIZES[name] / parts)))
    return Item(size, colour, shape, motion)


def _grid(cover: Tensor) -> tuple[Tensor, Tensor]:
    """Return the rows (h, 1) and columns (w,) of the middles of pixels."""
    return torch.arange(cover.shape[-2])[:, None] + 0.5, torch.arange(cover.shape[-1]) + 0.5


def find_shape(cover: Tensor, track: Track) -> str:
    """Return the shape that differs least from the coverage (t, h, w).

    The shapes are compared at equal area and position.
    """
    rows, columns = _grid(cover)
    down, right = rows - track.rows[:, None, None], columns - track.columns[:, None, None]
    fits = {}
    for shape, unit_area in _unit_areas().items():
        radius = (track.areas / unit_area).sqrt()[:, None, None]
        drawn = (0.5 - distance(shape, down, right, radius)).clamp(0, 1)
        # Blurred slightly: videos store colours at half the resolution, so that their edges are never sharp.
        off = F.avg_pool2d(drawn - cover, 3, stride=1, padding=1).abs().sum(dim=(1, 2))
        fits[shape] = (off / track.areas).median().item()
    best = min(fits, key=fits.__getitem__)
    return best if fits[best] < WORST_FIT else NONE


def _unit_areas() -> dict[str, float]:
    """Return the area of each shape with radius 1."""
    return {
        "circle": math.pi,
        "square": 1.6**2,
        "triangle": 0.75 * math.sqrt(3),
        "ring": 0.75 * math.pi,
        "cross": 2 * 2 * 0.6 - 0.6**2,
        "star": 5 * 0.42 * math.sin(math.pi / 5),
    }


def find_motion(track: Track) -> str:
    """Return the motion that explains a track best, or "none"."""
    radius = track.areas.sqrt()
    start, slope = _line(track.moments, radius)
    first, last = max(start, 0.1), max(start + slope, 0.1)
    if max(last / first, first / last) > CHANGED:
        return "growing" if slope > 0 else "shrinking"
    if max((place.max() - place.min()).item() for place in (track.rows, track.columns)) < STILL:
        return "standing still"
    angle = 2 * math.pi * track.moments
    ways = torch.stack([track.rows, track.columns])
    ways = ways - ways.mean(dim=1, keepdim=True)
    # The path of each motion, down and right, up to a factor; for a circle and a spiral, in both directions.
    sine, cosine, still = angle.sin(), angle.cos(), torch.zeros_like(angle)
    rounds = {
        "clockwise": [torch.stack([sine, cosine]), torch.stack([cosine, -sine])],
        "anticlockwise": [torch.stack([-sine, cosine]), torch.stack([cosine, sine])],
    }
    models = {
        "right": [torch.stack([still, track.moments])],
        "down": [torch.stack([track.moments, still])],
        "bouncing": [torch.stack([-(angle / 2).cos().abs(), still])],
        "bouncing, from the ground": [torch.stack([-(angle / 2).sin().abs(), still])],
        **{f"circle {sense}": parts for sense, parts in rounds.items()},
        **{f"spiral {sense}": [track.moments * part for part in parts] for sense, parts in rounds.items()},
    }
    left, factors = {}, {}
    for name, parts in models.items():
        basis = torch.stack([(part - part.mean(dim=1, keepdim=True)).flatten() for part in parts], dim=1)
        factors[name] = torch.linalg.lstsq(basis, ways.flatten()[:, None]).solution
        left[name] = ((basis @ factors[name])[:, 0] - ways.flatten()).square().sum() / ways.square().sum()
    best = min(left, key=left.__getitem__)
    if left[best] > WORST_WAY:
        return NONE
    forward = bool(factors[best][0] > 0)
    if best == "right":
        return "moving right" if forward else "moving left"
    if best == "down":
        return "moving down" if forward else "moving up"
    if best.startswith("bouncing"):
        return "bouncing" if forward else NONE
    return "moving in a spiral" if best.startswith("spiral") else "moving in a circle"


def _line(moments: Tensor, values: Tensor) -> tuple[float, float]:
    """Return (value at 0, slope) of the straight line through the values."""
    away = moments - moments.mean()
    slope = ((away * values).sum() / away.square().sum()).item()
    return values.mean().item() - slope * moments.mean().item(), slope
