"""Test sizes of videos that follow from their images, and the share that is cropped."""

import logging
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from arguments import get_args
from cogvideox_sat.configuration.frame_sizes import share_cut_away, size_from_image, size_of_image
from cogvideox_sat.configuration.model_limits import ModelLimits
from cogvideox_sat.sampling.planned_videos import plan_videos
from cogvideox_sat.sampling.prompt_requests import PromptRequest
from cogvideox_sat.sampling.request_checks import video_size

ROOT = Path(__file__).parents[2]
I2V_15 = str(ROOT / "configs" / "cogvideox1.5_5b_i2v.yaml")
I2V_10 = str(ROOT / "configs" / "cogvideox_5b_i2v.yaml")


@pytest.fixture
def limits():
    return ModelLimits.from_config(get_args(["--base", I2V_15, "--input_file", "p"]).model_config)


@pytest.mark.parametrize(
    ("image", "size"),
    [
        ((1080, 1920), (768, 1360)),  # 1365.3
        ((1920, 1080), (1360, 768)),
        ((500, 500), (768, 768)),
        ((480, 720), (768, 1152)),
        ((100, 133), (768, 1024)),  # 1021.4
        ((1000, 9000), (768, 2400)),  # the model's largest
        ((9000, 1000), (2400, 768)),
    ],
)
def test_size_from_image(limits, image, size):
    assert size_from_image(image, limits) == size
    limits.check_size(*size, "size")


def test_the_limits_of_a_small_model(limits):
    small = replace(limits, largest=(22, 9, 12))  # 72x96 pixels, of which multiples of 16
    assert size_from_image((1080, 1920), small) == (48, 96)
    assert size_from_image((100, 60), small) == (64, 48)
    assert size_from_image((10, 9000), small) == (16, 96)


def picture(path: Path, height: int, width: int, **options) -> Path:
    Image.new("RGB", (width, height)).save(path, **options)
    return path


def test_size_of_image(tmp_path):
    assert size_of_image(picture(tmp_path / "a.png", 30, 40)) == (30, 40)
    turned = Image.Exif()
    turned[0x0112] = 6
    assert size_of_image(picture(tmp_path / "a.jpg", 30, 40, exif=turned)) == (40, 30)
    (tmp_path / "b.png").write_bytes(b"no picture")
    assert size_of_image(tmp_path / "b.png") is None
    assert size_of_image(tmp_path / "gone.png") is None


@pytest.mark.parametrize(
    ("image", "size", "lost"),
    [
        ((480, 720), (480, 720), 0),
        ((480, 720), (240, 360), 0),
        ((100, 200), (64, 64), 0.5),
        ((200, 100), (64, 64), 0.5),
        ((720, 480), (480, 720), 5 / 9),
        ((100, 100), (50, 100), 0.5),
        ((1, 4), (1, 1), 0.75),
    ],
)
def test_share_cut_away(image, size, lost):
    assert share_cut_away(image, size) == pytest.approx(lost)


def plan(tmp_path, config: str, height: int, width: int, *arguments: str, **request):
    image = picture(tmp_path / "image.png", height, width)
    folder = ("--output_dir", str(tmp_path / "out"), "--input_file", "p")
    args = get_args(["--base", config, *folder, *arguments])
    return plan_videos([PromptRequest(0, "a boat", image=image, **request)], args)[0].size


def test_without_a_size_1_5_takes_that_of_the_image_and_says_so(tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        assert plan(tmp_path, I2V_15, 1200, 800) == (1152, 768)
    assert "the video has 1152x768 pixels" in caplog.text
    assert "cut away" not in caplog.text


def test_a_size_that_is_given_wins_and_a_large_crop_warns(tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        assert plan(tmp_path, I2V_15, 1200, 800, "--sampling_image_size", "768", "1360") == (768, 1360)
    assert "62 % of the picture is cut away" in caplog.text and "follows from the image" not in caplog.text
    assert plan(tmp_path, I2V_15, 1200, 800, size=(768, 1360)) == (768, 1360)


def test_1_0_keeps_its_size_and_warns(tmp_path, caplog):
    assert plan(tmp_path, I2V_10, 720, 480) == (480, 720)
    assert "prompt 1" in caplog.text and "56 % of the picture is cut away" in caplog.text
    caplog.clear()
    assert plan(tmp_path, I2V_10, 480, 600) == (480, 720)  # a sixth
    assert "cut away" not in caplog.text


def test_an_image_that_cannot_be_read_fails_later_and_alone(tmp_path):
    args = get_args(["--base", I2V_15, "--input_file", "p"])
    (tmp_path / "b.png").write_bytes(b"no picture")
    assert video_size(PromptRequest(0, "a", image=tmp_path / "b.png"), args) == (768, 1360)
