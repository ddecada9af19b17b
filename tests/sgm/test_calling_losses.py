"""Losses that were written for other engines train an autoencoder as they are."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoencoder_training import fit, image_config, moving_squares, video_config
from sgm.errors import UserError
from sgm.models.calling_losses import NAMES, call_loss, check_loss, loss_keywords
from sgm.util import instantiate_from_config
from support import assert_close

pytestmark = pytest.mark.usefixtures("one_thread")

HERE = __name__
SGD = {"target": "torch.optim.SGD", "params": {"lr": 1e-2}}
GIVEN = {
    "regularization_log": {"kl_loss": torch.tensor(2.0)},
    "optimizer_idx": 0,
    "global_step": 7,
    "last_layer": None,
    "split": "train",
    "weights": None,
    "group": None,
    "frames": None,
    "z": torch.ones(2),
    "autoencoder": "the engine",
}


class Plain(nn.Module):
    """Without `forward_keys`: gets two tensors, returns one."""

    def forward(self, inputs: Tensor, reconstructions: Tensor, reduction: str = "mean", split: str | None = None):
        assert split is None  # not given, though an engine has something of that name
        return F.l1_loss(inputs, reconstructions, reduction=reduction)


class Named(nn.Module):
    """A loss with `forward_keys` that returns a pair; its log may have Python's numbers."""

    forward_keys = ("z", "autoencoder", "global_step", "split")

    def forward(self, x: Tensor, xrec: Tensor, **given: Any) -> tuple[Tensor, dict[str, Any]]:
        assert set(given) == set(self.forward_keys)
        loss = (x - xrec).square().mean() + 0.1 * given["z"].square().mean()
        return loss, {f"{given['split']}/own": loss, f"{given['split']}/step": given["global_step"]}

    def log_images(self, inputs: Tensor, reconstructions: Tensor) -> dict[str, Tensor]:
        return {"sum": inputs + reconstructions}


