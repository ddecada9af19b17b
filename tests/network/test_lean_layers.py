"""Lean layers have the numbers and gradients of the hooks, and keep less memory."""

import contextlib

import pytest
import torch
from torch import Tensor, nn

from cogvideox_sat.network import layer_execution
from cogvideox_sat.network.compiled_layers import NotCompilable
from cogvideox_sat.network.lean_layers import lean_layers
from reference_networks import FAMILIES, network_and_inputs
from support import assert_close
from unusual_networks import with_dropout, with_foreign_mixin, with_watched_module

LORA = ["t2v_2b_lora", "i2v_5b_lora"]


def results(built: nn.Module, given: dict[str, Tensor]) -> dict[str, Tensor]:
    built.zero_grad()
    output = built(**given)
    (output * torch.linspace(-1, 1, output.numel()).view(output.shape)).sum().backward()
    return {"": output.detach(), **{name: p.grad.clone() for name, p in built.named_parameters() if p.grad is not None}}


@contextlib.contextmanager
def by_hooks(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(layer_execution, "lean_layers", refuse)
        yield


def refuse(*_):
    raise NotCompilable("in this test")


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("name", FAMILIES + LORA)
def test_numbers_and_gradients_are_those_of_the_hooks(name, frozen, monkeypatch):
    built, given = network_and_inputs(name)
    built.train()
    if frozen:
        built.disable_untrainable_params()
    with by_hooks(monkeypatch):
        expected = results(built, given)
    monkeypatch.setattr(built, "layer", lambda *_: pytest.fail("runs by hooks"))
    found = results(built, given)
    assert found.keys() == expected.keys()
    largest = max(gradient.norm() for gradient in expected.values())
    for parameter, gradient in expected.items():
        if gradient.norm() > 1e-6 * largest:  # smaller gradients are zero except for rounding
            assert_close(found[parameter], gradient, 1e-6)


@pytest.mark.parametrize(("lora", "tensors"), [(False, 14), (True, 12)])
def test_what_a_layer_keeps(lora, tensors):
    """In tensors of the size of the tokens, apart from what is a small part of one."""
    name = "t2v_2b_lora" if lora else "t2v_2b_wide"
    built, _ = network_and_inputs(name)
    built.train().disable_untrainable_params()
    hidden = torch.randn(2, 500, built.hidden_size, requires_grad=True)
    run = lean_layers(built, torch.randn(2, built.time_embed[0].out_features), 50, None)[0]
    kept = {}

    def note(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    own = {parameter.untyped_storage().data_ptr() for parameter in built.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = run(hidden)
    sizes = [tensor.untyped_storage().nbytes() / hidden.nbytes for key, tensor in kept.items() if key not in own]
    assert round(sum(size for size in sizes if size > 0.9)) == tensors
    assert output.requires_grad


@pytest.mark.parametrize("change", [with_foreign_mixin, with_dropout, with_watched_module])
def test_what_they_do_not_know_runs_by_hooks(change, monkeypatch):
    built, given = network_and_inputs("t2v_5b")
    change(built.train())
    torch.manual_seed(0)
    found = results(built, given)
    with by_hooks(monkeypatch):
        torch.manual_seed(0)
        expected = results(built, given)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_under_autocast_they_run_by_hooks(monkeypatch):
    built, given = network_and_inputs("t2v_5b")
    built.train()
    with torch.autocast("cpu", torch.bfloat16):
        found = built(**given)
        with by_hooks(monkeypatch):
            assert torch.equal(found, built(**given))
    assert not torch.equal(found, built(**given))
