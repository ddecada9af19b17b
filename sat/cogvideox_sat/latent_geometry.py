"""Sizes of clips, latents and patches, and the relations between them.

This module imports no PyTorch.
"""

from collections.abc import Sequence
from typing import NamedTuple

SPACE_FACTOR = 8  # pixels per latent of the 3D VAE, along height and width
TIME_FACTOR = 4  # frames per latent frame after the first
CONTEXT_FRAMES = 5  # frames that a window continues: two latent frames, since the first alone shows no motion

Grid = tuple[int, int, int]  # frames, height, width in patches


class Bucket(NamedTuple):
    """The shape of a clip, with height and width in pixels; a batch has clips of one shape."""

    frames: int
    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.frames} frames of {self.height}x{self.width}"


def latent_frame_of(frame: int) -> int:
    """Return the number of the latent frame of frame `frame`, both counted from 0."""
    return (frame + TIME_FACTOR - 1) // TIME_FACTOR


def patch_sizes(patch_size: int | Sequence[int]) -> tuple[int, int, int]:
    """Return the patch along (frames, height, width).

    `2` means (1, 2, 2), as in CogVideoX 1.0; 1.5 gives all three.
    """
    if isinstance(patch_size, int):
        return 1, patch_size, patch_size
    frames, height, width = patch_size
    return frames, height, width


def video_tokens(bucket: Bucket, patch: tuple[int, int, int]) -> int:
    """Return the number of tokens of a clip; 1.5 repeats its first latent frame.

    The repeated frame fills a patch.
    """
    latent_frames = (bucket.frames - 1) // TIME_FACTOR + patch[0]
    o, p, q = patch
    return (latent_frames // o) * (bucket.height // SPACE_FACTOR // p) * (bucket.width // SPACE_FACTOR // q)
