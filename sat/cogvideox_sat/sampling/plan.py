"""Plan a sampling run: read, check and name its videos before PyTorch is imported.

Under a launcher, every process plans the whole run, so that all of them stop at an error. The videos are distributed
over the processes later, when all processes have planned and none has written yet.
"""

import logging
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from arguments import SamplingArguments
from cogvideox_sat.commands.input_paths import required_input
from cogvideox_sat.commands.program_names import as_started
from cogvideox_sat.configuration.files import check_paths
from cogvideox_sat.configuration.frame_sizes import size_from_image, size_of_image, warn_of_crop
from cogvideox_sat.configuration.model_limits import ModelLimits, check_offload, check_sharing
from cogvideox_sat.configuration.model_values import check_model_values, check_parameters
from cogvideox_sat.configuration.sampler_knobs import NO_KNOBS, SamplerKnobs, changed_sampler, check_steps
from cogvideox_sat.configuration.video_layout import check_world, layout_of
from cogvideox_sat.configuration.video_records import kept_path, record_path
from cogvideox_sat.files.output_paths import check_folder, check_sheet, decide_existing, output_path
from cogvideox_sat.latent_geometry import CONTEXT_FRAMES
from cogvideox_sat.sampling.prompt_files import read_prompts
from cogvideox_sat.sampling.prompt_refinement import Endpoint, Prompt, refine
from cogvideox_sat.sampling.prompt_requests import PromptRequest, request_seed
from cogvideox_sat.sampling.shown_files import KeyFrameFile, frames_of_video, key_frame_files, video_facts
from sgm.errors import UserError, shown
from sgm.seeds import derive_seed

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PlannedVideo:
    """One video to make.

    Args:
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


class SamplingPlan(NamedTuple):
    """The videos to make, and all prompts with their files, including existing files."""

    videos: list[PlannedVideo]
    shown: list[tuple[str, Path]]


def plan_run(args: SamplingArguments) -> SamplingPlan | None:
    """Return the plan for the prompts of the input file; None if prompts will be typed.

    Raises:
        UserError: the model cannot make what is asked, a required file is missing, or an output exists.
    """
    check_model_arguments(args)
    check_folder(args.output_dir)
    if args.contact_sheet is not None:
        check_sheet(args.contact_sheet)
    if args.input_type == "cli":
        return None
    if args.record is not None:
        return plan_repetition(args)
    if args.input_file is None:
        raise UserError("input_file: missing; name a file of prompts")
    try:
        # The arguments of the whole run may give the picture that an image-to-video model needs.
        shows = bool(args.keyframes) or args.video is not None
        requests = read_prompts(args.input_file, None if args.image2video and shows else args.image2video)
    except UserError as error:
        raise UserError(f"input_file: {error}") from error
    requests = [with_shown(request, args) for request in requests]
    for request in requests:
        check_request(request, args, f"{args.input_file}, prompt {request.index + 1}: ")
    shown = [output for request in requests for output in outputs(request, args)]
    return SamplingPlan(plan_videos(requests, args), shown)


def with_shown(request: PromptRequest, args: SamplingArguments) -> PromptRequest:
    """Return a request with the run's pictures and clip where it names none itself.

    Raises:
        UserError: a file that the arguments name does not exist.
    """
    changes: dict[str, Any] = {}
    if request.video is None and args.video is not None:
        changes["video"] = required_input(args.video, "video")
    if not request.keyframes and args.keyframes:
        changes["keyframes"] = key_frame_files(args.keyframes, lambda name: required_input(name, "keyframes"))
    for name in ("strength", "extend"):
        if getattr(request, name) is None and getattr(args, name) is not None:
            changes[name] = getattr(args, name)
    return replace(request, **changes)


def check_model_arguments(args: SamplingArguments) -> None:
    """Check the configuration of the model, and that the model fits the run's arguments.

    Raises:
        UserError: the configuration is invalid, the model cannot do what is asked, or a required file is missing.
    """
    check_model_values(args.model_config, args.sources)
    limits = ModelLimits.from_config(args.model_config)
    limits.check_mode(args.image2video, args.latent_channels)
    limits.check_clip(args.sampling_num_frames, *args.sampling_image_size)
    check_combinations(args)
    check_paths({"args": {"load": args.load, "lora_load": args.lora_load}, "model": args.model_config})
    check_parameters({"model": args.model_config}, args.sources)
    changed_sampler(args.model_config["sampler_config"], SamplerKnobs.of(args))
    name = "sampling_num_steps" if args.steps is None else "steps"
    check_steps(args.model_config["sampler_config"], args.sampling_num_steps, name)


def plan_repetition(args: SamplingArguments) -> SamplingPlan:
    """Return the plan for the video that a record describes.

    The video gets the same folder name as before, within `output_dir`.

    Raises:
        UserError: the record's image does not fit the model or does not exist, or the output exists.
    """
    record = args.record
    image = record["image"] and Path(record["image"]["path"])
    key_frames = tuple(KeyFrameFile(Path(entry["path"]), entry["at"]) for entry in record["keyframes"])
    clip = record["video_from"] and Path(record["video_from"]["path"])
    told = image is not None or bool(key_frames)
    if told != args.image2video and not (args.image2video and clip is not None):
        kind = "an image" if args.image2video else "a text"
        raise UserError(f"{record.path}: image is {shown(record['image'])}, but this is {kind}-to-video model")
    files = [("image", image), ("video_from", clip), *(("keyframes", key_frame.path) for key_frame in key_frames)]
    for name, file in files:
        if file is not None and not file.is_file():
            raise UserError(
                f"{record.path}: {name}: {file} does not exist; put it back, or write its new path into the record"
            )
    original = record["original_prompt"]
    height, width = args.sampling_image_size
    request = PromptRequest(
        record["index"],
        record["prompt"] if original is None else original,
        image=image,
        seed=args.seed,
        num_frames=args.sampling_num_frames,
        size=(height, width),
        keyframes=key_frames,
        video=clip,
        strength=record["strength"],
        extend=tuple(record["extend"]) or None,
    )
    sampled = replace(request, text=record["prompt"])
    videos = [replace(video, request=sampled, original_prompt=original) for video in plan_videos([request], args)]
    return SamplingPlan(videos, outputs(request, args))


def check_combinations(args: SamplingArguments) -> None:
    """Check that the arguments fit the model and the way the command was started.

    Raises:
        UserError: they do not.
    """
    check_sharing(args.model_config, args.model_parallel_size, args.lora_load)
    check_world(layout_of(args), int(os.environ.get("WORLD_SIZE", "1")))
    first_stage = args.model_config["first_stage_config"].get("params")
    if not isinstance(first_stage, dict) or not (first_stage.get("ckpt_path") or args.force_inference):
        raise UserError("model.first_stage_config.params.ckpt_path: missing; name the weights of the VAE")
    check_offload(args.offload)
    if args.input_type == "cli" and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(
            "input_type: prompts are typed into one process; start it without torchrun, or give an input_file"
        )
    if args.refine_prompts:
        Endpoint.from_environment()  # raises at once, not after minutes of loading


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
            tell_size(request, videos[-1].size, args)
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


def check_request(request: PromptRequest, args: SamplingArguments, where: str) -> None:
    """Check that the model can make the videos of a request.

    Raises:
        UserError: it cannot; the message begins with `where`.
    """
    try:
        limits = ModelLimits.from_config(args.model_config)
        names = (
            "sampling_num_frames" if request.num_frames is None else "num_frames",
            "sampling_image_size" if request.size is None else "size",
        )
        frames = latent_frames(request, args)
        limits.check_clip(frames, *video_size(request, args), names=names)
        check_shown(request, args, limits, frames)
        changed_sampler(args.model_config["sampler_config"], knobs_of(request, args))
        check_steps(args.model_config["sampler_config"], request.steps, "steps")
    except UserError as error:
        raise UserError(f"{where}{error}") from error


def check_shown(request: PromptRequest, args: SamplingArguments, limits: ModelLimits, frames: int) -> None:
    """Check that a model of the given limits can use the pictures and clip of a request.

    Args:
        frames: length of a window in latent frames.

    Raises:
        UserError: it cannot.
    """
    if request.strength is not None and request.video is None:
        raise UserError("strength: `video` is missing; give `video` too, or leave out `strength`")
    if request.keyframes and not limits.image_to_video:
        raise UserError("keyframes: this is a text-to-video model; use an '_i2v' configuration")
    numbers = [key_frame.at for key_frame in request.keyframes]
    limits.key_frame_places(numbers, frames, first=request.image is not None)
    if request.extend:
        window = limits.video_frames(frames)
        if window <= CONTEXT_FRAMES:
            raise UserError(f"extend: a window has {window} frames; expected more than {CONTEXT_FRAMES}")
        if args.only_save_latents:
            raise UserError("extend: windows continue decoded frames; leave out only_save_latents")


def video_size(request: PromptRequest, args: SamplingArguments) -> tuple[int, int]:
    """Return (height, width) of a request's videos: its own, its image's, or the run's."""
    if request.size is None and args.size_from_image and request.image and (image := size_of_image(request.image)):
        return size_from_image(image, ModelLimits.from_config(args.model_config))
    height, width = request.size or args.sampling_image_size
    return height, width


