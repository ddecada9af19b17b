"""Test the common interface of two decoders, each imported only when it is used."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from cogvideox_sat.media.video_facts import UnreadableClip
from cogvideox_sat.media.video_reading import BACKENDS, open_video
from training_clips import convert, frame_numbers, write_clip

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("backend", BACKENDS)
def test_both_decoders_read_an_ordinary_video(tmp_path, backend):
    path = write_clip(tmp_path / "a.mp4", 30, fps=15)
    with open_video(path, backend=backend) as video:
        assert video.facts == (96, 64, 30, pytest.approx(29 / 15))
        assert shown(video.all_frames()) == list(range(30))
        assert shown(video.frames_at([0, 0.5, 1.0])) == [0, 7, 15]  # the earlier of two equally near
        with pytest.raises(UnreadableClip, match=r"it ends after 1\.93 s, before 2\.50 s"):
            list(video.frames_at([0, 2.5], beyond=0.1))
        assert shown(video.frames_at([0, 2.5])) == [0, 29]


def test_their_pixels_are_the_same(tmp_path):
    path = write_clip(tmp_path / "a.mp4", 20)
    with open_video(path) as one, open_video(path, backend="decord") as other:
        assert np.array_equal(np.stack(list(one.all_frames())), np.stack(list(other.all_frames())))


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_no_video_is_told_by_both(tmp_path, backend):
    (tmp_path / "a.mp4").write_text("no video")
    with pytest.raises(UnreadableClip, match="not a video"):
        open_video(tmp_path / "a.mp4", backend=backend)


@pytest.mark.slow
def test_decoders_are_imported_when_they_are_used(tmp_path):
    path = write_clip(tmp_path / "a.mp4", 5)
    code = f"""
import sys
from cogvideox_sat.media.video_reading import open_video
from cogvideox_sat.clips import probing as clip_probing
from cogvideox_sat.clips import reading as clip_reading
import data_video
assert not {{"av", "decord"}} & sys.modules.keys()
open_video({str(path)!r}).close()
assert "av" in sys.modules and "decord" not in sys.modules
"""
    folders = f"{ROOT}:{ROOT / 'sat'}"
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": folders, "PATH": "/usr/bin:/bin"})


def test_pictures_under_names_of_videos(tmp_path):
    convert(write_clip(tmp_path / "a.mp4", 5), tmp_path / "b.gif")
    (tmp_path / "b.gif").rename(tmp_path / "b.mp4")
    with open_video(tmp_path / "b.mp4") as video:
        assert video.facts.frames == 5


def shown(frames) -> list[int]:
    return frame_numbers(torch.from_numpy(np.stack(list(frames))).permute(0, 3, 1, 2))
