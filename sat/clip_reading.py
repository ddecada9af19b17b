"""Reading a clip: which source frames it consists of, at the wanted rate, and their pixels at the wanted size."""

import io
import math
import random
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from batch_order import Bucket
from clip_sources import ClipSource
from clip_transforms import CENTRED, Placement, cover
from image_inputs import load_condition_image
from mp4_header import VideoHeader, read_header
from sgm.errors import UserError
from sgm.seeds import hashed_seed
from video_reading import UnreadableClip, decode, open_video

if TYPE_CHECKING:
    from decord import VideoReader

ROUNDING = 1e-4  # seconds, or frames: times in files are rounded, decord's are float32


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


def nearest_frames(source_times: np.ndarray, times: np.ndarray) -> np.ndarray:
    """For each of `times` the index of the nearest of `source_times` (ascending), the earlier of two equally near."""
    return np.searchsorted((source_times[1:] + source_times[:-1]) / 2, times - ROUNDING)


def probe(source: ClipSource) -> ClipInfo:
    """What a clip is; of .mp4 and .mov files only the header is read, others are opened with the decoder.

    Raises:
        UnreadableClip: it is not there, no video, or cut off.
    """
    if source.is_image:
        return _probe_image(source)
    if header := _mp4_header(source):
        return ClipInfo(*header)
    reader = open_video(_file(source))
    times = _frame_times(reader)
    _, height, width, _ = decode(reader, [0]).shape
    return ClipInfo(width, height, len(reader), float(times[-1]))


def read_clip(
    source: ClipSource,
    bucket: Bucket,
    sampling: FrameSampling,
    seed: int,
    placement: Placement = CENTRED,
    part: Part = WHOLE,
) -> Tensor:
    """Return the pixels of a clip: uint8 (frames, 3, height, width), RGB, in the bucket's shape, not contiguous.

    Args:
        placement: where frames are cropped, once they cover the size, see `clip_transforms.cover`.
        part: of the source, in which the clip starts.

    Raises:
        UnreadableClip: the file is not there, damaged, or shorter than the bucket.
    """
    if source.is_image:
        return _read_image(source, bucket, placement)
    # A worker decodes alone: as many threads in each as there are cores would only be in each other's way.
    reader = open_video(_file(source), threads=1 if get_worker_info() else 0)
    source_times = _frame_times(reader)
    info = ClipInfo(0, 0, len(source_times), float(source_times[-1]))
    times = sampling.times(info, bucket.frames, seed, part)
    # By more than rounding: a header gives mean rates, and lengths to one frame more or less.
    if times[-1] > info.seconds + 1.5 * info.frame_duration + ROUNDING:
        raise UnreadableClip(f"it has {info.frames} frames, fewer than its header says")
    frames = decode(reader, nearest_frames(source_times, times).tolist())
    return cover(frames.permute(0, 3, 1, 2), bucket.height, bucket.width, placement)


def _file(source: ClipSource) -> io.BytesIO | str:
    """What decord and Pillow open."""
    if not source.member:
        return source.path
    try:
        return io.BytesIO(source.read())
    except OSError as error:
        raise UnreadableClip(error.strerror or str(error)) from error


def _mp4_header(source: ClipSource) -> VideoHeader | None:
    try:
        with Path(source.path).open("rb") as file:
            size = source.size if source.member else file.seek(0, io.SEEK_END)
            return read_header(file, source.start, source.start + size)
    except (OSError, EOFError) as error:
        raise UnreadableClip(getattr(error, "strerror", None) or str(error)) from error


def _frame_times(reader: "VideoReader") -> np.ndarray:
    """When each frame is shown, in seconds from the first: real time stamps, so that a variable rate does no harm."""
    frames = len(reader)
    times = reader.get_frame_timestamp(range(frames))[:, 0].astype(np.float64)
    if not (np.isfinite(times).all() and (np.diff(times) > 0).all()):  # a container without them
        rate = reader.get_avg_fps()
        if not rate > 0:
            raise UnreadableClip("it has neither time stamps nor a frame rate")
        times = np.arange(frames) / rate
    return times - times[0]


def _probe_image(source: ClipSource) -> ClipInfo:
    from PIL import Image

    file = _file(source)
    try:
        with Image.open(file) as image:
            width, height = image.size
            if image.getexif().get(0x0112, 1) >= 5:  # EXIF orientation: stored lying on its side
                width, height = height, width
    except Exception as error:  # Pillow's decoders raise many kinds
        raise UnreadableClip("not an image, or too damaged to open") from error
    return ClipInfo(width, height, 1, 0.0)


def _read_image(source: ClipSource, bucket: Bucket, placement: Placement) -> Tensor:
    file = _file(source)
    try:
        image = load_condition_image(file, (bucket.height, bucket.width), (placement.left, placement.top))
    except UserError as error:
        raise UnreadableClip("damaged: the image cannot be decoded") from error
    pixels = ((image + 1) * 127.5).round().to(torch.uint8)[None]
    return pixels.flip(-1) if placement.mirrored else pixels
