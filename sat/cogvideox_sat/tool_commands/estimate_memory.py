"""Estimate the memory of a run from its configuration, without weights or data.

  python tools/estimate_memory.py --base configs/cogvideox_5b_lora.yaml configs/sft.yaml
  python tools/estimate_memory.py --base configs/cogvideox_5b.yaml configs/sft.yaml configs/sft_full.yaml --processes 8
  python tools/estimate_memory.py --base configs/cogvideox_5b.yaml configs/inference.yaml

A configuration with `data:` is for fine-tuning. The estimate is the same as a run logs before its first step: for one
process, on its device and in host memory, for the largest clips that `data:` asks for. It is given both for training on
precomputed latents and for training on clips. All arguments of sat/train_video.py are accepted.

A configuration without `data:` is for sampling. The estimate is the memory of the device for each stage, by --offload,
--guidance_batch and --vae_frames_at_once, and the choice of --fit. All arguments of sat/sample_video.py are accepted:
with --fit 12GB, the last line is the choice of that run.

Exit codes: 0 the estimate is printed, 2 the arguments or files have an error.
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from arguments import get_args
from cogvideox_sat.commands.input_paths import tell_places
from cogvideox_sat.commands.tool_parser import ToolParser, run_tool
from cogvideox_sat.configuration.deepspeed_runtime import batch_sizes
from cogvideox_sat.configuration.files import load_configs
from cogvideox_sat.configuration.model_limits import ModelLimits, check_sharing
from cogvideox_sat.configuration.model_section import check_trained_part
from cogvideox_sat.configuration.model_values import check_data_section, check_model_values
from cogvideox_sat.configuration.training_arguments import TrainingArguments, get_training_args
from cogvideox_sat.training.plan import check_clips
from sgm.errors import UserError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingRequest:
    """The fine-tuning run to estimate; see `training.memory_forecast.forecast`."""

    args: TrainingArguments
    frames: int
    sizes: list[tuple[int, int]]
    micro_batch: int


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    return run_tool(estimate, arguments, logger.name)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = ToolParser(__doc__)
    add = parser.add_argument
    add(
        "--base",
        nargs="+",
        required=True,
        metavar="FILE",
        help="configuration files; later files override earlier ones",
    )
    add(
        "--processes",
        type=int,
        default=1,
        metavar="N",
        help="number of processes of a fine-tuning run, over which ZeRO divides it",
    )
    return parser


def estimate(arguments: Sequence[str] | None) -> None:
    """Write the estimate to standard output."""
    options, rest = build_parser().parse_known_args(arguments)
    config = load_configs(options.base, used=("model", "data"))
    lines = of_training(options, rest) if config.get("data") else of_sampling(options, rest)
    sys.stdout.writelines(f"{line}\n" for line in lines)


def of_training(options: argparse.Namespace, rest: Sequence[str]) -> list[str]:
    """Return the lines of the estimate for fine-tuning.

    Raises:
        UserError: an argument is wrong, or the memory of such a run is not estimated.
    """
    # Missing weights do not matter for the estimate.
    args = get_training_args(["--base", *options.base, *rest, "--force_train"])
    with args.sources.naming():
        request = plan(args, options.processes)
        tell_places()
        from cogvideox_sat.training.memory_forecast import forecast  # imports PyTorch

        return forecast(request.args, request.frames, request.sizes, options.processes, request.micro_batch)


def plan(args: TrainingArguments, processes: int) -> TrainingRequest:
    """Return the fine-tuning run that the arguments describe.

    Raises:
        UserError: such a run is not possible.
    """
    if processes < 1:
        raise UserError(f"--processes: got {processes}; it must be at least 1")
    check_whole_network(args.model_parallel_size)
    check_model_values(args.model_config, args.sources)
    check_data_section(args.data_config, args.sources)
    check_sharing(args.model_config, args.model_parallel_size, args.lora_load)
    check_trained_part(args.model_config)
    params = args.data_config.get("params") or {}
    check_clips(params, ModelLimits.from_config(args.model_config))
    frames: Any = params.get("max_num_frames", params.get("num_frames"))
    sizes: Any = params.get("video_size", params.get("image_size"))
    for name, value in (("max_num_frames", frames), ("video_size", sizes)):
        if value is None:
            raise UserError(f"data.params.{name}: missing; the memory depends on it; name it in the configuration")
    sizes = sizes if isinstance(sizes[0], list) else [sizes]
    shared = args.sequence_parallel_size
    if processes % shared:
        raise UserError(f"--processes: got {processes}; sequence_parallel_size {shared} does not divide it")
    micro_batch = batch_sizes(args.deepspeed_config, processes // shared).micro
    return TrainingRequest(args, frames, [(height, width) for height, width in sizes], micro_batch)


def check_whole_network(model_parallel_size: int) -> None:
    """Check that each process has the whole network, else raise UserError."""
    if model_parallel_size > 1:
        raise UserError(
            f"model_parallel_size: got {model_parallel_size}; the memory of a network that processes share is not "
            "estimated; leave it at 1"
        )


def of_sampling(options: argparse.Namespace, rest: Sequence[str]) -> list[str]:
    """Return the lines of the estimate for sampling.

    Raises:
        UserError: an argument is wrong, or the memory of such a run is not estimated.
    """
    if options.processes != 1:
        raise UserError(
            "--processes: only fine-tuning takes it, with a configuration that has a data section; leave it out"
        )
    args = get_args(["--base", *options.base, *rest], complete=False)
    with args.sources.naming():
        check_model_values(args.model_config, args.sources)
        check_sharing(args.model_config, args.model_parallel_size, args.lora_load)
        check_whole_network(args.model_parallel_size)
        limits = ModelLimits.from_config(args.model_config)
        limits.check_clip(args.sampling_num_frames, *args.sampling_image_size)
        tell_places()
        from cogvideox_sat.sampling.memory_report import report  # imports PyTorch

        return report(args)
