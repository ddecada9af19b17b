"""Plan a sampling run: read, check and name its videos before PyTorch is imported.

Under a launcher, every process plans the whole run, so that all of them stop at an error. The videos are distributed
over the processes later, when all processes have planned and none has written yet.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from arguments import SamplingArguments
from cogvideox_sat.commands.input_paths import required_input
from cogvideox_sat.files.output_paths import check_folder, check_sheet
from cogvideox_sat.sampling.input_files import KeyFrameFile, key_frame_files
from cogvideox_sat.sampling.model_arguments import check_model_arguments
from cogvideox_sat.sampling.planned_videos import PlannedVideo, outputs, plan_videos
from cogvideox_sat.sampling.prompt_files import read_prompts
from cogvideox_sat.sampling.prompt_requests import PromptRequest
from cogvideox_sat.sampling.request_checks import check_request
from sgm.errors import UserError, shown


class SamplingPlan(NamedTuple):
    """The result of planning a run.

    Attributes:
        videos: the videos to make.
        files: each prompt with its file, including files that exist and are kept.
    """

    videos: list[PlannedVideo]
    files: list[tuple[str, Path]]


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
        has_inputs = bool(args.keyframes) or args.video is not None
        requests = read_prompts(args.input_file, None if args.image2video and has_inputs else args.image2video)
    except UserError as error:
        raise UserError(f"input_file: {error}") from error
    requests = [with_inputs_of_run(request, args) for request in requests]
    for request in requests:
        check_request(request, args, f"{args.input_file}, prompt {request.index + 1}: ")
    files = [output for request in requests for output in outputs(request, args)]
    return SamplingPlan(plan_videos(requests, args), files)


def with_inputs_of_run(request: PromptRequest, args: SamplingArguments) -> PromptRequest:
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


def plan_repetition(args: SamplingArguments) -> SamplingPlan:
    """Return the plan for the video that a record describes.

    The video gets the same folder name as before, within `output_dir`.

    Args:
        args: arguments with a `record`, whose values they have already taken over.

    Raises:
        UserError: the record's image does not fit the model or does not exist, or the output exists.
    """
    record = args.record
    image = record["image"] and Path(record["image"]["path"])
    key_frames = tuple(KeyFrameFile(Path(entry["path"]), entry["at"]) for entry in record["keyframes"])
    clip = record["video_from"] and Path(record["video_from"]["path"])
    has_pictures = image is not None or bool(key_frames)
    if has_pictures != args.image2video and not (args.image2video and clip is not None):
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
