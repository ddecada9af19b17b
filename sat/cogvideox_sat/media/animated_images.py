"""Read animated GIF, WebP and PNG files as videos, with Pillow."""

import os
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, BinaryIO, Self

import numpy as np
from PIL import Image, ImageOps

from cogvideox_sat.media.frame_times import nearest_in_order
from cogvideox_sat.media.image_inputs import to_rgb
from cogvideox_sat.media.video_facts import DAMAGED, NOT_A_VIDEO, UnreadableClip, VideoFacts

SHORTEST = 10  # milliseconds; browsers show frames of this duration or less for `USUAL`
USUAL = 100  # milliseconds


class Animation:
    """Image file as a `media.video_reading.Video`; an image without animation has one frame."""

    def __init__(self, file: str | os.PathLike[str] | BinaryIO):
        self._owns_file = isinstance(file, str | os.PathLike)
        try:
            self._image = Image.open(file)
        except OSError as error:
            # Without a number, it is an error of Pillow about the content.
            reason = error.strerror if error.errno else None
            raise UnreadableClip(reason or NOT_A_VIDEO) from error
        except Exception as error:  # Pillow's decoders raise many kinds
            raise UnreadableClip(NOT_A_VIDEO) from error

    @cached_property
    def facts(self) -> VideoFacts:
        frames = [(time, frame.size) for time, frame in self._frames()]
        time, (width, height) = frames[-1]
        return VideoFacts(width, height, len(frames), time)

    def frames_at(self, times: Sequence[float] | np.ndarray, beyond: float | None = None) -> Iterator[np.ndarray]:
        if beyond is not None and len(times) and times[-1] > self.facts.seconds + beyond:
            raise UnreadableClip(f"it ends after {self.facts.seconds:.2f} s, before {times[-1]:.2f} s")
        yield from nearest_in_order(self._frames(), times, np.array)

    def all_frames(self) -> Iterator[np.ndarray]:
        for _, frame in self._frames():
            yield np.array(frame)  # a copy, since PyTorch warns about read-only arrays

    def close(self) -> None:
        if self._owns_file:
            self._image.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    def _frames(self) -> Iterator[tuple[float, Image.Image]]:
        """Yield the time and the image of every frame; transparent areas become white."""
        milliseconds = 0
        try:
            # The default image of a PNG, which is shown without animation, need not be a frame of the animation.
            count = getattr(self._image, "n_frames", 1)
            first = 1 if count > 1 and getattr(self._image, "default_image", False) else 0
            for number in range(first, count):
                self._image.seek(number)
                self._image.load()
                yield milliseconds / 1000, to_rgb(ImageOps.exif_transpose(self._image))
                duration = self._image.info.get("duration") or 0
                milliseconds += duration if duration > SHORTEST else USUAL
        except Exception as error:  # Pillow's decoders raise many kinds
            raise UnreadableClip(DAMAGED) from error
