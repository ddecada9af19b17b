"""Compute the size of a video that starts from an image, and the share that is cropped.

Nothing here imports PyTorch.
"""

import logging
from pathlib import Path

from cogvideox_sat.configuration.model_limits import ModelLimits
from cogvideox_sat.files.image_size import image_size
from cogvideox_sat.latent_geometry import SPACE_FACTOR

logger = logging.getLogger(__name__)

SHORT_SIDE = 768  # pixels of the short side of a video whose size follows from its image
LARGEST_LOSS = 1 / 3  # share of an image; if a crop removes more, there is a warning


def size_of_image(path: str | Path) -> tuple[int, int] | None:
    """Return the (height, width) of an image in pixels; None if it cannot be read.

    The size is that of the image after the rotation that its EXIF orientation asks for.
    """
    try:
        return image_size(path)
    except Exception:  # Pillow's decoders raise many kinds; the error is reported when the image is loaded
        return None


def size_from_image(image: tuple[int, int], limits: ModelLimits) -> tuple[int, int]:
    """Return the (height, width) of the video that starts from an image of the size `image`.

    The short side has 768 pixels. The long side keeps the image's shape, rounded to the nearest multiple that the model
    takes, up to the model's largest. If the model is too small for 768 pixels, the whole image is scaled down to fit.

    Args:
        image: (height, width) in pixels.
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
    """Return the share of an image that is lost when it is scaled and cropped to `size`.

    Args:
        image, size: (height, width) in pixels.
    """
    shape, target = image[1] / image[0], size[1] / size[0]
    return 1 - min(shape, target) / max(shape, target)


def warn_if_cropped(name: str, image: tuple[int, int], size: tuple[int, int], advice: str) -> None:
    """Warn if fitting an image to `size` removes more than a third of it.

    Args:
        name: the image in the message.
        image, size: (height, width) in pixels.
        advice: the end of the message.
    """
    lost = share_cut_away(image, size)
    if lost > LARGEST_LOSS:
        logger.warning(
            "%s: %.0f %% of the picture is cut away: it has %dx%d pixels (height x width), the video %dx%d; %s",
            *(name, 100 * lost, *image, *size, advice),
        )
