"""Apply adapters to a loaded network, several at once and unmerged, and remove them."""

from collections.abc import Mapping

from torch import nn

from cogvideox_sat.network.block import LowRank
from cogvideox_sat.network.fused_lora import FusedLoraLinear
from cogvideox_sat.network.layer_streaming import LayerStreamer, layer_modules

MODULES = ("query_key_value", "dense")  # of a layer's attention
Place = tuple[int, str]
"""The index of a layer, and one of `MODULES`."""


def put_on(network: nn.Module, sums: Mapping[Place, LowRank]) -> None:
    """Let the layers of a `DiffusionTransformer` add these sums, and no earlier ones.

    The matrices take the device and dtype of the weights beside them.
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
        if isinstance(around, LayerStreamer):  # it copies the weights of layers, including the added ones
            around.renew(layer_modules(network))


class AddedLora(FusedLoraLinear):
    """A `FusedLoraLinear` that `put_on` created."""
