"""Write sampled videos and latents to files, atomically.

`files.output_paths` names the files.
"""

import json
import subprocess
import tempfile
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from cogvideox_sat.files.atomic import replaced_when_complete, reported_as_user_error, write_atomically
from sgm.errors import UserError

CHUNKS_AHEAD = 2  # chunks that may wait for the encoder; each holds the frames of one `write`


class VideoWriter:
    """Writer of one H.264 video: `with VideoWriter(...) as video: video.write(frames)`.

    A thread passes the frames to the encoder, so that decoding continues while the encoder works.

    The file appears under its name when it is complete; after an exception it is removed. Pixels are stored as 8-bit
    yuv420p in the BT.709 colour space, which every player supports, near visually lossless quality (crf 17).

    With `lossless` they are stored as yuv444p without quantization, for training rather than watching: few players
    support this. The only loss is the rounding of colours, below one of 255 steps on average.

    Args:
        path: the video file; missing parent folders are made, an existing file is replaced.
        fps: frames per second.
        height, width: size of a frame in pixels; both even, as yuv420p halves the colour resolution.
        lossless: full colour resolution and no quantization.

    Raises:
        UserError: odd size; a frame that is not finite; no frames; the file cannot be written.
    """

    def __init__(self, path: str | Path, fps: float, height: int, width: int, lossless: bool = False):
        self.path = Path(path)
        self.encoding = ["-crf", "0", "-pix_fmt", "yuv444p"] if lossless else ["-crf", "17", "-pix_fmt", "yuv420p"]
        self.height, self.width = height, width
        if fps <= 0:
            raise UserError(f"cannot write {self.path}: frames per second: got {fps}; it must be positive")
        if height <= 0 or width <= 0 or height % 2 or width % 2:
            raise UserError(f"cannot write {self.path}: height and width: got {height}x{width}; it must be even")
        self.fps = fps
        self.num_frames = 0
        self._waiting: deque[Future[Any]] = deque()  # chunks that the encoder has not taken yet

    def __enter__(self) -> Self:
        from imageio_ffmpeg import get_ffmpeg_exe

        try:
            ffmpeg = get_ffmpeg_exe()
        except RuntimeError as error:  # imageio-ffmpeg has no binary for this platform
            raise UserError(
                f"cannot write {self.path}: ffmpeg is not installed; install it or set IMAGEIO_FFMPEG_EXE"
            ) from error
        with ExitStack() as stack:
            part = stack.enter_context(replaced_when_complete(self.path))
            # A file, not a pipe: nobody reads a pipe while frames are written, so a full pipe would block both sides.
            self._messages = stack.enter_context(tempfile.TemporaryFile())
            command = [ffmpeg, "-hide_banner", "-loglevel", "error", "-y"]
            command += ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{self.width}x{self.height}", "-r", str(self.fps)]
            command += ["-i", "pipe:0", "-an", "-c:v", "libx264", *self.encoding]
            # Some players take untagged video for BT.601, others for BT.709, so it is converted to BT.709 and tagged.
            command += ["-vf", "scale=out_color_matrix=bt709:out_range=tv", "-color_range", "tv"]
            command += ["-colorspace", "bt709", "-color_primaries", "bt709", "-color_trc", "bt709"]
            command += ["-movflags", "+faststart", "-f", "mp4", f"file:{part}"]
            with reported_as_user_error(self.path):
                self._ffmpeg = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=self._messages
                )
            assert self._ffmpeg.stdin is not None, "it is a pipe"
            self._input = self._ffmpeg.stdin
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="video")
            stack.push(self._end_encoding)
            self._open = stack.pop_all()
        return self

    def write(self, frames: Tensor) -> None:
        """Append frames (frames, 3, height, width) in [-1, 1], of any floating dtype and device."""
        if frames.shape[1:] != (3, self.height, self.width):
            expected = f"(frames, 3, {self.height}, {self.width})"
            raise ValueError(f"{self.path}: expected frames of shape {expected}, got {tuple(frames.shape)}")
        self.write_pixels(pixels_of(frames, f"{self.path}: "))

    def write_pixels(self, pixels: Tensor) -> None:
        """Append uint8 frames (frames, height, width, 3) on the CPU."""
        while len(self._waiting) >= CHUNKS_AHEAD:
            self._settle(self._waiting.popleft())
        self._waiting.append(self._thread.submit(self._input.write, pixels.numpy()))
        self.num_frames += len(pixels)

    def _settle(self, chunk: "Future[Any]") -> None:
        """Wait until the encoder has taken a chunk of frames."""
        try:
            chunk.result()
        except BrokenPipeError:  # ffmpeg ended early; its last messages say why
            self._ffmpeg.wait()
            raise self._failure() from None

    def __exit__(self, *error: Any) -> None:
        self._open.__exit__(*error)

    def _end_encoding(self, kind: type[BaseException] | None, *_: Any) -> None:
        try:
            if kind is None:
                while self._waiting:
                    self._settle(self._waiting.popleft())
                with suppress(BrokenPipeError):  # the exit status reports it
                    self._input.close()
                if self._ffmpeg.wait() != 0:
                    raise self._failure()
                if self.num_frames == 0:
                    raise UserError(f"cannot write {self.path}: no frames were given")
        finally:
            self._ffmpeg.kill()  # after an exception it may still run
            self._thread.shutdown(cancel_futures=True)  # its current write fails, since ffmpeg has ended
            with suppress(BrokenPipeError):
                self._input.close()
            self._ffmpeg.wait()

    def _failure(self) -> UserError:
        self._messages.seek(0)
        lines = self._messages.read().decode(errors="replace").strip().splitlines()
        reason = "; ".join(lines[-2:]) or f"it ended with status {self._ffmpeg.returncode}"
        return UserError(f"cannot write {self.path}: ffmpeg: {reason}")


def pixels_of(frames: Tensor, where: str = "") -> Tensor:
    """Return frames (t, 3, h, w) in [-1, 1] as uint8 (t, h, w, 3) on the CPU.

    The conversion runs on the frames' device, so that one byte per value is transferred.

    Raises:
        UserError: a value is not finite; `where` begins the message.
    """
    finite = torch.isfinite(frames).all()
    pixels = ((frames.float() + 1.0) * 127.5).round_().clamp_(0, 255).to(torch.uint8)
    pixels = pixels.permute(0, 2, 3, 1).contiguous().cpu()
    if not finite:
        raise UserError(f"{where}the decoded frames hold NaN or infinity; sample in bf16 or float32 instead")
    return pixels


def save_latents(path: str | Path, latents: Tensor, metadata: Mapping[str, str] | None = None) -> None:
    """Write latents, under the key `latents`, to a safetensors file, atomically.

    Args:
        latents: (t, c, h, w), in any dtype.
        metadata: texts about the latents; see `sampling.record_making.latents_metadata`.

    Raises:
        UserError: the file cannot be written.
    """
    from safetensors.torch import save

    # safetensors' own save_file would make the file readable only by its owner.
    write_atomically(Path(path), _in_order(save({"latents": latents.detach().contiguous()}, dict(metadata or {}))))


def _in_order(content: bytes) -> bytes:
    """Return a safetensors file with a sorted header, so that equal latents make equal files.

    The order of the header's entries is random otherwise.
    """
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.dumps(json.loads(content[8:end]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # so that the tensors are aligned
    return len(header).to_bytes(8, "little") + header + content[end:]
