"""Load checkpoints into the network without making a second copy."""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from sat import mpu
from torch import Tensor, nn

from cogvideox_sat.commands.program_names import as_started
from cogvideox_sat.weights.checkpoint_files import (
    checkpoint_shares,
    is_adapter,
    is_diffusers_file,
    network_values,
)
from cogvideox_sat.weights.diffusers_names import TABLES
from cogvideox_sat.weights.rank_shares import Cuts, cuts_of, plain, recut
from cogvideox_sat.weights.stored_values import StoredValue, waiting
from sgm.errors import UserError
from sgm.weights import as_entry, assign_weights

logger = logging.getLogger(__name__)


def load_network(
    network: nn.Module,
    load: str | Path | None,
    *,
    lora_load: str | Path | None = None,
    allow_missing: bool = False,
    new_adapter: bool = False,
    device: torch.device | str | None = None,
    in_shares: bool = False,
) -> None:
    """Fill `network` from a checkpoint, and optionally from an adapter on top of it.

    Args:
        network: may be on the meta device.
        load: a full checkpoint, with or without an adapter in it; see `checkpoint_shares`. A checkpoint of another
            number of model-parallel ranks is joined and divided again.
        lora_load: an adapter alone, or a checkpoint whose adapter is used.
        allow_missing: initialise tensors that the checkpoint lacks, with a warning. Missing input channels, such as
            those of image-to-video in a text-to-video checkpoint, start with zero weights.
        new_adapter: initialise the adapter if neither file holds one, for training.
        device: the device for the weights.
        in_shares: let parameters wait for their values, which stay in the files; see `weights.stored_values`.

    Raises:
        UserError: a file is missing or unreadable, or its names or shapes do not fit.
    """
    is_lora = "lora" in network.mixins
    if lora_load and not is_lora:
        raise UserError("lora_load is given, but the configuration has no lora_config; use its '_lora' variant")
    cuts = cuts_of(network)
    weights, sources = read_weights(network, cuts, load, lora_load)
    has_adapter = any(map(is_adapter, weights))
    if has_adapter and not is_lora:
        raise UserError(f"load: {load} holds a LoRA adapter; use the '_lora' variant of the configuration")
    if is_lora and not (has_adapter or allow_missing or new_adapter):
        if not load:
            raise UserError("lora_load: missing; name the adapter of the configuration's lora_config")
        raise UserError(f"load: {load} holds no adapter, but the configuration has a lora_config; give lora_load")
    if is_lora:
        weights = rename_for_lora(network, weights)
    starts_adapter = new_adapter and not has_adapter
    may_miss: bool | list[str] = allow_missing
    if allow_missing:
        widen_inputs(network, weights)
    elif starts_adapter:
        may_miss = [name for name in network.state_dict() if is_adapter(name)]
    missing, _ = assign_weights(
        network,
        weights,
        what=" and ".join(sources) or "nothing",
        allow_missing=may_miss,
        device=device,
        convert=entry_in_shares if in_shares else whole_entry,
    )
    warn_of_missing([name for name in missing if not (starts_adapter and is_adapter(name))], sources)
    if missing:
        initialise_missing(network, device, cuts)
        network.to(device)  # for tables that were never on the meta device


def read_weights(
    network: nn.Module, cuts: Cuts, load: str | Path | None, lora_load: str | Path | None
) -> tuple[dict[str, StoredValue], list[str]]:
    """Return this rank's share of a checkpoint and of an adapter on it, and their names.

    Raises:
        UserError: a file is missing or unreadable, or `lora_load` holds no adapter.
    """
    weights: dict[str, StoredValue] = {}
    sources: list[str] = []
    if load:
        weights, source = read_share(network, cuts, load)
        sources.append(source)
    if lora_load:
        adapter, source = read_share(network, cuts, lora_load, keep=is_adapter)
        if not any(map(is_adapter, adapter)):
            tool = as_started("tools/import_hf_lora.py")
            raise UserError(
                f"lora_load: {source} holds no adapter (no matrix_A, matrix_B); convert an adapter of diffusers with "
                f"{tool}"
            )
        weights |= adapter
        sources.append(source)
    return weights, sources


def read_share(
    network: nn.Module, cuts: Cuts, path: str | Path, keep: Callable[[str], bool] = lambda _: True
) -> tuple[dict[str, StoredValue], str]:
    """Return this rank's share of the kept tensors of a checkpoint, and the checkpoint's name.

    Tensors stay in their files, unless another number of ranks wrote them. Files of diffusers get the network's own
    tables of positions.

    Raises:
        UserError: a file is missing or unreadable.
    """
    rank, size = mpu.get_model_parallel_rank(), mpu.get_model_parallel_world_size()
    files = checkpoint_shares(path)
    is_own = len(files) == size
    files = [files[rank]] if is_own else files
    source = str(files[0] if len(files) == 1 else files[0].parent)
    shares = [{name: value for name, value in network_values(file).items() if keep(name)} for file in files]
    tables = as_stored(own_tables(network)) if is_diffusers_file(files[0]) else {}
    if is_own:
        return tables | shares[0], source
    whole = [{name: value.tensor() for name, value in share.items()} for share in shares]
    return tables | as_stored(recut(whole, cuts, rank, size, source)), source


