"""Read the pixels of a clip that a video starts from, as training reads clips.

The clip is read in a process of its own, so that a decoder that hangs or crashes fails only this video.
"""

from contextlib import closing
from pathlib import Path
from typing import Any

from torch import Tensor

from cogvideox_sat.clips.attempts import CLIP_TIMEOUT
from cogvideox_sat.clips.files import ClipSource
from cogvideox_sat.clips.items_in_processes import in_processes
from cogvideox_sat.clips.reading import FrameSampling, probe, read_clip
from cogvideox_sat.latent_geometry import Bucket
from cogvideox_sat.media.video_facts import UnreadableClip
from cogvideox_sat.media.video_probe import frames_at_rate
from cogvideox_sat.media.video_reading import load_decoder
from sgm.errors import UserError


def read_input_video(path: Path, size: tuple[int, int], frames: int, fps: float, limit: float = CLIP_TIMEOUT) -> Tensor:
    """Return the first frames of a clip at `fps` frames per second, resized and cropped.

    They are resized to cover `size` and cropped in the middle.

    Args:
        path: the clip.
        size: (height, width) in pixels.
        limit: seconds for reading the clip.

    Returns:
        (frames, 3, height, width), float32 in [-1, 1], RGB.

    Raises:
        UserError: the clip cannot be read, takes too long, or is too short.
    """
    source = ClipSource(str(path), None, animated=True)  # opened as a video, whatever its name

    def read(_: Any) -> Tensor | str:
        try:
            info = probe(source)
            if (available := frames_at_rate(info, fps)) < frames:
                return (
                    f"it has {available} frames at {fps:g} frames per second, but {frames} are needed; ask for fewer, "
                    "or give a longer clip"
                )
            sampling = FrameSampling(fps, frames, random_start=False)
            return read_clip(source, Bucket(frames, *size), sampling, seed=0, info=info).contiguous()
        except UnreadableClip as error:
            return str(error)

    def late(_: Any, reason: str) -> str:
        return reason.removesuffix(" (clip_timeout)")

    load_decoder()  # before the fork, so that the import does not count towards the limit
    with closing(in_processes(read, [None], lambda _: str(path), late, 1, limit)) as results:
        pixels = next(results)
    if isinstance(pixels, str):
        raise UserError(f"video: {path}: {pixels}")
    return pixels.float() / 127.5 - 1.0
