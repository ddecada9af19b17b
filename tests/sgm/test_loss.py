"""The training losses equal formulas; their random numbers follow process groups."""

import math

import pytest
import torch
import torch.distributed as dist

from distributed import run_distributed
from sgm.errors import UserError
from sgm.modules.diffusionmodules import sigma_sampling
from sgm.modules.diffusionmodules.discretizer import LegacyDDPMDiscretization, ZeroSNRDDPMDiscretization
from sgm.modules.diffusionmodules.loss import StandardDiffusionLoss, VideoDiffusionLoss
from sgm.modules.diffusionmodules.sigma_sampling import (
    DiscreteSampling,
    EDMSampling,
    LogitNormalSampling,
    PartialDiscreteSampling,
)
from sgm.randomness import per_sample
from sgm.util import instantiate_from_config
from support import Reference, assert_close

MODULES = "sgm.modules.diffusionmodules"
CASE = Reference("engine/t2v_2b").case["model"]
ZERO_SNR = {"target": f"{MODULES}.discretizer.ZeroSNRDDPMDiscretization", "params": {"shift_scale": 3.0}}
LEGACY = {"target": f"{MODULES}.discretizer.LegacyDDPMDiscretization"}
EDM_LEVELS = {"target": f"{MODULES}.sigma_sampling.EDMSampling"}
SHAPE = (3, 2, 4, 5, 6)


def discrete(discretization=ZERO_SNR, **params):
    params = {"num_idx": 1000, "discretization_config": discretization, **params}
    return {"target": f"{MODULES}.sigma_sampling.DiscreteSampling", "params": params}


def conditioner(batch):
    """Draw random numbers, as a conditioner with dropout does."""
    return {"crossattn": torch.bernoulli(torch.full((len(batch["txt"]), 1, 1), 0.9))}


class LinearNetwork(torch.nn.Module):
    """θ·x, keeping what it was called with."""

    def __init__(self):
        super().__init__()
        self.theta = torch.nn.Parameter(torch.tensor(0.7))

    def forward(self, x, t, cond, **model_inputs):
        self.seen = {"x": x, "t": t, "cond": cond, **model_inputs}
        return self.theta * x


def draw(clean):
    """Return the random numbers of a video loss, in their order: dropout, timesteps, noise."""
    conditioner({"txt": [""] * len(clean)})
    return torch.randint(0, 1000, (len(clean),)), torch.randn(clean.shape)


def video_loss(seed=0, clean=None, batch=None, **params):
    """Return the released configuration's loss on a linear network: (loss, clean, network)."""
    loss_fn = VideoDiffusionLoss(**{"sigma_sampler_config": discrete(), **params})
    denoiser, network = instantiate_from_config(CASE["denoiser_config"]), LinearNetwork()
    clean = torch.randn(SHAPE, generator=torch.Generator().manual_seed(9)) if clean is None else clean
    torch.manual_seed(seed)
    loss = loss_fn(network, denoiser, conditioner, clean, {"txt": [""] * len(clean), **(batch or {})})
    return loss, clean, network


@pytest.mark.parametrize("min_snr_value", [None, 5.0])
def test_video_loss_and_its_gradient(min_snr_value):
    """mean(w·(D − x0)²) with D = a·x − s·θ·x, w = 1/s² or at most min_snr_value.

    ∂/∂θ is computed by hand too.
    """
    loss, clean, network = video_loss(min_snr_value=min_snr_value)
    loss.sum().backward()

    torch.manual_seed(0)
    idx, noise = draw(clean)
    a = ZeroSNRDDPMDiscretization(shift_scale=3.0)(1000, do_append_zero=False, flip=True)[idx].double()
    s, w = (1 - a**2).sqrt(), 1 / (1 - a**2)
    w = w if min_snr_value is None else w.clamp(max=min_snr_value)
    expected, gradient = [], 0.0
    for i in range(len(clean)):
        x = a[i] * clean[i] + s[i] * noise[i]
        difference = (a[i] - s[i] * 0.7) * x - clean[i]
        expected.append(w[i] * difference.square().mean())
        gradient += w[i] * (2 * difference * -s[i] * x).mean()
    assert loss.shape == (3,) and loss.dtype == torch.float32
    assert_close(loss, torch.stack(expected), 2e-5)
    assert_close(network.theta.grad, gradient, 2e-5)
    assert torch.equal(network.seen["t"], idx) and torch.equal(network.seen["idx"], idx)


