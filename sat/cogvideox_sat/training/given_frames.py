"""The pictures or clip of a request, as frames for a panel beside its video."""

from collections.abc import Callable

import torch
from torch import Tensor

from cogvideox_sat.configuration.model_limits import ModelLimits
from cogvideox_sat.media.video_output import pixels_of
from cogvideox_sat.sampling.requests import SampleRequest


class GivenFrames:
    """The frames of a request's clip or pictures, to be shown beside its video.

    Each picture is shown from its frame on, and the first one also before that. The last picture, or the last frame of
    the clip, is shown until the video ends.

    Args:
        kind: `clip` or `image`.
        starts: the frame from which each of `pictures` is shown, in order.
        pictures: uint8 (pictures, height, width, 3).
    """

    def __init__(self, kind: str, starts: list[int], pictures: Tensor):
        self.kind, self._starts, self._pictures = kind, torch.tensor(starts), pictures

    def frames(self, first: int, count: int) -> Tensor:
        """Return `count` frames, starting at number `first`: uint8 (count, height, width, 3)."""
        numbers = torch.arange(first, first + count)
        return self._pictures[(torch.searchsorted(self._starts, numbers, right=True) - 1).clamp(min=0)]


def given_frames(request: SampleRequest, limits: ModelLimits) -> GivenFrames | None:
    """Return the frames of a request's clip or pictures.

    None: the request has none, or its video begins with the unchanged clip.

    Raises:
        UserError: a picture or the clip cannot be read.
    """
    if request.goes_on or not (request.shows or request.video is not None):
        return None
    clip = request.load_clip("video", limits)
    if clip is not None:
        return GivenFrames("clip", list(range(len(clip))), pixels_of(clip))
    length = limits.video_frames(request.frames)
    sources: dict[int, Tensor | Callable[[], Tensor]] = {} if request.image is None else {0: request.image}
    sources |= {key_frame.at % length: key_frame.image for key_frame in request.key_frames}
    starts = sorted(sources)
    pictures = [source if isinstance(source := sources[start], Tensor) else source() for start in starts]
    return GivenFrames("image", starts, pixels_of(torch.stack(pictures)))
