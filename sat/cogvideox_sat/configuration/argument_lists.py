"""List the arguments of each command: fields of dataclasses, with defaults and help.

The lists of sampling and fine-tuning are both here since each command takes configurations with arguments of the other.
Nothing here imports PyTorch.
"""

from dataclasses import dataclass, field
from typing import Any

from cogvideox_sat.configuration.argument_fields import argument
from cogvideox_sat.configuration.recomputation import recomputation_mode
from cogvideox_sat.configuration.sampler_knobs import SAMPLERS, SCHEDULES
from cogvideox_sat.configuration.shared_arguments import MODES, CommonArguments, RunArguments

MISSING_LABEL = ("empty", "stop")
LR_DECAY_STYLES = ("constant", "linear", "cosine")
# Arguments of SwissArmyTransformer's trainer that older files hold: they describe what is done here anyway, or have no
# counterpart here.
IGNORED_KEYS = (
    *("no_load_rng", "no_save_rng", "split", "resume_dataloader", "iterable_dataset", "strict_eval", "log_image"),
    *("checkpoint_num_layers", "distributed_backend", "local_rank", "save_args", "summary_dir", "block_size"),
)

_INPUT_FILE_HELP = (
    "prompts: .txt, one per line (`prompt@@image` for image-to-video, `prompt@@first@@last`), or .jsonl, one object "
    "per line with prompt and optionally negative_prompt, image, keyframes, video, strength, extend, seed, frames (or "
    "num_frames, latent frames), size ([height, width]), fps, steps, sampler, guidance_scale, guidance_interval and "
    "guidance_schedule; or the .json beside a video, to make that video again"
)


@dataclass
class SamplingArguments(CommonArguments):
    """Arguments of `sample_video.py`.

    Attributes:
        given: the arguments that were given, rather than left at their defaults.
        vae_waiting_bytes: bytes of a GPU's memory that `fit` leaves for frames that wait, see `EngineSettings`.
        deepspeed_config: not read; the original's programs delete it.
        size_from_image: `sampling_image_size` is not given, and the model takes any shape.
        record: the record of a video that `input_file` names, a `configuration.video_records.VideoRecord`.
    """

    # Weights
    lora_scale: float = argument(1.0, "strength of the adapter; 0 is the base model")
    lora: list[str] = argument(  # noqa: RUF009
        [],
        "adapters to apply without merging, each PATH or PATH:STRENGTH: checkpoints with adapters, or LoRA files of "
        "diffusers; the model needs no lora_config for them",
    )
    force_inference: bool = argument(False, "sample even if weights are missing from the checkpoint")

    # Prompts
    input_type: str = argument("txt", "where prompts come from: a file or the keyboard", choices=("txt", "cli"))
    input_file: str | None = argument(None, _INPUT_FILE_HELP)
    image2video: bool = argument(False, "start from an image given with each prompt")
    negative_prompt: str = argument("", "what guidance steers away from; a .jsonl line may have its own")
    refine_prompts: bool = argument(False, "let a language model expand the prompts; see tools/convert_demo.py")
    seed: int = argument(
        1234, "seed of the run; the noise of each prompt depends on the seed and on the prompt's index"
    )

    # Clips and images beside the prompts; a .jsonl line may have its own
    video: str | None = argument(None, "clip that the videos start from, or that they continue if extend is given")
    strength: float | None = argument(
        None, "how much of the clip is changed, a share of the steps: 0 keeps it, 1 replaces it (default: 0.8)"
    )
    extend: int | None = argument(
        None, "continue the video, or the clip, by this many windows, each from the last frames before it"
    )
    keyframes: list[str] = argument(  # noqa: RUF009
        [], "images that frames show, each IMAGE:FRAME, such as last.png:-1 for the last frame (image-to-video)"
    )

    # Videos
    batch_size: int = argument(1, "videos per prompt")
    sampling_image_size: list[int] = argument(  # noqa: RUF009
        [480, 720],
        "height and width in pixels; if it is not given, a 1.5 image-to-video model takes the shape of each image",
    )
    sampling_num_frames: int = argument(13, "latent frames: 13, 11 or 9 for 1.0 models, 22 or 42 for 1.5")
    latent_channels: int = argument(16, "channels of the latents")
    frames: int | None = argument(
        None, "frames of the video, instead of sampling_num_frames; 49 frames are 13 latent frames of a 1.0 model"
    )

    # Sampler
    steps: int | None = argument(None, "the same as sampling_num_steps")
    sampler: str | None = argument(None, f"sampler, one of {', '.join(SAMPLERS)} (default: the configuration's)")
    guidance_scale: float | None = argument(
        None, "strength of guidance (default: the configuration's, which is 6 in released models)"
    )
    guidance_interval: list[float] = argument(  # noqa: RUF009
        [], "two shares of the steps; guidance is on between them, such as 0.2 0.8 (default: 0 1)"
    )
    guidance_schedule: str | None = argument(
        None,
        "how the strength of guidance changes over the steps: as DynamicCFG counts them (timestep, diffusers or step), "
        "or constant (default: the configuration's)",
        choices=SCHEDULES,
    )
    guidance_batch: int = argument(
        2,
        "2: prompt and negative prompt go through the network together; 1: one after the other, in less memory",
    )

    # Output
    output_dir: str = argument("outputs", "folder of the videos")
    only_save_latents: bool = argument(False, "save latents (.safetensors) and decode nothing")
    overwrite: bool = argument(False, "replace videos that exist")
    skip_existing: bool = argument(False, "leave out prompts whose videos exist")
    contact_sheet: str | None = argument(None, "also write this PNG, with a row of frames for each video")
    looping_previews: bool = argument(False, "beside each video write NAME.webp, an animated preview")

    # Machine
    offload: str = argument(
        "stage",
        "what to move off the device to save memory: nothing, the idle stages, or also the network's idle layers",
        choices=("none", "stage", "sequential"),
    )
    fit: str | None = argument(
        None,
        "device memory to stay within, such as 12GB, or auto (what is free): sets offload, guidance_batch and "
        "vae_frames_at_once, unless they are given",
    )
    processes_per_video: int | None = argument(
        None, "processes that share each video: first the two halves of guidance, then the tokens (default: 1)"
    )
    guidance_parallel: bool | None = argument(
        None, "give each half of guidance processes of its own (default: if processes_per_video allows it)"
    )
    sequence_parallel: int | None = argument(
        None, "processes that share the tokens of a half of guidance (default: what processes_per_video leaves)"
    )

    given: frozenset[str] = frozenset()
    vae_waiting_bytes: int | None = None
    deepspeed_config: dict[str, Any] = field(default_factory=dict)
    size_from_image: bool = False
    record: Any = field(default=None, repr=False, compare=False)


