"""Clips and pictures of a call, as files and in memory."""

import numpy as np
import pytest
import torch
from PIL import Image

import cogvideox_sat as cv
from cogvideox_sat.python_api.pictures import first_frame, fitted_clip, input_clip
from sgm.errors import UserError
from training_clips import write_clip
from videos import read_video

FEW = {"size": (32, 48), "steps": 2, "seed": 4}


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_a_clip_in_memory_is_that_of_its_file(tiny, tmp_path):
    """A clip may be an array of another size or a tensor; it is cut, or continued whole."""
    path = write_clip(tmp_path / "a.mp4", frames=12, fps=8, size=(32, 48))
    pixels = read_video(path)[1]
    array = ((pixels + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    with cv.load(tiny.config("5b")) as pipe:
        by_file = pipe("a boat", video=path, strength=0.5, **FEW)
        by_array = pipe("a boat", video=array, strength=0.5, **FEW)
        by_tensor = pipe("a boat", video=pixels, strength=0.5, **FEW)
        assert len(by_file.frames) == 9
        for other in (by_array, by_tensor):
            assert np.abs(by_file.frames.astype(int) - other.frames).mean() < 2
        longer = pipe("a boat", video=array, extend=["at night"], frames=9, **FEW)
        assert len(longer.frames) == 12 + 4 and (longer.frames[:12] == array).all()
        assert longer.request["extend"] == ["at night"]
        again = pipe(**longer.request)
        assert (again.frames == longer.frames).all()
        several = pipe(["a boat", "a kite"], extend=[1, None], frames=9, **FEW)
        assert [len(video.frames) for video in several] == [13, 9]
        with pytest.raises(UserError, match="prompt 2: strength: `video` is missing"):
            pipe(["a", "b"], strength=[None, 0.5], **FEW)
        with pytest.raises(UserError, match="video: got an array of float64"):
            pipe("a boat", video=np.zeros((9, 32, 48, 3)), **FEW)


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_key_frames_of_any_kind(tiny, tmp_path):
    picture = Image.new("RGB", (48, 32), "red")
    picture.save(tmp_path / "last.png")
    array = np.asarray(picture)
    with cv.load(tiny.config("5b_i2v")) as pipe:
        made = [
            pipe("a boat", image=array, keyframes=[{"image": last, "at": -1}], frames=9, **FEW).frames
            for last in (tmp_path / "last.png", str(tmp_path / "last.png"), picture, array)
        ]
        assert all((frames == made[0]).all() for frames in made)
        without = pipe("a boat", image=array, frames=9, **FEW)
        assert (without.frames != made[0]).any()


def test_what_is_no_clip_or_picture_is_told():
    assert input_clip(np.zeros((5, 4, 4, 3), np.uint8), "video").shape == (5, 4, 4, 3)
    assert fitted_clip(np.full((2, 8, 16, 3), 255, np.uint8), (8, 8)).shape == (2, 3, 8, 8)
    assert fitted_clip(torch.zeros(2, 3, 8, 8), (8, 8)).shape == (2, 3, 8, 8)
    for wrong in ([1, 2], np.zeros((4, 4, 3), np.uint8)):
        with pytest.raises(UserError, match=r"here: got .*; give a path, an array"):
            input_clip(wrong, "here")
    with pytest.raises(UserError, match="here: got 3; give a path"):
        first_frame(3, "here")
