"""Check the values of arguments that several commands share.

Only limits that need neither the model nor the data are checked.
"""

import math
import re
from collections.abc import Sequence
from typing import Any

from cogvideox_sat.configuration.data_mixing import check_mixing
from cogvideox_sat.configuration.shared_arguments import PRECISIONS, CommonArguments, RunArguments
from cogvideox_sat.latent_geometry import SPACE_FACTOR, TIME_FACTOR
from sgm.errors import UserError

SMALLEST_TILE = 64  # pixels; smaller tiles would consist mostly of overlap
HIGHEST_RATE = 1000  # frames per second of a written video; ffmpeg refuses very high rates


# ---------------------------------------------------------------------------------------------------------------------
# Limits of all commands
# ---------------------------------------------------------------------------------------------------------------------


def check_common(args: CommonArguments) -> None:
    """Check the arguments whose limits all commands share, else raise UserError."""
    check_exclusive(args, (PRECISIONS,))
    check_least(args, ("model_parallel_size", "sampling_num_steps", "sampling_fps"))
    if args.sampling_fps > HIGHEST_RATE:
        raise UserError(f"sampling_fps: got {args.sampling_fps}; it must be at most {HIGHEST_RATE}")
    check_tile_size(args.vae_tile_size)
    check_frames_at_once(args.vae_frames_at_once)
    check_seed_and_device(args)


def check_run(args: RunArguments) -> None:
    """Check the arguments whose limits all training commands share, else raise UserError."""
    check_least(args, ("train_iters", "save_interval", "keep_last", "log_interval"))
    check_least(args, ("eval_interval", "eval_iters", "eval_batch_size"))
    check_least(args, ("num_workers", "num_log_videos"), least=0)
    check_shares(args, ("max_unreadable_share",))
    check_durations(args, ("clip_timeout", "collective_timeout"))
    check_mixing(args)
    if args.json and not args.inspect_data:
        raise UserError("json: inspect_data is off; give --inspect_data too, or leave json out")
    if not re.fullmatch(r"[^/\\\s]+", args.experiment_name) or args.experiment_name.startswith("."):
        raise UserError(
            f"experiment_name: got '{args.experiment_name}'; expected the name of a folder, without spaces, slashes or "
            "a leading dot"
        )


def check_tile_size(size: int | None) -> None:
    """Check that the VAE can run in tiles of `size` pixels, else raise UserError.

    Args:
        size: None stands for whole images.
    """
    if size is not None and (size < SMALLEST_TILE or size % SPACE_FACTOR):
        raise UserError(f"vae_tile_size: got {size}; it must be a multiple of {SPACE_FACTOR}, at least {SMALLEST_TILE}")


def check_frames_at_once(frames: int | None) -> None:
    """Check that the VAE can run on this many frames at a time, else raise UserError.

    Args:
        frames: None stands for all frames.
    """
    if frames is not None and (frames < 1 or frames % TIME_FACTOR):
        raise UserError(
            f"vae_frames_at_once: got {frames}; it must be a multiple of {TIME_FACTOR}, at least {TIME_FACTOR}"
        )


def check_seed_and_device(args: Any) -> None:
    """Check that `seed` and `device` have a form that all commands take, else raise UserError."""
    if not 0 <= args.seed < 2**63:
        raise UserError(f"seed: got {args.seed}; expected a whole number from 0 to 2^63 - 1")
    check_device(args.device)


def check_device(name: str | None, argument: str = "device") -> None:
    """Check that a device has a form that all commands take, else raise UserError.

    Args:
        name: None stands for a GPU if there is one.
        argument: the argument in the message.
    """
    if name is not None and not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise UserError(f"{argument}: got '{name}'; it can be cpu, cuda or cuda:N")


# ---------------------------------------------------------------------------------------------------------------------
# Kinds of limits
# ---------------------------------------------------------------------------------------------------------------------


def check_exclusive(args: Any, pairs: Sequence[tuple[str, str]]) -> None:
    """Check that at most one switch of each pair is on, else raise UserError."""
    for one, other in pairs:
        if getattr(args, one) and getattr(args, other):
            raise UserError(f"{one} and {other} are both on; choose one (--no-{one} or --no-{other})")


def check_least(args: Any, names: Sequence[str], least: int = 1) -> None:
    """Check that each of the arguments is None or at least `least`, else raise UserError."""
    for name in names:
        value = getattr(args, name)
        if value is not None and value < least:
            raise UserError(f"{name}: got {value}; it must be at least {least}")


def check_shares(args: Any, names: Sequence[str]) -> None:
    """Check that each of the arguments is between 0 and 1, else raise UserError."""
    for name in names:
        value = getattr(args, name)
        if not 0 <= value <= 1:
            raise UserError(f"{name}: got {value}; expected a share, from 0 to 1")


def check_durations(args: Any, names: Sequence[str]) -> None:
    """Check that each of the arguments is a number of seconds above 0, else raise UserError."""
    for name in names:
        value = getattr(args, name)
        if not 0 < value < math.inf:
            raise UserError(f"{name}: {value} is not a duration; give a number of seconds above 0")
