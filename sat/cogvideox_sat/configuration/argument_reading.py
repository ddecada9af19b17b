"""Read a command line and the configuration files that it names.

Nothing here imports PyTorch.
"""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cogvideox_sat.commands.input_paths import located
from cogvideox_sat.commands.launchers import take_launcher_flags
from cogvideox_sat.configuration.argument_fields import argument_fields
from cogvideox_sat.configuration.deepspeed_file import merged_with_file
from cogvideox_sat.configuration.files import MergedConfig, load_configs, replace_exclusive, with_located_paths
from cogvideox_sat.configuration.model_section import check_modules, plain_model_section
from cogvideox_sat.configuration.similar_names import nearest
from cogvideox_sat.configuration.single_keys import parse_settings, set_keys
from sgm.errors import UserError

# Arguments that name files or folders to read.
INPUT_ARGUMENTS = ("load", "lora_load", "input_file", "train_data", "valid_data", "valid_prompts", "resume")


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
    refuse_flags(unknown, command, elsewhere or {})
    given = vars(known)
    given.pop("debug", None)
    settings = parse_settings(given.pop("set", ()))
    return given, read_configuration(given, settings, command, used, exclusive, ignored, otherwise, parser.epilog)


def refuse_flags(unknown: Sequence[str], command: type, elsewhere: Mapping[str, str]) -> None:
    """Raise UserError about the first word of a command line that is no flag, if there is one.

    Args:
        unknown: the words that the parser did not take.
        elsewhere: names that are not flags here, each with the key of a configuration that takes the value.
    """
    for flag in unknown:
        if not flag.startswith("-"):
            raise UserError(f"unexpected '{flag}' on the command line; put an argument such as --load before a value")
        name = flag.strip("-").split("=")[0].replace("-", "_")
        if name in elsewhere:
            raise UserError(f"--{name} is not an argument; set {elsewhere[name]} in a configuration")
        hint = nearest(name, ["base", "set", *argument_fields(command)], prefix="--")
        raise UserError(f"unknown argument {flag.split('=')[0]}{hint}")


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
        raise UserError(f"--base: missing; {example}")
    deepspeed_file = take_launcher_flags(given, ignored)
    allow_own_modules()
    if config is None:
        config = load_configs(given.pop("base"), used, exclusive, settings=settings, given=given)
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
