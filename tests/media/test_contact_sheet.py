"""Test that the contact sheet shows every video's frames in order, and its errors."""

import pytest
import torch
from PIL import Image

from cogvideox_sat.media.contact_sheet import FONT_SIZE, FRAME_HEIGHT, FRAMES, GAP, spread, write_contact_sheet
from cogvideox_sat.media.video_output import VideoWriter
from sgm.errors import UserError


def grey_video(path, levels, height=64, width=96):
    with VideoWriter(path, 8, height, width) as video:
        video.write(torch.tensor(levels)[:, None, None, None].expand(-1, 3, height, width))
    return path


def test_frames_stand_in_a_row_for_each_video(tmp_path):
    videos = [
        ("going up", grey_video(tmp_path / "a.mp4", [-0.8, 0.0, 0.8])),
        ("a long text " * 40, grey_video(tmp_path / "b.mp4", [0.5])),
    ]
    write_contact_sheet(tmp_path / "new" / "sheet.png", videos)
    sheet = Image.open(tmp_path / "new" / "sheet.png").convert("L")
    frame_width = 96 * FRAME_HEIGHT // 64
    row = FONT_SIZE + GAP + FRAME_HEIGHT + GAP
    assert sheet.size == (3 * (frame_width + GAP) + GAP, 2 * row + GAP)
    middle = GAP + FONT_SIZE + GAP + FRAME_HEIGHT // 2
    lefts = [GAP + i * (frame_width + GAP) + frame_width // 2 for i in range(3)]
    assert [sheet.getpixel((left, middle)) for left in lefts] == pytest.approx([25, 128, 230], abs=6)
    assert [sheet.getpixel((left, middle + row)) for left in lefts] == pytest.approx([191, 255, 255], abs=6)
    for top in (GAP, GAP + row):  # both texts are there, and end before the margin
        line = sheet.crop((0, top, sheet.width, top + FONT_SIZE))
        assert line.getextrema()[0] < 100
        assert line.crop((sheet.width - GAP, 0, sheet.width, FONT_SIZE)).getextrema() == (255, 255)


@pytest.mark.parametrize(
    ("total", "most", "expected"), [(1, 9, [0]), (3, 9, [0, 1, 2]), (49, 5, [0, 12, 24, 36, 48]), (10, 1, [0])]
)
def test_frames_are_spread_over_the_video(total, most, expected):
    assert spread(total, most) == expected
    assert len(spread(total, FRAMES)) <= FRAMES


def test_mistakes_are_named_and_leave_nothing(tmp_path):
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"no video")
    for videos, says in (([], "no videos to show"), ([("a", broken)], "broken.mp4 cannot be read")):
        with pytest.raises(UserError, match=says):
            write_contact_sheet(tmp_path / "sheet.png", videos)
    assert [path.name for path in tmp_path.iterdir()] == ["broken.mp4"]
