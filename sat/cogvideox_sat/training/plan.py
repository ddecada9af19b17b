"""Plan a training run: check its arguments before PyTorch is imported.

Under a launcher, every process plans the run, so that all of them stop at an error.
"""

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cogvideox_sat.clips.latent_cache import is_cache
from cogvideox_sat.clips.options import check_options
from cogvideox_sat.commands.input_paths import not_found
from cogvideox_sat.configuration.deepspeed_runtime import BatchSizes, batch_sizes
from cogvideox_sat.configuration.determinism import check_workspace
from cogvideox_sat.configuration.files import check_paths
from cogvideox_sat.configuration.model_limits import ModelLimits, check_sharing
from cogvideox_sat.configuration.model_section import check_trained_part, has_adapter
from cogvideox_sat.configuration.model_values import check_data_section, check_model_values, check_parameters
from cogvideox_sat.configuration.training_arguments import TrainingArguments
from cogvideox_sat.configuration.video_layout import check_divides, check_sequence
from cogvideox_sat.files.latest_file import newest
from cogvideox_sat.files.output_paths import check_folder, check_sheet
from cogvideox_sat.runs.plan_checks import check_places, clip_sizes, plan_resume
from cogvideox_sat.training.prompt_plan import PromptPlan, plan_prompts
from sgm.errors import UserError

logger = logging.getLogger(__name__)

HIGHEST_FULL_RATE = 5e-4  # learning rate of full fine-tuning above which a warning is logged
# Within the folder of an iteration, see `training.checkpoint_folders`.
STATE_FILE = Path("training_state", "state.json")


@dataclass(frozen=True)
class TrainingPlan:
    """The starting point of a run.

    Args:
        resume: the folder of the iteration to continue from; None: a new run, in its own folder.
        finished: whether the run that `resume: latest` names is already complete.
        cached: whether the data are caches of latents, so that training needs neither VAE nor text encoder.
        batch: sizes of a step.
        prompts: the videos of `valid_prompts`; None: not given.
    """

    resume: Path | None
    finished: bool
    cached: bool
    batch: BatchSizes
    prompts: PromptPlan | None


def plan_inspection(args: TrainingArguments) -> BatchSizes:
    """Return the batch sizes of a run whose data is only inspected.

    Neither weights nor folders are needed.

    Raises:
        UserError: the data does not exist, or its settings do not fit the model.
    """
    if not check_data(args):
        check_clips(args.data_config.get("params") or {}, ModelLimits.from_config(args.model_config))
    if args.contact_sheet is not None:
        check_sheet(args.contact_sheet)
    return check_processes(args)


def plan_run(args: TrainingArguments) -> TrainingPlan:
    """Return the plan of a run.

    Raises:
        UserError: the model, the data or the processes do not fit together, a required file is missing, or the run is
            already complete.
    """
    check_workspace(args.deterministic)
    check_model_values(args.model_config, args.sources)
    check_data_section(args.data_config, args.sources)
    batch = check_processes(args)
    cached = check_data(args)
    check_model(args)
    prompts = plan_prompts(args)
    warn_of_high_rate(args)
    if not cached:
        check_clips(args.data_config.get("params") or {}, ModelLimits.from_config(args.model_config))
    needed = args.model_config
    if cached:
        decodes = samples_videos(args) and not args.only_log_video_latents
        uses_vae = decodes or (prompts is not None and prompts.shows_inputs)
        parts = ["network_config", *(["first_stage_config"] if uses_vae else [])]
        parts += ["conditioner_config"] if prompts else []
        needed = {part: args.model_config[part] for part in parts}
    check_paths({"args": {"load": args.load, "lora_load": args.lora_load}, "model": needed})
    check_parameters({"model": args.model_config, "data": args.data_config}, args.sources)
    check_folder(args.save, "save")
    resume, finished = plan_resume(args, iteration_folder, step_of, lambda folder: folder.parent, logger)
    return TrainingPlan(resume, finished, cached, batch, prompts)


# ---------------------------------------------------------------------------------------------------------------------
# Model, data, processes
# ---------------------------------------------------------------------------------------------------------------------


