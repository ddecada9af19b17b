"""Sample videos from prompts.

    python sat/sample_video.py --base MODEL.yaml configs/inference.yaml --seed N

The parts of the model are used in turn: prompts are encoded, then first frames; then latents are sampled, and then
decoded into video files. A prompt that fails is reported, and the others continue. Exit codes: 0 all videos are
written, 1 some prompts failed, 2 the arguments or files have an error that prevents all videos.
"""

import sys
from pathlib import Path

# In a checkout, find sgm and vae_modules whatever the current working directory is.
if Path(__file__).resolve().parent.name == "sat":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from arguments import SamplingArguments, check_values, get_args, settle_knobs, settle_size
from cogvideox_sat.commands.input_paths import tell_places
from cogvideox_sat.commands.launchers import adopt_launcher
from cogvideox_sat.commands.startup import quiet_libraries
from cogvideox_sat.configuration.adapter_lists import settle_adapters
from cogvideox_sat.configuration.files import check_alternatives
from cogvideox_sat.configuration.program_arguments import arguments_from
from cogvideox_sat.sampling.functions import (
    get_batch,
    get_unique_embedder_keys_from_conditioner,
    read_from_cli,
    read_from_file,
    resize_for_rectangle_crop,
    save_video_as_grid_and_mp4,
)
from cogvideox_sat.sampling.plan import plan_run
from sgm.exit_codes import exit_code

__all__ = [
    "get_batch",
    "get_unique_embedder_keys_from_conditioner",
    "main",
    "read_from_cli",
    "read_from_file",
    "resize_for_rectangle_crop",
    "sampling_main",
    "save_video_as_grid_and_mp4",
]

logger = logging.getLogger("sample_video")


def main(command_line: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    return exit_code(lambda: sample(command_line), logger, command_line=command_line)


def sample(command_line: Sequence[str] | None) -> int:
    """Sample the videos that the command line asks for; return the exit code."""
    adopt_launcher()
    return sample_with(get_args(command_line))


def sampling_main(args: Any, model_cls: type | None = None) -> int:
    """Sample videos for a program; return 0 if all are written, 1 if some prompts failed.

    Args:
        args: the result of `arguments.get_args`, or an object with such attributes; `model_config` may be an OmegaConf
            `DictConfig`.
        model_cls: a subclass of `SATVideoDiffusionEngine` to use in its place.

    Raises:
        UserError: the arguments or files have an error.
    """
    adopt_launcher()
    given = arguments_from(SamplingArguments, args, model_cls)
    names = args if isinstance(args, Mapping) else vars(args)
    given.given = given.given or frozenset(names)
    settle_size(given, given="sampling_image_size" in names)
    if not isinstance(args, SamplingArguments):  # `SamplingArguments` have values for all names
        check_alternatives({name for name, value in names.items() if value is not None})
    settle_knobs(given)
    settle_adapters(given)
    check_values(given)
    return sample_with(given)


def sample_with(args: SamplingArguments) -> int:
    """Sample the videos of the given arguments; return the exit code."""
    with args.sources.naming():
        plan = plan_run(args)
        tell_places()
        quiet_libraries()
        # This import takes seconds (PyTorch), so that it comes after all checks.
        from cogvideox_sat.sampling.run import run

        return run(args, plan)


if __name__ == "__main__":
    sys.exit(main())
