"""Quantizers give their codes with straight-through gradients, and agree over processes."""

import itertools
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from distributed import run_distributed
from sgm.errors import UserError
from sgm.modules.autoencoding.regularizers import (
    FSQ,
    LFQ,
    AbstractRegularizer,
    DiagonalGaussianRegularizer,
    EMAVectorQuantizer,
    IdentityRegularizer,
    VectorQuantizer,
)
from sgm.util import get_obj_from_str, instantiate_from_config
from support import assert_close
from vae_modules.autoencoder import VideoAutoencoderInferenceWrapper

ROOT = Path(__file__).parents[2]
MODULE = "sgm.modules.autoencoding.regularizers"
QUANTIZERS = {
    "VQ": {"target": f"{MODULE}.quantize.VectorQuantizer", "params": {"n_e": 32, "e_dim": 4}},
    "EMA": {"target": f"{MODULE}.quantize.EMAVectorQuantizer", "params": {"n_embed": 32, "embedding_dim": 4}},
    "FSQ": {"target": f"{MODULE}.finite_scalar_quantization.FSQ", "params": {"levels": [8, 5, 5, 4]}},
    "FSQ projected": {"target": f"{MODULE}.FSQ", "params": {"levels": [5, 7], "dim": 4, "num_codebooks": 3}},
    "LFQ": {"target": f"{MODULE}.lookup_free_quantization.LFQ", "params": {"dim": 4}},
    "LFQ projected": {"target": f"{MODULE}.LFQ", "params": {"dim": 4, "codebook_size": 128}},
}
SHAPES = [(6, 4), (2, 4, 3, 5), (2, 4, 3, 2, 3)]


@pytest.fixture(autouse=True)
def seed_and_one_thread():
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=QUANTIZERS)
def quantizer(request):
    return instantiate_from_config(QUANTIZERS[request.param]).eval()


# ---------------------------------------------------------------- what all quantizers promise


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_latents_are_what_their_tokens_stand_for(quantizer, shape):
    """In every layout: forward, and tokens and back, give the same latents, bit for bit."""
    z = torch.randn(shape)
    latent, log = quantizer(z)
    tokens = quantizer.encode_indices(z)
    assert latent.shape == z.shape and torch.isfinite(latent).all()
    assert tokens.dtype == torch.int64 and tokens.shape[: len(shape) - 1] == (shape[0], *shape[2:])
    assert tokens.min() >= 0 and tokens.max() < quantizer.codebook_size
    assert torch.equal(quantizer.decode_indices(tokens), latent)
    assert all(value.shape == () for value in log.values())


def test_usage_is_that_of_the_batch(quantizer):
    z = torch.randn(2, 4, 3, 5)
    _, log = quantizer(z)
    tokens = quantizer.encode_indices(z).flatten()
    shares = torch.unique(tokens, return_counts=True)[1] / len(tokens)
    assert_close(log["perplexity"], (-(shares * shares.log()).sum()).exp(), 1e-5)
    assert_close(log["codebook_use"], torch.tensor(len(shares) / quantizer.codebook_size), 1e-6)


@pytest.mark.parametrize("name", ["VQ", "EMA", "LFQ"])
def test_gradient_passes_straight_through(name):
    quantizer = instantiate_from_config(QUANTIZERS[name])
    z, upstream = torch.randn(2, 4, 2, 3, 3, requires_grad=True), torch.randn(2, 4, 2, 3, 3)
    (quantizer(z)[0] * upstream).sum().backward()
    assert torch.equal(z.grad, upstream)


def test_fsq_gradient_is_that_of_its_bound():
    """Levels are bounded by a tanh, whose slope is the gradient: for 5 levels 1.001 tanh."""
    z, upstream = torch.randn(2, 2, 3, 3, requires_grad=True), torch.randn(2, 2, 3, 3)
    (FSQ([5, 5])(z)[0] * upstream).sum().backward()
    assert_close(z.grad, upstream * 1.001 * (1 - z.tanh().square()), 1e-5)


def test_precision_is_float32_inside(quantizer):
    """Low-precision latents keep their dtype, penalties are float32, also under autocast."""
    z = torch.randn(3, 4, 5)
    with torch.autocast("cpu", torch.bfloat16):
        latent, log = quantizer(z.bfloat16())
    assert latent.dtype == torch.bfloat16 and all(value.dtype == torch.float32 for value in log.values())
    cast, log = quantizer.bfloat16()(z.bfloat16())
    assert cast.dtype == torch.bfloat16 and all(value.dtype == torch.float32 for value in log.values())
    assert torch.equal(quantizer.decode_indices(quantizer.encode_indices(z.bfloat16())).to(cast), cast)


