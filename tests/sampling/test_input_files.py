"""The pictures and the clip that a request shows, as files."""

from pathlib import Path

import pytest

from cogvideox_sat.configuration.model_limits import ModelLimits
from cogvideox_sat.sampling.input_files import (
    KeyFrameFile,
    all_frames_of_video,
    frames_of_video,
    key_frame_files,
)
from sgm.errors import UserError
from training_clips import write_clip

LIMITS = ModelLimits(patch=(1, 2, 2), largest=(13, 60, 90), in_channels=16, latent_channels=16)
OF_15 = ModelLimits(patch=(2, 2, 2), largest=(22, 60, 90), in_channels=16, latent_channels=16)


def test_key_frames_are_objects_or_texts():
    entries = [{"image": "a.png", "at": 3}, "b:c.png:-1", KeyFrameFile(Path("d.png"), 0)]
    found = key_frame_files(entries, lambda name: Path("x") / name)
    assert [(str(key.path), key.at) for key in found] == [("x/a.png", 3), ("x/b:c.png", -1), ("d.png", 0)]
    for text in ("a.png", "a.png:last", ""):
        with pytest.raises(UserError, match="expected IMAGE:AT, such as last"):
            key_frame_files([text], Path)


@pytest.mark.parametrize(
    ("frames", "limits", "most", "latent"),
    [(60, LIMITS, 13, 13), (30, LIMITS, 13, 7), (49, LIMITS, 13, 13), (48, LIMITS, 13, 11), (30, OF_15, 22, 8)],
)
def test_as_many_frames_as_the_clip_has_and_the_model_takes(tmp_path, frames, limits, most, latent):
    path = write_clip(tmp_path / f"{frames}.mp4", frames=frames, fps=8)
    assert frames_of_video(path, 8, most, limits) == latent


def test_a_clip_that_is_too_short_or_no_clip_fails_later(tmp_path):
    short = write_clip(tmp_path / "short.mp4", frames=5, fps=8)
    assert frames_of_video(short, 8, 13, LIMITS) == 13 and all_frames_of_video(short, 16) == 10
    (tmp_path / "text.mp4").write_text("no video")
    assert frames_of_video(tmp_path / "text.mp4", 8, 13, LIMITS) == 13
    with pytest.raises(UserError, match=r"video: \S+text\.mp4: not a video"):
        all_frames_of_video(tmp_path / "text.mp4", 8)
