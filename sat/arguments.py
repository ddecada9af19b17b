"""The arguments of the sampling command: what there is, from where it is read, and what it may be.

An argument is a field of `SamplingArguments`. It may be given on the command line (`--name value`) or in the `args:`
section of a configuration file; the command line wins. Nothing here imports PyTorch.
"""

import argparse
import difflib
import logging
import re
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from types import UnionType
from typing import Any

from config_files import load_configs, replace_exclusive
from model_limits import SPACE_FACTOR
from sgm.errors import UserError

logger = logging.getLogger("sample_video")

MODEL_PARTS = ("network_config", "denoiser_config", "sampler_config", "conditioner_config", "first_stage_config")
SMALLEST_TILE = 64  # pixels; the overlap of smaller tiles is most of them
# What else the engine reads of the `model:` section, and a key of released files that asks for what is always so.
MODEL_KEYS = (
    *("scale_factor", "log_keys", "input_key", "latent_input", "not_trainable_prefixes"),
    *("noised_image_input", "noised_image_all_concat", "noised_image_dropout"),
    *("loss_fn_config", "network_wrapper", "compile_model"),
    "disable_first_stage_autocast",
)
EXCLUSIVE = (("fp16", "bf16"), ("overwrite", "skip_existing"))
TYPE_NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "text", list: "whole numbers"}


def argument(default: Any, help: str, choices: Sequence[str] | None = None) -> Any:
    metadata = {"help": help, "choices": choices}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


_INPUT_FILE_HELP = (
    "prompts: .txt, one a line (`prompt@@image` for image-to-video), or .jsonl, one object a line with prompt and "
    "optionally negative_prompt, image, seed, num_frames (latent frames) and size ([height, width])"
)


@dataclass
class SamplingArguments:
    """Arguments of `sample_video.py`; `model_config` is the `model:` section of the configuration."""

    # Weights
    load: str | None = argument(None, "checkpoint of the network: a folder with `latest`, or a weight file")
    lora_load: str | None = argument(None, "adapter to put on top of `load`")
    lora_scale: float = argument(1.0, "strength of the adapter; 0 is the base model")
    force_inference: bool = argument(False, "let weights be missing from the checkpoint")

    # Prompts
    mode: str = argument("inference", "what the command is for", choices=("inference",))
    input_type: str = argument("txt", "where prompts come from: a file or the keyboard", choices=("txt", "cli"))
    input_file: str | None = argument(None, _INPUT_FILE_HELP)
    image2video: bool = argument(False, "start from an image given with each prompt")
    negative_prompt: str = argument("", "what guidance steers away from; a .jsonl line may have its own")
    seed: int = argument(1234, "seed of the run; every prompt's noise depends on it and on the prompt's index")

    # Videos
    batch_size: int = argument(1, "videos per prompt")
    sampling_image_size: list[int] = argument([480, 720], "height and width in pixels")  # noqa: RUF009
    sampling_num_frames: int = argument(13, "latent frames: 13, 11 or 9 for 1.0 models, 22 or 42 for 1.5")
    sampling_num_steps: int | None = argument(None, "sampling steps, if not the sampler's own number")
    sampling_fps: int = argument(8, "frames per second of the video file")
    latent_channels: int = argument(16, "channels of the latents")

    # Output
    output_dir: str = argument("outputs", "folder of the videos")
    only_save_latents: bool = argument(False, "save latents (.safetensors) and decode nothing")
    overwrite: bool = argument(False, "replace videos that exist")
    skip_existing: bool = argument(False, "leave out prompts whose videos exist")

    # Machine
    device: str | None = argument(None, "cpu, cuda or cuda:N; default: a GPU if there is one")
    fp16: bool = argument(False, "compute in float16")
    bf16: bool = argument(False, "compute in bfloat16")
    offload: str = argument(
        "stage",
        "what leaves the device to make room: nothing, the stages not running, or also the network's idle layers",
        choices=("none", "stage", "sequential"),
    )
    vae_tile_size: int | None = argument(None, "run the VAE in square tiles of this many pixels, to save memory")
    model_parallel_size: int = argument(1, "processes that share one network")

    model_config: dict[str, Any] = field(default_factory=dict)


def get_args(command_line: Sequence[str] | None = None) -> SamplingArguments:
    """Read the command line and the configuration files it names.

    Raises:
        UserError: a file is missing or malformed, an argument is unknown or has a wrong value.
        SystemExit: for `--help`.
    """
    parser = build_parser()
    known, unknown = parser.parse_known_args(command_line)
    for flag in unknown:
        if flag.startswith("-"):
            raise UserError(f"unknown argument {flag.split('=')[0]}{nearest(flag.strip('-').split('=')[0], '--')}")
        raise UserError(f"unexpected '{flag}' on the command line: values follow an argument such as --load")
    given = vars(known)
    if "base" not in given:
        raise UserError("--base is missing: name the model's configuration, then configs/inference.yaml")
    config = load_configs(given.pop("base"), used=("model",), exclusive=EXCLUSIVE)
    replace_exclusive(given, EXCLUSIVE)
    values = {**check_section(config.get("args") or {}), **given}
    check_model_section(config.get("model") or {})
    args = SamplingArguments(**values, model_config=config["model"])
    check_values(args)
    return args


