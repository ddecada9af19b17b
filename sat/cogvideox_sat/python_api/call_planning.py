"""Plan the video of a call, with pictures and clips that are in memory."""

from dataclasses import replace
from pathlib import Path
from typing import TypeAlias

import numpy as np
from PIL import Image
from torch import Tensor

from arguments import SamplingArguments
from cogvideox_sat.configuration.frame_sizes import size_from_image
from cogvideox_sat.configuration.model_limits import ModelLimits
from cogvideox_sat.python_api.calls import InMemory
from cogvideox_sat.python_api.pictures import first_frame, fitted, fitted_clip, input_clip
from cogvideox_sat.sampling.planned_videos import PlannedVideo, planned_video
from cogvideox_sat.sampling.prompt_requests import PromptRequest
from cogvideox_sat.sampling.request_checks import check_request
from cogvideox_sat.sampling.request_making import sample_request
from cogvideox_sat.sampling.requests import KeyFrame, SampleRequest

PLACE = Path("000000.mp4")  # path for planning a video that may never be written

Picture: TypeAlias = Image.Image | Tensor
Clip: TypeAlias = np.ndarray | Tensor


def plan_call(
    request: PromptRequest, memory: InMemory, args: SamplingArguments, limits: ModelLimits, where: str
) -> tuple[PlannedVideo, SampleRequest]:
    """Return the planned video of a request, and its request to a session.

    Args:
        memory: the pictures and the clip of the request that are not files.
        args: the arguments that fill in what the request leaves open.
        where: beginning of the message of an error.

    Raises:
        UserError: the model cannot make the video, or a picture or clip is of another type.
    """
    picture = None if memory.image is None else first_frame(memory.image, f"{where}image")
    clip = None if memory.video is None else input_clip(memory.video, f"{where}video")
    request = as_large_as_inputs(request, picture, clip, args, limits)
    check_request(request, args, where)
    planned = planned_video(request, args, PLACE)
    key_frames = [
        KeyFrame(fitted(first_frame(image, f"{where}keyframes"), planned.size), at) for image, at in memory.keyframes
    ]
    asked = sample_request(planned, args)
    asked = replace(asked, key_frames=(*asked.key_frames, *key_frames))
    if clip is not None:
        asked = with_clip(asked, request, clip, limits)
    if picture is not None:
        asked = replace(asked, image=fitted(picture, planned.size))
    return planned, asked


def as_large_as_inputs(
    request: PromptRequest, picture: Picture | None, clip: Clip | None, args: SamplingArguments, limits: ModelLimits
) -> PromptRequest:
    """Return a request with the size of its picture and the length of its clip.

    A size or length that the request has is kept. The length is the largest that the clip, the model and the run's
    arguments allow.

    Args:
        picture, clip: the first frame and the clip that are in memory, if any.
    """
    if picture is not None and request.size is None and args.size_from_image:
        height, width = picture.shape[-2:] if isinstance(picture, Tensor) else picture.size[::-1]
        request = replace(request, size=size_from_image((height, width), limits))
    if clip is not None and not request.goes_on and request.latent_frames(limits) is None:
        longest = limits.video_frames(args.sampling_num_frames)
        fitting = [length for length in limits.lengths() if 1 < length <= min(len(clip), longest)]
        request = replace(request, frames=fitting[-1] if fitting else longest)
    return request


def with_clip(asked: SampleRequest, request: PromptRequest, clip: Clip, limits: ModelLimits) -> SampleRequest:
    """Return a request to a session that starts from a clip in memory, or continues it.

    Args:
        request: the request of the call; without a picture file of its own, the first frame of the clip is the image
            of a model that takes one.
    """
    used = clip if request.goes_on else clip[: limits.video_frames(asked.frames)]
    pixels = fitted_clip(used, asked.size)
    image = pixels[0] if asked.image is not None and request.image is None else asked.image
    return replace(asked, image=image, video=pixels)
