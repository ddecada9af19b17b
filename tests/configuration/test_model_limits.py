"""Test that a model's limits follow from its configuration.

The sizes of the released models are accepted, and impossible sizes are refused with a suggestion.
"""

from pathlib import Path

import pytest

from cogvideox_sat.configuration.files import load_configs
from cogvideox_sat.configuration.model_limits import ModelLimits
from sgm.errors import UserError

CONFIGS = Path(__file__).parents[2] / "configs"


def limits_of(name: str) -> ModelLimits:
    return ModelLimits.from_config(load_configs([CONFIGS / f"{name}.yaml"], used=())["model"])


@pytest.mark.parametrize("name", ["cogvideox_2b", "cogvideox_5b", "cogvideox_5b_i2v"])
def test_first_generation(name):
    limits = limits_of(name)
    for frames in (1, 9, 11, 13):
        limits.check_clip(frames, 480, 720)
    limits.check_clip(13, 16, 720)
    for frames in (0, 12, 15):
        with pytest.raises(UserError, match=f"sampling_num_frames: got {frames}; this model takes an odd number .* 13"):
            limits.check_clip(frames, 480, 720)
    with pytest.raises(UserError, match=r"height 488 does not fit; this model takes multiples of 16 up to 480, .* 480"):
        limits.check_clip(13, 488, 720)
    with pytest.raises(UserError, match=r"width 100 does not fit; .* for example 96"):
        limits.check_clip(13, 480, 100)


@pytest.mark.parametrize("name", ["cogvideox1.5_5b", "cogvideox1.5_5b_i2v"])
def test_second_generation(name):
    limits = limits_of(name)
    assert limits.extra_frames == 1
    for frames in (2, 20, 22, 42):
        limits.check_clip(frames, 768, 1360)
    limits.check_clip(22, 1360, 768)
    for frames in (0, 13, 44):
        with pytest.raises(
            UserError, match=f"sampling_num_frames: got {frames}; this model takes an even number .* 42"
        ):
            limits.check_clip(frames, 768, 1360)
    with pytest.raises(UserError, match="height 2416 does not fit"):
        limits.check_clip(22, 2416, 768)


@pytest.mark.parametrize(
    ("name", "image_to_video"),
    [("cogvideox_5b", False), ("cogvideox_5b_i2v", True), ("cogvideox1.5_5b", False), ("cogvideox1.5_5b_i2v", True)],
)
def test_modes(name, image_to_video):
    limits = limits_of(name)
    limits.check_mode(image_to_video, latent_channels=16)
    with pytest.raises(UserError, match="image-to-video model" if image_to_video else "text-to-video model"):
        limits.check_mode(not image_to_video, latent_channels=16)
    with pytest.raises(UserError, match="latent_channels: got 4; this model has 16"):
        limits.check_mode(image_to_video, latent_channels=4)


@pytest.mark.parametrize("value", [None, "49", 49.0, True, 0])
@pytest.mark.parametrize(
    "name", ["num_frames", "time_compressed_rate", "latent_height", "latent_width", "patch_size", "in_channels"]
)
def test_numbers_that_are_none_are_named(name, value):
    model = load_configs([CONFIGS / "cogvideox_2b.yaml"], used=())["model"]
    model["network_config"]["params"][name] = value
    with pytest.raises(UserError, match=f"model.network_config.params.{name}: got {value!r}; expected"):
        ModelLimits.from_config(model)
