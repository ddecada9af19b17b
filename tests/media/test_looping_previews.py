"""Test that a looping preview has the video's frames, speed and shape, and its errors."""

import pytest
import torch
from PIL import Image

from cogvideox_sat.media.looping_previews import LARGEST_HEIGHT, write_looping_preview
from cogvideox_sat.media.video_output import VideoWriter
from sgm.errors import UserError

LEVELS = [-0.8, 0.0, 0.8]


def grey_video(path, height, width, fps=8):
    with VideoWriter(path, fps, height, width) as video:
        video.write(torch.tensor(LEVELS)[:, None, None, None].expand(-1, 3, height, width))
    return path


def test_frames_come_in_order_and_for_ever(tmp_path):
    path = write_looping_preview(grey_video(tmp_path / "a.mp4", 64, 96))
    assert path == tmp_path / "a.webp"
    picture = Image.open(path)
    assert (picture.n_frames, picture.size, picture.info["loop"]) == (3, (96, 64), 0)
    for number, level in enumerate(LEVELS):
        picture.seek(number)
        assert picture.convert("L").getpixel((48, 32)) == pytest.approx((level + 1) * 127.5, abs=6)
        picture.load()
        assert picture.info["duration"] == 125  # milliseconds


def test_high_videos_are_reduced(tmp_path):
    picture = Image.open(write_looping_preview(grey_video(tmp_path / "a.mp4", 2 * LARGEST_HEIGHT, 2 * 320)))
    assert picture.size == (320, LARGEST_HEIGHT)
    assert Image.open(write_looping_preview(grey_video(tmp_path / "a.mp4", 1200, 2))).size == (1, LARGEST_HEIGHT)


def test_what_is_no_video_is_named(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"no video")
    with pytest.raises(UserError, match=r"a\.mp4 cannot be read: not a video"):
        write_looping_preview(tmp_path / "a.mp4")
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]
