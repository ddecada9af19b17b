"""Read configuration files and the files that they include, and check each of them.

Nothing here imports PyTorch.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cogvideox_sat.commands.input_paths import find_input, places
from cogvideox_sat.configuration.yaml_reading import read_yaml
from sgm.config_places import SECTIONS
from sgm.errors import UserError, shown

DEEPEST_INCLUDES, MOST_FILES = 20, 200

ConfigFile = tuple[Path, dict[str, Any]]


def read_files(paths: Sequence[str | Path], trusted: bool = True) -> list[ConfigFile]:
    """Return configuration files with their sections, each after the files that it includes.

    Args:
        trusted: False for files that came with something else, which may not include files.

    Raises:
        UserError: a file is missing, unreadable, not YAML, or has an unknown section.
    """
    files: list[ConfigFile] = []
    for path in paths:
        _read_with_includes(find_input(path, "--base") or Path(path), (), files, trusted)
    return files


def _read_with_includes(path: Path, parents: tuple[Path, ...], files: list[ConfigFile], trusted: bool) -> None:
    """Append `path` to `files`, after the files that it includes, each with its content."""
    try:
        resolved = path.resolve()
    except (OSError, RuntimeError, ValueError) as error:  # symbolic links in a circle
        raise UserError(f"configuration {path}: {error}") from error
    if resolved in parents:
        raise UserError(f"{path}: includes itself; remove that include")
    if len(parents) > DEEPEST_INCLUDES or len(files) > MOST_FILES:
        raise UserError(
            f"{path}: include: more files than {DEEPEST_INCLUDES} in a chain or {MOST_FILES} in all; include fewer"
        )
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
        raise UserError(f"{path}: include: got {shown(includes)}; expected the names of files")
    if includes and not trusted:
        raise UserError(
            f"{path}: include: a file that came with a checkpoint or a video includes no others; put "
            "their content into it"
        )
    for include in includes:
        _read_with_includes(path.parent / include, (*parents, resolved), files, trusted)
    for section, value in content.items():
        if section not in SECTIONS:
            name = f"'{section}'" if isinstance(section, str) else section
            raise UserError(f"{path}: unknown section {name}; known are {', '.join(SECTIONS)} (and include)")
        if value is not None and not isinstance(value, dict):
            raise UserError(f"{path}: the section '{section}': got {shown(value)}; expected keys and values")
    files.append((path, {section: value for section, value in content.items() if value is not None}))
