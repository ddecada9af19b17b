"""Runs that are killed with -9 at random moments and resumed lose nothing.

No checkpoint is lost or half-written, and losses equal those of a run without kills. See `--soak_kills` in
`conftest.py`.
"""

import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from subprocess import Popen, TimeoutExpired
from typing import Any

import pytest
import torch

import training_runs
import vae_runs
from cogvideox_sat.runs.retention import last_saved
from training_clips import write_dataset

pytestmark = [pytest.mark.slow]

STEPS = 12
ARGS = {"train_iters": STEPS, "save_interval": 1, "keep_last": 2}
Start = Callable[..., Popen]


def args(name: str, background: bool) -> dict[str, Any]:
    """Return the arguments of a run; without kills it writes checkpoints between steps."""
    return {**ARGS, "background_checkpoints": background and name != "straight"}


def whole(process: Popen) -> float:
    """Wait for a process without killing it; return its seconds."""
    started = time.monotonic()
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return time.monotonic() - started


def killed(process: Popen, seconds: float) -> bool:
    """Kill a process after some seconds; return False if it ended successfully before."""
    try:
        output, _ = process.communicate(timeout=seconds)
    except TimeoutExpired:
        process.kill()
        output, _ = process.communicate()
    assert process.returncode in (0, -signal.SIGKILL), output
    return process.returncode != 0  # it may end by itself just before the kill


def soak(start: Start, configs: Callable[[str], Path], kills: int, check: Callable[[Path], None]) -> list[Path]:
    """Run to the end with `kills` kills on the way; return the folders of the runs.

    The first folder is that of a run without kills.

    Args:
        start: starts the command in a process of its own.
        configs: returns the configuration of a run, by its name.
        check: fails unless the newest checkpoint of a run can be loaded.
    """
    chance = random.Random(0)
    straight = configs("straight")
    seconds = whole(start(straight))
    runs, done = training_runs.runs_of(straight), 0
    while done < kills:
        config = configs(f"broken-{len(runs)}")
        while killed(start(config, "--resume", "latest"), chance.uniform(0.2, 1.0) * seconds):
            done += 1
            for run in filter(last_saved, training_runs.runs_of(config)):
                check(run)
            if done == kills:
                whole(start(config, "--resume", "latest"))
                break
        runs += [run for run in training_runs.runs_of(config) if last_saved(run)]
    return runs


@pytest.mark.parametrize("background", [False, True])
def test_fine_tuning(tmp_path, tiny, soak_kills, background):
    data = write_dataset(tmp_path / "data", clips=6, frames=12, sizes=[(64, 96)])

    def config(name: str) -> Path:
        return training_runs.write_config(
            tmp_path / f"{name}.yaml", tiny, "5b", data, True, save=str(tmp_path / name), **args(name, background)
        )

    def check(run: Path) -> None:
        assert training_runs.weights(run)
        assert int((run / "latest").read_text()) <= STEPS

    expected, *others = soak(training_runs.start, config, soak_kills, check)
    assert len(training_runs.metrics(expected)) == STEPS
    for run in others:
        assert training_runs.metrics(run) == training_runs.metrics(expected)
        assert training_runs.weights(run).keys() == training_runs.weights(expected).keys()
        for name, tensor in training_runs.weights(run).items():
            assert torch.equal(tensor, training_runs.weights(expected)[name]), name


@pytest.mark.parametrize("background", [False, True])
def test_vae_training(tmp_path, soak_kills, background):
    data = vae_runs.write_mixed_dataset(tmp_path / "data")

    def config(name: str) -> Path:
        return vae_runs.write_config(
            tmp_path / f"{name}.yaml", data, args={"save": str(tmp_path / name), **args(name, background)}
        )

    def check(run: Path) -> None:
        assert vae_runs.checkpoint(run)["run"]["step"] <= STEPS

    expected, *others = soak(vae_runs.start, config, soak_kills, check)
    for run in others:
        assert training_runs.metrics(run, "train/loss/total") == training_runs.metrics(expected, "train/loss/total")
        ours, theirs = (vae_runs.checkpoint(each)["state_dict"] for each in (run, expected))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
