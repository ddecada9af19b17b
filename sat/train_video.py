"""Fine-tune a model: `python sat/train_video.py --base MODEL.yaml configs/sft.yaml --seed N`, or for several processes
`torchrun --standalone --nproc_per_node=N sat/train_video.py ...`.

A configuration with a `lora_config` trains its adapter alone, one without trains the network. Checkpoints go to
`{save}/{experiment_name}-MM-DD-HH-MM/{iteration}`; `--resume latest` goes on from the last. `--inspect_data` only says
what would be trained on. SIGTERM and SIGINT finish the step and save. Exit codes: 0 the run is complete, or was asked
to stop and is saved; 2 a mistake in the arguments or files, or losses that are not finite, ended the run; 130
interrupted before there was anything to save.
"""

import sys
from pathlib import Path

if Path(__file__).resolve().parts[-2:-1] == ("sat",):  # in a checkout: sgm and vae_modules, wherever it is run from
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import logging
import os
from collections.abc import Sequence
from typing import Any

from cogvideox_sat.commands.input_paths import tell_places
from cogvideox_sat.commands.launchers import adopt_launcher
from cogvideox_sat.commands.startup import quiet_libraries, run_command
from cogvideox_sat.configuration.deepspeed import BatchSizes
from cogvideox_sat.configuration.program_arguments import arguments_from
from cogvideox_sat.configuration.training_arguments import TrainingArguments, complete, get_training_args
from cogvideox_sat.training.plan import TrainingPlan, plan_inspection, plan_run

logger = logging.getLogger("train_video")


def main(command_line: Sequence[str] | None = None) -> int:
    return run_command(lambda: plan(command_line), train, logger, command_line)


def training_main(args: Any, model_cls: type | None = None) -> int:
    """Train as a program asks; return 0 when the run is complete, or was asked to stop and is saved.

    Args:
        args: what `configuration.training_arguments.get_training_args` returns, or an object with such attributes.
        model_cls: a subclass of `SATVideoDiffusionEngine`, which is used in its place.

    Raises:
        UserError: a mistake in the arguments or files, or losses that are not finite.
    """
    adopt_launcher()
    given = complete(arguments_from(TrainingArguments, args, model_cls))
    with given.sources.naming():
        plan = plan_inspection(given) if given.inspect_data else plan_run(given)
    tell_places()
    return train((given, plan))


def plan(command_line: Sequence[str] | None) -> tuple[TrainingArguments, TrainingPlan | BatchSizes]:
    args = get_training_args(command_line)
    with args.sources.naming():
        return args, plan_inspection(args) if args.inspect_data else plan_run(args)


def train(planned: tuple[TrainingArguments, TrainingPlan | BatchSizes]) -> int:
    args, plan = planned
    if isinstance(plan, BatchSizes):  # for --inspect_data
        from cogvideox_sat.runs.data_inspection import inspect_training_data

        with args.sources.naming():
            return inspect_training_data(args, plan)
    if plan.finished:
        logger.info("%s is at the last step: raise train_iters to go on", plan.resume)
        return 0
    quiet_libraries()
    if args.device == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"  # DeepSpeed chooses when it is imported
    # Imports PyTorch: seconds, spent only once the request is known to make sense
    from cogvideox_sat.training.run import run

    with args.sources.naming():
        return run(args, plan)


if __name__ == "__main__":
    sys.exit(main())