@dataclass
class TrainingArguments(RunArguments, CommonArguments):
    """Arguments of `train_video.py`.

    Attributes:
        deepspeed_config: the `deepspeed:` section of the configuration, checked.
    """

    # Start
    mode: str = argument("finetune", "purpose of the configuration; both commands take both", MODES)
    force_train: bool = argument(
        False, "train even if weights are missing from `load`: those start at random, input channels at zero"
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
        "recompute activations in the backward pass, to save memory: true (all layers), false, a number of layers, "
        "attention (all layers, but keep the result of their attention) or auto (as many layers as the free memory "
        "requires); the flag alone means true (default: as the model's file says)",
        read=recomputation_mode,
    )
    checkpoint_skip_layers: int | None = argument(
        None, "number of layers, the last ones, that always keep their activations (default: as the model's file says)"
    )
    sequence_parallel_size: int = argument(
        1, "processes that share the tokens of each clip; such a clip counts once in the batch size"
    )
    max_skipped_steps: int = argument(20, "stop after this many steps in a row without a finite loss and gradient")

    # Checkpoints
    save: str = argument("checkpoints_finetune", "folder of the runs")
    experiment_name: str = argument("finetune", "first part of the name of the run's folder")
    save_full: bool = argument(False, "with LoRA, write the base model's weights beside the adapter's")

    # Watching
    valid_prompts: str | None = argument(
        None,
        "a file of prompts, as inference takes it (.txt, or .jsonl with all its fields), whose videos are made before "
        "the first step and at each evaluation",
    )
    num_log_videos: int = argument(1, "validation clips whose captions are sampled at each evaluation; 0: none")
    only_log_video_latents: bool = argument(
        False, "save samples, also those of valid_prompts, as latents and decode nothing"
    )

    deepspeed_config: dict[str, Any] = field(default_factory=dict)


@dataclass
class VaeTrainingArguments(RunArguments):
    """Arguments of `train_vae.py`.

    Attributes:
        model_config, lightning_config: the sections of these names.
    """

    train_iters: int = argument(1000, "steps, each of accumulate_grad_batches batches")
    batch_size: int = argument(1, "clips in a batch, on every process that has clips of its own")
    seed: int = argument(1234, "seed of the run")
    device: str | None = argument(None, "cpu, cuda or cuda:N; default: a GPU if there is one")
    save: str = argument("checkpoints_vae", "folder of the runs")
    experiment_name: str = argument("vae", "first part of the name of the run's folder")
    num_log_videos: int = argument(1, "validation clips shown beside their reconstructions at each evaluation; 0: none")

    model_config: dict[str, Any] = field(default_factory=dict)
    lightning_config: dict[str, Any] = field(default_factory=dict)
