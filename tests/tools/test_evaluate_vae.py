"""The reconstruction report: measures by hand, its network, and the command."""

import json
import logging
import math
import subprocess
import sys
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torchvision
import yaml

from cogvideox_sat.configuration.files import load_configs
from cogvideox_sat.evaluation.inception3d import BLOCKS, Inception3D, load_inception3d, pad_same, prepare
from cogvideox_sat.evaluation.video_metrics import (
    FrechetVideoDistance,
    as_shown,
    frechet_distance,
    perceptual_distance,
    psnr,
    ssim,
)
from data_video import SFTDataset
from seeded import seed_module_
from sgm.errors import UserError
from sgm.util import instantiate_from_config
from support import assert_close, relative_error
from tool_runs import assert_told_before_pytorch
from tools.evaluate_vae import main
from training_clips import write_dataset
from videos import read_video

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools" / "evaluate_vae.py"
FRAMES, HEIGHT, WIDTH = 9, 32, 48


pytestmark = pytest.mark.usefixtures("one_thread")


def test_debug_shows_where_an_error_is_from(caplog):
    for flags in ([], ["--debug"]):
        caplog.clear()
        assert main(flags) == 2
        assert "--base: missing" in caplog.text
        assert ("Traceback" in caplog.text) == bool(flags)


# ---------------------------------------------------------------- measures


def test_pixels_are_rounded_as_shown():
    video = torch.tensor([-1.2, -1.0, -0.9999, 0.0, 0.5, 1.0, 3.0])
    assert (as_shown(video) * 255).tolist() == [0, 0, 0, 128, 191, 255, 255]


def test_psnr_by_hand():
    """Half of the pixels off by a tenth: a mean square error of 0.005."""
    clip = torch.full((3, 3, 16, 16), 0.5)
    other = clip.clone()
    other[..., ::2] += 0.1
    assert psnr(other, clip).item() == pytest.approx(10 * math.log10(1 / 0.005), rel=1e-5)
    assert psnr(clip, clip).item() == math.inf


def test_ssim_by_hand():
    """Only the luminance term is left for constant images.

    It is (2 x y + c) / (x^2 + y^2 + c) with c = 0.01^2; frames count alike, for any number of them.
    """
    clip, other = torch.full((11, 3, 16, 16), 0.5), torch.full((11, 3, 16, 16), 0.5)
    other[:4] = 0.8
    luminance = (2 * 0.5 * 0.8 + 1e-4) / (0.5**2 + 0.8**2 + 1e-4)
    assert ssim(other, clip).item() == pytest.approx((4 * luminance + 7) / 11, rel=1e-4)


def test_perceptual_distance_is_a_mean_over_frames_in_the_range_of_its_network():
    clip, other = torch.zeros(11, 3, 8, 8), torch.zeros(11, 3, 8, 8)
    other[3] = 1.0

    def network(x, y):
        assert x.min() >= -1 and y.unique().tolist() == [-1]
        return (x - y).abs().mean((1, 2, 3), keepdim=True)

    assert perceptual_distance(network, other, clip).item() == pytest.approx(2 / 11)


def test_frechet_distance_of_gaussians():
    """Samples with exact moments of normals match the closed form.

    The covariances commute.
    """
    generator = torch.Generator().manual_seed(0)
    white = torch.randn(50, 4, generator=generator, dtype=torch.float64)
    white = white - white.mean(0)
    white = white @ torch.linalg.inv(torch.linalg.cholesky(white.T @ white / 49)).T  # mean 0, covariance 1
    axes = torch.linalg.qr(torch.randn(4, 4, generator=generator, dtype=torch.float64))[0]
    scales = torch.tensor([[1.0, 2.0, 0.5, 3.0], [2.0, 0.1, 0.5, 1.0]], dtype=torch.float64)
    x, y = (white * scale @ axes.T + shift for scale, shift in zip(scales, (0.0, 0.7), strict=True))
    expected = 4 * 0.7**2 + (scales[0] - scales[1]).square().sum()
    assert_close(frechet_distance(x, y), expected, 1e-10)
    assert frechet_distance(x, x).abs() < 1e-10


