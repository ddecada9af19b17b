"""Read weights from files, and assign them to modules without copies."""

import argparse
import pickle
import re
import zipfile
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sgm.diffusers_vae_names import from_diffusers, is_diffusers_vae
from sgm.errors import UserError, shown, some
from sgm.plain_json import parse_json

INDEX_SUFFIX = ".safetensors.index.json"
PIPELINE_FILE = "model_index.json"  # in the folder of a pipeline of diffusers, beside a folder for each part
DIFFUSERS_FILES = ("diffusion_pytorch_model" + INDEX_SUFFIX, "diffusion_pytorch_model.safetensors")


# ---------------------------------------------------------------- files


def read_state_dict(path: str | Path) -> Any:
    """Return the content of the weight file at `path`, on the CPU.

    Tensors are mapped from the file where the format allows that. `path` is one of
      * a `.safetensors` file, or an index `*.safetensors.index.json` of several (or the folder of either):
        the result is a dict of tensors;
      * a folder with a pipeline of diffusers, or with its autoencoder: the result is the autoencoder's tensors, with
        their names in this project;
      * any other file: a `torch.save` pickle, read with `weights_only`, so that no code in it is executed. The result
        is the saved object; `module_weights` picks the weights out of it.

    Do not overwrite the file in place while its tensors are in use, since they are read on first access.

    Raises:
        UserError: the file does not exist, is damaged, or is a pickle of other than weights and plain values.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "vae" if (path / PIPELINE_FILE).is_file() else path
        weights = read_state_dict(safetensors_in(path))
        if not is_diffusers_vae(weights):
            return weights
        return {ours: weights[theirs] for ours, theirs in from_diffusers(weights).items()}
    if not path.exists():
        raise UserError(f"weight file {path} does not exist")
    if path.name.endswith(INDEX_SUFFIX):
        return _read_sharded(path)
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    return _read_pickle(path)


def module_weights(content: Any, *, what: str) -> dict[str, Tensor]:
    """Return the mapping from names to tensors in a result of `read_state_dict`.

    DeepSpeed stores it under "module", Lightning under "state_dict"; values that are not tensors are left out.

    Args:
        what: the file, for the error message.

    Raises:
        UserError: tensors are found in none of these places.
    """
    if isinstance(content, Mapping):
        for key in ("module", "state_dict"):
            if isinstance(content.get(key), Mapping):
                content = content[key]
                break
        weights = {name: value for name, value in content.items() if isinstance(value, Tensor)}
        if weights:
            _check_plain(weights, what)
            return weights
        raise UserError(f"{what} holds no weights: none under 'module' or 'state_dict' nor among {some(content)}")
    raise UserError(f"{what} holds no weights: it is a {type(content).__name__}, not a mapping of names to tensors")


def _check_plain(weights: Mapping[Any, Tensor], what: str) -> None:
    """Check that all weights have names and plain dense values.

    Raises:
        UserError: a weight does not.
    """
    for name, tensor in weights.items():
        kind = (
            "without values"
            if tensor.is_meta
            else "quantized"
            if tensor.is_quantized
            else "sparse"
            if tensor.layout != torch.strided
            else "of complex numbers"
            if tensor.is_complex()
            else None
        )
        if not isinstance(name, str) or kind:
            problem = f"{shown(name)} is a tensor {kind}" if kind else f"{shown(name)} is not a name of a weight"
            raise UserError(f"{what} holds no plain weights: {problem}; save dense tensors of real numbers by name")


def safetensors_in(folder: Path) -> Path:
    """Return the only safetensors file or index in a folder; diffusers' names come first.

    Raises:
        UserError: the folder has none, or several.
    """
    candidates = sorted(folder.glob("*" + INDEX_SUFFIX)) or sorted(folder.glob("*.safetensors"))
    candidates = [path for path in candidates if path.name in DIFFUSERS_FILES] or candidates
    if len(candidates) != 1:
        raise UserError(
            f"{folder} holds {len(candidates)} safetensors indices or files, expected one; name the file instead"
        )
    return candidates[0]


def read_weight_map(index: Path) -> dict[str, str]:
    """Return the file of each tensor in an index of safetensors files in the same folder.

    Raises:
        UserError: the index cannot be read, is not one, or names a file that is not in its folder.
    """
    try:
        weight_map = parse_json(index.read_text(encoding="utf-8"))["weight_map"]
        shards = sorted(set(weight_map.values()))
    except OSError as error:
        raise UserError(f"cannot read {index}: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index} is not a safetensors index: it needs a mapping under 'weight_map'") from error
    if not shards or not all(isinstance(shard, str) for shard in shards):
        raise UserError(f"{index} is not a safetensors index: 'weight_map' does not name files")
    for shard in shards:
        # An index may be from an untrusted source, so that it must not name files in other folders.
        if shard != Path(shard).name or shard == ".." or not shard.isprintable() or not _is_file(index.parent / shard):
            raise UserError(f"{index} names the file {shown(shard)}, which is not beside it; download it there")
    return weight_map


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # the name is too long
        return False


def _read_sharded(index: Path) -> dict[str, Tensor]:
    weight_map = read_weight_map(index)
    weights: dict[str, Tensor] = {}
    for shard in sorted(set(weight_map.values())):
        weights.update(_read_safetensors(index.parent / shard))
    missing = weight_map.keys() - weights.keys()
    if missing:
        raise UserError(f"{index} lists {some(missing)}, which its files do not hold")
    return weights


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is not a readable safetensors file: {_first_line(error)}") from error


class _Bookkeeping:
    """Stands for DeepSpeed's objects beside the weights, whose own classes are not imported."""


