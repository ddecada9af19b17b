"""Define the settings of the parts of a run: engine, data and loop.

Commands take settings from their arguments. Programs take them from any object, or make them:

    EngineSettings(model_config, load="CogVideoX-2b-sat/transformer", bf16=True)
    EngineSettings.from_args(args)

Nothing here imports PyTorch.
"""

from argparse import Namespace
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, MISSING, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Self

from omegaconf.errors import OmegaConfBaseException

from cogvideox_sat.configuration.program_arguments import check_spelling
from cogvideox_sat.configuration.similar_names import nearest
from sgm.config_places import Sources
from sgm.errors import UserError


@dataclass(frozen=True)
class Settings:
    """Base class of all settings.

    Args:
        sources: the file of each key of the configuration, for errors.
        arguments: the object that the settings were taken from, for classes of the user's own, which may read more of
            it.
    """

    _: KW_ONLY
    sources: Sources = field(default_factory=Sources, repr=False, compare=False)
    arguments: Any = field(default=None, repr=False, compare=False)

    @classmethod
    def from_args(cls, args: Any, **changes: Any) -> Self:
        """Return the settings among the attributes of `args`; missing ones have their defaults.

        Args:
            args: arguments of a command, a `Namespace`, a mapping, or settings of this class.
            changes: settings that take precedence.

        Raises:
            UserError: a name is a misspelt setting, one of `changes` is not a setting, or a setting is missing.
        """
        names = {f.name for f in fields(cls)} - {"arguments"}
        for name in changes.keys() - names:
            raise UserError(
                f"{name}: {cls.__name__} has no such setting{nearest(name, sorted(names), otherwise='', least=0.6)}"
            )
        if isinstance(args, cls):
            return replace(args, **changes) if changes else args
        given = _attributes(args, names)
        check_spelling(given, names)
        taken = {name: given[name] for name in names & given.keys()} | changes
        taken = {name: value for name, value in taken.items() if value is not None or name in changes}
        required = {f.name for f in fields(cls) if f.default is MISSING and f.default_factory is MISSING}
        for name in sorted(required - taken.keys()):
            raise UserError(f"{name}: missing; {cls.__name__} needs it")
        return cls(**taken, arguments=args.arguments if isinstance(args, Settings) else args)

    def as_args(self) -> Any:
        """Return `arguments` with these settings in them; without `arguments`, the settings."""
        if self.arguments is None:
            return self
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "arguments"}
        return _Overlaid(self.arguments, own, own)


class _Overlaid(Namespace):
    """Arguments of a program, with settings in place of its own values.

    Slots, properties and attributes of the object's class are read from the object itself when they are needed.
    """

    __slots__ = ("_given",)

    def __init__(self, given: Any, names: Iterable[str], own: Mapping[str, Any]):
        super().__init__(**{**_attributes(given, names), **own})
        self._given = given

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # copying and pickling ask for such names before `_given` is set
            raise AttributeError(name)
        return getattr(self._given, name)


def _attributes(args: Any, names: Iterable[str]) -> dict[str, Any]:
    """Return the attributes or items of an object of arguments, and those of `names` it has.

    Raises:
        UserError: a value of an OmegaConf configuration is missing, or refers to one that is.
    """
    if isinstance(args, Mapping):
        return {str(name): _item(args, name) for name in args}
    own = {} if isinstance(args, type) else getattr(args, "__dict__", {})
    return {name: getattr(args, name) for name in names if hasattr(args, name)} | own


def _item(args: Mapping[Any, Any], name: Any) -> Any:
    try:
        return args[name]
    except OmegaConfBaseException as error:
        raise UserError(f"{name}: {str(error).splitlines()[0]}") from error


