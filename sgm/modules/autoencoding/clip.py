"""What the layers must know of the clip beyond the frames in hand."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from sgm.context_parallel import all_reduce_sum, group_rank, group_size, pass_on

TailCache = dict[nn.Module, Tensor]
"""The last input frames that each causal convolution saw, for the next chunk of the same clip."""


@dataclass
class Chunk:
    """Where the frames in hand lie in their clip: a piece in time, perhaps spread over the ranks of `group`.

    Attributes:
        lead: the frames in hand start with the one that stands alone when time is halved or doubled.
        tails: what earlier chunks left for the convolutions of this one; this chunk's own tails replace it.
        last: no chunk follows, so tails need not be kept.
        group: the ranks that hold neighbouring frames, in order; None for a single process.
        gather_norm: whether normalization statistics are those of all ranks' frames. None leaves it to each layer.
        keep: returns a copy of a tail, where it is to wait for the next chunk; may be on another device.
    """

    lead: bool
    tails: TailCache = field(default_factory=dict)
    last: bool = True
    group: ProcessGroup | None = None
    gather_norm: bool | None = None
    keep: Callable[[Tensor], Tensor] = torch.clone

    def copies_tail(self, frames: int, count: int) -> bool:
        """Whether `frames_before`, of so many frames, makes a plain copy of the last `count` of them for the next
        chunk, which whoever writes these frames can make as well."""
        return self.group is None and not self.last and self.keep is torch.clone and frames >= count

    def frames_before(self, conv: nn.Module, x: Tensor, count: int, tail: Tensor | None = None) -> Tensor | None:
        """The `count` input frames of `conv` that precede `x` (batch, channel, time, height, width) in the clip.

        None at the start of the clip (or its first frame repeated). Also sees to it that whoever holds the frames
        that follow `x`, the next chunk or the next rank, gets its tail.

        Args:
            tail: a copy of the last `count` frames, where one is made already; see `copies_tail`.
        """
        if self.group is None:
            before = self.tails.pop(conv, None)
            if before is not None:
                before = before.to(x.device, non_blocking=True)
            if tail is not None:
                self.tails[conv] = tail
            elif not self.last:
                self.tails[conv] = self.keep(_tail(before, x, count))  # a view would keep all of x in memory
            return before

        token, before = self._exchanged(conv, x, count)
        if before is None:
            before = x[:, :, :1].expand(-1, -1, count, -1, -1)
        return torch.cat([token, before], dim=2)

    def tail_before(self, conv: nn.Module, end: Tensor, count: int) -> Tensor | None:
        """Return what `frames_before` does, with the ranks of the group, for whoever has the frames piece by piece.

        Args:
            end: the last frames of all, `count` of them if there are as many.

        Returns:
            None at the start of the clip.
        """
        return self._exchanged(conv, end, count)[1]

    def _exchanged(self, conv: nn.Module, x: Tensor, count: int) -> tuple[Tensor, Tensor | None]:
        """Give the next rank the tail of `x`; return a tensor of no frames (see `pass_on`), and the previous one's."""
        assert self.group is not None
        rank, size = group_rank(self.group), group_size(self.group)
        sends = rank < size - 1 or not self.last
        if rank == 0:
            before = self.tails.pop(conv, None)
            if before is not None:
                before = before.to(x.device, non_blocking=True)
            # What follows the last rank's frames is this one's next chunk.
            token, received = pass_on(_tail(before, x, count), x, None if self.last else count, self.group)
            if not self.last:
                self.tails[conv] = received if self.keep is torch.clone else self.keep(received)
            return token, before
        if x.shape[2] >= count:
            # The tail does not depend on what comes before: all ranks send at once.
            return pass_on(x[:, :, -count:] if sends else None, x, count, self.group)
        token, before = pass_on(None, x, count, self.group)
        if sends:
            further, _ = pass_on(_tail(before, x, count), x, None, self.group)
            token = torch.cat([token, further], dim=2)
        return token, before

    def total(self, sums: Tensor, gather_norm: bool) -> Tensor:
        """`sums` that a norm takes of its input, added up over the ranks if it (`gather_norm`) or the chunk says so."""
        gather = gather_norm if self.gather_norm is None else self.gather_norm
        return all_reduce_sum(sums, self.group if gather else None)


def _tail(before: Tensor | None, x: Tensor, count: int) -> Tensor:
    """The last `count` frames of the clip up to and including `x`."""
    if x.shape[2] >= count:
        return x[:, :, -count:]
    if before is None:
        before = x[:, :, :1].expand(-1, -1, count, -1, -1)
    return torch.cat([before, x], dim=2)[:, :, -count:]


class RepeatableChunk(Chunk):
    """A chunk for a layer that runs more than once on the same input, to recompute its activations.

    What the first run learns from other chunks and ranks is kept for the later ones: they neither communicate nor
    touch the tails. Call `rewind` before each run.
    """

    def __init__(self, chunk: Chunk):
        super().__init__(**vars(chunk))
        self._learned: list[Tensor | None] = []
        self._next = 0

    def rewind(self) -> None:
        self._next = 0

    def frames_before(self, conv: nn.Module, x: Tensor, count: int, tail: Tensor | None = None) -> Tensor | None:
        return self._recall() if self._knows() else self._learn(super().frames_before(conv, x, count, tail))

    def total(self, sums: Tensor, gather_norm: bool) -> Tensor:
        return self._recall() if self._knows() else self._learn(super().total(sums, gather_norm))

    def _knows(self) -> bool:
        return self._next < len(self._learned)

    def _recall(self) -> Tensor | None:
        self._next += 1
        return self._learned[self._next - 1]

    def _learn(self, result: Tensor | None) -> Tensor | None:
        # Detached: the graph that leads here refers to whoever recomputes, and thereby to this. But still asking for
        # a gradient, or autograd would save other tensors the next time.
        self._learned.append(None if result is None else result.detach().requires_grad_(result.requires_grad))
        self._next += 1
        return result
