"""Merge DeepSpeed's own configuration file, `--deepspeed_config FILE`, over `deepspeed:`.

Nothing here imports PyTorch.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cogvideox_sat.commands.input_paths import find_input, not_found
from cogvideox_sat.configuration.yaml_reading import parse_yaml
from sgm.errors import UserError
from sgm.plain_json import parse_json


def merged_with_file(section: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Return the section with the content of the file merged over it, mapping by mapping.

    Raises:
        UserError: the file cannot be read, or holds neither JSON nor YAML with keys and values.
    """
    found = find_input(path, "deepspeed_config")
    if found is None:
        raise UserError(not_found("deepspeed_config", path))
    try:
        text = found.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"deepspeed_config {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"deepspeed_config {path} is not UTF-8 text; save it as UTF-8") from error
    try:
        content = parse_json(text)  # JSON first, since YAML reads JSON's 1e-5 as a text
    except (json.JSONDecodeError, RecursionError):
        content = parse_yaml(text, f"deepspeed_config {path}")
    if not isinstance(content, dict):
        raise UserError(f"deepspeed_config {path}: expected keys and values, as in the section deepspeed:")
    return _merged(section, content)


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    both = {
        name: _merged(below[name], value)
        for name, value in above.items()
        if isinstance(value, Mapping) and isinstance(below.get(name), Mapping)
    }
    return {**below, **above, **both}
