"""Distributions of latents against PyTorch's own."""

import torch
from torch.distributions import Normal, kl_divergence

from sgm.modules.distributions.distributions import DiagonalGaussianDistribution, DiracDistribution, normal_kl
from support import assert_close


def normals(moments: torch.Tensor) -> Normal:
    mean, log_variance = moments.chunk(2, dim=1)
    return Normal(mean, (0.5 * log_variance).exp())


def test_a_posterior_has_the_moments_densities_and_divergences_of_its_normals():
    torch.manual_seed(0)
    moments, others = torch.randn(2, 8, 3, 4), torch.randn(2, 8, 3, 4)
    posterior, other = DiagonalGaussianDistribution(moments), DiagonalGaussianDistribution(others)
    p, q = normals(moments), normals(others)
    assert_close(posterior.std, p.stddev, 1e-6)
    assert_close(posterior.var, p.variance, 1e-6)
    assert posterior.logvar is posterior.log_variance and posterior.parameters is moments
    assert_close(posterior.kl(other), kl_divergence(p, q).flatten(1).sum(1), 1e-5)
    assert_close(posterior.kl(), kl_divergence(p, Normal(0.0, 1.0)).flatten(1).sum(1), 1e-5)
    sample = posterior.sample()
    assert_close(posterior.nll(sample), -p.log_prob(sample).sum((1, 2, 3)), 1e-5)
    assert_close(posterior.nll(sample, dims=[1]), -p.log_prob(sample).sum(1), 1e-5)
    assert_close(normal_kl(p.mean, p.variance.log(), 0.0, 0.0), kl_divergence(p, Normal(0.0, 1.0)), 1e-4)


def test_without_a_variance():
    posterior = DiagonalGaussianDistribution(torch.randn(2, 8, 3, 4), deterministic=True)
    assert torch.equal(posterior.sample(), posterior.mean)
    assert not posterior.std.any() and not posterior.var.any()
    assert posterior.kl().tolist() == posterior.nll(posterior.mean).tolist() == [0, 0]
    value = torch.ones(2)
    assert DiracDistribution(value).sample() is value is DiracDistribution(value).mode()
