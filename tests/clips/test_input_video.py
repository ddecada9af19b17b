"""Test the pixels of a clip that a video starts from: rate, size, length, and its errors."""

import pytest
import torch
from PIL import Image

import stuck_clips
from cogvideox_sat.clips import input_video
from cogvideox_sat.clips.input_video import read_input_video
from cogvideox_sat.clips.reading import FrameSampling, read_clip
from cogvideox_sat.clips.sources import ClipSource
from cogvideox_sat.latent_geometry import Bucket
from sgm.errors import UserError
from training_clips import frame_numbers, write_clip


def test_frames_come_at_the_rate_of_the_video_as_training_reads_them(tmp_path):
    path = write_clip(tmp_path / "a.mp4", frames=60, fps=24)
    clip = read_input_video(path, (64, 96), frames=17, fps=8)
    assert clip.shape == (17, 3, 64, 96) and clip.dtype == torch.float32 and clip.abs().max() <= 1
    pixels = ((clip + 1) * 127.5).round().to(torch.uint8)
    assert frame_numbers(pixels) == [3 * k for k in range(17)]
    sampling = FrameSampling(8, 17, random_start=False)
    assert torch.equal(pixels, read_clip(ClipSource(str(path), None), Bucket(17, 64, 96), sampling, seed=3))


def test_another_shape_is_covered_and_cropped_in_the_middle(tmp_path):
    frames = [Image.new("RGB", (80, 20), (number, 0, 0)) for number in range(9)]
    for frame in frames:
        frame.paste((255, 255, 255), (30, 0, 50, 20))
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:], duration=120)
    clip = read_input_video(tmp_path / "a.gif", (40, 40), frames=8, fps=8)
    assert clip.shape == (8, 3, 40, 40) and clip.mean() > 0.9


def test_a_clip_that_is_too_short_says_how_long_it_is(tmp_path):
    path = write_clip(tmp_path / "a.mp4", frames=10, fps=8)
    assert len(read_input_video(path, (64, 96), frames=9, fps=8)) == 9
    with pytest.raises(
        UserError, match=r"^video: \S+a\.mp4: it has 10 frames at 8 frames per second, but 17 are needed"
    ):
        read_input_video(path, (64, 96), frames=17, fps=8)
    with pytest.raises(UserError, match="it has 20 frames at 16"):
        read_input_video(path, (64, 96), frames=25, fps=16)


@pytest.mark.parametrize(
    ("fault", "reason"), [(stuck_clips.hang, "not read within 1 s$"), (stuck_clips.crash, r"crashed \(SIGABRT\)")]
)
@pytest.mark.slow
def test_a_decoder_that_hangs_or_crashes_costs_its_video_alone(tmp_path, monkeypatch, fault, reason):
    monkeypatch.setattr(input_video, "probe", lambda source: fault())
    with pytest.raises(UserError, match=f"^video: a.mp4: .*{reason}"):
        read_input_video("a.mp4", (64, 96), frames=9, fps=8, limit=1)


def test_what_is_no_video_is_told(tmp_path):
    (tmp_path / "text.mp4").write_text("no video")
    with pytest.raises(UserError, match=r"^video: \S+text\.mp4: not a video"):
        read_input_video(tmp_path / "text.mp4", (64, 96), frames=9, fps=8)
    Image.new("RGB", (32, 16)).save(tmp_path / "a.png")
    with pytest.raises(UserError, match="it has 1 frames at 8"):
        read_input_video(tmp_path / "a.png", (64, 96), frames=9, fps=8)
