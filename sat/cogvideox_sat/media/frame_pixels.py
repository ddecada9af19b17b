"""Convert a decoded frame to the image that a player shows.

The image has the right colours, is upright, has square pixels and standard dynamic range.
"""

import struct
from fractions import Fraction
from typing import Any

import numpy as np
from av import VideoFrame
from av.sidedata.sidedata import Type
from av.video.reformatter import ColorRange, ColorTrc, Interpolation, VideoReformatter

from cogvideox_sat.media.tone_mapping import ToneMap

UNSPECIFIED, BT709, BT601 = 2, 1, 5  # colour matrices, as numbered in H.273
LARGEST_SD = (1279, 576)  # width and height; players assume BT.709 for larger videos that name no matrix
STRANGEST_PIXEL = 10  # largest ratio of a pixel's sides; players ignore larger ones as mistakes
# Formats that swscale converts fast, with errors of at most 3 of 255, in limited range.
FAST_FORMATS = frozenset({"yuv420p", "yuv422p"})
FAST = Interpolation.BICUBIC
ACCURATE = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT
HDR = frozenset({ColorTrc.SMPTE2084, ColorTrc.ARIB_STD_B67})


class FramePixels:
    """Converter of the frames of one stream.

    Args:
        pixel_shape: width of a pixel divided by its height; None: not known.
        threads: number of threads; 0: as many as there are cores.
    """

    def __init__(self, pixel_shape: Fraction | None, threads: int):
        if not pixel_shape or not 1 / STRANGEST_PIXEL <= pixel_shape <= STRANGEST_PIXEL:
            pixel_shape = Fraction(1)
        self.pixel_shape = pixel_shape
        self.threads = threads
        self._reformatter = VideoReformatter()
        self._tone_map: ToneMap | None = None

    def size(self, frame: VideoFrame) -> tuple[int, int]:
        """Return the (width, height) of the image that a frame becomes."""
        width, height = self._square(frame)
        return (height, width) if _orientation(frame)[0] else (width, height)

    def convert(self, frame: VideoFrame) -> np.ndarray:
        """Return the image of a frame: (height, width, 3), uint8, RGB.

        Pixels that are not square are enlarged in one direction, transparent areas become white, and high dynamic range
        is mapped to standard dynamic range.
        """
        size = self._square(frame)
        if frame.color_trc in HDR:
            if self._tone_map is None or self._tone_map.transfer != frame.color_trc:
                self._tone_map = ToneMap(frame.color_trc)
            pixels = self._tone_map.apply(self._reformat(frame, size, "rgb48le", ACCURATE))
        elif frame.format.has_palette or any(component.is_alpha for component in frame.format.components):
            pixels = _on_white(self._reformat(frame, size, "rgba", ACCURATE))
        else:
            pixels = self._reformat(frame, size, "rgb24", FAST if self._is_fast(frame, size) else ACCURATE)
        return _oriented(pixels, *_orientation(frame))

    def _square(self, frame: VideoFrame) -> tuple[int, int]:
        """Return width and height in square pixels before rotation; neither becomes smaller."""
        if self.pixel_shape >= 1:
            return round(frame.width * self.pixel_shape), frame.height
        return frame.width, round(frame.height / self.pixel_shape)

    def _is_fast(self, frame: VideoFrame, size: tuple[int, int]) -> bool:
        limited = frame.color_range != ColorRange.JPEG
        return limited and frame.format.name in FAST_FORMATS and size == (frame.width, frame.height)

    def _reformat(self, frame: VideoFrame, size: tuple[int, int], pixel_format: str, way: Interpolation) -> np.ndarray:
        matrix = None
        if frame.colorspace == UNSPECIFIED and not frame.format.is_rgb:
            matrix = BT709 if frame.width > LARGEST_SD[0] or frame.height > LARGEST_SD[1] else BT601
        settings: dict[str, Any] = {"src_colorspace": matrix, "dst_color_range": ColorRange.JPEG}
        reformatted = self._reformatter.reformat(
            frame, *size, pixel_format, interpolation=way, threads=self.threads, **settings
        )
        return reformatted.to_ndarray()


def _orientation(frame: VideoFrame) -> tuple[bool, bool, bool]:
    """Return whether to transpose a frame, then mirror it horizontally, and vertically.

    Angles that are not multiples of 90 degrees, which no camera writes, are rounded to the nearest multiple.
    """
    matrix = frame.side_data.get(Type.DISPLAYMATRIX)  # type: ignore[call-overload]  # PyAV's types lack this one
    if matrix is None:
        return False, False, False
    a, b, _, c, d, *_ = struct.unpack("=9i", bytes(matrix))  # the point (x, y) goes to (a x + c y, b x + d y)
    if abs(a) + abs(d) >= abs(b) + abs(c):
        return False, a < 0, d < 0
    return True, c < 0, b < 0


def _oriented(pixels: np.ndarray, transposed: bool, mirrored: bool, upside_down: bool) -> np.ndarray:
    if transposed:
        pixels = pixels.transpose(1, 0, 2)
    if mirrored:
        pixels = pixels[:, ::-1]
    if upside_down:
        pixels = pixels[::-1]
    return np.ascontiguousarray(pixels)


def _on_white(pixels: np.ndarray) -> np.ndarray:
    """Return RGBA pixels (h, w, 4) on a white background: (h, w, 3), uint8."""
    colour, alpha = pixels[..., :3], pixels[..., 3:]
    if alpha.min() == 255:
        return colour
    share = alpha.astype(np.float32) / 255
    return np.rint(colour * share + 255 * (1 - share)).astype(np.uint8)