def test_frechet_distance_of_covariances_that_do_not_commute():
    """Different numbers of samples: by the eigenvalues of the covariances' product."""
    generator = torch.Generator().manual_seed(1)
    x, y = (torch.randn(n, 3, generator=generator, dtype=torch.float64) for n in (9, 14))
    y = y @ torch.randn(3, 3, generator=generator, dtype=torch.float64)
    roots = torch.linalg.eigvals(x.T.cov() @ y.T.cov()).real.sqrt()
    expected = (x.mean(0) - y.mean(0)).square().sum() + x.T.cov().trace() + y.T.cov().trace() - 2 * roots.sum()
    assert_close(frechet_distance(x, y), expected, 1e-10)


# ---------------------------------------------------------------- I3D


def test_inception_has_the_entries_of_the_shared_files():
    """The network has the old files' 57 convolutions with norms, and the logits."""
    entries = {k: tuple(v.shape) for k, v in Inception3D().state_dict().items() if "num_batches" not in k}
    assert len(entries) == 57 * 5 + 2
    for name, shape in {
        "Conv3d_1a_7x7.conv3d.weight": (64, 3, 7, 7, 7),
        "Conv3d_2b_1x1.conv3d.weight": (64, 64, 1, 1, 1),
        "Conv3d_2c_3x3.bn.running_var": (192,),
        "Mixed_3b.b0.conv3d.weight": (64, 192, 1, 1, 1),
        "Mixed_3c.b1b.conv3d.weight": (192, 128, 3, 3, 3),
        "Mixed_4b.b0.conv3d.weight": (192, 480, 1, 1, 1),
        "Mixed_4f.b2b.conv3d.weight": (128, 32, 3, 3, 3),
        "Mixed_5c.b3b.conv3d.weight": (128, 832, 1, 1, 1),
        "Mixed_5c.b3b.bn.bias": (128,),
        "logits.conv3d.weight": (400, 1024, 1, 1, 1),
        "logits.conv3d.bias": (400,),
    }.items():
        assert entries[name] == shape, name


@pytest.mark.parametrize(
    ("size", "kernel", "stride", "padding"),
    [(5, 3, 2, (1, 1)), (4, 3, 2, (0, 1)), (9, 7, 2, (3, 3)), (6, 2, 2, (0, 0))],
)
def test_padding_is_that_of_tensorflow(size, kernel, stride, padding):
    x = torch.ones(1, 1, size, 1, 1)
    padded = pad_same(x, (kernel, 1, 1), (stride, 1, 1)).flatten().tolist()
    assert padded == [0.0] * padding[0] + [1.0] * size + [0.0] * padding[1]


@pytest.fixture(scope="module")
def i3d_file(tmp_path_factory) -> Path:
    """Write weights of I3D in the shared form, made up so that features depend on the video."""
    path = tmp_path_factory.mktemp("i3d") / "rgb_imagenet.pt"
    weights = seed_module_(Inception3D()).state_dict()
    for name, value in weights.items():
        if name.endswith("running_var"):
            value.fill_(1.0)
        elif name.endswith("conv3d.weight"):
            value.mul_(2**0.5)  # the ReLU halves the variance
    torch.save({name: value for name, value in weights.items() if "num_batches" not in name}, path)
    return path


@pytest.mark.slow
def test_inception_sees_the_clip(i3d_file):
    """400 numbers depend on the clip alone, which is resized to the network's size."""
    network = load_inception3d(i3d_file)
    generator = torch.Generator().manual_seed(0)
    clips = [torch.rand(FRAMES, 3, 7, 9, generator=generator), 0.1 * torch.rand(FRAMES, 3, 7, 9, generator=generator)]
    together = network(torch.cat([prepare(clip) for clip in clips]))
    assert together.shape == (2, 400)
    assert_close(together[1:], network(prepare(clips[1])), 1e-4)
    assert relative_error(together[0], together[1]) > 0.01
    assert not network.training and len(BLOCKS) == 9