def latent_frames(request: PromptRequest, args: SamplingArguments) -> int:
    """Return the length of a request's videos in latent frames.

    It is the request's own length, else that of the whole run, reduced to what the clip has if sampling starts from a
    clip.

    Raises:
        UserError: the model cannot make a video of this length.
    """
    limits = ModelLimits.from_config(args.model_config)
    if frames := request.latent_frames(limits):
        return frames
    if request.video is None or request.goes_on:
        return args.sampling_num_frames
    return frames_of_video(request.video, request.fps or args.sampling_fps, args.sampling_num_frames, limits)


def knobs_of(request: PromptRequest, args: SamplingArguments) -> SamplerKnobs:
    """Return the changes to the sampler: those of the request over those of the run."""
    return request.knobs.over(SamplerKnobs.of(args))


def tell_size(request: PromptRequest, size: tuple[int, int], args: SamplingArguments) -> None:
    """Log a size that follows from an image, and warn if much of the image is cut away."""
    image = size_of_image(request.image) if request.image else None
    if request.video is not None and (facts := video_facts(request.video)) is not None:
        name = f"prompt {request.index + 1}, {request.video}"
        warn_of_crop(name, (facts.height, facts.width), size, "size sets another one")
    if image is None:
        return
    name = f"prompt {request.index + 1}, {request.image}"
    if args.size_from_image and request.size is None:
        logger.info("%s: the video has %dx%d pixels (height x width), which follows from the image", name, *size)
    warn_of_crop(name, image, size, "sampling_image_size, or size in a .jsonl file, sets another one")


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


def outputs(request: PromptRequest, args: SamplingArguments) -> list[tuple[str, Path]]:
    """Return the prompt with each of the files that are made for it."""
    paths = [output_path(args.output_dir, request.index, request.text, sample) for sample in range(args.batch_size)]
    return [(request.text, path.with_suffix(".safetensors") if args.only_save_latents else path) for path in paths]


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
