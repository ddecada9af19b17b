"""Compute the activations of a layer again in its backward pass, rather than keep them.

Of a layer that keeps its attention, the result of the attention and what its gradient needs of the softmax (the
logarithms of its sums) stay; the rest is computed again. That is most of the memory and little of the time.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cache
from typing import Any

import torch
from sat.model.transformer import BaseTransformer
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from cogvideox_sat.configuration.recomputation import Recomputation
from cogvideox_sat.network.layer_runner import LayerContext, RunLayer

# Of PyTorch: each of its kernels for attention that does not write the weights out; versions lack some.
FUSED_ATTENTION = (
    *("_scaled_dot_product_flash_attention", "_scaled_dot_product_flash_attention_for_cpu"),
    *("_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention"),
    *("_scaled_dot_product_fused_attention_overrideable",),
)


class ActivationCheckpointing:
    """Runs layers that are trained as `checkpoint_activations` of a transformer says; see `Recomputation.of`.

    Args:
        transformer: whose `checkpoint_skip_layers` last layers keep all.
    """

    def __init__(self, transformer: BaseTransformer):
        self.transformer = transformer

    def recomputation(self, layers: int) -> Recomputation:
        """Return what the layers of the transformer do."""
        return Recomputation.of(
            self.transformer.checkpoint_activations, layers, self.transformer.checkpoint_skip_layers
        )

    def __call__(self, run: RunLayer, hidden: Tensor, context: LayerContext) -> Tensor:
        """Return `run(hidden)`."""
        if not (context.training and torch.is_grad_enabled()):
            return run(hidden)
        chosen = self.recomputation(context.layers)
        if context.layer < chosen.whole:
            return checkpoint(run, hidden, use_reentrant=False)
        if context.layer < chosen.whole + chosen.attention:
            return run(hidden) if context.keeps_attention else keeping_attention(run, hidden)
        return run(hidden)


def keeping_attention(run: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """Return `run(*tensors)`, of which the result of the attention and `tensors` are kept."""
    result: Tensor = checkpoint(run, *tensors, use_reentrant=False, context_fn=attention_contexts)
    return result


def attention_contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """Return the contexts of `torch.utils.checkpoint`, of the forward pass and of the one in the backward pass."""
    return create_selective_checkpoint_contexts(_policy)


def _policy(_: Any, operator: Any, *__: Any, **___: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operator in kept_operators() else CheckpointPolicy.PREFER_RECOMPUTE


@cache
def kept_operators() -> frozenset[Any]:
    """Return the operators whose results are kept."""
    known = [getattr(torch.ops.aten, name).default for name in FUSED_ATTENTION if hasattr(torch.ops.aten, name)]
    own = getattr(torch.ops.cogvideox, "flash_attention3", None)
    return frozenset([*known, *([own.default] if own is not None else [])])
