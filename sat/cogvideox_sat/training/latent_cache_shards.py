"""Write the shards of a cache of latents, one file at a time."""

import errno
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch.distributed as dist
from safetensors.torch import save
from torch import Tensor

from cogvideox_sat.clips.latent_cache import (
    CachedSample,
)
from cogvideox_sat.files.atomic import replaced_when_complete
from cogvideox_sat.files.sizes import in_units
from cogvideox_sat.training.sample_encoder import Encoder
from sgm.errors import UserError

SHARD_BYTES = 256 * 2**20  # a shard holds at least one sample, however large
SHARD_SAMPLES = 64  # largest number of samples that an interrupted run loses, per process


class OpenShard:
    """A shard that is being filled in memory; `write` writes it to the disk."""

    def __init__(self, path: Path):
        self.path = path
        self.tensors: dict[str, Tensor] = {}
        self.samples: list[CachedSample] = []
        self.skipped: dict[int, list[str]] = {}
        self.first_with: dict[str, int] = {}  # caption: index

    def add(self, index: int, frames: Tensor, caption: str, fps: float, encoder: Encoder) -> None:
        """Encode the clip (1, frames, 3, height, width), and add it."""
        self.tensors |= encoder.clip(frames, index)
        text = self.first_with.setdefault(caption, index)
        count, _, height, width = frames.shape[1:]
        self.samples.append(CachedSample(index, (count, height, width), caption, text, fps))

    @property
    def is_full(self) -> bool:
        """Return whether the shard has the size or the number of samples to be written."""
        size = sum(tensor.nbytes for tensor in self.tensors.values())
        return size >= SHARD_BYTES or len(self.samples) + len(self.skipped) >= SHARD_SAMPLES

    def write(self, encoder: Encoder) -> None:
        """Encode the captions, and write the file.

        Raises:
            UserError: the file cannot be written.
        """
        texts = encoder.captions({index: caption for caption, index in self.first_with.items()})
        content = {"samples": [asdict(sample) for sample in self.samples], "skipped": self.skipped}
        with replaced_when_complete(self.path) as part:
            try:
                part.write_bytes(save(self.tensors | texts, {"content": json.dumps(content)}))
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
                raise UserError(
                    f"{self.path.parent}: the disk is full; earlier shards are kept: make room (this shard alone takes "
                    f"{in_units(sum(t.nbytes for t in (*self.tensors.values(), *texts.values())))}), and run again"
                ) from error


def new_shards(folder: Path) -> Iterator[Path]:
    """Yield the names of this process's shards that do not exist yet."""
    number = 0
    while True:
        path = folder / f"rank{dist.get_rank():04d}-{number:05d}.safetensors"
        if not path.exists():
            yield path
        number += 1
