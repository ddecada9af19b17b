"""A sampled video: its frames, its latents, and the request that made it."""

import base64
import html
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cogvideox_sat.configuration.video_records import is_record, read_record, record_path, write_record
from cogvideox_sat.media.video_output import VideoWriter, save_latents
from sgm.errors import UserError, shown

SUFFIX, LATENTS = ".mp4", ".safetensors"


class Video:
    """A sampled video.

    Attributes:
        frames: (frames, height, width, 3), uint8, RGB.
        latents: (1, frames, channels, height, width), float32, scaled, on the CPU.
        fps: frames per second.
        request: the fields of the request with all defaults filled in; `pipe(**request)` makes the same video again.
    """

    def __init__(
        self,
        frames: np.ndarray,
        latents: Tensor,
        request: Mapping[str, Any],
        record: Callable[[Path], Mapping[str, Any]],
        metadata: Callable[[], Mapping[str, str]],
    ):
        self.frames, self.latents, self.request = frames, latents, dict(request)
        self.fps: int = request["fps"]
        self._record, self._metadata = record, metadata

    def save(self, path: str | Path, *, record: bool = True) -> Path:
        """Write the video, and its record beside it; return the path of the video.

        The bytes are the same as those of the command `cogvideox sample` for the same request. An existing file is
        replaced. Both files are written atomically.

        Args:
            path: ends with `.mp4`, or with `.safetensors` to write only the latents.
            record: also write `NAME.json`, with which `cogvideox sample --input_file NAME.json` makes the video again.
                It replaces the record of an earlier video, but no other file.

        Raises:
            UserError: the path has another ending or cannot be written, or `NAME.json` exists and is not a record.
        """
        if not isinstance(path, str | Path):
            raise UserError(f"path: got {shown(path)}; give the name of a file that ends with {SUFFIX}")
        path = Path(path)
        if path.suffix.lower() == LATENTS:
            save_latents(path, self.latents, self._metadata())
            return path
        if path.suffix.lower() != SUFFIX:
            raise UserError(f"path: {path} does not end with {SUFFIX}; name a video, or latents with {LATENTS}")
        beside = record_path(path)
        if record and beside.exists():
            check_replaceable(beside)
        self._write(path)
        if record:
            write_record(path, self._record(path))
        return path

    def _write(self, path: Path) -> None:
        with VideoWriter(path, self.fps, *self.frames.shape[1:3]) as writer:
            writer.write_pixels(torch.from_numpy(self.frames))

    def _repr_html_(self) -> str:
        """Return the video as HTML for a notebook."""
        with tempfile.TemporaryDirectory(prefix="cogvideox-") as folder:
            path = Path(folder) / f"video{SUFFIX}"
            self._write(path)
            content = base64.b64encode(path.read_bytes()).decode()
        height, width = self.frames.shape[1:3]
        title = html.escape(str(self.request["prompt"]), quote=True)
        return (
            f'<video width="{max(width, 256)}" controls loop autoplay muted title="{title}" '
            f'style="aspect-ratio: {width}/{height}" src="data:video/mp4;base64,{content}"></video>'
        )

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        """Return the video as HTML for a notebook, and as text."""
        return {"text/html": self._repr_html_(), "text/plain": repr(self)}

    def __repr__(self) -> str:
        frames, height, width, _ = self.frames.shape
        return f"Video({self.request['prompt']!r:.60}, {frames} frames of {height}x{width} at {self.fps} fps)"


def check_replaceable(path: Path) -> None:
    """Check that a file is the record of a video, which may be replaced, else raise UserError."""
    try:
        if not is_record(path):
            raise UserError("not a record")
        read_record(path)
    except UserError as error:
        raise UserError(
            f"path: {path} exists and is not the record of a video; give record=False, or another name"
        ) from error
