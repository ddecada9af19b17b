"""The autoencoder's loss equals its equations, on one process and on several."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from distributed import run_distributed
from long_cases import others_long
from lpips_weights import write_backbone
from seeded import seeded_input
from sgm.context_parallel import gather_frames, split_frames
from sgm.errors import UserError
from sgm.modules.autoencoding.losses import GeneralLPIPSWithDiscriminator
from sgm.modules.autoencoding.losses.lpips import LPIPS
from sgm.util import instantiate_from_config
from support import assert_close

DISCRIMINATORS = {
    "2d": {
        "target": "sgm.modules.autoencoding.lpips.model.model.NLayerDiscriminator",
        "params": {"ndf": 8, "n_layers": 2},
    },
    "3d": {
        "target": "sgm.modules.autoencoding.discriminators.NLayerDiscriminator3D",
        "params": {"ndf": 8, "n_layers": 2},
    },
}
KL = {"kl_loss": torch.tensor(7.0)}


@pytest.fixture(scope="module")
def backbone(tmp_path_factory) -> Path:
    return write_backbone(tmp_path_factory.mktemp("backbone") / "squeeze.pth", "squeezenet1_1")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def build(**options) -> GeneralLPIPSWithDiscriminator:
    """Return the loss with a small discriminator, from a configuration."""
    params = {"disc_start": 0, "perceptual_weight": 0.0, "discriminator_config": DISCRIMINATORS["2d"], **options}
    return instantiate_from_config(
        {"target": "sgm.modules.autoencoding.losses.GeneralLPIPSWithDiscriminator", "params": params}
    )


def image(name: str, count: int = 2, side: int = 24) -> torch.Tensor:
    return (0.5 * seeded_input(name, (count, 3, side, side))).clamp(-1, 1)


def clip(name: str, frames: int = 5, side: int = 24) -> torch.Tensor:
    return (0.5 * seeded_input(name, (2, 3, frames, side, side))).clamp(-1, 1)


def autoencoder_step(loss_fn, inputs, reconstructions, **options):
    options = {"regularization_log": {}, "optimizer_idx": 0, "global_step": 0, **options}
    return loss_fn(inputs, reconstructions, **options)


def discriminator_step(loss_fn, inputs, reconstructions, **options):
    return autoencoder_step(loss_fn, inputs, reconstructions, optimizer_idx=1, **options)


# ---------------------------------------------------------------- reconstruction


@pytest.mark.parametrize(("pixel_loss", "error"), [("l1", torch.abs), ("l2", torch.square)])
def test_reconstruction_of_images(pixel_loss, error, backbone):
    loss_fn = build(
        disc_start=1,
        perceptual_weight=0.7,
        lpips_net="squeeze",
        lpips_weights=backbone,
        pixel_loss=pixel_loss,
        logvar_init=0.3,
        regularization_weights={"kl_loss": 1e-2},
    )
    x, y = image("x"), image("y")
    loss, log = autoencoder_step(loss_fn, x, y, regularization_log=KL, split="val")

    distance = LPIPS("squeeze", backbone)(x, y)
    rec = error(x - y) + 0.7 * distance
    nll = (rec / torch.tensor(0.3).exp() + 0.3).sum() / 2
    assert_close(log["val/loss/nll"], nll, 1e-6)
    assert_close(log["val/loss/rec"], rec.mean(), 1e-6)
    assert_close(log["val/loss/perceptual"], distance.mean(), 1e-6)
    assert_close(log["val/loss/logvar"], torch.tensor(0.3), 1e-6)
    assert_close(loss, nll + 0.07, 1e-6)
    assert_close(log["val/loss/total"], loss, 1e-6)
    assert log["val/kl_loss"] == 7
    assert log["val/loss/g"] == log["val/loss/d_weight"] == 0
    assert all(not value.requires_grad and value.ndim == 0 for value in log.values())


def test_frames_of_a_clip_count_as_images(backbone):
    options = {"perceptual_weight": 0.7, "lpips_net": "squeeze", "lpips_weights": backbone}
    x, y = clip("x"), clip("y")
    in_clips, _ = autoencoder_step(build(dims=3, disc_start=1, **options), x, y)
    x, y = (z.transpose(1, 2).flatten(0, 1) for z in (x, y))
    in_images, _ = autoencoder_step(build(disc_start=1, **options), x, y)
    assert_close(in_clips, in_images, 1e-6)


def test_weights_are_factors_of_the_likelihood():
    loss_fn = build(disc_start=1, logvar_init=-0.5)
    x, y = image("x"), image("y")
    nll = (x - y).abs() / torch.tensor(-0.5).exp() - 0.5
    for weights in (3.0, torch.tensor([1.0, 5.0])[:, None, None, None], torch.rand(2, 1, 24, 24)):
        loss, log = autoencoder_step(loss_fn, x, y, weights=weights)
        assert_close(loss, (weights * nll).sum() / 2, 1e-6)
        assert_close(log["train/loss/nll"], nll.sum() / 2, 1e-6)


def test_log_variance_is_trained_on_request():
    x, y = image("x"), image("y")
    loss_fn = build(disc_start=1, learn_logvar=True)
    (parameter,) = loss_fn.get_trainable_autoencoder_parameters()
    optimizer = torch.optim.Adam([parameter], lr=0.1)
    for _ in range(200):
        optimizer.zero_grad()
        autoencoder_step(loss_fn, x, y)[0].backward()
        optimizer.step()
    assert_close(parameter, (x - y).abs().mean().log(), 1e-2)  # the minimum of rec / exp(s) + s
    assert not list(build(learn_logvar=False).get_trainable_autoencoder_parameters())


def test_inputs_of_another_size_are_scaled_on_request():
    x, y = clip("x", side=32), clip("y", side=24)
    with pytest.raises(UserError, match=r"cannot compare inputs .*32.* with .*24.*scale_input_to_tgt_size"):
        autoencoder_step(build(dims=3), x, y)
    loss, _ = autoencoder_step(build(dims=3, disc_start=1, scale_input_to_tgt_size=True), x, y)
    scaled = [F.interpolate(frame, (24, 24), mode="bicubic", antialias=True) for frame in x.unbind(2)]
    assert_close(loss, (torch.stack(scaled, 2) - y).abs().sum() / 10, 1e-6)


def test_regularization_log_is_reported_and_only_named_entries_are_weighed():
    report = {"kl_loss": torch.tensor(7.0), "commitment_loss": torch.tensor(2.0), "perplexity": torch.tensor(40.0)}
    x = image("x")
    loss_fn = build(disc_start=1, regularization_weights={"commitment_loss": 0.25})
    loss, log = autoencoder_step(loss_fn, x, x, regularization_log=report)
    assert loss == 0.5
    assert [log[f"train/{name}"].item() for name in report] == [7, 2, 40]

    loss_fn = build(disc_start=1, regularization_weights={"kl_loss": 1.0}, additional_log_keys=["perplexity"])
    loss, log = autoencoder_step(loss_fn, x, x, regularization_log=report)
    assert loss == 7
    assert "train/perplexity" in log
    assert "train/kl_loss" not in log


# ---------------------------------------------------------------- the adversary


def test_adversarial_term_is_balanced_by_gradients_at_the_last_layer():
    loss_fn = build(disc_factor=0.5, disc_weight=0.8, logvar_init=0.2).eval()
    last = nn.Conv2d(4, 3, 3, padding=1)
    hidden, x = seeded_input("hidden", (2, 4, 24, 24)), image("x")
    loss, log = autoencoder_step(loss_fn, x, last(hidden), last_layer=last.weight)

    nll = ((x - last(hidden)).abs() / torch.tensor(0.2).exp() + 0.2).sum() / 2
    g = -loss_fn.discriminator(last(hidden)).mean()
    norms = [torch.autograd.grad(term, last.weight, retain_graph=True)[0].norm() for term in (nll, g)]
    d_weight = 0.8 * (norms[0] / (norms[1] + 1e-4)).clamp(max=1e4)
    assert_close(log["train/loss/g"], g, 1e-6)
    assert_close(log["train/loss/d_weight"], d_weight, 1e-5)
    assert_close(loss, nll + 0.5 * d_weight * g, 1e-5)

    (expected,) = torch.autograd.grad(nll + 0.5 * d_weight * g, last.bias)
    loss.backward()
    assert_close(last.bias.grad, expected, 1e-5)


def test_adaptive_weight_is_limited():
    loss_fn = build().eval()
    last = nn.Conv2d(4, 3, 3, padding=1)
    with torch.no_grad():
        loss_fn.discriminator.main[-1].weight.zero_()
    _, log = autoencoder_step(loss_fn, image("x"), last(torch.randn(2, 4, 24, 24)), last_layer=last.weight)
    assert log["train/loss/d_weight"] == 1e4


def test_without_a_last_layer_the_adversarial_term_has_a_constant_weight():
    loss_fn = build(disc_weight=0.3)
    loss, log = autoencoder_step(loss_fn, image("x"), image("y").requires_grad_())
    assert_close(loss, log["train/loss/nll"] + 0.3 * log["train/loss/g"], 1e-6)


def test_autoencoder_step_gives_no_gradient_to_the_discriminator_nor_the_other_way_round():
    loss_fn = build()
    last = nn.Conv2d(4, 3, 3, padding=1)
    hidden, x = torch.randn(2, 4, 24, 24), image("x")
    autoencoder_step(loss_fn, x, last(hidden), last_layer=last.weight)[0].backward()
    assert last.weight.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in loss_fn.parameters())

    last.zero_grad()
    discriminator_step(loss_fn, x, last(hidden))[0].backward()
    assert last.weight.grad is None
    assert all(parameter.grad is not None for parameter in loss_fn.get_trainable_parameters())
    assert loss_fn.discriminator.main[0].weight.grad.abs().sum() > 0


@pytest.mark.parametrize("name", ["hinge", "vanilla"])
def test_discriminator_learns_real_from_fake(name):
    loss_fn = build(disc_loss=name, disc_factor=2.0).eval()
    x, y = image("x"), image("y")
    loss, log = discriminator_step(loss_fn, x, y, split="val")
    real, fake = loss_fn.discriminator(x), loss_fn.discriminator(y)
    if name == "hinge":
        expected = (1 - real).clamp(min=0).mean() + (1 + fake).clamp(min=0).mean()
    else:
        expected = F.binary_cross_entropy_with_logits(real, torch.ones_like(real))
        expected = expected + F.binary_cross_entropy_with_logits(fake, torch.zeros_like(fake))
    assert_close(loss, expected, 1e-6)
    assert_close(log["val/loss/disc"], expected, 1e-6)
    assert_close(log["val/logits/real"], real.mean(), 1e-6)
    assert_close(log["val/logits/fake"], fake.mean(), 1e-6)


@pytest.mark.parametrize("options", [{"disc_start": 10}, {"disc_factor": 0.0}])
def test_nothing_of_the_discriminator_is_computed_before_its_start_or_without_it(options):
    loss_fn = build(**options)
    loss_fn.discriminator.forward = None
    x, y = image("x"), image("y").requires_grad_()
    loss, log = autoencoder_step(loss_fn, x, y, global_step=9, last_layer=y)
    assert_close(loss, log["train/loss/nll"], 0)
    loss, log = discriminator_step(loss_fn, x, y, global_step=9)
    loss.backward()
    assert loss == log["train/loss/disc"] == 0


def test_without_a_discriminator_none_is_trained():
    loss_fn = build(disc_factor=0.0)
    assert not list(loss_fn.get_trainable_parameters())
    assert not any(parameter.requires_grad for parameter in loss_fn.parameters())


def test_discriminator_starts_at_its_step():
    loss_fn = build(disc_start=10)
    assert discriminator_step(loss_fn, image("x"), image("y"), global_step=10)[0] > 0


def test_discriminator_gets_frames_or_clips():
    seen = []
    for kind in ("2d", "3d"):
        loss_fn = build(dims=3, discriminator_config=DISCRIMINATORS[kind])
        loss_fn.discriminator.register_forward_pre_hook(lambda _, inputs: seen.append(tuple(inputs[0].shape)))
        discriminator_step(loss_fn, clip("x"), clip("y"))
    assert seen == [(10, 3, 24, 24)] * 2 + [(2, 3, 5, 24, 24)] * 2


def test_validation_needs_no_gradients():
    loss_fn = build(dims=3, discriminator_config=DISCRIMINATORS["3d"]).eval()
    last = nn.Conv3d(4, 3, 1)
    with torch.no_grad():
        y = last(torch.randn(2, 4, 5, 24, 24))
        loss, log = autoencoder_step(loss_fn, clip("x"), y, last_layer=last.weight, split="val")
        assert log["val/loss/g"] != 0
        assert log["val/loss/d_weight"] == 0
        assert_close(loss, log["val/loss/nll"], 0)
        assert discriminator_step(loss_fn, clip("x"), y, split="val")[0] > 0


@pytest.mark.parametrize("kind", DISCRIMINATORS)
def test_loss_is_float32_under_mixed_precision(kind, backbone):
    options = {"perceptual_weight": 1.0, "lpips_net": "squeeze", "lpips_weights": backbone}
    loss_fn = build(dims=3, discriminator_config=DISCRIMINATORS[kind], **options)
    last = nn.Conv3d(4, 3, 1)
    hidden, x = torch.randn(2, 4, 5, 24, 24), clip("x")
    with torch.autocast("cpu", torch.bfloat16):
        y = last(hidden)
        assert y.dtype == torch.bfloat16
        results = autoencoder_step(loss_fn, x, y, last_layer=last.weight), discriminator_step(loss_fn, x, y)
    for loss, log in results:
        loss.backward()
        assert loss.dtype == torch.float32
        assert all(value.dtype == torch.float32 and torch.isfinite(value) for value in log.values())


def test_loss_works_in_a_module_of_low_precision(backbone):
    loss_fn = build(perceptual_weight=1.0, lpips_net="squeeze", lpips_weights=backbone).to(torch.bfloat16)
    loss, _ = discriminator_step(loss_fn, image("x").bfloat16(), image("y").bfloat16())
    assert loss.dtype == torch.float32
    loss, _ = autoencoder_step(loss_fn, image("x").bfloat16(), image("y").bfloat16().requires_grad_())
    assert loss.dtype == torch.float32


def test_state_dict_holds_the_discriminator_and_the_log_variance_only(backbone):
    loss_fn = build(perceptual_weight=1.0, lpips_net="squeeze", lpips_weights=backbone)
    names = {f"discriminator.{name}" for name in loss_fn.discriminator.state_dict()}
    assert loss_fn.state_dict().keys() == names | {"logvar"}
    build().load_state_dict(loss_fn.state_dict())
    loss_fn.load_state_dict(build().state_dict())
    trainable = set(loss_fn.get_trainable_parameters()) | set(loss_fn.get_trainable_autoencoder_parameters())
    assert trainable == {parameter for parameter in loss_fn.parameters() if parameter.requires_grad}


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"disc_loss": "wgan"}, "disc_loss: got 'wgan'; use 'hinge' or 'vanilla'"),
        ({"pixel_loss": "lpips"}, "pixel_loss: got 'lpips'; use 'l1' or 'l2'"),
        ({"dims": 4}, "dims: got 4; use 2 or 3"),
        (
            {"dims": 2, "discriminator_config": DISCRIMINATORS["3d"]},
            "dims is 2, but the discriminator is one for clips",
        ),
        ({"perceptual_weight": 1.0, "lpips_weights": "nowhere.pth"}, r"weight file nowhere\.pth does not exist"),
    ],
)
def test_options_that_do_not_exist(options, message):
    with pytest.raises(UserError, match=message):
        build(**options)


def test_calls_that_do_not_fit():
    last = nn.Conv2d(3, 3, 1).requires_grad_(False)
    with pytest.raises(UserError, match=r"dims: 2 takes images of 4 dimensions, got \(2, 3, 5, 24, 24\)"):
        autoencoder_step(build(), clip("x"), clip("y"))
    with pytest.raises(UserError, match="regularizer reports no 'vq_loss', only kl_loss"):
        loss_fn = build(disc_start=1, regularization_weights={"vq_loss": 1.0})
        autoencoder_step(loss_fn, image("x"), image("y"), regularization_log=KL)
    with pytest.raises(UserError, match="decoder's last layer, which is not trained"):
        autoencoder_step(build(), image("x"), image("y").requires_grad_(), last_layer=last.weight)


# ---------------------------------------------------------------- context parallelism


class ToyDecoder(nn.Module):
    """Two layers that take frames one by one, so that they can be decoded anywhere."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.first = nn.Conv2d(4, 8, 3, padding=1)
        self.last = nn.Conv2d(8, 3, 3, padding=1)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        frames = self.last(self.first(z.transpose(1, 2).flatten(0, 1)).tanh())
        return frames.unflatten(0, (z.shape[0], z.shape[2])).transpose(1, 2)


