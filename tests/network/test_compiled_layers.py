"""Compiled layers have equal numbers and gradients, one graph, few launches and bytes."""

import math
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch._dynamo
import torch._inductor.config
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed
from torch._dynamo.utils import counters

from cogvideox_sat.network import compiled_layers
from cogvideox_sat.network.attention_choice import choose_attention
from cogvideox_sat.network.block import LayerWeights, Norm, Product, block, tokens_of
from cogvideox_sat.network.compiled_layers import NotCompilable, compiled_block, layer_weights
from cogvideox_sat.network.layer_streaming import stream_layers
from long_cases import others_long
from reference_networks import network_and_inputs
from seeded import seeded_input
from support import assert_close, needs_compiler, relative_error
from unusual_networks import with_dropout, with_foreign_mixin, with_other_norm, with_watched_module

pytestmark = [needs_compiler]

FAMILIES = ["t2v_2b", "t2v_5b", "i2v_5b", "t2v_15", "i2v_15"]
LORA = ["t2v_2b_lora", "i2v_5b_lora"]


def network(name: str) -> nn.Module:
    return network_and_inputs(name)[0]


def inputs(name: str, frames: int | None = None) -> dict[str, Tensor]:
    given = network_and_inputs(name)[1]
    b, t, *rest = given["x"].shape
    return {**given, "x": seeded_input("x", (b, frames or t, *rest))}


def gradients(built: nn.Module, given: dict[str, Tensor]) -> dict[str, Tensor]:
    built.zero_grad()
    built(**given).square().mean().backward()
    return {name: p.grad.clone() for name, p in built.named_parameters() if p.grad is not None}


@pytest.fixture
def graphs() -> Iterator[None]:
    """Count graphs from zero."""
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES + LORA)
@torch.no_grad()
def test_sampling_gives_the_same_by_one_graph(name, graphs):
    built = network(name)
    given = inputs(name)
    names, expected = list(built.state_dict()), built(**given)
    assert built.compile_layers() and built.num_layers > 1
    assert_close(built(**given), expected, 1e-5)
    assert counters["stats"]["unique_graphs"] == 1
    assert list(built.state_dict()) == names


@pytest.mark.slow
@pytest.mark.parametrize(("name", "checkpointed"), [("t2v_5b", False), ("t2v_2b_lora", True)])
def test_training_gives_the_same_gradients(name, checkpointed, graphs):
    built = network(name).train()
    built.disable_untrainable_params()
    built.transformer.checkpoint_activations = checkpointed
    given = inputs(name)
    expected = gradients(built, given)
    assert built.compile_layers()
    found = gradients(built, given)
    assert found.keys() == expected.keys()
    for parameter, gradient in expected.items():
        assert_close(found[parameter], gradient, 1e-4)


@pytest.mark.slow
@torch.no_grad()
def test_bfloat16_is_no_further_from_float32_than_without(graphs):
    built = network("t2v_5b")
    given = inputs("t2v_5b")
    exact = built(**given)
    built.bfloat16()
    given = {key: value.bfloat16() if value.is_floating_point() else value for key, value in given.items()}
    eager = relative_error(built(**given).float(), exact)
    built.compile_layers()
    assert relative_error(built(**given).float(), exact) <= eager


@pytest.mark.slow
@torch.no_grad()
def test_another_length_and_another_kernel(graphs):
    built = network("t2v_5b")
    short, long = inputs("t2v_5b", frames=1), inputs("t2v_5b")
    expected = [built(**given) for given in (short, long)]
    built.compile_layers()
    for given, output in zip((short, long), expected, strict=True):
        assert_close(built(**given), output, 1e-5)
    built.use_attention(choose_attention("math", torch.device("cpu"), torch.float32, 64, False))
    assert_close(built(**long), expected[1], 1e-5)


@pytest.mark.slow
@torch.no_grad()
def test_layers_that_wait_in_host_memory(graphs):
    built = network("t2v_5b")
    given = inputs("t2v_5b")
    expected = built(**given)
    built.compile_layers()
    stream_layers(built, torch.device("cpu"))
    assert_close(built(**given), expected, 1e-5)
    assert counters["stats"]["unique_graphs"] == 1


# Unsupported layers


@pytest.mark.parametrize("change", [with_foreign_mixin, with_watched_module, with_dropout, with_other_norm])
def test_what_it_does_not_know_is_left_alone(change, monkeypatch):
    built = network("t2v_5b")
    change(built)
    assert not built.compile_layers()
    with pytest.raises(NotCompilable, match=r"\w"):
        layer_weights(built, 0)


@torch.no_grad()
def test_a_part_that_comes_later_switches_it_off(monkeypatch):
    built = network("t2v_5b")
    given = inputs("t2v_5b")
    expected = built(**given)
    assert built.compile_layers()
    seen = []
    built.transformer.layers[1].mlp.register_forward_hook(lambda *_: seen.append(1))
    monkeypatch.setattr("cogvideox_sat.network.compiled_layers.compiled_block", lambda: pytest.fail("compiled"))
    assert torch.equal(built(**given), expected) and seen == [1]


FAILURES = [
    BackendCompilerFailed(lambda: None, RuntimeError("no\ncc1plus"), None),
    FileNotFoundError(2, "No such file or\ndirectory", "/proc/cache"),
    subprocess.CalledProcessError(1, ["c++"], "no\noutput"),
]


