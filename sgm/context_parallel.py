"""Context parallelism: the frames of one clip spread over a group of processes.

Every function takes the process group, or None for a single process, for which it does nothing. All functions can be
differentiated, except `broadcast`. The whole loss is the sum of the ranks' losses; a tensor that every rank holds
(before `split_frames`, after `gather_frames`) counts once, not once per rank.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from sgm.errors import UserError

FRAMES = 2  # the dimension of time in (batch, channel, time, height, width)

_group: ProcessGroup | None = None
_initialized_size = 1


# ---------------------------------------------------------------- groups


def initialize_context_parallel(size: int) -> None:
    """Divide the processes into groups of `size` consecutive ranks; call it on every rank.

    A second call with the same size does nothing.

    Raises:
        UserError: `size` does not divide the number of processes, or the groups exist with another size.
    """
    global _group, _initialized_size
    world = dist.get_world_size() if dist.is_initialized() else 1
    if size < 1 or world % size:
        raise UserError(
            f"context parallelism over {size} processes: the number of processes must be a multiple of {size}, "
            f"got {world}"
        )
    if _initialized_size == size:
        return
    if _group is not None:
        raise UserError(f"context parallelism over {size} processes: it is already set up over {_initialized_size}")
    for first in range(0, world, size):
        ranks = list(range(first, first + size))
        group = dist.new_group(ranks)
        if dist.get_rank() in ranks:
            _group = group
    _initialized_size = size


def destroy_context_parallel() -> None:
    """Forget the groups, for instance before torch.distributed itself is shut down."""
    global _group, _initialized_size
    _group, _initialized_size = None, 1


def get_context_parallel_group() -> ProcessGroup | None:
    """Return the group of this process, None for a group of one."""
    return _group


def get_context_parallel_world_size() -> int:
    """Return the number of processes that share a clip."""
    return group_size(_group)


def get_context_parallel_rank() -> int:
    """Return the place of this process among those that share a clip, from 0."""
    return group_rank(_group)


def group_size(group: ProcessGroup | None) -> int:
    """Return the number of processes in a group; 1 without a group."""
    return 1 if group is None else dist.get_world_size(group)


def group_rank(group: ProcessGroup | None) -> int:
    """Return the place of this process in a group, from 0; 0 without a group."""
    return 0 if group is None else dist.get_rank(group)


# ---------------------------------------------------------------- whole tensors


def all_reduce_sum(x: Tensor, group: ProcessGroup | None) -> Tensor:
    """Return the sum of every rank's `x`, on every rank."""
    return x if group is None else _AllReduceSum.apply(x, group)


def sum_over_ranks(x: Tensor, group: ProcessGroup | None) -> Tensor:
    """Return the sum of every rank's `x`; its gradient is that of this rank's `x` alone.

    This sum is for a loss with terms on several ranks: every rank holds the whole loss, and its backward pass gives
    the part of the gradient from its own terms.
    """
    if group is None:
        return x
    total = x.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return x + (total - x.detach())


def broadcast(x: Tensor, group: ProcessGroup | None) -> Tensor:
    """Return the first rank's `x` on every rank, overwriting `x` on the others.

    Shapes and dtypes must agree.
    """
    if group is not None:
        dist.broadcast(x, group=group, group_src=0)
    return x


def all_gather_integer(value: int, group: ProcessGroup | None) -> list[int]:
    """Return every rank's `value`, in the order of ranks."""
    if group is None:
        return [value]
    values = [value] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


class _AllReduceSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        # Each rank uses the sum, so that its gradient is the sum of the gradients of all ranks' copies.
        total = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ctx.group)
        return total, None


# ---------------------------------------------------------------- frames


def split_evenly(total: int, parts: int) -> list[int]:
    """Return `parts` integers of sum `total`, equal or different by 1, the larger ones first."""
    share, rest = divmod(total, parts)
    return [share + (part < rest) for part in range(parts)]


def split_frames(x: Tensor, frames: Sequence[int], group: ProcessGroup | None) -> Tensor:
    """Return this rank's `frames[rank]` frames (a view) of `x` (batch, channel, time, ...).

    Every rank holds the whole of `x`.
    """
    return x if group is None else _SplitFrames.apply(x, frames, group)


