"""Fit an image to the video that starts from it: the size that follows from it, and what a crop cuts away.

Nothing here imports PyTorch.
"""

import logging
from pathlib import Path

from cogvideox_sat.configuration.model_limits import ModelLimits
from cogvideox_sat.latent_geometry import SPACE_FACTOR

logger = logging.getLogger(__name__)

SHORT_SIDE = 768  # pixels, of videos whose size follows from their image
LARGEST_LOSS = 1 / 3  # of a picture, above which a crop is warned about


def size_of_image(path: str | Path) -> tuple[int, int] | None:
    """Return (height, width) of an image in pixels, turned as its EXIF orientation says; None if it is unreadable."""
    from PIL import Image

    try:
        with Image.open(path) as file:
            width, height = file.size
            turned = file.getexif().get(0x0112, 1) in (5, 6, 7, 8)  # by a quarter
    # Pillow's decoders report damaged files by whichever of these came up; the image is reported when it is loaded.
    except (OSError, SyntaxError, ValueError, EOFError, IndexError, Image.DecompressionBombError):
        return None
    return (width, height) if turned else (height, width)


def size_from_image(image: tuple[int, int], limits: ModelLimits) -> tuple[int, int]:
    """Return the (height, width) of the video that starts from an image of the size `image`.

    The short side is 768 pixels; the other keeps the image's shape, to the nearest multiple that the model takes, up to
    the model's largest. In a model too small for 768 pixels, the image is scaled to fit as a whole.
    """
    scale = SHORT_SIDE / min(image)
    largest_sides = [side * SPACE_FACTOR for side in limits.largest[1:]]
    if min(largest_sides) < SHORT_SIDE:
        scale = min(scale, *(side / pixels for side, pixels in zip(largest_sides, image, strict=True)))
    sides = []
    for pixels, patch, largest in zip(image, limits.patch[1:], limits.largest[1:], strict=True):
        step = SPACE_FACTOR * patch
        sides.append(min(max(round(pixels * scale / step), 1) * step, largest * SPACE_FACTOR // step * step))
    return sides[0], sides[1]


def share_cut_away(image: tuple[int, int], size: tuple[int, int]) -> float:
    """Return the share of a picture (height, width) that is lost when it is scaled to cover `size` and cut to it."""
    shape, target = image[1] / image[0], size[1] / size[0]
    return 1 - min(shape, target) / max(shape, target)


def warn_of_crop(name: str, image: tuple[int, int], size: tuple[int, int], advice: str) -> None:
    """Warn if more than a third of a picture is cut away to make it fit `size`."""
    lost = share_cut_away(image, size)
    if lost > LARGEST_LOSS:
        logger.warning(
            "%s: %.0f %% of the picture is cut away: it has %dx%d pixels (height x width), the video %dx%d; %s",
            *(name, 100 * lost, *image, *size, advice),
        )