def test_the_configured_loss_builds():
    assert isinstance(instantiate_from_config(CASE["loss_fn_config"]), VideoDiffusionLoss)


def test_perfect_network_has_no_loss():
    """A network that predicts v = a·ε − s·x0 exactly leaves an error of rounding only."""
    loss_fn = VideoDiffusionLoss(discrete())
    clean = torch.randn(SHAPE)
    torch.manual_seed(4)
    idx, noise = draw(clean)
    a = ZeroSNRDDPMDiscretization(shift_scale=3.0)(1000, do_append_zero=False, flip=True)[idx].reshape(-1, 1, 1, 1, 1)

    def network(x, t, cond, **model_inputs):
        return a * noise - (1 - a**2).sqrt() * clean

    torch.manual_seed(4)
    loss = loss_fn(network, instantiate_from_config(CASE["denoiser_config"]), conditioner, clean, {"txt": [""] * 3})
    assert loss.max() < 1e-8


def test_low_precision_latents_are_noised_in_float32():
    exact, clean, _ = video_loss(clean=torch.randn(SHAPE).bfloat16().float())
    loss, _, network = video_loss(clean=clean.bfloat16())
    assert torch.equal(loss, exact) and network.seen["x"].dtype == torch.float32


def test_entries_of_the_batch_reach_the_network():
    image = torch.randn(SHAPE)
    batch = {"concat_images": image, "fps": torch.ones(3), "other": torch.zeros(3)}
    _, _, network = video_loss(batch=batch, batch2model_keys=["fps"])
    assert network.seen["cond"]["concat"] is image
    assert network.seen["fps"] is batch["fps"] and "other" not in network.seen


def test_offset_noise_is_constant_over_a_channel():
    """The offset shifts each channel of a sample by level·N(0, 1), drawn after the noise."""
    _, clean, plain = video_loss()
    _, _, offset = video_loss(offset_noise_level=0.5)
    torch.manual_seed(0)
    idx, _ = draw(clean)
    a = ZeroSNRDDPMDiscretization(shift_scale=3.0)(1000, do_append_zero=False, flip=True)[idx].reshape(-1, 1, 1, 1, 1)
    shift = (offset.seen["x"] - plain.seen["x"]) / (1 - a**2).sqrt()
    assert_close(shift, 0.5 * torch.randn(3, 1, 4, 1, 1).expand(SHAPE), 1e-4)


@pytest.mark.parametrize("sampling", [EDM_LEVELS, discrete(LEGACY)])
@pytest.mark.parametrize("kind", ["l2", "l1"])
def test_standard_loss(sampling, kind):
    """mean(w(σ)·|D(x0 + σε) − x0|^p), for images and videos alike."""
    weighting = {"target": f"{MODULES}.denoiser_weighting.EDMWeighting"}
    scaling = {"target": f"{MODULES}.denoiser_scaling.EpsScaling"}
    denoiser_config = {"weighting_config": weighting, "scaling_config": scaling}
    denoiser = instantiate_from_config({"target": f"{MODULES}.denoiser.Denoiser", "params": denoiser_config})
    clean = torch.randn(3, 4, 5, 6)
    torch.manual_seed(0)
    loss = StandardDiffusionLoss(sampling, type=kind)(LinearNetwork(), denoiser, conditioner, clean, {"txt": [""] * 3})

    torch.manual_seed(0)
    conditioner({"txt": [""] * 3})
    if sampling is EDM_LEVELS:
        sigma = (-1.2 + 1.2 * torch.randn(3)).exp()
    else:
        table = LegacyDDPMDiscretization()(1000, do_append_zero=False, flip=True)
        sigma = table[torch.randint(0, 1000, (3,))]
    noise = torch.randn(clean.shape)
    for i, s in enumerate(sigma):
        x = clean[i] + s * noise[i]
        difference = x - s * 0.7 * x / (s**2 + 1).sqrt() - clean[i]
        error = difference.square() if kind == "l2" else difference.abs()
        assert_close(loss[i], (s**2 + 0.25) / (0.5 * s) ** 2 * error.mean(), 1e-5)


