"""Decode latents into videos.

The latents are those that sampling kept because it could not decode them, those that --only_save_latents wrote, or
those in the samples/ folder of a training run.

  python tools/decode_latents.py outputs/0_a_fox/0/000000.latents.safetensors --vae_tile_size 256
  python tools/decode_latents.py checkpoints_finetune/RUN/samples --base configs/cogvideox_2b.yaml

Each PATH is a file, or a folder, of which all `.safetensors` files are decoded. A file records its VAE, the scale of
its latents and the frame rate; older files without this record need the model's configuration, `--base`, which also
overrides the record. NAME.safetensors and NAME.latents.safetensors become NAME.mp4 beside the file, and NAME.json if
the file holds the record of the video. If a file is found in the repository's root instead of the current working
directory, its video is written to the folder of the same name in the current working directory. Exit codes: 0 all
videos are written, 1 some files could not be decoded, 2 the arguments or files have an error.
"""

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

from cogvideox_sat.commands.input_paths import tell_places
from cogvideox_sat.commands.startup import quiet_libraries
from cogvideox_sat.commands.tool_parser import ToolParser
from cogvideox_sat.configuration.argument_limits import check_device, check_frames_at_once, check_tile_size
from cogvideox_sat.configuration.files import load_configs, with_located_paths
from cogvideox_sat.configuration.video_records import record_path
from cogvideox_sat.files.output_paths import decide_existing
from cogvideox_sat.sampling.latent_files import LatentFile, find_files, read_header
from sgm.errors import UserError
from sgm.exit_codes import exit_code

logger = logging.getLogger(__name__)

DTYPES = ("float32", "bfloat16", "float16")


def main(command_line: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    return exit_code(lambda: decode(command_line), logger, command_line=command_line)


def decode(command_line: Sequence[str] | None) -> int:
    """Decode the files that the command line names; return the exit code."""
    options = build_parser().parse_args(command_line)
    check_options(options)
    files = plan(options)
    if not files:
        return 0
    quiet_libraries()
    # This import takes seconds (PyTorch), so that it comes after all checks.
    from cogvideox_sat.sampling.latent_decoding import run

    return run(files, options.device, options.dtype, options.vae_tile_size, options.vae_frames_at_once)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = ToolParser(__doc__)
    add = parser.add_argument
    add("paths", nargs="*", type=Path, metavar="PATH", help="files of latents, or folders of such files")
    add("--base", nargs="+", metavar="FILE", help="configuration of the model, if the files do not record it")
    add("--vae_tile_size", type=int, metavar="N", help="decode in overlapping tiles of N pixels, to save memory")
    at_once = "run each layer on N frames at a time, a multiple of 4: less memory, the same values"
    add("--vae_frames_at_once", type=int, metavar="N", help=at_once)
    add("--fps", type=float, help="frames per second (default: the value in the file, or 8)")
    add("--output_dir", type=Path, metavar="FOLDER", help="folder of the videos (default: beside each file)")
    add("--device", help="cpu, cuda or cuda:N (default: a GPU if available)")
    add("--dtype", choices=DTYPES, help="dtype of the VAE (default: the value in the file, or float32)")
    add("--overwrite", action="store_true", help="replace existing videos")
    add("--skip_existing", action="store_true", help="skip files whose videos exist")
    return parser


def check_options(options: argparse.Namespace) -> None:
    """Check that all options are given and have valid values, else raise UserError."""
    if not options.paths:
        raise UserError(
            "PATH: missing; name a file of latents, for example outputs/0_a_fox/0/000000.latents.safetensors"
        )
    if options.overwrite and options.skip_existing:
        raise UserError("overwrite and skip_existing are both on: choose one")
    check_tile_size(options.vae_tile_size)
    check_frames_at_once(options.vae_frames_at_once)
    if options.fps is not None and not 0 < options.fps < 1000:
        raise UserError(f"--fps: got {options.fps:g}; it must be above 0 and below 1000")
    check_device(options.device, "--device")


def plan(options: argparse.Namespace) -> list[LatentFile]:
    """Return the files to decode, each with its video and its VAE.

    Raises:
        UserError: a file cannot be decoded, two files have the same video, or a video exists.
    """
    config = load_configs(options.base, used=("model",)) if options.base else None
    if config:
        config["model"] = with_located_paths(config.get("model") or {}, "model")
    planned: dict[Path, LatentFile] = {}
    for path, folder in find_files(options.paths).items():
        file = read_header(path, config, options.fps, options.output_dir or folder)
        beside = {record_path(file.video): "the record of a video that does not"}
        if not decide_existing(file.video, options.overwrite, options.skip_existing, beside):
            logger.info("skipped, it exists: %s", file.video)
            continue
        if file.video in planned:
            raise UserError(
                f"{planned[file.video].path} and {path} would both become {file.video}; decode one at a time"
            )
        planned[file.video] = file
    tell_places()
    return list(planned.values())