def argument_fields() -> dict[str, Field]:
    return {f.name: f for f in fields(SamplingArguments) if f.name != "model_config"}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Sample videos from prompts.",
        epilog="Example: python sat/sample_video.py --base configs/cogvideox_5b.yaml configs/inference.yaml --seed 42",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.error = _raise_user_error
    parser.add_argument("--base", nargs="+", metavar="FILE", help="configuration files, later ones overriding earlier")
    for name, f in argument_fields().items():
        kind = value_type(f)
        default = f.default_factory() if f.default is MISSING else f.default
        shown = f" (default: {default})" if default not in (None, "") else ""
        options: dict[str, Any] = {"help": f.metadata["help"].replace("%", "%%") + shown}
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif kind is list:
            options |= {"type": int, "nargs": "+", "metavar": "INT"}
        else:
            choices = f.metadata["choices"]
            options |= {"type": kind, "choices": choices, "metavar": None if choices else kind.__name__.upper()}
        parser.add_argument(f"--{name}", **options)
    return parser


def _raise_user_error(message: str) -> typing.NoReturn:
    raise UserError(message)


def value_type(f: Field) -> type:
    """`int` for `int | None`, `list` for `list[int]`."""
    kind = f.type
    if isinstance(kind, UnionType):
        kind = next(option for option in typing.get_args(kind) if option is not type(None))
    return typing.get_origin(kind) or kind


def nearest(name: str, prefix: str = "") -> str:
    known = [*argument_fields(), *(["base"] if prefix else [])]  # base is a flag only
    matches = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {prefix}{matches[0]}?" if matches else "; --help lists them all"


def check_model_section(section: Mapping[str, Any]) -> None:
    """Raises UserError unless the `model:` section describes all parts that sampling needs."""
    for part in MODEL_PARTS:
        if not isinstance(section.get(part), dict):
            raise UserError(f"the configuration has no model.{part}: name a model's file too, as in --help")
    for key in section:
        if key not in MODEL_PARTS and key not in MODEL_KEYS:
            near = difflib.get_close_matches(str(key), [*MODEL_PARTS, *MODEL_KEYS], n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            logger.warning("model.%s is not used%s", key, hint)


def check_section(section: Mapping[str, Any]) -> dict[str, Any]:
    """The `args:` section, with its keys known and its values of the right type."""
    known, values = argument_fields(), {}
    for name, value in section.items():
        if name not in known:
            raise UserError(f"args: unknown key '{name}'{nearest(str(name))}")
        kind = value_type(known[name])
        if type(value) is int and kind is float:
            value = float(value)
        if kind is int and isinstance(value, list) and len(value) == 1:
            value = value[0]  # `batch_size: [1]`, as older files have it
        if value is None:
            continue  # as if it were not there
        fits = type(value) is kind and (kind is not list or all(type(item) is int for item in value))
        if not fits:
            raise UserError(f"args: {name} is {value!r}; expected {TYPE_NAMES[kind]}")
        choices = known[name].metadata["choices"]
        if choices and value not in choices:
            raise UserError(f"args: {name} is '{value}'; it can be {', '.join(choices)}")
        values[name] = value
    return values


def check_values(args: SamplingArguments) -> None:
    """What can be said about the values without looking at the model."""
    for one, other in EXCLUSIVE:
        if getattr(args, one) and getattr(args, other):
            raise UserError(f"{one} and {other} are both on: choose one (--no-{one} or --no-{other})")
    if len(args.sampling_image_size) != 2:
        raise UserError(f"sampling_image_size is {args.sampling_image_size}; expected height and width")
    for name in ("batch_size", "sampling_fps", "sampling_num_frames", "sampling_num_steps", "model_parallel_size"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"{name} is {value}; it must be at least 1")
    if args.vae_tile_size is not None and (args.vae_tile_size < SMALLEST_TILE or args.vae_tile_size % SPACE_FACTOR):
        raise UserError(
            f"vae_tile_size is {args.vae_tile_size}; it must be a multiple of {SPACE_FACTOR}, at least {SMALLEST_TILE}"
        )
    if not 0 <= args.seed < 2**63:
        raise UserError(f"seed is {args.seed}; it can be from 0 to 2^63 - 1")
    if args.device is not None and not re.fullmatch(r"cpu|cuda(:\d+)?", args.device):
        raise UserError(f"device is '{args.device}'; it can be cpu, cuda or cuda:N")
    if not args.load and not args.force_inference:
        raise UserError("load is missing: name the checkpoint of the network")
    if args.input_type == "txt" and not args.input_file:
        raise UserError("input_file is missing: give --input_file, or --input_type cli to type prompts")