class Scaled(nn.Module):
    """A decoder that takes more than a latent."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv_out = nn.ConvTranspose2d(channels, 3, 2, 2)

    def forward(self, z: Tensor, gain: Tensor | float = 1.0, shift: float = 0.0) -> Tensor:
        return self.conv_out(z) * gain + shift


def build(loss: str, **params: Any) -> nn.Module:
    torch.manual_seed(0)
    config = {"target": loss if "." in loss else f"{HERE}.{loss}"}
    return instantiate_from_config(image_config(loss_config=config, optimizer_config=SGD, **params))


def batches(count: int) -> list[dict[str, Any]]:
    images = moving_squares(4 * count, 1)[:, 0]
    return [{"jpg": images[i : i + 4], "seed": list(range(i, i + 4))} for i in range(0, 4 * count, 4)]


# ---------------------------------------------------------------- the call


def test_what_a_loss_is_called_with():
    assert loss_keywords(Plain()) == set() == loss_keywords(nn.MSELoss()) == loss_keywords(F.mse_loss)
    assert loss_keywords(Named()) == set(Named.forward_keys)
    x, y = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4, requires_grad=True)
    value, log = call_loss(nn.MSELoss(), x, y, GIVEN)
    assert_close(value, (x - y).square().mean(), 1e-6)
    assert value.requires_grad and not log["train/loss/rec"].requires_grad and list(log) == ["train/loss/rec"]
    _, log = call_loss(Plain(), x, y, {**GIVEN, "optimizer_idx": 1, "split": "val"})
    assert list(log) == ["val/loss/disc"]
    value, log = call_loss(Named(), x, y, GIVEN)
    assert_close(value, (x - y).square().mean() + 0.1, 1e-6)
    assert log["train/step"] == 7.0 and isinstance(log["train/step"], Tensor) and not log["train/own"].requires_grad


def returning(value: Any, keys: tuple[str, ...] | None = None) -> Any:
    def loss(inputs: Tensor, reconstructions: Tensor, **given: Any) -> Any:
        return value

    if keys is not None:
        loss.forward_keys = keys
    return loss


@pytest.mark.parametrize(
    ("loss", "given", "message"),
    [
        (returning(torch.zeros(2)), {}, r"returned a tensor \(2,\); expected a scalar"),
        (returning(3.0), {}, "returned a float; expected a scalar tensor"),
        (returning((torch.tensor(1.0), 5)), {}, "expected a scalar tensor, or a pair"),
        (returning((torch.tensor(1.0), {"a": torch.zeros(3)})), {}, r"logs a tensor \(3,\) as 'a'; expected a number"),
        (returning((torch.tensor(1.0), {"a": "text"})), {}, "logs a str as 'a'; expected a number"),
        (returning(torch.tensor(1.0), ("cond",)), {}, "has the unknown name 'cond'; use .*, z,"),
        (returning(torch.tensor(1.0)), {"weights": 2.0}, "image_video_weights: function takes no `weights`"),
    ],
)
def test_losses_that_do_not_fit(loss, given, message):
    with pytest.raises(UserError, match=message):
        call_loss(loss, torch.zeros(2, 3), torch.zeros(2, 3), {**GIVEN, **given})


def test_a_loss_that_cannot_be_called_is_found_before_training():
    assert GIVEN.keys() == NAMES

    def needy(x, y, *, split, masks):
        return x

    with pytest.raises(UserError, match=r"cannot be called as loss.*missing a required .*'masks'"):
        check_loss(needy)
    for loss in ("torch.nn.CosineEmbeddingLoss", "torch.nn.GELU"):
        engine = build(loss)
        with pytest.raises(UserError, match=r"loss_config: .* cannot be called as loss"):
            engine.configure_optimizers()
    build("Named").configure_optimizers()


# ---------------------------------------------------------------- training


@pytest.mark.parametrize("loss", ["torch.nn.MSELoss", "Plain", "Named"])
def test_it_trains_and_validates(loss):
    engine = build(loss)
    data = batches(4)
    start = engine.validate(data[0])
    fit(engine, data * 5, steps=20)
    end = engine.validate(data[0])
    assert end["val/rec"] < 0.9 * start["val/rec"]
    assert ("val/own" if loss == "Named" else "val/loss/rec") in end


def test_a_video_autoencoder_takes_them_too():
    clip = moving_squares(2, 5).to(torch.float32) / 127.5 - 1
    torch.manual_seed(0)
    config = video_config(loss_config={"target": "torch.nn.L1Loss"}, optimizer_config=SGD)
    engine = instantiate_from_config(config)
    loss, _ = engine.compute_loss({"mp4": clip, "seed": [0, 1]}, 0)
    log = engine.validate({"mp4": clip, "seed": [0, 1]})
    assert_close(log["val/loss/rec"], log["val/rec"], 1e-5)
    assert_close(loss.detach(), log["val/rec"], 1e-5)
    with pytest.raises(UserError, match="image_video_weights: L1Loss takes no `weights`; set \\[1, 1\\]"):
        instantiate_from_config({**config, "params": {**config["params"], "image_video_weights": [2, 1]}})


def test_pictures_of_the_loss_are_shown():
    engine = build("Named", ema_decay=0.5)
    images = engine.log_images(batches(1)[0], epoch=3)
    assert_close(images["sum"], images["inputs"] + images["reconstructions"], 1e-6)
    assert "sum_ema" not in images


def test_entries_of_the_batch_reach_the_decoder():
    """The decoder gets the batch's `additional_decode_keys` everywhere.

    These are training, validation and pictures.
    """
    params = {"decoder_config": {"target": f"{HERE}.Scaled", "params": {"channels": 4}}}
    assert build("torch.nn.MSELoss", additional_decode_keys="gain").additional_decode_keys == {"gain"}
    engine = build("torch.nn.MSELoss", additional_decode_keys=["gain", "shift"], **params)
    plain = build("torch.nn.MSELoss", **params)
    batch = batches(1)[0]
    without = engine.log_images(batch)["reconstructions"]
    assert torch.equal(without, plain.log_images({**batch, "gain": 3.0})["reconstructions"])
    shifted = engine.log_images({**batch, "gain": torch.tensor(0.0), "shift": 0.25})["reconstructions"]
    assert (shifted == 0.25).all()
    x = engine.get_input(batch)
    loss, _ = engine.compute_loss({**batch, "gain": torch.tensor(0.0), "shift": 0.25}, 0)
    assert_close(loss.detach(), (x - 0.25).square().mean(), 1e-6)
    assert_close(engine.validate({**batch, "gain": 0.0, "shift": 0.25})["val/rec"], (x - 0.25).abs().mean(), 1e-6)
    images = engine.log_images(batch, additional_log_kwargs={"gain": 0.0, "shift": 0.5})
    assert (images["reconstructions-gain=0.0-shift=0.5"] == 0.5).all()
    assert torch.equal(images["reconstructions"], without)
    z, same, report = engine(x, gain=0.0)
    assert (same == 0).all() and z.shape[1] == 4 and "kl_loss" in report
