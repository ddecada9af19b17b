"""Arguments of a command as fields of a dataclass: given on the command line (`--name value`) or in the `args:` section
of a configuration file. Nothing here imports PyTorch.
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
SMALLEST_TILE = 64  # pixels; the overlap of smaller tiles is most of them
HIGHEST_RATE = 1000  # frames a second of a video that is written; ffmpeg takes no rate without limit
MODES = ("inference", "finetune")
# Arguments that are files or folders to read from.
INPUT_ARGUMENTS = ("load", "lora_load", "input_file", "train_data", "valid_data", "resume")
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
    """A field that is an argument; fields made otherwise are not.

    Args:
        read: returns the value that a name and what stands in a configuration or on a command line mean, for one that
            may be a switch (`--name`, `--no-name`) or have a value; raises UserError.
    """
    metadata = {"help": help, "choices": choices, "read": read}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class CommonArguments:
    """Arguments that sampling and training share.

    `model_config` is the `model:` section of the configuration, `sources` the file that each of its keys is from.
    """

    load: str | None = argument(None, "checkpoint of the network: a folder with `latest`, or a weight file")
    lora_load: str | None = argument(None, "adapter to put on top of `load`")
    mode: str = argument("inference", "what the configuration was written for; both commands take both", choices=MODES)
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
        "run each layer of the VAE on so many frames at a time, a multiple of 4; the others wait in host memory: "
        "less memory, the same numbers; default: all frames, and fewer where a GPU's memory does not do",
    )
    attention: str = argument(
        "auto",
        "kernel of the network's attention: PyTorch's, FlashAttention 3, or the one that suits the device",
        ATTENTIONS,
    )
    sampling_num_steps: int | None = argument(None, "sampling steps, if not the sampler's own number")
    sampling_fps: int = argument(8, "frames per second of sampled videos")

    model_config: dict[str, Any] = field(default_factory=dict)
    sources: Sources = field(default_factory=Sources, repr=False, compare=False)
    model_cls: type | None = None  # an engine of the user's own, from Python: see engine_choice


@dataclass
class RunArguments:
    """What all training commands share; `merged_config` is the whole configuration with the command line in it, to be
    saved beside what it leads to."""

    resume: str | None = argument(
        None, "go on with a run: `latest` (the newest of this experiment_name), or the folder of a run or a checkpoint"
    )

    # Data
    train_data: list[str] = argument([], "training data: folders, .jsonl or .csv manifests, .tar shards")  # noqa: RUF009
    valid_data: list[str] = argument([], "validation data, of the same kinds")  # noqa: RUF009
    train_data_repeats: list[int] = argument([], "how often each place of train_data comes")  # noqa: RUF009
    train_data_weights: list[float] = argument(  # noqa: RUF009
        [], "share of the samples that each place of train_data gives, whatever its size"
    )
    inspect_data: bool = argument(
        False, "train nothing: report the data and what is left out and why, and write a sheet of 16 clips"
    )
    json: bool = argument(False, "with inspect_data: print the report as JSON, for scripts")
    contact_sheet: str | None = argument(None, "with inspect_data: the PNG of its sheet (default: inspect_data.png)")
    num_workers: int = argument(2, "processes that read clips, for each training process")
    clip_timeout: float = argument(120.0, "seconds to read a clip; one that takes longer counts as unreadable")
    collective_timeout: float = argument(
        1800.0, "seconds that a process waits for the others within a step, before the run ends"
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
        False, "copy a checkpoint to host memory, if that has room, and write it while the next steps are made"
    )

    # Watching
    log_interval: int = argument(20, "steps between lines of the log")
    tensorboard: bool = argument(True, "write TensorBoard events into the run's folder")
    wandb: bool = argument(False, "report to Weights & Biases; WANDB_MODE=offline works without a network")
    wandb_project: str = argument("cogvideox-sat", "project on Weights & Biases")
    eval_interval: int | None = argument(None, "steps between evaluations on valid_data (default: none)")
    eval_iters: int = argument(1, "batches of an evaluation")
    eval_batch_size: int = argument(1, "clips of such a batch")
    num_log_videos: int = argument(1, "validation clips of which a video is made at each evaluation; 0: none")

    data_config: dict[str, Any] = field(default_factory=dict)
    merged_config: dict[str, Any] = field(default_factory=dict)
    sources: Sources = field(default_factory=Sources, repr=False, compare=False)


def argument_fields(command: type) -> dict[str, Field[Any]]:
    """The arguments of a command by name; `command` is a dataclass."""
    return {f.name: f for f in fields(command) if "help" in f.metadata}


def value_type(f: Field[Any]) -> type:
    """`int` for `int | None`, `list` for `list[int]`."""
    return typing.get_origin(_without_none(f.type)) or _without_none(f.type)


def item_type(f: Field[Any]) -> type:
    """`int` for `list[int]`."""
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
    """Return the arguments given on the command line, and the merged configuration files that `--base` names.

    Args:
        used: the sections of the configuration whose targets must import.
        exclusive: pairs of switches; one that is turned on turns off the other of earlier files.
        ignored: names of flags that are taken and not used.
        otherwise: gives a configuration for a command line without `--base`, or None if it has none either.
        elsewhere: names that are no flags here, each with the key of a configuration that takes the value.

    Raises:
        UserError: a file is missing or malformed, a flag is unknown or has a wrong value.
        SystemExit: for `--help`.
    """
    known, unknown = parser.parse_known_args(command_line)
    for flag in unknown:
        if flag.startswith("-"):
            name = flag.strip("-").split("=")[0].replace("-", "_")
            if elsewhere and name in elsewhere:
                raise UserError(f"--{name} is not set here but as {elsewhere[name]} in a configuration")
            hint = nearest(name, ["base", "set", *argument_fields(command)], prefix="--")
            raise UserError(f"unknown argument {flag.split('=')[0]}{hint}")
        raise UserError(f"unexpected '{flag}' on the command line: values follow an argument such as --load")
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
    """Return the merged configuration files that `base` among the `given` names, which it takes out of there.

    Args:
        settings: keys that are set on top of the files, see `single_keys`.
        example: what to give where there are no files, for a message.

    Raises:
        UserError: as `read_command_line`.
    """
    config = None if "base" in given or otherwise is None else otherwise(given)
    if "base" not in given and config is None:
        raise UserError(f"--base is missing: {example}")
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
    """Return arguments that a program gives by name, each as what the argument takes; None stands for its default.

    Raises:
        UserError: a name is no argument, or a value is of the wrong type or none of the choices.
    """
    known, given = argument_fields(command), {}
    for name, value in values.items():
        if name not in known:
            raise UserError(f"{name}: there is no such argument{nearest(name, sorted(known), otherwise='')}")
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
    """Leave out of messages that a value stands in the section `args` of a file."""
    try:
        yield
    except UserError as error:
        raise UserError(str(error).removeprefix("args: ")) from error


def allow_own_modules() -> None:
    """Let targets name modules in the current working directory, after all that is installed."""
    folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.append(folder)


def with_located_inputs(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return arguments with those that are files or folders where they are found, see `input_paths.find_input`."""
    return {
        name: located(value, name) if name in INPUT_ARGUMENTS and value != "latest" else value
        for name, value in values.items()
    }


