"""A sampler's progress bar is shown on request, until something else shows progress."""

from types import SimpleNamespace

import pytest
import torch.distributed as dist

from sgm.modules.diffusionmodules.base_sampler import BaseDiffusionSampler
from sgm.modules.diffusionmodules.sampling import VPSDEDPMPP2MSampler
from sgm.modules.diffusionmodules.sampling_bar import SamplingBar, hide_bar


def test_all_samplers_have_it():
    assert issubclass(VPSDEDPMPP2MSampler, SamplingBar) and issubclass(BaseDiffusionSampler, SamplingBar)


@pytest.mark.parametrize("rank", [None, 0, 1])
def test_the_first_process_shows_it_where_it_is_asked_for(rank, capsys, monkeypatch):
    if rank is not None:
        monkeypatch.setattr(dist, "is_initialized", lambda: True)
        monkeypatch.setattr(dist, "get_rank", lambda: rank)
    sampler = SamplingBar()
    for shown in (False, True, False):
        sampler.show_bar(shown)
        assert list(sampler.counted(range(3))) == [0, 1, 2]
        assert ("3/3" in capsys.readouterr().err) == (shown and rank != 1)


def test_a_sampler_of_the_users_own_is_quiet_too():
    theirs, ours = SimpleNamespace(verbose=True), SamplingBar()
    ours.show_bar(True)
    for sampler in (theirs, ours):
        hide_bar(sampler)
        assert sampler.verbose is False
    hide_bar(None)
    hide_bar(bare := SimpleNamespace())
    assert not vars(bare)
