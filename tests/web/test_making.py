"""Inputs become a request, and every mistake is one line that begins with the field."""

import pytest

from cogvideox_sat.configuration.sampler_knobs import sampler_class
from cogvideox_sat.web.making import (
    PICTURE_INPUTS,
    adapters_of,
    filled_in,
    model_for,
    request_fields,
)
from cogvideox_sat.web.models import offered_models
from cogvideox_sat.web.shelves import Shelf
from cogvideox_sat.web.uploads import Uploads
from sgm.errors import UserError


@pytest.fixture(scope="module")
def models():
    return offered_models([["tiny"], ["tiny_i2v"]], {})


@pytest.fixture
def uploads():
    uploads = Uploads(1000)
    for name in ("a.png", "b.png", "clip.mp4"):
        (uploads.folder / name).touch()
    yield uploads
    uploads.close()


def test_a_text_alone_is_enough(models, uploads):
    fields = request_fields(models["tiny"], {"prompt": " a  kite\n", "negative_prompt": "", "steps": None}, uploads)
    assert fields.pop("seed") in range(2**32)
    assert fields == {"prompt": "a kite"}


def test_seeds_differ_where_none_is_given(models, uploads):
    assert len({request_fields(models["tiny"], {"prompt": "p"}, uploads)["seed"] for _ in range(5)}) == 5


def test_all_fields_are_taken(models, uploads):
    given = {
        "prompt": "p", "negative_prompt": "n", "height": 32, "width": 48.0, "frames": "9", "fps": 12, "steps": 5,
        "seed": "9223372036854775807", "sampler": "ddim", "guidance_scale": "4.5", "interval_from": 0.2,
        "interval_to": 0.8, "guidance_schedule": "constant",
    }  # fmt: skip
    assert request_fields(models["tiny"], given, uploads) == {
        "prompt": "p", "negative_prompt": "n", "size": (32, 48), "frames": 9, "fps": 12, "steps": 5, "seed": 2**63 - 1,
        "sampler": "ddim", "guidance_scale": 4.5, "guidance_interval": (0.2, 0.8), "guidance_schedule": "constant",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"prompt": "  "}, "prompt: it is empty; say what the video shows"),
        ({"prompt": ["p"]}, "prompt: got ['p']; give a text"),
        ({"prompt": "x" * 4001}, "prompt: it has 4001 characters; 4000 are the most"),
        ({"steps": 0}, "steps: got 0; expected a whole number from 1 to 1000"),
        ({"steps": 2.5}, "steps: got 2.5; expected a whole number from 1 to 1000"),
        ({"steps": "many"}, "steps: got 'many'; expected a whole number from 1 to 1000"),
        ({"steps": True}, "steps: got True; expected a whole number from 1 to 1000"),
        ({"fps": float("nan")}, "fps: got nan; expected a whole number from 1 to 1000"),
        ({"seed": "-1"}, "seed: got '-1'; expected a whole number from 0 to 9223372036854775807"),
        ({"seed": "1e3"}, "seed: got '1e3'; expected a whole number from 0 to 9223372036854775807"),
        ({"height": 64}, "width: got None; expected a whole number from 8 to 64"),
        ({"height": 60, "width": 64}, "height: got 60; expected a multiple of 8"),
        ({"height": 64, "width": 128}, "width: got 128; expected a whole number from 8 to 64"),
        ({"frames": 7}, "frames: got 7; it can be 1, 9"),
        ({"sampler": "<b>"}, "sampler: got '<b>'; it can be dpmpp_2m_sde, dpmpp_2m, ddim, ddpm"),
        ({"guidance_scale": float("inf")}, "guidance_scale: got inf; expected a number from 0 to 1000"),
        ({"interval_from": 0.8, "interval_to": 0.2}, "guidance_interval is 0.8 to 0.2; its end must be larger"),
        ({"image": "/x"}, "image: tiny is a text-to-video model; leave out"),
        ({"strength": 0.5}, "strength: it says how much of a clip is changed; give a clip too"),
        ({"extend": 0}, "extend: got 0; expected a whole number from 1 to 1000"),
        ({"video": "/etc/passwd"}, "upload: the file is not there"),
    ],
)
def test_mistakes_of_a_text_are_one_line(models, uploads, given, line):
    with pytest.raises(UserError) as error:
        request_fields(models["tiny"], {"prompt": "p", **given}, uploads)
    assert str(error.value).startswith(line)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("names", "at", "line"),
    [
        ([], "", "image: tiny_i2v is an image-to-video model; give a first frame, a key frame or a clip"),
        (["a.png"], "", "keyframes: 1 pictures and 0 numbers of frames; give a number for each"),
        (["a.png"], "x", "keyframes: got 'x'; expected a whole number"),
        (["a.png"] * 17, "1", "keyframes: 17 pictures; 16 are the most"),
        (["missing.png"], "-1", "upload: the file is not there"),
    ],
)
def test_mistakes_of_key_frames_are_one_line(models, uploads, names, at, line):
    files = [str(uploads.folder / name) for name in names]
    with pytest.raises(UserError) as error:
        request_fields(models["tiny_i2v"], {"prompt": "p", "keyframes": files, "keyframes_at": at}, uploads)
    assert str(error.value).startswith(line)