def build_parser(command: type, description: str, example: str, ignored: Sequence[str] = ()) -> argparse.ArgumentParser:
    """Return a parser with `--base` and a flag for every argument; what is not given is absent from its result.

    Args:
        ignored: names of flags that are taken and not used.
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
    """The end of a message about an unknown name: the known one most like it, or `otherwise`."""
    matches = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {prefix}{matches[0]}?" if matches else otherwise


def check_section(command: type, section: Mapping[str, Any], foreign: Collection[str] = ()) -> dict[str, Any]:
    """The `args:` section, with its keys known and its values of the right type.

    Keys in `foreign`, which mean something to another command, are left out.

    Raises:
        UserError: a key is unknown or a value is of the wrong type or none of the choices.
    """
    known, values = argument_fields(command), {}
    for name, value in section.items():
        if name not in known:
            if name in foreign:
                continue
            raise UserError(f"args: unknown key '{name}'{nearest(str(name), sorted({*known, *map(str, foreign)}))}")
        if value is not None:  # else as if it were not there
            values[name] = check_value(known[name], value)
    return values


def check_value(f: Field[Any], value: Any) -> Any:
    """A value of a configuration file as what the argument takes: `3` and `1e-3` for a float, `[1]` for an int, ...

    Raises:
        UserError: it is of another type, or none of the choices.
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
        raise UserError(f"args: {f.name} is {value!r}; expected {expected}")
    choices = f.metadata["choices"]
    if choices and value not in choices:
        raise UserError(f"args: {f.name} is '{value}'; it can be {', '.join(choices)}")
    return value


# ---------------------------------------------------------------------------------------------------------------------
# Checking
# ---------------------------------------------------------------------------------------------------------------------


