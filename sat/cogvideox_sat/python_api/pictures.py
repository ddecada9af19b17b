"""Pictures and clips of a call that are not files: arrays, tensors, Pillow's pictures."""

from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from cogvideox_sat.clips.transforms import cover
from cogvideox_sat.media.image_inputs import fitted_image, to_rgb
from cogvideox_sat.sampling.requests import PixelSource
from sgm.errors import UserError, shown


def fitted(picture: Image.Image | Tensor, size: tuple[int, int]) -> PixelSource:
    """Return a picture for a request of `size` (height, width); tensors already have it."""
    return picture if isinstance(picture, Tensor) else partial(fitted_image, picture, size)


def input_clip(video: Any, where: str) -> np.ndarray | Tensor:
    """Return a clip that is not a file: an array (t, h, w, 3) of uint8, or a tensor.

    Raises:
        UserError: the clip is something else.
    """
    if isinstance(video, Tensor):
        return video
    if isinstance(video, np.ndarray) and video.dtype == np.uint8 and video.ndim == 4 and video.shape[3] == 3:
        return video
    what = f"an array of {video.dtype} {video.shape}" if isinstance(video, np.ndarray) else shown(video)
    raise UserError(f"{where}: got {what}; give a path, an array (frames, height, width, 3) of uint8, or a tensor")


def fitted_clip(clip: np.ndarray | Tensor, size: tuple[int, int]) -> Tensor:
    """Return a clip (t, 3, height, width) in [-1, 1], scaled and cropped to `size`.

    A tensor is returned unchanged.
    """
    if isinstance(clip, Tensor):
        return clip
    frames = torch.from_numpy(np.ascontiguousarray(clip)).permute(0, 3, 1, 2)
    return cover(frames, *size).float() / 127.5 - 1.0


def first_frame(image: Any, where: str) -> Image.Image | Tensor:
    """Return a first frame that is not a file: a picture in RGB, or an unchanged tensor.

    Raises:
        UserError: the image is something else.
    """
    if isinstance(image, Tensor):
        return image
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] not in (3, 4):
            raise UserError(f"{where} is an array of {image.dtype} {image.shape}; give uint8 of (height, width, 3)")
        image = Image.fromarray(image)
    if isinstance(image, Image.Image):
        return to_rgb(ImageOps.exif_transpose(image))
    raise UserError(f"{where}: got {shown(image)}; give a path, a picture, an array or a tensor")
