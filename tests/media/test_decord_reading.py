"""Test that decord can be selected, and gives the same frames as before."""

import io

import pytest

from cogvideox_sat.clips.reading import FrameSampling, probe, read_clip
from cogvideox_sat.clips.sources import ClipSource
from cogvideox_sat.latent_geometry import Bucket
from cogvideox_sat.media.decord_reading import DecordVideo
from cogvideox_sat.media.video_facts import UnreadableClip
from training_clips import damage, frame_numbers, vary_rate, write_clip, write_tar


def test_a_variable_rate_and_files_in_memory(tmp_path):
    path = vary_rate(write_clip(tmp_path / "a.mp4", 90, fps=30), tmp_path / "b.mp4")
    with DecordVideo(io.BytesIO(path.read_bytes())) as video:
        assert video.facts.frames == 50
        assert len(list(video.frames_at([0, 1, 2]))) == 3


def test_clips_of_files_and_tar_members(tmp_path):
    path = write_clip(tmp_path / "a.mp4", 60, fps=30)
    shard = write_tar(tmp_path / "a.tar", {"x.mp4": path.read_bytes()})
    start = shard.read_bytes().index(path.read_bytes()[:64])
    sampling = FrameSampling(10, 9, random_start=False)
    for source in (ClipSource(str(path), ""), ClipSource(str(shard), "", "x.mp4", start, path.stat().st_size)):
        clip = read_clip(source, Bucket(9, 64, 96), sampling, 0, info=probe(source), backend="decord")
        assert frame_numbers(clip) == list(range(0, 27, 3))


def test_damage_is_told(tmp_path):
    path = damage(write_clip(tmp_path / "a.mp4", 60, fps=30), tmp_path / "b.mp4")
    with DecordVideo(path) as video, pytest.raises(UnreadableClip, match="damaged"):
        list(video.all_frames())
