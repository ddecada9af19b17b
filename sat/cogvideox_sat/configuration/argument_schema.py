"""Define arguments of a command as fields of a dataclass, and read and check them.

An argument is given on the command line (`--name value`) or in the `args:` section of a configuration file. Nothing
here imports PyTorch.
"""

import argparse
import difflib
import math
import re
import sys
import typing
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, Field, dataclass, field, fields
from functools import partial
from pathlib import Path
from types import UnionType
from typing import Any

from cogvideox_sat.commands.flag_spellings import StrictParser
from cogvideox_sat.commands.input_paths import located
from cogvideox_sat.commands.launchers import add_launcher_flags, take_launcher_flags
from cogvideox_sat.commands.program_names import as_started
from cogvideox_sat.configuration.data_mixing import check_mixing
from cogvideox_sat.configuration.deepspeed_file import merged_with_file
from cogvideox_sat.configuration.files import MergedConfig, load_configs, replace_exclusive, with_located_paths
from cogvideox_sat.configuration.model_section import MODEL_KEYS, MODEL_PARTS, check_modules, plain_model_section
from cogvideox_sat.configuration.single_keys import parse_settings, set_keys
from cogvideox_sat.latent_geometry import SPACE_FACTOR, TIME_FACTOR
from sgm.config_places import Sources
from sgm.errors import UserError

PRECISIONS = ("fp16", "bf16")
ATTENTIONS = ("auto", "cudnn", "flash", "efficient", "math", "flash3")
SMALLEST_TILE = 64  # pixels; smaller tiles would consist mostly of overlap
HIGHEST_RATE = 1000  # frames per second of a written video; ffmpeg refuses very high rates
MODES = ("inference", "finetune")
# Arguments that name files or folders to read.
INPUT_ARGUMENTS = ("load", "lora_load", "input_file", "train_data", "valid_data", "valid_prompts", "resume")
TYPE_NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
ITEM_NAMES = {int: "whole numbers", float: "numbers", str: "texts"}
FLOAT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")


# ---------------------------------------------------------------------------------------------------------------------
# Declaring
# ---------------------------------------------------------------------------------------------------------------------


def argument(
    default: Any,
    help: str,
    choices: Sequence[str] | None = None,
    read: Callable[[str, Any], Any] | None = None,
) -> Any:
    """Return a dataclass field that is an argument; other fields are not arguments.

    Args:
        help: the text for `--help`.
        choices: the allowed values; None: any value of the type.
        read: a function of the argument's name and value that returns the checked value or raises UserError, for an
            argument that is a switch (`--name`, `--no-name`) or has a value.
    """
    metadata = {"help": help, "choices": choices, "read": read}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


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
        "less memory, the same numbers (default: all frames, or fewer if a GPU's memory is too small)",
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


def argument_fields(command: type) -> dict[str, Field[Any]]:
    """Return the arguments of a command by name; `command` is a dataclass."""
    return {f.name: f for f in fields(command) if "help" in f.metadata}


def value_type(f: Field[Any]) -> type:
    """Return the type of an argument's value: `int` for `int | None`, `list` for `list[int]`."""
    return typing.get_origin(_without_none(f.type)) or _without_none(f.type)


def item_type(f: Field[Any]) -> type:
    """Return the type of the items of a list argument: `int` for `list[int]`."""
    return typing.get_args(_without_none(f.type))[0]


def _without_none(kind: Any) -> Any:
    if isinstance(kind, UnionType):
        return next(option for option in typing.get_args(kind) if option is not type(None))
    return kind


# ---------------------------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------------------------


def read_command_line(
    command: type,
    parser: argparse.ArgumentParser,
    command_line: Sequence[str] | None,
    used: Sequence[str],
    exclusive: Sequence[tuple[str, str]],
    ignored: Sequence[str] = (),
    otherwise: Callable[[dict[str, Any]], MergedConfig | None] | None = None,
    elsewhere: Mapping[str, str] | None = None,
) -> tuple[dict[str, Any], MergedConfig]:
    """Return the command line's arguments and the configuration merged from `--base`.

    Args:
        used: the sections of the configuration whose targets must import.
        exclusive: pairs of switches; turning one on turns off the other if an earlier file turned it on.
        ignored: names of flags that are accepted but not used.
        otherwise: a function that returns a configuration for a command line without `--base`, or None if it has none.
        elsewhere: names that are not flags here, each with the key of a configuration that takes the value.

    Raises:
        UserError: a file is missing or malformed, or a flag is unknown or has a wrong value.
        SystemExit: for `--help`.
    """
    known, unknown = parser.parse_known_args(command_line)
    for flag in unknown:
        if flag.startswith("-"):
            name = flag.strip("-").split("=")[0].replace("-", "_")
            if elsewhere and name in elsewhere:
                raise UserError(f"--{name} is not an argument; set {elsewhere[name]} in a configuration")
            hint = nearest(name, ["base", "set", *argument_fields(command)], prefix="--")
            raise UserError(f"unknown argument {flag.split('=')[0]}{hint}")
        raise UserError(f"unexpected '{flag}' on the command line; put an argument such as --load before a value")
    given = vars(known)
    given.pop("debug", None)
    settings = parse_settings(given.pop("set", ()))
    return given, read_configuration(given, settings, command, used, exclusive, ignored, otherwise, parser.epilog)


