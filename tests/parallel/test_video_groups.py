"""The processes that make a video find each other, and hear of the first one's failures."""

from typing import Any

import pytest
import torch
import torch.distributed as dist

from cogvideox_sat.configuration.video_layout import VideoLayout
from cogvideox_sat.parallel.process_groups import initialize_process_groups
from cogvideox_sat.parallel.video_groups import ALONE, video_groups
from distributed import run_distributed
from sgm.errors import UserError


def ranks(group: dist.ProcessGroup | None) -> list[int] | None:
    return None if group is None else dist.get_process_group_ranks(group)


def place_of_a_rank() -> dict[str, Any]:
    initialize_process_groups()
    found: dict[str, Any] = {}
    for layout in ((2, 2), (2, 1), (1, 2), (1, 4), (1, 1)):
        groups = video_groups(VideoLayout(*layout))
        assert video_groups(VideoLayout(*layout)) == groups
        members = ranks(groups.group), ranks(groups.guidance), ranks(groups.sequence)
        found[str(layout)] = groups.video, groups.videos, groups.first, groups.size, *members
    try:
        video_groups(VideoLayout(1, 3))
    except UserError as error:
        found["odd"] = str(error)
    groups, rank = video_groups(VideoLayout(2, 1)), dist.get_rank()
    found["said"] = groups.from_first(lambda: f"rank {rank}")
    try:
        groups.from_first(lambda: fail(rank))
    except UserError as error:
        found["failed"] = str(error)
    found["agreed"] = groups.agreed(torch.full((2, 3), float(rank)).T)
    found["own"] = video_groups(VideoLayout()).agreed(torch.full((1,), float(rank)))
    return found


def fail(rank: int) -> None:
    raise UserError(f"rank {rank} failed")


@pytest.mark.distributed
@pytest.mark.slow
def test_neighbours_share_the_sequence_and_others_the_guidance():
    for rank, found in enumerate(run_distributed(place_of_a_rank, 4)):
        other = rank + 2 if rank < 2 else rank - 2
        pair, first = sorted([rank, rank ^ 1]), rank - rank % 2
        assert found["(2, 2)"] == (0, 1, rank == 0, 4, [0, 1, 2, 3], sorted([rank, other]), pair)
        assert found["(2, 1)"] == (rank // 2, 2, rank == first, 2, pair, pair, None)
        assert found["(1, 2)"] == (rank // 2, 2, rank == first, 2, pair, None, pair)
        assert found["(1, 4)"] == (0, 1, rank == 0, 4, [0, 1, 2, 3], None, [0, 1, 2, 3])
        assert found["(1, 1)"] == (rank, 4, True, 1, None, None, None)
        assert "3 does not divide the 4 processes" in found["odd"]
        assert (found["said"], found["failed"]) == (f"rank {first}", f"rank {first} failed")
        assert torch.equal(found["agreed"], torch.full((3, 2), float(first)))
        assert found["own"].item() == rank


def test_one_process_asks_nobody():
    assert ALONE.from_first(lambda: 3) == 3
    x = torch.ones(2)
    assert ALONE.agreed(x) is x