def test_edm_sampling():
    """log σ ~ N(p_mean, p_std²)."""
    torch.manual_seed(0)
    log_sigma = EDMSampling(p_mean=-3.0, p_std=0.5)(20000).log()
    assert abs(log_sigma.mean() + 3.0) < 0.02 and abs(log_sigma.std() - 0.5) < 0.02
    assert_close(EDMSampling()(1, rand=torch.tensor([2.0])), torch.tensor([1.2]).exp(), 1e-6)


def test_discrete_sampling_is_uniform_and_takes_given_indices():
    sampler = DiscreteSampling(ZERO_SNR, num_idx=1000)
    torch.manual_seed(0)
    levels, idx = sampler(50000, return_idx=True)
    assert idx.min() == 0 and idx.max() == 999
    assert torch.histc(idx.float(), 10).min() > 4700
    assert torch.equal(levels, sampler.levels[idx])
    assert sampler(2, rand=torch.tensor([0, 999])).tolist() == [sampler.levels[0].item(), 0.0]


@pytest.mark.parametrize("flip", [True, False])
def test_partial_sampling_draws_the_first_levels_of_the_whole_table(flip):
    """The first 250 indices are drawn evenly, with the levels of the table of 1000."""
    sampler = PartialDiscreteSampling(ZERO_SNR, 1000, 250, False, flip)
    whole = DiscreteSampling(ZERO_SNR, num_idx=1000, flip=flip)
    torch.manual_seed(0)
    levels, idx = sampler(20000, return_idx=True)
    assert idx.min() == 0 and idx.max() == 249 and torch.histc(idx.float(), 10).min() > 1800
    assert torch.equal(levels, whole.levels[idx]) and torch.equal(sampler.idx_to_sigma(idx), levels)
    if flip:  # the cleanest
        assert levels.min() > whole.levels[250]
    else:
        assert levels.max() < whole.levels[250]


def test_partial_sampling_in_a_loss_and_over_processes(monkeypatch):
    config = {
        "target": f"{MODULES}.sigma_sampling.PartialDiscreteSampling",
        "params": {"discretization_config": ZERO_SNR, "total_num_idx": 1000, "partial_num_idx": 300},
    }
    seen = []

    def denoiser(network, x, alpha, cond, idx):
        seen.append(idx)
        return x

    loss = VideoDiffusionLoss(config)
    loss(None, denoiser, lambda batch: {}, torch.zeros(500, 1, 2, 3, 3), {})
    assert 250 < seen[0].max() < 300

    sampler = PartialDiscreteSampling(ZERO_SNR, 1000, 300, uniform_sampling=True)
    monkeypatch.setattr(sigma_sampling, "group_size", lambda group: 3)
    monkeypatch.setattr(sigma_sampling, "group_rank", lambda group: 2)
    assert sampler.index_range() == (200, 300)
    for wrong in (0, 1001):
        with pytest.raises(UserError, match=f"partial_num_idx: got {wrong}; expected 1 to total_num_idx, 1000"):
            PartialDiscreteSampling(ZERO_SNR, 1000, wrong)


def test_levels_are_undivided_within_a_block(monkeypatch):
    monkeypatch.setattr(sigma_sampling, "group_size", lambda group: 4 if group else 1)
    monkeypatch.setattr(sigma_sampling, "group_rank", lambda group: 1 if group else 0)
    loss = VideoDiffusionLoss(discrete(uniform_sampling=True))
    assert loss.sigma_sampler.index_range() == (0, 1000)
    loss.set_parallel_groups(data_parallel="four")
    assert loss.sigma_sampler.index_range() == (250, 500)
    with pytest.raises(ValueError, match="within"), sigma_sampling.undivided(loss.sigma_sampler):
        assert loss.sigma_sampler.index_range() == (0, 1000)
        raise ValueError("within")
    assert loss.sigma_sampler.index_range() == (250, 500)


