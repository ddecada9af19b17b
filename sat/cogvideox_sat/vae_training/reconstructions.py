"""Measure the PSNR of a VAE in training on validation clips, and write videos of them."""

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from torch import Tensor

from cogvideox_sat.clips.validation_clips import ValidationLoader
from cogvideox_sat.media.pixel_error import psnr
from cogvideox_sat.media.video_output import VideoWriter
from sgm.errors import UserError

logger = logging.getLogger(__name__)

SHOWN = ("clip", "reconstruction", "difference")  # side by side, in a video of an evaluation
AVERAGED = "_ema"  # suffix for results of the averaged weights


class ReconstructionReport:
    """The mean PSNR over the clips of an evaluation, and videos of the first clips.

    Args:
        clips: the clips to evaluate; their weights tell which ones are padding and do not count.
        folder: folder of the run. Videos are `reconstructions/{step}/{i}.mp4`: the clip, its reconstruction (with the
            averaged weights, if they exist) and their difference, side by side.
        count: number of videos.
        fps: frames per second of the videos.
    """

    def __init__(self, clips: ValidationLoader, folder: Path, count: int, fps: float):
        self.clips, self.folder, self.count, self.fps = clips, folder, count, fps
        self.start()

    def start(self) -> None:
        """Begin an evaluation."""
        self.sums: dict[str, Tensor] = {}
        self.shown: list[Tensor] = []

    def add(self, module: pl.LightningModule, batch: Mapping[str, Any], batch_idx: int) -> None:
        """Reconstruct a batch, and add its measures and videos."""
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
        """Return `val/psnr` and, with averaged weights, `val_ema/psnr`; all processes call this."""
        names: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(names, sorted(self.sums))  # a process whose clips are all padding has none
        results = {}
        for name in max(names, key=len):
            total = self.sums.get(name, torch.zeros(2)).to(device)
            if dist.get_world_size() > 1:
                dist.all_reduce(total)
            results[name] = float(total[0] / total[1])
        return results

    def write_videos(self, step: int) -> Iterator[tuple[str, Path]]:
        """Write the videos of this process's clips; yield each one's name and file.

        Videos that cannot be written are skipped.
        """
        for index, video in enumerate(self.shown):
            path = self.folder / "reconstructions" / str(step) / f"{index}.mp4"
            try:
                with VideoWriter(path, self.fps, *video.shape[-2:]) as writer:
                    writer.write(video.transpose(0, 1))
            except UserError as error:  # for example, a full disk; training reports that when it saves
                logger.warning("reconstruction left out: %s", error)
                continue
            yield f"reconstructions/{index}", path
