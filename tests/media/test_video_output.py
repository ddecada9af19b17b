"""Test that a video file is complete, plays everywhere and shows the frames."""

import threading
from contextlib import nullcontext

import pytest
import torch
from safetensors.torch import load_file

from cogvideox_sat.media import video_output
from cogvideox_sat.media.video_output import VideoWriter, save_latents
from sgm.errors import UserError
from videos import read_video


def gradient(frames: int, height: int, width: int) -> torch.Tensor:
    """Return a smooth coloured clip in [-1, 1], brighter from frame to frame."""
    time, rows, columns = torch.meshgrid(
        torch.linspace(-0.5, 0.5, frames), torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij"
    )
    return torch.stack([time + rows / 2, time + columns / 2, time], dim=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_frames_written_in_chunks_come_back(tmp_path, dtype):
    clip = gradient(9, 34, 50)  # not multiples of 16: the frames must not be rescaled
    path = tmp_path / "new folder" / "a%03d:b.mp4"
    with VideoWriter(path, fps=7.5, height=34, width=50) as video:
        for chunk in clip.to(dtype).split([5, 2, 2]):
            video.write(chunk)
        assert not path.exists()
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    meta, frames = read_video(path)
    assert (meta["codec"], meta["pix_fmt"].split("(")[0], meta["fps"]) == ("h264", "yuv420p", 7.5)
    assert frames.shape == clip.shape
    assert (frames - clip).abs().mean() < 0.02


def test_decord_sees_the_same_colours(tmp_path):
    """A second decoder agrees, which shows that the file is tagged correctly."""
    decord = pytest.importorskip("decord")
    colours = torch.tensor([[0.8, -0.8, -0.8], [-0.8, 0.8, -0.8], [-0.8, -0.8, 0.8], [0.5, 0.5, -0.5]])
    with VideoWriter(tmp_path / "a.mp4", fps=8, height=32, width=32) as video:
        video.write(colours[:, :, None, None].expand(-1, -1, 32, 32))
    frames = torch.from_numpy(decord.VideoReader(str(tmp_path / "a.mp4")).get_batch(range(4)).asnumpy())
    assert (frames[:, 16, 16].float() / 127.5 - 1 - colours).abs().max() < 0.05


def test_lossless_keeps_colours_to_the_pixel(tmp_path):
    """Lower colour resolution or quantization would change this checkerboard of colours."""
    decord = pytest.importorskip("decord")
    colours = torch.tensor([[0.8, -0.8, -0.8], [-0.8, -0.6, 0.8]])
    cells = (torch.arange(32)[:, None] + torch.arange(32)) % 2
    board = colours[cells].permute(2, 0, 1).expand(5, -1, -1, -1)
    errors = []
    for lossless in (False, True):
        with VideoWriter(tmp_path / "a.mp4", fps=8, height=32, width=32, lossless=lossless) as video:
            video.write(board)
        frames = torch.from_numpy(decord.VideoReader(str(tmp_path / "a.mp4")).get_batch(range(5)).asnumpy())
        errors.append((frames.permute(0, 3, 1, 2) / 127.5 - 1 - board).abs().max())
    assert errors[0] > 0.2
    assert errors[1] < 0.03


def test_values_outside_the_range_saturate_and_are_rounded(tmp_path):
    frames = torch.tensor([-3.0, -1.0, 0.0, 1 / 255, 1.0, 7.0])[:, None, None, None].expand(-1, 3, 2, 2)
    pixels = video_output.pixels_of(frames)
    assert pixels[:, 0, 0, 0].tolist() == [0, 0, 128, 128, 255, 255]
    assert pixels.shape == (6, 2, 2, 3)
    with pytest.raises(UserError, match=r"^there: the decoded frames hold NaN"):
        video_output.pixels_of(frames * torch.nan, "there: ")


def test_a_single_frame_is_a_video_too(tmp_path):
    with VideoWriter(tmp_path / "a.mp4", fps=8, height=16, width=16) as video:
        video.write(gradient(1, 16, 16))
    assert len(read_video(tmp_path / "a.mp4")[1]) == 1


def test_nothing_is_left_after_an_exception_and_an_older_file_survives(tmp_path):
    path = tmp_path / "a.mp4"
    path.write_text("older")
    with pytest.raises(KeyError, match="passes through"), VideoWriter(path, fps=8, height=16, width=16) as video:
        video.write(gradient(3, 16, 16))
        raise KeyError("passes through")
    assert path.read_text() == "older"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_frames_that_are_not_finite_are_refused(tmp_path, value):
    frames = gradient(3, 16, 16)
    frames[1, 2, 3, 4] = value
    writer = VideoWriter(tmp_path / "a.mp4", fps=8, height=16, width=16)
    with pytest.raises(UserError, match=r"a\.mp4: the decoded frames hold NaN"), writer as video:
        video.write(frames)
    assert not list(tmp_path.iterdir())


def test_bad_sizes_shapes_and_empty_videos_are_refused(tmp_path):
    path = tmp_path / "a.mp4"
    with pytest.raises(UserError, match="got 15x16; it must be even"):
        VideoWriter(path, fps=8, height=15, width=16)
    with pytest.raises(UserError, match="got 0; it must be positive"):
        VideoWriter(path, fps=0, height=16, width=16)
    writer = VideoWriter(path, fps=8, height=16, width=16)
    with pytest.raises(ValueError, match=r"expected frames of shape \(frames, 3, 16, 16\)"), writer as video:
        video.write(gradient(3, 16, 18))
    with pytest.raises(UserError, match="no frames were given"), writer:
        pass
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_reported_with_the_file(tmp_path, monkeypatch):
    """ffmpeg writes to /dev/full, where every write fails as on a full disk."""
    monkeypatch.setattr(video_output, "replaced_when_complete", lambda path: nullcontext("/dev/full"))
    writer = VideoWriter(tmp_path / "a.mp4", fps=8, height=256, width=256)
    with pytest.raises(UserError, match=r"cannot write .*a\.mp4: ffmpeg: .*No space left"), writer as video:
        for _ in range(20):
            video.write(torch.rand(8, 3, 256, 256) * 2 - 1)
    assert not list(tmp_path.iterdir())


class SlowPipe:
    """Input of an encoder that takes a chunk only when it is allowed to."""

    def __init__(self, pipe):
        self.pipe, self.may_take, self.taken = pipe, threading.Semaphore(0), []

    def write(self, pixels):
        assert self.may_take.acquire(timeout=30)
        self.taken.append(int(pixels[0, 0, 0, 0]))
        self.pipe.write(pixels)

    def close(self):
        self.pipe.close()


def test_decoding_goes_on_while_the_encoder_works_and_waits_when_it_is_far_behind(tmp_path):
    """Only a few chunks are in memory, and they arrive in order."""
    chunks = [torch.full((1, 3, 64, 64), shade) for shade in (-1.0, -0.5, 0.0, 0.5)]
    with VideoWriter(tmp_path / "v.mp4", 8, 64, 64) as writer:
        slow = writer._input = SlowPipe(writer._input)
        for chunk in chunks[: video_output.CHUNKS_AHEAD]:
            writer.write(chunk)
        assert not slow.taken
        others = threading.Thread(target=lambda: [writer.write(chunk) for chunk in chunks[video_output.CHUNKS_AHEAD :]])
        others.start()
        others.join(timeout=0.5)
        assert others.is_alive() and not slow.taken
        for _ in chunks:
            slow.may_take.release()
        others.join(timeout=30)
    assert slow.taken == [0, 64, 128, 191]
    assert len(read_video(tmp_path / "v.mp4")[1]) == 4
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("video")]


