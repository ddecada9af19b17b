"""The request for one video, as a prompt file, the terminal or a call gives it."""

from dataclasses import dataclass
from pathlib import Path

from cogvideox_sat.configuration.model_limits import ModelLimits
from cogvideox_sat.configuration.sampler_knobs import SamplerKnobs
from cogvideox_sat.sampling.input_files import KeyFrameFile
from sgm.seeds import derive_seed


@dataclass(frozen=True)
class PromptRequest:
    """One video to sample; a field that is None takes the value of the run's arguments.

    Args:
        index: line number in a text file, or number of the prompt in a .jsonl file or on the terminal, counted from 0.
            The output folder is named after it, and the seed is derived from it.
        image: the first frame, for image-to-video models.
        seed: overrides the seed that `request_seed` derives from the run's seed.
        num_frames: length in latent frames, as in `sampling_num_frames`.
        size: (height, width) of the video in pixels, as in `sampling_image_size`.
        frames: length in frames, in place of `num_frames`.
        fps: frames per second of the file.
        steps: sampling steps.
        sampler, guidance_scale, guidance_interval, guidance_schedule: see `SamplerKnobs`.
        keyframes: pictures for other frames, for image-to-video models.
        video: the clip that sampling starts from. With `extend` and without `strength`: the clip that is continued.
        strength: share of the steps that is sampled from the noised clip.
        extend: number of further windows, or their prompts.
    """

    index: int
    text: str
    negative_prompt: str = ""
    image: Path | None = None
    seed: int | None = None
    num_frames: int | None = None
    size: tuple[int, int] | None = None
    frames: int | None = None
    fps: int | None = None
    steps: int | None = None
    sampler: str | None = None
    guidance_scale: float | None = None
    guidance_interval: tuple[float, float] | None = None
    guidance_schedule: str | None = None
    keyframes: tuple[KeyFrameFile, ...] = ()
    video: Path | None = None
    strength: float | None = None
    extend: int | tuple[str, ...] | None = None

    @property
    def windows(self) -> tuple[str, ...]:
        """Return the prompts of the further windows."""
        return (self.text,) * self.extend if isinstance(self.extend, int) else self.extend or ()

    @property
    def goes_on(self) -> bool:
        """Return whether the clip is kept unchanged and continued."""
        return bool(self.extend) and self.video is not None and self.strength is None

    def latent_frames(self, limits: ModelLimits) -> int | None:
        """Return the length in latent frames, or None for the length of the whole run.

        Raises:
            UserError: the model cannot make a video of `frames` frames.
        """
        return self.num_frames if self.frames is None else limits.latent_frames(self.frames)

    @property
    def knobs(self) -> SamplerKnobs:
        """Return the request's changes to the sampler."""
        return SamplerKnobs.of(self)


def request_seed(base_seed: int, request: PromptRequest) -> int:
    """Return the seed of a request: its own, or one derived from the run's seed."""
    return derive_seed(base_seed, request.index) if request.seed is None else request.seed
