"""Measure the time that checkpoints add to a run, for `checkpoint_stall.py`."""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness import markdown_table, synchronize

from cogvideox_sat.configuration.settings import LoopSettings
from cogvideox_sat.parallel.process_groups import destroy_process_groups
from cogvideox_sat.runs.host_memory import free_host_memory
from cogvideox_sat.training import deepspeed_engine
from cogvideox_sat.training.checkpoint_saver import CheckpointSaver
from cogvideox_sat.training.checkpoint_tensors import estimated_bytes
from measuring.training_arguments import deepspeed_config
from measuring.training_step import build_engine, build_network, cached_batch
from sgm import randomness
from sgm.modules.diffusionmodules.wrappers import OpenAIWrapper

WARM_UP, PLAIN = 2, 5  # steps
GIB = 2**30


@dataclass
class Cost:
    """The cost of one checkpoint, in seconds.

    The cost has the time of the call, the excess of the steps after it, and the time until the checkpoint is complete.
    """

    call: float
    steps: float
    written: float

    @property
    def stall(self) -> float:
        """Return the seconds that the checkpoint adds to the run."""
        return self.call + self.steps


class Run:
    """A network and its optimizer, whose steps are timed."""

    def __init__(self, args: argparse.Namespace):
        self.engine = build_engine(args)
        self.batch = cached_batch(args, self.engine)
        self.seeds = list(range(args.batch))
        wrapper = OpenAIWrapper(build_network(args), dtype=self.engine.dtype)
        config = deepspeed_config(args, "torch.optim.AdamW")
        schedule = LoopSettings(1000, warmup=0.0, auto_warmup_steps=0, lr_decay_style="constant")
        self.runner = self.engine.model = deepspeed_engine.initialize(wrapper, config, schedule, self.engine.dtype)

    def step(self) -> None:
        with randomness.per_sample(self.seeds):
            loss, _ = self.engine.shared_step(self.batch, drop=False)
        self.runner.backward(loss)
        self.runner.step()

    def checkpoint(self, saver: CheckpointSaver, number: int, step: float) -> Cost:
        """Save a checkpoint, and run steps until it is complete.

        Args:
            step: seconds of a step without a checkpoint.
        """
        called = timed(lambda: saver.save(number, {}, wait=False))
        begun, steps = time.perf_counter(), []
        while saver.thread.busy:
            steps.append(timed(self.step))
        saver.finish()
        written = time.perf_counter() - begun if steps else 0.0
        return Cost(called, sum(each - step for each in steps), called + written)


def timed(action: Callable[[], Any]) -> float:
    """Return the seconds of an action."""
    synchronize()
    start = time.perf_counter()
    action()
    synchronize()
    return time.perf_counter() - start


def measure(args: argparse.Namespace, repeats: int, folder: str | None) -> str:
    """Return the costs of checkpoints, as Markdown."""
    run = Run(args)
    for _ in range(WARM_UP):
        run.step()
    step = statistics.median(timed(run.step) for _ in range(PLAIN))
    size = estimated_bytes(run.runner, full=True)
    rows: list[list[object]] = []
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        for name, background in (("between the steps", False), ("behind the steps", True)):
            run_folder = Path(scratch, "run")
            run_folder.mkdir(exist_ok=True)
            saver = CheckpointSaver(run_folder, run.runner, full=True, keep_last=1, background=background)
            costs = [run.checkpoint(saver, number, step) for number in range(1, repeats + 1)]
            if background and saver.memory is None:
                raise SystemExit(f"{size / GIB:.1f} GiB do not fit into the {(free_host_memory() or 0) / GIB:.1f} free")
            rows.append(row(f"{name}, the first", costs[:1], step))
            if costs[1:]:
                rows.append(row(f"{name}, later ones", costs[1:], step))
    destroy_process_groups()
    header = ["", "s longer", "of it in the call", "in the steps after", "of a step", "s until it is there"]
    return f"{size / GIB:.2f} GiB, a step takes {step:.2f} s\n\n{markdown_table(header, rows)}"


def row(name: str, costs: list[Cost], step: float) -> list[object]:
    """Return the medians of several checkpoints."""
    stall, call, steps, written = (
        statistics.median(getattr(cost, part) for cost in costs) for part in ("stall", "call", "steps", "written")
    )
    return [name, stall, call, steps, f"{100 * stall / step:.0f} %", written]