def step_of_a_toy(shares: list[int] | None, gathered: bool, kind: str, backbone: Path) -> dict:
    """Return loss, log and gradients of both steps; `shares` divide the frames."""
    torch.set_num_threads(1)
    group = None if shares is None else dist.group.WORLD
    decoder = ToyDecoder()
    loss_fn = build(
        dims=3,
        learn_logvar=True,
        logvar_init=0.1,
        perceptual_weight=0.5,
        lpips_net="squeeze",
        lpips_weights=backbone,
        discriminator_config=DISCRIMINATORS[kind],
        regularization_weights={"penalty_loss": 0.1},
    )
    z, x = seeded_input("z", (2, 4, 5, 24, 24)), clip("x")
    weights = torch.linspace(0.5, 2, 5)[:, None, None]
    report = {"penalty_loss": loss_fn.logvar.square()}  # seen whole by every rank
    y = decoder(split_frames(z, shares, group))
    if gathered:
        y = gather_frames(y, shares, group)
        options = {"group": group, "weights": weights}
    else:
        x, own_weights = split_frames(x, shares, group), weights.split(shares)[dist.get_rank()]
        options = {"group": group, "frames": shares, "weights": own_weights}
    loss, log = autoencoder_step(loss_fn, x, y, last_layer=decoder.last.weight, regularization_log=report, **options)
    loss.backward()
    disc_loss, disc_log = discriminator_step(loss_fn, x, y, **options)
    disc_loss.backward()
    return {
        "losses": torch.stack([loss, disc_loss]).detach(),
        "log": log | disc_log,
        "decoder": {name: parameter.grad for name, parameter in decoder.named_parameters()},
        "loss": {name: parameter.grad for name, parameter in loss_fn.named_parameters()},
    }