@pytest.mark.slow
def test_an_exception_while_the_encoder_is_behind_ends_its_thread(tmp_path):
    with pytest.raises(KeyError), VideoWriter(tmp_path / "v.mp4", 8, 512, 512) as writer:
        for _ in range(video_output.CHUNKS_AHEAD):
            writer.write(torch.zeros(64, 3, 512, 512))
        raise KeyError("decoding")
    assert not list(tmp_path.iterdir())
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("video")]


def test_a_missing_ffmpeg_is_reported(tmp_path, monkeypatch):
    def missing():
        raise RuntimeError("No ffmpeg exe could be found.")

    monkeypatch.setattr("imageio_ffmpeg.get_ffmpeg_exe", missing)
    with (
        pytest.raises(UserError, match="ffmpeg is not installed"),
        VideoWriter(tmp_path / "a.mp4", fps=8, height=16, width=16),
    ):
        pass
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_made_is_reported_with_the_file(tmp_path):
    (tmp_path / "file").touch()
    path = tmp_path / "file" / "a.mp4"
    with pytest.raises(UserError, match=f"cannot write {path}"), VideoWriter(path, fps=8, height=16, width=16):
        pass
    with pytest.raises(UserError, match=f"cannot write {path}"):
        save_latents(path, torch.zeros(1))


def test_latents_are_saved_whole(tmp_path):
    latents = torch.randn(1, 3, 16, 4, 6, dtype=torch.bfloat16).transpose(1, 2)
    save_latents(tmp_path / "b" / "latents.safetensors", latents)
    assert torch.equal(load_file(tmp_path / "b" / "latents.safetensors")["latents"], latents)
    assert [file.name for file in (tmp_path / "b").iterdir()] == ["latents.safetensors"]
