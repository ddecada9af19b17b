"""The adapters of a session: read from files, and added up layer by layer."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cogvideox_sat.conversion.lora_files import read_adapter
from cogvideox_sat.conversion.lora_matrices import Adapter
from cogvideox_sat.conversion.lora_names import PROJECTIONS_OF, MatrixKey, Projection
from cogvideox_sat.network.added_adapters import Place
from cogvideox_sat.network.block import LowRank
from sgm.errors import UserError

Chosen = Sequence[tuple[Adapter, float]]
"""Adapters with their strengths."""


def read_adapters(paths: Iterable[tuple[str | Path, float]], model_config: Mapping[str, Any]) -> Chosen:
    """Return adapters with their strengths.

    Args:
        paths: paths of checkpoints that contain adapters, or of LoRA files or folders in the format of diffusers.

    Raises:
        UserError: an adapter cannot be read, or does not fit the configured network.
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
    """Return an adapter that fits the configured network, else raise UserError."""
    params = model_config["network_config"]["params"]
    width, layers = params.get("hidden_size"), params.get("num_layers")
    if adapter.width != width:
        raise UserError(f"lora: {adapter.source} is for a network of width {adapter.width}, but this one has {width}")
    if adapter.layers[-1] >= layers:
        raise UserError(
            f"lora: {adapter.source} adapts layer {adapter.layers[-1]}, but this network has layers 0 to {layers - 1}"
        )
    return adapter


def added_up(chosen: Chosen) -> dict[Place, LowRank]:
    """Return the sum of the adapters for each module of each layer.

    Adapters with a strength of 0 are left out. The matrices of a single adapter are kept as they are. Those of several
    adapters are concatenated along the rank; differences in strength are multiplied into B, in float32 until the sum is
    applied to a network's weights.
    """
    present = [(adapter, strength) for adapter, strength in chosen if strength]
    sums: dict[Place, LowRank] = {}
    for layer in sorted({layer for adapter, _ in present for layer in adapter.layers}):
        here = [(adapter, strength) for adapter, strength in present if layer in adapter.layers]
        for module, parts in PROJECTIONS_OF.items():
            projections = [Projection(layer, part) for part in parts]
            first, strength = here[0]
            scale = strength * first.scales[projections[0]]
            down, up = zip(*(_side_by_side(here, projection, scale) for projection in projections), strict=True)
            sums[layer, module] = LowRank(down, up, scale)
    return sums


def _side_by_side(chosen: Chosen, projection: Projection, scale: float) -> tuple[Tensor, Tensor]:
    """Return A (Σ rank, in) and B (out, Σ rank) of several adapters for one projection.

    Their product has to be multiplied by `scale`. Matrices of several adapters are float32.
    """
    downs, ups = [], []
    for adapter, strength in chosen:
        factor = strength * adapter.scales[projection] / scale
        up = adapter.matrices[MatrixKey(projection, "B")]
        downs.append(adapter.matrices[MatrixKey(projection, "A")])
        ups.append(up if factor == 1 else up.float() * factor)
    if len(downs) == 1:
        return downs[0], ups[0]
    return torch.cat([down.float() for down in downs]), torch.cat([up.float() for up in ups], dim=1)


def adapter_bytes(chosen: Chosen) -> int:
    """Return the bytes of the adapters' matrices."""
    return sum(matrix.nbytes for adapter, _ in chosen for matrix in adapter.matrices.values())
