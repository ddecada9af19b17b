"""What a sampling session is opened with, what it is asked for, and what it answers."""

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, field

import torch
from torch import Tensor

from cogvideox_sat.configuration.model_limits import ModelLimits
from cogvideox_sat.configuration.request_fields import LARGEST_SEED
from cogvideox_sat.configuration.sampler_knobs import NO_KNOBS, SamplerKnobs
from cogvideox_sat.configuration.settings import EngineSettings
from sgm.errors import UserError, shown


@dataclass(frozen=True)
class SessionSettings(EngineSettings):
    """The model of a session, see `EngineSettings`, and where it runs.

    All processes that share a network (`model_parallel_size`) or a video (`processes_per_video`) make the same calls.

    Args:
        device: cpu, cuda or cuda:N; None: a GPU if there is one.
        offload: what leaves the device to make room. `none`: nothing, weights are read once. `stage`: all parts but
            the one in use, which are read again when their turn comes. `sequential`: as well the idle layers of the
            network, which stay in host memory.
        processes_per_video, guidance_parallel, sequence_parallel: how processes share the work on a video; see
            `configuration.video_layout.plan_layout`.
    """

    _: KW_ONLY
    device: str | None = None
    offload: str = "none"
    model_parallel_size: int = 1
    processes_per_video: int | None = None
    guidance_parallel: bool | None = None
    sequence_parallel: int | None = None


@dataclass(frozen=True, eq=False)
class SampleRequest:
    """One video to sample.

    Args:
        seed: from 0 to 2^63 - 1; equal requests of equal seeds give equal latents.
        size: (height, width) in pixels.
        frames: length in latent frames: `4 (n - 1) + 1` frames of video for `n` of them; 1.5 models take one more.
        negative_prompt: what guidance steers away from.
        image: the first frame (3, height, width) in [-1, 1], RGB, for image-to-video models; or a function that
            returns it, called when its turn comes, so that many requests hold no image each.
        steps: sampling steps; None: the sampler's own number.
        fps: frames a second at which the video is to be shown. No number of it depends on that.
        knobs: what is changed of the configured sampler. No weights are read for that.
    """

    prompt: str
    seed: int
    size: tuple[int, int]
    frames: int
    negative_prompt: str = ""
    image: Tensor | Callable[[], Tensor] | None = None
    steps: int | None = None
    fps: int = 8
    knobs: SamplerKnobs = NO_KNOBS

    def check(self, limits: ModelLimits) -> None:
        """Check that a model of such limits can sample the request, else raise UserError.

        An image that a function will return is checked when it does.
        """
        for name in ("prompt", "negative_prompt"):
            if not isinstance(value := getattr(self, name), str):
                raise UserError(f"{name} is {shown(value)}; expected text")
        whole = {"seed": (0, LARGEST_SEED), "frames": (1, None), "fps": (1, None)}
        if self.steps is not None:
            whole["steps"] = (1, None)
        for name, (least, most) in whole.items():
            value = getattr(self, name)
            if type(value) is not int or value < least or (most is not None and value > most):
                fits = f"from {least} to 2^63 - 1" if most else f"of at least {least}"
                raise UserError(f"{name} is {shown(value)}; expected a whole number {fits}")
        if not (isinstance(self.size, tuple) and [type(side) for side in self.size] == [int, int]):
            raise UserError(f"size is {shown(self.size)}; expected (height, width) in pixels")
        limits.check_clip(self.frames, *self.size, names=("frames", "size"))
        if limits.image_to_video != (self.image is not None):
            kind, remedy = ("an image", "give") if limits.image_to_video else ("a text", "leave out")
            raise UserError(f"image: this is {kind}-to-video model; {remedy} the first frame")
        if isinstance(self.image, Tensor):
            self.check_image(self.image)

    def check_image(self, image: Tensor) -> None:
        """Check that an image is a first frame of the request's size, else raise UserError."""
        expected = (3, *self.size)
        if tuple(image.shape) != expected or not image.is_floating_point():
            raise UserError(
                f"image: it is {str(image.dtype).removeprefix('torch.')} of shape {tuple(image.shape)}; expected "
                f"floating-point numbers of shape {expected}"
            )
        if not torch.isfinite(image).all() or image.abs().max() > 1.001:  # what rounding in float16 may add
            raise UserError("image: its values are not in [-1, 1]; scale them")

    def load_image(self) -> Tensor | None:
        """Return the first frame (3, height, width) in [-1, 1]; None: there is none."""
        if self.image is None or isinstance(self.image, Tensor):
            return self.image
        image = self.image()
        self.check_image(image)
        return image


# ---------------------------------------------------------------------------------------------------------------------
# Answers, in the order in which they come
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Encoded:
    """A condition of the video is encoded; `what` is prompt, or image."""

    what: str


@dataclass(frozen=True)
class Progress:
    """`step` of `steps` sampling steps are done, from 1. A sampler of the user's own without `callback` tells none.

    Attributes:
        denoised: the present estimate of `Latents.latents`, on the session's device: a tensor of the sampler's own,
            which must not be changed. Nothing is computed or copied for it. None: the sampler does not tell it.
    """

    step: int
    steps: int
    denoised: Tensor | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True, eq=False)
class Latents:
    """The video is sampled: `latents` (1, t, c, h, w), scaled, on the CPU, without the leading frame that 1.5 models
    add. Whoever needs no pixels closes the iterator here."""

    latents: Tensor


@dataclass(frozen=True, eq=False)
class Frames:
    """The next frames of the video: `frames` (t, 3, height, width) in about [-1, 1], RGB, on the session's device."""

    frames: Tensor


@dataclass(frozen=True, eq=False)
class Result:
    """The video is complete.

    Attributes:
        latents: see `Latents`.
        request: what made it, with what the request had left open. The same request makes the video again, in a
            session of the same settings.
    """

    latents: Tensor
    request: SampleRequest


SampleEvent = Encoded | Progress | Latents | Frames | Result
