"""LPIPS is torchmetrics' network on a file's weights, hidden from optimizers."""

import pickle
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
import torchvision
from torch import nn
from torchmetrics.functional.image import lpips as torchmetrics_lpips

from lpips_weights import random_backbone, write_backbone
from seeded import seeded_input
from sgm.errors import UserError
from sgm.modules.autoencoding.losses import LatentLPIPS
from sgm.modules.autoencoding.losses.lpips import BACKBONES, LPIPS
from sgm.util import get_obj_from_str, instantiate_from_config
from sgm.weights import assign_weights
from support import assert_close


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("backbones")
    return {net: write_backbone(folder / f"{net}.pth", name) for net, name in BACKBONES.items()}


@pytest.fixture(scope="module")
def lpips(files) -> LPIPS:
    return LPIPS("squeeze", files["squeeze"])


def image(name: str, count: int = 2, size: int = 64) -> torch.Tensor:
    return (0.3 * seeded_input(name, (count, 3, size, size))).clamp(-1, 1)


# ---------------------------------------------------------------- the distance


@pytest.mark.parametrize("net", BACKBONES)
def test_distance_and_gradient_are_those_of_torchmetrics_on_torchvisions_model(net, files, monkeypatch):
    with torch.device("meta"):
        features = torchvision.models.get_model(BACKBONES[net]).features
    weights = {name.removeprefix("features."): value for name, value in torch.load(files[net]).items()}
    del weights["classifier.6.bias"]
    features.load_state_dict(weights, assign=True)
    monkeypatch.setattr(torchmetrics_lpips, "_get_tv_model_features", lambda name, pretrained: features)
    theirs = torchmetrics_lpips._NoTrainLpips(net=net)

    x, expected_y, actual_y = image("x"), image("y").requires_grad_(), image("y").requires_grad_()
    expected, actual = theirs(x, expected_y), LPIPS(net, files[net])(x, actual_y)
    expected.sum().backward()
    actual.sum().backward()

    assert actual.shape == (2, 1, 1, 1)
    assert actual.min() > 0
    assert_close(actual, expected, 1e-6)
    assert_close(actual_y.grad, expected_y.grad, 1e-5)


def test_distance_of_an_image_to_itself_is_zero_with_a_finite_gradient(lpips):
    x, y = image("x"), image("x").requires_grad_()
    distance = lpips(x, y)
    distance.sum().backward()
    assert (distance == 0).all()
    assert (y.grad == 0).all()


def test_distances_are_of_single_images(lpips):
    x, y = image("x", 3), image("y", 3)
    assert_close(lpips(x, y)[1:2], lpips(x[1:2], y[1:2]), 1e-6)
    assert lpips(x[:0], y[:0]).shape == (0, 1, 1, 1)


def test_distance_is_in_float32_under_autocast_and_for_other_dtypes(lpips):
    x, y = image("x"), image("y")
    expected = lpips(x, y)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(lpips(x, y), expected)
    actual = lpips(x.bfloat16(), y.bfloat16())
    assert actual.dtype == torch.float32
    assert torch.equal(actual, lpips(x.bfloat16().float(), y.bfloat16().float()))


@pytest.mark.parametrize(("net", "side"), [("vgg", 16), ("alex", 31), ("squeeze", 17)])
def test_smallest_images(net, side, files):
    lpips = LPIPS(net, files[net])
    assert torch.isfinite(lpips(image("x", size=side), image("y", size=side))).all()
    with pytest.raises(
        UserError, match=f"{net} needs images of at least {side}x{side} pixels, got {side - 1}x{side - 1}"
    ):
        lpips(image("x", size=side - 1), image("y", size=side - 1))


# ---------------------------------------------------------------- frozen and hidden


def test_network_is_neither_trained_nor_saved(files):
    owner = nn.Module()
    owner.perceptual_loss = LPIPS("squeeze", files["squeeze"])
    owner.scale = nn.Parameter(torch.ones(1))
    owner.train()

    assert [name for name, _ in owner.named_parameters()] == ["scale"]
    assert list(owner.state_dict()) == ["scale"]
    network = owner.perceptual_loss.network
    assert not any(parameter.requires_grad for parameter in network.parameters())
    assert not any(module.training for module in network.modules())