def _harmless_classes() -> list[Any]:
    """Return the classes beside tensors and plain values in checkpoints of DeepSpeed and SAT.

    The classes hold arguments and RNG states, and beside the optimizer's pieces of weights the ZeRO stage, loss scales
    and places in those pieces.
    """
    from _codecs import encode

    from numpy._core.multiarray import _reconstruct

    dtypes = {type(np.dtype(code)) for code in "?bBhHiIlLqQefd"}
    # Older NumPy versions pickled the same function under the second name.
    reconstruct = [_reconstruct, (_reconstruct, "numpy.core.multiarray._reconstruct")]
    deepspeed: list[tuple[type, str]] = [(int, "deepspeed.runtime.zero.config.ZeroStageEnum")]
    scalers = [f"runtime.fp16.loss_scaler.{name}" for name in ("LossScaler", "DynamicLossScaler")]
    bookkeeping = ["utils.tensor_fragment.fragment_address", *scalers]
    deepspeed += [(_Bookkeeping, f"deepspeed.{name}") for name in bookkeeping]
    return [argparse.Namespace, np.ndarray, np.dtype, *dtypes, *reconstruct, encode, *deepspeed]


def _read_pickle(path: Path) -> Any:
    try:
        with torch.serialization.safe_globals(_harmless_classes()):
            # Files from before PyTorch 1.6 are not zip archives and cannot be mapped.
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        foreign = re.search(r"GLOBAL (\S+)", str(error))
        if foreign:
            reason = f"it needs {foreign[1]}, and code in a weight file is never run"
        else:
            reason = "it is damaged or not a PyTorch file"
        raise UserError(f"cannot read weights from {path}: {reason}") from error
    # A damaged pickle stream can fail in any of its operations.
    except (RuntimeError, OSError, EOFError, ValueError, LookupError, TypeError, AttributeError) as error:
        reason = f"it is damaged or not a PyTorch file ({_first_line(error)})"
        raise UserError(f"cannot read weights from {path}: {reason}") from error


# ---------------------------------------------------------------- modules