def check_processes(args: TrainingArguments) -> BatchSizes:
    """Return the batch sizes of a step on the launcher's processes.

    Raises:
        UserError: processes or clips cannot be divided in this way.
    """
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    check_divides("model_parallel_size", args.model_parallel_size, processes)
    check_sharing(args.model_config, args.model_parallel_size, args.lora_load)
    shared = args.sequence_parallel_size
    if shared > 1 and args.model_parallel_size > 1:
        raise UserError(
            f"sequence_parallel_size: {shared} processes share a clip and model_parallel_size "
            f"{args.model_parallel_size} the network; choose one of them"
        )
    check_divides("sequence_parallel_size", shared, processes)
    check_sequence(shared, args.model_config, "sequence_parallel_size")
    return batch_sizes(args.deepspeed_config, processes // (args.model_parallel_size * shared))


def check_model(args: TrainingArguments) -> None:
    """Check that the parts of the model fit each other and the arguments.

    Raises:
        UserError: they do not.
    """
    embedders = (args.model_config["conditioner_config"].get("params") or {}).get("emb_models")
    if not embedders:
        raise UserError("model.conditioner_config.params.emb_models is empty; name the text encoder of the network")
    check_trained_part(args.model_config)
    if has_adapter(args.model_config) and not args.load:
        raise UserError("load: missing; name the weights of the base model, which an adapter needs")
    image_to_video = ModelLimits.from_config(args.model_config).image_to_video
    if image_to_video and not args.model_config.get("noised_image_input"):
        raise UserError("model.noised_image_input is off, but this is an image-to-video model; set it to true")
    if not image_to_video and args.model_config.get("noised_image_input"):
        raise UserError(
            "model.noised_image_input is on, but this is a text-to-video model; use an '_i2v' configuration"
        )
    if samples_videos(args) and not isinstance(args.model_config.get("sampler_config"), dict):
        raise UserError(
            "model.sampler_config: missing; give one, or num_log_videos: 0 and no valid_prompts, to sample nothing"
        )


def warn_of_high_rate(args: TrainingArguments) -> None:
    """Warn if a full fine-tuning uses the learning rate of an adapter.

    The rate in configs/sft.yaml is for adapters; it would quickly destroy a fully trained network.
    """
    rate = args.deepspeed_config["optimizer"]["params"]["lr"]
    if not has_adapter(args.model_config) and rate > HIGHEST_FULL_RATE:
        logger.warning(
            "the learning rate %g is for LoRA; training all weights takes about 1e-5: add configs/sft_full.yaml", rate
        )


def samples_videos(args: TrainingArguments) -> bool:
    """Return whether evaluations sample videos."""
    return bool((args.valid_data and args.eval_interval and args.num_log_videos) or args.valid_prompts)


def check_data(args: TrainingArguments) -> bool:
    """Return whether the data are caches of latents.

    Raises:
        UserError: no data is given, or caches and clips are mixed.
    """
    check_places(args, "a folder, a .jsonl or .csv manifest, .tar shards or a latent cache")
    caches = [path for path in (*args.train_data, *args.valid_data) if is_cache(path)]
    clips = [path for path in (*args.train_data, *args.valid_data) if path not in caches]
    if caches and clips:
        raise UserError(
            f"{caches[0]} is a cache of latents and {clips[0]} is not; encode all of train_data and valid_data, or none"
        )
    if args.valid_data and not args.eval_interval:
        logger.info("valid_data is not used: eval_interval is not set")
    return bool(caches)


def check_clips(params: dict[str, Any], limits: ModelLimits) -> None:
    """Check that the model takes the sizes and the length in the data section.

    Sizes are `video_size` (or `image_size`), [height, width] or a list of them; the length is `max_num_frames` (or
    `num_frames`). Missing values have defaults in the data set.

    Raises:
        UserError: the model does not take them.
    """
    for name, least in (("fps", 0.01), ("max_num_frames", 1), ("num_frames", 1), ("skip_frms_num", 0)):
        value = params.get(name, least)
        if type(value) not in (int, float) or value < least:
            raise UserError(f"data.params.{name}: got {value!r}; expected a {'positive ' * (least > 0)}number")
    check_options(params)
    frames = params.get("max_num_frames", params.get("num_frames", 1))
    for size in clip_sizes(params):
        try:
            limits.check_training_clip(frames, *size)
        except UserError as error:
            raise UserError(f"data.params.{error}") from error


# ---------------------------------------------------------------------------------------------------------------------
# Folders of iterations
# ---------------------------------------------------------------------------------------------------------------------


def step_of(folder: Path) -> int | None:
    """Return the step of the folder of an iteration; None for a folder that was renamed."""
    return int(folder.name) if folder.name.isdecimal() else None


def iteration_folder(path: Path) -> Path:
    """Return the folder of an iteration with a training state.

    It is `path`, or the folder that the file `latest` in it names.

    Raises:
        UserError: no such folder exists.
    """
    name = newest(path, "resume")
    folder = path if name is None else path / name
    if not folder.exists():
        if name is not None:
            raise UserError(f"resume: {path / 'latest'} names {name}, which does not exist; name another checkpoint")
        raise UserError(not_found("resume", path))
    if not (folder / STATE_FILE).is_file():
        raise UserError(
            f"resume: {folder} has no {STATE_FILE}; name the folder of a run or of one of its iterations, "
            "or give weights alone as load, to start a new run from them"
        )
    return folder