def test_a_file_of_another_network_is_refused(tmp_path):
    torch.save({"fc.weight": torch.zeros(2)}, tmp_path / "other.pt")
    with pytest.raises(UserError, match=r"other.pt \(I3D\) does not fit Inception3D: it does not hold Conv3d_1a_7x7"):
        load_inception3d(tmp_path / "other.pt")


def test_frechet_distance_is_that_of_the_features():
    """Here of mean colours, which resizing keeps."""
    pairs = torch.rand(4, 2, FRAMES, 3, 1, 1, generator=torch.Generator().manual_seed(0)).expand(-1, -1, -1, -1, 8, 6)
    distance = FrechetVideoDistance(lambda video: video.mean((2, 3, 4)))
    for reconstruction, clip in pairs:
        distance.add(reconstruction, clip)
    x, y = (2 * pairs.double().mean((2, 4, 5)) - 1).unbind(1)
    assert_close(distance.compute(), frechet_distance(x, y), 1e-5)


def test_frechet_distance_refuses_too_little():
    distance = FrechetVideoDistance(torch.nn.Identity())
    with pytest.raises(UserError, match="a clip has 5 frames; the I3D network needs at least 9"):
        distance.add(torch.zeros(5, 3, 8, 8), torch.zeros(5, 3, 8, 8))
    with pytest.raises(UserError, match="got 0 clip; at least 2 are needed"):
        distance.compute()


# ---------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Write clips to `data`, a VAE to `vae.pt`, and configurations that fit them."""
    folder = tmp_path_factory.mktemp("evaluate")
    write_dataset(folder / "data", 3, frames=20)
    first_stage = load_configs([ROOT / "configs" / "tiny" / "cogvideox_tiny.yaml"])["model"]["first_stage_config"]
    params = first_stage["params"] = {**first_stage["params"], "ckpt_path": None}
    torch.save({"state_dict": seed_module_(instantiate_from_config(first_stage)).state_dict()}, folder / "vae.pt")

    def write(name: str, model: dict | None, clips: dict | None) -> None:
        sections = {"model": model}
        if clips is not None:
            size = {"video_size": [HEIGHT, WIDTH], "fps": 8, "max_num_frames": FRAMES, "skip_frms_num": 0}
            sections["data"] = {"target": "data_video.SFTDataset", "params": {**size, **clips}}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(sections))

    weights = {"ckpt_path": str(folder / "vae.pt")}
    sampling = {"first_stage_config": {**first_stage, "params": {**params, **weights}}, "scale_factor": 0.7}
    training = {
        "target": "sgm.models.autoencoder.VideoAutoencodingEngine",
        "base_learning_rate": 1e-4,
        "params": params,
    }
    write("sampling", sampling, {})
    write("training", training, {"max_num_frames": 17})
    write("no_data", sampling, None)
    write("no_model", None, {})
    write("even", sampling, {"max_num_frames": 8})
    write("odd", sampling, {"video_size": [32, 44]})
    (folder / "cache").mkdir()
    (folder / "cache" / "cache.json").write_text("{}")
    return folder


@pytest.fixture(scope="module")
def backbone(tmp_path_factory) -> Path:
    """Write made-up weights of LPIPS' smallest backbone."""
    path = tmp_path_factory.mktemp("lpips") / "squeezenet.pth"
    torch.save(seed_module_(torchvision.models.squeezenet1_1()).state_dict(), path)
    return path


