"""Test that clips have the right source frames at the wanted rate and size."""

import io
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from PIL import Image

from cogvideox_sat.clips.reading import FrameSampling, probe, read_clip
from cogvideox_sat.clips.sources import ClipSource
from cogvideox_sat.latent_geometry import Bucket
from cogvideox_sat.media.video_facts import UnreadableClip, VideoFacts
from training_clips import convert, damage, frame_numbers, truncate, vary_rate, write_clip, write_tar

SIZE = (64, 96)


def source_of(path) -> ClipSource:
    return ClipSource(str(path), "a caption")


def read(path, sampling: FrameSampling, seed: int = 0, size: tuple[int, int] = SIZE) -> torch.Tensor:
    source = source_of(path)
    return read_clip(source, Bucket(sampling.num_frames(probe(source)), *size), sampling, seed)


@pytest.mark.parametrize(("source_fps", "fps"), [(30, 8), (25, 8), (24, 16), (8, 8), (5, 8), (29.97, 8), (60, 7.5)])
def test_frames_come_at_exactly_the_wanted_rate(tmp_path, source_fps, fps):
    path = write_clip(tmp_path / "a.mp4", frames=100, fps=source_fps)
    clip = read(path, FrameSampling(fps, max_frames=13, random_start=False))
    assert clip.shape == (13, 3, *SIZE)
    assert clip.dtype == torch.uint8
    rate = Fraction(source_fps).limit_denominator(1000) / Fraction(fps)
    assert frame_numbers(clip) == [math.ceil(k * rate - Fraction(1, 2)) for k in range(13)]


def test_starts_cover_the_window_and_follow_from_the_seed(tmp_path):
    path = write_clip(tmp_path / "a.mp4", frames=30, fps=16)
    sampling = FrameSampling(8, max_frames=9, skip_frames=3)
    clips = {seed: frame_numbers(read(path, sampling, seed)) for seed in range(60)}
    assert {clip[0] for clip in clips.values()} == set(range(3, 11))  # 17 source frames, of 3 to 26
    assert all(np.diff(clip).tolist() == [2] * 8 for clip in clips.values())
    assert frame_numbers(read(path, sampling, 5)) == clips[5]
    assert frame_numbers(read(path, FrameSampling(8, 9, 3, random_start=False), 5))[0] == 3


@pytest.mark.parametrize(
    ("frames", "skip", "multiple", "expected"),
    [
        *[(49, 0, 4, 49), (48, 0, 4, 45), (49, 3, 4, 41), (49, 3, 8, 41), (48, 0, 8, 41), (5, 0, 4, 5), (4, 0, 4, 1)],
        *[(7, 3, 4, 1), (6, 3, 4, 1), (1, 3, 8, 1), (500, 3, 4, 49), (500, 3, 8, 49)],
    ],
)
def test_a_short_source_gives_the_longest_clip_that_the_model_takes(frames, skip, multiple, expected):
    sampling = FrameSampling(8, max_frames=49, skip_frames=skip, multiple=multiple)
    info = VideoFacts(96, 64, frames, (frames - 1) / 8)
    assert sampling.num_frames(info) == expected
    for seed in range(20):
        first, *_, last = sampling.times(info, expected, seed).tolist() * 2
        assert 0 <= first <= last <= info.seconds + 1e-9


def test_a_short_source_is_not_padded(tmp_path):
    path = write_clip(tmp_path / "a.mp4", frames=20, fps=30)
    clip = read(path, FrameSampling(8, max_frames=49, random_start=False))
    assert frame_numbers(clip) == [0, 4, 7, 11, 15]


@pytest.mark.slow
def test_a_variable_rate_is_followed_in_time(tmp_path):
    steady = write_clip(tmp_path / "a.mp4", frames=90, fps=30)
    path = vary_rate(steady, tmp_path / "b.mp4")
    clip = read(path, FrameSampling(10, max_frames=25, random_start=False))
    assert frame_numbers(clip) == list(range(0, 75, 3))  # each kept frame shows its number in the steady video


def test_frames_cover_the_size_and_are_cut_evenly(tmp_path):
    thirds = np.zeros((48, 144, 3), np.uint8)
    thirds[:, :48, 0], thirds[:, 48:96, 1], thirds[:, 96:, 2] = 255, 255, 255
    Image.fromarray(thirds).save(tmp_path / "a.png")
    video = convert(tmp_path / "a.png", tmp_path / "a.mp4", "-vf", "loop=4:1", "-pix_fmt", "yuv444p")
    for path, frames in ((video, 5), (tmp_path / "a.png", 1)):
        clip = read(path, FrameSampling(25, 5, random_start=False), size=(24, 24))
        assert clip.shape == (frames, 3, 24, 24)
        means = clip.float().mean(dim=(0, 2, 3))
        assert means[1] > 200  # the middle third
        assert max(means[0], means[2]) < 30
        assert clip.float()[..., 4:-4].amax(dim=(0, 2, 3))[[0, 2]].max() < 30
        # Enlarged, and cut above and below: all three colours remain, side by side.
        clip = read(path, FrameSampling(25, 5, random_start=False), size=(24, 144)).float()
        assert clip[..., 8:40].mean(dim=(0, 2, 3)).argmax() == 0
        assert clip[..., 104:136].mean(dim=(0, 2, 3)).argmax() == 2


