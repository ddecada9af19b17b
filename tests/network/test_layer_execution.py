"""The network runs fused attention without a mask, without host reads, as one graph."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses import FakeTensorMode
from torch.profiler import ProfilerActivity, profile

from cogvideox_sat.configuration.meta_device import instantiate_on_meta
from cogvideox_sat.network.layer_execution import OWN_MIXINS
from reference_networks import FAMILIES, network_and_inputs
from sgm.attention_kernels import KERNELS, WRITTEN_OUT, written_out_attention
from sgm.modules.diffusionmodules.wrappers import OpenAIWrapper
from sgm.util import instantiate_from_config
from support import Reference, needs_compiler


@torch.no_grad()
def test_attention_takes_the_fused_kernel():
    network, inputs = network_and_inputs("t2v_5b")
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        network(**inputs)
    calls = {event.key: event.count for event in profiler.key_averages()}
    fused = "aten::_scaled_dot_product_flash_attention_for_cpu"
    assert calls[fused] == network.num_layers
    assert "aten::_scaled_dot_product_attention_math" not in calls and "aten::softmax" not in calls


def test_written_out_attention_is_attention():
    """Output and gradients equal the fused kernel's, to float32's precision."""
    torch.manual_seed(0)
    tensors = [torch.randn(2, 3, 17, 8, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    weight = torch.randn(2, 3, 17, 8, dtype=torch.float64)
    results = []
    for attention in (written_out_attention, F.scaled_dot_product_attention):
        output = attention(*tensors)
        results.append((output, *torch.autograd.grad((output * weight).sum(), tensors)))
    for written_out, fused in zip(*results, strict=True):
        torch.testing.assert_close(written_out, fused, rtol=1e-5, atol=1e-6)


def test_attention_is_written_out_where_that_is_faster():
    """It is used in bfloat16 on a CPU, with gradients, if the attention weights fit.

    "As good": no further than the kernel's own bfloat16 gradients, give or take half, from those in float32.
    """
    short, long = (torch.empty(1, 1, n, 8, dtype=torch.bfloat16, device="cpu") for n in (5792, 5793))
    network, inputs = network_and_inputs("t2v_5b")

    def is_written_out(v: torch.Tensor) -> bool:
        return network.training_attention.supports(v, v, v)

    assert is_written_out(short) and not is_written_out(long)
    assert not is_written_out(short.float()) and not is_written_out(short.to("meta"))

    network.train()

    def gradients(dtype: torch.dtype) -> list[torch.Tensor]:
        network.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            output = network(**inputs)
        output.float().square().mean().backward()
        return [p.grad.clone() for p in network.parameters() if p.grad is not None]

    def distance(a: list[torch.Tensor], b: list[torch.Tensor]) -> float:
        return sum((x - y).square().sum().item() for x, y in zip(a, b, strict=True)) ** 0.5

    calls = []
    counting = replace(WRITTEN_OUT, compute=lambda *qkv: calls.append(1) or written_out_attention(*qkv))
    network.training_attention = counting
    exact = gradients(torch.float32)
    assert not calls
    written_out = gradients(torch.bfloat16)
    assert len(calls) == network.num_layers
    network.training_attention = KERNELS["softmax"]
    fused = gradients(torch.bfloat16)
    assert len(calls) == network.num_layers
    assert 0 < distance(written_out, exact) < 1.5 * distance(fused, exact)


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_nothing_is_read_back_to_the_host(name):
    """Tensors without values: reading one, or branching on one, raises."""
    network, inputs = network_and_inputs(name)
    with FakeTensorMode(allow_non_fake_inputs=True):
        network.to("cuda")
        output = network(**{key: value.to("cuda") for key, value in inputs.items()})
        assert output.device.type == "cuda"


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_the_compiler_sees_one_graph(name):
    """Without graph breaks and, from step to step, without recompilation."""
    network, inputs = network_and_inputs(name)
    compiled = torch.compile(network, backend="eager", fullgraph=True)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for shift in range(3):
            inputs["timesteps"] = inputs["timesteps"] + shift
            assert torch.equal(compiled(**inputs), network(**inputs))


@pytest.mark.slow
@pytest.mark.long
def test_the_compiler_sees_one_graph_of_a_network_with_an_adapter():
    """In sampling and in training; the numbers are those without the compiler."""
    network, inputs = network_and_inputs("t2v_2b_lora")
    network.disable_untrainable_params()
    compiled = torch.compile(network, backend="eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(**inputs), network(**inputs), rtol=1e-4, atol=1e-5)
    gradients = []
    for run in (network.train(), compiled):
        network.zero_grad()
        run(**inputs).square().mean().backward()
        gradients.append({name: p.grad for name, p in network.named_parameters() if p.grad is not None})
    assert len(gradients[0]) == 2 * 4 * network.num_layers  # A and B of q, k, v and the output
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-5)


@pytest.mark.slow
@needs_compiler
@torch.no_grad()
def test_compile_model_changes_neither_numbers_nor_names():
    network, inputs = network_and_inputs("t2v_2b")
    names = OpenAIWrapper(network).state_dict().keys()
    expected = network(**inputs)
    wrapper = OpenAIWrapper(network, compile_model=True)
    assert wrapper.state_dict().keys() == names
    output = wrapper(inputs["x"], inputs["timesteps"], {"crossattn": inputs["context"]})
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_network_that_fails_to_compile_as_a_whole_goes_on_without(monkeypatch, caplog):
    network, inputs = network_and_inputs("t2v_2b")
    wrapper = OpenAIWrapper(network, compile_model=False)
    call = (inputs["x"], inputs["timesteps"], {"crossattn": inputs["context"]})
    expected, told = wrapper(*call), []

    def failing(*_, **__):
        raise PermissionError(13, "Permission denied", "/cache")

    network._compiled_call_impl, network.compiler_failed = failing, lambda: told.append(1)
    for _ in range(2):
        assert torch.equal(wrapper(*call), expected)
    assert told == [1]
    (line,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "goes on without torch.compile, which failed: [Errno 13] Permission denied" in line


@pytest.mark.slow
@needs_compiler
def test_compile_model_gives_the_same_gradients():
    gradients = []
    for compile_model in (False, True):
        network, inputs = network_and_inputs("t2v_5b")
        wrapper = OpenAIWrapper(network.train(), compile_model=compile_model)
        wrapper(inputs["x"], inputs["timesteps"], {"crossattn": inputs["context"]}).square().mean().backward()
        gradients.append({name: p.grad for name, p in network.named_parameters() if p.grad is not None})
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-5)


def test_activation_checkpointing_gives_the_same_gradients():
    gradients = []
    for checkpointing in (False, True):
        network, inputs = network_and_inputs("t2v_5b")
        network.train()
        network.transformer.checkpoint_activations = checkpointing
        network(**inputs).square().sum().backward()
        gradients.append({name: p.grad for name, p in network.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


@pytest.mark.parametrize("name", [*FAMILIES, "t2v_2b_lora"])
def test_the_parts_of_shipped_models_are_known(name):
    """With a foreign mixin, layers would run neither compiled nor with little memory."""
    network = instantiate_on_meta(Reference(f"dit/{name}").case["network_config"])
    assert {type(mixin).__module__ for mixin in network.mixins.values()} <= set(OWN_MIXINS)
    assert not network.has_foreign_mixin and network.why_layers_are_not_plain() is None


@torch.no_grad()
def test_a_smaller_clip_takes_the_leading_corner_of_the_positions():
    """Fewer frames and a smaller frame: the rotary and sin-cos tables are cut, not squeezed."""
    for name in ("t2v_2b", "t2v_5b"):
        mixin = instantiate_from_config(Reference(f"dit/{name}").case["network_config"]).mixins["pos_embed"]
        grid = (2, 3, 5)
        t, h, w = torch.meshgrid(*map(torch.arange, grid), indexing="ij")
        rows = ((t * mixin.grid[1] + h) * mixin.grid[2] + w).flatten()
        if name == "t2v_5b":
            cos, _ = mixin.rotary(grid, torch.empty(0))
            assert torch.equal(cos, mixin.freqs_cos[rows])
        else:
            table = mixin.position_embedding_forward(None, grid=grid, text_length=mixin.text_length)
            assert torch.equal(table[0, mixin.text_length :], mixin.pos_embedding[0, mixin.text_length + rows])
            assert not table[0, : mixin.text_length].any()