@pytest.mark.slow
def test_from_clips_to_numbers_and_videos(folder, backbone, i3d_file, tmp_path, capsys):
    """All measures of a clip, and its video, equal the VAE's own reconstruction."""
    command = ["--base", f"{folder}/sampling.yaml", "--data", f"{folder}/data", "--device", "cpu"]
    command += ["--lpips_net", "squeeze", "--lpips_weights", str(backbone), "--i3d_weights", str(i3d_file)]
    command += ["--output", str(tmp_path / "videos"), "--json", str(tmp_path / "numbers.json")]
    assert main([*command, "--num_clips", "2", "--num_videos", "1"]) == 0

    lines = capsys.readouterr().out.splitlines()
    numbers = json.loads((tmp_path / "numbers.json").read_text())
    clips, means = numbers["clips"], numbers["means"]
    assert lines[0] == f"2 clips of {FRAMES} frames of {HEIGHT}x{WIDTH}"
    assert [line.split()[:2] for line in lines[1:5]] == [[name, f"{means[name]:.4f}"] for name in means]
    assert list(means) == ["PSNR", "SSIM", "LPIPS", "rFVD"]
    assert lines[5] == f"input | reconstruction | difference x4: {tmp_path}/videos/00000.mp4" and len(lines) == 6
    assert [clip["name"] for clip in clips] == [f"{folder}/data/videos/00{i}.mp4" for i in (0, 1)]
    for name in ("PSNR", "SSIM", "LPIPS"):
        assert means[name] == pytest.approx((clips[0][name] + clips[1][name]) / 2)
    assert means["rFVD"] > 0

    original, reconstruction = reconstructed_by_hand(folder)
    error = ((original - reconstruction).astype(np.float64) / 255) ** 2
    assert clips[0]["PSNR"] == pytest.approx(10 * math.log10(1 / error.mean()), abs=1e-3)
    meta, frames = read_video(tmp_path / "videos" / "00000.mp4")
    assert meta["fps"] == 8 and frames.shape == (FRAMES, 3, HEIGHT, 3 * WIDTH)
    shown = ((frames + 1) * 127.5).split(WIDTH, dim=3)
    difference = np.minimum(4 * abs(original - reconstruction), 255)
    for part, expected in zip(shown, (original, reconstruction, difference), strict=True):
        # Colours are stored at half the resolution: compare brightness.
        assert np.corrcoef(*(brightness(np.asarray(each)) for each in (part, expected)))[0, 1] > 0.95


def brightness(frames: np.ndarray) -> np.ndarray:
    """Return the brightness as H.264 in BT.709 stores it."""
    return np.tensordot(frames, [0.2126, 0.7152, 0.0722], axes=(1, 0)).flatten()


