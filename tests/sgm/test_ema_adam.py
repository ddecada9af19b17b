"""Adam with averaged weights equals its formulas, PyTorch's Adam, and resumes."""

import copy

import pytest
import torch

from sgm.ema_adam import EmaAdam
from sgm.errors import UserError
from support import relative_error

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
SHAPES = [(33, 17), (5,), (64, 3, 2)]


def parameters(dtype: torch.dtype = torch.float32, device: str = "cpu") -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator).to(device, dtype)) for shape in SHAPES]


def gradients(step: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def train(optimizer: torch.optim.Optimizer, params: list[torch.nn.Parameter], steps: range) -> None:
    for step in steps:
        for parameter, gradient in zip(params, gradients(step), strict=True):
            parameter.grad = gradient.to(parameter)
        optimizer.step()


class Float64Adam:
    """The formulas of the papers, of one parameter, in float64."""

    def __init__(self, weight, lr, betas, eps, weight_decay, adam_w_mode, bias_correction, ema_decay, use_num_upates):
        self.p = weight.double()
        self.m, self.v, self.shadow = torch.zeros_like(self.p), torch.zeros_like(self.p), self.p.clone()
        self.lr, self.betas, self.eps, self.weight_decay = lr, betas, eps, weight_decay
        self.adam_w_mode, self.bias_correction = adam_w_mode, bias_correction
        self.ema_decay, self.use_num_upates = ema_decay, use_num_upates
        self.t = 0

    def step(self, gradient: torch.Tensor) -> None:
        self.t += 1
        beta1, beta2 = self.betas
        g = gradient.double() + (0 if self.adam_w_mode else self.weight_decay * self.p)
        self.m = beta1 * self.m + (1 - beta1) * g
        self.v = beta2 * self.v + (1 - beta2) * g**2
        corrections = (1 - beta1**self.t, 1 - beta2**self.t) if self.bias_correction else (1, 1)
        update = (self.m / corrections[0]) / ((self.v / corrections[1]).sqrt() + self.eps)
        self.p = self.p - self.lr * (update + (self.weight_decay * self.p if self.adam_w_mode else 0))
        decay = min(self.ema_decay, (1 + self.t) / (10 + self.t)) if self.use_num_upates else self.ema_decay
        self.shadow = decay * self.shadow + (1 - decay) * self.p


SETTINGS = {"lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-3, "weight_decay": 0.1, "ema_decay": 0.5}
VARIANTS = {
    "as configured": {},
    "no warm-up": {"use_num_upates": False},
    "no bias correction": {"bias_correction": False},
    "decay in the gradient": {"adam_w_mode": False},
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
def test_follows_the_formulas(changes, device):
    settings = {"adam_w_mode": True, "bias_correction": True, "use_num_upates": True, **SETTINGS, **changes}
    params = parameters(device=device)
    references = [Float64Adam(p.detach().cpu(), **settings) for p in params]
    optimizer = EmaAdam(params, **settings)
    for step in range(20):  # the decay of the averages warms up for the first 8
        train(optimizer, params, range(step, step + 1))
        for reference, gradient in zip(references, gradients(step), strict=True):
            reference.step(gradient)
    for parameter, reference in zip(params, references, strict=True):
        state = optimizer.state[parameter]
        expected = {"exp_avg": reference.m, "exp_avg_sq": reference.v, "shadow": reference.shadow}
        assert state["step"] == 20
        assert relative_error(parameter.cpu(), reference.p) < 1e-6
        for name, value in expected.items():
            assert relative_error(state[name].cpu(), value) < 1e-6, name


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_parameters(dtype, device):
    params = parameters(dtype, device)
    settings = {"adam_w_mode": True, "bias_correction": True, "use_num_upates": True, **SETTINGS}
    references = [Float64Adam(p.detach().cpu(), **settings) for p in params]
    optimizer = EmaAdam(params, **settings)
    train(optimizer, params, range(5))
    for step in range(5):
        for reference, gradient in zip(references, gradients(step), strict=True):
            reference.step(gradient.to(dtype))
    for parameter, reference in zip(params, references, strict=True):
        assert parameter.dtype == optimizer.state[parameter]["shadow"].dtype == dtype
        assert relative_error(parameter.cpu(), reference.p) < 4 * torch.finfo(dtype).eps
        assert relative_error(optimizer.state[parameter]["shadow"].cpu(), reference.shadow) < 4 * torch.finfo(dtype).eps


def test_weights_are_those_of_adamw():
    ours, theirs = parameters(), parameters()
    settings = {"lr": 0.01, "betas": (0.8, 0.99), "eps": 1e-8, "weight_decay": 0.05}
    train(EmaAdam(ours, **settings), ours, range(10))
    train(torch.optim.AdamW(theirs, **settings), theirs, range(10))
    for our, their in zip(ours, theirs, strict=True):
        assert relative_error(our, their) < 1e-6


def test_parameters_may_take_turns():
    """Calls with one parameter each, as under ZeRO-3, equal one call with all."""
    together, apart = parameters(), parameters()
    train(EmaAdam(together, **SETTINGS), together, range(6))
    optimizer = EmaAdam(apart, **SETTINGS)
    group = optimizer.param_groups[0]
    for step in range(6):
        for parameter, gradient in zip(apart, gradients(step), strict=True):
            group["params"] = [parameter]
            parameter.grad = gradient
            optimizer.step()
    for one, other in zip(together, apart, strict=True):
        assert torch.equal(one, other)
        assert optimizer.state[other]["step"] == 6


def test_a_parameter_without_gradient_is_left_alone():
    params = parameters()
    optimizer = EmaAdam(params, **SETTINGS)
    train(optimizer, params, range(2))
    before = copy.deepcopy([params[1].detach(), optimizer.state[params[1]]])
    params[1].grad = None
    optimizer.step()
    after = [params[1].detach(), optimizer.state[params[1]]]
    assert torch.equal(before[0], after[0])
    assert before[1]["step"] == after[1]["step"] == 2
    assert all(torch.equal(before[1][name], after[1][name]) for name in ("exp_avg", "exp_avg_sq", "shadow"))
    assert optimizer.state[params[0]]["step"] == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_resumed_run_is_the_same_to_the_bit(dtype, tmp_path):
    straight = parameters(dtype)
    whole = EmaAdam(straight, **SETTINGS)
    train(whole, straight, range(10))

    first = parameters(dtype)
    optimizer = EmaAdam(first, **SETTINGS)
    train(optimizer, first, range(5))
    torch.save({"weights": [p.data for p in first], "optimizer": optimizer.state_dict()}, tmp_path / "state.pt")
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    resumed = [torch.nn.Parameter(weight) for weight in saved["weights"]]
    optimizer = EmaAdam(resumed, **SETTINGS)
    optimizer.load_state_dict(saved["optimizer"])
    train(optimizer, resumed, range(5, 10))

    for one, other in zip(straight, resumed, strict=True):
        assert torch.equal(one, other)
        for name, value in whole.state[one].items():
            found = optimizer.state[other][name]
            assert torch.equal(found, value) if isinstance(value, torch.Tensor) else found == value, name


def test_gradients_laid_out_otherwise_in_memory():
    """A gradient need not have its parameter's strides."""
    ours, theirs = parameters(), parameters()
    train(EmaAdam(theirs, **SETTINGS), theirs, range(1))
    optimizer = EmaAdam(ours, **SETTINGS)
    for parameter, gradient in zip(ours, gradients(0), strict=True):
        parameter.grad = gradient.transpose(0, -1).contiguous().transpose(0, -1)
    optimizer.step()
    for our, their in zip(ours, theirs, strict=True):
        assert torch.equal(our, their)


@pytest.mark.parametrize("set_grad_none", [True, False])
def test_zero_grad(set_grad_none):
    params = parameters()
    optimizer = EmaAdam(params, set_grad_none=set_grad_none)
    train(optimizer, params, range(1))
    optimizer.zero_grad()
    if set_grad_none:
        assert all(parameter.grad is None for parameter in params)
    else:
        assert [parameter.grad.abs().max().item() for parameter in params] == [0.0] * len(params)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"amsgrad": True}, "amsgrad"),
        ({"ema_decay": 1.0}, "ema_decay: got 1.0"),
        ({"betas": (0.9, 1.0)}, r"betas\[1\]: got 1.0"),
        ({"lr": -1.0}, "lr: got -1.0"),
    ],
)
def test_what_it_refuses(settings, message):
    with pytest.raises(UserError, match=message):
        EmaAdam(parameters(), **settings)
    with pytest.raises(UserError, match="float64"):
        EmaAdam([torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))])
