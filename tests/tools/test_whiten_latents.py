"""Whitened latents have unit covariance, right posteriors and equal reconstructions."""

from pathlib import Path

import pytest
import torch
import yaml

from cogvideox_sat.configuration.files import load_configs
from data_video import SFTDataset
from seeded import seed_module_
from sgm.util import instantiate_from_config
from support import assert_close
from tools.whiten_latents import covariance_of, inverse_root, main, map_latents, nearest_rotation
from training_clips import write_dataset

ROOT = Path(__file__).parents[2]
CLIPS, FRAMES, HEIGHT, WIDTH = 6, 9, 32, 48

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Write clips to `data`, a random VAE to `vae.pt`, and `vae.yaml` for both."""
    folder = tmp_path_factory.mktemp("whiten")
    write_dataset(folder / "data", CLIPS, frames=20)
    (folder / "cache").mkdir()
    (folder / "cache" / "cache.json").write_text("{}")
    first_stage = load_configs([ROOT / "configs" / "tiny" / "cogvideox_tiny.yaml"])["model"]["first_stage_config"]
    first_stage["params"]["ckpt_path"] = None
    vae = seed_module_(instantiate_from_config(first_stage))
    torch.save({"state_dict": vae.state_dict()}, folder / "vae.pt")
    first_stage["params"]["ckpt_path"] = str(folder / "vae.pt")
    size = {"video_size": [HEIGHT, WIDTH], "fps": 8, "max_num_frames": FRAMES, "skip_frms_num": 0}
    data = {"target": "data_video.SFTDataset", "params": size}
    (folder / "vae.yaml").write_text(yaml.safe_dump({"model": {"first_stage_config": first_stage}, "data": data}))
    return folder


def build(folder: Path, weights: Path | None = None):
    config = yaml.safe_load((folder / "vae.yaml").read_text())["model"]["first_stage_config"]
    if weights:
        config["params"]["ckpt_path"] = str(weights)
    return instantiate_from_config(config).eval()


def clips_of(folder: Path) -> list[torch.Tensor]:
    dataset = SFTDataset(str(folder / "data"), [HEIGHT, WIDTH], 8, FRAMES, 0, random_start=False)
    return [(dataset[i]["mp4"].float() / 127.5 - 1).transpose(0, 1)[None] for i in range(CLIPS)]


def command(folder: Path, output: Path, *more: str) -> list[str]:
    return ["--base", f"{folder}/vae.yaml", "--data", f"{folder}/data", "--output", str(output), *more]


@pytest.mark.slow
@torch.no_grad()
def test_latents_are_white_and_clips_come_back_the_same(folder, tmp_path):
    """The command gives latents of unit covariance and unchanged reconstructions."""
    assert main(command(folder, tmp_path / "white.safetensors")) == 0
    old, new = build(folder), build(folder, tmp_path / "white.safetensors")
    old_means, new_means = (
        [vae.encode(clip, unregularized=True)[0].chunk(2, dim=1)[0] for clip in clips_of(folder)] for vae in (old, new)
    )
    assert_close(covariance_of(new_means), torch.eye(16, dtype=torch.float64), 1e-3)
    assert (covariance_of(old_means) - torch.eye(16)).abs().max() > 0.1
    for old_mean, new_mean in zip(old_means, new_means, strict=True):
        assert_close(new.decode_at_once(new_mean), old.decode_at_once(old_mean), 1e-4)


@pytest.mark.slow
@torch.no_grad()
def test_near_turns_white_latents_back(folder, tmp_path):
    """Latents that were mixed become the original's again with --near."""
    assert main(command(folder, tmp_path / "white.safetensors")) == 0
    mixed = build(folder, tmp_path / "white.safetensors")
    map_latents(mixed, torch.randn(16, 16, generator=torch.Generator().manual_seed(2), dtype=torch.float64))
    torch.save({"state_dict": mixed.state_dict()}, tmp_path / "mixed.pt")
    more = ["--ckpt", f"{tmp_path}/mixed.pt", "--near", f"{tmp_path}/white.safetensors"]
    assert main(command(folder, tmp_path / "near.safetensors", *more)) == 0
    white, near = (build(folder, tmp_path / f"{name}.safetensors") for name in ("white", "near"))
    for clip in clips_of(folder):
        old, new = (vae.encode(clip, unregularized=True)[0].chunk(2, dim=1)[0] for vae in (white, near))
        assert_close(new, old, 1e-2)


