"""Put adapters on a network that has its weights, several at once and unmerged, and take them off again."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import Tensor, nn

from cogvideox_sat.network.fused_lora import FusedLoraLinear
from cogvideox_sat.network.layer_streaming import LayerStreamer, layer_modules

MODULES = ("query_key_value", "dense")  # of a layer's attention
Place = tuple[int, str]
"""A layer, and one of `MODULES`."""


class LowRankSum(NamedTuple):
    """What is added to a product x·Wᵀ: scale·x·Aᵢᵀ·Bᵢᵀ to the i-th of equal parts of the features.

    Args:
        down, up: the Aᵢ (rank, in) and Bᵢ (out, rank), those of several adapters side by side along the rank.
    """

    down: Sequence[Tensor]
    up: Sequence[Tensor]
    scale: float


def put_on(network: nn.Module, sums: Mapping[Place, LowRankSum]) -> None:
    """Let layers of a `DiffusionTransformer` add these sums, and no others that were put on before.

    Matrices take the device and the type of the weights that they are put beside.
    """
    for index, layer in enumerate(network.transformer.layers):
        for name in MODULES:
            module = getattr(layer.attention, name)
            if isinstance(module, AddedLora):
                module = module.original
            if (added := sums.get((index, name))) is not None:
                module = AddedLora.beside(module, added.down, added.up, added.scale)
            setattr(layer.attention, name, module)
    for around in network.layer_runner.around:
        if isinstance(around, LayerStreamer):  # which brings the weights of layers, these too
            around.renew(layer_modules(network))


class AddedLora(FusedLoraLinear):
    """A `FusedLoraLinear` that was put on by `put_on`."""
