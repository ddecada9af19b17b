"""The adapter as it is applied here against SwissArmyTransformer's own computation."""

import copy

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from support import assert_close


def adapted_layer(parts: int, dtype: torch.dtype) -> torch.nn.Module:
    """Return a layer of 12 features with an adapter of rank 5, with random weights."""
    from sat.model.finetune.lora2 import LoraLinear
    from sat.mpu import ColumnParallelLinear, RowParallelLinear

    from cogvideox_sat.parallel.process_groups import initialize_process_groups

    initialize_process_groups()
    torch.manual_seed(0)
    kind = ColumnParallelLinear if parts == 3 else RowParallelLinear
    original = kind(12, 12 * parts, params_dtype=dtype, **({"stride": 3} if parts == 3 else {}))
    torch.nn.init.normal_(original.bias)
    layer = LoraLinear(kind, parts, 12, 12 * parts, r=5, lora_alpha=2.0, original_obj=original)
    for matrix in (*layer.matrix_A, *layer.matrix_B):
        torch.nn.init.normal_(matrix)
    return layer


@pytest.mark.parametrize("trains_base", [False, True])
@pytest.mark.parametrize("parts", [1, 3])
def test_outputs_and_gradients_are_those_of_the_layer(parts, trains_base):
    from cogvideox_sat.network.fused_lora import fuse_adapter

    layer = adapted_layer(parts, torch.float64)
    layer.original.requires_grad_(trains_base)
    x = torch.randn(2, 7, 12, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 7, 12 * parts, dtype=torch.float64)
    trained = [parameter for parameter in layer.parameters() if parameter.requires_grad]

    def results(layer: torch.nn.Module) -> list[torch.Tensor]:
        out = layer(x)
        return [out, *torch.autograd.grad((out * weight).sum(), [x, *trained])]

    fused = fuse_adapter(layer)
    assert fused is not layer
    for ours, theirs in zip(results(fused), results(layer), strict=True):
        assert_close(ours, theirs, 1e-12)


@pytest.mark.parametrize("parts", [1, 3])
def test_under_autocast(parts):
    """The layer computes in bfloat16, with float32 gradients, near those without autocast."""
    from cogvideox_sat.network.fused_lora import fuse_adapter

    layer = fuse_adapter(adapted_layer(parts, torch.float32))
    x = torch.randn(2, 7, 12, requires_grad=True)
    weight = torch.randn(2, 7, 12 * parts)

    def results(autocast: bool) -> list[torch.Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = layer(x)
        return [out, *torch.autograd.grad((out.float() * weight).sum(), [x, *layer.parameters()])]

    out, *gradients = results(autocast=True)
    assert out.dtype == torch.bfloat16 and all(gradient.dtype == torch.float32 for gradient in gradients)
    for ours, exact in zip([out.float(), *gradients], results(autocast=False), strict=True):
        assert_close(ours, exact, 2e-2)


@pytest.mark.parametrize("parts", [1, 3])
def test_the_layer_it_stands_for(parts):
    """Its tensors and settings are those of the replaced layer, in the same order."""
    from sat.model.finetune.lora2 import LoraLinear

    from cogvideox_sat.network.fused_lora import fuse_adapter

    layer = adapted_layer(parts, torch.float32).eval()
    fused = fuse_adapter(layer)
    assert isinstance(fused, LoraLinear) and fuse_adapter(fused) is fused
    assert list(fused.state_dict()) == list(layer.state_dict())
    for (name, ours), (own_name, theirs) in zip(fused.named_parameters(), layer.named_parameters(), strict=True):
        assert name == own_name and ours is theirs
    plain = {name: value for name, value in vars(layer).items() if not name.startswith("_")}
    assert {name: value for name, value in vars(fused).items() if not name.startswith("_")} == plain
    assert not fused.training and "forward" not in vars(fused)
    assert type(fuse_adapter(layer.original)) is type(layer.original)

    class Own(LoraLinear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    layer.__class__ = Own
    assert fuse_adapter(layer) is layer


def test_dropout_of_an_adapter_that_is_trained_is_the_layer_s_own():
    from cogvideox_sat.network.fused_lora import fuse_adapter

    layer = adapted_layer(3, torch.float32)
    layer.lora_dropout = torch.nn.Dropout(0.5)
    fused, x, outputs = fuse_adapter(layer), torch.randn(2, 7, 12), []
    for one in (layer, fused):
        torch.manual_seed(1)
        outputs.append(one(x))
    assert torch.equal(*outputs)
    assert not torch.equal(fused(x), outputs[0])
    fused.eval()
    assert torch.equal(fused(x), fused(x))


@pytest.mark.parametrize("parts", [1, 3])
@torch.no_grad()
def test_operations(parts):
    """Two products, and one in place for each part: nothing as large as the result is copied."""
    from cogvideox_sat.network.fused_lora import fuse_adapter

    layer = fuse_adapter(adapted_layer(parts, torch.float32))
    twin, x = copy.deepcopy(layer), torch.randn(2, 7, 12)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        out = layer(x)
    counts = {event.key: event.count for event in profiler.key_averages()}
    assert (counts["aten::linear"], counts["aten::addmm_"], counts["aten::cat"]) == (2, parts, 1)
    assert not {"aten::add", "aten::add_", "aten::mul", "aten::clone", "aten::contiguous"} & counts.keys()
    assert torch.equal(twin(x), out)
