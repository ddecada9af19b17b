"""Test that clips cover their size, and crops and mirroring follow from mode and seed."""

import pytest
import torch

from cogvideox_sat.clips.transforms import CENTRED, Framing, Placement, cover


def ramp(height: int, width: int) -> torch.Tensor:
    """Return two equal frames whose first channel is the column and whose second is the row."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack((columns, rows, rows)).to(torch.uint8).expand(2, -1, -1, -1)


def corner(frames: torch.Tensor) -> tuple[int, int]:
    """Return the column and row of the source that the first pixel shows."""
    return tuple(frames[0, :2, 0, 0].tolist())


def test_the_middle_is_what_stays():
    assert corner(cover(ramp(20, 41), 20, 30)) == (5, 0)
    assert corner(cover(ramp(41, 20), 30, 20)) == (0, 5)
    assert cover(ramp(10, 20), 16, 24).shape == (2, 3, 16, 24)


def test_places_reach_from_one_edge_to_the_other():
    frames = ramp(20, 40)
    assert corner(cover(frames, 20, 30, Placement(left=0.0))) == (0, 0)
    assert corner(cover(frames, 20, 30, Placement(left=1.0))) == (10, 0)
    lefts = {corner(cover(frames, 20, 30, Framing("random").placement(seed)))[0] for seed in range(200)}
    assert lefts == set(range(11))


def test_mirroring_changes_left_and_right_alone():
    frames = cover(ramp(20, 40), 20, 40, Placement(mirrored=True))
    assert torch.equal(frames, ramp(20, 40).flip(-1))


@pytest.mark.parametrize("mode", ["random", "none"])
def test_chance_follows_from_the_seed(mode):
    framing = Framing(mode, flip=0.5)
    placements = [framing.placement(seed) for seed in range(400)]
    assert placements == [framing.placement(seed) for seed in range(400)]
    assert 150 < sum(placement.mirrored for placement in placements) < 250
    assert len({placement.top for placement in placements}) == len({p.left for p in placements}) == 400
    # Neither option changes the random numbers of the other.
    assert [Framing(mode).placement(seed)[:2] for seed in range(9)] == [placement[:2] for placement in placements[:9]]
    assert [Framing(flip=0.5).placement(s).mirrored for s in range(9)] == [p.mirrored for p in placements[:9]]


def test_without_options_nothing_is_drawn():
    assert {Framing().placement(seed) for seed in range(9)} == {CENTRED}
