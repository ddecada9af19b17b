"""Name the fields with which a call makes a video again."""

from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from cogvideox_sat.sampling.planned_videos import PlannedVideo
from cogvideox_sat.sampling.requests import SampleRequest


def fields_of(planned: PlannedVideo, asked: SampleRequest, steps: int) -> dict[str, Any]:
    """Return the fields of a request with all defaults filled in: they make the video again.

    Args:
        steps: number of sampling steps of each window.
    """
    image = planned.request.image if planned.request.image is not None else asked.image
    if isinstance(image, partial):
        image = image.args[0]
    fields = {
        "prompt": asked.prompt,
        "negative_prompt": asked.negative_prompt,
        "image": str(image) if isinstance(image, Path) else image,
        **fields_of_inputs(planned, asked),
        "seed": planned.seed,
        "size": planned.size,
        "num_frames": planned.frames,
        "fps": planned.fps,
        "steps": steps,
        **planned.knobs.given(),
    }
    return {name: value for name, value in fields.items() if value is not None}


def fields_of_inputs(planned: PlannedVideo, asked: SampleRequest) -> dict[str, Any]:
    """Return the fields for key frames, a clip and further windows; None for absent ones."""
    request = planned.request
    files = {key_frame.at: str(key_frame.path) for key_frame in request.keyframes}
    key_frames = [
        {"image": files.get(key_frame.at, key_frame.image), "at": key_frame.at} for key_frame in asked.key_frames
    ]
    return {
        "keyframes": key_frames or None,
        "video": asked.video if isinstance(asked.video, Tensor) else request.video and str(request.video),
        "strength": request.strength,
        "extend": list(request.windows) or None,
    }