def gather_frames(x: Tensor, frames: Sequence[int], group: ProcessGroup | None) -> Tensor:
    """Return all ranks' frames in order, on every rank; rank r has `frames[r]` of them.

    Args:
        x: this rank's frames (batch, channel, time, ...).
    """
    return x if group is None else _GatherFrames.apply(x, frames, group)


class _SplitFrames(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, frames: Sequence[int], group: ProcessGroup) -> Tensor:
        ctx.frames, ctx.group = frames, group
        return _own(x, frames, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return all_gather_uneven(gradient, ctx.frames, ctx.group, FRAMES), None, None


class _GatherFrames(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, frames: Sequence[int], group: ProcessGroup) -> Tensor:
        ctx.frames, ctx.group = frames, group
        return all_gather_uneven(x, frames, group, FRAMES)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _own(gradient, ctx.frames, ctx.group), None, None


def _own(x: Tensor, frames: Sequence[int], group: ProcessGroup) -> Tensor:
    rank = dist.get_rank(group)
    return x.narrow(FRAMES, sum(frames[:rank]), frames[rank])


def all_gather_uneven(x: Tensor, counts: Sequence[int], group: ProcessGroup, dim: int) -> Tensor:
    """Return all ranks' `x`, concatenated along `dim`, without gradients.

    Rank r has the size `counts[r]`.
    """
    padded = x.new_zeros((*x.shape[:dim], max(counts), *x.shape[dim + 1 :]))  # backends want equal shapes
    padded.narrow(dim, 0, x.shape[dim]).copy_(x)
    received = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(received, padded, group=group)
    return torch.cat([part.narrow(dim, 0, count) for part, count in zip(received, counts, strict=True)], dim)


# ---------------------------------------------------------------- from rank to rank


def pass_on(x: Tensor | None, like: Tensor, frames: int | None, group: ProcessGroup) -> tuple[Tensor, Tensor]:
    """Send frames to the next rank of the ring, and return those that the previous rank sent.

    Both happen in one exchange.

    Args:
        x: (batch, channel, time, height, width), sent to the next rank; None: the next rank expects nothing.
        like: a tensor with the shape (except time), dtype and device of the received frames; it also tells whether a
            gradient goes back.
        frames: number of frames that the previous rank sends; None: it sends none.

    Returns:
        A tensor of no frames, and the received frames, if any. Concatenate the first, along time, with a tensor that
        the loss depends on, so that this rank's backward pass receives a gradient. Use the second likewise.
    """
    return _PassOn.apply(like[:, :, :0] if x is None else x, like, x is not None, frames, group)


class _PassOn(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, like: Tensor, sends: bool, frames: int | None, group: ProcessGroup
    ) -> tuple[Tensor, Tensor]:
        ctx.places = x.shape, sends, frames is not None, group
        received = _with_frames(like, frames or 0)
        _exchange(x if sends else None, received if frames is not None else None, +1, group)
        return _with_frames(x, 0), received

    @staticmethod
    def backward(ctx: Any, token: Tensor, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
        # The gradient of the received frames is sent back, and that of the sent frames is received.
        shape, sends, receives, group = ctx.places
        own = _with_frames(token, shape[FRAMES])
        _exchange(gradient if receives else None, own if sends else None, -1, group)
        return own, None, None, None, None


def _with_frames(like: Tensor, frames: int) -> Tensor:
    """Return an empty tensor like `like` with `frames` frames, channels last in memory."""
    batch, channel, _, height, width = like.shape
    return like.new_empty((batch, frames, height, width, channel)).permute(0, 4, 1, 2, 3)


def _exchange(sent: Tensor | None, received: Tensor | None, step: int, group: ProcessGroup) -> None:
    """Exchange tensors with both neighbours in the ring, at once.

    The tensor goes to the rank `step` places on, another comes from the rank on the other side. Both happen at once,
    since ranks that first send and then receive would wait for each other. Tensors stay on their device.

    Args:
        received: is filled; its channels are last in memory.
    """
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    operations = []
    if sent is not None:
        content = sent.permute(0, 2, 3, 4, 1).contiguous()
        operations.append(dist.P2POp(dist.isend, content, group=group, group_peer=(rank + step) % size))
    if received is not None:
        content = received.permute(0, 2, 3, 4, 1)
        operations.append(dist.P2POp(dist.irecv, content, group=group, group_peer=(rank - step) % size))
    for work in dist.batch_isend_irecv(operations) if operations else ():
        work.wait()