def test_nearest_rotation():
    """It undoes a rotation, and is the nearest orthogonal map for other maps."""
    generator = torch.Generator().manual_seed(3)
    b = torch.randn(5, 400, generator=generator, dtype=torch.float64)
    turn, other = (torch.linalg.qr(torch.randn(5, 5, generator=generator, dtype=torch.float64)).Q for _ in range(2))
    assert_close(nearest_rotation(turn @ b @ b.mT), turn, 1e-9)
    a = torch.randn(5, 5, generator=generator, dtype=torch.float64) @ b
    found = nearest_rotation(a @ b.mT)
    assert_close(found @ found.mT, torch.eye(5, dtype=torch.float64), 1e-9)
    assert (found @ b - a).square().sum() < min((each @ b - a).square().sum() for each in (turn, other, other @ found))


@pytest.mark.slow
@torch.no_grad()
def test_posteriors_follow_the_map(folder):
    """Equal log-variances of a posterior's channels map exactly: s²·(M·Mᵀ), diagonal.

    Means are M times the old ones everywhere.
    """
    old, new = build(folder), build(folder)
    for vae in (old, new):
        last = vae.encoder.conv_out.conv
        last.weight[16:] = last.weight[16:17].clone()
        last.bias[16:] = -3.0
    matrix = torch.randn(16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    map_latents(new, matrix)
    (mean, variance), (new_mean, new_variance) = (
        vae.encode(clips_of(folder)[0], unregularized=True)[0].double().chunk(2, dim=1) for vae in (old, new)
    )
    assert_close(new_mean, torch.einsum("oi,bi...->bo...", matrix, mean), 1e-5)
    spread = (matrix @ matrix.mT).diagonal().log()[:, None, None, None]
    assert_close(new_variance, variance + spread, 1e-5)


def test_the_map_changes_latents_least():
    """The inverse root is symmetric, and leaves latents that are white already as they are."""
    root = torch.randn(5, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    covariance = root @ root.mT
    matrix = inverse_root(covariance)
    assert_close(matrix @ covariance @ matrix.mT, torch.eye(5, dtype=torch.float64), 1e-9)
    assert_close(matrix, matrix.mT, 1e-9)
    assert_close(inverse_root(torch.eye(5, dtype=torch.float64)), torch.eye(5, dtype=torch.float64), 1e-12)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--output", "vae.pt"], "end with .safetensors"),
        (["--num_clips", "0"], "--num_clips: got 0; it must be at least 1"),
        (["--data", "{folder}/cache"], "has latents"),
        (["--data", "/nowhere"], "/nowhere does not exist"),
        (["--ckpt", "/nowhere.pt"], "/nowhere.pt does not exist"),
        (["--near", "/nowhere.pt"], "/nowhere.pt does not exist"),
        (["--output", "{folder}/there.safetensors"], "exists; give --overwrite"),
    ],
)
def test_mistakes_are_one_line(folder, tmp_path, caplog, more, says):
    (folder / "there.safetensors").touch()
    more = [argument.format(folder=folder) for argument in more]
    assert main(command(folder, tmp_path / "new.safetensors", *more)) == 2
    assert says in caplog.text and "\n" not in caplog.text.strip()
    assert not (tmp_path / "new.safetensors").exists()


def test_too_few_clips_to_measure_on(folder, tmp_path, caplog):
    """Constant latents vary in no direction: nothing is divided by zero, nothing is written."""
    vae = build(folder)
    vae.encoder.conv_out.conv.weight.data[:16] = 0
    torch.save({"state_dict": vae.state_dict()}, tmp_path / "flat.pt")
    assert main(command(folder, tmp_path / "new.safetensors", "--ckpt", str(tmp_path / "flat.pt"))) == 2
    assert "do not vary in all directions" in caplog.text
    vae.encoder.conv_out.conv.bias.data[0] = float("nan")
    torch.save({"state_dict": vae.state_dict()}, tmp_path / "flat.pt")
    assert main(command(folder, tmp_path / "new.safetensors", "--ckpt", str(tmp_path / "flat.pt"))) == 2
    assert "the latents are not finite; name other weights" in caplog.text
    assert not (tmp_path / "new.safetensors").exists()