def test_shrinking_is_antialiased(tmp_path):
    board = np.indices((64, 64)).sum(0).astype(np.uint8) % 2 * 255
    Image.fromarray(board).convert("RGB").save(tmp_path / "a.png")
    path = convert(tmp_path / "a.png", tmp_path / "a.mkv", "-c:v", "ffv1")
    clip = read(path, FrameSampling(25, 1), size=(24, 24)).float()
    assert (clip - 127.5).abs().max() < 25


def test_a_rotated_video_is_upright(tmp_path):
    path = write_clip(tmp_path / "a.mp4", frames=5, size=(64, 96))
    path = convert(path, tmp_path / "b.mp4", "-c", "copy", before=["-display_rotation", "90"])
    clip = read(path, FrameSampling(8, 5, random_start=False), size=(96, 64))
    upright = min((clip.rot90(turns, (2, 3)) for turns in (1, 3)), key=lambda c: abs(frame_numbers(c)[1] - 1))
    assert frame_numbers(upright) == [0, 1, 2, 3, 4]


def test_images_are_clips_of_one_frame_and_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # stored turned left
    image = Image.new("RGB", (96, 64), "black")
    image.paste("white", (0, 0, 48, 64))
    image.save(tmp_path / "a.jpg", exif=exif)
    assert probe(source_of(tmp_path / "a.jpg")) == (64, 96, 1, 0.0)
    clip = read(tmp_path / "a.jpg", FrameSampling(8, 49, 3), size=(96, 64))
    assert clip.shape == (1, 3, 96, 64)
    assert clip[..., :40, :].min() > 230
    assert clip[..., 56:, :].max() < 25


def test_a_member_of_a_tar_file_reads_as_its_file_does(tmp_path):
    path = write_clip(tmp_path / "a.mp4", frames=20, fps=16)
    image = io.BytesIO()
    Image.new("RGB", (96, 64), "red").save(image, "PNG")
    shard = write_tar(tmp_path / "a.tar", {"x.txt": b"caption", "x.mp4": path.read_bytes(), "y.png": image.getvalue()})
    content, sampling = shard.read_bytes(), FrameSampling(8, 9)
    members = [
        ClipSource(str(shard), None, "x.mp4", content.index(path.read_bytes()[:32]), path.stat().st_size),
        ClipSource(str(shard), None, "y.png", content.index(image.getvalue()), len(image.getvalue())),
    ]
    assert probe(members[0]) == probe(source_of(path))
    assert torch.equal(read_clip(members[0], Bucket(9, *SIZE), sampling, 3), read(path, sampling, 3))
    assert read_clip(members[1], Bucket(1, *SIZE), sampling, 3)[0, :, 5, 5].tolist() == [255, 0, 0]


def test_unreadable_files_are_told_when_they_are_probed(tmp_path):
    whole = write_clip(tmp_path / "whole.mp4", frames=20)
    matroska = convert(whole, tmp_path / "whole.mkv", "-c", "copy")
    (tmp_path / "text.mp4").write_text("not a video")
    (tmp_path / "text.png").write_text("not an image")
    (tmp_path / "empty.mp4").touch()
    truncate(whole, tmp_path / "cut.mp4")
    truncate(matroska, tmp_path / "cut.mkv", 0.02)
    reasons = {
        "text.mp4": "not a video",
        "text.png": "not an image",
        "empty.mp4": "not a video",
        "cut.mp4": "cut off",
        "cut.mkv": "not a video",
        "none.mp4": "No such file",
    }
    for name, reason in reasons.items():
        with pytest.raises(UnreadableClip, match=reason):
            probe(source_of(tmp_path / name))


def test_files_whose_damage_shows_only_later_are_told_when_they_are_read(tmp_path):
    whole = write_clip(tmp_path / "whole.mp4", frames=60, fps=30)
    path = damage(whole, tmp_path / "damaged.mp4")
    with pytest.raises(UnreadableClip, match="damaged"):
        read(path, FrameSampling(30, 57))
    image = Image.fromarray(np.random.RandomState(0).randint(0, 255, (64, 64, 3), dtype=np.uint8))
    image.save(tmp_path / "a.png")
    path = truncate(tmp_path / "a.png", tmp_path / "cut.png")
    with pytest.raises(UnreadableClip, match="damaged"):
        read(path, FrameSampling(8, 1))
    with pytest.raises(UnreadableClip, match="60 frames, fewer than"):
        read_clip(source_of(whole), Bucket(81, *SIZE), FrameSampling(30, 81), 0)
