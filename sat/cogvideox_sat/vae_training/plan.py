"""Plan a VAE training run: check its arguments before PyTorch is imported.

Under a launcher, every process plans the run, so that all of them stop at an error.
"""

import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cogvideox_sat.clips.latent_cache import is_cache
from cogvideox_sat.clips.options import check_options
from cogvideox_sat.commands.input_paths import not_found
from cogvideox_sat.commands.program_names import as_started
from cogvideox_sat.configuration.argument_lists import VaeTrainingArguments
from cogvideox_sat.configuration.determinism import check_workspace
from cogvideox_sat.configuration.files import check_paths
from cogvideox_sat.configuration.model_values import check_data_section, check_model_values, check_parameters
from cogvideox_sat.configuration.video_layout import check_divides
from cogvideox_sat.files.latest_file import newest
from cogvideox_sat.files.output_paths import check_folder, check_sheet
from cogvideox_sat.latent_geometry import SPACE_FACTOR, TIME_FACTOR
from cogvideox_sat.runs.plan_checks import check_places, clip_sizes, plan_resume
from sgm.errors import UserError

logger = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"  # subfolder of a run with its `step=N.ckpt`


@dataclass(frozen=True)
class VaeTrainingPlan:
    """The starting point and layout of a run.

    Args:
        resume: the checkpoint to continue from; None: a new run, in its own folder.
        finished: whether the run that `resume: latest` names is already complete.
        processes: number of processes.
        ranks_per_clip: number of neighbouring processes that share every clip.
        divides_input: whether each of these gets only its own frames, rather than the whole clip.
        accumulation: batches per step and process.
        time_factor: clips have `time_factor * k + 1` frames.
        input_key, time_axis: the entry of a batch with the clips, and its axis of frames.
    """

    resume: Path | None
    finished: bool
    processes: int
    ranks_per_clip: int
    divides_input: bool
    accumulation: int
    time_factor: int
    input_key: str = "mp4"
    time_axis: int = 1

    @property
    def data_ranks(self) -> int:
        """Return the number of processes, or groups of processes, that have their own clips."""
        return self.processes // self.ranks_per_clip


def plan_vae_inspection(args: VaeTrainingArguments) -> int:
    """Return the frames per latent frame of a run whose data is only inspected.

    Raises:
        UserError: the data does not exist, or its settings do not fit the model.
    """
    check_data(args)
    time_factor, space_factor = compression(args.model_config["params"])
    check_clips(args.data_config.get("params") or {}, time_factor, space_factor)
    if args.contact_sheet is not None:
        check_sheet(args.contact_sheet)
    return time_factor


def plan_vae_run(args: VaeTrainingArguments) -> VaeTrainingPlan:
    """Return the plan of a run.

    Raises:
        UserError: the model, the data or the processes do not fit together, a required file is missing, or the run is
            already complete.
    """
    check_workspace(args.deterministic)
    check_model_values(args.model_config, args.sources)
    check_data_section(args.data_config, args.sources)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    check_devices(args.lightning_config, processes)
    check_data(args)
    params = args.model_config["params"]
    time_factor, space_factor = compression(params)
    check_coders(params)
    data_params = args.data_config.get("params") or {}
    latent_frames = check_clips(data_params, time_factor, space_factor)
    ranks_per_clip = check_sharing(params, processes, latent_frames)
    check_paths({"model": {"params": params}})
    check_parameters({"model": args.model_config, "data": args.data_config}, args.sources)
    check_folder(args.save, "save")
    resume, finished = plan_resume(args, checkpoint_file, step_of, run_of, logger)
    accumulation = (args.lightning_config.get("trainer") or {}).get("accumulate_grad_batches", 1)
    return VaeTrainingPlan(
        resume=resume,
        finished=finished,
        processes=processes,
        ranks_per_clip=ranks_per_clip,
        divides_input=ranks_per_clip > 1 and bool(params.get("input_cp")),
        accumulation=accumulation,
        time_factor=time_factor,
        input_key=params.get("input_key", "mp4"),
        time_axis=2 if params.get("input_layout") == "b c t h w" else 1,
    )


def check_devices(lightning: Mapping[str, Any], processes: int) -> None:
    """Check that Lightning is not asked to start processes, which the launcher does here.

    Raises:
        UserError: it is asked to.
    """
    devices = (lightning.get("trainer") or {}).get("devices", "auto")
    if devices == "auto" or devices == processes or (type(devices) is int and processes % max(devices, 1) == 0):
        return
    if type(devices) is int and devices > 1 and processes == 1:
        start = as_started(f"torchrun --standalone --nproc_per_node={devices} sat/train_vae.py ...")
        raise UserError(f"lightning.trainer: devices is {devices}, but this is one process; start them with `{start}`")
    raise UserError(f"lightning.trainer: devices: got {devices!r}; expected auto, or the number of processes started")


