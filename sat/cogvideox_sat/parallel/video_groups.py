"""The groups of processes that make a video together, for torch.distributed.

With model parallelism, the processes share the weights of the network; otherwise they share work as a `VideoLayout`
says. The two are never combined.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch.distributed as dist
from sat import mpu
from torch import Tensor

from cogvideox_sat.configuration.video_layout import VideoLayout, check_world
from cogvideox_sat.parallel.first_process import made_by_first
from sgm.context_parallel import broadcast

Result = TypeVar("Result")


@dataclass(frozen=True)
class VideoGroups:
    """The position of this process among those of a run.

    Attributes:
        video, videos: index of its group, and number of groups; each group makes its own videos.
        first: whether the process is the first of its group, which encodes prompts and writes files.
        size: number of processes in a group.
        group: the processes that make a video together; None: one process.
        guidance: the two processes that have the same tokens, first the one without the prompt; None: one process
            computes both halves of guidance.
        sequence: the processes that share the tokens of a batch; None: one process has all tokens.
        peers: the processes at the same position in all groups, which make other videos; None: there is one group.
        splits_work: whether the processes share the work on each video, as a `VideoLayout` says, rather than the
            weights.
    """

    video: int = 0
    videos: int = 1
    first: bool = True
    size: int = 1
    group: dist.ProcessGroup | None = None
    guidance: dist.ProcessGroup | None = None
    sequence: dist.ProcessGroup | None = None
    peers: dist.ProcessGroup | None = None
    splits_work: bool = False

    def agreed(self, x: Tensor) -> Tensor:
        """Return the first process's `x` if processes share the work on a video, else `x`.

        Otherwise, rounding would make the processes differ.
        """
        return broadcast(x.contiguous(), self.group) if self.splits_work else x

    def from_first(self, make: Callable[[], Result]) -> Result:
        """Return on all processes of the group what `make` returns on the first one.

        Raises:
            UserError: `make` raised it on the first process.
        """
        if self.group is None:
            return make()
        return made_by_first(make, self.first, self.group)


ALONE = VideoGroups()
_made: dict[VideoLayout, VideoGroups] = {}


def video_groups(layout: VideoLayout) -> VideoGroups:
    """Return the groups of a layout, which are made at the first call.

    All processes make the same calls.

    Raises:
        UserError: the processes of this run cannot be divided into whole groups.
    """
    if layout.processes == 1:
        return _groups_of_shared_network()
    if layout not in _made:
        _made[layout] = _make(layout)
    return _made[layout]


def forget_video_groups() -> None:
    """Forget the groups, because torch.distributed is shut down."""
    _made.clear()


def _groups_of_shared_network() -> VideoGroups:
    size = mpu.get_model_parallel_world_size()
    return VideoGroups(
        video=mpu.get_data_parallel_rank(),
        videos=mpu.get_data_parallel_world_size(),
        first=mpu.get_model_parallel_rank() == 0,
        size=size,
        group=mpu.get_model_parallel_group() if size > 1 else None,
        peers=mpu.get_data_parallel_group() if mpu.get_data_parallel_world_size() > 1 else None,
    )


def _make(layout: VideoLayout) -> VideoGroups:
    world, rank, size = dist.get_world_size(), dist.get_rank(), layout.processes
    check_world(layout, world)
    firsts = range(0, world, size)
    video = _own_group([list(range(first, first + size)) for first in firsts])
    sequence = guidance = None
    if layout.sequence > 1:
        sequence = _own_group(
            [list(range(first, first + layout.sequence)) for first in range(0, world, layout.sequence)]
        )
    if layout.guidance > 1:
        pairs = [
            [first + offset, first + offset + layout.sequence] for first in firsts for offset in range(layout.sequence)
        ]
        guidance = _own_group(pairs)
    peers = _own_group([list(range(place, world, size)) for place in range(size)]) if world > size else None
    return VideoGroups(
        video=rank // size,
        videos=world // size,
        first=rank % size == 0,
        size=size,
        group=video,
        guidance=guidance,
        sequence=sequence,
        peers=peers,
        splits_work=True,
    )


def _own_group(groups: list[list[int]]) -> dist.ProcessGroup:
    """Make groups of ranks, together with all processes, and return this process's group."""
    own, _ = dist.new_subgroups_by_enumeration(groups)
    return own
