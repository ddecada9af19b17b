"""Small autoencoders to train in tests, their data, and Lightning's trainer without logs."""

import warnings
from collections.abc import Iterable
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

LOSS = {
    "target": "sgm.modules.autoencoding.losses.GeneralLPIPSWithDiscriminator",
    "params": {
        "disc_start": 0,
        "disc_num_layers": 1,
        "perceptual_weight": 0,
        "learn_logvar": True,
        "regularization_weights": {"kl_loss": 1e-6},
    },
}
VIDEO_LOSS = {
    **LOSS,
    "params": {
        **LOSS["params"],
        "dims": 3,
        "discriminator_config": {
            "target": "sgm.modules.autoencoding.discriminators.NLayerDiscriminator3D",
            "params": {"ndf": 16, "n_layers": 1},
        },
    },
}
GAUSSIAN = {"target": "sgm.modules.autoencoding.regularizers.DiagonalGaussianRegularizer"}


class MeanSquare(nn.Module):
    """A minimal loss for an engine, without a discriminator or parameters."""

    def __init__(self, penalty: float = 0.0):
        super().__init__()
        self.penalty = penalty

    def forward(
        self, inputs: Tensor, reconstructions: Tensor, *, regularization_log: dict[str, Tensor], split: str, **_: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        loss = (inputs - reconstructions).square().mean() + self.penalty * sum(
            value for name, value in regularization_log.items() if name.endswith("_loss")
        )
        return loss, {f"{split}/loss/total": loss.detach()}


def video_config(gather_norm: bool = True, **params: Any) -> dict[str, Any]:
    """Return a `VideoAutoencodingEngine` with an adversarial loss.

    The engine divides time and space by four.
    """
    coder = {"ch": 32, "ch_mult": [1, 1, 1], "num_res_blocks": 1, "z_channels": 4, "gather_norm": gather_norm}
    return {
        "target": "sgm.models.autoencoder.VideoAutoencodingEngine",
        "params": {
            "encoder_config": {"target": "vae_modules.cp_enc_dec.ContextParallelEncoder3D", "params": coder},
            "decoder_config": {"target": "vae_modules.cp_enc_dec.ContextParallelDecoder3D", "params": coder},
            "regularizer_config": GAUSSIAN,
            "loss_config": VIDEO_LOSS,
            **params,
        },
    }


def image_config(target: str = "AutoencodingEngine", **params: Any) -> dict[str, Any]:
    """Return an engine for images, which halves height and width, with an adversarial loss."""
    coder = {
        "ch": 32, "ch_mult": [1, 1], "num_res_blocks": 1, "z_channels": 4, "attn_resolutions": [], "resolution": 16,
        "in_channels": 3, "out_ch": 3, "double_z": True,
    }  # fmt: skip
    if target == "AutoencodingEngine":
        network = "sgm.modules.diffusionmodules.model."
        parts = {
            "encoder_config": {"target": f"{network}Encoder", "params": coder},
            "decoder_config": {"target": f"{network}Decoder", "params": coder},
        }
    else:
        parts = {"embed_dim": 4, "ddconfig": coder}
    if target != "AutoencoderKL":
        parts["regularizer_config"] = GAUSSIAN
    return {"target": f"sgm.models.autoencoder.{target}", "params": {**parts, "loss_config": LOSS, **params}}


def moving_squares(clips: int, frames: int, size: int = 16, seed: int = 0) -> Tensor:
    """Return bright squares that move over dark ground: uint8 (clips, frames, 3, size, size)."""
    generator = torch.Generator().manual_seed(seed)
    video = torch.full((clips, frames, 3, size, size), 40, dtype=torch.uint8)
    for clip in video:
        top, left, down, right = torch.randint(-2, 3, (4,), generator=generator).tolist()
        colour = torch.randint(128, 256, (3, 1, 1), generator=generator, dtype=torch.uint8)
        for t, frame in enumerate(clip):
            rows = torch.arange(size // 4 + top + down * t, size * 3 // 4 + top + down * t) % size
            columns = torch.arange(size // 4 + left + right * t, size * 3 // 4 + left + right * t) % size
            frame[:, rows[:, None], columns] = colour
    return video


def fit(engine: pl.LightningModule, batches: Iterable[Any], steps: int, **options: Any) -> pl.Trainer:
    """Train for `steps` steps of the optimizers; `ckpt_path` resumes."""
    ckpt_path = options.pop("ckpt_path", None)
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    settings = {"accelerator": "cpu", "devices": 1, "use_distributed_sampler": False, **quiet, **options}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = pl.Trainer(max_steps=steps, **settings)
        extra = {} if ckpt_path is None else {"ckpt_path": ckpt_path, "weights_only": True}
        trainer.fit(engine, DataLoader(list(batches), batch_size=None), **extra)
    return trainer
