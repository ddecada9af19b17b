"""Training the video autoencoder, with the frames of a clip on one process or spread over several."""

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
"""Orders that the axes of a batch of clips may have: batch, time, channel, height, width."""


class VideoAutoencodingEngine(VideoCoder, AutoencodingEngine):
    """Trains the causal 3D autoencoder on clips of 4k+1 frames, and on images as clips of one.

    A clip is reconstructed in one piece (`decode_at_once`). With a `context_parallel_size` C the C ranks of a group
    share each clip; the batches of its ranks are those of one sample stream. Rank r
      * encodes and decodes its own frames x_r. What a causal convolution needs of the frames before comes from rank
        r - 1; a norm takes its statistics over all ranks' frames where its `gather_norm` is set, else over its own;
      * regularizes the whole latent, the same on every rank, with rank 0's noise;
      * computes the whole loss L, the same value on every rank: from the whole reconstruction, or with `output_cp` the
        reconstruction terms l_r of its own frames, completed to Σ_r l_r without gradient (`sum_over_ranks`). The
        discriminator judges the whole reconstruction.
    Going back, what is alike on all ranks keeps its whole gradient on each (discriminator, log-variance, codebook),
    and only what leaves rank r's own frames goes on into its encoder and decoder, whose gradient g_r is therefore
    partial: with w_r the weights as rank r uses them, g_r = ∂L/∂w_r and Σ_r g_r = dL/dw, that of a single process. DDP
    averages over all W = C·D processes, so before a step the gradients of encoder and decoder are multiplied by C:

        (1/W) Σ_d Σ_r C·g_{d,r} = (1/D) Σ_d dL_d/dw.

    Args:
        context_parallel_size: C, a divisor of the number of processes; no clip may have fewer latent frames, except
            that images can be mixed in, which rank 0 encodes and decodes. 0: what `initialize_context_parallel` has
            set up.
        input_cp: a rank's batch has only its own frames; rank 0's has the one that stands alone, so with n latent
            frames 4n - 3 frames, others' 4n. Else all ranks of a group get the same batch.
        latent_cp: with a Gaussian regularizer a rank makes only the latents of its own frames, and nothing is
            exchanged between encoder and decoder but the sum of the KL divergences.
        output_cp: a rank keeps only its own frames of the reconstruction, for what the discriminator leaves of the
            loss. Has no effect on a loss that does not ask for `group` and `frames`.
        image_video_weights: what multiplies the reconstruction's part of the loss, which is a mean over frames, for
            batches of images and for batches of videos: it balances them, beside their shares of the data.
        image_taps: which taps in time of the causal convolutions images train. "all": they get the gradient of a clip
            that stands still, the same for every tap, by which a new autoencoder learns to average over frames.
            "last": only the tap of the present frame, and videos train the others.
        only_train_decoder: leave encoder and regularizer as they are.
        tile_size: see `VideoCoder`.
        input_key, input_layout: the entry of a batch that is encoded, and how its axes lie: "b t c h w", or
            "b c t h w". Images (b, c, h, w) are clips of one frame.
        encoder_config, decoder_config, loss_config, regularizer_config, others: see `AutoencodingEngine`.

    Raises:
        UserError: a setting is wrong, or the weights to start from do not fit.
    """

    _is_image = False  # whether the clip that was reconstructed last is one

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
                raise UserError("only_train_decoder and trainable_ae_params both say what is trained: give one of them")
            trainable_ae_params = [[r"(decoder|loss)\."]]
        if input_layout not in LAYOUTS:
            raise UserError(f"input_layout: {input_layout!r} is unknown; choose {' or '.join(map(repr, LAYOUTS))}")
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
                f"image_video_weights: {type(self.loss).__name__} takes no `weights`: set [1, 1], or name 'weights' in "
                "its forward_keys"
            )
        # A loss that knows nothing of shares of a clip sees all of it, on every rank.
        self._loss_takes_shares = {"group", "frames"} <= asked
        if image_taps not in ("all", "last"):
            raise UserError(f"image_taps is {image_taps!r}; expected 'all' or 'last'")
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
        """Return the frames of a batch as video (b, c, t, h, w): floats in [-1, 1] as they are, bytes scaled.

        Raises:
            UserError: the batch has no entry `input_key`, or it is neither clips nor images.
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
        """Latents, reconstruction and the regularizer's report of a whole clip (b, c, t, h, w)."""
        z, report = self.encode(x, return_reg_log=True)
        return z, self.decode_at_once(z, **decode_options), report

    def reconstruct(self, x: Tensor, **decode_options: Any) -> Reconstruction:
        """Encode and decode the input of a step, sharing the work with the ranks of the group.

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
        """This rank's latent frames of its moments, and the whole clip's report."""
        if self.latent_cp and self.regularizes_places_alone:
            return self._regularize_share(moments, shares)
        latent, report = self.regularize(gather_frames(moments, shares, self.group))
        return split_frames(latent, shares, self.group), report

    def _weights_in_time(self) -> Iterator[Tensor]:
        """Trained kernels (out, in, time, height, width) of encoder and decoder that see more than one frame."""
        for coder in (self.encoder, self.decoder):
            for weight in coder.parameters():
                if weight.requires_grad and weight.ndim == 5 and weight.shape[2] > 1:
                    yield weight

    def _last_tap_of_images(self, gradient: Tensor) -> Tensor:
        """What is left of a kernel's gradient from the batch that was reconstructed last."""
        if not self._is_image:
            return gradient
        past, present = gradient.split([gradient.shape[2] - 1, 1], dim=2)
        return torch.cat([torch.zeros_like(past), present], dim=2)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        if self.group is not None:
            self._complete_gradients(optimizer)
        super().on_before_optimizer_step(optimizer)

    def _complete_gradients(self, optimizer: Optimizer) -> None:
        """DDP has averaged the ranks' parts of the gradients of encoder and decoder: make the average a sum."""
        partial = {id(parameter) for coder in (self.encoder, self.decoder) for parameter in coder.parameters()}
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        gradients = [each.grad for each in parameters if id(each) in partial and each.grad is not None]
        if gradients:
            torch._foreach_mul_(gradients, group_size(self.group))

    def log_videos(self, batch: Mapping[str, Any], **options: Any) -> dict[str, Tensor]:
        """`log_images`, of videos (b, c, t, h, w)."""
        return self.log_images(batch, **options)
