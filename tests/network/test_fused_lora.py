"""The adapter as it is applied here against SwissArmyTransformer's own computation."""

import pytest
import torch

from support import assert_close


def adapted_layer(parts: int, dtype: torch.dtype) -> torch.nn.Module:
    """A layer from 12 features to 12 in each of its parts, with an adapter of rank 5, all weights random."""
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
    from cogvideox_sat.network.fused_lora import use_fused_adapters

    layer = adapted_layer(parts, torch.float64)
    layer.original.requires_grad_(trains_base)
    x = torch.randn(2, 7, 12, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 7, 12 * parts, dtype=torch.float64)
    trained = [parameter for parameter in layer.parameters() if parameter.requires_grad]

    def results():
        out = layer(x)
        return [out, *torch.autograd.grad((out * weight).sum(), [x, *trained])]

    expected = results()
    use_fused_adapters(layer)
    for ours, theirs in zip(results(), expected, strict=True):
        assert_close(ours, theirs, 1e-12)


@pytest.mark.parametrize("parts", [1, 3])
def test_under_autocast(parts):
    """It computes in bfloat16, and the gradients of float32 weights are float32; both near those without autocast."""
    from cogvideox_sat.network.fused_lora import use_fused_adapters

    layer = adapted_layer(parts, torch.float32)
    use_fused_adapters(layer)
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
