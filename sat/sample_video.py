"""Sample videos from prompts: `python sat/sample_video.py --base MODEL.yaml configs/inference.yaml --seed N`.

The parts of the model take turns: prompts are encoded, then first frames, then latents are sampled, then decoded into
video files. A prompt that fails is reported and the others go on. Exit codes: 0 all videos are there, 1 some prompts
failed, 2 the command cannot start.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # sgm and vae_modules, wherever the command is run from

import logging
import os
import warnings
from collections.abc import Sequence

from arguments import SamplingArguments, get_args
from config_files import check_paths
from model_limits import ModelLimits
from prompt_inputs import PromptRequest, read_prompts
from sgm.errors import UserError

logger = logging.getLogger("sample_video")


def main(command_line: Sequence[str] | None = None) -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        args = get_args(command_line)
        requests = check_request(args)
        quiet_libraries()
        from sampling_run import run  # imports PyTorch: seconds, spent only once the request is known to make sense

        return run(args, requests)
    except UserError as error:
        logger.error("error: %s", error)
        return 2
    except KeyboardInterrupt:
        logger.error("interrupted")
        return 130


def check_request(args: SamplingArguments) -> list[PromptRequest] | None:
    """The prompts of the input file, or None when they will be typed, once everything about them makes sense.

    Raises:
        UserError: the model cannot do what is asked, or a file that it needs is not there.
    """
    limits = ModelLimits.from_config(args.model_config)
    limits.check_mode(args.image2video, args.latent_channels)
    limits.check_clip(args.sampling_num_frames, *args.sampling_image_size)
    check_paths({"args": {"load": args.load, "lora_load": args.lora_load}, "model": args.model_config})
    if args.input_type == "cli":
        return None
    requests = read_prompts(args.input_file, args.image2video)
    for request in requests:
        size, frames = request.size or args.sampling_image_size, request.num_frames or args.sampling_num_frames
        try:
            limits.check_clip(frames, *size)
        except UserError as error:
            raise UserError(f"{args.input_file}, prompt {request.index + 1}: {error}") from error
    return requests


def quiet_libraries() -> None:
    """Keep what libraries say at import off the terminal; their errors still show."""
    os.environ.setdefault("SAT_LOGLEVEL", "ERROR")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)


if __name__ == "__main__":
    sys.exit(main())