def read_configuration(
    given: dict[str, Any],
    settings: Mapping[str, Any],
    command: type,
    used: Sequence[str],
    exclusive: Sequence[tuple[str, str]] = (),
    ignored: Sequence[str] = (),
    otherwise: Callable[[dict[str, Any]], MergedConfig | None] | None = None,
    example: str | None = None,
) -> MergedConfig:
    """Return the merged content of the configuration files that `given["base"]` names.

    `base` is removed from `given`.

    Args:
        settings: keys that are set on top of the files, see `single_keys`.
        example: an example of a command line, for the message that `base` is missing.

    Raises:
        UserError: as `read_command_line`.
    """
    config = None if "base" in given or otherwise is None else otherwise(given)
    if "base" not in given and config is None:
        raise UserError(f"--base is missing; {example}")
    deepspeed_file = take_launcher_flags(given, ignored)
    allow_own_modules()
    if config is None:
        config = load_configs(given.pop("base"), used, exclusive, settings=settings)
    elif settings:
        set_keys(config, config.sources, settings)
    config.sources.arguments = set(argument_fields(command))
    if deepspeed_file is not None:
        config["deepspeed"] = merged_with_file(config.get("deepspeed") or {}, deepspeed_file)
    if config.get("model"):
        config["model"] = with_located_paths(plain_model_section(config["model"]), "model")
        with config.sources.naming():
            check_modules(config["model"])
    replace_exclusive(given, exclusive)
    return config


