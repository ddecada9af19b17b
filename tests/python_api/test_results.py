"""A video is written atomically, replaces only itself, and is displayed without markup."""

import base64
import json
import re

import numpy as np
import pytest
import torch

from cogvideox_sat.python_api.results import Video
from sgm.errors import UserError
from videos import read_video


@pytest.fixture
def video():
    rows = np.linspace(0, 255, 32)[None, :, None, None]
    frames = np.broadcast_to(rows, (5, 32, 48, 3)).astype(np.uint8).copy()
    request = {"prompt": "a <b>bold</b> \"fox\" & 'hen'", "fps": 4, "seed": 1}
    return Video(frames, torch.zeros(1, 2, 16, 4, 6), request, lambda path: {"of": path.name}, lambda: {"fps": "4"})


def test_a_video_and_its_record_are_written(video, tmp_path):
    path = video.save(str(tmp_path / "new" / "fox.MP4"))
    meta, frames = read_video(path)
    assert (meta["fps"], meta["size"], len(frames)) == (4, (48, 32), 5)
    assert json.loads((tmp_path / "new" / "fox.json").read_text()) == {"of": "fox.MP4"}
    assert sorted(file.name for file in path.parent.iterdir()) == ["fox.MP4", "fox.json"]


def test_latents_alone(video, tmp_path):
    from safetensors import safe_open

    with safe_open(video.save(tmp_path / "fox.safetensors"), "pt") as file:
        assert torch.equal(file.get_tensor("latents"), video.latents) and file.metadata() == {"fps": "4"}


@pytest.mark.parametrize("content", ["{}", "not json", '{"format": 99}'])
def test_a_file_that_is_no_record_is_not_replaced(video, tmp_path, content):
    (tmp_path / "fox.json").write_text(content)
    with pytest.raises(UserError, match=r"path: .*fox\.json exists and is not the record of a video; give rec"):
        video.save(tmp_path / "fox.mp4")
    assert not (tmp_path / "fox.mp4").exists() and (tmp_path / "fox.json").read_text() == content
    video.save(tmp_path / "fox.mp4", record=False)
    assert (tmp_path / "fox.mp4").is_file() and (tmp_path / "fox.json").read_text() == content


def test_paths_that_will_not_do(video, tmp_path):
    with pytest.raises(UserError, match="path: got 5; give the name of a file"):
        video.save(5)
    for name in ("fox", "fox.gif", "fox.json"):
        with pytest.raises(UserError, match=r"path: .* does not end with \.mp4"):
            video.save(tmp_path / name)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file"):
        video.save(tmp_path / "file" / "fox.mp4")


def test_a_notebook_shows_the_video_and_no_markup_of_the_prompt(video):
    shown = video._repr_mimebundle_()
    assert shown["text/plain"] == repr(video) and "5 frames of 32x48 at 4 fps" in repr(video)
    page = shown["text/html"]
    assert page.count("<") == 2 and "<b>" not in page and "&lt;b&gt;bold" in page and "&quot;fox&quot;" in page
    content = base64.b64decode(re.search(r'base64,([^"]+)"', page)[1])
    assert content[4:8] == b"ftyp"
