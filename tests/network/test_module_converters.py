"""Modules are exchanged before weights are loaded, and names stay."""

import pytest
import torch
from torch import nn

from cogvideox_sat.configuration.meta_device import instantiate_on_meta
from cogvideox_sat.network.module_converters import convert_modules
from cogvideox_sat.weights.loading import load_network
from dit_video_concat import DiffusionTransformer
from lora_adapters import adapted_network, with_lora
from sgm.util import instantiate_from_config
from support import Reference

pytestmark = pytest.mark.usefixtures("one_thread")


class Wrapped(nn.Module):
    """Stands for another module, whose names it keeps."""

    def __init__(self, inner: nn.Module, mark: str):
        super().__init__()
        self.mark, self.children_then = mark, [type(child).__name__ for child in inner.children()]
        for name, child in inner.named_children():
            self.add_module(name, child)
        for name, parameter in inner.named_parameters(recurse=False):
            self.register_parameter(name, parameter)


def wrapping(kind: type, mark: str):
    return lambda module: Wrapped(module, mark) if isinstance(module, kind) else module


def test_modules_inside_of_others_come_first_and_converters_in_their_order():
    network = nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.SiLU()), nn.Linear(2, 3))
    names = list(network.state_dict())
    convert_modules(network, [wrapping(nn.Linear | nn.Sequential, "first"), wrapping(Wrapped, "second")])
    assert type(network) is nn.Sequential  # the network itself stays
    assert list(network.state_dict()) == names
    assert isinstance(network[0], Wrapped) and isinstance(network[0].get_submodule("0"), Wrapped)
    assert network[0].children_then == ["Wrapped", "SiLU"]
    assert {module.mark for module in network.modules() if isinstance(module, Wrapped)} == {"second"}


def test_a_module_in_two_places_is_exchanged_in_both():
    shared = nn.Linear(2, 2)
    network, seen = nn.ModuleDict({"a": nn.Sequential(shared), "b": shared}), []

    def convert(module: nn.Module) -> nn.Module:
        seen.append(module)
        return Wrapped(module, "") if isinstance(module, nn.Linear) else module

    convert_modules(network, [convert])
    assert isinstance(network["b"], Wrapped) and network["a"][0] is network["b"]
    assert seen.count(shared) == 1


def test_nothing_to_do():
    network = nn.Sequential(nn.Linear(2, 2))
    before = list(network.modules())
    convert_modules(network, [])
    convert_modules(network, [lambda module: module])
    assert list(network.modules()) == before


# ---------------------------------------------------------------- the network


@pytest.mark.parametrize("build", [instantiate_from_config, instantiate_on_meta])
def test_adapters_are_fused_when_a_network_is_built(build):
    from sat.model.finetune.lora2 import LoraLinear

    config = Reference("dit/t2v_2b").case["network_config"]
    network = build(with_lora(config, rank=4, alpha=2.0))
    adapters = [module for module in network.modules() if isinstance(module, LoraLinear)]
    assert len(adapters) == 2 * network.num_layers
    assert {type(module).__name__ for module in adapters} == {"FusedLoraLinear"}
    assert not any("forward" in vars(module) for module in network.modules())
    assert not any(isinstance(module, LoraLinear) for module in build(config).modules())


class Halved(nn.Module):
    """A linear layer with a weight of half the bytes, whose values are in the checkpoint."""

    def __init__(self, layer: nn.Linear):
        super().__init__()
        self.weight = nn.Parameter(torch.empty_like(layer.weight, dtype=torch.bfloat16), requires_grad=False)
        self.bias = layer.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype), self.bias)


def halve(module: nn.Module) -> nn.Module:
    """Return the large ones: those of the modulation."""
    return Halved(module) if isinstance(module, nn.Linear) and module.out_features == 12 * 64 else module


class HalvedTransformer(DiffusionTransformer):
    def converters(self):
        yield from super().converters()
        yield halve


def test_a_converter_of_one_s_own_goes_between_building_and_loading(tmp_path):
    adapted = adapted_network(tmp_path, "t2v_2b")
    config = {**adapted.config, "target": f"{__name__}.HalvedTransformer"}
    network = instantiate_on_meta(config)
    halved = [name for name, module in network.named_modules() if isinstance(module, Halved)]
    assert halved and all(network.get_submodule(name).weight.is_meta for name in halved)
    assert {type(m).__name__ for m in network.modules() if hasattr(m, "matrix_A")} == {"FusedLoraLinear"}
    assert list(network.state_dict()) == list(adapted.network.state_dict())
    load_network(network, tmp_path / "full")
    expected, output = adapted.output(), adapted.output(network.eval())
    assert all(network.get_submodule(name).weight.dtype == torch.bfloat16 for name in halved)
    assert 0 < (output - expected).norm() < 0.02 * expected.norm()
