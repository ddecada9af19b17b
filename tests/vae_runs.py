"""Runs of the VAE training command in this process or in others, and their results."""

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

import processes
from distributed import run_distributed
from training_clips import write_dataset
from training_runs import runs_of

ROOT = Path(__file__).parents[1]
SIZE = 16  # of training clips; the codec does not support it


def write_mixed_dataset(folder: Path, videos: int = 4, images: int = 4) -> Path:
    """Write videos of nine frames and images, without labels."""
    from PIL import Image

    write_dataset(folder, clips=videos, frames=9, sizes=[(2 * SIZE, 2 * SIZE)])
    for label in (folder / "labels").iterdir():
        label.unlink()
    for number in range(images):
        colours = torch.randint(0, 256, (4, 4, 3), generator=torch.Generator().manual_seed(number))
        image = Image.fromarray(colours.to(torch.uint8).numpy()).resize((SIZE, SIZE))
        image.save(folder / f"{number}.png")
    return folder


def write_config(path: Path, data: str | Path, /, **changes: Any) -> Path:
    """Write a configuration that trains a very small VAE for a few steps.

    Args:
        changes: sections that are merged into it.
    """
    from omegaconf import OmegaConf

    coder = {"ch": 32, "z_channels": 4, "ch_mult": [1, 1, 1, 1], "num_res_blocks": 1, "gather_norm": True}
    config = {
        "args": {
            "train_data": [str(data)],
            "save": str(path.parent / "runs"),
            "train_iters": 4,
            "batch_size": 2,
            "save_interval": 100,
            "log_interval": 1,
            "num_workers": 0,
            "tensorboard": False,
            "device": "cpu",
        },
        "model": {
            "target": "vae_modules.autoencoder.VideoAutoencodingEngine",
            "base_learning_rate": 1e-3,
            "params": {
                "encoder_config": {"target": "vae_modules.cp_enc_dec.ContextParallelEncoder3D", "params": coder},
                "decoder_config": {"target": "vae_modules.cp_enc_dec.ContextParallelDecoder3D", "params": coder},
                "regularizer_config": {"target": "vae_modules.regularizers.DiagonalGaussianRegularizer"},
                "ema_decay": 0.9,
                "disc_start_iter": 2,
                # Adam divides by the size of a gradient: with its usual eps, rounding errors would become steps.
                "optimizer_config": {"target": "torch.optim.Adam", "params": {"eps": 1e-2}},
                "loss_config": {
                    "target": "sgm.modules.autoencoding.losses.GeneralLPIPSWithDiscriminator",
                    "params": {
                        "dims": 3,
                        "disc_start": 0,
                        "perceptual_weight": 0.0,
                        "learn_logvar": True,
                        "regularization_weights": {"kl_loss": 1e-3},
                        "discriminator_config": {
                            "target": "sgm.modules.autoencoding.discriminators.NLayerDiscriminator3D",
                            "params": {"ndf": 8, "n_layers": 2},
                        },
                    },
                },
            },
        },
        "data": {
            "target": "data_video.SFTDataset",
            "params": {"video_size": [SIZE, SIZE], "fps": 8, "max_num_frames": 5, "skip_frms_num": 0},
        },
    }
    merged = OmegaConf.to_container(OmegaConf.merge(config, changes))
    path.write_text(yaml.safe_dump(merged))
    return path


def train(config: Path, *flags: str) -> Path:
    """Run the command in this process; return the folder of its run."""
    from train_vae import main

    assert main(["--base", str(config), *flags]) == 0
    return runs_of(config)[-1]


def train_in_processes(configs: Sequence[Path], count: int) -> list[Path]:
    """Run the command in `count` processes joined by gloo, once for each configuration.

    Returns:
        The folders of the runs.
    """
    run_distributed(_train_as_one_of, count, [str(config) for config in configs])
    return [runs_of(config)[-1] for config in configs]


def _train_as_one_of(configs: Sequence[str]) -> None:
    import torch.distributed as dist

    from train_vae import main

    rank, count = dist.get_rank(), dist.get_world_size()
    os.environ.update(WORLD_SIZE=str(count), RANK=str(rank), LOCAL_RANK=str(rank))
    for config in configs:
        if not dist.is_initialized():  # a run leaves the group at its end
            dist.init_process_group("gloo", f"file://{config}.store", rank=rank, world_size=count)
        assert main(["--base", config]) == 0


def start(config: Path, *flags: str) -> processes.Process | subprocess.Popen:
    """Start the command in its own process."""
    command = [ROOT / "sat" / "train_vae.py", "--base", config, *flags]
    return processes.start(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def finish(process: processes.Process | subprocess.Popen) -> None:
    output, _ = process.communicate()
    assert process.returncode == 0, output


def checkpoint(run: Path) -> dict[str, Any]:
    """Return the newest checkpoint of a run."""
    return torch.load(run / "checkpoints" / (run / "latest").read_text(), weights_only=True)


def weights(run: Path) -> dict[str, Tensor]:
    return torch.load(run / "3d-vae.pt", weights_only=True)["state_dict"]
