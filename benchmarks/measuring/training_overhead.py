"""Measure the parts of the trainer's steps, for `training.py --overhead`."""

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from harness import ROOT, markdown_table, synchronize
from torch import Tensor, nn

from build_tiny_model import main as build_tiny_model
from cogvideox_sat.configuration.files import load_configs
from cogvideox_sat.configuration.training_arguments import TrainingArguments, get_training_args
from cogvideox_sat.parallel.process_groups import destroy_process_groups, initialize_process_groups
from cogvideox_sat.training.plan import TrainingPlan, plan_run
from cogvideox_sat.training.run import Trainer
from cogvideox_sat.weights.checkpoint_files import is_adapter
from measuring.training_arguments import deepspeed_config
from measuring.training_step import build_network
from tools.precompute_latents import main as precompute
from training_clips import write_dataset

WARM_UP = 2  # steps of the trainer


def random_base(args: argparse.Namespace, path: Path) -> Path:
    """Write a checkpoint of random weights for `args.model`, with or without an adapter."""
    weights = build_network(args).state_dict()
    base = {name.replace(".original.", "."): tensor for name, tensor in weights.items() if not is_adapter(name)}
    torch.save({"module": base}, path)
    return path


def overhead(args: argparse.Namespace) -> str:
    """Return the shares of the trainer's steps, as Markdown."""
    with tempfile.TemporaryDirectory() as folder:
        training_args = training_from_cache(args, Path(folder))
        plan = plan_run(training_args)
        initialize_process_groups()
        trainer = TimedTrainer(training_args, plan)
        trainer.train()
        trainer.watch.stop()
        destroy_process_groups()
    return trainer.watch.table(warm_up=WARM_UP)


def training_from_cache(args: argparse.Namespace, folder: Path) -> Any:
    """Return arguments for training `args.model` from a cache of four generated clips.

    The VAE and the text encoder of the tests' small model make the cache, so that the network takes texts of their
    size.
    """
    tiny = load_configs([ROOT / "tests" / "configs" / "5b.yaml"])
    tiny["args"]["load"] = str(folder / "tiny")
    text = tiny["model"]["conditioner_config"]["params"]["emb_models"][0]["params"]
    text["model_dir"] = str(folder / "t5")
    tiny["model"]["first_stage_config"]["params"]["ckpt_path"] = str(folder / "vae.pt")
    modules, tiny_modules = args.params["modules"], tiny["model"]["network_config"]["params"]["modules"]
    modules["pos_embed_config"]["params"]["text_length"] = text["max_length"]
    modules["patch_embed_config"] = tiny_modules["patch_embed_config"]

    frames, height, width = 4 * (args.clip[0] - 1) + 1, 8 * args.clip[1], 8 * args.clip[2]
    clips = write_dataset(folder / "clips", clips=4, frames=frames, sizes=[(height, width)])
    config = {
        "args": {
            "load": str(random_base(args, folder / "base.pt")),
            "save": str(folder / "runs"),
            "train_data": [str(clips)],
            "train_iters": WARM_UP + args.repeats,
            "num_workers": 1,
            "device": args.device.type,
            "bf16": args.dtype == "bfloat16",
        },
        "model": {
            **args.model_config,
            **{part: tiny["model"][part] for part in ("conditioner_config", "first_stage_config")},
        },
        "data": {
            "target": "data_video.SFTDataset",
            "params": {"video_size": [height, width], "fps": 8, "max_num_frames": frames, "skip_frms_num": 0},
        },
        "deepspeed": deepspeed_config(args, "sat.ops.FusedEmaAdam"),
    }
    files = {name: folder / f"{name}.yaml" for name in ("tiny", "training")}
    for file, content in zip(files.values(), (tiny, config), strict=True):
        file.write_text(yaml.safe_dump(content))
    base, latents = ["--base", str(files["training"])], str(folder / "latents")
    if build_tiny_model(["--config", str(files["tiny"])]) or precompute([*base, "--output", latents]):
        raise SystemExit("the cache of latents could not be made")
    return get_training_args([*base, "--train_data", latents])


class StepWatch:
    """Times the parts of a trainer's steps.

    The program waits for the device around each part, so that queued work counts for its own part. An undisturbed run
    overlaps both: the share of all other work is an upper limit.
    """

    PARTS = ("forward", "backward", "optimizer", "waiting for data")

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self.started: float | None = None
        self.forward_started = 0.0

    def start(self) -> None:
        """Begin a step, and end the step before it with everything after it."""
        self.stop()
        self.started = time.perf_counter()
        self.steps.append({})

    def stop(self) -> None:
        """End the current step, if there is one."""
        if self.started is not None:
            synchronize()
            self.steps[-1]["step"] = time.perf_counter() - self.started

    @contextmanager
    def timing(self, part: str) -> Iterator[None]:
        """Add the time of the block to a part of the step."""
        synchronize()
        start = time.perf_counter()
        yield
        synchronize()
        self.add(part, time.perf_counter() - start)

    def add(self, part: str, seconds: float) -> None:
        self.steps[-1][part] = self.steps[-1].get(part, 0.0) + seconds

    def before_forward(self, *_: Any) -> None:
        """Start timing; a hook for a module that is about to run."""
        synchronize()
        self.forward_started = time.perf_counter()

    def after_forward(self, *_: Any) -> None:
        """Stop timing; a hook for a module that has run."""
        synchronize()
        self.add("forward", time.perf_counter() - self.forward_started)

    def table(self, warm_up: int) -> str:
        """Return the medians of the steps after `warm_up`, as Markdown."""
        steps = self.steps[warm_up:]
        for step in steps:
            step["everything else"] = step["step"] - sum(step[name] for name in self.PARTS)
        seconds = {
            name: statistics.median(step[name] for step in steps) for name in ("step", *self.PARTS, "everything else")
        }
        rows = [[name, f"{1000 * value:.1f}", f"{value / seconds['step']:.2%}"] for name, value in seconds.items()]
        outside = statistics.median(
            (step["waiting for data"] + step["everything else"]) / step["step"] for step in steps
        )
        return (
            f"{markdown_table(['', 'ms', 'share'], rows)}\n\n"
            f"Outside of forward, backward and optimizer: {outside:.2%} of a step (median of {len(steps)})"
        )


class TimedNetwork:
    """A network in DeepSpeed's engine with timed backward passes and updates."""

    def __init__(self, network: nn.Module, watch: StepWatch):
        self._network, self._watch = network, watch

    def backward(self, loss: Tensor) -> None:
        with self._watch.timing("backward"):
            self._network.backward(loss)

    def step(self) -> None:
        with self._watch.timing("optimizer"):
            self._network.step()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._network, name)


class TimedTrainer(Trainer):
    """The trainer with timed steps.

    The trainer saves nothing, since checkpoints are not part of a step.
    """

    def __init__(self, args: TrainingArguments, plan: TrainingPlan):
        super().__init__(args, plan)
        self.watch = StepWatch()
        self.network.register_forward_pre_hook(self.watch.before_forward)
        self.network.register_forward_hook(self.watch.after_forward)
        self.network = TimedNetwork(self.network, self.watch)
        self.batches = self.timed(self.batches)

    def timed(self, batches: Iterator[Any]) -> Iterator[Any]:
        while True:
            with self.watch.timing("waiting for data"):
                batch = next(batches)
            yield batch

    def train_step(self) -> None:
        self.watch.start()
        super().train_step()

    def save(self, wait: bool = False) -> None:
        pass
