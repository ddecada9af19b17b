"""Train a video autoencoder.

    python sat/train_vae.py --base configs/vae_3d.yaml --train_data data/train
    torchrun --standalone --nproc_per_node=N sat/train_vae.py ...

A run writes to `{save}/{experiment_name}-MM-DD-HH-MM`. With each checkpoint it writes `3d-vae.pt`, which sampling and
fine-tuning take as `first_stage_config.params.ckpt_path`. `--resume latest` continues from the last checkpoint. On
SIGTERM and SIGINT, the run finishes the step and saves. Exit codes: 0 the run is complete, or was asked to stop and is
saved; 2 the arguments or files have an error, or losses are not finite; 130 interrupted before there was anything to
save.
"""

import sys
from pathlib import Path

# In a checkout, find sgm and vae_modules whatever the current working directory is.
if Path(__file__).resolve().parent.name == "sat":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import logging
from collections.abc import Sequence

from cogvideox_sat.commands.startup import quiet_libraries, run_command
from cogvideox_sat.configuration.vae_training_arguments import VaeTrainingArguments, get_vae_training_args
from cogvideox_sat.vae_training.plan import VaeTrainingPlan, plan_vae_inspection, plan_vae_run

logger = logging.getLogger("train_vae")


def main(command_line: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    return run_command(lambda: plan(command_line), train, logger, command_line)


def plan(command_line: Sequence[str] | None) -> tuple[VaeTrainingArguments, VaeTrainingPlan | int]:
    """Return the checked arguments of the command line, and the plan for them."""
    args = get_vae_training_args(command_line)
    with args.sources.naming():
        return args, plan_vae_inspection(args) if args.inspect_data else plan_vae_run(args)


def train(planned: tuple[VaeTrainingArguments, VaeTrainingPlan | int]) -> int:
    """Train, or inspect the data, as planned; return the exit code."""
    args, plan = planned
    if isinstance(plan, int):  # for --inspect_data
        from cogvideox_sat.runs.data_inspection import inspect_vae_data

        with args.sources.naming():
            return inspect_vae_data(args, plan)
    if plan.finished:
        logger.info("%s is at the last step; raise train_iters to continue", plan.resume)
        return 0
    quiet_libraries()
    # This import takes seconds (PyTorch), so that it comes after all checks.
    from cogvideox_sat.vae_training.run import run

    with args.sources.naming():
        return run(args, plan)


if __name__ == "__main__":
    sys.exit(main())