@pytest.mark.parametrize("uniform_share", [0.0, 0.3, 1.0])
def test_logit_normal_sampling(uniform_share):
    """Quartiles of a normal are 0.6745 standard deviations from its mean.

    The other samples are uniform.
    """
    sampler = LogitNormalSampling(ZERO_SNR, num_idx=1000, loc=1.0, scale=0.5, uniform_share=uniform_share)
    torch.manual_seed(0)
    levels, idx = sampler(100000, return_idx=True)
    assert torch.equal(levels, sampler.levels[idx]) and idx.min() >= 0 and idx.max() <= 999
    for quartile, z in ((0.25, -0.6745), (0.5, 0.0), (0.75, 0.6745)):
        t = 1 / (1 + math.exp(-(1.0 + 0.5 * z)))
        expected = uniform_share * t + (1 - uniform_share) * quartile
        assert abs((idx < 1000 * t).float().mean() - expected) < 0.005
    if uniform_share:
        assert idx.min() == 0 and idx.max() == 999


def test_processes_share_a_logit_normal_out(monkeypatch):
    """Each process draws from an equal part of the distribution, together from all of it."""
    sampler = LogitNormalSampling(ZERO_SNR, num_idx=1000, loc=1.0, scale=0.5, uniform_sampling=True)
    torch.manual_seed(0)
    monkeypatch.setattr(sigma_sampling, "group_size", lambda group: 2)
    drawn = []
    for rank in range(2):
        monkeypatch.setattr(sigma_sampling, "group_rank", lambda group, rank=rank: rank)
        drawn.append(sampler(2000, return_idx=True)[1])
    median = 1000 / (1 + math.exp(-1.0))
    assert drawn[0].max() <= median + 1 and median - 1 <= drawn[1].min()


def test_logit_normal_mistakes():
    for mistake in ({"scale": 0.0}, {"uniform_share": 1.5}):
        with pytest.raises(UserError, match="scale must be positive and uniform_share between 0 and 1"):
            LogitNormalSampling(ZERO_SNR, num_idx=1000, **mistake)


@pytest.mark.parametrize(("processes", "group_num", "groups"), [(8, 0, 8), (16, 0, 8), (3, 0, 1), (8, 4, 4), (1, 0, 1)])
def test_uniform_sampling_stratifies_over_processes(monkeypatch, processes, group_num, groups):
    """Equal numbers of processes draw from each of `groups` shares; together uniformly."""
    sampler = DiscreteSampling(ZERO_SNR, num_idx=1000, uniform_sampling=True, group_num=group_num)
    torch.manual_seed(0)
    drawn = []
    for rank in range(processes):
        monkeypatch.setattr(sigma_sampling, "group_rank", lambda group, rank=rank: rank)
        monkeypatch.setattr(sigma_sampling, "group_size", lambda group: processes)
        _, idx = sampler(2000, return_idx=True)
        group, width = rank * groups // processes, 1000 // groups
        assert group * width <= idx.min() and idx.max() < (group + 1) * width
        assert idx.min() < (group + 0.05) * width and idx.max() > (group + 0.95) * width
        drawn.append(idx)
    if groups > 1:
        assert abs(torch.cat(drawn).float().mean() - 499.5) < 5


def test_impossible_number_of_groups(monkeypatch):
    sampler = DiscreteSampling(ZERO_SNR, num_idx=1000, uniform_sampling=True, group_num=3)
    monkeypatch.setattr(sigma_sampling, "group_size", lambda group: 8)
    with pytest.raises(UserError, match="group_num is 3, but it must divide both the 8 data-parallel processes"):
        sampler(1)


