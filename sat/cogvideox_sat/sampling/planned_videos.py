"""The videos of a run: their names and seeds, and all values that requests leave open."""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from arguments import SamplingArguments
from cogvideox_sat.commands.program_names import as_started
from cogvideox_sat.configuration.frame_sizes import size_of_image, warn_if_cropped
from cogvideox_sat.configuration.sampler_knobs import NO_KNOBS, SamplerKnobs
from cogvideox_sat.configuration.video_records import kept_path, record_path
from cogvideox_sat.files.output_paths import decide_existing, output_path
from cogvideox_sat.sampling.input_files import video_facts
from cogvideox_sat.sampling.prompt_refinement import Endpoint, Prompt, refine
from cogvideox_sat.sampling.prompt_requests import PromptRequest, request_seed
from cogvideox_sat.sampling.request_checks import knobs_of, latent_frames, video_size
from sgm.seeds import derive_seed

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PlannedVideo:
    """One video to make.

    Args:
        path: the file to write.
        seed: seed of the video's noise.
        frames: latent frames.
        size: (height, width) in pixels.
        original_prompt: the user's prompt, if a language model has refined it.
        fps: frames per second of the file.
        steps: sampling steps; None: the sampler's own number.
        knobs: changes to the configured sampler.
    """

    request: PromptRequest
    path: Path
    seed: int
    frames: int
    size: tuple[int, int]
    original_prompt: str | None = None
    fps: int = 8
    steps: int | None = None
    knobs: SamplerKnobs = NO_KNOBS


def plan_videos(requests: Iterable[PromptRequest], args: SamplingArguments) -> list[PlannedVideo]:
    """Return the videos to make for `requests`, without existing ones that are kept.

    Raises:
        UserError: an output exists, and the arguments do not say what to do with it.
    """
    videos = []
    for request in requests:
        for sample, (_, path) in enumerate(outputs(request, args)):
            if not decide_existing(path, args.overwrite, args.skip_existing, files_beside(path, args)):
                logger.info("skipped, it exists: %s", path)
                continue
            videos.append(planned_video(request, args, path, sample))
        if videos and videos[-1].request is request:
            log_size(request, videos[-1].size, args)
    return videos


def planned_video(request: PromptRequest, args: SamplingArguments, path: Path, sample: int = 0) -> PlannedVideo:
    """Return the planned video of a request; the run's arguments fill in what it leaves open.

    Args:
        sample: number of the video among those of the request.
    """
    return PlannedVideo(
        request,
        path,
        seed=derive_seed(request_seed(args.seed, request), sample),
        frames=latent_frames(request, args),
        size=video_size(request, args),
        fps=request.fps or args.sampling_fps,
        steps=request.steps or args.sampling_num_steps,
        knobs=knobs_of(request, args),
    )


def log_size(request: PromptRequest, size: tuple[int, int], args: SamplingArguments) -> None:
    """Log a size that follows from an image, and warn if much of an input is cut away.

    Args:
        size: (height, width) of the request's videos in pixels.
    """
    image = size_of_image(request.image) if request.image else None
    if request.video is not None and (facts := video_facts(request.video)) is not None:
        name = f"prompt {request.index + 1}, {request.video}"
        warn_if_cropped(name, (facts.height, facts.width), size, "size sets another one")
    if image is None:
        return
    name = f"prompt {request.index + 1}, {request.image}"
    if args.size_from_image and request.size is None:
        logger.info("%s: the video has %dx%d pixels (height x width), which follows from the image", name, *size)
    warn_if_cropped(name, image, size, "sampling_image_size, or size in a .jsonl file, sets another one")


def outputs(request: PromptRequest, args: SamplingArguments) -> list[tuple[str, Path]]:
    """Return the prompt with each of the files that are made for it."""
    paths = [output_path(args.output_dir, request.index, request.text, sample) for sample in range(args.batch_size)]
    return [(request.text, path.with_suffix(".safetensors") if args.only_save_latents else path) for path in paths]


def files_beside(video: Path, args: SamplingArguments) -> dict[Path, str]:
    """Return the files that belong to a video, each with a description for messages.

    The description is used if the file is found without the video.
    """
    if args.only_save_latents:
        return {}
    return {
        record_path(video): "the record of a video that does not",
        kept_path(video): f"latents that {as_started('tools/decode_latents.py')} turns into the video",
    }


def refine_videos(videos: Sequence[PlannedVideo]) -> list[PlannedVideo]:
    """Return the videos with prompts refined by a language model, where that succeeds.

    The paths and seeds stay those of the original prompts, so that another run finds the same files.

    Raises:
        UserError: the language model cannot be used at all.
    """
    requests = {video.request.index: video.request for video in videos}
    logger.info("refining %d prompts", len(requests))
    prompts = [Prompt(request.text, request.image) for request in requests.values()]
    texts = dict(zip(requests, refine(prompts, Endpoint.from_environment()), strict=True))
    for index, text in texts.items():
        if text is not None:
            logger.info("prompt %d is now: %s", index + 1, text)
            requests[index] = replace(requests[index], text=text)
    return [
        video
        if (request := requests[video.request.index]).text == video.request.text
        else replace(video, request=request, original_prompt=video.request.text)
        for video in videos
    ]
