"""Adapters added to a network match a formula, can be removed, and follow streaming."""

import pytest
import torch

from cogvideox_sat.network.added_adapters import AddedLora, put_on
from cogvideox_sat.network.block import LowRank
from cogvideox_sat.network.layer_streaming import stream_layers
from lora_adapters import adapted_network

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    return adapted_network(tmp_path_factory.mktemp("adapted"), "t2v_5b")


def sums_of(network, rank: int, seed: int = 0, scale: float = 0.5) -> dict:
    generator, width = torch.Generator().manual_seed(seed), network.hidden_size
    parts = {"query_key_value": 3, "dense": 1}

    def matrices(count, *shape):
        return [torch.randn(*shape, generator=generator) / rank for _ in range(count)]

    return {
        (layer, name): LowRank(matrices(count, rank, width), matrices(count, width, rank), scale)
        for layer in range(network.num_layers)
        for name, count in parts.items()
    }


def merged(network, sums: dict) -> None:
    for (layer, name), (down, up, scale) in sums.items():
        weight = getattr(network.transformer.layers[layer].attention, name).weight
        for rows, a, b in zip(weight.data.chunk(len(down)), down, up, strict=True):
            rows += scale * b @ a


def test_the_sum_is_that_of_merged_weights_and_goes_off_again(adapted):
    network, other = adapted.loaded(adapted.folder / "base"), adapted.loaded(adapted.folder / "base")
    plain, sums = adapted.output(network), sums_of(network, 3)
    put_on(network, sums)
    merged(other, sums)
    expected = adapted.output(other)
    assert torch.allclose(adapted.output(network), expected, atol=1e-5) and not torch.allclose(
        plain, expected, atol=0.01
    )
    put_on(network, sums_of(network, 5, seed=1))
    assert not torch.allclose(adapted.output(network), expected, atol=0.01)
    put_on(network, {place: sums[place] for place in list(sums)[:1]})
    assert sum(isinstance(module, AddedLora) for module in network.modules()) == 1
    put_on(network, {})
    assert torch.equal(adapted.output(network), plain)
    assert not [module for module in network.modules() if isinstance(module, AddedLora)]


def test_layers_that_are_brought_bring_them(adapted):
    """Also those that are exchanged while the network streams."""
    network, other = adapted.loaded(adapted.folder / "base"), adapted.loaded(adapted.folder / "base")
    put_on(network, sums_of(network, 3))
    streamer = stream_layers(network, torch.device("cpu"))
    for sums in (sums_of(network, 3), sums_of(network, 7, seed=1), {}):
        put_on(network, sums)
        put_on(other, sums)
        assert torch.equal(adapted.output(network), adapted.output(other))
        held = {id(tensor) for tensors in streamer.layers for tensor in tensors}
        own = [p for layer in network.transformer.layers for p in layer.parameters()]
        assert {id(parameter) for parameter in own} <= held


def test_matrices_take_the_type_of_the_weights(adapted):
    network = adapted.loaded(adapted.folder / "base").to(torch.bfloat16)
    put_on(network, sums_of(network, 3))
    assert {parameter.dtype for parameter in network.transformer.layers.parameters()} == {torch.bfloat16}
    assert not any(parameter.requires_grad for name, parameter in network.named_parameters() if "matrix_" in name)
