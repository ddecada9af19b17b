"""Muon: momentum with orthogonalized updates, by the Newton-Schulz iteration."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from sgm.errors import UserError
from sgm.moving_averages import follow, kept_share

# a, b, c: x -> a x + b x^3 + c x^5, applied `ITERATIONS` times, takes all of (0, 1] close to 1 (Jordan et al. 2024).
QUINTIC = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5


class Muon(Optimizer):
    """Muon for weights of two and more dimensions; Adam for all others.

    Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks". Convolution kernels are matrices
    (out, in * taps). With equal batches it needs a fraction of Adam's steps if these are few and gradients have little
    noise. A step needs whole gradients: parameters must not be divided among processes or flattened, as by ZeRO.

    Args:
        lr: of matrices: the size of the update's singular values, times sqrt(out / in) if out is larger.
        momentum: Nesterov momentum of the gradients of matrices.
        adam_lr_factor: the learning rate of Adam, as a multiple of `lr`.
        betas, eps: of Adam.
        weight_decay: of matrices, decoupled.
        ema_decay: decay of a moving average of every parameter, `state[p]["shadow"]`, after the warm-up of
            `kept_share`. None: no average.

    Raises:
        UserError: a setting is out of its range.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.02,
        momentum: float = 0.95,
        adam_lr_factor: float = 0.1,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        ema_decay: float | None = None,
    ):
        shares = {"momentum": momentum, "betas[0]": betas[0], "betas[1]": betas[1], "ema_decay": ema_decay or 0.0}
        for name, value in shares.items():
            if not 0 <= value < 1:
                raise UserError(f"Muon: {name}: got {value}; expected at least 0 and below 1")
        rates = {"lr": lr, "adam_lr_factor": adam_lr_factor, "eps": eps, "weight_decay": weight_decay}
        for name, value in rates.items():
            if value < 0:
                raise UserError(f"Muon: {name}: got {value}; expected at least 0")
        super().__init__(params, {**rates, "momentum": momentum, "betas": tuple(betas), "ema_decay": ema_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient; return the loss of `closure`, if given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    state = self._state_of(parameter, group)
                    state["step"] += 1
                    update = self._update_matrix if parameter.ndim >= 2 else self._update_vector
                    update(parameter, parameter.grad, state, group)
                    if "shadow" in state:
                        follow([state["shadow"]], [parameter], kept_share(group["ema_decay"], state["step"]))
        return loss

    def _state_of(self, parameter: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        state = self.state[parameter]
        if not state:
            state["step"] = 0
            for kind in ("momentum",) if parameter.ndim >= 2 else ("average", "square"):
                state[kind] = torch.zeros_like(parameter)
            if group["ema_decay"] is not None:
                state["shadow"] = parameter.detach().clone()
        return state

    def _update_matrix(self, weight: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        momentum = state["momentum"].mul_(group["momentum"]).add_(gradient)
        direction = orthogonalize(torch.add(gradient, momentum, alpha=group["momentum"]).flatten(1))
        rows, columns = direction.shape
        scale = max(1, rows / columns) ** 0.5
        weight.mul_(1 - group["lr"] * group["weight_decay"])
        weight.add_(direction.view(weight.shape), alpha=-group["lr"] * scale)

    def _update_vector(self, weight: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        beta1, beta2 = group["betas"]
        average = state["average"].lerp_(gradient, 1 - beta1)
        square = state["square"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        rate = group["lr"] * group["adam_lr_factor"] / (1 - beta1 ** state["step"])
        spread = (square / (1 - beta2 ** state["step"])).sqrt_().add_(group["eps"])
        weight.addcdiv_(average, spread, value=-rate)


def orthogonalize(matrix: Tensor) -> Tensor:
    """Return the matrix with its singular values near 1, between about 0.7 and 1.2.

    A zero matrix stays zero. The iteration X -> (a + b XX' + c (XX')^2) X only multiplies X from the left by
    polynomials of its Gram matrix, so that it runs on this small square matrix, and X is multiplied once. The
    iteration runs in float32, and the result has the matrix's dtype; autocast is off, since powers of the Gram matrix
    need the precision.
    """
    with torch.autocast(matrix.device.type, enabled=False):
        return _orthogonalize(matrix.float()).to(matrix.dtype)


def _orthogonalize(x: Tensor) -> Tensor:
    """Return the result of `orthogonalize` for a float32 matrix."""
    wide = x if x.shape[0] <= x.shape[1] else x.mT
    wide = wide / wide.norm().clamp_min(1e-12)
    gram = wide @ wide.mT
    identity = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    product = identity
    a, b, c = QUINTIC
    for _ in range(ITERATIONS):
        polynomial = a * identity + b * gram + c * (gram @ gram)
        product = polynomial @ product
        gram = polynomial @ gram @ polynomial
    result = product @ wide
    return result if x.shape[0] <= x.shape[1] else result.mT
