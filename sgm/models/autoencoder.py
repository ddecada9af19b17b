"""The autoencoders that configurations name, trained by Lightning or used as first stages."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from sgm.errors import UserError
from sgm.models.abstract_autoencoder import AbstractAutoencoder, Config
from sgm.models.autoencoding_engine import AutoencodingEngine
from sgm.models.video_autoencoding_engine import VideoAutoencodingEngine

__all__ = [
    "AbstractAutoencoder",
    "AutoencoderKL",
    "AutoencoderKLModeOnly",
    "AutoencoderLegacyVQ",
    "AutoencodingEngine",
    "AutoencodingEngineLegacy",
    "IdentityFirstStage",
    "VideoAutoencodingEngine",
]


class IdentityFirstStage(AbstractAutoencoder):
    """The first stage of a model in pixel space: latents are the pixels.

    This first stage has no weights.
    """

    def get_input(self, batch: Mapping[str, Any] | Tensor) -> Tensor:
        """Return the images of a batch, or the given images."""
        return batch if isinstance(batch, Tensor) else super().get_input(batch)

    def encode(
        self, x: Tensor, return_reg_log: bool = False, unregularized: bool = False, **options: Any
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """Return the pixels; with `return_reg_log` or `unregularized`, also an empty report."""
        return (x, {}) if return_reg_log or unregularized else x

    def decode(self, z: Tensor, **options: Any) -> Tensor:
        return z

    def forward(self, x: Tensor) -> Tensor:
        return x


class AutoencodingEngineLegacy(AutoencodingEngine):
    """An autoencoder of the 2D networks with a linear map of channels around the latent.

    Images (b, in_channels, h, w), latents (b, embed_dim, h/f, w/f), f = 2^(len(ch_mult) - 1). One map follows the
    encoder, another precedes the decoder.

    Args:
        embed_dim: channels of the latents.
        ddconfig: the parameters of both networks, `sgm.modules.diffusionmodules.model.Encoder` and `Decoder`.
        max_batch_size: number of images to encode and decode at once; None: the whole batch.
        loss_config, regularizer_config, others: see `AutoencodingEngine`.
    """

    def __init__(
        self,
        embed_dim: int,
        *,
        ddconfig: Config,
        loss_config: Config,
        regularizer_config: Config,
        max_batch_size: int | None = None,
        **others: Any,
    ):
        # A Gaussian has a mean and a variance for each channel.
        copies = 2 if ddconfig.get("double_z", True) else 1
        channels = ddconfig["z_channels"]
        super().__init__(
            encoder_config={"target": "sgm.modules.diffusionmodules.model.Encoder", "params": ddconfig},
            decoder_config={"target": "sgm.modules.diffusionmodules.model.Decoder", "params": ddconfig},
            loss_config=loss_config,
            regularizer_config=regularizer_config,
            parts={
                "quant_conv": nn.Conv2d(copies * channels, copies * embed_dim, 1),
                "post_quant_conv": nn.Conv2d(embed_dim, channels, 1),
            },
            **others,
        )
        self.max_batch_size = max_batch_size

    def encode(
        self, x: Tensor, return_reg_log: bool = False, unregularized: bool = False
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        z = torch.cat([self.quant_conv(self.encoder(images)) for images in x.split(self.max_batch_size or len(x))])
        return self._regularized(z, return_reg_log, unregularized)

    def decode(self, z: Tensor, **options: Any) -> Tensor:
        batches = z.split(self.max_batch_size or len(z))
        return torch.cat([self.decoder(self.post_quant_conv(latents), **options) for latents in batches])


class AutoencoderKL(AutoencodingEngineLegacy):
    """The autoencoder of latent diffusion (Rombach et al. 2022), with a small KL penalty.

    Args:
        lossconfig: another name of `loss_config`; training needs one of them.
        embed_dim, ddconfig, others: see `AutoencodingEngineLegacy`.
    """

    regularizer_params: Config = MappingProxyType({})

    def __init__(
        self,
        embed_dim: int,
        *,
        ddconfig: Config,
        loss_config: Config | None = None,
        lossconfig: Config | None = None,
        **others: Any,
    ):
        super().__init__(
            embed_dim=embed_dim,
            ddconfig=ddconfig,
            loss_config=loss_config or lossconfig or {"target": "torch.nn.Identity"},
            regularizer_config={
                "target": "sgm.modules.autoencoding.regularizers.DiagonalGaussianRegularizer",
                "params": dict(self.regularizer_params),
            },
            **others,
        )


class AutoencoderKLModeOnly(AutoencoderKL):
    """`AutoencoderKL` whose latents are the means, not samples; its arguments are the same."""

    regularizer_params = MappingProxyType({"sample": False})


class AutoencoderLegacyVQ(AutoencodingEngineLegacy):
    """The autoencoder of VQGAN (Esser et al. 2021): latents are codes of a table.

    Args:
        n_embed: number of codes.
        lossconfig: another name of `loss_config`; training needs one of them.
        embed_dim, ddconfig, others: see `AutoencodingEngineLegacy`; `double_z` of `ddconfig` must be off.

    Raises:
        UserError: `double_z` is on.
    """

    def __init__(
        self,
        embed_dim: int,
        n_embed: int,
        *,
        ddconfig: Config,
        loss_config: Config | None = None,
        lossconfig: Config | None = None,
        **others: Any,
    ):
        if ddconfig.get("double_z", True):
            raise UserError("ddconfig: double_z is on; set double_z: false, since codes have no variances")
        super().__init__(
            embed_dim,
            ddconfig=ddconfig,
            loss_config=loss_config or lossconfig or {"target": "torch.nn.Identity"},
            regularizer_config={
                "target": "sgm.modules.autoencoding.regularizers.VectorQuantizer",
                "params": {"n_e": n_embed, "e_dim": embed_dim},
            },
            **others,
        )