def check_data(args: VaeTrainingArguments) -> None:
    """Check that training data with pixels exists, else raise UserError."""
    check_places(args, "a folder, a .jsonl or .csv manifest or .tar shards")
    for name, paths in (("train_data", args.train_data), ("valid_data", args.valid_data)):
        for path in filter(is_cache, paths):
            raise UserError(f"{name}: {path} holds latents; name clips, which an autoencoder is trained on")


def compression(params: Mapping[str, Any], coder: str = "encoder_config") -> tuple[int, int]:
    """Return frames and pixels per side per latent, from the configuration of a coder."""
    settings = (params.get(coder) or {}).get("params") or {}
    levels = settings.get("ch_mult")
    space = 2 ** (len(levels) - 1) if isinstance(levels, list) and levels else SPACE_FACTOR
    time = settings.get("temporal_compress_times", TIME_FACTOR)
    return time if type(time) is int and time > 0 else TIME_FACTOR, space


def check_coders(params: Mapping[str, Any]) -> None:
    """Check that the decoder's frames have the size and number that the encoder takes.

    Coders that are not ours are not checked, nor is a model whose loss resizes the decoder's frames.

    Raises:
        UserError: the decoder's frames differ.
    """
    coders = [params.get(name) or {} for name in ("encoder_config", "decoder_config")]
    loss = (params.get("loss_config") or {}).get("params") or {}
    ours = all(str(coder.get("target")).startswith(("vae_modules.", "sgm.")) for coder in coders)
    if not ours or loss.get("scale_input_to_tgt_size"):
        return
    for key, number in (("temporal_compress_times", 0), ("ch_mult", 1)):
        taken, made = (compression(params, name)[number] for name in ("encoder_config", "decoder_config"))
        if taken != made:
            raise UserError(
                f"model.params.decoder_config.params.{key}: the decoder enlarges latents {made} times, but the encoder "
                f"reduces clips {taken} times; give both the same {key}"
            )


def check_clips(params: Mapping[str, Any], time_factor: int, space_factor: int) -> int:
    """Return the number of latent frames of the longest clip.

    Raises:
        UserError: the encoder does not take the length or a size in the data section.
    """
    frames = params.get("max_num_frames", params.get("num_frames", 1))
    if type(frames) is not int or frames < 1 or (frames - 1) % time_factor:
        fits = max(round((frames - 1) / time_factor), 0) * time_factor + 1 if type(frames) in (int, float) else 1
        raise UserError(
            f"data.params.max_num_frames: got {frames!r}; clips are cut to {time_factor}k+1 frames, for example {fits}"
        )
    check_options(params)
    sizes = list(clip_sizes(params))
    if not sizes:
        raise UserError("data.params.video_size: no value; expected [height, width] in pixels")
    for size in sizes:
        for name, pixels in zip(("height", "width"), size, strict=True):
            if pixels % space_factor:
                fits = max(round(pixels / space_factor), 1) * space_factor
                raise UserError(
                    f"data.params.video_size: {name} {pixels} does not fit; this autoencoder takes multiples of "
                    f"{space_factor}, for example {fits}"
                )
    return (frames - 1) // time_factor + 1


def check_sharing(params: Mapping[str, Any], processes: int, latent_frames: int) -> int:
    """Return how many processes share a clip.

    Raises:
        UserError: the processes or the frames of a clip cannot be divided in this way.
    """
    size = params.get("context_parallel_size") or 1
    if type(size) is not int or size < 1:
        raise UserError(f"model.params.context_parallel_size: got {size!r}; expected a whole number, 0 or 1 for none")
    check_divides("model.params.context_parallel_size", size, processes)
    if size > latent_frames:
        raise UserError(
            f"model.params.context_parallel_size is {size}, but a clip has {latent_frames} latent frames to share; "
            "raise data.params.max_num_frames, or use fewer processes per clip"
        )
    return size


# ---------------------------------------------------------------- resuming


def checkpoint_file(path: Path) -> Path:
    """Return the checkpoint for a path: that in `latest` of a run, or the path itself.

    Raises:
        UserError: no such checkpoint exists.
    """
    name = newest(path, "resume")
    file = path if name is None else path / CHECKPOINTS / name
    if not file.exists():
        if name is not None:
            raise UserError(f"resume: {path / 'latest'} names {name}, which does not exist; name another checkpoint")
        raise UserError(not_found("resume", path))
    if not file.is_file() or step_of(file) is None:
        raise UserError(
            f"resume: {file} is not a checkpoint; name the folder of a run or its {CHECKPOINTS}/step=N.ckpt"
        )
    return file


def run_of(checkpoint: Path) -> Path:
    """Return the folder of a checkpoint's run."""
    return checkpoint.parent.parent


def step_of(file: Path) -> int | None:
    """Return the step of `step=N.ckpt`; None for another name."""
    match = re.fullmatch(r"step=(\d+)\.ckpt", file.name)
    return int(match[1]) if match else None
