"""Read the limits of a model off its configuration, to refuse requests before loading."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cogvideox_sat.latent_geometry import CONTEXT_FRAMES, SPACE_FACTOR, TIME_FACTOR, latent_frame_of, patch_sizes
from sgm.errors import UserError, shown

OFFLOAD_POLICIES = ("none", "stage", "sequential")


@dataclass(frozen=True)
class ModelLimits:
    """Limits of a model.

    Attributes:
        patch: (frames, height, width) of a patch, in latents.
        largest: (frames, height, width) of the largest video, in latents.
        in_channels: input channels of the network.
        latent_channels: channels of the latents.
    """

    patch: tuple[int, int, int]
    largest: tuple[int, int, int]
    in_channels: int
    latent_channels: int

    @classmethod
    def from_config(cls, model_config: Mapping[str, Any]) -> "ModelLimits":
        """Return the limits that the `model:` section of a configuration implies.

        Raises:
            UserError: a number that the limits follow from is missing or not a positive whole number.
        """
        params = (model_config.get("network_config") or {}).get("params")
        if not isinstance(params, Mapping):
            raise UserError("model.network_config.params is missing")

        def number(name: str) -> int:
            return _positive(params.get(name), name)

        size = params.get("patch_size")
        if not (isinstance(size, list) and len(size) == 3):
            size = number("patch_size")
        time, height, width = (_positive(side, "patch_size") for side in patch_sizes(size))
        table_frames = (number("num_frames") - 1) // number("time_compressed_rate") + 1
        return cls(
            patch=(time, height, width),
            largest=(table_frames * time, number("latent_height"), number("latent_width")),
            in_channels=number("in_channels"),
            latent_channels=number("out_channels"),
        )

    @property
    def image_to_video(self) -> bool:
        """Return whether the network has input channels for a first frame."""
        return self.in_channels == 2 * self.latent_channels

    @property
    def extra_frames(self) -> int:
        """Return the leading latent frames that are sampled to fill the first patch, and dropped."""
        return self.patch[0] - 1

    def lengths(self) -> list[int]:
        """Return the numbers of frames that a video of the model can have, in ascending order."""
        frames = range(1, self.largest[0] + 1, 2)
        return [(n - 1) * TIME_FACTOR + 1 for n in frames if (n + self.extra_frames) % self.patch[0] == 0]

    def takes(self, latent_frames: int, height: int, width: int) -> bool:
        """Return whether the model can sample this many latent frames of `height`×`width` pixels."""
        try:
            self.check_clip(latent_frames, height, width)
        except UserError:
            return False
        return True

    def latent_frames(self, frames: int, name: str = "frames") -> int:
        """Return the number of latent frames to sample for a video of this many frames.

        Args:
            name: the argument that the message is about.

        Raises:
            UserError: the model makes no video of this length.
        """
        lengths = self.lengths()
        if frames not in lengths:
            nearest = min(lengths, key=lambda length: (abs(length - frames), -length))
            step = f", and {lengths[1] - 1}k+1 up to {lengths[-1]}" if len(lengths) > 1 else ""
            raise UserError(f"{name}: got {frames}; this model makes 1 frame{step}, for example {nearest}")
        return (frames - 1) // TIME_FACTOR + 1 + self.extra_frames

    def video_frames(self, latent_frames: int) -> int:
        """Return the number of frames of the video that this many latent frames make."""
        return (latent_frames - self.extra_frames - 1) * TIME_FACTOR + 1

    def key_frame_places(self, numbers: Sequence[int], latent_frames: int, first: bool) -> list[int]:
        """Return the latent frames that contain the key frames.

        Args:
            numbers: the numbers of the key frames among the frames of the video, from 0; -1 is the last.
            latent_frames: the length of the video.
            first: the first frame is given too.

        Raises:
            UserError: a number is beyond the video, or two key frames are in one latent frame.
        """
        frames = self.video_frames(latent_frames)
        taken = {0: "the first frame"} if first else {}
        for at in numbers:
            if type(at) is not int or not -frames <= at < frames:
                raise UserError(
                    f"keyframes: at: got {shown(at)}; the video has {frames} frames, expected a number from "
                    f"{-frames} to {frames - 1}"
                )
            place = latent_frame_of(at % frames)
            if place in taken:
                raise UserError(
                    f"keyframes: the one at {at} is in the same {TIME_FACTOR} frames as {taken[place]}; leave out one"
                )
            taken[place] = f"the one at {at}"
        return list(taken)[int(first) :]

    def check_window(self, latent_frames: int) -> None:
        """Check that further windows can continue one of `latent_frames`, else raise UserError."""
        frames = self.video_frames(latent_frames)
        if frames <= CONTEXT_FRAMES:
            raise UserError(f"extend: a window has {frames} frames; expected more than {CONTEXT_FRAMES}")

    def check_clip(
        self,
        latent_frames: int,
        height: int,
        width: int,
        *,
        names: tuple[str, str] = ("sampling_num_frames", "sampling_image_size"),
    ) -> None:
        """Check that the model can sample `latent_frames` of `height`×`width` pixels.

        Args:
            names: the arguments that give the number of frames and the size.

        Raises:
            UserError: the model cannot sample them.
        """
        o, frames_limit = self.patch[0], self.largest[0]
        decoded = latent_frames - self.extra_frames
        if latent_frames % o or decoded % 2 == 0 or not 1 <= decoded <= frames_limit:
            # The first latent frame is a single frame of video only if the number of latent frames is odd.
            kind = "an odd number" if o == 1 else "an even number"
            fits = f"{kind} of latent frames up to {frames_limit}"
            raise UserError(f"{names[0]}: got {latent_frames}; this model takes {fits}")
        self.check_size(height, width, names[1])

    def check_training_clip(self, frames: int, height: int, width: int) -> None:
        """Check that the model can be trained on `frames` frames of `height`×`width` pixels.

        After the first frame, every patch takes `TIME_FACTOR` frames for each of its latent frames. 1.5 models fill
        their first patch by repeating the first latent frame.

        Raises:
            UserError: the model cannot be trained on them.
        """
        step, frames_limit = TIME_FACTOR * self.patch[0], self.largest[0]
        most = (frames_limit - self.patch[0]) * TIME_FACTOR + 1
        if frames % step != 1 or not 1 <= frames <= most:
            nearest = min(max(round((frames - 1) / step), 0) * step + 1, most)
            raise UserError(
                f"max_num_frames: got {frames}; this model takes {step}k+1 frames up to {most}, for example {nearest}"
            )
        self.check_size(height, width, "video_size")

    def check_size(self, height: int, width: int, argument: str) -> None:
        """Check that the model takes frames of `height`×`width` pixels, else raise UserError.

        Args:
            argument: the argument that the message is about.
        """
        sides = zip(("height", "width"), (height, width), self.patch[1:], self.largest[1:], strict=True)
        for name, pixels, patch, limit in sides:
            step, most = SPACE_FACTOR * patch, SPACE_FACTOR * limit
            if pixels % step or not step <= pixels <= most:
                nearest = min(max(round(pixels / step) * step, step), most)
                raise UserError(
                    f"{argument}: {name} {pixels} does not fit; "
                    f"this model takes multiples of {step} up to {most}, for example {nearest}"
                )

    def check_mode(self, image_to_video: bool, latent_channels: int) -> None:
        """Check that the model is of the kind that the arguments ask for, else raise UserError."""
        if image_to_video and not self.image_to_video:
            raise UserError("image2video is on, but this is a text-to-video model; use an '_i2v' configuration")
        if self.image_to_video and not image_to_video:
            raise UserError("this is an image-to-video model; set image2video: true and give prompts as prompt@@image")
        if latent_channels != self.latent_channels:
            raise UserError(f"latent_channels: got {latent_channels}; this model has {self.latent_channels}")


def check_sharing(model_config: Mapping[str, Any], model_parallel_size: int, lora_load: str | Path | None) -> None:
    """Check that processes can share the model as asked, and that an adapter has its place.

    Raises:
        UserError: they cannot, or the model describes no adapter for `lora_load`.
    """
    params = model_config["network_config"]["params"]
    modules, heads = params.get("modules"), _positive(params.get("num_attention_heads"), "num_attention_heads")
    if not isinstance(modules, dict):
        raise UserError("model.network_config.params.modules is missing")
    if lora_load and "lora_config" not in modules:
        raise UserError("lora_load is given, but the model has no lora_config; use the '_lora' variant of its file")
    adapter = modules.get("lora_config")
    adapter_params = adapter.get("params") if isinstance(adapter, dict) else None
    if model_parallel_size > 1 and isinstance(adapter_params, dict) and adapter_params.get("qlora"):
        raise UserError(
            f"model_parallel_size: got {model_parallel_size}; processes cannot share an adapter with qlora, set it to 1"
        )
    if heads % model_parallel_size:
        raise UserError(f"model_parallel_size: got {model_parallel_size}; it must divide the model's {heads} heads")
    first_stage = model_config["first_stage_config"].get("params")
    cp_size = (first_stage if isinstance(first_stage, dict) else {}).get("cp_size") or 1
    if cp_size > 1 and cp_size != model_parallel_size:
        raise UserError(
            f"first_stage_config: cp_size is {cp_size} and model_parallel_size {model_parallel_size}; processes "
            "that share a clip in the VAE also share a network, so set both to the same number"
        )


def check_offload(offload: str) -> None:
    """Check that `offload` is one of `OFFLOAD_POLICIES`, else raise UserError."""
    if offload not in OFFLOAD_POLICIES:
        raise UserError(f"offload: {offload!r} is unknown; choose one of {', '.join(OFFLOAD_POLICIES)}")


def _positive(value: Any, name: str) -> int:
    if type(value) is not int or value < 1:
        raise UserError(f"model.network_config.params.{name}: got {value!r}; expected a positive whole number")
    return value