def reconstructed_by_hand(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return the first clip and its decoded chunks: (frames, 3, height, width), 0 to 255."""
    config = yaml.safe_load((folder / "sampling.yaml").read_text())
    vae = instantiate_from_config(config["model"]["first_stage_config"]).eval()
    clip = SFTDataset(str(folder / "data"), [HEIGHT, WIDTH], 8, FRAMES, 0, random_start=False)[0]["mp4"]
    with torch.no_grad():
        mean = vae.encode(clip.float().transpose(0, 1)[None] / 127.5 - 1, unregularized=True)[0].chunk(2, dim=1)[0]
        decoded = torch.cat(list(vae.decode_chunks(mean)), dim=2)[0].transpose(0, 1)
    pixels = ((decoded + 1) * 127.5).round().clamp(0, 255)
    return clip.numpy().astype(np.float64), pixels.numpy().astype(np.float64)


@pytest.mark.slow
def test_a_training_configuration_and_what_is_missing(folder, tmp_path, capsys, monkeypatch):
    """Weights come from --ckpt; a measure that fails is reported, and the others work."""

    def offline(*_, **__):
        raise URLError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    command = ["--base", f"{folder}/training.yaml", "--data", f"{folder}/data", "--ckpt", f"{folder}/vae.pt"]
    command += ["--device", "cpu", "--num_clips", "1", "--num_videos", "0", "--output", str(tmp_path / "videos")]
    psnrs = []
    for decoding in ([], ["--whole"]):
        assert main([*command, *decoding]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert [line.split()[0] for line in lines] == ["1", "PSNR", "SSIM", "LPIPS:", "rFVD:"]
        assert "cannot download the weights" in lines[3] and "set --lpips_weights to the file" in lines[3]
        assert lines[4] == "rFVD: not computed; give the weights of I3D as --i3d_weights"
        psnrs.append(lines[1])
    assert psnrs[0] != psnrs[1]  # a chunk has statistics of its own
    assert not (tmp_path / "videos").exists()


def test_unreadable_clips_are_left_out(folder, tmp_path, capsys, caplog, monkeypatch):
    """Another clip must not count twice in their place, and the other measures are reported."""
    features = torch.nn.Flatten()
    monkeypatch.setattr("cogvideox_sat.evaluation.vae_report.load_inception3d", lambda _: features)
    write_dataset(tmp_path / "data", 2, frames=12)
    content = bytearray((tmp_path / "data" / "videos" / "001.mp4").read_bytes())
    begin = content.index(b"mdat") + 4
    content[begin : begin + 400] = bytes(400)
    (tmp_path / "data" / "videos" / "001.mp4").write_bytes(content)
    command = ["--base", f"{folder}/sampling.yaml", "--data", f"{tmp_path}/data", "--device", "cpu"]
    with caplog.at_level(logging.WARNING, "evaluate_vae"):
        more = ["--lpips_net", "none", "--num_videos", "0", "--i3d_weights", f"{folder}/vae.pt"]
        assert main([*command, *more]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("1 clip of 9 frames") and lines[1].startswith("PSNR")
    assert lines[-1] == "rFVD: not computed: 1 clip could be read, and at least 2 are needed"
    assert "left out, unreadable" in caplog.text and "001.mp4" in caplog.text


CASES = {
    "no files": (["--data", "{folder}/data"], "--base: missing; name the configuration of the VAE"),
    "no data": (["--base", "{folder}/sampling.yaml"], "--data: missing; name a folder of clips"),
    "data not there": (["--data", "/nowhere"], "--data: /nowhere does not exist"),
    "latents": (["--data", "{folder}/cache"], "has latents; name the clips that it was made from"),
    "unknown argument": (["--clips", "3"], "unrecognized arguments: --clips; did you mean --num_clips?"),
    "no clips": (["--num_clips", "0"], "--num_clips: got 0; it must be at least 1"),
    "too few clips": (
        ["--i3d_weights", "{folder}/data", "--num_clips", "1"],
        "--num_clips: got 1; it must be at least 2",
    ),
    "weights not there": (["--ckpt", "/nowhere/vae.pt"], "--ckpt: /nowhere/vae.pt does not exist"),
    "unused weights": (["--lpips_net", "none", "--lpips_weights", "{folder}/data"], "but --lpips_net is none"),
    "folder for numbers": (["--json", "{folder}"], "is a folder; name a file"),
    "device": (["--device", "gpu"], "--device: got 'gpu'; it can be cpu, cuda or cuda:N"),
    "no weights": (["--base", "{folder}/training.yaml"], "--ckpt and model.params.ckpt_path are missing"),
    "no VAE": (["--base", "{folder}/no_model.yaml"], "model.first_stage_config.params.encoder_config: missing"),
    "no data section": (["--base", "{folder}/no_data.yaml"], "data.target: missing; also name configs/sft.yaml"),
    "frames": (["--base", "{folder}/even.yaml"], "max_num_frames: got 8; clips are cut to 4k+1"),
    "size": (["--base", "{folder}/odd.yaml"], "width 44 does not fit"),
}


def test_mistakes_are_one_line_before_pytorch_comes_in(folder):
    mistakes = {}
    for name, (arguments, says) in CASES.items():
        given = [argument.format(folder=folder) for argument in arguments]
        if "--base" not in given and name != "no files":
            given += ["--base", f"{folder}/sampling.yaml"]
        if "--data" not in given and name != "no data":
            given += ["--data", f"{folder}/data"]
        mistakes[name] = given, says
    assert_told_before_pytorch("evaluate_vae", mistakes)


def test_help_needs_no_pytorch():
    command = [sys.executable, "-X", "importtime", str(TOOL), "--help"]
    process = subprocess.run(command, capture_output=True, text=True, check=True)
    for flag in ("--base", "--data", "--ckpt", "--lpips_weights", "--i3d_weights", "configs/vae_3d.yaml"):
        assert flag in process.stdout
    assert " torch\n" not in process.stderr
