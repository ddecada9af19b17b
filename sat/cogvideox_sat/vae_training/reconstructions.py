"""How well a VAE in training reconstructs validation clips: PSNR, and videos to look at."""

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from torch import Tensor

from cogvideox_sat.clips.validation_clips import ValidationLoader
from cogvideox_sat.media.video_output import VideoWriter
from sgm.errors import UserError

logger = logging.getLogger(__name__)

SHOWN = ("clip", "reconstruction", "difference")  # side by side, in a video of an evaluation
AVERAGED = "_ema"  # ends the names of what the averaged weights give


def psnr(x: Tensor, y: Tensor) -> Tensor:
    """The peak signal-to-noise ratio in dB of each item (batch, ...) in [-1, 1], from its mean squared error."""
    error = ((x.float() - y.float()) / 2).square().flatten(1).mean(1)
    return -10 * torch.log10(error)


class ReconstructionReport:
    """The PSNR of an evaluation's clips, the mean over clips, and videos of the first of them.

    Args:
        clips: to evaluate; its weights say which are stand-ins that do not count.
        folder: of the run; videos are `reconstructions/{step}/{i}.mp4`: the clip, its reconstruction (with the averaged
            weights, where there are such) and how far they differ, side by side.
        count: of videos.
        fps: of the videos.
    """

    def __init__(self, clips: ValidationLoader, folder: Path, count: int, fps: float):
        self.clips, self.folder, self.count, self.fps = clips, folder, count, fps
        self.start()

    def start(self) -> None:
        """Begin an evaluation."""
        self.sums: dict[str, Tensor] = {}
        self.shown: list[Tensor] = []

    def add(self, module: pl.LightningModule, batch: Mapping[str, Any], batch_idx: int) -> None:
        """Reconstruct a batch."""
        if not self.clips.weights[batch_idx]:
            return
        videos = module.log_videos(batch)
        for name in [name for name in videos if name.startswith("reconstructions")]:
            values = psnr(videos["inputs"], videos[name])
            total = torch.stack([values.sum(), values.new_tensor(float(len(values)))])
            key = f"val{name.removeprefix('reconstructions')}/psnr"
            self.sums[key] = self.sums.get(key, torch.zeros_like(total)) + total
        suffix = AVERAGED if f"reconstructions{AVERAGED}" in videos else ""
        rows = [videos[name] for name in ("inputs", f"reconstructions{suffix}", f"diff{suffix}")]
        self.shown += torch.cat(rows, dim=-1)[: self.count - len(self.shown)].cpu()

    def results(self, device: torch.device) -> dict[str, float]:
        """`val/psnr` and, where averaged weights are kept, `val_ema/psnr`; all processes must ask."""
        names: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(names, sorted(self.sums))  # a process whose clips are all stand-ins has none
        results = {}
        for name in max(names, key=len):
            total = self.sums.get(name, torch.zeros(2)).to(device)
            if dist.get_world_size() > 1:
                dist.all_reduce(total)
            results[name] = float(total[0] / total[1])
        return results

    def write_videos(self, step: int) -> Iterator[tuple[str, Path]]:
        """Write the videos of this process's clips; each one's name and file. What cannot be written is left out."""
        for index, video in enumerate(self.shown):
            path = self.folder / "reconstructions" / str(step) / f"{index}.mp4"
            try:
                with VideoWriter(path, self.fps, *video.shape[-2:]) as writer:
                    writer.write(video.transpose(0, 1))
            except UserError as error:  # a full disk: training says so itself when it saves
                logger.warning("reconstruction left out: %s", error)
                continue
            yield f"reconstructions/{index}", path
