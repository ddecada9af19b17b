"""Train the video autoencoder, with the frames of a clip on one process or several."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from einops import rearrange
from torch import Tensor
from torch.optim import Optimizer

from sgm.context_parallel import (
    gather_frames,
    get_context_parallel_group,
    group_size,
    initialize_context_parallel,
    split_frames,
)
from sgm.errors import UserError
from sgm.models.abstract_autoencoder import Config
from sgm.models.autoencoding_engine import AutoencodingEngine, Reconstruction
from sgm.models.calling_losses import loss_keywords
from sgm.models.video_coder import VideoCoder

LAYOUTS = ("b t c h w", "b c t h w")
"""Allowed orders of the axes of a batch of clips: batch, time, channel, height, width."""


class VideoAutoencodingEngine(VideoCoder, AutoencodingEngine):
    """Trains the causal 3D autoencoder on clips of 4k+1 frames, and on images as clips of one.

    A clip is reconstructed in one piece (`decode_at_once`). With a `context_parallel_size` C the C ranks of a group
    share each clip; the batches of its ranks belong to one sample stream. Rank r
      * encodes and decodes its own frames x_r. Causal convolutions get the frames before from rank r - 1; a norm with
        `gather_norm` takes its statistics over all ranks' frames, any other over its own;
      * regularizes the whole latent, the same on every rank, with rank 0's noise;
      * computes the whole loss L, the same value on every rank: from the whole reconstruction, or with `output_cp` the
        reconstruction terms l_r of its own frames, completed to Σ_r l_r without gradient (`sum_over_ranks`). The
        discriminator judges the whole reconstruction.
    In the backward pass, parameters that all ranks use alike (discriminator, log-variance, codebook) get their whole
    gradient on each rank. Encoder and decoder of rank r only get the gradient g_r of its own frames, which is therefore
    partial: with w_r the weights as rank r uses them, g_r = ∂L/∂w_r and Σ_r g_r = dL/dw, the gradient of a single
    process. DDP averages over all W = C·D processes, so that the gradients of encoder and decoder are multiplied by C
    before a step:

        (1/W) Σ_d Σ_r C·g_{d,r} = (1/D) Σ_d dL_d/dw.

    Args:
        context_parallel_size: C, a divisor of the number of processes; no clip may have fewer latent frames, except
            images, which rank 0 encodes and decodes. 0: the size given to `initialize_context_parallel`.
        input_cp: a rank's batch has only its own frames, for n latent frames 4n; rank 0's has 4n - 3, with the frame
            that stands alone. Otherwise all ranks of a group get the same batch.
        latent_cp: with a Gaussian regularizer a rank only makes the latents of its own frames; between encoder and
            decoder only the sum of the KL divergences is exchanged.
        output_cp: a rank only keeps its own frames of the reconstruction for the loss, except the discriminator. It has
            no effect on a loss that does not ask for `group` and `frames`.
        image_video_weights: factors of the reconstruction's part of the loss, which is a mean over frames, for batches
            of images and of videos; they balance both, besides their shares of the data.
        image_taps: the taps in time of the causal convolutions that images train. "all": images act as clips that stand
            still, with the same gradient for every tap, from which a new autoencoder learns to average over frames.
            "last": images only train the tap of the present frame, and videos train the others.
        only_train_decoder: do not train encoder and regularizer.
        tile_size: see `VideoCoder`.
        input_key, input_layout: the entry of a batch that is encoded, and the order of its axes: "b t c h w" or
            "b c t h w". Images (b, c, h, w) are clips of one frame.
        encoder_config, decoder_config, loss_config, regularizer_config, others: see `AutoencodingEngine`.

    Raises:
        UserError: a setting is wrong, or the initial weights do not fit.
    """

    _is_image = False  # whether the latest reconstructed clip is an image

    def __init__(
        self,
        ckpt_path: str | Path | None = None,
        ignore_keys: Sequence[str] = (),
        image_video_weights: Sequence[float] = (1, 1),
        only_train_decoder: bool = False,
        context_parallel_size: int = 0,
        *,
        encoder_config: Config,
        decoder_config: Config,
        loss_config: Config,
        regularizer_config: Config,
        input_cp: bool = False,
        latent_cp: bool = False,
        output_cp: bool = False,
        image_taps: str = "all",
        tile_size: int | None = None,
        input_key: str = "mp4",
        input_layout: str = "b t c h w",
        trainable_ae_params: Sequence[Sequence[str]] | None = None,
        **others: Any,
    ):
        if only_train_decoder:
            if trainable_ae_params is not None:
                raise UserError("only_train_decoder and trainable_ae_params both select parameters; give one of them")
            trainable_ae_params = [[r"(decoder|loss)\."]]
        if input_layout not in LAYOUTS:
            raise UserError(f"input_layout: {input_layout!r} is unknown; use {' or '.join(map(repr, LAYOUTS))}")
        super().__init__(
            ckpt_path=ckpt_path,
            ignore_keys=ignore_keys,
            encoder_config=encoder_config,
            decoder_config=decoder_config,
            loss_config=loss_config,
            regularizer_config=regularizer_config,
            input_key=input_key,
            trainable_ae_params=trainable_ae_params,
            **others,
        )
        self.context_parallel_size = context_parallel_size
        self.input_cp, self.latent_cp, self.output_cp = input_cp, latent_cp, output_cp
        self.input_layout = input_layout
        self.image_weight, self.video_weight = map(float, image_video_weights)
        asked = loss_keywords(self.loss)
        if (self.image_weight, self.video_weight) != (1, 1) and "weights" not in asked:
            raise UserError(
                f"image_video_weights: {type(self.loss).__name__} takes no `weights`; set [1, 1], or list 'weights' in "
                "its forward_keys"
            )
        # A loss without these arguments gets the whole clip, on every rank.
        self._loss_takes_shares = {"group", "frames"} <= asked
        if image_taps not in ("all", "last"):
            raise UserError(f"image_taps: got {image_taps!r}; expected 'all' or 'last'")
        if image_taps == "last":
            for weight in self._weights_in_time():
                weight.register_hook(self._last_tap_of_images)
        self.only_train_decoder = only_train_decoder
        self.tile_size = tile_size
        if context_parallel_size <= 1 or dist.is_initialized():
            self._join_group()

    def setup(self, stage: str) -> None:
        super().setup(stage)
        self._join_group()  # now that the trainer has started the processes

    def _join_group(self) -> None:
        if self.context_parallel_size > 1:
            initialize_context_parallel(self.context_parallel_size)
        self.group = None if self.context_parallel_size == 1 else get_context_parallel_group()

    def get_input(self, batch: Mapping[str, Any]) -> Tensor:
        """Return the frames of a batch as video (b, c, t, h, w): floats in [-1, 1], bytes scaled.

        Raises:
            UserError: the batch has no entry `input_key`, or the entry has neither clips nor images.
        """
        x = super().get_input(batch)
        if x.ndim == 4:
            return x.unsqueeze(2)
        if x.ndim != 5:
            raise UserError(
                f"input_key: '{self.input_key}' has the shape {tuple(x.shape)}; expected {self.input_layout}"
            )
        return rearrange(x, f"{self.input_layout} -> b c t h w")

    def forward(self, x: Tensor, **decode_options: Any) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Return latents, reconstruction and the regularizer's report of a clip (b, c, t, h, w)."""
        z, report = self.encode(x, return_reg_log=True)
        return z, self.decode_at_once(z, **decode_options), report

    def reconstruct(self, x: Tensor, **decode_options: Any) -> Reconstruction:
        """Return the reconstruction of a step's input, made together by the ranks of the group.

        Raises:
            UserError: the number of frames or a side does not fit the autoencoder or the group.
        """
        shares = self._shares_of_video(x, self.input_cp)
        is_image = self._is_image = sum(shares) == 1
        if min(shares) == 0 and not is_image:
            raise UserError(
                f"context_parallel_size: {len(shares)} processes cannot share a clip of {sum(shares)} latent frames"
            )
        frames = self._frames(shares, lead=True)
        own = x if self.input_cp else split_frames(x, frames, self.group)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.only_train_decoder):
            latent, report = self._own_latent(self._encode(own, shares), shares)
        outputs = self._decode_at_once(latent, shares, **decode_options)
        weight = self.image_weight if is_image else self.video_weight
        if self.group is not None and self.output_cp and self._loss_takes_shares and not is_image:
            return Reconstruction(own, outputs, report, frames, weight, latent)
        inputs = gather_frames(own, frames, self.group) if self.input_cp else x
        return Reconstruction(inputs, gather_frames(outputs, frames, self.group), report, None, weight, latent)

    def _own_latent(self, moments: Tensor, shares: list[int]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the latent frames of this rank's moments, and the report of the whole clip."""
        if self.latent_cp and self.regularizes_places_alone:
            return self._regularize_share(moments, shares)
        latent, report = self.regularize(gather_frames(moments, shares, self.group))
        return split_frames(latent, shares, self.group), report

    def _weights_in_time(self) -> Iterator[Tensor]:
        """Yield the trained kernels (out, in, time, height, width) that see several frames."""
        for coder in (self.encoder, self.decoder):
            for weight in coder.parameters():
                if weight.requires_grad and weight.ndim == 5 and weight.shape[2] > 1:
                    yield weight

    def _last_tap_of_images(self, gradient: Tensor) -> Tensor:
        """Return a kernel's gradient; from images, only that of the last tap."""
        if not self._is_image:
            return gradient
        past, present = gradient.split([gradient.shape[2] - 1, 1], dim=2)
        return torch.cat([torch.zeros_like(past), present], dim=2)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        if self.group is not None:
            self._complete_gradients(optimizer)
        super().on_before_optimizer_step(optimizer)

    def _complete_gradients(self, optimizer: Optimizer) -> None:
        """Multiply the gradients of encoder and decoder by the group's size.

        DDP has averaged the ranks' parts, which must be summed.
        """
        partial = {id(parameter) for coder in (self.encoder, self.decoder) for parameter in coder.parameters()}
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        gradients = [each.grad for each in parameters if id(each) in partial and each.grad is not None]
        if gradients:
            torch._foreach_mul_(gradients, group_size(self.group))

    def log_videos(self, batch: Mapping[str, Any], **options: Any) -> dict[str, Tensor]:
        """Return the pictures of `log_images`, as videos (b, c, t, h, w)."""
        return self.log_images(batch, **options)
