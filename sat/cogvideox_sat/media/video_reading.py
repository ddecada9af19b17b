"""Read frames of video files at given times, with one of two decoders.

The decoders are imported only when they are used.

    with open_video("a.mp4") as video:
        print(video.facts)
        for frame in video.frames_at([0, 0.125, 0.25]):
            ...  # (height, width, 3), uint8, RGB, as a player shows it
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, BinaryIO, Protocol

from cogvideox_sat.media.video_facts import UnreadableClip, VideoFacts

if TYPE_CHECKING:
    import numpy as np

BACKENDS = ("pyav", "decord")
DEFAULT_BACKEND = "pyav"
# Animated images, by their first bytes: Pillow shows them as browsers do.
ANIMATIONS = ((0, b"GIF8"), (8, b"WEBP"), (0, b"\x89PNG"))


class Video(Protocol, AbstractContextManager["Video"]):
    """Open video; times are in seconds from its first frame."""

    @property
    def facts(self) -> VideoFacts:
        """Return size and length; without an index of frames, this reads the whole file."""

    def frames_at(self, times: "Sequence[float] | np.ndarray", beyond: float | None = None) -> "Iterator[np.ndarray]":
        """Yield the frames nearest to the ascending `times`: (height, width, 3), uint8, RGB.

        Args:
            beyond: largest number of seconds that a time may be after the last frame; None: any number.

        Raises:
            UnreadableClip: a frame is damaged or missing.
        """

    def all_frames(self) -> "Iterator[np.ndarray]":
        """Yield every frame in the order of showing; see `frames_at`."""

    def close(self) -> None:
        """Close the file."""


def open_video(file: str | os.PathLike[str] | BinaryIO, threads: int = 1, backend: str = DEFAULT_BACKEND) -> Video:
    """Open a video file.

    Args:
        file: path, or an open file.
        threads: number of decoding threads; 0: as many as there are cores.
        backend: one of `BACKENDS`. decord 0.6 is for comparisons with older runs: it cannot read AV1 and animations,
            ignores edit lists (clips that were cut without encoding show hidden frames, or never end), non-square
            pixels and HDR, and refuses some small videos.

    Raises:
        UnreadableClip: the file is missing, not a video, or too damaged to open.
    """
    if backend == "decord":
        from cogvideox_sat.media.decord_reading import DecordVideo

        return DecordVideo(file, threads)
    if is_animation(file):
        from cogvideox_sat.media.animated_images import Animation

        return Animation(file)
    from cogvideox_sat.media.pyav_reading import PyavVideo

    return PyavVideo(file, threads)


def load_decoder(backend: str = DEFAULT_BACKEND) -> None:
    """Import the decoder, so that forked processes need not import it while they are timed."""
    if backend == "pyav":  # decord does not support forking
        from cogvideox_sat.media import pyav_reading  # noqa: F401


def is_animation(file: str | os.PathLike[str] | BinaryIO) -> bool:
    """Return whether a file is a GIF, WebP or PNG image, animated or not.

    Raises:
        UnreadableClip: the file cannot be read.
    """
    try:
        if isinstance(file, str | os.PathLike):
            with open(file, "rb") as opened:  # noqa: PTH123, `file` may be either
                start = opened.read(16)
        else:
            file.seek(0)
            start = file.read(16)
            file.seek(0)
    except OSError as error:
        raise UnreadableClip(error.strerror or str(error)) from error
    return any(start[at : at + len(magic)] == magic for at, magic in ANIMATIONS)
