"""Runs of the training command in this process or in others, and their results."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

import processes
from conftest import TinyModels
from distributed import run_distributed

ROOT = Path(__file__).parents[1]
LORA = {
    "model": {
        "network_config": {
            "params": {"modules": {"lora_config": {"target": "sat.model.finetune.lora2.LoraMixin", "params": {"r": 4}}}}
        }
    }
}


def write_config(
    path: Path,
    tiny: TinyModels,
    family: str,
    data: str | Path,
    lora: bool = False,
    zero: int = 0,
    micro_batch: int = 1,
    model: dict[str, Any] | None = None,
    deepspeed: dict[str, Any] | None = None,
    params: dict[str, Any] | None = None,
    optimizer: dict[str, Any] | None = None,
    **args: Any,
) -> Path:
    """Write a configuration that trains a tiny model for a few steps.

    Args:
        args: settings to add; other sections are added too.
        optimizer: replaces Adam.
    """
    from omegaconf import OmegaConf

    config = {
        "args": {
            "mode": "finetune",
            "train_data": [str(data)],
            "save": str(path.parent / "runs"),
            "train_iters": 4,
            "save_interval": 100,
            "log_interval": 1,
            "num_workers": 0,
            "auto_warmup_steps": 0,
            "tensorboard": False,
            **args,
        },
        "model": {
            # With it each process draws timesteps from its own range.
            "loss_fn_config": {"params": {"sigma_sampler_config": {"params": {"uniform_sampling": False}}}},
        },
        "data": {
            "target": "data_video.SFTDataset",
            "params": {"video_size": [32, 48], "fps": 8, "max_num_frames": 9, "skip_frms_num": 0, **(params or {})},
        },
        "deepspeed": {
            "train_micro_batch_size_per_gpu": micro_batch,
            "gradient_clipping": 1.0,
            # With the threshold, ZeRO-3 divides even the smallest tensors.
            "zero_optimization": {"stage": zero, "stage3_param_persistence_threshold": 0},
            # Adam divides by the size of a gradient: with its usual eps, rounding errors would become steps.
            "optimizer": {"type": "sat.ops.FusedEmaAdam", "params": {"lr": 1e-3, "betas": [0.9, 0.95], "eps": 1e-4}},
        },
    }
    extra = {"model": model or {}, "deepspeed": deepspeed or {}}
    merged = OmegaConf.to_container(OmegaConf.merge(config, LORA if lora else {}, extra))
    merged["deepspeed"]["optimizer"] = optimizer or merged["deepspeed"]["optimizer"]
    return tiny.variant(family, path, **merged)


def train(config: Path, *flags: str) -> Path:
    """Run the command in this process; return the folder of its run."""
    from train_video import main

    before = set(runs_of(config))
    assert main(["--base", str(config), *flags]) == 0
    made = [run for run in runs_of(config) if run not in before] or runs_of(config)
    return made[-1]


def precomputed(folder: Path, tiny: TinyModels, family: str, data: Path, **sections: Any) -> Path:
    """Return the data encoded by the VAE and the text encoder of a tiny model."""
    from tools.precompute_latents import main

    config = write_config(folder / "precompute.yaml", tiny, family, data, **sections)
    assert main(["--base", str(config), "--output", str(folder / "latents")]) == 0
    return folder / "latents"


def train_in_processes(config: Path, count: int, *flags: str) -> Path:
    """Run the command in `count` processes joined by gloo; return the folder of its run."""
    run_distributed(_train_as_one_of, count, str(config), *flags)
    return runs_of(config)[-1]


def _train_as_one_of(config: str, *flags: str) -> None:
    import torch.distributed as dist

    from train_video import main

    os.environ.update(WORLD_SIZE=str(dist.get_world_size()), RANK=str(dist.get_rank()), LOCAL_RANK=str(dist.get_rank()))
    assert main(["--base", config, *flags]) == 0


def start(config: Path, *flags: str) -> processes.Process | subprocess.Popen:
    """Start the command in its own process."""
    command = [ROOT / "sat" / "train_video.py", "--base", config, *flags]
    return processes.start(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def train_alone(config: Path, *flags: str) -> Path:
    """Run the command in its own process, as `start` does; return the folder of its run.

    Earlier computations in a process, and its threads, would change the last bit of sums.
    """
    process = start(config, *flags)
    output, _ = process.communicate()
    assert process.returncode == 0, output
    return runs_of(config)[-1]


def runs_of(config: Path) -> list[Path]:
    """Return the folders of a configuration's runs, oldest first."""
    save = Path(yaml.safe_load(config.read_text())["args"]["save"])
    return sorted(save.glob("*/"), key=lambda run: run.stat().st_ctime_ns)


def metrics(run: Path, name: str = "loss") -> dict[int, float]:
    """Return the values of a metric by step."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line[name] for line in lines if name in line}


def weights(run: Path, suffix: str = "") -> dict[str, Tensor]:
    """Return the content of a run's newest checkpoint; `suffix` "-ema" for averages."""
    folder = run / ((run / "latest").read_text() + suffix)
    return torch.load(folder / "mp_rank_00_model_states.pt", weights_only=True)["module"]


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float = 0.0) -> None:
    assert ours.keys() == theirs.keys()
    for name in theirs:
        assert torch.allclose(ours[name].float(), theirs[name].float(), rtol=0, atol=tolerance), name
