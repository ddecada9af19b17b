"""Muon moves matrices along orthogonal directions and vectors like PyTorch's Adam."""

import pytest
import torch
from torch import nn

from seeded import seeded_input
from sgm.errors import UserError
from sgm.muon import Muon, orthogonalize


@pytest.mark.parametrize("shape", [(6, 40), (40, 6), (16, 16)], ids=["wide", "tall", "square"])
def test_orthogonalized_matrices_keep_their_singular_vectors(shape):
    matrix = seeded_input("matrix", shape, 0).double()
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    inside = u.mT @ orthogonalize(matrix).double() @ vh.mT  # diagonal, if the vectors are the same
    assert torch.allclose(inside, inside.diag().diag(), atol=1e-4)
    largest = inside.diag()[: min(shape) // 2]
    assert (largest - 0.95).abs().max() < 0.35


def test_the_iteration_on_the_gram_matrix_is_that_on_the_matrix():
    matrix = seeded_input("matrix", (12, 30), 0).double()
    x = matrix / matrix.norm()
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x - 4.7750 * gram @ x + 2.0315 * gram @ gram @ x
    assert torch.allclose(orthogonalize(matrix).double(), x, atol=1e-5)


def test_zero_stays_zero():
    assert not orthogonalize(torch.zeros(4, 7)).any()


def test_autocast_does_not_touch_the_iteration():
    matrix = seeded_input("matrix", (12, 30), 0)
    expected = orthogonalize(matrix)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(orthogonalize(matrix), expected)


def test_the_moving_average_follows_every_parameter():
    parameters = [nn.Parameter(seeded_input("weight", (4, 6), 0)), nn.Parameter(seeded_input("bias", (4,), 0))]
    averages = [p.detach().clone() for p in parameters]
    optimizer = Muon(parameters, lr=0.1, ema_decay=0.3)
    for step in range(1, 5):
        for p in parameters:
            p.grad = seeded_input(f"gradient {step}", tuple(p.shape), 0)
        optimizer.step()
        decay = min(0.3, (1 + step) / (10 + step))
        averages = [decay * average + (1 - decay) * p.detach() for average, p in zip(averages, parameters, strict=True)]
    for p, average in zip(parameters, averages, strict=True):
        assert torch.allclose(optimizer.state[p]["shadow"], average, atol=1e-6)


def test_the_first_step_of_a_kernel_is_that_of_its_matrix():
    kernel = nn.Parameter(seeded_input("kernel", (8, 4, 3, 3, 3), 0))
    start = kernel.detach().clone()
    kernel.grad = seeded_input("gradient", tuple(kernel.shape), 0)
    Muon([kernel], lr=0.1).step()
    expected = start - 0.1 * orthogonalize(kernel.grad.flatten(1)).view_as(kernel)
    assert torch.allclose(kernel, expected, atol=1e-5)


def test_untrained_taps_stay_as_they_are():
    """Taps without a gradient get no update, so that images can train one tap alone."""
    kernel = nn.Parameter(seeded_input("kernel", (8, 4, 3, 3, 3), 0))
    start = kernel.detach().clone()
    optimizer = Muon([kernel], lr=0.1)
    for step in range(3):
        kernel.grad = seeded_input(f"gradient {step}", tuple(kernel.shape), 0)
        kernel.grad[:, :, :-1] = 0
        optimizer.step()
    assert torch.equal(kernel[:, :, :-1], start[:, :, :-1])
    assert not torch.equal(kernel[:, :, -1], start[:, :, -1])


def test_vectors_step_as_by_adam():
    ours, theirs = (nn.Parameter(seeded_input("bias", (9,), 0)) for _ in range(2))
    optimizers = [Muon([ours], lr=0.2, adam_lr_factor=0.05), torch.optim.Adam([theirs], lr=0.01, betas=(0.9, 0.99))]
    for step in range(5):
        for parameter, optimizer in zip((ours, theirs), optimizers, strict=True):
            parameter.grad = seeded_input(f"gradient {step}", (9,), 0)
            optimizer.step()
    assert torch.allclose(ours, theirs, atol=1e-6)


def test_weight_decay_shrinks_matrices():
    weight = nn.Parameter(torch.ones(3, 3))
    weight.grad = torch.zeros(3, 3)
    Muon([weight], lr=0.1, weight_decay=0.5).step()
    assert torch.allclose(weight, torch.full((3, 3), 0.95))


def test_a_run_that_is_stored_goes_on_to_the_bit():
    def train(network: nn.Module, optimizer: Muon, steps: range) -> None:
        for step in steps:
            optimizer.zero_grad()
            network(seeded_input(f"x {step}", (4, 5), 0)).square().sum().backward()
            optimizer.step()

    def build() -> tuple[nn.Module, Muon]:
        torch.manual_seed(0)
        network = nn.Linear(5, 3)
        return network, Muon(network.parameters())

    whole, optimizer = build()
    train(whole, optimizer, range(6))
    first, optimizer = build()
    train(first, optimizer, range(3))
    second, resumed = build()
    second.load_state_dict(first.state_dict())
    resumed.load_state_dict(optimizer.state_dict())
    train(second, resumed, range(3, 6))
    for name, weight in whole.state_dict().items():
        assert torch.equal(second.state_dict()[name], weight)


def test_it_learns():
    network = nn.Sequential(nn.Linear(6, 32), nn.SiLU(), nn.Linear(32, 6))
    for name, parameter in network.named_parameters():
        parameter.data = 0.3 * seeded_input(name, tuple(parameter.shape), 0)
    x, y = seeded_input("x", (64, 6), 0), seeded_input("y", (64, 6), 0).tanh()
    optimizer = Muon(network.parameters(), lr=0.02)
    losses = []
    for _ in range(100):
        optimizer.zero_grad()
        loss = (network(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] / 3


@pytest.mark.parametrize(
    ("settings", "named"), [({"lr": -1}, "lr"), ({"momentum": 1.0}, "momentum"), ({"betas": (0.9, 2)}, r"betas\[1\]")]
)
def test_settings_out_of_range(settings, named):
    with pytest.raises(UserError, match=named):
        Muon([nn.Parameter(torch.ones(2))], **settings)
