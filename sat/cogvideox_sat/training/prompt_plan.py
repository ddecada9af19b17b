"""Plan the videos of `valid_prompts` before PyTorch is imported."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cogvideox_sat.clips.video_sizes import nearest_size, parse_sizes
from cogvideox_sat.configuration.argument_lists import SamplingArguments, TrainingArguments
from cogvideox_sat.configuration.frame_sizes import size_of_image
from cogvideox_sat.configuration.model_limits import ModelLimits
from cogvideox_sat.files.output_paths import safe_name
from cogvideox_sat.sampling.planned_videos import PlannedVideo, planned_video
from cogvideox_sat.sampling.prompt_files import read_prompts
from cogvideox_sat.sampling.prompt_requests import PromptRequest
from cogvideox_sat.sampling.request_checks import check_request
from sgm.errors import UserError

logger = logging.getLogger(__name__)

USUAL_SIZE, USUAL_FRAMES = (480, 720), 49  # if the data section has no size or length


@dataclass(frozen=True)
class PromptPlan:
    """The videos of `valid_prompts`.

    Args:
        args: arguments of a sampling run that would make the same videos from a checkpoint.
        videos: the videos to make each time; `path` is the file name without a suffix.
    """

    args: SamplingArguments
    videos: tuple[PlannedVideo, ...]

    @property
    def texts(self) -> list[tuple[str, str]]:
        """Return all encoded prompts with their negative prompts, without duplicates.

        Prompts of further windows are included.
        """
        pairs: dict[tuple[str, str], None] = {}
        for video in self.videos:
            for text in (video.request.text, *video.request.windows):
                pairs[text, video.request.negative_prompt or self.args.negative_prompt] = None
        return list(pairs)

    @property
    def shows_inputs(self) -> bool:
        """Return whether a prompt names pictures or a clip, which the VAE encodes."""
        return any(
            video.request.image is not None or video.request.keyframes or video.request.video is not None
            for video in self.videos
        )


def plan_prompts(args: TrainingArguments) -> PromptPlan | None:
    """Return the plan for `valid_prompts`; None if it is not given.

    A prompt without a size or length gets those of the training data: of several sizes the one nearest to its image, or
    the first one; and the longest video that the model makes of at most that length.

    Raises:
        UserError: the file or a picture does not exist, the model cannot make what a prompt asks for, or no evaluation
            would make it.
    """
    if args.valid_prompts is None:
        return None
    if not args.eval_interval:
        raise UserError("valid_prompts: eval_interval is missing, which says how often videos are made; give both")
    limits = ModelLimits.from_config(args.model_config)
    sizes, frames = usual_clip(args.data_config.get("params") or {}, limits)
    try:
        requests = read_prompts(args.valid_prompts, limits.image_to_video)
    except UserError as error:
        raise UserError(f"valid_prompts: {error}") from error
    sampling = SamplingArguments(
        model_config=args.model_config,
        sources=args.sources,
        image2video=limits.image_to_video,
        latent_channels=limits.latent_channels,
        sampling_image_size=list(sizes[0]),
        sampling_num_frames=limits.latent_frames(frames),
        sampling_num_steps=args.sampling_num_steps,
        sampling_fps=args.sampling_fps,
        seed=args.seed,
    )
    videos = []
    for request in requests:
        if request.size is None:
            height, width = size_for(request, sizes)
            limits.check_size(height, width, "data.params.video_size")
            request = replace(request, size=(height, width))
        where = f"valid_prompts: {args.valid_prompts}, prompt {request.index + 1}: "
        if request.extend and args.only_log_video_latents:
            raise UserError(f"{where}extend: windows continue decoded frames; set only_log_video_latents to false")
        check_request(request, sampling, where)
        videos.append(planned_video(request, sampling, Path(f"{request.index}_{safe_name(request.text)}")))
    if args.only_log_video_latents:
        logger.info(
            "valid_prompts: only_log_video_latents is on, so latents are saved; --no-only_log_video_latents "
            "makes videos"
        )
    return PromptPlan(sampling, tuple(videos))


def usual_clip(params: Mapping[str, Any], limits: ModelLimits) -> tuple[list[tuple[int, int]], int]:
    """Return the sizes in a data section, and the longest video for its clips, in frames.

    The sizes are (height, width). The video is the longest one of the model that is not longer than the clips.

    Raises:
        UserError: a size is invalid.
    """
    sizes = params.get("video_size", params.get("image_size"))
    most = params.get("max_num_frames", params.get("num_frames"))
    most = most if isinstance(most, int) else USUAL_FRAMES
    fitting = [length for length in limits.lengths() if length <= most]
    return [USUAL_SIZE] if sizes is None else parse_sizes(sizes), max(fitting, default=1)


def size_for(request: PromptRequest, sizes: list[tuple[int, int]]) -> tuple[int, int]:
    """Return the size for a request: the one nearest to its image, or the first one."""
    image = size_of_image(request.image) if request.image is not None else None
    return sizes[0] if image is None else nearest_size(*image, sizes)
