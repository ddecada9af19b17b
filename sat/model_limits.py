"""What a model can take, read off its configuration, so that a wrong request is refused before anything is loaded."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sgm.errors import UserError

SPACE_FACTOR = 8  # pixels per latent along height and width, of the 3D VAE


def patch_sizes(patch_size: int | Sequence[int]) -> tuple[int, int, int]:
    """Patch along (frames, height, width): `2` (CogVideoX 1.0) means (1, 2, 2), no patching of time; 1.5 gives all."""
    return (1, patch_size, patch_size) if isinstance(patch_size, int) else tuple(patch_size)


@dataclass(frozen=True)
class ModelLimits:
    """Sizes in latents, as (frames, height, width)."""

    patch: tuple[int, int, int]
    largest: tuple[int, int, int]
    in_channels: int
    latent_channels: int

    @classmethod
    def from_config(cls, model_config: Mapping[str, Any]) -> "ModelLimits":
        """Read the limits from the `model:` section of a configuration.

        Raises:
            UserError: a number that they follow from is missing or is none.
        """
        params = (model_config.get("network_config") or {}).get("params")
        if not isinstance(params, Mapping):
            raise UserError("model.network_config.params is missing")

        def number(name: str) -> int:
            return _positive(params.get(name), name)

        size = params.get("patch_size")
        if not (isinstance(size, list) and len(size) == 3):
            size = number("patch_size")
        patch = tuple(_positive(side, "patch_size") for side in patch_sizes(size))
        table_frames = (number("num_frames") - 1) // number("time_compressed_rate") + 1
        return cls(
            patch=patch,
            largest=(table_frames * patch[0], number("latent_height"), number("latent_width")),
            in_channels=number("in_channels"),
            latent_channels=number("out_channels"),
        )

    @property
    def image_to_video(self) -> bool:
        return self.in_channels == 2 * self.latent_channels

    @property
    def extra_frames(self) -> int:
        """Leading latent frames that are sampled only to fill the first patch in time, and dropped."""
        return self.patch[0] - 1

    def check_clip(self, latent_frames: int, height: int, width: int) -> None:
        """Raises UserError unless the model can sample `latent_frames` of `height`×`width` pixels."""
        o, p, q = self.patch
        frames_limit, *latent_limits = self.largest
        decoded = latent_frames - self.extra_frames
        if latent_frames % o or decoded % 2 == 0 or not 1 <= decoded <= frames_limit:
            # The first of an odd number of latent frames is one frame of video; an even number has no such frame.
            kind = "an odd number" if o == 1 else "an even number"
            fits = f"{kind} of latent frames up to {frames_limit}"
            raise UserError(f"sampling_num_frames is {latent_frames}; this model takes {fits}")
        for name, pixels, patch, limit in zip(("height", "width"), (height, width), (p, q), latent_limits, strict=True):
            step, most = SPACE_FACTOR * patch, SPACE_FACTOR * limit
            if pixels % step or not step <= pixels <= most:
                nearest = min(max(round(pixels / step) * step, step), most)
                raise UserError(
                    f"sampling_image_size: {name} {pixels} does not fit; "
                    f"this model takes multiples of {step} up to {most}, for example {nearest}"
                )

    def check_mode(self, image_to_video: bool, latent_channels: int) -> None:
        """Raises UserError unless the model is of the kind that the arguments ask for."""
        if image_to_video and not self.image_to_video:
            raise UserError("image2video is on, but this is a text-to-video model: use an '_i2v' configuration")
        if self.image_to_video and not image_to_video:
            raise UserError("this is an image-to-video model: set image2video: true and give prompts as prompt@@image")
        if latent_channels != self.latent_channels:
            raise UserError(f"latent_channels is {latent_channels}; this model has {self.latent_channels}")


def _positive(value: Any, name: str) -> int:
    if type(value) is not int or value < 1:
        raise UserError(f"model.network_config.params.{name} is {value!r}; expected a positive whole number")
    return value