@pytest.mark.parametrize("failure", FAILURES, ids=lambda failure: type(failure).__name__)
@torch.no_grad()
def test_a_compiler_that_fails_is_one_line(monkeypatch, caplog, failure):
    """After any compiler failure the numbers are those without it, and the caller is told."""
    built = network("t2v_5b")
    given = inputs("t2v_5b")
    expected = built(**given)
    calls = []

    def failing(*_):
        calls.append(1)
        raise failure

    monkeypatch.setattr(compiled_layers, "compiled_block", lambda: failing)
    assert built.compile_layers()
    built.compiler_failed = lambda: calls.append("told")
    for _ in range(2):
        assert torch.equal(built(**given), expected)
    assert calls == [1, "told"]
    (line,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert (
        line.startswith("compile_model: the network goes on without torch.compile, which failed") and "\n" not in line
    )


# Counts, as Inductor's backend for the CPU has them


class Counted:
    """The operations of a graph, and their bytes.

    Attributes:
        launches: generated kernels, matrix products and attention.
        bytes: read and written by generated kernels, each buffer once a kernel and at most whole.
    """

    launches = bytes = 0


@contextmanager
def counted() -> Iterator[Counted]:
    """Count in the graphs that are compiled within the block.

    Between two calls of libraries the backend for the CPU makes one kernel of all that it generates.
    """
    from torch._inductor.graph import GraphLowering

    found, codegen = Counted(), GraphLowering.codegen

    def counting(graph):
        code = codegen(graph)
        group = []
        for node in [*graph.scheduler.nodes, None]:
            if node is not None and not node.is_extern():
                group += node.get_nodes()
                continue
            found.launches += bool(group) + (node is not None and type(node.node).__name__ != "MultiOutput")
            found.bytes += bytes_of(graph, group)
            group = []
        return code

    GraphLowering.codegen = counting
    try:
        yield found
    finally:
        GraphLowering.codegen = codegen


def bytes_of(graph, nodes) -> int:
    """Return the bytes a fused kernel reads and writes, without its internal tensors."""
    own = {node.get_name() for node in nodes}
    inside = {output.get_name() for node in nodes for output in node.get_outputs()}
    sizes: dict[tuple[str, str], dict[object, int]] = {}
    for node in nodes:
        leaving = {o.get_name() for o in node.get_outputs() if any(u.node.get_name() not in own for u in o.users)}
        reads = [dep for dep in node.read_writes.reads if dep.name not in inside]
        writes = [dep for dep in node.read_writes.writes if dep.name in leaving]
        for kind, deps in (("read", reads), ("written", writes)):
            for dep in deps:
                sizes.setdefault((kind, dep.name), {})[dep] = graph.get_dep_size_hint(dep)
    return sum(min(sum(parts.values()), whole_bytes(graph, name)) for (_, name), parts in sizes.items())


def whole_bytes(graph, name: str) -> int:
    buffer = graph.get_buffer(name) if graph.try_get_buffer(name) is not None else graph.graph_inputs[name]
    return math.prod(int(side) for side in buffer.get_size()) * buffer.get_dtype().itemsize


@pytest.mark.slow
@pytest.mark.parametrize(("width", "heads", "rotary"), others_long((1920, 30, False), (3072, 48, True)))
@torch.no_grad()
def test_launches_and_bytes_of_a_layer(width, heads, rotary, graphs):
    """At the width of the 2B and of the 5B, in bfloat16; in units of the bytes of all tokens."""
    b, n, text, e = 2, 512, 226, width // heads

    def tensor(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.bfloat16)

    def product_of(out: int, into: int) -> Product:
        return Product(tensor(out, into), tensor(out))

    def norm_of(size: int) -> Norm:
        return Norm(tensor(size), tensor(size), 1e-6)

    weights = LayerWeights(
        attention_norm=norm_of(width),
        qkv=product_of(3 * width, width),
        query_norm=norm_of(e),
        key_norm=norm_of(e),
        out=product_of(width, width),
        mlp_norm=norm_of(width),
        up=product_of(4 * width, width),
        down=product_of(width, 4 * width),
    )
    x, modulation = tensor(b, n, width), tensor(b, 12 * width)
    tokens = tokens_of(text, n, (tensor(n - text, e), tensor(n - text, e)) if rotary else None, x.device)
    with counted() as found, torch._inductor.config.patch(fx_graph_cache=False):
        compiled_block()(x, modulation, weights, tokens, heads, torch.nn.functional.scaled_dot_product_attention, "any")
    assert found.launches == 10
    assert 20 < found.bytes / (x.numel() * x.itemsize) < 22.5


def test_without_a_compiler_a_block_is_the_layer_too():
    """Every family's, by plain PyTorch: what is compiled is right before it is."""
    for name in FAMILIES:
        built = network(name)
        given = inputs(name)
        with torch.no_grad():
            expected = built(**given)
            built.compiles_layers = True
            original, compiled_layers.compiled_block = compiled_layers.compiled_block, lambda: block
            try:
                assert_close(built(**given), expected, 1e-5)
            finally:
                compiled_layers.compiled_block = original


@pytest.mark.long
def test_the_module_alone_knows_the_kernels_it_may_call():
    """In a fresh interpreter: one that is forked has imported what registers them."""
    code = "from cogvideox_sat.network import compiled_layers as layers; layers._attend(layers.KERNELS['softmax'])"
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
