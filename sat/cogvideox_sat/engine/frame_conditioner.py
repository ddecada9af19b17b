"""Condition a network on given frames: their latents and their places."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from cogvideox_sat.engine.latent_coder import LatentCoder
from cogvideox_sat.latent_geometry import SPACE_FACTOR, TIME_FACTOR, patch_sizes
from sgm.errors import UserError
from sgm.modules.diffusionmodules.key_frames import KeyFrameDraws, noise_pictures


class FrameConditioner(LatentCoder):
    """A coder that also makes the condition of a network that is given frames of the video.

    Attributes:
        noised_image_input: the network takes the first frame, and key frames; in training with noise.
        noised_image_all_concat: the condition repeats the first frame for all frames.
        key_frames: draws which frames are given in training; None: always the first alone.

    Args:
        config, regularizer, dtype, device: see `LatentCoder`.

    Raises:
        UserError: `conditioning` is malformed, or the network does not take the frames that it names.
    """

    def __init__(
        self, config: Mapping[str, Any], regularizer: nn.Module, dtype: torch.dtype, device: torch.device | str
    ):
        super().__init__(config, regularizer, dtype, device)
        self.noised_image_input = config.get("noised_image_input", False)
        self.noised_image_all_concat = config.get("noised_image_all_concat", False)
        self.key_frames = KeyFrameDraws(config["conditioning"]) if config.get("conditioning") else None
        if self.key_frames is not None:
            self.check_key_frames()

    @property
    def is_15(self) -> bool:
        """Return whether the network patches two latent frames at a time, as CogVideoX1.5 does."""
        return patch_sizes(self.config["network_config"]["params"]["patch_size"])[0] > 1

    def with_extra_frame(self, latents: Tensor) -> Tensor:
        """Return latents (b, t, c, h, w), with the first frame repeated for 1.5 networks.

        These networks need an even number of frames.
        """
        return torch.cat((latents[:, :1], latents), dim=1) if self.is_15 else latents

    def drop_extra_frame(self, latents: Tensor) -> Tensor:
        """Return latents (b, t, c, h, w) without the leading frame that 1.5 networks add."""
        return latents[:, 1:] if self.is_15 else latents

    def encode_condition_image(self, image: Tensor) -> Tensor:
        """Return the condition latent (b, 1, c, h, w) of first frames (b, 3, 1, height, width).

        It is scaled as the network was trained.
        """
        return self.scale_condition(self.encode_first_stage(image))

    def scale_condition(self, latent: Tensor) -> Tensor:
        """Return the condition (b, 1, c, h, w) of a first frame's scaled latent (b, c, 1, h, w).

        1.0 models take the scaled latent, 1.5 models the unscaled one.
        """
        if self.is_15:
            latent = latent / self.scale_factor
        return rearrange(latent, "b c t h w -> b t c h w")

    def concat_condition(self, image_latent: Tensor, frames: int) -> Tensor:
        """Return the condition (b, frames, c, h, w) of a network that is given some frames.

        Args:
            image_latent: latent of the first frame (b, 1, c, h, w), which is followed by zeros, or repeated by models
                that do so; or of all latent frames, counted as in decoding, with zeros for frames that are not given.
        """
        if self.noised_image_all_concat:
            return image_latent.expand(-1, frames, -1, -1, -1)
        count = image_latent.shape[1]
        extra = frames - count if count > 1 else 0  # 1.5 models have one frame more, before the second frame
        condition = image_latent.new_zeros(image_latent.shape[0], frames, *image_latent.shape[2:])
        condition[:, :1] = image_latent[:, :1]
        condition[:, 1 + extra : count + extra] = image_latent[:, 1:]
        return condition

    def concat_key_frames(self, latents: Mapping[int, Tensor], frames: int) -> Tensor:
        """Return `concat_condition` for the latents of single pictures.

        Args:
            latents: latents (b, 1, c, h, w) by the number of the latent frame of each, counted as in decoding.

        Raises:
            UserError: the model takes only the first frame (`noised_image_all_concat`).
        """
        if latents.keys() == {0}:
            return self.concat_condition(latents[0], frames)
        self.check_key_frames()
        some = next(iter(latents.values()))
        placed = some.new_zeros(some.shape[0], frames - int(self.is_15), *some.shape[2:])
        for number, latent in latents.items():
            placed[:, number] = latent[:, 0]
        return self.concat_condition(placed, frames)

    def check_key_frames(self) -> None:
        """Check that the model takes other frames than the first, else raise UserError."""
        if not self.noised_image_input:
            raise UserError("keyframes: this is a text-to-video model; use an '_i2v' configuration")
        if self.noised_image_all_concat:
            raise UserError("keyframes: this model takes only the first frame (noised_image_all_concat is on)")

    @torch.no_grad()
    def encode_key_frames(self, clip: Tensor, told: Tensor | None = None, noise: bool = True) -> Tensor:
        """Return the moments (b, 2c, t - 1, h, w) of single frames of clips.

        The frames are the last frame of each latent frame, except the first; each is encoded separately.

        Args:
            clip: (b, 3, frames, height, width).
            told: bool (b, t - 1), the wanted frames; the moments of others are zeros. None: all.
            noise: add the noise of training.
        """
        pictures = clip[:, :, TIME_FACTOR::TIME_FACTOR]
        pictures = noise_pictures(pictures, "key frame") if noise else pictures
        wanted = torch.ones(len(clip), pictures.shape[2], dtype=torch.bool) if told is None else told
        chosen = rearrange(pictures, "b c t h w -> b t c 1 h w")[wanted.to(clip.device)]
        height, width = (side // SPACE_FACTOR for side in clip.shape[-2:])
        channels = 2 * self.config["network_config"]["params"]["out_channels"]
        moments = clip.new_zeros(*wanted.shape, channels, 1, height, width)
        if len(chosen):
            moments[wanted.to(clip.device)] = self.encode_moments(chosen).to(moments)
        return rearrange(moments, "b t c 1 h w -> b c t h w")

    def with_key_frames(
        self, image: Tensor, frames: int, at_random: bool, moments_of: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """Return the latents of the given frames; the first one alone without `conditioning`.

        Args:
            image: latent of the first frame (b, 1, c, h, w).
            frames: number of latent frames.
            at_random: draw the given frames of each clip; otherwise, those that are drawn most often are given.
            moments_of: returns the moments of the other frames (b, 2c, frames - 1, h, w), for a mask of those that are
                given.
        """
        if self.key_frames is None or self.key_frames.first_alone:
            return image
        count = len(image)
        if at_random:
            given = self.key_frames.draw(count, frames)
        else:
            given = self.key_frames.of_kind(self.key_frames.usual, frames).expand(count, -1)
        others = self.scale_condition(self.sample_latent(moments_of(given[:, 1:])))
        mask = given.to(image.device)[:, :, None, None, None]
        return torch.where(mask, torch.cat((image, others.to(image)), dim=1), 0.0)
