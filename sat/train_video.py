"""Fine-tune a model.

    python sat/train_video.py --base MODEL.yaml configs/sft.yaml --seed N
    torchrun --standalone --nproc_per_node=N sat/train_video.py ...

With a `lora_config`, only its adapter is trained; otherwise the network is trained. Checkpoints are written to
`{save}/{experiment_name}-MM-DD-HH-MM/{iteration}`; `--resume latest` continues from the last one. `--inspect_data` only
shows the data for training. On SIGTERM and SIGINT, the run finishes the step and saves. Exit codes: 0 the run is
complete, or was asked to stop and is saved; 2 the arguments or files have an error, or losses are not finite; 130
interrupted before there was anything to save.
"""

import sys
from pathlib import Path

# In a checkout, find sgm and vae_modules whatever the current working directory is.
if Path(__file__).resolve().parent.name == "sat":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import logging
import os
from collections.abc import Sequence
from typing import Any

from cogvideox_sat.commands.input_paths import tell_places
from cogvideox_sat.commands.launchers import adopt_launcher
from cogvideox_sat.commands.startup import quiet_libraries, run_command
from cogvideox_sat.configuration.deepspeed_runtime import BatchSizes
from cogvideox_sat.configuration.program_arguments import arguments_from
from cogvideox_sat.configuration.training_arguments import TrainingArguments, complete, get_training_args
from cogvideox_sat.training.plan import TrainingPlan, plan_inspection, plan_run

logger = logging.getLogger("train_video")


def main(command_line: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    return run_command(lambda: plan(command_line), train, logger, command_line)


def training_main(args: Any, model_cls: type | None = None) -> int:
    """Train for a program; return 0 if the run is complete, or was stopped and is saved.

    Args:
        args: the result of `configuration.training_arguments.get_training_args`, or an object with such attributes.
        model_cls: a subclass of `SATVideoDiffusionEngine` to use in its place.

    Raises:
        UserError: the arguments or files have an error, or losses are not finite.
    """
    adopt_launcher()
    given = complete(arguments_from(TrainingArguments, args, model_cls))
    with given.sources.naming():
        plan = plan_inspection(given) if given.inspect_data else plan_run(given)
    tell_places()
    return train((given, plan))


def plan(command_line: Sequence[str] | None) -> tuple[TrainingArguments, TrainingPlan | BatchSizes]:
    """Return the checked arguments of the command line, and the plan for them."""
    args = get_training_args(command_line)
    with args.sources.naming():
        return args, plan_inspection(args) if args.inspect_data else plan_run(args)


def train(planned: tuple[TrainingArguments, TrainingPlan | BatchSizes]) -> int:
    """Train, or inspect the data, as planned; return the exit code."""
    args, plan = planned
    if isinstance(plan, BatchSizes):  # for --inspect_data
        from cogvideox_sat.runs.data_inspection import inspect_training_data

        with args.sources.naming():
            return inspect_training_data(args, plan)
    if plan.finished:
        logger.info("%s is at the last step; raise train_iters to continue", plan.resume)
        return 0
    quiet_libraries()
    if args.device == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"  # DeepSpeed chooses when it is imported
    # This import takes seconds (PyTorch), so that it comes after all checks.
    from cogvideox_sat.training.run import run

    with args.sources.naming():
        return run(args, plan)


if __name__ == "__main__":
    sys.exit(main())
