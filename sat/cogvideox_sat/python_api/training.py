"""`train`: fine-tuning as a function, and the run that results."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from cogvideox_sat.commands.startup import quiet_libraries
from cogvideox_sat.configuration.argument_lists import TrainingArguments
from cogvideox_sat.configuration.settings import LoopSettings
from cogvideox_sat.configuration.training_arguments import training_arguments_from_names
from cogvideox_sat.python_api.converting import logging_left_alone
from cogvideox_sat.python_api.loading import check_settings
from cogvideox_sat.runs.folders import runs_of
from cogvideox_sat.runs.videos import RunVideo, read_videos
from sgm.errors import UserError, shown


@dataclass(frozen=True)
class TrainingRun:
    """A run that has ended.

    Args:
        folder: folder of the run, with checkpoints, metrics and samples. `load(run.folder)` samples with the trained
            weights.
    """

    folder: Path

    def metrics(self) -> list[dict[str, Any]]:
        """Return the recorded metrics, a mapping for each line of `metrics.jsonl`."""
        file = self.folder / "metrics.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []

    def videos(self, name: str | None = None) -> list[RunVideo]:
        """Return the videos that were made while training, in their order.

        Each has `step`, `name`, `path`, `prompt` and `shows`.

        Args:
            name: name of the wanted videos, or its first part, such as `valid_prompts/0` or `valid_prompts`; None: all.
        """
        videos = read_videos(self.folder)
        return [video for video in videos if name is None or name in (video.name, video.name.partition("/")[0])]

    @property
    def checkpoints(self) -> list[Path]:
        """Return the folders of the kept checkpoints, the oldest first."""
        found = [path for path in self.folder.iterdir() if path.is_dir() and path.name.isdecimal()]
        return sorted(found, key=lambda path: int(path.name))


def train(
    config: str | Path | Sequence[str | Path] | TrainingArguments,
    *,
    processes: int = 1,
    set: Mapping[str, Any] | None = None,  # as the flag is called
    **arguments: Any,
) -> TrainingRun:
    """Fine-tune a model, as `cogvideox train` does, and return the run when it has ended.

    `train(["configs/cogvideox_2b_lora.yaml", "configs/sft.yaml"], train_data="clips", train_iters=500)`

    Args:
        config: configuration files, of which later ones override earlier ones; or complete arguments.
        processes: number of processes; several are started as with torchrun.
        set: keys of the configuration with their values, such as {"deepspeed.optimizer.params.lr": 1e-4}.
        arguments: arguments of the command, such as `train_data`, `train_iters`, `save`, `resume`; see
            docs/fine_tuning.md.

    Raises:
        UserError: an argument does not exist or has an invalid value, a file is missing, or the run cannot continue.
    """
    if type(processes) is not int or processes < 1:
        raise UserError(f"processes: got {shown(processes)}; expected a whole number of at least 1")
    check_settings(set)
    if not isinstance(config, str | Path | list | tuple | TrainingArguments) or not config:
        raise UserError(f"config: got {shown(config)}; give configuration files (.yaml)")
    if isinstance(config, TrainingArguments):
        if arguments or set:
            raise UserError(
                f"config: it is complete; leave out {', '.join([*arguments, *(set or {})])}, or change config"
            )
        args = config
    else:
        base = [config] if isinstance(config, str | Path) else list(config)
        args = training_arguments_from_names(base, arguments, set or {})
    settings = LoopSettings.from_args(args)
    before = {run: last_change(run) for run in runs_of(settings)}
    if processes == 1:
        quiet_libraries()
        import train_video

        with logging_left_alone():
            train_video.training_main(args)
    else:
        train_in_processes(args, processes)
    changed = [run for run in runs_of(settings) if last_change(run) != before.get(run)]
    if not changed:  # `resume` named a complete run
        changed = list(before) or [Path(args.save)]
    return TrainingRun(max(changed, key=last_change))


def last_change(run: Path) -> int:
    """Return when a run last saved a checkpoint, in nanoseconds; 0 if the folder is not a run."""
    latest = run / "latest"
    return latest.stat().st_mtime_ns if latest.is_file() else 0


def train_in_processes(args: TrainingArguments, processes: int) -> None:
    """Train in several processes, whose output goes to this process's output.

    Args:
        args: complete arguments, with the merged configuration.

    Raises:
        UserError: the training failed; the message is the error line of the training.
    """
    with tempfile.TemporaryDirectory(prefix="cogvideox-") as folder:
        file = Path(folder) / "training_config.yaml"
        file.write_text(yaml.safe_dump(args.merged_config, sort_keys=False))
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        program = find_spec("train_video")
        assert program is not None and program.origin, "it belongs to the package"
        command = [*launcher, program.origin, "--base", str(file)]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert process.stderr is not None, "it is a pipe"
        reason = ""
        for line in process.stderr:
            sys.stderr.write(line)
            if line.startswith("error: "):
                reason = line.removeprefix("error: ").strip()
        if process.wait():
            raise UserError(reason or f"training ended with the exit code {process.returncode}; see its log")
