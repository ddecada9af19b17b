"""Test that animated images are videos: times, composed frames, white background."""

import io

import numpy as np
import pytest
from PIL import Image

from cogvideox_sat.media.animated_images import Animation
from cogvideox_sat.media.video_facts import UnreadableClip
from cogvideox_sat.media.video_reading import open_video
from training_clips import truncate

COLOURS = [(255, 0, 0), (0, 128, 0), (0, 0, 255), (255, 255, 0)]


def write(path, durations, size=(24, 16)):
    """Write an image whose frames have the given colours and durations in milliseconds."""
    frames = [Image.new("RGB", size, COLOURS[number % 4]) for number in range(len(durations))]
    lossless = {"lossless": True} if path.suffix == ".webp" else {}
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=durations, loop=0, **lossless)
    return path


def colours(frames) -> list[int]:
    return [COLOURS.index(tuple(frame[8, 12].tolist())) for frame in frames]


@pytest.mark.parametrize("suffix", [".gif", ".webp", ".png"])
def test_frames_have_their_own_times(tmp_path, suffix):
    path = write(tmp_path / f"a{suffix}", [100, 300, 100, 500])
    with open_video(path) as video:
        assert isinstance(video, Animation)
        assert video.facts == (24, 16, 4, pytest.approx(0.5))
        assert colours(video.all_frames()) == [0, 1, 2, 3]
        assert colours(video.frames_at([0, 0.06, 0.2, 0.3, 0.44, 0.46])) == [0, 1, 1, 2, 2, 3]
        assert colours(video.frames_at([0.1])) == [1]  # a second time
        with pytest.raises(UnreadableClip, match=r"ends after 0\.50 s, before 0\.80 s"):
            list(video.frames_at([0, 0.8], beyond=0.2))
    with open_video(io.BytesIO(path.read_bytes())) as video:
        assert colours(video.all_frames()) == [0, 1, 2, 3]


def test_frames_without_a_duration_last_a_tenth_of_a_second_as_in_browsers(tmp_path):
    with open_video(write(tmp_path / "a.gif", [0, 10, 20, 100])) as video:
        assert video.facts.seconds == pytest.approx(0.1 + 0.1 + 0.02)


def test_frames_are_composed_and_laid_on_white(tmp_path):
    """Each frame of the file holds only the changes."""
    frames = []
    for place in range(3):
        frame = Image.new("RGBA", (24, 16), (0, 0, 0, 0))
        frame.paste((255, 0, 0, 255), (place * 8, 0, place * 8 + 8, 16))
        frames.append(frame)
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:], duration=100, disposal=2)
    with open_video(tmp_path / "a.gif") as video:
        for place, frame in enumerate(video.all_frames()):
            expected = np.full((16, 24, 3), 255, np.uint8)
            expected[:, place * 8 : place * 8 + 8] = (255, 0, 0)
            assert np.array_equal(frame, expected)


def test_a_picture_that_does_not_move_is_a_video_of_one_frame(tmp_path):
    Image.new("RGB", (24, 16), COLOURS[2]).save(tmp_path / "a.gif")
    with open_video(tmp_path / "a.gif") as video:
        assert video.facts == (24, 16, 1, 0)
        assert colours(video.frames_at([0])) == [2]


@pytest.mark.parametrize("suffix", [".gif", ".webp"])
def test_damage_is_told(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    noise = [Image.fromarray(np.random.RandomState(n).randint(0, 255, (64, 64, 3), np.uint8)) for n in range(4)]
    noise[0].save(path, save_all=True, append_images=noise[1:], duration=100)
    cut = truncate(path, tmp_path / f"b{suffix}", 0.6)
    with pytest.raises(UnreadableClip, match="damaged"), open_video(cut) as video:
        assert list(video.frames_at([0, 0.3])) == []


def test_the_default_image_of_a_png_is_no_frame(tmp_path):
    """Programs that cannot animate show it; browsers do not."""
    frames = [Image.new("RGB", (24, 16), colour) for colour in COLOURS]
    path = tmp_path / "a.png"
    frames[0].save(path, save_all=True, append_images=frames[1:], default_image=True, duration=100)
    with open_video(path) as video:
        assert video.facts == (24, 16, 3, pytest.approx(0.2))
        assert colours(video.all_frames()) == [1, 2, 3]
        assert colours(video.frames_at([0, 0.2])) == [1, 3]
