"""Read a clip: choose its source frames by the wanted rate, and bring them to a size."""

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
from cogvideox_sat.files.image_size import image_size
from cogvideox_sat.latent_geometry import Bucket
from cogvideox_sat.media.frame_times import ROUNDING
from cogvideox_sat.media.image_inputs import load_condition_image
from cogvideox_sat.media.video_facts import UnreadableClip, VideoFacts
from cogvideox_sat.media.video_reading import DEFAULT_BACKEND, open_video
from sgm.errors import UserError
from sgm.seeds import hashed_seed


class Part(NamedTuple):
    """Range of the possible starts of a clip, as shares of all; clips of a source divide them."""

    begin: float = 0.0
    end: float = 1.0

    def within(self, starts: int) -> tuple[int, int]:
        """Return the first of `starts` positions in the part, and the position after its last."""
        first = min(math.floor(self.begin * starts + ROUNDING), starts - 1)
        return first, max(math.floor(self.end * starts + ROUNDING), first + 1)


WHOLE = Part()


@dataclass(frozen=True)
class FrameSampling:
    """Rules for cutting a clip out of a source of any rate.

    Frame k of the clip is the source frame nearest in time to `start + k / fps`. The clip lies within the source
    without its first and last `skip_frames` frames (which often are cuts and fades), or fewer if a short source cannot
    spare them.

    Attributes:
        fps: frames per second of the clip.
        max_frames: most frames of the clip; a shorter source gives a shorter clip, without padding.
        multiple: the VAE and the network take clips of `multiple * k + 1` frames: 4, or 8 for CogVideoX1.5.
        random_start: start at a random frame; otherwise at the first usable frame.
    """

    fps: float
    max_frames: int
    skip_frames: int = 0
    multiple: int = 4
    random_start: bool = True

    def window(self, info: VideoFacts) -> tuple[float, float]:
        """Return the times of the first and last usable frame, in seconds from the first frame."""
        skipped = min(self.skip_frames, (info.frames - 1) // 2) * info.frame_duration
        return skipped, info.seconds - skipped

    def num_frames(self, info: VideoFacts) -> int:
        """Return the number of frames of the clip."""
        # The last frame is the nearest one for half its duration.
        first, last = self.window(info)
        fit = math.floor((last - first + info.frame_duration / 2) * self.fps + ROUNDING) + 1
        frames = min(fit, self.max_frames)
        return frames - (frames - 1) % self.multiple

    def parts(self, info: VideoFacts, frames: int, most: int | None, stride: float | None) -> list[Part]:
        """Return the parts of a source; one clip of `frames` starts in each.

        Args:
            most: largest number of clips of a source; None: one if there is no stride, else any number.
            stride: seconds between the beginnings of parts; None: equally long parts, as many as clips fit in without
                overlap.
        """
        slack, starts = self._slack(info, frames), self._starts(info, frames)
        if stride is None:
            count = min(most or 1, math.floor(slack * self.fps / frames + ROUNDING) + 1, starts)
            return [Part(i / count, (i + 1) / count) for i in range(count)]
        count = max(min(math.floor(slack / stride + ROUNDING) + 1, starts), 1)
        share = stride / info.frame_duration / starts if info.frame_duration else 1.0
        parts = [Part(i * share, (i + 1) * share if i + 1 < count else 1.0) for i in range(count)]
        return parts[:most]

    def times(self, info: VideoFacts, frames: int, seed: int, part: Part = WHOLE) -> np.ndarray:
        """Return the times of the frames of a clip, in seconds from the source's first frame."""
        start, end = part.within(self._starts(info, frames))
        if self.random_start:
            start = random.Random(hashed_seed(seed, "clip start")).randrange(start, end)
        return self.window(info)[0] + start * info.frame_duration + np.arange(frames) / self.fps

    def _slack(self, info: VideoFacts, frames: int) -> float:
        """Return by how many seconds the start of a clip of `frames` can vary."""
        first, last = self.window(info)
        return max(last - first + info.frame_duration / 2 - (frames - 1) / self.fps, 0.0)

    def _starts(self, info: VideoFacts, frames: int) -> int:
        """Return the number of frames of the source at which a clip of `frames` can start."""
        duration = info.frame_duration
        return math.floor(self._slack(info, frames) / duration + ROUNDING) + 1 if duration else 1


def probe(source: ClipSource) -> VideoFacts:
    """Return the facts of a clip; most containers are read only at the beginning and the end.

    Raises:
        UnreadableClip: the file is missing, not a video, or cut off.
    """
    with _opened(source) as file:
        if source.is_image:
            return _probe_image(file)
        with open_video(file) as video:
            return video.facts


def read_clip(
    source: ClipSource,
    bucket: Bucket,
    sampling: FrameSampling,
    seed: int,
    placement: Placement = CENTRED,
    part: Part = WHOLE,
    info: VideoFacts | None = None,
    backend: str = DEFAULT_BACKEND,
) -> Tensor:
    """Return the pixels of a clip: uint8 (frames, 3, height, width), RGB, not contiguous.

    Args:
        bucket: frames, height and width of the result.
        placement: position of the crop after frames are resized to cover the size, see `clips.transforms.cover`.
        part: the part of the source in which the clip starts.
        info: the result of `probe`, if it is known.
        backend: the decoder, one of `media.video_reading.BACKENDS`.

    Raises:
        UnreadableClip: the file is missing, damaged, or shorter than the bucket.
    """
    with _opened(source) as file:
        if source.is_image:
            return _read_image(file, bucket, placement)
        with open_video(file, threads=decoding_threads(), backend=backend) as video:
            info = info or video.facts
            times = sampling.times(info, bucket.frames, seed, part)
            # More than rounding, since single frames may be longer than the mean.
            beyond = 1.5 * info.frame_duration + ROUNDING
            if times[-1] > info.seconds + beyond:
                raise UnreadableClip(f"it has {info.frames} frames, fewer than its header says")
            # One frame at a time, since all frames of a large source take gigabytes.
            frames = [
                cover(torch.from_numpy(frame).permute(2, 0, 1)[None], bucket.height, bucket.width, placement)
                for frame in video.frames_at(times, beyond)
            ]
    return torch.cat(frames)


@contextmanager
def _opened(source: ClipSource) -> Iterator[str | BinaryIO]:
    """Yield a path or file object that PyAV, decord and Pillow can open."""
    if not source.member:
        yield source.path
        return
    try:
        part = FilePart(source.path, source.start, source.size)
    except OSError as error:
        raise UnreadableClip(error.strerror or str(error)) from error
    with io.BufferedReader(part) as file:
        yield file


def _probe_image(file: str | BinaryIO) -> VideoFacts:
    try:
        height, width = image_size(file)
    except Exception as error:  # Pillow's decoders raise many kinds
        raise UnreadableClip("not an image, or too damaged to open") from error
    return VideoFacts(width, height, 1, 0.0)


def _read_image(file: str | BinaryIO, bucket: Bucket, placement: Placement) -> Tensor:
    try:
        image = load_condition_image(file, (bucket.height, bucket.width), (placement.left, placement.top))
    except UserError as error:
        raise UnreadableClip("damaged: the image cannot be decoded") from error
    pixels = ((image + 1) * 127.5).round().to(torch.uint8)[None]
    return pixels.flip(-1) if placement.mirrored else pixels
