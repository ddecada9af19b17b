"""Test the fields of a request and their errors.

`.jsonl` files are tested in tests/sampling/test_prompt_inputs.py.
"""

import pytest

from cogvideox_sat.configuration.files import load_configs
from cogvideox_sat.configuration.request_fields import FIELDS, checked_fields, offered_fields
from cogvideox_sat.files.shipped import CONFIGS
from sgm.errors import UserError


def model(name: str):
    return load_configs([CONFIGS / name])["model"]


def test_what_is_given_and_nothing_else():
    given = {"prompt": "a", "seed": None, "size": [64, 96], "guidance_interval": [0, 1], "sampler": "ddim"}
    expected = {"prompt": "a", "size": (64, 96), "guidance_interval": (0, 1), "sampler": "VideoDDIMSampler"}
    assert checked_fields(given, "here: ") == expected


@pytest.mark.parametrize("value", [True, float("nan"), float("inf"), -1, 1001, "6", [6]])
def test_a_guidance_scale_is_a_number(value):
    with pytest.raises(UserError, match="here: 'guidance_scale' must be a number from 0 to 1000"):
        checked_fields({"prompt": "a", "guidance_scale": value}, "here: ")


@pytest.mark.parametrize("value", [[0, 0], [0.5, 0.2], [0, 2], [-0.1, 1], [0.5], 0.5, ["0", "1"], [False, True]])
def test_an_interval_is_two_shares(value):
    with pytest.raises(UserError, match="here: 'guidance_interval' must be two shares"):
        checked_fields({"prompt": "a", "guidance_interval": value}, "here: ")


@pytest.mark.parametrize(
    ("name", "sizes", "lengths", "has_image"),
    [
        ("tiny/cogvideox_tiny.yaml", (8, (64, 64)), [1, 9], False),
        ("cogvideox_5b_i2v.yaml", (16, (480, 720)), [1, 9, 17, 25, 33, 41, 49], True),
        ("cogvideox1.5_5b.yaml", (16, (2400, 2400)), list(range(1, 162, 8)), False),
    ],
)
def test_a_model_offers_what_it_takes(name, sizes, lengths, has_image):
    offered = offered_fields(model(name), {"fps": 8})
    assert offered.keys() == FIELDS.keys() - {"num_frames"} - (set() if has_image else {"image", "keyframes"})
    size = offered["size"]
    assert (size.least, size.most, size.step) == (sizes[0], sizes[1], sizes[0])
    assert offered["frames"].choices == lengths and offered["fps"].usual == 8
    assert offered["guidance_scale"].usual == 6 and offered["sampler"].usual in offered["sampler"].choices


def test_a_model_without_guidance_offers_none():
    section = model("tiny/cogvideox_tiny.yaml")
    del section["sampler_config"]["params"]["guider_config"]
    assert not [name for name in offered_fields(section, {}) if name.startswith("guidance")]


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("video", ["a.mp4"], ["", 3]),
        ("strength", [0, 0.5, 1], [-0.1, 1.5, "half", True]),
        ("extend", [1, ["a", "b"]], [0, -1, [], ["a", 3], 10**6, 1.5]),
        ("keyframes", [[{"image": "a.png", "at": -1}]], [[], "a.png", [{"image": "a.png"}], [{"image": 3, "at": 0}]]),
    ],
)
def test_what_a_request_may_show(name, good, bad):
    for value in good:
        assert name in checked_fields({"prompt": "a", name: value}, "")
    for value in bad:
        with pytest.raises(UserError, match=f"'{name}' must be "):
            checked_fields({"prompt": "a", name: value}, "")
