"""Find and measure the picture and clip files of a request, without PyTorch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from cogvideox_sat.configuration.model_limits import ModelLimits
from cogvideox_sat.media.video_facts import UnreadableClip, VideoFacts
from cogvideox_sat.media.video_probe import facts_in_time, frames_at_rate
from sgm.errors import UserError, shown


@dataclass(frozen=True)
class KeyFrameFile:
    """A picture file for one frame of the video.

    Args:
        at: number of the frame, from 0; -1 is the last frame.
    """

    path: Path
    at: int


def key_frame_files(entries: Sequence[Any], find: Callable[[str], Path]) -> tuple[KeyFrameFile, ...]:
    """Return the key frames that a request names.

    Args:
        entries: objects with `image` and `at`, or texts IMAGE:AT.
        find: returns the file for a name, or raises UserError.

    Raises:
        UserError: an entry is malformed, or an image does not exist.
    """
    found = []
    for entry in entries:
        if isinstance(entry, KeyFrameFile):
            found.append(entry)
            continue
        name, at = (entry["image"], entry["at"]) if isinstance(entry, dict) else _parts(entry)
        found.append(KeyFrameFile(find(name), at))
    return tuple(found)


def _parts(text: str) -> tuple[str, int]:
    name, _, at = text.rpartition(":")
    try:
        return name, int(at)
    except ValueError as error:
        raise UserError(f"keyframes: got {shown(text)}; expected IMAGE:AT, such as last.png:-1") from error


@lru_cache(maxsize=256)
def video_facts(path: Path) -> VideoFacts | None:
    """Return the size and length of a clip, or None if it cannot be read.

    The error is reported later, when the clip is needed.
    """
    try:
        return facts_in_time(path)
    except UnreadableClip:
        return None


def frames_of_video(path: Path, fps: int, most: int, limits: ModelLimits) -> int:
    """Return the number of latent frames to sample from a clip.

    It is the largest number that the clip, the model and `most` allow. A clip that is shorter than the shortest video
    of the model gets `most`; reading it fails later.
    """
    facts = video_facts(path)
    lengths = [length for length in limits.lengths() if 1 < length <= limits.video_frames(most)]
    fitting = [length for length in lengths if facts is not None and length <= frames_at_rate(facts, fps)]
    return limits.latent_frames(fitting[-1]) if fitting else most


def all_frames_of_video(path: Path, fps: int) -> int:
    """Return the number of frames of a clip at `fps` frames per second.

    Raises:
        UserError: the clip cannot be read.
    """
    facts = video_facts(path)
    if facts is None:
        try:
            facts = facts_in_time(path)
        except UnreadableClip as error:
            raise UserError(f"video: {path}: {error}") from error
    return frames_at_rate(facts, fps)
