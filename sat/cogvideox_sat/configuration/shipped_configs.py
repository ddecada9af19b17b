"""Build a shipped configuration's object in place of one that cannot be built."""

import copy
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from cogvideox_sat.configuration.includes import read_files
from cogvideox_sat.configuration.merging import merge_files, resolve
from cogvideox_sat.files.shipped import CONFIGS
from sgm.config_places import walk, within

FILES = ("tiny/cogvideox_tiny_lora.yaml", "cogvideox_2b_lora.yaml", "cogvideox1.5_5b_i2v.yaml", "tiny/vae_images.yaml")
# Files that a class loads when it is built: they do not matter here and may not exist.
LOADED = ("ckpt_path", "ckpt_engine", "lpips_weights")


def build_reference(slot: str | None, config: Any, use: Callable[[Any], Any] | None = None) -> Exception | None:
    """Build and use the object of a shipped file at the key `slot`, for the class in `config`.

    Args:
        use: a function to call with the object; None: build the object without memory and do not use it.

    Returns:
        The exception that was raised; None if there was none, or if no shipped file has that class.
    """
    reference = find_reference(slot, config)
    if reference is None:
        return None
    from cogvideox_sat.configuration.meta_device import instantiate_on_meta
    from sgm.util import instantiate_from_config

    try:
        with within(None):
            if use is None:
                instantiate_on_meta(reference)
            else:
                use(instantiate_from_config(reference))
    except Exception as error:  # it is compared with the error that the user's values lead to
        return error
    return None


def find_reference(slot: str | None, config: Any) -> Mapping[str, Any] | None:
    """Return the configuration at `slot` of the shipped file most similar to `config`.

    The most similar file names most of the same classes. The result is None if no shipped file has the class of
    `config`.
    """
    if not isinstance(config, Mapping):
        return None
    wanted = targets(config)
    found: list[tuple[int, Mapping[str, Any]]] = []
    for model in _models():
        for key, node in walk({"model": model}):
            names = [part for part in key if isinstance(part, str)]
            if isinstance(node, Mapping) and names and names[-1] == slot and node.get("target") == config.get("target"):
                if any(target.endswith("FrozenT5Embedder") for target in targets(node)):
                    continue  # it cannot be built without its weights
                found.append((len(wanted & targets(node)), node))
    if not found:
        return None
    reference = copy.deepcopy(dict(max(found, key=lambda entry: entry[0])[1]))
    for _, node in walk(reference):
        if isinstance(node, dict):
            for name in LOADED:
                node.pop(name, None)
    return {name: reference[name] for name in ("target", "params") if name in reference}


def targets(config: Any) -> set[str]:
    """Return the classes that a configuration names."""
    return {str(node["target"]) for _, node in walk(config) if isinstance(node, Mapping) and "target" in node}


@cache
def _models() -> list[dict[str, Any]]:
    return [_model(CONFIGS / name) for name in FILES if (CONFIGS / name).is_file()]


def _model(path: Path) -> dict[str, Any]:
    return resolve(*merge_files(read_files([path]), [path]), trusted=True)["model"]
