"""Read the size of an image from its header."""

from pathlib import Path
from typing import BinaryIO

ORIENTATION = 0x0112  # EXIF tag
TURNED = (5, 6, 7, 8)  # its values for images that are stored rotated by 90 degrees


def image_size(file: str | Path | BinaryIO) -> tuple[int, int]:
    """Return the (height, width) of an image in pixels, after its EXIF rotation.

    Raises:
        Exception: the image is missing or damaged; Pillow's decoders raise many kinds.
    """
    from PIL import Image

    with Image.open(file) as image:
        width, height = image.size
        turned = image.getexif().get(ORIENTATION, 1) in TURNED
    return (width, height) if turned else (height, width)
