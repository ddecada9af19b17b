"""What arguments there are: the fields of dataclasses, with their defaults and help. Nothing here imports PyTorch.

The lists of sampling and fine-tuning are both here since each takes configurations with arguments of the other.
"""

from dataclasses import dataclass, field
from typing import Any

from cogvideox_sat.configuration.argument_schema import MODES, CommonArguments, RunArguments, argument
from cogvideox_sat.configuration.recomputation import recomputation_mode
from cogvideox_sat.configuration.sampler_knobs import SAMPLERS, SCHEDULES

MISSING_LABEL = ("empty", "stop")
LR_DECAY_STYLES = ("constant", "linear", "cosine")
# Of SwissArmyTransformer's own trainer, in files that were written for it: how things are done here in any case, or
# means that have no counterpart.
IGNORED_KEYS = (
    *("no_load_rng", "no_save_rng", "split", "resume_dataloader", "iterable_dataset", "strict_eval", "log_image"),
    *("checkpoint_num_layers", "distributed_backend", "local_rank", "save_args", "summary_dir", "block_size"),
)

_INPUT_FILE_HELP = (
    "prompts: .txt, one a line (`prompt@@image` for image-to-video, `prompt@@first@@last`), or .jsonl, one object a "
    "line with prompt and optionally negative_prompt, image, keyframes, video, strength, extend, seed, frames (or "
    "num_frames, latent frames), size ([height, width]), fps, steps, sampler, guidance_scale, guidance_interval and "
    "guidance_schedule; or the .json beside a video, to make that video again"
)


@dataclass
class SamplingArguments(CommonArguments):
    """Arguments of `sample_video.py`."""

    # Weights
    lora_scale: float = argument(1.0, "strength of the adapter; 0 is the base model")
    lora: list[str] = argument(  # noqa: RUF009
        [],
        "adapters, each PATH or PATH:STRENGTH, which are added unmerged: checkpoints with adapters, or LoRA files of "
        "diffusers; the model needs no lora_config for them",
    )
    force_inference: bool = argument(False, "let weights be missing from the checkpoint")

    # Prompts
    input_type: str = argument("txt", "where prompts come from: a file or the keyboard", choices=("txt", "cli"))
    input_file: str | None = argument(None, _INPUT_FILE_HELP)
    image2video: bool = argument(False, "start from an image given with each prompt")
    negative_prompt: str = argument("", "what guidance steers away from; a .jsonl line may have its own")
    refine_prompts: bool = argument(False, "let a language model write prompts out, see tools/convert_demo.py")
    seed: int = argument(1234, "seed of the run; every prompt's noise depends on it and on the prompt's index")

    # What prompts are shown; a .jsonl line may have its own
    video: str | None = argument(None, "a clip that videos start from, or with extend go on from")
    strength: float | None = argument(
        None, "share of the steps that is taken from the clip: 0 keeps it, 1 leaves nothing of it (default: 0.8)"
    )
    extend: int | None = argument(None, "go on for so many windows from the last frames of the video, or of the clip")
    keyframes: list[str] = argument(  # noqa: RUF009
        [], "pictures that frames show, IMAGE:AT; -1 is the last frame, such as last.png:-1 (image-to-video)"
    )

    # Videos
    batch_size: int = argument(1, "videos per prompt")
    sampling_image_size: list[int] = argument(  # noqa: RUF009
        [480, 720], "height and width in pixels; without it a 1.5 image-to-video model takes the shape of each image"
    )
    sampling_num_frames: int = argument(13, "latent frames: 13, 11 or 9 for 1.0 models, 22 or 42 for 1.5")
    latent_channels: int = argument(16, "channels of the latents")
    frames: int | None = argument(None, "frames of the video, in place of sampling_num_frames: 49 for 13 of 1.0 models")

    # Sampler
    steps: int | None = argument(None, "the same as sampling_num_steps")
    sampler: str | None = argument(None, f"the sampler, if not the configuration's: {', '.join(SAMPLERS)}")
    guidance_scale: float | None = argument(None, "how strongly prompts guide, if not as the configuration says (6)")
    guidance_interval: list[float] = argument(  # noqa: RUF009
        [], "from which share of the steps to which there is guidance, such as 0.2 0.8 (default: 0 1)"
    )
    guidance_schedule: str | None = argument(
        None,
        "how the strength of guidance goes with the steps: as DynamicCFG counts them (timestep, diffusers or step), or "
        "constant (default: as the configuration says)",
        choices=SCHEDULES,
    )
    guidance_batch: int = argument(
        2,
        "prompt and negative prompt go through the network together (2), or one after the other (1) in less memory",
    )

    # Output
    output_dir: str = argument("outputs", "folder of the videos")
    only_save_latents: bool = argument(False, "save latents (.safetensors) and decode nothing")
    overwrite: bool = argument(False, "replace videos that exist")
    skip_existing: bool = argument(False, "leave out prompts whose videos exist")
    contact_sheet: str | None = argument(None, "also write this PNG, with a row of frames for each video")
    looping_previews: bool = argument(False, "beside each video write NAME.webp, a picture that plays in a loop")

    # Machine
    offload: str = argument(
        "stage",
        "what leaves the device to make room: nothing, the stages not running, or also the network's idle layers",
        choices=("none", "stage", "sequential"),
    )
    fit: str | None = argument(
        None,
        "memory of the device to stay within, such as 12GB, or auto (what is free): picks offload, guidance_batch and "
        "vae_frames_at_once, those of them that are not given",
    )
    processes_per_video: int | None = argument(
        None, "processes that share the work on each video: halves of guidance first, then tokens (default: 1)"
    )
    guidance_parallel: bool | None = argument(
        None, "each half of guidance has processes of its own (default: as processes_per_video allows)"
    )
    sequence_parallel: int | None = argument(
        None, "processes that share the tokens of a half (default: what processes_per_video leaves)"
    )

    given: frozenset[str] = frozenset()  # the arguments that do not merely have their defaults
    vae_waiting_bytes: int | None = None  # what `fit` leaves, see `EngineSettings`
    deepspeed_config: dict[str, Any] = field(default_factory=dict)  # not read; the original's programs delete it
    size_from_image: bool = False  # sampling_image_size is not given, and the model is one that takes any shape
    # What `input_file` describes, where that is the record of a video: a `configuration.video_records.VideoRecord`.
    record: Any = field(default=None, repr=False, compare=False)


