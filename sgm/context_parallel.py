"""Context parallelism: the frames of one clip spread over a group of processes.

Every function takes the process group, or None for a single process, where it does nothing. All of them can be
differentiated, except `broadcast`. The whole loss is the sum of the ranks' losses; where every rank holds the same
tensor (before `split_frames`, after `gather_frames`), it is taken once, not once a rank.
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
        UserError: the number of processes is no multiple of `size`, or the groups exist with another size.
    """
    global _group, _initialized_size
    world = dist.get_world_size() if dist.is_initialized() else 1
    if size < 1 or world % size:
        raise UserError(f"context parallelism over {size} processes: the number of processes, {world}, is no multiple")
    if _initialized_size == size:
        return
    if _group is not None:
        raise UserError(f"context parallelism over {size} processes: it is already set up over {_initialized_size}")
    # Tails go by way of the CPU, which NCCL by itself cannot.
    backend = "cpu:gloo,cuda:nccl" if world > 1 and dist.get_backend() == "nccl" else None
    for first in range(0, world, size):
        ranks = list(range(first, first + size))
        group = dist.new_group(ranks, backend=backend)
        if dist.get_rank() in ranks:
            _group = group
    _initialized_size = size


def destroy_context_parallel() -> None:
    """Forget the groups, for instance before torch.distributed itself is shut down."""
    global _group, _initialized_size
    _group, _initialized_size = None, 1


def get_context_parallel_group() -> ProcessGroup | None:
    """The group of this process, None for a group of one."""
    return _group


def get_context_parallel_world_size() -> int:
    return group_size(_group)


def get_context_parallel_rank() -> int:
    return group_rank(_group)


def group_size(group: ProcessGroup | None) -> int:
    return 1 if group is None else dist.get_world_size(group)


def group_rank(group: ProcessGroup | None) -> int:
    return 0 if group is None else dist.get_rank(group)


# ---------------------------------------------------------------- whole tensors


def all_reduce_sum(x: Tensor, group: ProcessGroup | None) -> Tensor:
    """The sum of every rank's `x`, on every rank."""
    return x if group is None else _AllReduceSum.apply(x, group)


def sum_over_ranks(x: Tensor, group: ProcessGroup | None) -> Tensor:
    """The sum of every rank's `x`, on every rank, with the gradient of this rank's own `x` alone.

    For the terms of one loss of which each rank computes its share: every rank holds the whole loss, and its backward
    pass gives the part of the gradient that comes from its own share.
    """
    if group is None:
        return x
    total = x.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return x + (total - x.detach())


def broadcast(x: Tensor, group: ProcessGroup | None) -> Tensor:
    """The first rank's `x`, on every rank; shapes and dtypes must agree. Overwrites `x` on the others."""
    if group is not None:
        dist.broadcast(x, group=group, group_src=0)
    return x


def all_gather_integer(value: int, group: ProcessGroup | None) -> list[int]:
    """Every rank's `value`, in the order of ranks."""
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
        # Each rank uses the sum, so its gradient is the sum of what reaches every rank's copy.
        total = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ctx.group)
        return total, None


# ---------------------------------------------------------------- frames


def split_evenly(total: int, parts: int) -> list[int]:
    """`total` as `parts` integers that differ by one at most, the larger ones first."""
    share, rest = divmod(total, parts)
    return [share + (part < rest) for part in range(parts)]


def split_frames(x: Tensor, frames: Sequence[int], group: ProcessGroup | None) -> Tensor:
    """This rank's frames (a view) of `x` (batch, channel, time, ...), which every rank holds: `frames[rank]` many."""
    return x if group is None else _SplitFrames.apply(x, frames, group)


def gather_frames(x: Tensor, frames: Sequence[int], group: ProcessGroup | None) -> Tensor:
    """All ranks' frames in order, on every rank; rank r brings `frames[r]` of them."""
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
    """All ranks' `x` one after the other along `dim`, of which rank r brings `counts[r]`; without gradients."""
    padded = x.new_zeros((*x.shape[:dim], max(counts), *x.shape[dim + 1 :]))  # backends want equal shapes
    padded.narrow(dim, 0, x.shape[dim]).copy_(x)
    received = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(received, padded, group=group)
    return torch.cat([part.narrow(dim, 0, count) for part, count in zip(received, counts, strict=True)], dim)


# ---------------------------------------------------------------- from rank to rank


def send_to_next(x: Tensor, group: ProcessGroup) -> Tensor:
    """Send `x` to the next rank of the ring without waiting for it. Returns a tensor of no frames.

    Concatenate the result, along time, with something that the loss depends on: that is how this rank's backward
    pass knows that it has a gradient to receive.
    """
    return _SendToNext.apply(x, group)


def receive_from_previous(like: Tensor, frames: int, group: ProcessGroup) -> Tensor:
    """What the previous rank of the ring sent: shaped as `like` (batch, channel, time, height, width), `frames` long.

    `like` only gives shape, dtype and device, and whether a gradient goes back. The result must be used likewise.
    """
    return _ReceiveFromPrevious.apply(like, frames, group)


class _SendToNext(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group, ctx.shape = group, x.shape
        _start_sending(x, +1, group)
        return x.new_empty((*x.shape[:FRAMES], 0, *x.shape[FRAMES + 1 :]))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _receive(gradient, ctx.shape, +1, ctx.group), None


class _ReceiveFromPrevious(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, like: Tensor, frames: int, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return _receive(like, (*like.shape[:FRAMES], frames, *like.shape[FRAMES + 1 :]), -1, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None, None]:
        _start_sending(gradient, -1, ctx.group)
        return None, None, None


_sending: list[tuple[dist.Work, Tensor]] = []


def _start_sending(x: Tensor, step: int, group: ProcessGroup) -> None:
    # A send must be kept, with its tensor, until it is done. One at a time is enough: by the time of the next,
    # the neighbour has asked for this one.
    while _sending:
        _sending.pop()[0].wait()
    x = x.permute(0, 2, 3, 4, 1).contiguous()  # channels last in memory, as the receiver will want it
    # By way of the CPU (gloo): with NCCL two ranks that first send and then receive would wait for each other.
    x = x.cpu()
    _sending.append((dist.isend(x, group=group, group_dst=_neighbour(step, group)), x))


def _receive(like: Tensor, shape: tuple[int, ...], step: int, group: ProcessGroup) -> Tensor:
    batch, channel, time, height, width = shape
    x = torch.empty((batch, time, height, width, channel), dtype=like.dtype)
    dist.recv(x, group=group, group_src=_neighbour(step, group))
    return x.to(like.device).permute(0, 4, 1, 2, 3)


def _neighbour(step: int, group: ProcessGroup) -> int:
    return (dist.get_rank(group) + step) % dist.get_world_size(group)