def losses_with_and_without_a_group():
    """Return this process's losses with and without a model-parallel group, and timesteps."""
    loss_fn = VideoDiffusionLoss(discrete(uniform_sampling=True))
    clean = torch.zeros(2, 1, 2, 3, 3)

    def denoiser(network, x, alpha, cond, idx):
        return x + (alpha + idx).reshape(-1, 1, 1, 1, 1)

    losses = []
    for group in (None, dist.group.WORLD):
        torch.manual_seed(dist.get_rank())
        loss_fn.set_parallel_groups(model_parallel=group)
        losses.append(loss_fn(None, denoiser, lambda batch: {}, clean, {}).tolist())
    loss_fn.set_parallel_groups(data_parallel=dist.group.WORLD)
    return *losses, loss_fn.sigma_sampler.index_range()


@pytest.mark.distributed
@pytest.mark.slow
def test_processes_share_what_their_groups_say():
    """A model-parallel group shares noise and timesteps; a data-parallel one splits them."""
    (alone0, shared0, range0), (alone1, shared1, range1) = run_distributed(losses_with_and_without_a_group, 2)
    assert shared0 == shared1 and alone0 != alone1
    assert (range0, range1) == ((0, 500), (500, 1000))


def test_fixed_frames_are_clean_and_count_for_nothing():
    """Fixed frames are clean, do not count in the error, and have no gradient."""
    clean, seen = torch.randn(2, 4, 3, 2, 2), []
    clean.requires_grad_()

    def denoiser(network, x, alpha, cond, **model_inputs):
        seen.append((x, alpha))
        return 0.5 * x

    torch.manual_seed(0)
    loss = VideoDiffusionLoss(discrete(), fixed_frames=2)(None, denoiser, lambda batch: {}, clean, {})
    x, alpha = seen[0]
    assert torch.equal(x[:, :2], clean[:, :2])
    weight = 1 / (1 - alpha**2)
    assert_close(loss, weight * (0.5 * x - clean)[:, 2:].square().flatten(1).mean(1), 1e-5)
    (gradient,) = torch.autograd.grad(loss.sum(), clean)
    assert gradient[:, :2].abs().max() == 0 < gradient[:, 2:].abs().min()

    torch.manual_seed(0)
    VideoDiffusionLoss(discrete())(None, denoiser, lambda batch: {}, clean, {})
    assert torch.equal(seen[1][0][:, 2:], x[:, 2:]), "the noise of the others is that without fixed frames"


def test_the_number_of_fixed_frames_is_drawn_by_weight():
    loss = VideoDiffusionLoss(discrete(), fixed_frames={0: 1, 2: 3, 3: 0})
    clean = torch.zeros(400, 4, 1, 1, 1)
    torch.manual_seed(0)
    free = loss.free_frames(clean)[:, :, 0, 0, 0]
    counts = [int((free.sum(1) == number).sum()) for number in (4, 3, 2, 1)]
    assert counts[1] == counts[3] == 0 and sum(counts) == 400 and abs(counts[0] - 100) < 30
    assert torch.equal(free[:, 3], torch.ones(400, dtype=torch.bool))
    with per_sample(range(400)):
        first = loss.free_frames(clean)
    with per_sample(range(200)):
        assert torch.equal(loss.free_frames(clean[:200]), first[:200])


def test_loss_mistakes():
    for value in (-1, 1.5, "two", {}, {2: -1}, {2: 0}, {"2": 1}, True):
        with pytest.raises(UserError, match=r"fixed_frames: got .*; expected a number of latent frames"):
            VideoDiffusionLoss(discrete(), fixed_frames=value)
    free = VideoDiffusionLoss(discrete(), fixed_frames=4).free_frames(torch.zeros(1, 3, 1, 1, 1))
    assert free.flatten().tolist() == [False, False, True], "a clip too short learns its last frame"
    with pytest.raises(UserError, match="does not support block_scale"):
        VideoDiffusionLoss(discrete(), block_scale=0.5)
    with pytest.raises(UserError, match="type: got 'lpips'"):
        StandardDiffusionLoss(EDM_LEVELS, type="lpips")
    VideoDiffusionLoss(discrete(), fixed_frames=0, block_scale=None, block_size=None, offset_noise_level=0)