def warn_of_missing(names: Sequence[str], sources: Sequence[str]) -> None:
    """Warn of tensors that no file holds, if there are any."""
    if names:
        logger.warning(
            "%s lack %d of the network's tensors, which keep their initial values: %s%s",
            " and ".join(sources) or "no checkpoint given: files",
            len(names),
            ", ".join(names[:3]),
            ", ..." if len(names) > 3 else "",
        )


def as_stored(weights: Mapping[str, Tensor]) -> dict[str, StoredValue]:
    """Return the tensors as stored values."""
    return {name: StoredValue([tensor]) for name, tensor in weights.items()}


def whole_entry(old: Tensor, value: StoredValue, device: torch.device | str | None) -> Tensor:
    """Return a parameter or buffer with its value."""
    return as_entry(old, value.tensor(), device)


def entry_in_shares(old: Tensor, value: StoredValue, device: torch.device | str | None) -> Tensor:
    """Return a parameter that waits for its value; a buffer gets its value at once."""
    return waiting(old, value, device) if isinstance(old, nn.Parameter) else whole_entry(old, value, device)


def widen_inputs(network: nn.Module, weights: dict[str, StoredValue]) -> None:
    """Add zeros to `weights` for input channels that only the network has.

    The additional channels come last.
    """
    name = "mixins.patch_embed.proj.weight"
    if name not in weights or "patch_embed" not in network.mixins:
        return
    given, wanted = weights[name].tensor(), network.mixins["patch_embed"].proj.weight.shape
    # Features are ordered with channels outermost, so that additional channels are additional columns of a Linear too.
    if given.ndim == len(wanted) and given.shape[1] < wanted[1]:
        logger.warning("%s: the input channels that the checkpoint lacks start at zero", name)
        further = given.new_zeros(given.shape[0], wanted[1] - given.shape[1], *given.shape[2:])
        weights[name] = StoredValue([torch.cat((given, further), dim=1)])


def own_tables(network: nn.Module) -> dict[str, Tensor]:
    """Return the position tables of the network, with zeros for those that it does not use."""
    state = network.state_dict()
    tables = {name: state[name] for name in TABLES if name in state}
    return {name: torch.zeros(t.shape, dtype=t.dtype) if t.is_meta else t for name, t in tables.items()}


def rename_for_lora(network: nn.Module, weights: dict[str, StoredValue]) -> dict[str, StoredValue]:
    """Return weights without LoRA under the names of a network with LoRA.

    `….weight` becomes `….original.weight`.
    """
    wrapped = {name for name, module in network.named_modules() if hasattr(module, "matrix_A")}

    def rename(name: str) -> str:
        layer, _, tensor = name.rpartition(".")
        return f"{layer}.original.{tensor}" if layer in wrapped else name

    return {rename(name): tensor for name, tensor in weights.items()}


def initialise_missing(network: nn.Module, device: torch.device | str | None, cuts: Cuts) -> None:
    """Initialise tensors that are still on the meta device, as in a new network or adapter.

    For tensors that model-parallel ranks share, each rank draws the whole tensor and takes its part, so that the values
    are the same as with one process.
    """
    rank, size = mpu.get_model_parallel_rank(), mpu.get_model_parallel_world_size()
    for prefix, module in network.named_modules():
        for entries in (module._parameters, module._buffers):
            for name, old in entries.items():
                if old is None or not old.is_meta:
                    continue
                cut = cuts.get(plain(f"{prefix}.{name}")) if size > 1 else None
                shape = old.shape if cut is None else cut.whole_shape(old.shape, size)
                new = torch.zeros(shape, dtype=old.dtype, device=device or "cpu")
                if prefix.endswith("matrix_A"):
                    nn.init.kaiming_uniform_(new, a=math.sqrt(5))
                elif isinstance(module, nn.LayerNorm) and name == "weight":
                    new.fill_(1.0)
                elif new.ndim >= 2 and not prefix.endswith("matrix_B"):
                    new.normal_(std=0.02)
                if cut is not None:
                    new = cut.share(new, rank, size)
                if isinstance(old, nn.Parameter):
                    new = nn.Parameter(new, old.requires_grad)
                    new.__dict__.update(vars(old))  # includes whether ranks share the parameter
                entries[name] = new