def test_another_number_of_channels_is_refused(quantizer):
    with pytest.raises(UserError, match="the encoder has 5 channels; expected 4"):
        quantizer(torch.zeros(1, 5, 2))


# ---------------------------------------------------------------- each one's own codes


def test_nearest_code_by_brute_force():
    for quantizer in (VectorQuantizer(20, 3), EMAVectorQuantizer(20, 3).eval()):
        z = 0.05 * torch.randn(4, 3, 7)
        codebook = quantizer.decode_indices(torch.arange(20))
        distances = (z.movedim(1, -1)[..., None, :] - codebook).square().sum(-1)
        assert torch.equal(quantizer.encode_indices(z), distances.argmin(-1))


def test_vq_loss_and_its_gradients():
    """By hand: one code at 0 (the nearest to both vectors), one far away; beta = 1/4."""
    quantizer = VectorQuantizer(2, 1, beta=0.25)
    with torch.no_grad():
        quantizer.embedding.weight.copy_(torch.tensor([[0.0], [9.0]]))
    z = torch.tensor([[1.0], [3.0]], requires_grad=True)
    _, log = quantizer(z)
    assert log["vq_loss"].item() == pytest.approx(1.25 * 5.0)
    log["vq_loss"].backward()
    assert torch.equal(z.grad, 0.25 * z.detach())  # 2 (z - e) / 2
    assert torch.equal(quantizer.embedding.weight.grad, torch.tensor([[-4.0], [0.0]]))
    assert [p is quantizer.embedding.weight for p in quantizer.get_trainable_parameters()] == [True]


