"""Opening video files and decoding their frames, with decord."""

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from decord import VideoReader


class UnreadableClip(Exception):
    """A clip cannot be read; the message says why."""


def open_video(file: str | io.BytesIO, threads: int = 1) -> "VideoReader":
    """A reader of the frames of a video; `threads` decode them, 0: as many as there are cores.

    Raises:
        UnreadableClip: it is no video, or too damaged to open.
    """
    import decord

    decord.logging.set_level(decord.logging.QUIET)  # FFmpeg's remarks on damaged files, which are reported otherwise
    try:
        # fault_tol: do not fill in damaged frames with copies of others without a word.
        return decord.VideoReader(file, num_threads=threads, fault_tol=1)
    except Exception as error:  # decord's own, and what its binding raises
        raise UnreadableClip("not a video, or too damaged to open") from error


def decode(reader: "VideoReader", indices: Sequence[int] | None = None) -> Tensor:
    """Frames (n, height, width, 3), uint8, RGB: those of `indices`, or all.

    Others between them are decoded as far as they depend on these.

    Raises:
        UnreadableClip: a frame is damaged.
    """
    try:
        batch = reader.get_batch(range(len(reader)) if indices is None else indices)
        return torch.utils.dlpack.from_dlpack(batch.to_dlpack())  # asnumpy would copy
    except Exception as error:
        raise UnreadableClip("damaged: its frames cannot be decoded") from error