@dataclass
class TrainingArguments(RunArguments, CommonArguments):
    """Arguments of `train_video.py`; `deepspeed_config` is that section of the configuration, checked."""

    # Start
    mode: str = argument("finetune", "what the configuration was written for; both commands take both", MODES)
    force_train: bool = argument(
        False, "let weights be missing from `load`: they start at random, input channels at zero"
    )

    # Data
    train_data: list[str] = argument([], "training data: folders, .jsonl or .csv manifests, .tar shards, latent caches")  # noqa: RUF009
    missing_label: str | None = argument(
        None,
        "clips without a caption: train with an empty one, or stop (default: empty, but stop if none has one)",
        MISSING_LABEL,
    )

    # Steps
    train_iters: int = argument(1000, "steps, each of gradient_accumulation_steps micro-batches")
    warmup: float = argument(0.01, "share of train_iters over which the learning rate rises")
    auto_warmup_steps: int = argument(100, "steps at the start with at most 5 % of the learning rate")
    lr_decay_style: str = argument("linear", "how the learning rate falls", LR_DECAY_STYLES)
    lr_decay_iters: int | None = argument(None, "steps over which it falls (default: train_iters)")
    lr_decay_ratio: float = argument(0.1, "share of the learning rate that a cosine falls to")
    checkpoint_activations: bool | int | str | None = argument(
        None,
        "compute activations again in the backward pass, to save memory: true (all layers), false, a number of layers, "
        "attention (all, but keep the result of their attention) or auto (what the free memory has no room for); the "
        "flag alone is true (default: as the model's file says)",
        read=recomputation_mode,
    )
    checkpoint_skip_layers: int | None = argument(
        None, "so many layers, the last ones, keep their activations all the same (default: as the model's file says)"
    )
    sequence_parallel_size: int = argument(1, "processes that share the tokens of each clip; a batch has a clip once")
    max_skipped_steps: int = argument(20, "stop after this many steps in a row without a finite loss and gradient")

    # Checkpoints
    save: str = argument("checkpoints_finetune", "folder of the runs")
    experiment_name: str = argument("finetune", "first part of the name of the run's folder")
    save_full: bool = argument(False, "with LoRA, write the base model's weights beside the adapter's")

    # Watching
    num_log_videos: int = argument(1, "validation clips whose captions are sampled at each evaluation; 0: none")
    only_log_video_latents: bool = argument(False, "save those samples as latents and decode nothing")

    deepspeed_config: dict[str, Any] = field(default_factory=dict)


@dataclass
class VaeTrainingArguments(RunArguments):
    """Arguments of `train_vae.py`; `model_config` and `lightning_config` are those sections of the configuration."""

    train_iters: int = argument(1000, "steps, each of accumulate_grad_batches batches")
    batch_size: int = argument(1, "clips of a batch, on every process that has clips of its own")
    seed: int = argument(1234, "seed of the run")
    device: str | None = argument(None, "cpu, cuda or cuda:N; default: a GPU if there is one")
    save: str = argument("checkpoints_vae", "folder of the runs")
    experiment_name: str = argument("vae", "first part of the name of the run's folder")
    num_log_videos: int = argument(1, "validation clips shown beside their reconstructions at each evaluation; 0: none")

    model_config: dict[str, Any] = field(default_factory=dict)
    lightning_config: dict[str, Any] = field(default_factory=dict)