SPLITS = [([3, 2], True, "3d"), ([3, 2], False, "3d"), ([1, 4], False, "2d"), ([5, 0], False, "2d")]


def steps_of_a_toy(backbone: Path) -> list[dict]:
    return [step_of_a_toy(shares, gathered, kind, backbone) for shares, gathered, kind in SPLITS]


@pytest.fixture(scope="module")
def two_processes(backbone) -> list[tuple[dict, dict]]:
    """Return the results of each of two processes for each of `SPLITS`."""
    return list(zip(*run_distributed(steps_of_a_toy, 2, backbone), strict=True))


@pytest.mark.distributed
@pytest.mark.parametrize("split", range(len(SPLITS)))
def test_two_processes_that_share_a_clip_have_the_loss_and_the_gradient_of_one(split, two_processes, backbone):
    one = step_of_a_toy(None, True, SPLITS[split][2], backbone)
    two = two_processes[split]
    assert one["log"]["train/loss/d_weight"] > 0
    for rank in two:
        assert_close(rank["losses"], one["losses"], 1e-5)
        assert rank["log"].keys() == one["log"].keys()
        for name, value in one["log"].items():
            assert_close(rank["log"][name], value, 1e-4)
        for name, gradient in one["loss"].items():
            assert_close(rank["loss"][name], gradient, 1e-4)
    for name, gradient in one["decoder"].items():
        assert_close(two[0]["decoder"][name] + two[1]["decoder"][name], gradient, 1e-4)


