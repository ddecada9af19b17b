"""A network whose layers are fetched one by one computes what it does when all are in place."""

import pytest
import torch

from cogvideox_sat.network.layer_streaming import layer_modules, stream_layers, tensors_of
from seeded import seed_module_, seeded_input
from sgm.util import instantiate_from_config
from support import Reference

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["t2v_5b", "t2v_2b_lora", "t2v_2b_wide"])  # with an adapter; an odd number of layers
@torch.no_grad()
def test_streamed_output_is_the_same(name, device):
    network = seed_module_(instantiate_from_config(Reference(f"dit/{name}").case["network_config"]))
    arguments = [
        tensor.to(device)
        for tensor in (seeded_input("x", (1, 2, 16, 6, 10)), torch.tensor([5]), seeded_input("c", (1, 16, 64)))
    ]
    expected = network.to(device)(*arguments)
    network.cpu()
    stream_layers(network, torch.device(device))
    for _ in range(2):
        assert torch.equal(network(*arguments), expected)


@torch.no_grad()
def test_at_most_two_layers_are_on_the_device():
    """On the CPU a fetched layer is a copy; outside its turn a layer's weights are those in host memory."""
    network = seed_module_(instantiate_from_config(Reference("dit/t2v_2b_wide").case["network_config"]))
    streamer = stream_layers(network, torch.device("cpu"))

    def in_place() -> list[bool]:
        return [
            all(tensor.data_ptr() == data.data_ptr() for tensor, data in zip(tensors, host, strict=True))
            for tensors, host in zip(streamer.layers, streamer.host, strict=True)
        ]

    assert all(in_place())
    for index in range(network.num_layers):
        with streamer.on_device(index):
            assert in_place() == [other != index for other in range(network.num_layers)]
            assert (streamer.current.layer, streamer.next.layer) == (index, (index + 1) % network.num_layers)
    assert all(in_place())
    count = sum(len(tensors_of(module)) for modules in layer_modules(network) for module in modules)
    assert count == sum(map(len, streamer.layers)) > 0
