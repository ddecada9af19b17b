"""Settle the values of a request, and check that the model takes them."""

from arguments import SamplingArguments
from cogvideox_sat.configuration.frame_sizes import size_from_image, size_of_image
from cogvideox_sat.configuration.model_limits import ModelLimits
from cogvideox_sat.configuration.request_fields import check_strength
from cogvideox_sat.configuration.sampler_knobs import SamplerKnobs, changed_sampler, check_steps
from cogvideox_sat.sampling.input_files import frames_of_video
from cogvideox_sat.sampling.prompt_requests import PromptRequest
from sgm.errors import UserError


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


def check_request(request: PromptRequest, args: SamplingArguments, where: str) -> None:
    """Check that the model can make the videos of a request.

    Args:
        args: arguments of the run, which fill in what the request leaves open.

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
        check_inputs(request, args, limits, frames)
        changed_sampler(args.model_config["sampler_config"], knobs_of(request, args))
        check_steps(args.model_config["sampler_config"], request.steps, "steps")
    except UserError as error:
        raise UserError(f"{where}{error}") from error


def check_inputs(request: PromptRequest, args: SamplingArguments, limits: ModelLimits, frames: int) -> None:
    """Check that a model of the given limits can use the pictures and clip of a request.

    Args:
        frames: length of a window in latent frames.

    Raises:
        UserError: it cannot.
    """
    check_strength(request.strength, request.video is not None)
    if request.keyframes and not limits.image_to_video:
        raise UserError("keyframes: this is a text-to-video model; use an '_i2v' configuration")
    numbers = [key_frame.at for key_frame in request.keyframes]
    limits.key_frame_places(numbers, frames, first=request.image is not None)
    if request.extend:
        limits.check_window(frames)
        if args.only_save_latents:
            raise UserError("extend: windows continue decoded frames; leave out only_save_latents")
