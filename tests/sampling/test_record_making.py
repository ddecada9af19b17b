"""A record names the model and the inputs; test_video_records.py has whole records."""

import hashlib
from argparse import Namespace
from pathlib import Path

import pytest

from cogvideox_sat.sampling.input_files import KeyFrameFile
from cogvideox_sat.sampling.planned_videos import PlannedVideo
from cogvideox_sat.sampling.prompt_requests import PromptRequest
from cogvideox_sat.sampling.record_making import entries_of_inputs, frames_of, model_name, readable
from sgm.config_places import Sources


def test_the_model_is_named_after_its_first_file():
    assert (
        model_name(Namespace(sources=Sources([Path("configs/cogvideox_2b.yaml"), Path("more.yaml")]))) == "cogvideox_2b"
    )
    assert model_name(Namespace(sources=Sources())) == "unnamed"


def test_a_repeated_record_keeps_its_name():
    class Record(dict):
        path = Path("videos/1.json")

    record = Record(model={"name": "cogvideox_5b"})
    assert model_name(Namespace(sources=Sources([record.path]), record=record)) == "cogvideox_5b"


def test_texts_that_utf_8_cannot_encode():
    assert readable("a cat \U0001f408") == "a cat \U0001f408"
    assert readable("\ud83d") == "\\ud83d"


def test_inputs_are_named_with_their_hashes(tmp_path):
    (tmp_path / "last.png").write_bytes(b"picture")
    digest = f"sha256:{hashlib.sha256(b'picture').hexdigest()}"
    request = PromptRequest(
        0,
        "a",
        keyframes=(KeyFrameFile(tmp_path / "last.png", -1),),
        video=tmp_path / "gone.mp4",
        strength=0.5,
        extend=("b", "c"),
    )
    assert entries_of_inputs(request) == {
        "keyframes": [{"path": str(tmp_path / "last.png"), "hash": digest, "at": -1}],
        "video_from": {"path": str(tmp_path / "gone.mp4"), "hash": None},
        "strength": 0.5,
        "extend": ["b", "c"],
    }
    assert entries_of_inputs(PromptRequest(0, "a")) == {}


@pytest.mark.parametrize(("extend", "frames"), [(None, 49), (2, 49 + 2 * 44)])
def test_frames_of_a_video_in_windows(extend, frames):
    """Each further window begins with the last frames of the one before."""
    request = PromptRequest(0, "a", extend=extend)
    assert frames_of(PlannedVideo(request, Path("a.mp4"), 1, 13, (480, 720)), 49) == frames
