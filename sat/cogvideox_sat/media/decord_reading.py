"""Read videos with decord, to compare with runs that used decord.

See `video_reading.open_video` for its limits.
"""

import os
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, BinaryIO, Self

import numpy as np
import torch

from cogvideox_sat.media.frame_times import nearest_frames
from cogvideox_sat.media.video_facts import DAMAGED, NOT_A_VIDEO, UnreadableClip, VideoFacts


class DecordVideo:
    """Video file as a `media.video_reading.Video`.

    Args:
        threads: number of decoding threads; 0: as many as there are cores.
    """

    def __init__(self, file: str | os.PathLike[str] | BinaryIO, threads: int = 1):
        import decord

        # Without FFmpeg's messages about damaged files, which are reported as UnreadableClip.
        decord.logging.set_level(decord.logging.QUIET)
        try:
            # fault_tol: do not silently replace damaged frames by copies of others.
            path_or_file = os.fspath(file) if isinstance(file, str | os.PathLike) else file
            self._reader = decord.VideoReader(path_or_file, num_threads=threads, fault_tol=1)
        except Exception as error:  # errors of decord and of its binding
            raise UnreadableClip(NOT_A_VIDEO) from error

    @cached_property
    def facts(self) -> VideoFacts:
        height, width = self._decode([0])[0].shape[:2]
        return VideoFacts(width, height, len(self._times), float(self._times[-1]))

    def frames_at(self, times: Sequence[float] | np.ndarray, beyond: float | None = None) -> Iterator[np.ndarray]:
        if beyond is not None and len(times) and times[-1] > self._times[-1] + beyond:
            raise UnreadableClip(f"it ends after {self._times[-1]:.2f} s, before {times[-1]:.2f} s")
        yield from self._decode(nearest_frames(self._times, np.asarray(times, np.float64)).tolist())

    def all_frames(self) -> Iterator[np.ndarray]:
        yield from self._decode(range(len(self._reader)))

    def close(self) -> None:
        self._reader = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    @cached_property
    def _times(self) -> np.ndarray:
        """Return the time of each frame, in seconds from the first; by time stamps if possible."""
        frames = len(self._reader)
        times = self._reader.get_frame_timestamp(range(frames))[:, 0].astype(np.float64)
        if not (np.isfinite(times).all() and (np.diff(times) > 0).all()):  # the container has no time stamps
            rate = self._reader.get_avg_fps()
            if not rate > 0:
                raise UnreadableClip("it has neither time stamps nor a frame rate")
            times = np.arange(frames) / rate
        return times - times[0]

    def _decode(self, indices: Sequence[int]) -> np.ndarray:
        try:
            batch = self._reader.get_batch(indices)
            return torch.utils.dlpack.from_dlpack(batch.to_dlpack()).numpy()  # asnumpy would copy
        except Exception as error:
            raise UnreadableClip(DAMAGED) from error
