"""List the arguments that several commands share.

Nothing here imports PyTorch.
"""

from dataclasses import dataclass, field
from typing import Any

from cogvideox_sat.configuration.argument_fields import argument
from sgm.config_places import Sources

PRECISIONS = ("fp16", "bf16")
ATTENTIONS = ("auto", "cudnn", "flash", "efficient", "math", "flash3")
MODES = ("inference", "finetune")


@dataclass
class CommonArguments:
    """Arguments that sampling and training share.

    Attributes:
        model_config: the `model:` section of the configuration.
        sources: the file that each key of the configuration is from.
        model_cls: an engine class of the user's own, from Python; see `engine_choice`.
    """

    load: str | None = argument(None, "checkpoint of the network: a folder with `latest`, or a weight file")
    lora_load: str | None = argument(None, "adapter to apply to the checkpoint `load`")
    mode: str = argument("inference", "purpose of the configuration; both commands take both", choices=MODES)
    seed: int = argument(1234, "seed of the run")
    device: str | None = argument(None, "cpu, cuda or cuda:N; default: a GPU if there is one")
    fp16: bool = argument(False, "compute in float16")
    bf16: bool = argument(False, "compute in bfloat16")
    model_parallel_size: int = argument(1, "processes that share one network")
    vae_tile_size: int | None = argument(
        None, "run the VAE in overlapping square tiles of this many pixels: less memory, slightly different numbers"
    )
    vae_frames_at_once: int | None = argument(
        None,
        "run each layer of the VAE on this many frames at a time, a multiple of 4; the others wait in host memory: "
        "less memory, the same numbers (default: all frames to encode, a chunk of 8 to decode, fewer if a GPU's memory "
        "is too small); 16 or more decode several chunks at once, in more memory",
    )
    attention: str = argument(
        "auto",
        "kernel of the network's attention: one of PyTorch's, FlashAttention 3, or auto, which suits the device",
        ATTENTIONS,
    )
    sampling_num_steps: int | None = argument(None, "sampling steps (default: the sampler's own number)")
    sampling_fps: int = argument(8, "frames per second of sampled videos")

    model_config: dict[str, Any] = field(default_factory=dict)
    sources: Sources = field(default_factory=Sources, repr=False, compare=False)
    model_cls: type | None = None


@dataclass
class RunArguments:
    """Arguments that all training commands share.

    Attributes:
        merged_config: the whole configuration, including the command line, to be saved beside the results.
    """

    resume: str | None = argument(
        None, "resume a run: `latest` (the newest of this experiment_name), or the folder of a run or a checkpoint"
    )

    # Data
    train_data: list[str] = argument([], "training data: folders, .jsonl or .csv manifests, .tar shards")  # noqa: RUF009
    valid_data: list[str] = argument([], "validation data, of the same kinds")  # noqa: RUF009
    train_data_repeats: list[int] = argument([], "how often each entry of train_data is used")  # noqa: RUF009
    train_data_weights: list[float] = argument(  # noqa: RUF009
        [], "share of the samples that each entry of train_data provides, whatever its size"
    )
    inspect_data: bool = argument(
        False, "train nothing; report the data, what is left out and why, and write a contact sheet of 16 clips"
    )
    json: bool = argument(False, "with inspect_data: print the report as JSON, for scripts")
    contact_sheet: str | None = argument(
        None, "with inspect_data: the PNG of the contact sheet (default: inspect_data.png)"
    )
    num_workers: int = argument(2, "processes that read clips, for each training process")
    clip_timeout: float = argument(120.0, "seconds to read a clip; one that takes longer counts as unreadable")
    collective_timeout: float = argument(
        1800.0, "seconds that a process waits for the others within a step before the run ends"
    )
    max_unreadable_share: float = argument(0.1, "stop when more than this share of the clips read is unreadable")

    # Steps and checkpoints
    train_iters: int = argument(1000, "steps, each an update of the weights")
    deterministic: bool = argument(
        False, "compute in a fixed order, so that a GPU repeats a run to the bit; slower, and needs more memory"
    )
    save: str = argument("checkpoints", "folder of the runs")
    experiment_name: str = argument("train", "first part of the name of the run's folder")
    save_interval: int = argument(500, "steps between checkpoints")
    keep_last: int | None = argument(None, "checkpoints to keep (default: all)")
    background_checkpoints: bool = argument(
        False, "copy each checkpoint to host memory, if there is room, and write it during the next steps"
    )

    # Watching
    log_interval: int = argument(20, "steps between lines of the log")
    tensorboard: bool = argument(True, "write TensorBoard events into the run's folder")
    wandb: bool = argument(False, "report to Weights & Biases; WANDB_MODE=offline works without a network")
    wandb_project: str = argument("cogvideox-sat", "project on Weights & Biases")
    eval_interval: int | None = argument(None, "steps between evaluations on valid_data (default: none)")
    eval_iters: int = argument(1, "batches in an evaluation")
    eval_batch_size: int = argument(1, "clips in a batch of an evaluation")
    num_log_videos: int = argument(1, "validation clips for which a video is made at each evaluation; 0: none")

    data_config: dict[str, Any] = field(default_factory=dict)
    merged_config: dict[str, Any] = field(default_factory=dict)
    sources: Sources = field(default_factory=Sources, repr=False, compare=False)