@pytest.mark.parametrize("levels", [[5, 7], [8, 6], [3, 4, 5]], ids=str)
def test_fsq_codes_are_exactly_on_their_grid(levels):
    """Every level occurs, and no value lies between."""
    latent, log = FSQ(levels)(torch.linspace(-6, 6, 999).repeat(len(levels), 1).T)
    for channel, count in zip(latent.T, levels, strict=True):
        grid = (torch.arange(count) - count // 2) / (count // 2)
        assert torch.equal(channel.unique(), grid)
    assert list(log) == ["perplexity", "codebook_use"]


def test_lfq_codes_are_exactly_signs():
    latent, _ = LFQ(6)(3 * torch.randn(5, 6, 8))
    assert torch.equal(latent.unique(), torch.tensor([-1.0, 1.0]))
    tokens = torch.arange(8)
    assert LFQ(3).decode_indices(tokens).tolist() == [list(code) for code in itertools.product([-1, 1], repeat=3)]


@pytest.mark.parametrize("bits", [1, 5])
def test_lfq_entropies_are_those_of_the_whole_table(bits):
    """Values and gradients agree with softmax over all codes."""
    quantizer = LFQ(bits, inv_temperature=1.5)
    x = 0.4 * torch.randn(40, bits, dtype=torch.float64, requires_grad=True)
    codes = quantizer.decode_indices(torch.arange(2**bits)).double()
    table = (-1.5 * (x[:, None] - codes).square().sum(-1)).softmax(1)
    mean = table.mean(0)
    expected = -(table * table.log()).sum(1).mean(), -(mean * mean.log()).sum()
    for actual, wanted in zip(quantizer.entropies(x), expected, strict=True):
        assert_close(actual, wanted, 1e-10)
        assert_close(*(torch.autograd.grad(each, x, retain_graph=True)[0] for each in (actual, wanted)), 1e-8)


def test_lfq_entropies_of_distant_vectors_are_finite():
    x = torch.tensor([[50.0, -50.0], [60.0, 0.0]], requires_grad=True)
    _, log = LFQ(2)(x)
    log["entropy_loss"].backward()
    assert torch.isfinite(log["entropy_loss"]) and torch.isfinite(x.grad).all()


# ---------------------------------------------------------------- the codebook of running means


def clusters(count: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (n, 2) points in tight clusters around centres (count, 2)."""
    centres = (
        torch.stack(torch.meshgrid(torch.arange(count // 4), torch.arange(4), indexing="ij"), -1).view(-1, 2) * 5.0
    )
    return centres.repeat(20, 1) + 0.01 * torch.randn(20 * count, 2), centres


def test_ema_codebook_finds_clusters_and_revives_dead_codes():
    """From codes that all lie together each cluster soon has a code of its own, at its mean."""
    quantizer = EMAVectorQuantizer(32, 2, decay=0.9)
    for _ in range(60):
        points, centres = clusters()
        _, log = quantizer(points[torch.randperm(len(points))])
    assert log["vq_loss"] < 1e-3
    distances = torch.cdist(centres, quantizer.embedding)
    assert distances.min(1).values.max() < 0.05


def test_ema_codebook_without_revival_keeps_unused_codes():
    quantizer = EMAVectorQuantizer(4, 1, decay=0.5, revival_threshold=0.0)
    quantizer.embedding.copy_(torch.tensor([[0.0], [1.0], [50.0], [60.0]]))
    quantizer(torch.tensor([[0.2], [0.4], [1.5]]))
    assert_close(quantizer.embedding, torch.tensor([[0.3], [1.5], [50.0], [60.0]]), 1e-6)
    quantizer(torch.tensor([[0.7], [0.7]]))  # by weights 1/2 * 1/2 for each old, 1/2 for each new vector
    assert_close(quantizer.embedding, torch.tensor([[(0.15 + 0.7) / 1.5], [1.5], [50.0], [60.0]]), 1e-6)


def test_ema_codebook_changes_in_training_steps_only():
    quantizer, points = EMAVectorQuantizer(8, 2), clusters()[0]
    before = {name: tensor.clone() for name, tensor in quantizer.state_dict().items()}
    with torch.no_grad():
        quantizer(points)
    quantizer.eval()(points)
    assert all(torch.equal(before[name], tensor) for name, tensor in quantizer.state_dict().items())
    assert not list(quantizer.get_trainable_parameters())


def test_ema_codebook_is_resumed_exactly():
    """A copy from the state dict goes on as the original, revived codes included."""
    batches = [clusters()[0] for _ in range(6)]
    one, other = EMAVectorQuantizer(64, 2), EMAVectorQuantizer(64, 2)
    for batch in batches[:3]:
        one(batch)
    other.load_state_dict(one.state_dict())
    for batch in batches[3:]:
        one(batch), other(batch)
    assert torch.equal(one.embedding, other.embedding)


def trained_on(batches: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the codebook after steps on this process's share, and LFQ's gradient summed."""
    import torch.distributed as dist

    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    torch.manual_seed(0)
    quantizer, lookup_free = EMAVectorQuantizer(24, 2, decay=0.8), LFQ(2, inv_temperature=0.1)
    weight = nn.Parameter(torch.eye(2))
    for batch in batches:
        share = batch.chunk(world)[rank]
        quantizer(share)
        lookup_free(share @ weight)[1]["entropy_loss"].backward()
    gradient = weight.grad
    if world > 1:  # as data parallel training does
        dist.all_reduce(gradient)
        gradient /= world
    return {**quantizer.state_dict(), "gradient": gradient}


@pytest.mark.distributed
@pytest.mark.slow
def test_two_processes_do_what_one_does_with_both_batches():
    batches = [torch.randn(320, 2) for _ in range(4)]
    expected = trained_on(batches)
    first, second = run_distributed(trained_on, 2, batches)
    for name, tensor in expected.items():
        assert torch.equal(first[name], second[name])
        assert_close(first[name].float(), tensor.float(), 1e-5)


# ---------------------------------------------------------------- inside an autoencoder


@pytest.fixture(scope="module")
def shapes() -> torch.Tensor:
    """Return moving shapes (clips, 3, 5, 16, 16) in [-1, 1]."""
    from cogvideox_sat.shapes.drawing import draw
    from cogvideox_sat.shapes.scenes import random_scenes

    return torch.stack([draw(scene, 5, 16, 16) for scene in random_scenes(3, seed=0)]).transpose(1, 2)


SMALL_PARTS = {"ch": 32, "ch_mult": [1, 1, 1], "num_res_blocks": 1, "z_channels": 4, "double_z": False}
TRAINED = {  # with the weight of the penalties
    "VQ": (QUANTIZERS["VQ"], 1.0),
    "EMA": (QUANTIZERS["EMA"], 1.0),
    "FSQ": (QUANTIZERS["FSQ"], 0.0),
    "LFQ": (
        {"target": f"{MODULE}.LFQ", "params": {"dim": 4, "codebook_size": 64, "commitment_loss_weight": 0.25}},
        0.1,
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINED)
@pytest.mark.long
def test_a_video_autoencoder_trains_with_each_quantizer(name, shapes):
    """The reconstruction loss falls to a fraction in seconds, with many codes in use."""
    regularizer, weight = TRAINED[name]
    vae = VideoAutoencoderInferenceWrapper(
        encoder_config={"target": "vae_modules.cp_enc_dec.ContextParallelEncoder3D", "params": SMALL_PARTS},
        decoder_config={"target": "vae_modules.cp_enc_dec.ContextParallelDecoder3D", "params": SMALL_PARTS},
        regularizer_config=regularizer,
    )
    optimizer = torch.optim.Adam(vae.parameters(), lr=4e-3)
    losses = []
    for _ in range(50):
        latent, log = vae.encode(shapes, return_reg_log=True)
        loss = (vae.decode_at_once(latent) - shapes).abs().mean()
        losses.append(loss.item())
        penalty = sum(value for key, value in log.items() if key.endswith("_loss"))
        optimizer.zero_grad()
        (loss + weight * penalty).backward()
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0]
    assert log["perplexity"] > 4 and log["codebook_use"] > 4 / vae.regularization.codebook_size


# ---------------------------------------------------------------- paths, other regularizers, mistakes


def test_targets_and_their_other_path():
    for name in ("IdentityRegularizer", "DiagonalGaussianRegularizer", "VectorQuantizer", "EMAVectorQuantizer", "FSQ"):
        kind = get_obj_from_str(f"{MODULE}.{name}")
        assert issubclass(kind, AbstractRegularizer)
        assert get_obj_from_str(f"vae_modules.regularizers.{name}") is kind


@pytest.mark.slow
def test_the_quantization_library_is_imported_when_it_is_needed():
    code = f"import sys, {MODULE}, vae_modules.autoencoder; sys.exit('vector_quantize_pytorch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_continuous_regularizers():
    z = torch.randn(2, 6, 3)
    latent, log = IdentityRegularizer()(z)
    assert latent is z and log == {}
    mean, log_variance = z.chunk(2, dim=1)
    latent, log = DiagonalGaussianRegularizer(sample=False)(z)
    assert torch.equal(latent, mean)
    normal = torch.distributions.Normal
    kl = torch.distributions.kl_divergence(normal(mean, (0.5 * log_variance).exp()), normal(0.0, 1.0))
    assert_close(log["kl_loss"], kl.sum((1, 2)).mean(), 1e-5)
    noise = torch.randn(2, 3, 3)
    drawn = DiagonalGaussianRegularizer()
    drawn.use_means()
    assert torch.equal(drawn(z)[0], latent)
    assert_close(DiagonalGaussianRegularizer()(z, noise)[0], mean + (0.5 * log_variance).exp() * noise, 1e-6)
    assert not list(DiagonalGaussianRegularizer().get_trainable_parameters())


@pytest.mark.parametrize(
    ("build", "says"),
    [
        (lambda: VectorQuantizer(0, 4), "0 codes of 4 channels"),
        (lambda: EMAVectorQuantizer(4, 4, decay=1.0), "decay: got 1.0"),
        (lambda: FSQ([8, 2]), r"levels: got \[8, 2\]; expected whole numbers, each at least 3"),
        (lambda: FSQ([]), r"levels: got \[\]"),
        (lambda: FSQ([5], num_codebooks=0), "num_codebooks: got 0"),
        (lambda: LFQ(), "neither dim nor codebook_size"),
        (lambda: LFQ(codebook_size=100), "codebook_size: got 100; expected a power of two"),
    ],
)
def test_mistakes_are_told(build, says):
    with pytest.raises(UserError, match=says):
        build()


def test_lfq_takes_large_codebooks():
    """2^18 codes, as MAGVIT-v2 has: a table of vectors and codes would take 2 GiB here."""
    z = torch.randn(1, 18, 2000, requires_grad=True)
    _, log = LFQ(18)(z)
    log["entropy_loss"].backward()
    assert log["codebook_use"] <= 2000 / 2**18 and math.isfinite(log["entropy_loss"].item())
