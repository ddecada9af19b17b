"""Sample videos from prompts: `python sat/sample_video.py --base MODEL.yaml configs/inference.yaml --seed N`.

The parts of the model take turns: prompts are encoded, then first frames, then latents are sampled, then decoded into
video files. A prompt that fails is reported and the others go on. Exit codes: 0 all videos are there, 1 some prompts
failed, 2 a mistake in the arguments or files stands in the way of all.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # sgm and vae_modules, wherever the command is run from

import logging
from collections.abc import Sequence

from arguments import get_args
from input_paths import tell_places
from launchers import adopt_launcher
from library_messages import quiet_libraries
from sampling_plan import plan_run
from sgm.errors import exit_code

logger = logging.getLogger("sample_video")


def main(command_line: Sequence[str] | None = None) -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    return exit_code(lambda: sample(command_line), logger, command_line=command_line)


def sample(command_line: Sequence[str] | None) -> int:
    adopt_launcher()
    args = get_args(command_line)
    with args.sources.naming():
        plan = plan_run(args)
        tell_places()
        quiet_libraries()
        from sampling_run import run  # imports PyTorch: seconds, spent only once the request is known to make sense

        return run(args, plan)


if __name__ == "__main__":
    sys.exit(main())
