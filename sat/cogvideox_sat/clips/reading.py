"""Reading a clip: which source frames it consists of, at the wanted rate, and their pixels at the wanted size."""

import io
import math
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor

from cogvideox_sat.clips.attempts import decoding_threads
from cogvideox_sat.clips.sources import ClipSource
from cogvideox_sat.clips.transforms import CENTRED, Placement, cover
from cogvideox_sat.files.file_part import FilePart
from cogvideox_sat.latent_geometry import Bucket
from cogvideox_sat.media.frame_times import ROUNDING
from cogvideox_sat.media.image_inputs import load_condition_image
from cogvideox_sat.media.video_facts import UnreadableClip
from cogvideox_sat.media.video_reading import DEFAULT_BACKEND, open_video
from sgm.errors import UserError
from sgm.seeds import hashed_seed


class ClipInfo(NamedTuple):
    """What is known of a clip before it is read.

    Args:
        seconds: from the first frame to the last, so a mean frame lasts `seconds / (frames - 1)`.
    """

    width: int
    height: int
    frames: int
    seconds: float

    @property
    def frame_duration(self) -> float:
        return self.seconds / (self.frames - 1) if self.frames > 1 else 0.0


class Part(NamedTuple):
    """A part of the places where a clip may start, as shares of all places: clips of one source divide them."""

    begin: float = 0.0
    end: float = 1.0

    def within(self, starts: int) -> tuple[int, int]:
        """Return the first of `starts` places that belongs to the part, and the one after the last."""
        first = min(math.floor(self.begin * starts + ROUNDING), starts - 1)
        return first, max(math.floor(self.end * starts + ROUNDING), first + 1)


WHOLE = Part()


