"""Make the requests of a session from planned videos.

Pictures and clips are read when they are needed.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import cast

from torch import Tensor

from arguments import SamplingArguments
from cogvideox_sat.clips.input_video import read_input_video
from cogvideox_sat.configuration.model_limits import ModelLimits
from cogvideox_sat.latent_geometry import CONTEXT_FRAMES
from cogvideox_sat.media.image_inputs import load_condition_image
from cogvideox_sat.sampling.input_files import all_frames_of_video
from cogvideox_sat.sampling.planned_videos import PlannedVideo
from cogvideox_sat.sampling.requests import KeyFrame, SampleRequest


def sample_request(planned: PlannedVideo, args: SamplingArguments) -> SampleRequest:
    """Return the session's request for a planned video."""
    request, size, limits = planned.request, planned.size, ModelLimits.from_config(args.model_config)

    def picture(path: Path) -> Callable[[], Tensor]:
        return partial(load_condition_image, path, size)

    image = None if request.image is None else picture(request.image)
    video = None
    if request.video is not None:
        video = partial(read_clip_of, planned, limits)
        if limits.image_to_video and image is None and not request.keyframes and not request.goes_on:
            image = partial(first_frame_of, planned)
    return SampleRequest(
        prompt=request.text,
        negative_prompt=request.negative_prompt or args.negative_prompt,
        seed=planned.seed,
        size=size,
        frames=planned.frames,
        image=image,
        steps=planned.steps,
        fps=planned.fps,
        knobs=planned.knobs,
        key_frames=tuple(KeyFrame(picture(key_frame.path), key_frame.at) for key_frame in request.keyframes),
        video=video,
        strength=request.strength,
        extend=request.windows,
    )


def read_clip_of(planned: PlannedVideo, limits: ModelLimits) -> Tensor:
    """Return the clip that sampling starts from, or the whole clip that is continued."""
    path = cast("Path", planned.request.video)
    frames = limits.video_frames(planned.frames)
    if planned.request.goes_on:
        frames = max(all_frames_of_video(path, planned.fps), CONTEXT_FRAMES)
    return read_input_video(path, planned.size, frames, planned.fps)


def first_frame_of(planned: PlannedVideo) -> Tensor:
    """Return the first frame of the clip that sampling starts from."""
    return read_input_video(cast("Path", planned.request.video), planned.size, 1, planned.fps)[0]
