"""Read configuration files: YAML with `include`, merged in order.

Errors name the file and the key. Nothing here imports PyTorch, so that errors are reported at once.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from cogvideox_sat.commands.input_paths import located, not_found
from cogvideox_sat.configuration.includes import read_files
from cogvideox_sat.configuration.merging import merge_files, resolve
from cogvideox_sat.configuration.shipped_configs import build_reference
from cogvideox_sat.configuration.single_keys import set_keys
from cogvideox_sat.configuration.targets import iterate_targets, why_target_fails
from sgm.config_places import SECTIONS, ConfigError, Sources, parse_key
from sgm.errors import UserError, shown

# Arguments with two names: the one of requests, and the one of the original.
ALTERNATIVES = (("frames", "sampling_num_frames"), ("steps", "sampling_num_steps"))
PATH_KEYS = ("load", "lora_load", "ckpt_path", "model_dir", "lpips_weights")


class MergedConfig(dict[str, Any]):
    """Merged configuration files, by section.

    Attributes:
        sources: the file that each key is from.
    """

    sources: Sources


yaml.SafeDumper.add_representer(MergedConfig, yaml.SafeDumper.represent_dict)


def load_configs(
    paths: Sequence[str | Path],
    used: Sequence[str] = SECTIONS,
    exclusive: Sequence[tuple[str, str]] = (),
    trusted: bool = True,
    settings: Mapping[str, Any] | None = None,
    given: Mapping[str, Any] | None = None,
) -> MergedConfig:
    """Return the merged content of configuration files, later ones overriding earlier ones.

    A file may include others: `include: other.yaml`, or a list, relative to the file itself.

    Args:
        used: the sections whose targets must import.
        exclusive: pairs of switches in `args`; a file that turns one on turns off the other, unless it sets both.
        trusted: False for files that came with something else, such as a downloaded checkpoint: they may not include
            files or read environment variables, and may name only classes of this project.
        settings: keys that are set on top of all files, by their dotted names; see `single_keys`.
        given: arguments of the command line by name, to which references such as `${args.output_dir}` lead.

    Raises:
        UserError: a file is missing, unreadable, not YAML, or has an unknown section; a reference does not resolve; a
            target does not import.
    """
    files = read_files(paths, trusted)
    for _, content in files:
        replace_exclusive(content.get("args", {}), exclusive)
    replace_alternatives(files)
    merged, sources = merge_files(files, paths)
    if settings:
        set_keys(merged, sources, settings)
    config = MergedConfig(resolve(merged, sources, trusted, given))
    config.sources = sources
    sources.build_reference = build_reference
    for key, target in iterate_targets({section: config.get(section) for section in used}):
        if problem := why_target_fails(target, trusted):
            raise ConfigError(f"{sources.place(parse_key(key))}: {shown(target)[1:-1]}: {problem}")
    return config


def replace_exclusive(args: dict[str, Any], pairs: Sequence[tuple[str, str]]) -> None:
    """Turn off the other switch of each pair that `args` turns on, to override earlier files."""
    for one, other in (*pairs, *(pair[::-1] for pair in pairs)):
        if args.get(one) is True and other not in args:
            args[other] = False


def replace_alternatives(files: Sequence[tuple[Path, dict[str, Any]]]) -> None:
    """Remove an argument from earlier files if a later one sets it by its other name.

    Raises:
        UserError: a file sets both names.
    """
    for one, other in ALTERNATIVES:
        earlier: set[str] = set()
        for path, content in files:
            args = content.get("args", {})
            here = {name for name in (one, other) if args.get(name) is not None}
            check_alternatives(here, f"{path}: args: ")
            args |= dict.fromkeys((earlier - here) if here else ())
            earlier |= here


def check_alternatives(given: Collection[str], where: str = "") -> None:
    """Check that at most one of two names of an argument is given, else raise UserError.

    Args:
        where: the beginning of the message.
    """
    for one, other in ALTERNATIVES:
        if one in given and other in given:
            raise UserError(f"{where}{one}: {other} is given too, and means the same; keep one of them")


def check_paths(config: dict[str, Any]) -> None:
    """Check that all files and folders that a configuration loads exist, else raise UserError."""
    for key, path in _iterate_paths(config):
        if path and not _exists(path):
            raise UserError(f"{not_found(key, str(path))}; docs/sampling.md says where to get it and where to put it")


def _exists(path: Any) -> bool:
    try:
        return Path(str(path)).exists()
    except (OSError, ValueError):  # not a valid name of a file
        return False


def _iterate_paths(node: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    for name, child in _children(node):
        path = f"{key}{name}"
        if isinstance(child, dict | list):
            yield from _iterate_paths(child, f"{path}.")
        elif _is_path(node, name):
            yield path, child


def with_located_paths(node: Any, key: str = "") -> Any:
    """Return a section, with files and folders replaced by where they are found.

    See `commands.input_paths.find_input`.
    """
    if isinstance(node, dict):
        return {
            name: located(child, f"{key}.{name}")
            if isinstance(child, str) and _is_path(node, name)
            else with_located_paths(child, f"{key}.{name}")
            for name, child in node.items()
        }
    if isinstance(node, list):
        return [with_located_paths(child, f"{key}.{index}") for index, child in enumerate(node)]
    return node


def _is_path(node: dict[str, Any] | list[Any], name: str) -> bool:
    """Return whether the value of the key `name` is a path, not a model's name on a hub."""
    return name in PATH_KEYS and not (isinstance(node, dict) and node.get("cache_dir"))


def _children(node: dict[str, Any] | list[Any]) -> Iterator[tuple[str, Any]]:
    return iter(node.items()) if isinstance(node, dict) else ((str(i), child) for i, child in enumerate(node))