# ---------------------------------------------------------------- pictures


@pytest.mark.parametrize("kind", ["2d", "3d"])
def test_pictures_of_what_the_discriminator_sees(kind):
    """Real-looking patches are green, others magenta, in place and on one scale."""
    loss_fn = build(dims=3, discriminator_config=DISCRIMINATORS[kind])
    loss_fn.discriminator.forward = lambda x: -8 * F.avg_pool2d(x[:, :1].flatten(2).unflatten(2, x.shape[-2:]), 8)
    if kind == "3d":
        loss_fn.discriminator.forward = lambda x: -8 * F.avg_pool3d(x[:, :1], (1, 8, 8))
    real, fake = torch.zeros(2, 3, 5, 24, 24), torch.zeros(2, 3, 5, 24, 24)
    real[1, :, 2, :8, 8:16], fake[0, :, 4, 16:, :8] = -1.0, 0.5
    pictures = loss_fn.log_images(real, fake)
    assert set(pictures) == {"logits_real", "logits_fake"}
    for picture in pictures.values():
        assert picture.shape == real.shape and picture.min() >= -1 and picture.max() <= 1
    assert pictures["logits_real"][1, :, 2, 4, 12].tolist() == [-1, 1, -1]  # the surest: green
    assert pictures["logits_fake"][0, :, 4, 20, 4].tolist() == [1, 0, 1]  # half as sure: pale magenta
    assert (pictures["logits_real"] != 1).sum() == 2 * 8 * 8 and (pictures["logits_fake"] != 1).sum() == 8 * 8
    assert build(dims=3, disc_factor=0).log_images(real, fake) == {}


