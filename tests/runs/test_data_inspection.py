"""`--inspect_data` reports and shows the training data, and leaves no other files."""

import json
from pathlib import Path

import pytest
import yaml
from PIL import Image

import train_vae
import train_video
import vae_runs
from cogvideox_sat.clips.latent_cache import is_cache
from training_clips import write_clip, write_dataset
from training_runs import precomputed, write_config


@pytest.fixture
def place(tmp_path) -> Path:
    """Return four clips with one problem each, and a file of an unsupported kind.

    The problems are a missing caption, a short clip, and a file that is not a video.
    """
    folder = write_dataset(tmp_path / "set", clips=5, frames=17)
    (folder / "labels" / "003.txt").unlink()
    write_clip(folder / "videos" / "004.mp4", 3)
    (folder / "videos" / "bad.mp4").write_text("not a video")
    (folder / "videos" / "a.heic").touch()
    return folder


@pytest.fixture
def config(tiny, place, tmp_path) -> Path:
    """Write the configuration of a model whose weights are gone."""
    settings = {"max_unreadable_share": 0.5, "seed": 3, "params": {"video_size": [64, 96]}}
    path = write_config(tmp_path / "config.yaml", tiny, "2b", place, **settings)
    content = yaml.safe_load(path.read_text())
    content["args"]["load"] = "/nowhere"
    path.write_text(yaml.safe_dump(content))
    return path


def test_what_is_said_and_left_behind(config, place, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = {path for path in tmp_path.rglob("*") if not path.name.startswith(".")}
    assert train_video.main(["--base", str(config), "--inspect_data"]) == 0
    said = capsys.readouterr().out
    assert "train_data: 4 clips, 1 without a caption" in said
    assert "4 videos and 0 pictures give 4 clips" in said
    assert "shapes: 4 of 9 frames of 64x96" in said
    assert f"left out: 1 video is shorter than 0.5 s (clips have 5 frames at least): {place}/videos/004.mp4" in said
    assert f"unreadable: {place}/videos/bad.mp4: not a video" in said
    assert "not read: 1 .heic" in said and "contact sheet: inspect_data.png" in said
    after = {path for path in tmp_path.rglob("*") if not path.name.startswith(".")}
    assert after - before == {tmp_path / "inspect_data.png"}
    with Image.open("inspect_data.png") as sheet:
        assert sheet.height > 4 * 128 and sheet.width > 9 * 128


@pytest.mark.slow
def test_scripts_get_json(config, place, tmp_path, capsys):
    sheet = tmp_path / "sheets" / "a.png"
    flags = ["--inspect_data", "--json", "--contact_sheet", str(sheet), "--valid_data", str(place)]
    flags += ["--train_data", str(place), "--train_data_repeats", "2"]
    assert train_video.main(["--base", str(config), *flags]) == 0
    said = json.loads(capsys.readouterr().out)
    train = said["train_data"]
    assert (train["samples"], train["captions_missing"], train["shapes"]) == (8, 2, {"9 frames of 64x96": 8})
    assert said["valid_data"]["samples"] == 4 and said["problems"] == []
    (found,) = train["places"]
    assert (found["location"], found["repeat"], found["videos"], found["unread"]) == (str(place), 2, 4, {".heic": 1})
    assert found["seconds"] == {"min": 2.125, "median": 2.125, "max": 2.125}
    assert [left["count"] for left in found["left_out"].values()] == [1]
    assert said["contact_sheet"] == str(sheet) and sheet.is_file()


def test_names_that_are_no_text(config, place, tmp_path, capsys, monkeypatch):
    """Output is UTF-8 whatever files are called; each is told on one line."""
    for name in ("bad\udcff.mp4", "two\nlines.mp4"):
        (place / "videos" / name).write_text("not a video")
    monkeypatch.chdir(tmp_path)
    assert train_video.main(["--base", str(config), "--inspect_data", "--json"]) == 0
    unreadable = json.loads(capsys.readouterr().out.encode())["train_data"]["unreadable"]
    names = [line.removeprefix(f"{place}/videos/").partition(":")[0] for line in unreadable]
    assert names == ["bad.mp4", "bad\\udcff.mp4", "two\\nlines.mp4"]


def test_what_would_stop_a_training_is_an_error_after_all_has_been_said(config, tmp_path, capsys, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    assert train_video.main(["--base", str(config), "--inspect_data", "--json", "--max_unreadable_share", "0"]) == 2
    said = json.loads(capsys.readouterr().out)
    assert said["train_data"]["samples"] == 4
    assert "1 of 5 clips are unreadable, more than max_unreadable_share 0" in said["problems"][0]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--json"], "json: inspect_data is off"),
        (
            ["--inspect_data", "--contact_sheet", "a.jpg"],
            "contact_sheet: got a.jpg; expected a name that ends with",
        ),
        (["--inspect_data", "--train_data", "/nowhere"], "/nowhere"),
    ],
)
def test_mistakes_are_named(config, flags, message, caplog):
    assert train_video.main(["--base", str(config), *flags]) == 2
    assert message in caplog.text


def test_the_vaes_clips_need_no_captions(place, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (32, 32)).save(place / "picture.png")
    config = vae_runs.write_config(tmp_path / "vae.yaml", place, args={"max_unreadable_share": 0.5, "batch_size": 1})
    assert train_vae.main(["--base", str(config), "--inspect_data"]) == 0
    said = capsys.readouterr().out
    assert "4 videos and 1 pictures give 5 clips" in said
    assert "4 of 5 frames of 16x16" in said and "1 of 1 frames of 16x16" in said
    assert Path("inspect_data.png").is_file() and not Path("runs").exists()


@pytest.mark.slow
def test_a_cache_is_described_but_not_shown(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = write_dataset(tmp_path / "set", clips=2, frames=9)
    cache = precomputed(tmp_path, tiny, "2b", data)
    assert is_cache(cache)
    config = write_config(tmp_path / "config.yaml", tiny, "2b", cache)
    capsys.readouterr()
    assert train_video.main(["--base", str(config), "--inspect_data"]) == 0
    said = capsys.readouterr().out
    assert "train_data: 2 clips, 0 without a caption" in said and "contact sheet: none" in said
    assert not Path("inspect_data.png").exists()
    # An option that the clips of the cache were not made with is refused.
    content = yaml.safe_load(config.read_text())
    content["data"]["params"]["horizontal_flip"] = 0.5
    config.write_text(yaml.safe_dump(content))
    assert train_video.main(["--base", str(config), "--inspect_data"]) == 2