def check_exclusive(args: Any, pairs: Sequence[tuple[str, str]]) -> None:
    """Raises UserError if both switches of a pair are on."""
    for one, other in pairs:
        if getattr(args, one) and getattr(args, other):
            raise UserError(f"{one} and {other} are both on: choose one (--no-{one} or --no-{other})")


def check_least(args: Any, names: Sequence[str], least: int = 1) -> None:
    """Raises UserError unless each of the arguments is None or at least `least`."""
    for name in names:
        value = getattr(args, name)
        if value is not None and value < least:
            raise UserError(f"{name} is {value}; it must be at least {least}")


def check_common(args: CommonArguments) -> None:
    """Raises UserError for a value that no command takes."""
    check_exclusive(args, (PRECISIONS,))
    check_least(args, ("model_parallel_size", "sampling_num_steps", "sampling_fps"))
    if args.sampling_fps > HIGHEST_RATE:
        raise UserError(f"sampling_fps is {args.sampling_fps}; it must be at most {HIGHEST_RATE}")
    check_tile_size(args.vae_tile_size)
    check_frames_at_once(args.vae_frames_at_once)
    check_seed_and_device(args)


def check_tile_size(size: int | None) -> None:
    """Check that the VAE can run in tiles of so many pixels, else raise UserError; None stands for whole images."""
    if size is not None and (size < SMALLEST_TILE or size % SPACE_FACTOR):
        raise UserError(f"vae_tile_size is {size}; it must be a multiple of {SPACE_FACTOR}, at least {SMALLEST_TILE}")


def check_frames_at_once(frames: int | None) -> None:
    """Check that the VAE can run on so many frames at a time, else raise UserError; None stands for all."""
    if frames is not None and (frames < 1 or frames % TIME_FACTOR):
        raise UserError(
            f"vae_frames_at_once is {frames}; it must be a multiple of {TIME_FACTOR}, at least {TIME_FACTOR}"
        )


def check_seed_and_device(args: Any) -> None:
    """Raises UserError unless `seed` and `device` are such as any command takes."""
    if not 0 <= args.seed < 2**63:
        raise UserError(f"seed is {args.seed}; it can be from 0 to 2^63 - 1")
    if args.device is not None and not re.fullmatch(r"cpu|cuda(:\d+)?", args.device):
        raise UserError(f"device is '{args.device}'; it can be cpu, cuda or cuda:N")


def check_run(args: RunArguments) -> None:
    """Raises UserError for a value that no training command takes."""
    check_least(args, ("train_iters", "save_interval", "keep_last", "log_interval"))
    check_least(args, ("eval_interval", "eval_iters", "eval_batch_size"))
    check_least(args, ("num_workers", "num_log_videos"), least=0)
    check_shares(args, ("max_unreadable_share",))
    check_durations(args, ("clip_timeout", "collective_timeout"))
    check_mixing(args)
    if args.json and not args.inspect_data:
        raise UserError("json: inspect_data is off, and json is about its report; give --inspect_data too")
    if not re.fullmatch(r"[^/\\\s]+", args.experiment_name) or args.experiment_name.startswith("."):
        raise UserError(f"experiment_name is '{args.experiment_name}'; it names a folder: no spaces or slashes")


def check_shares(args: Any, names: Sequence[str]) -> None:
    """Raises UserError unless each of the arguments is from 0 to 1."""
    for name in names:
        value = getattr(args, name)
        if not 0 <= value <= 1:
            raise UserError(f"{name} is {value}; it is a share, from 0 to 1")


def check_durations(args: Any, names: Sequence[str]) -> None:
    """Check that each of the arguments is a number of seconds above zero, and raise UserError otherwise."""
    for name in names:
        value = getattr(args, name)
        if not 0 < value < math.inf:
            raise UserError(f"{name}: {value} is not a duration; give a number of seconds above 0")


def unused_model_keys(section: Mapping[str, Any], parts: Sequence[str] = MODEL_PARTS) -> list[str]:
    """Keys of the `model:` section that nothing reads, each as a sentence for the log.

    Raises:
        UserError: a part of the model is not described.
    """
    for part in parts:
        if not isinstance(section.get(part), dict):
            raise UserError(f"the configuration has no model.{part}: name a model's file too, as in --help")
    unused, known = [], [*MODEL_PARTS, *MODEL_KEYS]
    for key in section:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            unused.append(f"model.{key} is not used" + (f"; did you mean {near[0]}?" if near else ""))
    return unused