def given_values(command: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the checked values of arguments that a program gives by name.

    None stands for the default of an argument, and is left out.

    Raises:
        UserError: a name is not an argument, or a value is of the wrong type or not one of the choices.
    """
    known, given = argument_fields(command), {}
    for name, value in values.items():
        if name not in known:
            raise UserError(f"{name}: unknown argument{nearest(name, sorted(known), otherwise='')}")
        if isinstance(value, Path):
            value = str(value)
        if isinstance(value, tuple):
            value = list(value)
        if value is not None:
            with without_section():
                given[name] = check_value(known[name], value)
    return given


@contextmanager
def without_section() -> Iterator[None]:
    """Remove `args: ` from the beginning of UserErrors, for values that are from no file."""
    try:
        yield
    except UserError as error:
        raise UserError(str(error).removeprefix("args: ")) from error


def allow_own_modules() -> None:
    """Let targets name modules in the current working directory; installed modules come first."""
    folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.append(folder)


def with_located_inputs(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return arguments, with files and folders replaced by where they are found.

    See `commands.input_paths.find_input`.
    """
    return {
        name: located(value, name) if name in INPUT_ARGUMENTS and value != "latest" else value
        for name, value in values.items()
    }


def build_parser(command: type, description: str, example: str, ignored: Sequence[str] = ()) -> argparse.ArgumentParser:
    """Return a parser with `--base` and a flag for every argument.

    Arguments that are not given are absent from its result.

    Args:
        example: a command line, shown at the end of `--help`.
        ignored: names of flags that are accepted but not used.
    """
    parser = StrictParser(
        description=description,
        epilog=f"for example: {as_started(example)}",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.add_argument("--base", nargs="+", metavar="FILE", help="configuration files, later ones overriding earlier")
    parser.add_argument(
        "--set",
        nargs="+",
        action="extend",
        metavar="KEY=VALUE",
        help="set any keys of the configuration, such as model.sampler_config.params.guider_config.params.exp=3",
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error too")  # see sgm.errors
    for name, f in argument_fields(command).items():
        kind = value_type(f)
        default = f.default if f.default_factory is MISSING else f.default_factory()
        shown = f" (default: {default})" if default not in (None, "", []) else ""
        options: dict[str, Any] = {"help": as_started(f.metadata["help"]).replace("%", "%%") + shown}
        if read := f.metadata["read"]:
            parser.add_argument(f"--no-{name}", dest=name, action="store_false", help=argparse.SUPPRESS)
            options |= {"nargs": "?", "const": True, "type": partial(read, name), "metavar": "MODE"}
        elif kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif kind is list:
            options |= {"type": item_type(f), "nargs": "+", "metavar": item_type(f).__name__.upper()}
        else:
            choices = f.metadata["choices"]
            options |= {"type": kind, "choices": choices, "metavar": None if choices else kind.__name__.upper()}
        parser.add_argument(f"--{name}", **options)
    add_launcher_flags(parser, ignored)
    return parser


def nearest(name: str, known: Collection[str], prefix: str = "", otherwise: str = "; --help lists them all") -> str:
    """Return the end of a message about an unknown name.

    It suggests the known name that is most similar, or else is `otherwise`.
    """
    matches = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {prefix}{matches[0]}?" if matches else otherwise


def check_section(command: type, section: Mapping[str, Any], foreign: Collection[str] = ()) -> dict[str, Any]:
    """Return the `args:` section with its keys and the types of its values checked.

    Keys in `foreign`, which are arguments of another command, are left out.

    Raises:
        UserError: a key is unknown, or a value is of the wrong type or not one of the choices.
    """
    known, values = argument_fields(command), {}
    for name, value in section.items():
        if name not in known:
            if name in foreign:
                continue
            raise UserError(f"args: unknown key '{name}'{nearest(str(name), sorted({*known, *map(str, foreign)}))}")
        if value is not None:  # an empty key means the same as none
            values[name] = check_value(known[name], value)
    return values


def check_value(f: Field[Any], value: Any) -> Any:
    """Return a value of a configuration file as the type of its argument.

    A float may be written `3` or `1e-3`, an int `[1]`.

    Raises:
        UserError: the value is of another type, or not one of the choices.
    """
    if read := f.metadata["read"]:
        return read(f"args: {f.name}", value)
    kind = value_type(f)
    if kind is float and (type(value) is int or (isinstance(value, str) and FLOAT.fullmatch(value))):
        value = float(value)  # YAML takes 1e-3, which has no point, for text
    if kind is int and isinstance(value, list) and len(value) == 1:
        value = value[0]  # `batch_size: [1]`, as older files have it
    if kind is list and item_type(f) is str and isinstance(value, str):
        value = [value]
    if kind is list and item_type(f) is float and isinstance(value, list):
        value = [float(item) if type(item) is int else item for item in value]
    items = value if isinstance(value, list) else []
    fits = type(value) is kind and all(type(item) is item_type(f) for item in items)
    if not fits:
        expected = ITEM_NAMES[item_type(f)] if kind is list else TYPE_NAMES[kind]
        raise UserError(f"args: {f.name}: got {value!r}; expected {expected}")
    choices = f.metadata["choices"]
    if choices and value not in choices:
        raise UserError(f"args: {f.name}: got '{value}'; it can be {', '.join(choices)}")
    return value


# ---------------------------------------------------------------------------------------------------------------------
# Checking
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


def check_common(args: CommonArguments) -> None:
    """Check the arguments whose limits all commands share, else raise UserError."""
    check_exclusive(args, (PRECISIONS,))
    check_least(args, ("model_parallel_size", "sampling_num_steps", "sampling_fps"))
    if args.sampling_fps > HIGHEST_RATE:
        raise UserError(f"sampling_fps: got {args.sampling_fps}; it must be at most {HIGHEST_RATE}")
    check_tile_size(args.vae_tile_size)
    check_frames_at_once(args.vae_frames_at_once)
    check_seed_and_device(args)


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
        raise UserError(f"seed must be between 0 and 2^63 - 1, got {args.seed}")
    if args.device is not None and not re.fullmatch(r"cpu|cuda(:\d+)?", args.device):
        raise UserError(f"device: got '{args.device}'; it can be cpu, cuda or cuda:N")


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


def unused_model_keys(section: Mapping[str, Any], parts: Sequence[str] = MODEL_PARTS) -> list[str]:
    """Return a sentence for the log about each key of the `model:` section that nothing reads.

    Raises:
        UserError: the section does not describe a part of the model.
    """
    for part in parts:
        if not isinstance(section.get(part), dict):
            raise UserError(f"model.{part} is missing; name a model's file too, as in --help")
    unused, known = [], [*MODEL_PARTS, *MODEL_KEYS]
    for key in section:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            unused.append(f"model.{key} is not used" + (f"; did you mean {near[0]}?" if near else ""))
    return unused
