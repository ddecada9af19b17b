"""Read written videos back."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def read_video(path: str | Path) -> tuple[dict[str, Any], Tensor]:
    """Return the stream's properties and the frames, (frames, 3, height, width) in [-1, 1]."""
    from imageio_ffmpeg import read_frames

    reader = read_frames(path, output_params=["-vf", "scale=in_color_matrix=bt709:out_color_matrix=bt709"])
    meta = next(reader)
    width, height = meta["size"]
    frames = [torch.frombuffer(bytearray(frame), dtype=torch.uint8).view(height, width, 3) for frame in reader]
    return meta, torch.stack(frames).permute(0, 3, 1, 2).float() / 127.5 - 1
