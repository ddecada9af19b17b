"""Each mode of recomputing activations has the right gradients, memory and operations."""

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from cogvideox_sat.configuration.recomputation import Recomputation
from cogvideox_sat.network import layer_execution
from cogvideox_sat.network.compiled_layers import NotCompilable
from reference_networks import network_and_inputs
from sgm.models.video_coder_memory import AllocatedBytes
from support import assert_close, needs_compiler

FUSED = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
MODES = [True, "attention", 1, Recomputation(1, 1), "auto"]


def built(name: str, full: bool = False) -> tuple[nn.Module, dict[str, Tensor]]:
    network, inputs = network_and_inputs(name)
    network.train()
    if not full:
        network.disable_untrainable_params()
    return network, inputs


def step(network: nn.Module, inputs: dict[str, Tensor], mode: object, skipped: int = 0) -> dict[str, Tensor]:
    network.transformer.checkpoint_activations, network.transformer.checkpoint_skip_layers = mode, skipped
    network.zero_grad()
    torch.manual_seed(0)
    network(**inputs).square().mean().backward()
    return {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}


def refuse(*_):
    raise NotCompilable("in this test")


@pytest.mark.parametrize("by_hooks", [False, True])
@pytest.mark.parametrize("name", ["t2v_5b", "t2v_2b_lora", "i2v_15"])
def test_gradients_are_those_without(name, by_hooks, monkeypatch):
    """To the bit, so that a run goes on with the same numbers in another mode."""
    network, inputs = built(name)
    if by_hooks:
        monkeypatch.setattr(layer_execution, "lean_layers", refuse)
    expected = step(network, inputs, False)
    for mode in MODES:
        found = step(network, inputs, mode)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[parameter], gradient) for parameter, gradient in expected.items()), mode


@pytest.mark.parametrize("mode", MODES)
def test_dropout_falls_on_the_same_values_again(mode):
    network, inputs = built("t2v_5b")
    for layer in network.transformer.layers:
        layer.mlp.dropout.p = layer.attention.output_dropout.p = layer.attention.attention_dropout.p = 0.2
    expected = step(network, inputs, False)
    found = step(network, inputs, mode)
    for parameter, gradient in expected.items():
        assert_close(found[parameter], gradient, 1e-6)


class Counted(TorchDispatchMode):
    """Counts how often attention is computed."""

    def __init__(self):
        super().__init__()
        self.times = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.times += function is FUSED
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("mode", "skipped", "times"),
    [(False, 0, 2), (True, 0, 4), ("attention", 0, 2), (1, 0, 3), (True, 1, 3), ("attention", 2, 2), (True, 2, 2)],
)
def test_how_often_attention_is_computed(mode, skipped, times):
    network, inputs = built("t2v_5b")
    assert network.num_layers == 2
    with Counted() as counted:
        step(network, inputs, mode, skipped)
    assert counted.times == times


def kept(network: nn.Module, inputs: dict[str, Tensor], mode: object) -> float:
    """Return the bytes kept after the forward pass, in tensors of the tokens' size."""
    network.transformer.checkpoint_activations = mode
    hidden = inputs["context"].shape[1] + 5 * 8 * 8
    with AllocatedBytes(workspaces=False, host=True) as counted:
        output = network(**inputs)
    assert output.requires_grad
    return counted.live / (4 * len(output) * hidden * network.hidden_size)


@pytest.mark.parametrize(("name", "all_kept"), [("t2v_2b", 14), ("t2v_2b_lora", 12)])
def test_what_each_mode_keeps_of_a_layer(name, all_kept):
    """A layer keeps 1 tensor of the tokens' size, or 2 with attention, and small ones.

    The small tensors are the logarithms of the softmax's sums.
    """
    network, inputs = built(name)
    inputs["x"] = torch.randn(2, 5, network.in_channels, 16, 16)
    network.mixins["pos_embed"].grid = (5, 8, 8)
    tokens = network.mixins["pos_embed"].text_length + 5 * 8 * 8
    table = torch.zeros(1, tokens, network.hidden_size)
    network.mixins["pos_embed"].pos_embedding = nn.Parameter(table, requires_grad=False)
    sums = 1 / (network.hidden_size // network.num_attention_heads)
    none, attention, whole, first = (kept(network, inputs, mode) for mode in (False, "attention", True, 1))
    assert none - whole == pytest.approx(2 * (all_kept - 1), rel=0.06)
    assert attention - whole == pytest.approx(2 * (1 + sums), rel=0.1)
    assert none - first == pytest.approx((none - whole) / 2, rel=0.01)


def kept_by_autograd(network: nn.Module, inputs: dict[str, Tensor]) -> int:
    """Return the bytes that live after the forward pass.

    A dispatch mode would not run in a compiler.
    """
    kept = {}

    def note(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        network(**inputs)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@needs_compiler
@pytest.mark.slow
def test_compiled_layers_do_the_same():
    """Within 1e-6 of each other and of those without a compiler."""
    network, inputs = built("t2v_2b_lora")
    eager = step(network, inputs, False)
    assert network.compile_layers()
    torch._dynamo.reset()
    compiled = step(network, inputs, False)
    sizes = {}
    for mode in (False, True, "attention", Recomputation(1, 1)):
        found = step(network, inputs, mode)
        assert found.keys() == eager.keys() and network.compiles_layers
        for parameter in eager:
            assert_close(found[parameter], compiled[parameter], 1e-6)
            assert_close(found[parameter], eager[parameter], 1e-6)
        sizes[mode] = kept_by_autograd(network, inputs)
    assert sizes[True] < sizes["attention"] < sizes[False]
