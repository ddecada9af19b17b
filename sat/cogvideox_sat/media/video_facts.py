"""Define the facts about a video that all readers return, and their error."""

from typing import NamedTuple

NOT_A_VIDEO = "not a video, or too damaged to open"
DAMAGED = "damaged: its frames cannot be decoded"


class UnreadableClip(Exception):
    """Raised if a clip cannot be read; the message says why."""


class VideoFacts(NamedTuple):
    """Facts of a video as a player shows it.

    Attributes:
        width, height: of a frame in square pixels, after the rotation that the file asks for.
        frames: number of frames that are shown; frames hidden by an edit list do not count.
        seconds: time from the first frame to the last.
    """

    width: int
    height: int
    frames: int
    seconds: float

    @property
    def frame_duration(self) -> float:
        """Return the mean seconds between two frames; 0 for a single frame."""
        return self.seconds / (self.frames - 1) if self.frames > 1 else 0.0
