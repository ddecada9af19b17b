"""Context of the current frames: neighbouring chunks and ranks of the same clip."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from sgm.context_parallel import all_reduce_sum, group_rank, group_size, pass_on

TailCache = dict[nn.Module, Tensor]
"""The last input frames of each causal convolution, for the next chunk of the same clip."""


@dataclass
class Chunk:
    """The place of the current frames in their clip, perhaps spread over the ranks of `group`.

    Attributes:
        lead: the first of the current frames stands alone when time is halved or doubled. tails: the last input frames
        of each convolution in the chunk before; this chunk replaces them by its own. last: no chunk follows, so that no
        tails are kept. group: the ranks that hold neighbouring frames, in order; None for a single process.
        gather_norm: whether normalization statistics cover the frames of all ranks. None: each layer decides. keep:
        returns a copy of a tail for the next chunk; the copy may be on another device. parts: the number of latent
        frames of each part of the chunk that is normalized by itself, or empty for one part;
            only without a group.
    """

    lead: bool
    tails: TailCache = field(default_factory=dict)
    last: bool = True
    group: ProcessGroup | None = None
    gather_norm: bool | None = None
    keep: Callable[[Tensor], Tensor] = torch.clone
    parts: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        assert not (self.parts and self.group is not None)

    def lengths(self, frames: int) -> list[int]:
        """Return how many of a layer's `frames` are in each part that is normalized by itself."""
        if len(self.parts) < 2:
            return [frames]
        alone = int(self.lead)
        factor = (frames - alone) // (sum(self.parts) - alone)
        first, *rest = (factor * part for part in self.parts)
        return [first - (factor - 1) * alone, *rest]

    def copies_tail(self, frames: int, count: int) -> bool:
        """Return whether `frames_before` stores a plain copy of the last `count` input frames.

        A kernel that writes these frames can then write the copy too, and pass it as `tail`.

        Args:
            frames: number of input frames in this chunk.
        """
        return self.group is None and not self.last and self.keep is torch.clone and frames >= count

    def frames_before(self, conv: nn.Module, x: Tensor, count: int, tail: Tensor | None = None) -> Tensor | None:
        """Return the `count` input frames of `conv` that precede `x` in the clip.

        The tail of `x` goes to the next chunk or the next rank, which needs it.

        Args:
            x: (batch, channel, time, height, width).
            tail: a copy of the last `count` frames, if the caller has made one; see `copies_tail`.

        Returns:
            None at the start of the clip without a `group`; with one, copies of the first frame stand in.
        """
        if self.group is None:
            before = self.tails.pop(conv, None)
            if before is not None:
                before = before.to(x.device, non_blocking=True)
            if tail is not None:
                self.tails[conv] = tail
            elif not self.last:
                self.tails[conv] = self.keep(_tail(before, x, count))  # a view would keep the whole of x in memory
            return before

        token, before = self._exchanged(conv, x, count)
        if before is None:
            before = x[:, :, :1].expand(-1, -1, count, -1, -1)
        return torch.cat([token, before], dim=2)

    def tail_before(self, conv: nn.Module, end: Tensor, count: int) -> Tensor | None:
        """Return the result of `frames_before` with a group, for a caller that computes by pieces.

        Args:
            end: the last input frames, `count` of them if there are as many.

        Returns:
            None at the start of the clip.
        """
        return self._exchanged(conv, end, count)[1]

    def _exchanged(self, conv: nn.Module, x: Tensor, count: int) -> tuple[Tensor, Tensor | None]:
        """Send the tail of `x` to the next rank, and return what the previous rank sent.

        The first value is a tensor of no frames, see `pass_on`.
        """
        assert self.group is not None
        rank, size = group_rank(self.group), group_size(self.group)
        sends = rank < size - 1 or not self.last
        if rank == 0:
            before = self.tails.pop(conv, None)
            if before is not None:
                before = before.to(x.device, non_blocking=True)
            # The next chunk of the first rank follows the frames of the last rank.
            token, received = pass_on(_tail(before, x, count), x, None if self.last else count, self.group)
            if not self.last:
                self.tails[conv] = received if self.keep is torch.clone else self.keep(received)
            return token, before
        if x.shape[2] >= count:
            # The tail does not depend on earlier frames, so that all ranks send at once.
            return pass_on(x[:, :, -count:] if sends else None, x, count, self.group)
        token, before = pass_on(None, x, count, self.group)
        if sends:
            further, _ = pass_on(_tail(before, x, count), x, None, self.group)
            token = torch.cat([token, further], dim=2)
        return token, before

    def total(self, sums: Tensor, gather_norm: bool) -> Tensor:
        """Return a norm's `sums`, added over the ranks if the chunk or `gather_norm` asks for it."""
        gather = gather_norm if self.gather_norm is None else self.gather_norm
        return all_reduce_sum(sums, self.group if gather else None)


def _tail(before: Tensor | None, x: Tensor, count: int) -> Tensor:
    """Return the last `count` frames of the clip up to and including `x`."""
    if x.shape[2] >= count:
        return x[:, :, -count:]
    if before is None:
        before = x[:, :, :1].expand(-1, -1, count, -1, -1)
    return torch.cat([before, x], dim=2)[:, :, -count:]


class RepeatableChunk(Chunk):
    """A chunk for a layer that runs again on the same input, to recompute its activations.

    The first run records what it receives from other chunks and ranks. Later runs use the record: they neither
    communicate nor change the tails. Call `rewind` before each run.
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
        # Detached, since the graph refers to the layer that recomputes, and thereby to this chunk. `requires_grad`
        # stays, or autograd would save other tensors in the next run.
        self._learned.append(None if result is None else result.detach().requires_grad_(result.requires_grad))
        self._next += 1
        return result