def test_a_checkpoint_may_lack_or_hold_the_network(files):
    owner = nn.Module()
    owner.perceptual_loss = LPIPS("squeeze", files["squeeze"])
    before = {name: value.clone() for name, value in owner.perceptual_loss.network.state_dict().items()}
    owner.load_state_dict({})
    owner.load_state_dict({"perceptual_loss.net.slice1.0.weight": torch.zeros(64, 3, 3, 3)})
    assign_weights(owner, {}, what="nothing")
    after = owner.perceptual_loss.network.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_network_follows_to_another_device_but_not_to_another_dtype(files):
    owner = nn.Module()
    owner.perceptual_loss = LPIPS("squeeze", files["squeeze"])
    network = owner.perceptual_loss.network
    owner.to(torch.bfloat16)
    assert {value.dtype for value in (*network.parameters(), *network.buffers())} == {torch.float32}
    owner.to("meta")
    assert {value.device.type for value in (*network.parameters(), *network.buffers())} == {"meta"}


# ---------------------------------------------------------------- where weights come from


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Path:
    """Return an empty cache of torch.hub, without a network."""

    def no_network(url, *args, **options):
        raise URLError("Name or service not known")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    return tmp_path / "checkpoints"


def test_without_a_file_or_a_network_the_error_names_the_file_and_where_to_get_it(hub):
    with pytest.raises(UserError) as error:
        LPIPS()
    line = str(error.value)
    assert "https://download.pytorch.org/models/vgg16-397923af.pth" in line
    assert "lpips_weights" in line
    assert str(hub / "vgg16-397923af.pth") in line
    assert "Name or service not known" in line
    assert "\n" not in line


def test_weights_in_the_cache_of_torch_hub_are_used(hub, files):
    hub.mkdir()
    cached = hub / "squeezenet1_1-b8a52dc0.pth"
    cached.write_bytes(files["squeeze"].read_bytes())
    x, y = image("x"), image("y")
    assert torch.equal(LPIPS("squeeze")(x, y), LPIPS("squeeze", files["squeeze"])(x, y))


def test_weights_are_downloaded_into_the_cache(hub, files, monkeypatch):
    asked = []

    def download(url, path, hash_prefix, progress):
        asked.append((url, hash_prefix))
        Path(path).write_bytes(files["squeeze"].read_bytes())

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    LPIPS("squeeze")
    LPIPS("squeeze")
    assert asked == [("https://download.pytorch.org/models/squeezenet1_1-b8a52dc0.pth", "b8a52dc0")]


def test_no_such_file_or_network(tmp_path):
    with pytest.raises(UserError, match=r"weight file .*vgg\.pth does not exist"):
        LPIPS(weights=tmp_path / "vgg.pth")
    with pytest.raises(UserError, match="network 'resnet' is unknown; use one of vgg, alex, squeeze"):
        LPIPS("resnet")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weights: weights.pop("features.3.squeeze.bias"), r"does not hold features\.3\.squeeze\.bias"),
        (lambda weights: weights.update({"features.99.bias": torch.ones(1)}), r"holds features\.99\.bias, unknown"),
        (lambda weights: weights.update({"features.0.bias": torch.ones(1)}), r"features\.0\.bias \(1,\) instead of"),
    ],
)
def test_weights_that_do_not_fit_are_refused(change, message, tmp_path):
    weights = random_backbone("squeezenet1_1")
    change(weights)
    torch.save(weights, tmp_path / "file.pth")
    with pytest.raises(UserError, match=rf"file\.pth, as torchvision's squeezenet1_1, .*{message}"):
        LPIPS("squeeze", tmp_path / "file.pth")


def test_weights_of_another_network_are_refused(files):
    with pytest.raises(UserError, match=r"as torchvision's squeezenet1_1, does not fit"):
        LPIPS("squeeze", files["alex"])


def test_code_in_a_weight_file_is_not_run(tmp_path):
    class Code:
        def __reduce__(self):
            return Path.touch, (tmp_path / "touched",)

    (tmp_path / "file.pth").write_bytes(pickle.dumps(Code(), protocol=2))
    with pytest.raises(UserError, match="cannot read weights"):
        LPIPS("squeeze", tmp_path / "file.pth")
    assert not (tmp_path / "touched").exists()


