"""Reading configuration files: YAML with `include`, merged in order, with every mistake named by file and key.

Nothing here imports PyTorch, so that a mistake is reported at once.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from config_merging import merge_files, resolve
from config_targets import why_target_fails
from input_paths import find_input, located, not_found, places
from sgm.config_places import SECTIONS, ConfigError, Sources, parse_key
from sgm.errors import UserError, shown
from shipped_configs import build_reference
from yaml_reading import read_yaml

PATH_KEYS = ("load", "lora_load", "ckpt_path", "model_dir", "lpips_weights")
DEEPEST_INCLUDES, MOST_FILES = 20, 200


class MergedConfig(dict[str, Any]):
    """The sections of merged configuration files by name, with the file that each key is from in `sources`."""

    sources: Sources


yaml.SafeDumper.add_representer(MergedConfig, yaml.SafeDumper.represent_dict)


def load_configs(
    paths: Sequence[str | Path],
    used: Sequence[str] = SECTIONS,
    exclusive: Sequence[tuple[str, str]] = (),
    trusted: bool = True,
) -> MergedConfig:
    """Return the merged content of configuration files, later ones overriding earlier ones.

    A file may start from others: `include: other.yaml`, or a list, relative to itself.

    Args:
        used: the sections whose targets must import.
        exclusive: pairs of switches in `args`; a file that turns one on turns off the other, unless it sets both.
        trusted: the files are the user's own. False for files that came with something else, such as a downloaded
            checkpoint: they include nothing, read no variables of the environment, and name only our own classes.

    Raises:
        UserError: a file is missing, unreadable, not YAML, or has an unknown section; interpolations do not resolve; a
            target does not import.
    """
    files: list[tuple[Path, dict[str, Any]]] = []
    for path in paths:
        _read_with_includes(find_input(path, "--base") or Path(path), (), files, trusted)
    for _, content in files:
        replace_exclusive(content.get("args", {}), exclusive)
    merged, sources = merge_files(files, paths)
    config = MergedConfig(resolve(merged, sources, trusted))
    config.sources = sources
    sources.build_reference = build_reference
    for key, target in iterate_targets({section: config.get(section) for section in used}):
        if problem := why_target_fails(target, trusted):
            raise ConfigError(f"{sources.place(parse_key(key))}: {shown(target)[1:-1]}: {problem}")
    return config


def replace_exclusive(args: dict[str, Any], pairs: Sequence[tuple[str, str]]) -> None:
    """Turn off the other of each pair of switches that `args` turns on, so that it overrides what came before."""
    for one, other in (*pairs, *(pair[::-1] for pair in pairs)):
        if args.get(one) is True and other not in args:
            args[other] = False


def _read_with_includes(
    path: Path, parents: tuple[Path, ...], files: list[tuple[Path, dict[str, Any]]], trusted: bool
) -> None:
    """Append the files that `path` includes, innermost first, and `path` itself, each with its content, to `files`."""
    try:
        resolved = path.resolve()
    except (OSError, RuntimeError, ValueError) as error:  # a circle of links
        raise UserError(f"configuration {path}: {error}") from error
    if resolved in parents:
        raise UserError(f"{path}: includes itself")
    if len(parents) > DEEPEST_INCLUDES or len(files) > MOST_FILES:
        raise UserError(f"{path}: include: more files than {DEEPEST_INCLUDES} in a chain or {MOST_FILES} in all")
    try:
        content = read_yaml(path)
    except UserError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            raise UserError(f"{error}{places(path)}") from error
        raise
    if not isinstance(content, dict):
        raise UserError(f"configuration {path}: expected sections ({', '.join(SECTIONS)}) at the top level")
    includes = content.pop("include", None) or []
    includes = includes if isinstance(includes, list) else [includes]
    if not all(isinstance(include, str) and include for include in includes):
        raise UserError(f"{path}: include is {shown(includes)}; expected the names of files")
    if includes and not trusted:
        raise UserError(f"{path}: include: a file that came with something else includes no others")
    for include in includes:
        _read_with_includes(path.parent / include, (*parents, resolved), files, trusted)
    for section, value in content.items():
        if section not in SECTIONS:
            name = f"'{section}'" if isinstance(section, str) else section
            raise UserError(f"{path}: unknown section {name}; there are {', '.join(SECTIONS)} (and include)")
        if value is not None and not isinstance(value, dict):
            raise UserError(f"{path}: the section '{section}' is {shown(value)}; expected keys and values")
    files.append((path, {section: value for section, value in content.items() if value is not None}))


def check_paths(config: dict[str, Any]) -> None:
    """Raises UserError if a file or folder that a configuration loads from is not there."""
    for key, path in _iterate_paths(config):
        if path and not _exists(path):
            raise UserError(f"{not_found(key, str(path))}; the README says where to get it and where to put it")


def _exists(path: Any) -> bool:
    try:
        return Path(str(path)).exists()
    except (OSError, ValueError):  # a name that no file can have
        return False


def _iterate_paths(node: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    for name, child in _children(node):
        path = f"{key}{name}"
        if isinstance(child, dict | list):
            yield from _iterate_paths(child, f"{path}.")
        elif _is_path(node, name):
            yield path, child


def with_located_paths(node: Any, key: str = "") -> Any:
    """Return a section with its files and folders where they are found, see `input_paths.find_input`."""
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


def _is_path(node: dict | list, name: str) -> bool:
    """Return whether the value of the key `name` is a path; beside a `cache_dir` the value is a name on a hub."""
    return name in PATH_KEYS and not (isinstance(node, dict) and node.get("cache_dir"))


def _children(node: dict | list) -> Iterator[tuple[str, Any]]:
    return iter(node.items()) if isinstance(node, dict) else ((str(i), child) for i, child in enumerate(node))


def iterate_targets(node: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Yield every `target:` below `node`, with its dotted key."""
    if isinstance(node, dict):
        for name, child in node.items():
            path = f"{key}.{name}" if key else str(name)
            if name == "target" and isinstance(child, str):
                yield path, child
            else:
                yield from iterate_targets(child, path)
    elif isinstance(node, list):
        for index, child in enumerate(node):
            yield from iterate_targets(child, f"{key}[{index}]")
