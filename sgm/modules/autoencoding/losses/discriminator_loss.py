"""The loss of autoencoders: reconstruction, perception, regularization and an adversary."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from sgm.context_parallel import FRAMES, gather_frames, sum_over_ranks
from sgm.errors import UserError
from sgm.modules.autoencoding.discriminators import NLayerDiscriminator
from sgm.modules.autoencoding.losses.adversary import (
    adaptive_weight,
    adopt_weight,
    hinge_d_loss,
    logits_of,
    pictures_of_logits,
    takes_clips,
    to_images,
    vanilla_d_loss,
)
from sgm.modules.autoencoding.losses.lpips import LPIPS, resize
from sgm.util import instantiate_from_config

__all__ = ["GeneralLPIPSWithDiscriminator", "adopt_weight", "hinge_d_loss", "vanilla_d_loss"]


class GeneralLPIPSWithDiscriminator(nn.Module):
    """The loss of VQGAN (Esser et al. 2021, arXiv:2012.09841, eq. 6-7).

    The variance is learned as in Rombach et al. 2022 (arXiv:2112.10752).

    For an image x and its reconstruction x', or for each frame of a clip (`dims` 3), with s = logvar:

        rec   = |x - x'| + perceptual_weight * LPIPS(x, x')            for each pixel and channel
        nll   = rec / exp(s) + s                                       summed over each image
        g     = -mean D(x')
        total = nll + disc_factor * d_weight * g + sum of regularization_weights[name] * regularization_log[name]
        d_weight = disc_weight * min(|dnll/dw| / (|dg/dw| + 1e-4), 1e4)     w: the decoder's last layer

        disc  = mean of max(0, 1 - D(x)) and max(0, 1 + D(x'))         hinge, averages over patches
              = mean of softplus(-D(x)) and softplus(D(x'))            vanilla

    Everything is computed in float32, except the discriminator's convolutions under autocast.

    Args:
        disc_start: first step that uses the discriminator; before it, no adversarial term is computed.
        disc_num_layers, disc_in_channels: of the discriminator, unless `discriminator_config` names one. The
            discriminator gets single frames, or whole clips if its attribute `dims` is 3.
        disc_factor: factor of the adversarial term and of the discriminator's loss; 0: no discriminator.
        disc_loss: "hinge" or "vanilla".
        perceptual_weight: factor of LPIPS; 0: no LPIPS.
        lpips_net, lpips_weights: see `LPIPS`.
        pixel_loss: "l1", or "l2" for squares.
        scale_input_to_tgt_size: resize x to the size of x'.
        learn_logvar: train s, from `logvar_init` on, with the autoencoder.
        regularization_weights: factors of the entries of the regularizer's report; 0 for entries without a name here.
        additional_log_keys: entries of the regularizer's report to log. None: all.

    Raises:
        UserError: an option is not one of those above, or (on a forward pass) sizes do not fit.
    """

    def __init__(
        self,
        disc_start: int,
        logvar_init: float = 0.0,
        disc_num_layers: int = 3,
        disc_in_channels: int = 3,
        disc_factor: float = 1.0,
        disc_weight: float = 1.0,
        perceptual_weight: float = 1.0,
        disc_loss: str = "hinge",
        scale_input_to_tgt_size: bool = False,
        dims: int = 2,
        learn_logvar: bool = False,
        regularization_weights: Mapping[str, float] | None = None,
        additional_log_keys: Iterable[str] | None = None,
        discriminator_config: Mapping[str, Any] | None = None,
        lpips_weights: str | Path | None = None,
        lpips_net: str = "vgg",
        pixel_loss: str = "l1",
    ):
        super().__init__()
        _check_choice("dims", dims, (2, 3))
        _check_choice("disc_loss", disc_loss, _DISCRIMINATOR_LOSSES)
        _check_choice("pixel_loss", pixel_loss, _PIXEL_LOSSES)
        self.dims = dims
        self.discriminator_loss = _DISCRIMINATOR_LOSSES[disc_loss]
        self.pixel_loss = _PIXEL_LOSSES[pixel_loss]
        self.perceptual_loss = LPIPS(lpips_net, lpips_weights) if perceptual_weight else None
        self.perceptual_weight = perceptual_weight
        self.logvar = nn.Parameter(torch.tensor(float(logvar_init)), requires_grad=learn_logvar)
        self.scale_input_to_tgt_size = scale_input_to_tgt_size
        self.regularization_weights = dict(regularization_weights or {})
        self.additional_log_keys = None if additional_log_keys is None else set(additional_log_keys)

        if discriminator_config is None:
            self.discriminator = NLayerDiscriminator(disc_in_channels, n_layers=disc_num_layers)
        else:
            self.discriminator = instantiate_from_config(discriminator_config)
        self.discriminator.requires_grad_(disc_factor != 0)
        if takes_clips(self.discriminator) and dims == 2:
            raise UserError("loss_config: dims is 2, but the discriminator is one for clips, which go with dims: 3")
        self.disc_start = disc_start
        self.disc_factor = disc_factor
        self.disc_weight = disc_weight

    forward_keys = (
        "regularization_log",
        "optimizer_idx",
        "global_step",
        "last_layer",
        "split",
        "weights",
        "group",
        "frames",
    )
    """Keyword arguments of `forward` besides inputs and reconstructions."""

    def get_trainable_parameters(self) -> Iterator[nn.Parameter]:
        """Yield the discriminator's parameters; none if `disc_factor` is 0."""
        if self.disc_factor:
            yield from self.discriminator.parameters()

    def get_trainable_autoencoder_parameters(self) -> Iterator[nn.Parameter]:
        """Yield the loss's parameters that are trained with the autoencoder."""
        if self.logvar.requires_grad:
            yield self.logvar

    def forward(
        self,
        inputs: Tensor,
        reconstructions: Tensor,
        *,
        regularization_log: Mapping[str, Tensor],
        optimizer_idx: int,
        global_step: int,
        last_layer: Tensor | None = None,
        split: str = "train",
        weights: float | Tensor | None = None,
        group: ProcessGroup | None = None,
        frames: Sequence[int] | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of the autoencoder or of the discriminator, and numbers to log.

        With a `group` of ranks that share a clip, every rank returns the whole loss. Its backward pass gives each rank,
        for the gradients before `reconstructions`, the part from its own frames; the sum of these parts equals the
        gradient of one process. The loss's own parameters get their whole gradient on each rank.

        Without gradients, in validation, g is logged but not added to the total.

        Args:
            inputs, reconstructions: images (batch, channel, h, w), or clips (batch, channel, time, h, w) for `dims` 3.
            regularization_log: scalars that the regularizer reports.
            optimizer_idx: 0 for the autoencoder, 1 for the discriminator.
            last_layer: the weight w above; None gives the adversarial term the constant weight `disc_weight`.
            weights: factor of nll in the total, a number or a tensor that broadcasts with `inputs`.
            frames: number of frames of each rank, if `inputs` and `reconstructions` are this rank's part of the clip.
                None: every rank has the whole clip.
        """
        split_group = None if frames is None else group  # the ranks among which the frames are spread
        inputs, reconstructions = self._prepare(inputs, reconstructions)
        if optimizer_idx == 1:
            return self._discriminator_step(inputs, reconstructions, global_step, split, split_group, frames)
        if optimizer_idx != 0:
            raise ValueError(f"optimizer_idx {optimizer_idx} is neither 0 nor 1")

        terms = self._likelihood(inputs, reconstructions, weights, split_group, frames)
        loss, nll = terms.weighted, terms.nll
        g = d_weight = torch.zeros_like(nll)
        if self._is_adversarial(global_step):
            fake = reconstructions if frames is None else gather_frames(reconstructions, frames, split_group)
            g = -logits_of(self.discriminator, fake, frozen=True).mean()
            if torch.is_grad_enabled():
                d_weight = self.disc_weight * adaptive_weight(nll, g, last_layer, group)
                loss = loss + self.disc_factor * d_weight * g
        loss = loss + self._penalty(regularization_log)

        log = {} if terms.perceptual is None else {"loss/perceptual": terms.perceptual}
        log |= {
            "loss/total": loss,
            "loss/nll": nll,
            "loss/rec": terms.rec,
            "loss/g": g,
            "loss/d_weight": d_weight,
            "loss/logvar": self.logvar.float().clone(),  # a parameter: it changes in place
        }
        log |= self._reported(regularization_log)
        return loss, {f"{split}/{name}": value.detach() for name, value in log.items()}

    @torch.no_grad()
    def log_images(self, inputs: Tensor, reconstructions: Tensor) -> dict[str, Tensor]:
        """Return pictures of the discriminator's logits, shaped like `inputs`, in [-1, 1].

        Green patches look real to the discriminator, magenta patches look fake; stronger colours are larger logits.
        Both pictures share one scale: `logits_real` of the inputs, `logits_fake` of the reconstructions. The result is
        empty without a discriminator.
        """
        if not self.disc_factor:
            return {}
        inputs, reconstructions = self._prepare(inputs, reconstructions)
        both = [logits_of(self.discriminator, x) for x in (inputs, reconstructions)]
        return dict(zip(("logits_real", "logits_fake"), pictures_of_logits(both, inputs), strict=True))

    # ------------------------------------------------------------ reconstruction

    def _prepare(self, inputs: Tensor, reconstructions: Tensor) -> tuple[Tensor, Tensor]:
        """Return inputs and reconstructions in float32 and in one size."""
        if reconstructions.ndim != self.dims + 2:
            raise UserError(
                f"the loss with dims: {self.dims} takes {'images' if self.dims == 2 else 'clips'} of "
                f"{self.dims + 2} dimensions, got {tuple(reconstructions.shape)}"
            )
        inputs, reconstructions = inputs.float(), reconstructions.float()
        if self.scale_input_to_tgt_size:
            batch = inputs.shape[0]
            inputs = _from_images(resize(to_images(inputs), reconstructions.shape[-2:]), batch, self.dims)
        if inputs.shape != reconstructions.shape:
            raise UserError(
                f"the loss cannot compare inputs {tuple(inputs.shape)} with reconstructions "
                f"{tuple(reconstructions.shape)}; scale_input_to_tgt_size: true adapts height and width"
            )
        return inputs, reconstructions

    def _likelihood(
        self,
        inputs: Tensor,
        reconstructions: Tensor,
        weights: float | Tensor | None,
        split_group: ProcessGroup | None,
        frames: Sequence[int] | None,
    ) -> "Likelihood":
        """Return the terms of the reconstruction, for the `weights` of `forward`.

        Args:
            inputs, reconstructions: float32, of one size.
            split_group, frames: the ranks that each hold a part of the clip, and its frames on each; None: whole clips.
        """
        images = inputs.shape[0]
        if self.dims == 3:
            images *= inputs.shape[FRAMES] if frames is None else sum(frames)
        image_size = inputs.shape[1] * inputs.shape[-2:].numel()

        def per_image(x: Tensor) -> Tensor:
            return sum_over_ranks(x.sum(), split_group) / images

        rec = self.pixel_loss(inputs - reconstructions)
        perceptual: Tensor | None = None
        if self.perceptual_loss is not None:
            distances = self._perceptual(self.perceptual_loss, inputs, reconstructions)
            rec = rec + self.perceptual_weight * distances
            perceptual = per_image(distances.detach())
        logvar = self.logvar.float()
        rec_per_image = per_image(rec)
        nll = weighted = rec_per_image / logvar.exp() + logvar * image_size
        if weights is not None:
            weights = torch.ones_like(rec) * weights
            weighted = per_image(weights * rec) / logvar.exp() + logvar * per_image(weights)
        return Likelihood(nll, weighted, rec_per_image / image_size, perceptual)

    def _perceptual(self, lpips: LPIPS, inputs: Tensor, reconstructions: Tensor) -> Tensor:
        """Return the LPIPS of each image or frame, with the dimensions of `inputs`."""
        distances = lpips(to_images(inputs), to_images(reconstructions))
        return _from_images(distances, inputs.shape[0], self.dims)

    def _penalty(self, regularization_log: Mapping[str, Tensor]) -> Tensor | float:
        """Return the weighted sum of the regularizer's scalars; 0 without weights."""
        for name in self.regularization_weights:
            if name not in regularization_log:
                raise UserError(
                    f"regularization_weights: the regularizer reports no '{name}', "
                    f"only {', '.join(regularization_log) or 'nothing'}"
                )
        return sum(weight * regularization_log[name].float() for name, weight in self.regularization_weights.items())

    def _reported(self, regularization_log: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return those of the regularizer's scalars that are logged."""
        wanted = self.additional_log_keys
        return {name: value for name, value in regularization_log.items() if wanted is None or name in wanted}

    # ------------------------------------------------------------ adversary

    def _is_adversarial(self, global_step: int) -> bool:
        return global_step >= self.disc_start and self.disc_factor != 0

    def _discriminator_step(
        self,
        inputs: Tensor,
        reconstructions: Tensor,
        global_step: int,
        split: str,
        split_group: ProcessGroup | None,
        frames: Sequence[int] | None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return `disc` above and numbers to log; 0 before `disc_start`.

        Args:
            inputs, reconstructions: float32, of one size.
            split_group, frames: the ranks that each hold a part of the clip, and its frames on each; None: whole clips.
        """
        if not self._is_adversarial(global_step):
            # The engine calls `backward` on every loss.
            loss = torch.zeros((), device=inputs.device, requires_grad=torch.is_grad_enabled())
            return loss, {f"{split}/loss/disc": loss.detach()}
        real, fake = inputs.detach(), reconstructions.detach()
        if frames is not None:
            real, fake = (gather_frames(x, frames, split_group) for x in (real, fake))
        real, fake = logits_of(self.discriminator, real), logits_of(self.discriminator, fake)
        loss = self.disc_factor * self.discriminator_loss(real, fake)
        log = {"loss/disc": loss, "logits/real": real.mean(), "logits/fake": fake.mean()}
        return loss, {f"{split}/{name}": value.detach() for name, value in log.items()}


class Likelihood(NamedTuple):
    """The scalar terms of a reconstruction, means over images or frames.

    Attributes:
        nll: as above.
        weighted: nll with a factor for each pixel and channel.
        rec: the mean of rec over pixels and channels.
        perceptual: LPIPS; None: it is not part of the loss.
    """

    nll: Tensor
    weighted: Tensor
    rec: Tensor
    perceptual: Tensor | None


def _from_images(x: Tensor, batch: int, dims: int) -> Tensor:
    """Return the clips that `to_images` took apart; with `dims` 2, the images unchanged."""
    return x if dims == 2 else rearrange(x, "(b t) c h w -> b c t h w", b=batch)


_DISCRIMINATOR_LOSSES = {"hinge": hinge_d_loss, "vanilla": vanilla_d_loss}
_PIXEL_LOSSES = {"l1": torch.abs, "l2": torch.square}


def _check_choice(name: str, value: Any, choices: Collection[Any]) -> None:
    if value not in choices:
        raise UserError(f"loss_config: {name}: got {value!r}; use {' or '.join(map(repr, choices))}")