# ---------------------------------------------------------------- training


def moving_squares(count: int, frames: int, side: int) -> torch.Tensor:
    """Return coloured squares moving over coloured ground: (count, 3, frames, side, side)."""
    clips = (2 * torch.rand(count, 3, 1, 1, 1) - 1).repeat(1, 1, frames, side, side)
    for clip in clips:
        colour = 2 * torch.rand(3, 1, 1) - 1
        edge = int(torch.randint(6, 12, ()))
        begin, end = torch.rand(2, 2) * (side - edge)
        for t in range(frames):
            top, left = torch.lerp(begin, end, t / max(frames - 1, 1)).int().tolist()
            clip[:, t, top : top + edge, left : left + edge] = colour
    return clips


def tiny_autoencoder() -> nn.Sequential:
    """Return an autoencoder that reduces the numbers to a quarter, frame by frame."""
    return nn.Sequential(
        nn.Conv3d(3, 16, (1, 2, 2), (1, 2, 2)),
        nn.SiLU(),
        nn.Conv3d(16, 3, 1),
        nn.ConvTranspose3d(3, 16, (1, 2, 2), (1, 2, 2)),
        nn.SiLU(),
        nn.Conv3d(16, 3, (1, 3, 3), padding=(0, 1, 1)),
    )


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "perceptual_weight"), others_long(("3d", 0.0), ("2d", 0.1)))
def test_autoencoder_is_trained_against_a_discriminator(kind, perceptual_weight, backbone):
    model, start, steps = tiny_autoencoder(), 40, 120
    loss_fn = build(
        dims=3,
        disc_start=start,
        disc_weight=0.05,
        perceptual_weight=perceptual_weight,
        lpips_net="squeeze",
        lpips_weights=backbone,
        learn_logvar=True,
        discriminator_config=DISCRIMINATORS[kind],
    )
    ours = [*model.parameters(), *loss_fn.get_trainable_autoencoder_parameters()]
    optimizers = [
        torch.optim.Adam(ours, lr=1e-2, betas=(0.9, 0.95)),
        torch.optim.Adam(loss_fn.get_trainable_parameters(), lr=1e-3, betas=(0.5, 0.9)),
    ]
    held_out = moving_squares(4, 5, 24)
    errors, history = {}, []
    for step in range(steps + 1):
        if step in (0, start, steps):
            with torch.no_grad():
                errors[step] = (model(held_out) - held_out).abs().mean().item()
        x = moving_squares(4, 5, 24)
        y = model(x)
        logs = {}
        for optimizer_idx, optimizer in enumerate(optimizers):
            options = {"optimizer_idx": optimizer_idx, "global_step": step, "last_layer": model[-1].weight}
            loss, log = loss_fn(x, y, regularization_log={}, **options)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            logs |= log
        history.append({name: value.item() for name, value in logs.items()})

    assert errors[steps] < 0.4 * errors[0]
    assert errors[steps] < 0.7 * errors[start]
    assert history[-1]["train/loss/logvar"] < -1
    before, after = history[:start], history[start:]
    assert all(log["train/loss/disc"] == log["train/loss/d_weight"] == 0 for log in before)
    assert all(0 < log["train/loss/d_weight"] < 1e4 for log in after)
    assert min(log["train/loss/disc"] for log in after) < 0.9 * after[0]["train/loss/disc"]
    gaps = [log["train/logits/real"] - log["train/logits/fake"] for log in after]
    assert max(gaps) > gaps[0] + 0.1
