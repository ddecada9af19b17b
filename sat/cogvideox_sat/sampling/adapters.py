"""The adapters of a session: read from files of any kind, and added up layer by layer, each with its strength."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cogvideox_sat.conversion.lora_files import Adapter, read_adapter
from cogvideox_sat.conversion.lora_names import PARTS, Projection, Slot
from cogvideox_sat.network.added_adapters import LowRankSum, Place
from sgm.errors import UserError

Chosen = Sequence[tuple[Adapter, float]]
"""Adapters, each with its strength."""


def read_adapters(paths: Iterable[tuple[str | Path, float]], model_config: Mapping[str, Any]) -> Chosen:
    """Return adapters with their strengths.

    Args:
        paths: of checkpoints with adapters in them, or LoRA files or folders of diffusers.

    Raises:
        UserError: one cannot be read, or is not of a network such as the configuration describes.
    """
    chosen = []
    for path, strength in paths:
        try:
            adapter = read_adapter(path)
        except UserError as error:
            raise UserError(f"lora: {error}") from error
        chosen.append((fitting(adapter, model_config), strength))
    return chosen


def fitting(adapter: Adapter, model_config: Mapping[str, Any]) -> Adapter:
    """Return an adapter; raises UserError unless it fits the network that a configuration describes."""
    params = model_config["network_config"]["params"]
    width, layers = params.get("hidden_size"), params.get("num_layers")
    if adapter.width != width:
        raise UserError(f"lora: {adapter.source} is of a network of width {adapter.width}, this one has {width}")
    if adapter.layers[-1] >= layers:
        raise UserError(
            f"lora: {adapter.source} adapts layer {adapter.layers[-1]}, this network has layers 0 to {layers - 1}"
        )
    return adapter


def added_up(chosen: Chosen) -> dict[Place, LowRankSum]:
    """Return what adapters add together to each module of each layer; nothing for a strength of 0.

    One alone keeps its matrices as they are. Those of several stand side by side along the rank, and what their
    strengths differ by is in their B, in float32 until they meet a network's weights.
    """
    present = [(adapter, strength) for adapter, strength in chosen if strength]
    sums: dict[Place, LowRankSum] = {}
    for layer in sorted({layer for adapter, _ in present for layer in adapter.layers}):
        here = [(adapter, strength) for adapter, strength in present if layer in adapter.layers]
        for module, parts in PARTS.items():
            projections = [Projection(layer, part) for part in parts]
            first, strength = here[0]
            scale = strength * first.scales[projections[0]]
            down, up = zip(*(_side_by_side(here, projection, scale) for projection in projections), strict=True)
            sums[layer, module] = LowRankSum(down, up, scale)
    return sums


def _side_by_side(chosen: Chosen, projection: Projection, scale: float) -> tuple[Tensor, Tensor]:
    """Return A (Σ rank, in) and B (out, Σ rank) of several adapters for one projection, to be multiplied by `scale`."""
    downs, ups = [], []
    for adapter, strength in chosen:
        factor = strength * adapter.scales[projection] / scale
        up = adapter.matrices[Slot(projection, "B")]
        downs.append(adapter.matrices[Slot(projection, "A")])
        ups.append(up if factor == 1 else up.float() * factor)
    if len(downs) == 1:
        return downs[0], ups[0]
    return torch.cat([down.float() for down in downs]), torch.cat([up.float() for up in ups], dim=1)


def adapter_bytes(chosen: Chosen) -> int:
    """Return what the matrices of adapters take."""
    return sum(matrix.nbytes for adapter, _ in chosen for matrix in adapter.matrices.values())