def test_the_other_path_gives_the_same_class():
    assert get_obj_from_str("sgm.modules.autoencoding.lpips.loss.lpips.LPIPS") is LPIPS


# ---------------------------------------------------------------- on latents


class Upsampler(nn.Module):
    """A decoder of latents (n, 4, h, w) to images of twice the size, with some encoder."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Conv2d(3, 4, 2, 2)
        self.conv = nn.ConvTranspose2d(4, 3, 2, 2)
        self.dropout = nn.Dropout(0.5)

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        return self.dropout(self.conv(z)).tanh()


def upsampler_config(monkeypatch) -> dict:
    monkeypatch.setattr(torch.nn, "Upsampler", Upsampler, raising=False)
    return {"target": "torch.nn.Upsampler"}


def latents(name: str) -> torch.Tensor:
    return seeded_input(name, (2, 4, 32, 32))


@pytest.mark.slow
def test_loss_on_latents_adds_up_its_terms(files, monkeypatch):
    loss_fn = LatentLPIPS(upsampler_config(monkeypatch), 0.5, 2.0, False, False, 0.25, files["vgg"]).train()
    z, predictions, x = latents("z"), latents("p").requires_grad_(), image("x")
    loss, log = loss_fn(z, predictions, x, split="val")

    decoder, distance = Upsampler().eval(), LPIPS(weights=files["vgg"])
    decoded = decoder.decode(predictions)
    terms = {
        "val/latent_l2_loss": (z - predictions).square().mean(),
        "val/perceptual_loss": distance(decoder.decode(z), decoded).mean(),
        "val/perceptual_loss_on_inputs": distance(x, decoded).mean(),
    }
    assert log.keys() == terms.keys()
    for name, term in terms.items():
        assert_close(log[name], term, 1e-6)
    expected = sum(weight * term for weight, term in zip((2.0, 0.5, 0.25), terms.values(), strict=True))
    assert_close(loss, expected, 1e-6)

    (expected_gradient,) = torch.autograd.grad(expected, predictions)
    loss.backward()
    assert_close(predictions.grad, expected_gradient, 1e-5)


def test_decoder_of_the_latent_loss_is_frozen_and_without_its_encoder(monkeypatch):
    config = {"target": "sgm.modules.autoencoding.losses.LatentLPIPS"}
    config["params"] = {"decoder_config": upsampler_config(monkeypatch), "perceptual_weight": 0.0}
    loss_fn = instantiate_from_config(config).train()  # without perceptual terms it needs no weights
    assert not hasattr(loss_fn.decoder, "encoder")
    assert not any(parameter.requires_grad for parameter in loss_fn.parameters())
    assert not loss_fn.decoder.dropout.training
    z, predictions = latents("z"), latents("p")
    loss, log = loss_fn(z, predictions, image("x"))
    assert_close(loss, (z - predictions).square().mean(), 1e-6)
    assert log.keys() == {"train/latent_l2_loss"}


@pytest.mark.parametrize("option", ["scale_input_to_tgt_size", "scale_tgt_to_input_size"])
def test_latent_loss_compares_images_of_another_size(option, files, monkeypatch):
    config = upsampler_config(monkeypatch)
    loss_fn = LatentLPIPS(
        config, perceptual_weight=0.0, perceptual_weight_on_inputs=1.0, lpips_weights=files["vgg"], **{option: True}
    )
    x, decoded = image("x", size=48), Upsampler().eval().decode(latents("p"))
    if option == "scale_input_to_tgt_size":
        x = nn.functional.interpolate(x, (64, 64), mode="bicubic", antialias=True)
    else:
        decoded = nn.functional.interpolate(decoded, (48, 48), mode="bicubic", antialias=True)
    _, log = loss_fn(latents("z"), latents("p"), image("x", size=48))
    expected = LPIPS(weights=files["vgg"])(x, decoded).mean()
    assert_close(log["train/perceptual_loss_on_inputs"], expected, 1e-6)


def test_latent_loss_refuses_to_scale_both_ways(monkeypatch):
    with pytest.raises(UserError, match="scale_input_to_tgt_size and scale_tgt_to_input_size are both on"):
        LatentLPIPS(upsampler_config(monkeypatch), scale_input_to_tgt_size=True, scale_tgt_to_input_size=True)