def assign_weights(
    module: nn.Module,
    weights: Mapping[str, Any],
    *,
    what: str,
    allow_missing: bool | Collection[str] = False,
    allow_unexpected: bool | Collection[str] = False,
    device: torch.device | str | None = None,
    convert: Callable[[Tensor, Any, torch.device | str | None], Tensor] | None = None,
) -> tuple[list[str], list[str]]:
    """Make `weights` the parameters and persistent buffers of `module`, without copies.

    `module` may be on the meta device. Each tensor is cast to the dtype of the entry that it replaces and moved to
    `device` (default: that of the entry, or of the tensor if the entry is on meta), one at a time; a tensor that needs
    no change shares its storage with `weights`. `requires_grad`, ties between parameters and attributes of parameters
    are kept. Entries without weights, and non-persistent buffers, stay as they are. Parameters become new objects, so
    build optimizers afterwards.

    Args:
        what: the source of the weights, for error messages.
        allow_missing, allow_unexpected: True for any name, or prefixes of names that may be missing from `weights` or
            unknown to `module`.
        convert: returns the replacement of an entry from that entry, its value in `weights` and `device`; `weights` may
            then hold anything that has a shape. None: as above.

    Returns:
        The missing and the unexpected names, all of them allowed.

    Raises:
        UserError: names are missing or unexpected, or shapes differ; nothing is assigned then.
    """
    slots = _slots(module)
    # By identity, since one name of a tied parameter is enough for all.
    given = {id(entries[key]) for name, (entries, key) in slots.items() if name in weights}
    missing = [name for name, (entries, key) in slots.items() if id(entries[key]) not in given]
    unexpected = [name for name in weights if name not in slots]
    misshapen = [
        f"{name} {tuple(weights[name].shape)} instead of {tuple(entries[key].shape)}"
        for name, (entries, key) in slots.items()
        if name in weights and weights[name].shape != entries[key].shape
    ]
    problems = []
    if refused := _not_allowed(missing, allow_missing):
        problems.append(f"does not hold {some(refused)}")
    if refused := _not_allowed(unexpected, allow_unexpected):
        problems.append(f"holds {some(refused)}, unknown to {type(module).__name__}")
    if misshapen:
        problems.append(f"has the shapes {some(misshapen)}")
    if problems:
        raise UserError(f"{what} does not fit {type(module).__name__}: it {'; it '.join(problems)}")

    replaced: dict[int, Tensor] = {}  # by the id of the old entry, so that tied entries stay tied
    for name, (entries, key) in slots.items():
        old = entries[key]
        if name in weights and id(old) not in replaced:
            replaced[id(old)] = (convert or as_entry)(old, weights[name], device)
    for entries, key in slots.values():
        entries[key] = replaced.get(id(entries[key]), entries[key])
    return missing, unexpected


def _slots(module: nn.Module) -> dict[str, tuple[dict[str, Tensor], str]]:
    """Return for each name in `module.state_dict()` the dict that holds it, and its key there."""
    slots = {}
    for prefix, submodule in module.named_modules(remove_duplicate=False):
        dot = prefix + "." if prefix else ""
        for key, value in submodule._parameters.items():
            if value is not None:
                slots[dot + key] = (submodule._parameters, key)
        for key, value in submodule._buffers.items():
            if value is not None and key not in submodule._non_persistent_buffers_set:
                slots[dot + key] = (submodule._buffers, key)
    return slots


def as_entry(old: Tensor, value: Tensor, device: torch.device | str | None) -> Tensor:
    """Return `value` with the dtype, kind, `requires_grad` and attributes of `old`.

    Args:
        device: of the result; None: that of `old`, or of `value` if `old` is on meta.
    """
    if device is None and not old.is_meta:
        device = old.device
    value = value.detach().to(device=device, dtype=old.dtype)
    if not isinstance(old, nn.Parameter):
        return value
    new = nn.Parameter(value, requires_grad=old.requires_grad)
    new.__dict__.update(old.__dict__)
    return new


def _not_allowed(names: Iterable[str], allowed: bool | Collection[str]) -> list[str]:
    if allowed is True:
        return []
    prefixes = () if allowed is False else tuple(allowed)
    return [name for name in names if not name.startswith(prefixes)]


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
