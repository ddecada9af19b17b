"""Load the image that an image-to-video model starts from, as a tensor."""

from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from cogvideox_sat.files.refusals import refusal
from sgm.errors import UserError, one_line


def load_condition_image(
    path: str | Path | BinaryIO, size: tuple[int, int], crop: tuple[float, float] = (0.5, 0.5)
) -> Tensor:
    """Return an image file as a first frame.

    The image is rotated as its EXIF orientation says, put on a white background where it is transparent, resized
    (antialiased bicubic, aspect ratio kept) to cover `size`, and cropped to it.

    Args:
        size: (height, width) in pixels.
        crop: position of the part that is kept, from left (0) to right (1) and from top to bottom; by default the
            middle.

    Returns:
        (3, height, width), float32 in [-1, 1], RGB.

    Raises:
        UserError: the file is missing, not an image, or damaged.
    """
    try:
        with Image.open(path) as file:
            image = to_rgb(ImageOps.exif_transpose(file))
    except FileNotFoundError as error:
        raise UserError(f"image {path} does not exist") from error
    except Exception as error:  # Pillow's decoders raise many kinds
        raise UserError(f"cannot read the image {path}: {_reason(error)}") from error
    return fitted_image(image, size, crop)


def _reason(error: Exception) -> str:
    """Return why an image cannot be read, and what to do."""
    if isinstance(error, OSError) and error.errno:
        return refusal(error)
    reason = "not an image" if isinstance(error, UnidentifiedImageError) else one_line(str(error), 200)
    return f"{reason}; save it again, as PNG or JPEG"


def fitted_image(image: Image.Image, size: tuple[int, int], crop: tuple[float, float] = (0.5, 0.5)) -> Tensor:
    """Return an RGB image as a first frame: float32 (3, height, width), from -1 to 1.

    Args:
        size, crop: see `load_condition_image`.
    """
    height, width = size
    pixels = np.array(ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC, centering=crop))
    return torch.from_numpy(pixels).permute(2, 0, 1).float() / 127.5 - 1.0


def to_rgb(image: Image.Image) -> Image.Image:
    """Return an image in RGB, 8 bits per channel, on white where it is transparent."""
    if image.mode.startswith("I"):  # 16 bits per pixel, which Pillow would clip at 255 instead of scaling
        image = Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")
