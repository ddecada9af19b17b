"""Encode a data set once with the VAE and the text encoder, for faster training.

  python tools/precompute_latents.py --base configs/cogvideox_2b_lora.yaml configs/sft.yaml --output data/latents
  torchrun --standalone --nproc_per_node=8 tools/precompute_latents.py --base ... --output data/latents

The clips are those of `train_data`, read as `data:` says; all arguments of sat/train_video.py are accepted. Afterwards,
train with `--train_data data/latents`; training then needs neither the VAE nor the text encoder. With the same seed,
the losses equal those of a run on the clips, as long as that run cuts each clip at the same place: in its first epoch,
or always with `random_start: false` in `data.params`. Encode validation data separately, with `--train_data VALIDATION
--output data/latents_validation`.

To continue an interrupted run, start the same command again, on any number of processes. Exit codes: 0 the cache is
complete, 2 the arguments or files have an error.
"""

import argparse
import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from cogvideox_sat.clips.latent_cache import STORES
from cogvideox_sat.clips.latent_identity import text_embedder
from cogvideox_sat.commands.flag_spellings import StrictParser
from cogvideox_sat.commands.input_paths import tell_places
from cogvideox_sat.commands.launchers import adopt_launcher, is_first_process
from cogvideox_sat.commands.program_names import as_started
from cogvideox_sat.commands.startup import quiet_libraries
from cogvideox_sat.configuration.files import check_paths
from cogvideox_sat.configuration.model_limits import ModelLimits
from cogvideox_sat.configuration.model_values import check_data_section, check_model_values, check_parameters
from cogvideox_sat.configuration.training_arguments import TrainingArguments, get_training_args
from cogvideox_sat.training.plan import check_clips, check_data
from sgm.errors import UserError
from sgm.exit_codes import exit_code

logger = logging.getLogger(__name__)

IMAGE_VARIANTS = 4


def main(command_line: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    level = logging.INFO if is_first_process() else logging.ERROR  # or each process would log the same lines
    logging.basicConfig(level=level, format="%(message)s")
    interrupted = "interrupted; start the same command again to continue"
    return exit_code(lambda: precompute(command_line), logger, interrupted, command_line)


def precompute(command_line: Sequence[str] | None) -> int:
    """Encode the data set that the command line names; return the exit code.

    Raises:
        UserError: an argument is missing or wrong; see `precompute_with` too.
    """
    adopt_launcher()
    options, rest = build_parser().parse_known_args(command_line)
    if options.output is None:
        raise UserError("--output: missing; name the folder of the cache")
    args = get_training_args(rest)
    with args.sources.naming():
        return precompute_with(args, options)


def precompute_with(args: TrainingArguments, options: argparse.Namespace) -> int:
    """Encode the data set of the given arguments; return the exit code.

    Raises:
        UserError: the arguments do not fit each other; see `training.latent_encoding.run` too.
    """
    if args.inspect_data:
        raise UserError(
            as_started("inspect_data: give it to sat/train_video.py, which shows the clips that are encoded here")
        )
    variants = check(args, options.image_variants)
    tell_places()
    if args.device == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"  # DeepSpeed chooses at its import by SwissArmyTransformer
    quiet_libraries()
    # This import takes seconds (PyTorch), so that it comes after all checks.
    from cogvideox_sat.training.latent_encoding import run

    return run(args, options.output, options.store, options.dtype, variants)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = StrictParser(
        description=as_started(__doc__), formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--output", type=Path, metavar="FOLDER", help="the cache: a new folder, or an incomplete cache to continue"
    )
    parser.add_argument(
        "--store",
        choices=STORES,
        default="moments",
        help="store the distribution of each clip, from which every epoch draws anew, or one draw, half as large "
        "(default: moments)",
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="dtype to store (default: that of the computation, which loses nothing)",
    )
    parser.add_argument(
        "--image_variants",
        type=int,
        metavar="K",
        help="for image-to-video: number of encodings of the first frame, with the noise of as many epochs; later "
        f"epochs reuse them (default: {IMAGE_VARIANTS})",
    )
    return parser


def check(args: TrainingArguments, image_variants: int | None) -> int:
    """Return the number of first frames to encode of each clip; 0 for text-to-video.

    Raises:
        UserError: the data or a part of the model does not exist, or cannot be cached.
    """
    model = args.model_config
    check_model_values(model, args.sources)
    check_data_section(args.data_config, args.sources)
    if check_data(replace(args, valid_data=[])):
        raise UserError("train_data is already a cache of latents; name the clips that it was made from")
    if args.train_data_weights:
        raise UserError(
            "train_data_weights: a cache does not record which data set a clip is from; encode each data set into its "
            "own cache, and give the weights to the training"
        )
    check_clips(args.data_config.get("params") or {}, ModelLimits.from_config(model))
    if args.model_parallel_size > 1:
        raise UserError("model_parallel_size: encoding does not use the network; leave model_parallel_size at 1")
    if model.get("latent_input"):
        raise UserError("latent_input: the model takes latents as they are, so that nothing is left to encode")
    text_embedder(model["conditioner_config"])
    first_stage = model["first_stage_config"].get("params") or {}
    if not first_stage.get("ckpt_path"):
        raise UserError("model.first_stage_config.params.ckpt_path: missing; name the weights of the VAE")
    check_paths({"model": {name: model[name] for name in ("conditioner_config", "first_stage_config")}})
    check_parameters({"model": model, "data": args.data_config}, args.sources)
    if not model.get("noised_image_input"):
        if image_variants is not None:
            raise UserError(
                "image_variants is for image-to-video models, but this is a text-to-video model; leave it out"
            )
        return 0
    variants = IMAGE_VARIANTS if image_variants is None else image_variants
    if variants < 1:
        raise UserError(f"image_variants: got {variants}; it must be at least 1")
    return variants
