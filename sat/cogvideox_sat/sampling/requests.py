"""The settings of a sampling session, its requests, and the events that answer them."""

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Any, Self, TypeAlias

import torch
from torch import Tensor

from cogvideox_sat.configuration.adapter_lists import path_and_weight
from cogvideox_sat.configuration.model_limits import ModelLimits
from cogvideox_sat.configuration.request_fields import LARGEST_SEED, check_strength
from cogvideox_sat.configuration.sampler_knobs import NO_KNOBS, SamplerKnobs
from cogvideox_sat.configuration.settings import EngineSettings
from cogvideox_sat.latent_geometry import CONTEXT_FRAMES, TIME_FACTOR
from sgm.errors import UserError, shown

STRENGTH = 0.8  # default strength of a video that starts from a clip

PixelSource: TypeAlias = Tensor | Callable[[], Tensor]


@dataclass(frozen=True)
class SessionSettings(EngineSettings):
    """The model of a session (see `EngineSettings`), and where it runs.

    All processes that share a network (`model_parallel_size`) or a video (`processes_per_video`) make the same calls.

    Args:
        device: cpu, cuda or cuda:N; None: a GPU if the machine has one.
        offload: what leaves the device to make room. `none`: nothing; weights are read once. `stage`: all parts but the
            one in use; they are read again when needed. `sequential`: in addition, the idle layers of the network,
            which stay in host memory.
        adapters: paths of adapters with their strengths. They are applied without merging; `model_config` must then
            describe no adapter.
        processes_per_video, guidance_parallel, sequence_parallel: how processes share the work on a video; see
            `configuration.video_layout.plan_layout`.
    """

    _: KW_ONLY
    device: str | None = None
    offload: str = "none"
    model_parallel_size: int = 1
    adapters: tuple[tuple[str | Path, float], ...] = ()
    processes_per_video: int | None = None
    guidance_parallel: bool | None = None
    sequence_parallel: int | None = None

    @classmethod
    def of_command(cls, args: Any) -> Self:
        """Return the settings that follow from the arguments of the command."""
        adapters = tuple((str(path), weight) for path, weight in map(path_and_weight, args.lora))
        return cls.from_args(args, adapters=adapters)


@dataclass(frozen=True, eq=False)
class KeyFrame:
    """A picture for one frame of the video.

    Args:
        image: (3, height, width) in [-1, 1], RGB, or a function that returns it and is called when it is needed.
        at: number of the frame, from 0. Negative numbers count from the end; -1 is the last frame.
    """

    image: PixelSource
    at: int


