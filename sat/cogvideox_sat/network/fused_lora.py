"""Apply LoRA (arXiv:2106.09685) to SwissArmyTransformer's layers with few memory passes."""

from collections.abc import Sequence
from typing import Any, Self

import torch
import torch.nn.functional as F
from sat import mpu
from sat.model.finetune.lora2 import LoraLinear
from sat.mpu import ColumnParallelLinear, RowParallelLinear
from torch import Tensor, nn

from cogvideox_sat.network.parallel_lora import ParallelLoraLinear, ReplacedLoraLinear
from sgm.errors import UserError


class FusedLoraLinear(ReplacedLoraLinear):
    """A `LoraLinear` that needs fewer passes over memory."""

    @classmethod
    def beside(cls, original: nn.Module, down: Sequence[Tensor], up: Sequence[Tensor], scale: float) -> Self:
        """Return a module that adds low-rank terms to a linear layer.

        It adds scale·x·Aᵢᵀ·Bᵢᵀ to the i-th of equal parts of the features.

        Args:
            original: the linear layer; the matrices take the device and dtype of its weight.
            down, up: the Aᵢ (rank, in) and the Bᵢ (out, rank).
        """
        module = cls.__new__(cls)
        nn.Module.__init__(module)
        module.r, module.lora_alpha, module.scaling = len(down[0]), scale * len(down[0]), scale
        module.partition, module.lora_dropout, module.original = len(down), nn.Identity(), original
        for name, matrices in (("matrix_A", down), ("matrix_B", up)):
            own = [nn.Parameter(matrix.to(original.weight), requires_grad=False) for matrix in matrices]
            setattr(module, name, nn.ParameterList(own))
        return module.train(original.training)

    def forward(self, x: Tensor) -> Tensor:
        """Return the same as a `LoraLinear`: (..., in) becomes (..., out)."""
        drops = self.training and isinstance(self.lora_dropout, nn.Dropout)
        is_plain = isinstance(self.original, ColumnParallelLinear | RowParallelLinear)  # not quantised, as in QLoRA
        # A compiler cannot trace `AddLowRank`, and fuses the plain code itself.
        if drops or not is_plain or torch.compiler.is_compiling():
            return super().forward(x)
        original = self.original
        x, weight, bias, *matrices = as_autocast(x, original.weight, original.bias, *self.matrix_A, *self.matrix_B)
        return AddLowRank.apply(x, weight, bias, self.scaling, *matrices)


def fuse_adapter(module: nn.Module) -> nn.Module:
    """Return the faster or parallel replacement of a `LoraLinear`; other modules unchanged.

    It is a `FusedLoraLinear`, or a `ParallelLoraLinear` if ranks share the network. Subclasses of `LoraLinear` are
    returned unchanged, too.

    Raises:
        UserError: ranks share the network, and they cannot share this adapter.
    """
    if type(module) is LoraLinear:
        return (ParallelLoraLinear if mpu.get_model_parallel_world_size() > 1 else FusedLoraLinear)(module)
    if isinstance(module, LoraLinear) and mpu.get_model_parallel_world_size() > 1:
        raise UserError(
            f"model_parallel_size: {type(module).__name__} applies its adapter in its own way, which processes cannot "
            "share; leave model_parallel_size at 1"
        )
    return module


def autocasts(device_type: str) -> bool:
    """Return whether autocast changes the dtype of products on such devices.

    For the meta device, PyTorch raises an error instead of answering, so that the result is False.
    """
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)


def as_autocast(first: Tensor, *others: Tensor | None) -> Sequence[Tensor | None]:
    """Return the tensors in the dtype that autocast gives to a matrix product.

    Autocast itself does not affect code within an `autograd.Function`.
    """
    device, tensors = first.device.type, (first, *others)
    if not autocasts(device):
        return tensors
    return [None if tensor is None else tensor.to(torch.get_autocast_dtype(device)) for tensor in tensors]