@dataclass(frozen=True)
class EngineSettings(Settings):
    """Settings of `diffusion_video.SATVideoDiffusionEngine`.

    Args:
        model_config: the `model:` section of a configuration; also an OmegaConf `DictConfig`.
        load: checkpoint of the network: a folder with `latest`, or a weight file; None: weights start at random.
        lora_load: adapter to apply to the network.
        lora_scale: strength of the adapter; None: the strength it was saved with.
        force_inference: continue if weights are missing from the checkpoint.
        new_adapter: initialise the adapter if no file holds one, for training.
        weights_in_shares: leave the network's weights in their files until ZeRO-3 loads each process's share.
        fp16, bf16: compute in float16 or bfloat16; if neither is set, in float32.
        vae_tile_size: run the VAE in overlapping tiles of this many pixels: less memory, slightly different numbers.
        vae_frames_at_once: run each layer of the VAE on this many frames at a time: less memory, the same numbers. 16
            or more decode several chunks at once.
        vae_waiting_bytes: bytes of a GPU's memory for frames that wait meanwhile; None: all free memory.
        guidance_batch: 2: both halves of guidance go through the network together; 1: one after the other, which takes
            half the memory of activations.
        attention: one of `shared_arguments.ATTENTIONS`; see `network.attention_choice`.
        model_parallel_size: processes that share one network; None: as `model_config` says.
        model_cls: a subclass of the engine to use instead.
    """

    model_config: Mapping[str, Any]
    _: KW_ONLY
    load: str | Path | None = None
    lora_load: str | Path | None = None
    lora_scale: float | None = None
    force_inference: bool = False
    new_adapter: bool = False
    weights_in_shares: bool = False
    fp16: bool = False
    bf16: bool = False
    vae_tile_size: int | None = None
    vae_frames_at_once: int | None = None
    vae_waiting_bytes: int | None = None
    guidance_batch: int = 2
    attention: str = "auto"
    model_parallel_size: int | None = None
    model_cls: type | None = None


@dataclass(frozen=True)
class DataSettings(Settings):
    """Settings of the data of a run; see `runs.datasets.make_dataset`.

    Args:
        data_config: the `data:` section of a configuration, `target` and `params`.
        model_config: the `model:` section, for the lengths that the network takes; None: all that `data_config` allows.
        train_data: folders, manifests, tar shards or latent caches.
        train_data_repeats: how often each entry of `train_data` is used; empty: once.
        train_data_weights: share of the samples that each entry provides; empty: in proportion to its number of clips.
        valid_data: data for evaluations, of the same kinds as `train_data`.
        eval_iters: batches in an evaluation.
        eval_batch_size: clips in a batch of an evaluation.
        missing_label: treatment of clips without a caption: `empty`, `stop`, or `ignore` if captions are not used;
            None: the default of the dataset's class.
        max_unreadable_share: the run ends if a larger share of the clips is unreadable.
        clip_timeout: seconds for reading a clip.
        num_workers: processes that read clips.
        seed: seed of the run; all randomness of a sample follows from the seed, the epoch and the sample's index.
    """

    data_config: Mapping[str, Any]
    _: KW_ONLY
    model_config: Mapping[str, Any] | None = None
    train_data: Sequence[str] = ()
    train_data_repeats: Sequence[int] = ()
    train_data_weights: Sequence[float] = ()
    valid_data: Sequence[str] = ()
    eval_iters: int = 1
    eval_batch_size: int = 1
    missing_label: str | None = None
    max_unreadable_share: float = 0.1
    clip_timeout: float = 120.0
    num_workers: int = 2
    seed: int = 1234


@dataclass(frozen=True)
class LoopSettings(Settings):
    """Settings of the training loop: its length, the work between steps, and the output.

    Args:
        train_iters: steps, each an update of the weights.
        log_interval, eval_interval, save_interval: steps between lines of the log, evaluations and checkpoints.
        keep_last: checkpoints to keep; None: all.
        background_checkpoints: write checkpoints during the next steps, from a copy in host memory.
        max_skipped_steps: the run ends after this many steps in a row without finite loss and gradients.
        warmup: share of the steps over which the learning rate rises.
        auto_warmup_steps: steps at the start with at most 5 % of the learning rate.
        lr_decay_style: one of `argument_lists.LR_DECAY_STYLES`.
        lr_decay_iters: steps over which the learning rate falls; None: `train_iters`.
        lr_decay_ratio: share of the learning rate that a cosine falls to.
        save: folder of the runs.
        experiment_name: first part of the name of the run's folder.
        resume: `latest`, or the folder of a run or a checkpoint to resume.
        tensorboard, wandb, wandb_project: outputs of metrics in addition to `metrics.jsonl`.
        merged_config: the whole configuration, to be saved in the run's folder.
    """

    train_iters: int
    _: KW_ONLY
    log_interval: int = 20
    eval_interval: int | None = None
    save_interval: int = 500
    keep_last: int | None = None
    background_checkpoints: bool = False
    max_skipped_steps: int = 20
    warmup: float = 0.01
    auto_warmup_steps: int = 100
    lr_decay_style: str = "linear"
    lr_decay_iters: int | None = None
    lr_decay_ratio: float = 0.1
    save: str = "checkpoints"
    experiment_name: str = "train"
    resume: str | None = None
    tensorboard: bool = True
    wandb: bool = False
    wandb_project: str = "cogvideox-sat"
    merged_config: Mapping[str, Any] = field(default_factory=dict)