@dataclass(frozen=True, eq=False)
class SampleRequest:
    """One video to sample.

    Pictures and clips are tensors in [-1, 1], RGB, or functions that return such tensors. Functions are called when the
    pixels are needed, so that many waiting requests take no memory.

    Args:
        seed: from 0 to 2^63 - 1; equal requests with equal seeds give equal latents.
        size: (height, width) in pixels.
        frames: length in latent frames; n of them give `4 (n - 1) + 1` frames of video. 1.5 models take one more.
        negative_prompt: text that guidance steers away from.
        image: the first frame (3, height, width), for image-to-video models.
        steps: sampling steps; None: the sampler's own number.
        fps: frames per second at which the video will be shown. It does not change any computed value.
        knobs: changes to the configured sampler. They need no weights to be read again.
        key_frames: other frames, for image-to-video models; two of them cannot lie in the same latent frame.
        video: a clip (frames of the video, 3, height, width) that sampling starts from. With `extend` and without
            `strength`, the clip may have any length from `CONTEXT_FRAMES`; it is kept unchanged and continued.
        strength: share of the steps that is sampled from the noised clip; 1 keeps nothing of the clip. None:
            `STRENGTH`.
        context: a clip (4k + 1 frames, 3, height, width) with which the video begins. It needs a network that was
            trained to continue clips (`fixed_frames`).
        extend: prompts of further windows; each window continues the last `CONTEXT_FRAMES` frames before it.
    """

    prompt: str
    seed: int
    size: tuple[int, int]
    frames: int
    negative_prompt: str = ""
    image: PixelSource | None = None
    steps: int | None = None
    fps: int = 8
    knobs: SamplerKnobs = NO_KNOBS
    key_frames: tuple[KeyFrame, ...] = ()
    video: PixelSource | None = None
    strength: float | None = None
    context: PixelSource | None = None
    extend: tuple[str, ...] = ()

    @property
    def goes_on(self) -> bool:
        """Return whether a clip is continued, rather than used as the start of sampling."""
        return bool(self.extend) and self.video is not None and self.strength is None

    @property
    def share(self) -> float:
        """Return the share of the steps that is sampled from a noised clip."""
        return STRENGTH if self.strength is None else self.strength

    @property
    def shows(self) -> str | None:
        """Return what is encoded besides the prompt: `image`, `video`, or None for nothing."""
        if self.image is not None or self.key_frames:
            return "image"
        return "video" if self.video is not None or self.context is not None else None

    def check(self, limits: ModelLimits) -> None:
        """Check that a model of the given limits can sample the request, else raise UserError.

        The results of functions are checked when the functions are called.
        """
        for name in ("prompt", "negative_prompt"):
            if not isinstance(value := getattr(self, name), str):
                raise UserError(f"{name}: got {shown(value)}; expected text")
        whole = {"seed": (0, LARGEST_SEED), "frames": (1, None), "fps": (1, None)}
        if self.steps is not None:
            whole["steps"] = (1, None)
        for name, (least, most) in whole.items():
            value = getattr(self, name)
            if type(value) is not int or value < least or (most is not None and value > most):
                fits = f"from {least} to 2^63 - 1" if most else f"of at least {least}"
                raise UserError(f"{name}: got {shown(value)}; expected a whole number {fits}")
        if not (isinstance(self.size, tuple) and [type(side) for side in self.size] == [int, int]):
            raise UserError(f"size: got {shown(self.size)}; expected (height, width) in pixels")
        limits.check_clip(self.frames, *self.size, names=("frames", "size"))
        self._check_key_frames(limits)
        self._check_clips(limits)

    def _check_key_frames(self, limits: ModelLimits) -> None:
        has_pictures = self.image is not None or bool(self.key_frames)
        if limits.image_to_video != has_pictures and not (self.goes_on and not has_pictures):
            kind, remedy = ("an image", "give") if limits.image_to_video else ("a text", "leave out")
            name = "keyframes" if self.key_frames and self.image is None else "image"
            raise UserError(f"{name}: this is {kind}-to-video model; {remedy} the first frame")
        if isinstance(self.image, Tensor):
            self.check_image(self.image)
        limits.key_frame_places([key.at for key in self.key_frames], self.frames, first=self.image is not None)
        for key_frame in self.key_frames:
            if isinstance(key_frame.image, Tensor):
                self.check_image(key_frame.image, "keyframes")

    def _check_clips(self, limits: ModelLimits) -> None:
        strength = self.strength
        if strength is not None and (type(strength) not in (int, float) or not 0 <= strength <= 1):
            raise UserError(f"strength: got {shown(strength)}; expected a number from 0 to 1")
        check_strength(strength, self.video is not None)
        if not (isinstance(self.extend, tuple) and all(isinstance(prompt, str) for prompt in self.extend)):
            raise UserError(f"extend: got {shown(self.extend)}; expected a tuple of prompts")
        if self.extend:
            limits.check_window(self.frames)
        frames = limits.video_frames(self.frames)
        for name in ("video", "context"):
            if isinstance(clip := getattr(self, name), Tensor):
                self._check_clip(name, clip, frames)

    def _check_clip(self, name: str, clip: Tensor, frames: int) -> None:
        """Check a clip for a video of `frames` frames."""
        self._check_pixels(name, clip, (len(clip), 3, *self.size))
        count = len(clip)
        if name == "context":
            fits, expected = count % TIME_FACTOR == 1 and count < frames, f"{TIME_FACTOR}k + 1, fewer than {frames}"
        elif self.goes_on:
            fits, expected = count >= CONTEXT_FRAMES, f"at least {CONTEXT_FRAMES}"
        else:
            fits, expected = count == frames, str(frames)
        if not fits:
            raise UserError(f"{name}: the clip has {count} frames; expected {expected}")

    def check_image(self, image: Tensor, name: str = "image") -> None:
        """Check that an image is a frame of the request's size, else raise UserError."""
        self._check_pixels(name, image, (3, *self.size))

    def _check_pixels(self, name: str, pixels: Tensor, expected: tuple[int, ...]) -> None:
        if tuple(pixels.shape) != expected or not pixels.is_floating_point():
            raise UserError(
                f"{name}: got {str(pixels.dtype).removeprefix('torch.')} of shape {tuple(pixels.shape)}; expected "
                f"floating-point numbers of shape {expected}"
            )
        if not torch.isfinite(pixels).all() or pixels.abs().max() > 1.001:  # 0.001 for rounding in float16
            raise UserError(f"{name}: values lie outside [-1, 1]; scale them to [-1, 1]")

    def load_key_frames(self, limits: ModelLimits) -> dict[int, Tensor]:
        """Return the pictures (3, height, width), by the latent frame to which each belongs."""
        first = () if self.image is None else (KeyFrame(self.image, 0),)
        key_frames = (*first, *self.key_frames)
        places = limits.key_frame_places([key.at for key in key_frames], self.frames, first=False)
        pictures = {}
        for place, key_frame in zip(places, key_frames, strict=True):
            picture = key_frame.image if isinstance(key_frame.image, Tensor) else key_frame.image()
            self.check_image(picture, "image" if key_frame in first else "keyframes")
            pictures[place] = picture
        return pictures

    def load_clip(self, name: str, limits: ModelLimits) -> Tensor | None:
        """Return the clip `video` or `context` (frames, 3, height, width), None if not given."""
        clip = getattr(self, name)
        if clip is None or isinstance(clip, Tensor):
            return clip
        clip = clip()
        self._check_clip(name, clip, limits.video_frames(self.frames))
        return clip


# ---------------------------------------------------------------------------------------------------------------------
# Events, in the order in which they occur
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Encoded:
    """An input is encoded; `what` is "prompt", or the value of the request's `shows`."""

    what: str


@dataclass(frozen=True)
class Progress:
    """`step` of `steps` sampling steps are done; steps count from 1.

    A user's own sampler that takes no `callback` reports no progress.

    Attributes:
        denoised: the current estimate of `Latents.latents`, on the session's device. It is the sampler's own tensor,
            which must not be changed; nothing is computed or copied for it. None: the sampler does not report it.
    """

    step: int
    steps: int
    denoised: Tensor | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True, eq=False)
class Latents:
    """The video is sampled: `latents` (1, t, c, h, w), scaled, on the CPU.

    The leading frame that 1.5 models add is removed. A caller that needs no pixels closes the iterator here.
    """

    latents: Tensor


@dataclass(frozen=True, eq=False)
class Frames:
    """The next frames of the video: `frames` (t, 3, height, width), RGB.

    The values are approximately in [-1, 1], on the session's device.
    """

    frames: Tensor


@dataclass(frozen=True, eq=False)
class Result:
    """The video is complete.

    Attributes:
        latents: see `Latents`.
        request: the request with all defaults filled in. The same request makes the same video again in a session with
            the same settings.
    """

    latents: Tensor
    request: SampleRequest


SampleEvent = Encoded | Progress | Latents | Frames | Result