class AddLowRank(torch.autograd.Function):
    """x·Wᵀ + bias, with scale·x·Aᵢᵀ·Bᵢᵀ added in place to the i-th part of the features.

    All Aᵢ are applied in one product. In each direction, data of the size of the result is written only once.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, scale: float, *matrices: Tensor) -> Tensor:
        out, low = product_with_low_rank(x, weight, bias, scale, matrices)
        ctx.save_for_backward(x, weight, low, *matrices)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, low, *matrices = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        shape, x, grad = x.shape, x.flatten(0, -2), grad.flatten(0, -2)
        grad_x, grad_low, grad_up = gradients_of_low_rank(grad, weight, low, ctx.scale, matrices, needs_x)
        grad_down = gradients_of_down(grad_low, x, matrices)
        grad_x = grad_x.view(shape) if grad_x is not None else None
        grad_weight = grad.t() @ x if needs_weight else None
        grad_bias = grad.sum(0) if needs_bias else None
        return grad_x, grad_weight, grad_bias, None, *grad_down, *grad_up


def product_with_low_rank(
    x: Tensor, weight: Tensor, bias: Tensor | None, scale: float, matrices: Sequence[Tensor]
) -> tuple[Tensor, Tensor | None]:
    """Return the result of `AddLowRank` for x (..., in), and x·Aᵀ (..., Σ rᵢ) for all Aᵢ.

    Without matrices, the second value is None.
    """
    out = F.linear(x, weight, bias)
    if not matrices:
        return out, None
    down, up = torch.cat(tuple(matrices[: len(matrices) // 2])), matrices[len(matrices) // 2 :]
    low = F.linear(x, down)
    for part, low_part, matrix in zip(*split_by_rows(out.flatten(0, -2), low.flatten(0, -2), up), up, strict=True):
        part.addmm_(low_part, matrix.t(), alpha=scale)
    return out, low


def gradients_of_low_rank(
    grad: Tensor, weight: Tensor, low: Tensor | None, scale: float, matrices: Sequence[Tensor], needs_x: bool
) -> tuple[Tensor | None, Tensor | None, list[Tensor]]:
    """Return the gradients of x (n, in), of x·Aᵀ (n, Σ rᵢ) and of the Bᵢ.

    Args:
        grad: gradient of the result (n, out).
    """
    if low is None:
        return (grad @ weight if needs_x else None), None, []
    down, up = torch.cat(tuple(matrices[: len(matrices) // 2])), matrices[len(matrices) // 2 :]
    low = low.flatten(0, -2)
    grad_low, grad_up = torch.empty_like(low), []
    parts = zip(*split_by_rows(grad, low, up), split_by_rows(grad, grad_low, up)[1], up, strict=True)
    for part, low_part, grad_low_part, matrix in parts:
        torch.mm(part, matrix, out=grad_low_part)
        grad_up.append((part.t() @ low_part).mul_(scale))
    grad_low.mul_(scale)
    return ((grad @ weight).addmm_(grad_low, down) if needs_x else None), grad_low, grad_up


def gradients_of_down(grad_low: Tensor | None, x: Tensor, matrices: Sequence[Tensor]) -> Sequence[Tensor]:
    """Return the gradients of the Aᵢ, given that of x·Aᵀ (n, Σ rᵢ) and x (n, in)."""
    if grad_low is None:
        return ()
    return (grad_low.t() @ x).split([matrix.shape[1] for matrix in matrices[len(matrices) // 2 :]])


def split_by_rows(wide: Tensor, low: Tensor, up: Sequence[Tensor]) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """Return the features of `wide` and `low` that belong to each of the matrices `up`.

    Args:
        wide: (n, Σ outᵢ).
        low: (n, Σ rᵢ).
        up: matrices (outᵢ, rᵢ).
    """
    return wide.split([len(matrix) for matrix in up], dim=1), low.split([matrix.shape[1] for matrix in up], dim=1)
