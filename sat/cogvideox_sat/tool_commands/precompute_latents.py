"""Encodes a data set once through the VAE and the text encoder, so that training needs neither.

  python tools/precompute_latents.py --base configs/cogvideox_2b_lora.yaml configs/sft.yaml --output data/latents
  torchrun --standalone --nproc_per_node=8 tools/precompute_latents.py --base ... --output data/latents

The clips are those of `train_data`, read as `data:` says; every argument of sat/train_video.py is taken here too. Train
with `--train_data data/latents` then. With the same seed, the losses are those of a run on the clips themselves as long
as that cuts each clip at the same place: in its first epoch, or always with `random_start: false` in `data.params`.
Validation data is encoded by a run of its own, with `--train_data VALIDATION --output data/latents_validation`.

A run that was cut off goes on where it was when it is started again, on any number of processes. Exit codes: 0 the
cache is complete, 2 a mistake in the arguments or files stands in the way.
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
    # Each process of a launcher would say the same.
    level = logging.INFO if is_first_process() else logging.ERROR
    logging.basicConfig(level=level, format="%(message)s")
    interrupted = "interrupted; start the same command again to go on"
    return exit_code(lambda: precompute(command_line), logger, interrupted, command_line)


def precompute(command_line: Sequence[str] | None) -> int:
    adopt_launcher()
    options, rest = build_parser().parse_known_args(command_line)
    if options.output is None:
        raise UserError("--output is missing: name the folder of the cache")
    args = get_training_args(rest)
    with args.sources.naming():
        return precompute_with(args, options)


def precompute_with(args: TrainingArguments, options: argparse.Namespace) -> int:
    if args.inspect_data:
        raise UserError(
            as_started("inspect_data: give it to sat/train_video.py, which shows the clips that are encoded here")
        )
    variants = check(args, options.image_variants)
    tell_places()
    if args.device == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"  # SwissArmyTransformer imports DeepSpeed, which chooses then
    quiet_libraries()
    # Imports PyTorch: seconds, spent only once the request is known to make sense
    from cogvideox_sat.training.latent_encoding import run

    return run(args, options.output, options.store, options.dtype, variants)


def build_parser() -> argparse.ArgumentParser:
    parser = StrictParser(
        description=as_started(__doc__), formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="the cache: a new folder, or one to go on with")
    parser.add_argument(
        "--store",
        choices=STORES,
        default="moments",
        help="of each clip its distribution, from which every epoch draws anew, or one draw, half as large "
        "(default: moments)",
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of what is stored (default: that of the computation, which loses nothing)",
    )
    parser.add_argument(
        "--image_variants",
        type=int,
        metavar="K",
        help="for image-to-video: how often to encode the first frame, with the noise of as many epochs; later epochs "
        f"go through them again (default: {IMAGE_VARIANTS})",
    )
    return parser


def check(args: TrainingArguments, image_variants: int | None) -> int:
    """The number of first frames to encode of each clip, 0 for text-to-video.

    Raises:
        UserError: the data or a part of the model is not there, or not such as can be cached.
    """
    model = args.model_config
    check_model_values(model, args.sources)
    check_data_section(args.data_config, args.sources)
    if check_data(replace(args, valid_data=[])):
        raise UserError("train_data is a cache of latents already: name the clips that it was made of")
    if args.train_data_weights:
        raise UserError(
            "train_data_weights: a cache does not tell its places apart, so that training could not weigh them; encode "
            "each into a cache of its own, and give the weights to the training"
        )
    check_clips(args.data_config.get("params") or {}, ModelLimits.from_config(model))
    if args.model_parallel_size > 1:
        raise UserError("model_parallel_size: the network is not used here, every process encodes clips: leave it at 1")
    if model.get("latent_input"):
        raise UserError("latent_input: the model takes latents as they are, there is nothing to encode")
    text_embedder(model["conditioner_config"])
    first_stage = model["first_stage_config"].get("params") or {}
    if not first_stage.get("ckpt_path"):
        raise UserError("model.first_stage_config.params.ckpt_path is missing: name the weights of the VAE")
    check_paths({"model": {name: model[name] for name in ("conditioner_config", "first_stage_config")}})
    check_parameters({"model": model, "data": args.data_config}, args.sources)
    if not model.get("noised_image_input"):
        if image_variants is not None:
            raise UserError("image_variants is for image-to-video models, and this is a text-to-video model")
        return 0
    variants = IMAGE_VARIANTS if image_variants is None else image_variants
    if variants < 1:
        raise UserError(f"image_variants is {variants}; it must be at least 1")
    return variants
