"""A feature map as a sum that is not taken yet, without gradients.

A layer that reads its input from start to end adds the summands in that pass. Tensors are (batch, channel, time,
height, width) in channels-last memory.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from sgm.modules.autoencoding.clip import Chunk
from vae_modules.passes.channel_sums import add_in_place, channel_sums
from vae_modules.passes.pieces_in_cache import empty_channels_last
from vae_modules.passes.products import Product, written


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

    def places(self, chunk: Chunk) -> list[int]:
        """Return the number of places of each part that is normalized by itself."""
        return [frames * self.x.shape[3] * self.x.shape[4] for frames in chunk.lengths(self.frames)]

    def sums(self, chunk: Chunk) -> Tensor:
        """Return the channel sums of x + other; an `other` and the offset are added to `x`.

        Without an `other` the offset is left, and the sums are those of `x`.

        Returns:
            float64 (2, batch, part, channel), for each part that is normalized by itself.
        """
        return torch.stack(self._sums_of_parts(chunk) if self.other is None else self._add_in_parts(chunk), dim=2)

    def _sums_of_parts(self, chunk: Chunk) -> list[Tensor]:
        lengths = chunk.lengths(self.x.shape[2])
        if isinstance(self.x, Product):
            return [part.sums() for part in self.x.split(lengths)]
        parts = self.x.split(lengths, dim=2)
        if not self.repeats:
            return [channel_sums(part) for part in parts]
        alone = int(chunk.lead)
        times = (self.frames - alone) // (self.x.shape[2] - alone)
        each = [times * channel_sums(part) for part in (parts[0][:, :, alone:], *parts[1:])]
        return [each[0] + channel_sums(parts[0][:, :, :1]), *each[1:]] if alone else each

    def _add_in_parts(self, chunk: Chunk) -> list[Tensor]:
        """Return the channel sums of each part of x + other + offset, and leave that as `x`."""
        assert self.other is not None
        self.x = written(self.x)
        parts, others = self.x.split(chunk.lengths(self.frames), dim=2), chunk.lengths(self.other.shape[2])
        if isinstance(self.other, Product):
            pairs = zip(parts, self.other.split(others), strict=True)
            sums = [other.add_to(part, self.offset) for part, other in pairs]
        else:
            leads = (chunk.lead and index == 0 for index in range(len(parts)))
            triples = zip(parts, self.other.split(others, dim=2), leads, strict=True)
            sums = [add_in_place(part, other, self.offset, lead) for part, other, lead in triples]
        self.other = self.offset = None
        return sums

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
    out = empty_channels_last(x, (*x.shape[:2], frames, *x.shape[3:]))
    out[:, :, :alone] = first
    out[:, :, alone:].unflatten(2, (rest.shape[2], -1)).copy_(rest.unsqueeze(3))
    return out
