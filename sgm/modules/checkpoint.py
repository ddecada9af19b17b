"""Load the weights of an autoencoder into another one."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor, nn

from sgm.errors import UserError, some
from sgm.weights import assign_weights, module_weights, read_state_dict

log = logging.getLogger(__name__)

TRAINING_ONLY = ("loss.", "model_ema.")
"""Prefixes of the entries of a training checkpoint that are not part of the autoencoder."""


def load_autoencoder(
    module: nn.Module, path: str | Path, ignore_keys: Sequence[str] = (), strict: bool = True
) -> list[str]:
    """Load the weights from a file, except entries that start with one of `ignore_keys`.

    Entries that only training needs (the loss, the averaged weights) may be missing from the file; entries that
    `module` does not have are left out with a line in the log. The autoencoder itself must match exactly, unless
    `strict` is false: then each entry that fits is loaded, and the log lists the entries left out and those that keep
    their initial values.

    Args:
        path: see `read_state_dict`.

    Returns:
        The names of the entries of `module` that the file does not have, or has in another shape.

    Raises:
        UserError: the file cannot be read, or is of another architecture: names or shapes differ, or without `strict`
            no entry of the autoencoder fits.
    """
    weights = module_weights(read_state_dict(path), what=str(path))
    weights = {name: value for name, value in weights.items() if not name.startswith(tuple(ignore_keys))}
    if not strict:
        return _load_what_fits(module, weights, path)
    own_parts = {_part(name) for name in module.state_dict(keep_vars=True)}
    if foreign := [name for name in weights if _part(name) not in own_parts]:
        parts = ", ".join(sorted({_part(name) for name in foreign}))
        log.warning("%s: left out %d entries that the autoencoder does not have, of: %s", path, len(foreign), parts)
    weights = {name: value for name, value in weights.items() if _part(name) in own_parts}
    missing, _ = assign_weights(
        module, weights, what=str(path), allow_missing=TRAINING_ONLY, allow_unexpected=TRAINING_ONLY
    )
    return missing


def _load_what_fits(module: nn.Module, weights: Mapping[str, Tensor], path: str | Path) -> list[str]:
    own = {name: tuple(value.shape) for name, value in module.state_dict(keep_vars=True).items()}
    left_out = {name: "no such entry" for name in weights if name not in own}
    for name in weights.keys() & own.keys():
        if (shape := tuple(weights[name].shape)) != own[name]:
            left_out[name] = f"{shape} instead of {own[name]}"
    fitting = {name: value for name, value in weights.items() if name not in left_out}
    if not any(not name.startswith(TRAINING_ONLY) for name in fitting):
        raise UserError(
            f"strict: nothing in {path} fits {type(module).__name__}: the file holds {some(weights)}, the model "
            f"{some(own)}"
        )
    missing, _ = assign_weights(module, fitting, what=str(path), allow_missing=True)
    started = [name for name in missing if not name.startswith(TRAINING_ONLY)]
    log.warning(
        "%s fits in part (strict: false): took %d entries, left out %d; %d entries of the model keep their start",
        path,
        len(fitting),
        len(left_out),
        len(started),
    )
    for name, reason in sorted(left_out.items()):
        log.warning("left out: %s (%s)", name, reason)
    for name in started:
        log.warning("keeps its start: %s", name)
    return missing


def _part(name: str) -> str:
    return name.partition(".")[0]


class CheckpointEngine:
    """The class that `ckpt_engine` in a configuration names; a call loads the weights.

    Args: those of `load_autoencoder`.
    """

    def __init__(self, ckpt_path: str | Path, ignore_keys: Sequence[str] = (), strict: bool = True):
        self.ckpt_path, self.ignore_keys, self.strict = ckpt_path, ignore_keys, strict

    def __call__(self, module: nn.Module) -> list[str]:
        return load_autoencoder(module, self.ckpt_path, self.ignore_keys, self.strict)
