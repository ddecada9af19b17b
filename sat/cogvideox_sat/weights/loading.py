"""Fill the network from checkpoints without a second copy."""

import logging
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from sat import mpu
from sat.mpu import ColumnParallelLinear, RowParallelLinear
from torch import Tensor, nn

from cogvideox_sat.commands.program_names import as_started
from cogvideox_sat.weights.checkpoint_files import (
    checkpoint_file,
    checkpoint_shares,
    is_adapter,
    is_diffusers_file,
    network_weights,
)
from cogvideox_sat.weights.diffusers_names import TABLES
from sgm.errors import UserError
from sgm.weights import assign_weights

logger = logging.getLogger(__name__)


def load_network(
    network: nn.Module,
    load: str | Path | None,
    *,
    lora_load: str | Path | None = None,
    allow_missing: bool = False,
    new_adapter: bool = False,
    device: torch.device | str | None = None,
) -> None:
    """Fill `network`, which may be on the meta device, from a checkpoint and optionally an adapter on top of it.

    Args:
        load: full checkpoint, with or without an adapter in it. See `checkpoint_shares`; of another number of
            model-parallel ranks, it is joined and cut anew.
        lora_load: an adapter alone, or a checkpoint whose adapter is taken.
        allow_missing: leave out what the checkpoint does not hold, with a warning; it is initialised from scratch.
            Input channels that it lacks, as text-to-video lacks those of image-to-video, start without influence.
        new_adapter: initialise the adapter where neither file holds one, for training.
        device: where the weights go.

    Raises:
        UserError: a file is missing or unreadable, or its names or shapes do not fit.
    """
    rank, size = mpu.get_model_parallel_rank(), mpu.get_model_parallel_world_size()
    is_lora = "lora" in network.mixins
    if lora_load and not is_lora:
        raise UserError("lora_load is given, but the configuration has no lora_config: use its '_lora' twin")
    if is_lora and size > 1:
        raise UserError("lora_config does not work with model_parallel_size > 1: merge the adapter first")

    weights: dict[str, Tensor] = {}
    sources: list[str] = []
    if load:
        files = checkpoint_shares(load)
        is_cut = size > 1 and len(files) == size
        files = [files[rank]] if is_cut else files
        parts = [network_weights(file) for file in files]
        weights |= own_tables(network) if is_diffusers_file(files[0]) else {}
        weights |= joined_shares(network, parts, str(files[0].parent)) if len(parts) > 1 else parts[0]
        sources.append(str(files[0] if len(files) == 1 else files[0].parent))
        if size > 1 and not is_cut:
            weights = shares_of_rank(network, weights, rank, size)
    if lora_load:
        file = checkpoint_file(lora_load)
        adapter = {name: tensor for name, tensor in network_weights(file).items() if is_adapter(name)}
        if not adapter:
            tool = as_started("tools/import_hf_lora.py")
            raise UserError(
                f"lora_load: {file} holds no adapter (no matrix_A, matrix_B); one for diffusers becomes such by {tool}"
            )
        weights |= adapter
        sources.append(str(file))
    if is_lora:
        weights = rename_for_lora(network, weights)
        if any(map(is_adapter, weights)):
            new_adapter = False
        elif not (allow_missing or new_adapter):
            raise UserError(f"{load} holds no adapter, but the configuration has a lora_config: give lora_load")
    elif any(map(is_adapter, weights)):
        raise UserError(f"{load} holds a LoRA adapter: use the '_lora' twin of the configuration")
    may_miss: bool | list[str] = allow_missing
    if allow_missing:
        widen_inputs(network, weights)
    if new_adapter and not allow_missing:
        may_miss = [name for name in network.state_dict() if is_adapter(name)]
    missing, _ = assign_weights(
        network, weights, what=" and ".join(sources) or "nothing", allow_missing=may_miss, device=device
    )
    if unforeseen := [name for name in missing if not (new_adapter and is_adapter(name))]:
        logger.warning(
            "%s lack %d of the network's tensors, which keep their initial values: %s%s",
            " and ".join(sources) or "no checkpoint given: files",
            len(unforeseen),
            ", ".join(unforeseen[:3]),
            ", ..." if len(unforeseen) > 3 else "",
        )
    if missing:
        initialise_missing(network, device)
        network.to(device)  # tables that were never on the meta device


