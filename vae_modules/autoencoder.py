"""The video autoencoder for the diffusion engine; engines for training are exported too."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from sgm.context_parallel import get_context_parallel_group, initialize_context_parallel
from sgm.models.video_coder import VideoCoder
from sgm.modules.checkpoint import load_autoencoder
from sgm.util import instantiate_from_config


def __getattr__(name: str) -> Any:
    """Return an engine of `sgm.models.autoencoder`, imported on first use.

    Lightning takes seconds to load.
    """
    if name.startswith("_"):
        raise AttributeError(name)
    from sgm.models import autoencoder

    return getattr(autoencoder, name)


class VideoAutoencoderInferenceWrapper(VideoCoder):
    """The first stage of the diffusion models: an autoencoder that is not trained.

    Args:
        encoder_config, decoder_config, regularizer_config: the parts.
        loss_config: a loss for training, which is not built here.
        cp_size: number of ranks that share a clip; 0: the size given to `initialize_context_parallel`.
        ckpt_path, ignore_keys: a file of weights (see `read_state_dict`), and prefixes of its entries to leave out.
        tile_size: see `VideoCoder`.
        strict: the weights must fit exactly; False loads those that fit, and lists the others in the log.
    """

    def __init__(
        self,
        cp_size: int = 1,
        ckpt_path: str | Path | None = None,
        ignore_keys: Sequence[str] = (),
        *,
        encoder_config: Mapping[str, Any],
        decoder_config: Mapping[str, Any],
        regularizer_config: Mapping[str, Any],
        loss_config: Mapping[str, Any] | None = None,
        tile_size: int | None = None,
        strict: bool = True,
    ):
        super().__init__()
        self.encoder = instantiate_from_config(encoder_config)
        self.decoder = instantiate_from_config(decoder_config)
        self.regularization = instantiate_from_config(regularizer_config)
        self.tile_size = tile_size

        if cp_size > 1:
            initialize_context_parallel(cp_size)
        self.group = None if cp_size == 1 else get_context_parallel_group()

        if ckpt_path is not None:
            self.init_from_ckpt(ckpt_path, ignore_keys, strict)

    def init_from_ckpt(self, path: str | Path, ignore_keys: Sequence[str] = (), strict: bool = True) -> None:
        """Load the weights from a file, except entries that start with one of `ignore_keys`.

        Raises:
            UserError: the file cannot be read, or is of another architecture (see `load_autoencoder`).
        """
        load_autoencoder(self, path, ignore_keys, strict)

    def forward(
        self, x: Tensor, input_cp: bool = False, latent_cp: bool = False, output_cp: bool = False, **decode_options: Any
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Return latents, reconstruction and the regularizer's report of a clip (b, c, t, h, w).

        The reconstruction is decoded in one piece.

        Args:
            input_cp, latent_cp, output_cp: with context parallelism, whether `x`, the latents and the reconstruction
                are this rank's share; see `VideoCoder`.
        """
        z, report = self.encode(x, return_reg_log=True, input_cp=input_cp, output_cp=latent_cp)
        return z, self.decode_at_once(z, latent_cp, output_cp, **decode_options), report
