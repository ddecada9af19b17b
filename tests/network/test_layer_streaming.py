"""A network whose layers are fetched one by one computes the same."""

import pytest
import torch

from cogvideox_sat.network.layer_streaming import layer_modules, stream_blocks, stream_layers, tensors_of
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
    """A fetched layer is a copy on the CPU; other layers' weights are in host memory."""
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


@torch.no_grad()
def test_blocks_come_by_their_hooks_and_go_back_after_an_error():
    torch.manual_seed(0)
    blocks = [torch.nn.Linear(8, 8) for _ in range(3)]
    module = torch.nn.Sequential(torch.nn.Embedding(5, 8), *blocks)
    tokens = torch.tensor([[1, 3]])
    expected = module(tokens)
    streamer = stream_blocks(module, blocks, torch.device("cpu"))
    here = []
    for block in blocks:
        block.register_forward_pre_hook(lambda block, *_: here.append(block.weight.data_ptr()))
    host = [data[0].data_ptr() for data in streamer.host]
    for _ in range(2):
        assert torch.equal(module(tokens), expected)
    assert set(here) == {slot.buffers[0].data_ptr() for slot in (streamer.current, streamer.next)}
    assert not set(here) & set(host)
    with pytest.raises(RuntimeError):
        module[1](torch.zeros(1, 7))
    assert [block.weight.data_ptr() for block in blocks] == host


@pytest.mark.slow
@torch.no_grad()
def test_a_text_encoder_whose_blocks_come_one_by_one(tiny):
    """To the bit, with two of its blocks on the device at most."""
    from cogvideox_sat.configuration.files import load_configs
    from cogvideox_sat.configuration.settings import EngineSettings
    from cogvideox_sat.sampling.part_offloading import PartOffloader
    from diffusion_video import SATVideoDiffusionEngine

    config = load_configs([tiny.config("5b")])["model"]
    found = []
    for offload in ("none", "sequential"):
        engine = SATVideoDiffusionEngine(EngineSettings(config), parts=())
        PartOffloader(engine, offload).use("conditioner")
        texts = [engine.conditioner({"txt": [text]}, drop=False)["crossattn"] for text in ("a fox", "", "a fox")]
        found.append(torch.stack(texts))
    assert torch.equal(found[0], found[1]) and found[0].abs().sum() > 0
    (encoder,) = [module for module in engine.conditioner.modules() if hasattr(module, "blocks")]
    waiting = {tensor.data_ptr() for block in encoder.blocks for tensor in tensors_of(block)}
    elsewhere = {tensor.data_ptr() for tensor in tensors_of(encoder)} - waiting
    assert len(waiting) > len(encoder.blocks) > 1 and elsewhere
    assert all(block._forward_pre_hooks for block in encoder.blocks)
