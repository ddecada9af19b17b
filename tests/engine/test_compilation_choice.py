"""A network is compiled as `compile_model` says, or where that is faster."""

import pytest
import torch

from cogvideox_sat.configuration.files import load_configs
from cogvideox_sat.configuration.meta_device import instantiate_on_meta
from cogvideox_sat.engine import compilation_choice
from cogvideox_sat.engine.compilation_choice import choose_compilation


@pytest.fixture
def network(tiny):
    return instantiate_on_meta(load_configs([tiny.config("5b")])["model"]["network_config"])


@pytest.mark.parametrize(
    ("asked", "device", "problem", "compiled"),
    [
        (None, "cpu", None, False),
        ("auto", "cpu", None, False),
        (True, "cpu", None, True),
        (True, "cpu", "g++ does not exist", False),
        (True, "cuda", "Triton is missing", False),
        (False, "cuda", None, False),
        (None, "cuda", None, True),
        ("auto", "cuda", "Triton is missing", False),
    ],
)
def test_where_a_network_is_compiled(network, monkeypatch, caplog, asked, device, problem, compiled):
    """`auto`, the default, compiles on a GPU with a working compiler, else logs a line."""
    monkeypatch.setattr(compilation_choice, "why_not_compilable", lambda _: problem)
    assert choose_compilation(asked, network, torch.device(device)) == compiled
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert [problem in line for line in warnings] == ([True] if problem else [])


def test_a_network_that_cannot_be_compiled_by_layers_is_left_alone_by_auto(network, monkeypatch):
    monkeypatch.setattr(compilation_choice, "why_not_compilable", lambda _: None)
    network.transformer.layers[0].mlp.register_forward_hook(lambda *_: None)
    assert not choose_compilation(None, network, torch.device("cuda"))
    assert not choose_compilation(None, torch.nn.Identity(), torch.device("cuda"))
