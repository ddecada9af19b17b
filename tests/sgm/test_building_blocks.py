"""Layers and functions by the names under which networks of other projects import them."""

import pytest
import torch
from torch import nn

from sgm.errors import UserError
from sgm.modules.autoencoding.discriminators import weights_init
from sgm.modules.autoencoding.lpips.vqperceptual import adopt_weight, hinge_d_loss, vanilla_d_loss
from sgm.modules.autoencoding.regularizers.base import measure_perplexity
from sgm.modules.diffusionmodules.discretizer import LegacyDDPMDiscretization, generate_roughly_equally_spaced_steps
from sgm.modules.diffusionmodules.util import (
    avg_pool_nd,
    checkpoint,
    conv_nd,
    extract_into_tensor,
    linear,
    make_beta_schedule,
    normalization,
    scale_module,
    timestep_embedding,
    zero_module,
)
from sgm.modules.ema import LitEma


def test_layers():
    for dims, kind in ((1, nn.Conv1d), (2, nn.Conv2d), (3, nn.Conv3d)):
        layer = conv_nd(dims, 2, 4, 3, padding=1)
        assert isinstance(layer, kind) and layer(torch.zeros(1, 2, *[4] * dims)).shape == (1, 4, *[4] * dims)
        assert avg_pool_nd(dims, 2)(torch.ones(1, 2, *[4] * dims)).shape == (1, 2, *[2] * dims)
    for make in (conv_nd, avg_pool_nd):
        with pytest.raises(UserError, match="dims: 4 is not supported; use 1, 2 or 3"):
            make(4, 2)
    layer = linear(3, 2, bias=False)
    weight = layer.weight.detach().clone()
    assert torch.equal(scale_module(layer, 0.5).weight, 0.5 * weight)
    assert not zero_module(layer).weight.any()
    norm, x = normalization(64), torch.randn(2, 64, 3, 3)
    assert norm(x.bfloat16()).dtype == torch.bfloat16 and norm.num_groups == 32
    assert torch.equal(norm(x.bfloat16()), nn.functional.group_norm(x.bfloat16().float(), 32).bfloat16())


def test_recomputation_changes_no_gradient():
    layer, calls = nn.Linear(3, 3), []

    def run(x, y):
        calls.append(1)
        return layer(x).tanh() * y

    gradients = []
    for flag in (False, True):
        x, y = torch.ones(2, 3, requires_grad=True), torch.full((2, 3), 2.0, requires_grad=True)
        out = checkpoint(run, (x, y), layer.parameters(), flag)
        gradients.append(torch.autograd.grad(out.sum(), [x, y, *layer.parameters()]))
    assert len(calls) == 3
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


def test_schedules_and_steps():
    betas = make_beta_schedule("linear", 1000, 0.00085, 0.012)
    alphas = torch.from_numpy(1 - betas).cumprod(0)
    discretization = LegacyDDPMDiscretization()
    sigmas, steps = discretization.get_sigmas(10, "cpu", return_idx=True)
    assert torch.equal(steps, torch.from_numpy(generate_roughly_equally_spaced_steps(10, 1000)))
    assert torch.allclose(sigmas.flip(0).double(), ((1 - alphas) / alphas)[steps].sqrt(), rtol=1e-6)
    assert len(discretization.get_sigmas(10)) == 10
    with pytest.raises(UserError, match="schedule: 'cosine' is unknown"):
        make_beta_schedule("cosine", 10)
    assert extract_into_tensor(alphas, torch.tensor([3, 5]), (2, 3, 4, 4)).flatten().tolist() == alphas[[3, 5]].tolist()
    assert timestep_embedding(torch.tensor([3, 5]), 4, 10000, True).tolist() == [[3.0] * 4, [5.0] * 4]


def test_losses_and_measures():
    real, fake = torch.tensor([0.5, 2.0]), torch.tensor([-2.0, 0.25])
    assert hinge_d_loss(real, fake).item() == pytest.approx(0.5 * (0.25 + 0.625))
    expected = 0.5 * (torch.log1p((-real).exp()).mean() + torch.log1p(fake.exp()).mean())
    assert vanilla_d_loss(real, fake).item() == pytest.approx(expected.item())
    assert [adopt_weight(0.7, step, 3) for step in (2, 3, 4)] == [0.0, 0.7, 0.7]
    perplexity, used = measure_perplexity(torch.tensor([[0, 1], [1, 0]]), 8)
    assert perplexity.item() == pytest.approx(2.0) and used == 2
    torch.manual_seed(0)
    layer = nn.Conv2d(64, 64, 3)
    layer.apply(weights_init)
    assert 0.019 < layer.weight.std() < 0.021


def test_an_average_begins_anew():
    layer = nn.Linear(2, 2)
    average = LitEma(layer, 0.9)
    average(layer)
    average(layer)
    assert average.num_updates == 2
    average.reset_num_updates()
    assert average.num_updates == 0