@dataclass(frozen=True)
class FrameSampling:
    """How a clip is cut out of a source, whatever the source's rate.

    Frame k of the clip is the source frame nearest in time to `start + k / fps`. The clip lies within the source
    without its first and last `skip_frames` frames (where cuts and fades are), or as many as a short source can spare.

    Args:
        fps: of the clip.
        max_frames: of the clip; a shorter source gives a shorter clip, nothing is padded.
        multiple: the VAE and the network take clips of `multiple * k + 1` frames: 4, or 8 for CogVideoX1.5.
        random_start: start at a random frame; otherwise at the first that may be used.
    """

    fps: float
    max_frames: int
    skip_frames: int = 0
    multiple: int = 4
    random_start: bool = True

    def window(self, info: ClipInfo) -> tuple[float, float]:
        """The times of the first and the last frame that may be used, in seconds from the source's first frame."""
        skipped = min(self.skip_frames, (info.frames - 1) // 2) * info.frame_duration
        return skipped, info.seconds - skipped

    def num_frames(self, info: ClipInfo) -> int:
        """Length of the clip."""
        # The last frame is still the nearest for half its duration.
        first, last = self.window(info)
        fit = math.floor((last - first + info.frame_duration / 2) * self.fps + ROUNDING) + 1
        frames = min(fit, self.max_frames)
        return frames - (frames - 1) % self.multiple

    def parts(self, info: ClipInfo, frames: int, most: int | None, stride: float | None) -> list[Part]:
        """Return the parts of a source in each of which one clip of `frames` starts.

        Args:
            most: clips of a source; None: without a stride one, else any number.
            stride: seconds from the begin of one part to that of the next; None: parts are equally long, and as many
                as clips fit in without overlapping.
        """
        first, last = self.window(info)
        duration = info.frame_duration
        slack = max(last - first + duration / 2 - (frames - 1) / self.fps, 0.0)
        starts = max(math.floor(slack / duration + ROUNDING) + 1, 1) if duration else 1
        if stride is None:
            count = min(most or 1, math.floor(slack * self.fps / frames + ROUNDING) + 1, starts)
            return [Part(i / count, (i + 1) / count) for i in range(count)]
        count = max(min(math.floor(slack / stride + ROUNDING) + 1, starts), 1)
        share = stride / duration / starts if duration else 1.0
        parts = [Part(i * share, (i + 1) * share if i + 1 < count else 1.0) for i in range(count)]
        return parts[:most]

    def times(self, info: ClipInfo, frames: int, seed: int, part: Part = WHOLE) -> np.ndarray:
        """Return when the frames of a clip of `frames` are, in seconds from the source's first frame."""
        first, last = self.window(info)
        duration = info.frame_duration
        slack = last - first + duration / 2 - (frames - 1) / self.fps
        starts = max(math.floor(slack / duration + ROUNDING) + 1, 1) if duration else 1
        start, end = part.within(starts)
        if self.random_start:
            start = random.Random(hashed_seed(seed, "clip start")).randrange(start, end)
        return first + start * duration + np.arange(frames) / self.fps


def probe(source: ClipSource) -> ClipInfo:
    """Return what a clip is; of a video in most containers only the beginning and the end are read.

    Raises:
        UnreadableClip: the file is missing, not a video, or cut off.
    """
    with _opened(source) as file:
        if source.is_image:
            return _probe_image(file)
        with open_video(file) as video:
            return ClipInfo(*video.facts)


def read_clip(
    source: ClipSource,
    bucket: Bucket,
    sampling: FrameSampling,
    seed: int,
    placement: Placement = CENTRED,
    part: Part = WHOLE,
    info: ClipInfo | None = None,
    backend: str = DEFAULT_BACKEND,
) -> Tensor:
    """Return the pixels of a clip: uint8 (frames, 3, height, width), RGB, in the bucket's shape, not contiguous.

    Args:
        placement: where frames are cropped, once they cover the size, see `clips.transforms.cover`.
        part: of the source, in which the clip starts.
        info: what `probe` found, so that it need not look again.
        backend: one of `media.video_reading.BACKENDS`, which decodes videos.

    Raises:
        UnreadableClip: the file is missing, damaged, or shorter than the bucket.
    """
    with _opened(source) as file:
        if source.is_image:
            return _read_image(file, bucket, placement)
        with open_video(file, threads=decoding_threads(), backend=backend) as video:
            info = info or ClipInfo(*video.facts)
            times = sampling.times(info, bucket.frames, seed, part)
            # By more than rounding: mean durations are not those of each frame.
            beyond = 1.5 * info.frame_duration + ROUNDING
            if times[-1] > info.seconds + beyond:
                raise UnreadableClip(f"it has {info.frames} frames, fewer than its header says")
            # One at a time, since all frames of a large source take gigabytes.
            frames = [
                cover(torch.from_numpy(frame).permute(2, 0, 1)[None], bucket.height, bucket.width, placement)
                for frame in video.frames_at(times, beyond)
            ]
    return torch.cat(frames)


@contextmanager
def _opened(source: ClipSource) -> Iterator[str | BinaryIO]:
    """Yield the path or file object that PyAV, decord and Pillow can open."""
    if not source.member:
        yield source.path
        return
    try:
        part = FilePart(source.path, source.start, source.size)
    except OSError as error:
        raise UnreadableClip(error.strerror or str(error)) from error
    with io.BufferedReader(part) as file:
        yield file


def _probe_image(file: str | BinaryIO) -> ClipInfo:
    from PIL import Image

    try:
        with Image.open(file) as image:
            width, height = image.size
            if image.getexif().get(0x0112, 1) >= 5:  # EXIF orientation: stored lying on its side
                width, height = height, width
    except Exception as error:  # Pillow's decoders raise many kinds
        raise UnreadableClip("not an image, or too damaged to open") from error
    return ClipInfo(width, height, 1, 0.0)


def _read_image(file: str | BinaryIO, bucket: Bucket, placement: Placement) -> Tensor:
    try:
        image = load_condition_image(file, (bucket.height, bucket.width), (placement.left, placement.top))
    except UserError as error:
        raise UnreadableClip("damaged: the image cannot be decoded") from error
    pixels = ((image + 1) * 127.5).round().to(torch.uint8)[None]
    return pixels.flip(-1) if placement.mirrored else pixels
