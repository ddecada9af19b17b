"""Test that a video is probed within the time limit, whatever its decoder does."""

import time
from pathlib import Path

import pytest
from PIL import Image

import stuck_clips
from cogvideox_sat.media import video_probe
from cogvideox_sat.media.video_facts import UnreadableClip, VideoFacts
from cogvideox_sat.media.video_probe import facts_in_time, frames_at_rate
from training_clips import write_clip


@pytest.mark.parametrize(("frames", "fps"), [(30, 30), (17, 8), (1, 8)])
def test_facts_are_those_of_the_reader(tmp_path, frames, fps):
    facts = facts_in_time(write_clip(tmp_path / "a.mp4", frames=frames, fps=fps))
    assert facts[:3] == (96, 64, frames) or facts.frames == frames
    assert facts.seconds == pytest.approx((frames - 1) / fps, abs=1e-3)


def test_an_animation_is_a_video(tmp_path):
    frames = [Image.new("RGB", (32, 16), (shade, 0, 0)) for shade in (0, 100, 200)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:], duration=120)
    assert facts_in_time(tmp_path / "a.gif") == VideoFacts(32, 16, 3, 0.24)


def test_what_is_no_video_is_told(tmp_path):
    (tmp_path / "text.mp4").write_text("no video")
    with pytest.raises(UnreadableClip, match="not a video"):
        facts_in_time(tmp_path / "text.mp4")
    with pytest.raises(UnreadableClip, match="No such file"):
        facts_in_time(tmp_path / "missing.mp4")
    cut = write_clip(tmp_path / "cut.mp4", frames=30, fps=8)
    cut.write_bytes(cut.read_bytes()[:400])
    with pytest.raises(UnreadableClip):
        facts_in_time(cut)


@pytest.mark.parametrize(
    ("fault", "reason"), [(stuck_clips.hang, "not opened within 0.5 s"), (stuck_clips.crash, "crashed")]
)
def test_a_decoder_that_hangs_or_crashes(tmp_path, monkeypatch, fault, reason):
    """The decoder costs at most the time limit, and does not affect this process."""
    monkeypatch.setattr(video_probe, "open_video", lambda path: fault())
    began = time.monotonic()
    with pytest.raises(UnreadableClip, match=reason):
        facts_in_time(Path("a.mp4"), limit=0.5)
    assert time.monotonic() - began < 20


@pytest.mark.parametrize(
    ("frames", "source_fps", "fps", "expected"), [(49, 8, 8, 49), (25, 30, 8, 7), (100, 25, 16, 64), (1, 8, 8, 1)]
)
def test_frames_at_another_rate(frames, source_fps, fps, expected):
    assert frames_at_rate(VideoFacts(96, 64, frames, (frames - 1) / source_fps), fps) == expected
