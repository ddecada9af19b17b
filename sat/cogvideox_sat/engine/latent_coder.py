"""Code clips as latents, and latents as clips."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from cogvideox_sat.configuration.model_section import samples_at_a_time
from sgm.modules.autoencoding.regularizers import DiagonalGaussianRegularizer


class LatentCoder(nn.Module):
    """A first stage, and the scale of its latents.

    Latents are scaled if nothing else is said: multiplied by `scale_factor`. Moments are the means and log-variances of
    unscaled latents, from which latents are drawn.

    Attributes:
        first_stage_model: codes pixels; None while it is not built.
        latent_input: the batches hold unscaled latents in place of clips.
        samples_at_a_time: number of samples that the first stage codes at a time; None: all.

    Args:
        config: a `model:` section.
        regularizer: the regularizer of the first stage, for precomputed moments.
        dtype: dtype of the first stage.
        device: device of the first stage.

    Raises:
        UserError: `en_and_decode_n_samples_a_time` is not a whole number from 1.
    """

    def __init__(
        self, config: Mapping[str, Any], regularizer: nn.Module, dtype: torch.dtype, device: torch.device | str
    ):
        super().__init__()
        self.config, self.dtype, self.device = config, dtype, torch.device(device)
        self.scale_factor = config.get("scale_factor", 1.0)
        self.latent_input = config.get("latent_input", False)
        self.samples_at_a_time = samples_at_a_time(config.get("en_and_decode_n_samples_a_time"))
        self.regularizer = regularizer
        self.first_stage_model: Any = None

    def load_clip(self, frames: Tensor) -> Tensor:
        """Return frames as the first stage takes them, in the engine's dtype.

        Args:
            frames: (b, frames, 3, height, width), uint8 or in [-1, 1].

        Returns:
            (b, 3, frames, height, width) in [-1, 1].
        """
        clip = rearrange(frames, "b t c h w -> b c t h w")
        return (clip.float() / 127.5 - 1 if clip.dtype == torch.uint8 else clip).to(self.dtype)

    @torch.no_grad()
    def encode_first_stage(self, x: Tensor, batch: Mapping[str, Any] | None = None) -> Tensor:
        """Return the scaled latents (b, c, t, h, w) of clips.

        Args:
            x: clips (b, 3, frames, height, width) in [-1, 1]. With `latent_input: True` they are latents (b, t, c, h,
                w), which are only scaled.
        """
        if self.latent_input:
            return rearrange(x, "b t c h w -> b c t h w") * self.scale_factor
        groups = self.groups(x)
        if len(groups) == 1:
            return self.scale_factor * self.first_stage_model.encode(x.to(self.dtype))
        if not hasattr(self.first_stage_model, "regularization"):  # this first stage has no moments to draw from
            return self.scale_factor * torch.cat([self.first_stage_model.encode(g.to(self.dtype)) for g in groups])
        # Noise is drawn for the whole batch, so that it does not depend on how the batch is divided.
        regularize = getattr(self.first_stage_model, "regularize", self.first_stage_model.regularization)
        return self.scale_factor * regularize(self.encode_moments(x))[0]

    @torch.no_grad()
    def encode_moments(self, x: Tensor) -> Tensor:
        """Return the moments (b, 2c, t, h, w) of the unscaled latents of clips.

        Args:
            x: clips (b, 3, frames, height, width) in [-1, 1].
        """
        encode = self.first_stage_model.encode
        return torch.cat([encode(group.to(self.dtype), unregularized=True)[0] for group in self.groups(x)])

    @torch.no_grad()
    def encode_means(self, x: Tensor) -> Tensor:
        """Return the means of the scaled latents (b, c, t, h, w) of clips.

        Sampling starts from these latents when it starts from a clip. They take no random numbers.

        Args:
            x: clips (b, 3, frames, height, width) in [-1, 1].
        """
        moments = self.encode_moments(x.to(self.device))
        if isinstance(self.regularizer, DiagonalGaussianRegularizer):
            return self.scale_factor * moments.chunk(2, dim=1)[0]
        return self.scale_factor * self.regularizer(moments)[0]  # it draws nothing

    def groups(self, x: Tensor) -> list[Tensor]:
        """Return the batch in parts that the first stage takes at a time.

        Each part has `en_and_decode_n_samples_a_time` samples; without this setting, there is one part.
        """
        return list(x.split(self.samples_at_a_time or max(len(x), 1)))

    def sample_latent(self, moments: Tensor) -> Tensor:
        """Return scaled latents (b, c, t, h, w), drawn from moments (b, 2c, t, h, w)."""
        return self.scale_factor * self.regularizer(moments.to(self.dtype))[0]

    @torch.no_grad()
    def decode_first_stage(self, z: Tensor) -> Tensor:
        """Return the clips (b, 3, frames, height, width) of scaled latents (b, c, t, h, w).

        See `decode_stream` for long clips.
        """
        return torch.cat([torch.cat(list(self._decode_group(group)), dim=2) for group in self.groups(z)])

    @torch.no_grad()
    def decode_stream(self, z: Tensor) -> Iterator[Tensor]:
        """Yield the result of `decode_first_stage` in chunks of time.

        For a subclass with its own `decode_first_stage`, there is one chunk.
        """
        if type(self).decode_first_stage is not LatentCoder.decode_first_stage:
            yield self.decode_first_stage(z)
            return
        for chunks in zip(*map(self._decode_group, self.groups(z)), strict=True):
            yield chunks[0] if len(chunks) == 1 else torch.cat(chunks)

    def _decode_group(self, z: Tensor) -> Iterator[Tensor]:
        """Return an iterator over the decoded chunks of samples that are decoded together.

        If the first stage has no chunks, there is one.
        """
        z = (z / self.scale_factor).to(self.device, self.dtype)
        if not hasattr(self.first_stage_model, "decode_chunks"):
            return iter([self.first_stage_model.decode(z)])
        return self.first_stage_model.decode_chunks(z)
