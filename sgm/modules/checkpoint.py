"""Starting an autoencoder from the weights of another."""

import logging
from collections.abc import Sequence
from pathlib import Path

from torch import nn

from sgm.weights import assign_weights, module_weights, read_state_dict

log = logging.getLogger(__name__)

TRAINING_ONLY = ("loss.", "model_ema.")
"""Prefixes of what a training checkpoint holds beside the autoencoder."""


def load_autoencoder(module: nn.Module, path: str | Path, ignore_keys: Sequence[str] = ()) -> list[str]:
    """Take the weights from a file (see `read_state_dict`), all but its entries that start with one of `ignore_keys`.

    What belongs to training alone (the loss, the averaged weights) may be missing from the file, and is left out,
    with a word in the log, where `module` has no place for it. The autoencoder itself must fit exactly.

    Returns:
        The names of the entries of `module` that the file does not hold.

    Raises:
        UserError: the file cannot be read, or is of another architecture: names or shapes differ.
    """
    weights = module_weights(read_state_dict(path), what=str(path))
    weights = {name: value for name, value in weights.items() if not name.startswith(tuple(ignore_keys))}
    own_parts = {_part(name) for name in module.state_dict(keep_vars=True)}
    if foreign := [name for name in weights if _part(name) not in own_parts]:
        parts = ", ".join(sorted({_part(name) for name in foreign}))
        log.warning("%s: left out %d entries unknown to the autoencoder, of: %s", path, len(foreign), parts)
    weights = {name: value for name, value in weights.items() if _part(name) in own_parts}
    missing, _ = assign_weights(
        module, weights, what=str(path), allow_missing=TRAINING_ONLY, allow_unexpected=TRAINING_ONLY
    )
    return missing


def _part(name: str) -> str:
    return name.partition(".")[0]


class CheckpointEngine:
    """What `ckpt_engine` in a configuration names: called with an autoencoder, it loads the weights of a file.

    Args: those of `load_autoencoder`.
    """

    def __init__(self, ckpt_path: str | Path, ignore_keys: Sequence[str] = ()):
        self.ckpt_path, self.ignore_keys = ckpt_path, ignore_keys

    def __call__(self, module: nn.Module) -> list[str]:
        return load_autoencoder(module, self.ckpt_path, self.ignore_keys)