def test_pictures_and_clips_are_taken(models, uploads):
    place = lambda name: str(uploads.folder / name)  # noqa: E731
    given = {
        "prompt": "p", "image": place("a.png"), "keyframes": [place("b.png")], "keyframes_at": "-1",
        "video": place("clip.mp4"), "strength": "0.5", "extend": "2",
    }  # fmt: skip
    fields = request_fields(models["tiny_i2v"], given, uploads)
    assert fields["image"] == place("a.png")
    assert fields["keyframes"] == [{"image": place("b.png"), "at": -1}]
    assert (fields["video"], fields["strength"], fields["extend"]) == (place("clip.mp4"), 0.5, 2)


def test_a_video_goes_on_by_prompts(models, uploads):
    fields = request_fields(models["tiny"], {"prompt": "p", "extend": "then left\n\n then right "}, uploads)
    assert fields["extend"] == ["then left", "then right"]


@pytest.fixture
def shelf(tmp_path) -> Shelf:
    (tmp_path / "style").mkdir()
    (tmp_path / "motion.safetensors").touch()
    return Shelf(tmp_path, "adapters")


def test_adapters_have_strengths(shelf, tmp_path):
    names = ["style", "motion.safetensors"]
    assert adapters_of(names, "0.8, -0.5", shelf) == {
        str(tmp_path / "style"): 0.8,
        str(tmp_path / "motion.safetensors"): -0.5,
    }
    assert adapters_of(["style"], "", shelf) == {str(tmp_path / "style"): 1.0}
    assert adapters_of([], None, shelf) == adapters_of(None, "", shelf) == {}


@pytest.mark.parametrize(
    ("names", "strengths", "line"),
    [
        (["../style"], "", "adapters: '../style' does not exist"),
        (["style"], "1, 2", "adapters: 1 adapters and 2 strengths; give a strength for each"),
        (["style"], "strong", "adapters: got 'strong'; expected a number from -10 to 10"),
        ([], "1", "adapters: 0 adapters and 1 strengths"),
    ],
)
def test_mistakes_of_adapters_are_one_line(shelf, names, strengths, line):
    with pytest.raises(UserError) as error:
        adapters_of(names, strengths, shelf)
    assert str(error.value).startswith(line)


def test_a_record_is_filled_in_again(models, shelf, tmp_path):
    fields = {
        "prompt": "p", "seed": 2**60, "size": (32, 48), "num_frames": 3, "fps": 8, "steps": 4,
        "guidance_interval": [0.2, 0.8], "keyframes": [{"image": "/k.png", "at": -1}], "extend": ["a", "b"],
    }  # fmt: skip
    adapters = {str(tmp_path / "style"): 0.8, "/gone": 1.0}
    values = filled_in(fields, adapters, models["tiny_i2v"], shelf, PICTURE_INPUTS)
    assert tuple(values) == PICTURE_INPUTS
    assert (values["model"], values["seed"], values["height"], values["frames"]) == ("tiny_i2v", str(2**60), 32, 9)
    assert (values["interval_from"], values["keyframes"], values["keyframes_at"]) == (0.2, ["/k.png"], "-1")
    assert (values["adapters"], values["strengths"], values["extend"]) == (["style"], "0.8", "a\nb")
    assert values["negative_prompt"] is None


def test_choices_of_a_record_are_those_that_are_offered(models, shelf):
    recorded = {"prompt": "p", "sampler": sampler_class("dpmpp_2m_sde"), "guidance_schedule": "constant"}
    values = filled_in(recorded, {}, models["tiny"], shelf, PICTURE_INPUTS)
    assert (values["sampler"], values["guidance_schedule"]) == ("dpmpp_2m_sde", "constant")
    other = filled_in(
        {"sampler": "x.Other", "guidance_schedule": "y", "num_frames": 99}, {}, models["tiny"], shelf, PICTURE_INPUTS
    )
    assert (other["sampler"], other["guidance_schedule"], other["frames"]) == (None, None, None)


def test_a_model_that_takes_the_fields_is_chosen(models):
    assert model_for({"prompt": "p"}, models, "tiny_i2v").name == "tiny"
    assert model_for({"image": "/a"}, models, "tiny").name == "tiny_i2v"
    assert model_for({"image": "/a"}, {"tiny": models["tiny"]}, "tiny").name == "tiny"
