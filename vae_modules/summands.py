"""A feature map as a sum that is not taken yet, without gradients.

A layer that reads its input from start to end adds the summands in that pass. Tensors are (batch, channel, time,
height, width) in channels-last memory.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from sgm.modules.autoencoding.clip import Chunk
from vae_modules.channel_sums import add_in_place, channel_sums
from vae_modules.products import Product, written


@dataclass
class Summands:
    """The sum of `x`, `other` and `offset`.

    Attributes:
        x: its memory may be overwritten. A `Product` is not written.
        other: like `x`, or with fewer frames, which are repeated (see `pieces_in_cache.frame_of`).
        offset: (channel,), such as the bias of a convolution; see `convolutions.left_bias`.
        frames: the number of frames that the sum stands for, if those of `x` are repeated.
    """

    x: Tensor | Product
    other: Tensor | Product | None = None
    offset: Tensor | None = None
    frames: int = 0

    def __post_init__(self) -> None:
        self.frames = self.frames or self.x.shape[2]

    @property
    def repeats(self) -> bool:
        """Return whether the frames of `x` stand for more frames."""
        return self.frames > self.x.shape[2]

    @property
    def dtype(self) -> torch.dtype:
        return self.x.dtype

    @property
    def device(self) -> torch.device:
        return self.x.device

    def places(self, chunk: Chunk) -> list[int]:
        """Return the number of places, of time, height and width, of each part that is normalized by itself."""
        return [frames * self.x.shape[3] * self.x.shape[4] for frames in chunk.lengths(self.frames)]

    def sums(self, chunk: Chunk) -> Tensor:
        """Return the channel sums of x + other, and add `other` and `offset` to `x` if there is an `other`.

        Otherwise the offset is left, and the sums are those of `x`.

        Returns:
            float64 (2, batch, part, channel), for each part that is normalized by itself.
        """
        if self.other is not None:
            self.x = written(self.x)
        parts = self.x.split(chunk.lengths(self.x.shape[2]), dim=2)
        if self.other is not None:
            others = self.other.split(chunk.lengths(self.other.shape[2]), dim=2)
            leads = [chunk.lead, *[False] * (len(parts) - 1)]
            each = [self._add(*both) for both in zip(parts, others, leads, strict=True)]
            self.other = self.offset = None
        elif self.repeats:
            alone = int(chunk.lead)
            times = (self.frames - alone) // (self.x.shape[2] - alone)
            each = [times * channel_sums(part) for part in (parts[0][:, :, alone:], *parts[1:])]
            if alone:
                each[0] = each[0] + channel_sums(parts[0][:, :, :1])
        else:
            each = [part.sums() if isinstance(part, Product) else channel_sums(part) for part in parts]
        return torch.stack(each, dim=2)

    def _add(self, x: Tensor, other: Tensor | Product, lead: bool) -> Tensor:
        if isinstance(other, Product):
            return other.add_to(x, self.offset)
        return add_in_place(x, other, self.offset, lead)

    def tensors(self) -> tuple[Tensor, Tensor | None]:
        """Return `x` and `other` as tensors."""
        return written(self.x), None if self.other is None else written(self.other)

    def added(self, chunk: Chunk) -> Tensor:
        """Return the sum, with its frames repeated if there are fewer."""
        if self.other is not None:
            self.sums(chunk)
        x = written(self.x)
        if self.offset is not None:
            x.add_(self.offset[:, None, None, None])
        return with_repeated_frames(x, self.frames, int(chunk.lead)) if self.repeats else x


def with_repeated_frames(x: Tensor, frames: int, alone: int) -> Tensor:
    """Return `frames` frames: the first `alone` of `x`, and each of the others repeated."""
    first, rest = x[:, :, :alone], x[:, :, alone:]
    shape = (*x.shape[:2], frames, *x.shape[3:])
    out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last_3d)
    out[:, :, :alone] = first
    out[:, :, alone:].unflatten(2, (rest.shape[2], -1)).copy_(rest.unsqueeze(3))
    return out
