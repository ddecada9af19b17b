"""Adam that also keeps an exponential moving average of the weights."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim.adam import adam
from torch.optim.adamw import adamw

from sgm.errors import UserError
from sgm.moving_averages import follow, kept_share

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class EmaAdam(torch.optim.Optimizer):
    """Adam with averaged weights, `sat.ops.FusedEmaAdam` in configurations, for any device.

    Step t of a parameter p with gradient g (Kingma & Ba, arXiv:1412.6980; decoupled decay: arXiv:1711.05101):

        m ← β₁·m + (1 − β₁)·g        v ← β₂·v + (1 − β₂)·g²
        p ← p − lr·(m/(1 − β₁ᵗ) / (sqrt(v/(1 − β₂ᵗ)) + eps) + weight_decay·p)
        shadow ← d·shadow + (1 − d)·p,  d = min(ema_decay, (1 + t)/(10 + t))

    The shadow, the averaged weights, starts as the weights before the first step; the warm-up of d makes it forget
    them. PyTorch's fused kernels update everything in place, without temporaries, in two passes over memory. Parameters
    whose gradient is None are skipped, and t counts the steps of each parameter, so that a caller may update parameters
    in turn (ZeRO-3 updates one sub-group per call).

    `state[p]` holds `step` (int), `exp_avg` (m), `exp_avg_sq` (v) and `shadow`, with the shape and dtype of p. The
    arithmetic is in float32, but stored values are rounded: a 16-bit shadow stops changing once d is near 1. DeepSpeed
    is not affected, since it passes float32 master weights.

    Args:
        params: float32, bfloat16 or float16 parameters, or groups of them.
        bias_correction: divide by 1 − βᵗ, as above.
        adam_w_mode: decoupled weight decay, as above; otherwise weight_decay·p is added to the gradient.
        amsgrad: not supported.
        set_grad_none: the default of `zero_grad`.
        ema_decay: d after the warm-up, at least 0 and below 1.
        use_num_upates: warm up d, as above (SwissArmyTransformer's spelling).

    Raises:
        UserError: an argument is out of range, or a parameter has another dtype.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        adam_w_mode: bool = True,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        set_grad_none: bool = True,
        ema_decay: float = 0.9999,
        use_num_upates: bool = True,
    ):
        if amsgrad:
            raise UserError("optimizer: FusedEmaAdam does not support amsgrad; set amsgrad to false")
        for name, value in {"betas[0]": betas[0], "betas[1]": betas[1], "ema_decay": ema_decay}.items():
            if not 0 <= value < 1:
                raise UserError(f"optimizer: {name}: got {value}; expected at least 0 and below 1")
        for name, value in {"lr": lr, "eps": eps, "weight_decay": weight_decay}.items():
            if not value >= 0:
                raise UserError(f"optimizer: {name}: got {value}; expected at least 0")
        self.update = adamw if adam_w_mode else adam
        self.set_grad_none = set_grad_none
        self.ema_decay = ema_decay
        self.use_num_updates = use_num_upates
        defaults = {"lr": lr, "bias_correction": bias_correction, "betas": betas, "eps": eps}
        super().__init__(params, {**defaults, "weight_decay": weight_decay})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        for parameter in self.param_groups[-1]["params"]:
            if parameter.dtype not in DTYPES:
                raise UserError(f"optimizer: FusedEmaAdam takes float32, bf16 and fp16, got {parameter.dtype}")

    def zero_grad(self, set_to_none: bool | None = None) -> None:
        super().zero_grad(self.set_grad_none if set_to_none is None else set_to_none)

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """Update every parameter that has a gradient; return the loss of `closure`, if given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            by_step: dict[int, list[Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    state = self._state_of(parameter)
                    state["step"] += 1
                    by_step.setdefault(state["step"], []).append(parameter)
            for step, parameters in by_step.items():
                self._update(group, step, parameters)
        return loss

    def _state_of(self, parameter: Tensor) -> dict[str, Any]:
        state = self.state[parameter]
        if not state:
            state["step"] = 0
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
            state["shadow"] = parameter.detach().clone()
        return state

    def _update(self, group: dict[str, Any], step: int, parameters: list[Tensor]) -> None:
        """Update parameters that are all at the same `step`."""
        m, v, shadow = ([self.state[p][name] for p in parameters] for name in ("exp_avg", "exp_avg_sq", "shadow"))
        # The kernels add 1 to the step and divide by 1 - beta^step, which is 1 at infinity.
        count = step - 1 if group["bias_correction"] else float("inf")
        steps = [torch.full((), count, dtype=torch.float32, device=p.device) for p in parameters]
        beta1, beta2 = group["betas"]
        self.update(
            parameters,
            [_laid_out_like(p, p.grad) for p in parameters],
            m,
            v,
            max_exp_avg_sqs=[],
            state_steps=steps,
            fused=True,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
        follow(shadow, parameters, kept_share(self.ema_decay, step, self.use_num_updates))


def _laid_out_like(parameter: Tensor, gradient: Tensor) -> Tensor:
    # The CPU kernel goes through memory in order and would mix up elements; autograd's gradients are never copied here.
    if gradient.stride() == parameter.stride():
        return gradient
    return torch.empty_like(parameter).copy_(gradient)