def widen_inputs(network: nn.Module, weights: dict[str, Tensor]) -> None:
    """Give `weights`, if they are of a network with fewer input channels, zeros for the others, which come last."""
    name = "mixins.patch_embed.proj.weight"
    if name not in weights or "patch_embed" not in network.mixins:
        return
    given, wanted = weights[name], network.mixins["patch_embed"].proj.weight.shape
    # Features are ordered with channels outermost, so that further channels are further columns of a Linear too.
    if given.ndim == len(wanted) and given.shape[1] < wanted[1]:
        logger.warning("%s: the input channels that the checkpoint lacks start at zero", name)
        further = given.new_zeros(given.shape[0], wanted[1] - given.shape[1], *given.shape[2:])
        weights[name] = torch.cat((given, further), dim=1)


def own_tables(network: nn.Module) -> dict[str, Tensor]:
    """The tables of positions as the network makes them, zeros for what it does not use."""
    state = network.state_dict()
    tables = {name: state[name] for name in TABLES if name in state}
    return {name: torch.zeros(t.shape, dtype=t.dtype) if t.is_meta else t for name, t in tables.items()}


def rename_for_lora(network: nn.Module, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names of a checkpoint made without LoRA, for a network with it: `….weight` becomes `….original.weight`."""
    wrapped = {name for name, module in network.named_modules() if hasattr(module, "matrix_A")}

    def rename(name: str) -> str:
        layer, _, tensor = name.rpartition(".")
        return f"{layer}.original.{tensor}" if layer in wrapped else name

    return {rename(name): tensor for name, tensor in weights.items()}


def shares_of_rank(network: nn.Module, weights: dict[str, Tensor], rank: int, size: int) -> dict[str, Tensor]:
    """This rank's slices of the full weights.

    Column-parallel layers are cut along output features, each of their `stride` parts apart, so that every rank gets
    whole heads of q, k and v; row-parallel layers along input features.
    """
    shares = dict(weights)
    for prefix, module in network.named_modules():
        weight, bias = f"{prefix}.weight", f"{prefix}.bias"
        if isinstance(module, ColumnParallelLinear):
            for name in (weight, bias):
                if name in shares:
                    parts = shares[name].chunk(module.stride)
                    shares[name] = torch.cat([part.chunk(size)[rank] for part in parts])
        elif isinstance(module, RowParallelLinear) and weight in shares:
            shares[weight] = shares[weight].chunk(size, dim=1)[rank].contiguous()
    return shares


def joined_shares(network: nn.Module, shares: Sequence[dict[str, Tensor]], what: str) -> dict[str, Tensor]:
    """The full weights of the shares of all model-parallel ranks: what undoes `shares_of_rank`.

    Args:
        what: they are of, for errors.

    Raises:
        UserError: the shares do not hold the same tensors.
    """
    if any(share.keys() != shares[0].keys() for share in shares):
        raise UserError(f"load: {what}: the files of its model-parallel ranks do not hold the same tensors")
    whole = dict(shares[0])
    for prefix, module in network.named_modules():
        prefix = prefix.removesuffix(".original")  # as a layer with an adapter has it, and a checkpoint need not
        for name in (f"{prefix}.weight", f"{prefix}.bias", f"{prefix}.original.weight", f"{prefix}.original.bias"):
            if name not in whole:
                continue
            parts = [share[name] for share in shares]
            if isinstance(module, ColumnParallelLinear):
                by_rank = [part.chunk(module.stride) for part in parts]
                whole[name] = torch.cat([part for same in zip(*by_rank, strict=True) for part in same])
            elif isinstance(module, RowParallelLinear) and name.endswith(".weight"):
                whole[name] = torch.cat(parts, dim=1)
    return whole


def initialise_missing(network: nn.Module, device: torch.device | str | None) -> None:
    """Give tensors that are still on the meta device the values a new network or a new adapter starts from."""
    for prefix, module in network.named_modules():
        for entries in (module._parameters, module._buffers):
            for name, old in entries.items():
                if old is None or not old.is_meta:
                    continue
                new = torch.zeros(old.shape, dtype=old.dtype, device=device or "cpu")
                if prefix.endswith("matrix_A"):
                    nn.init.kaiming_uniform_(new, a=math.sqrt(5))
                elif isinstance(module, nn.LayerNorm) and name == "weight":
                    new.fill_(1.0)
                elif new.ndim >= 2 and not prefix.endswith("matrix_B"):
                    new.normal_(std=0.02)
                entries[name] = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
