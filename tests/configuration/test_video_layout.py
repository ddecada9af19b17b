"""Test how processes share a video, and which numbers contradict each other."""

import pytest

from cogvideox_sat.configuration.video_layout import VideoLayout, check_world, is_guided, plan_layout
from sgm.errors import UserError

GUIDED = {"params": {"guider_config": {"target": "sgm.modules.diffusionmodules.guiders.DynamicCFG"}}}
UNGUIDED = {"params": {"guider_config": {"target": "sgm.modules.diffusionmodules.guiders.IdentityGuider"}}}


def model(sampler=GUIDED, heads: int = 30) -> dict:
    return {"sampler_config": sampler, "network_config": {"params": {"num_attention_heads": heads}}}


@pytest.mark.parametrize(
    ("sampler", "asked", "layout"),
    [
        (GUIDED, {}, (1, 1)),
        (GUIDED, {"processes_per_video": 1}, (1, 1)),
        (GUIDED, {"processes_per_video": 2}, (2, 1)),
        (GUIDED, {"processes_per_video": 3}, (1, 3)),
        (GUIDED, {"processes_per_video": 8}, (2, 4)),
        (UNGUIDED, {"processes_per_video": 8}, (1, 8)),
        (None, {"processes_per_video": 2}, (1, 2)),
        (GUIDED, {"processes_per_video": 8, "guidance_parallel": False}, (1, 8)),
        (GUIDED, {"processes_per_video": 8, "sequence_parallel": 8}, (1, 8)),
        (GUIDED, {"processes_per_video": 8, "sequence_parallel": 4}, (2, 4)),
        (GUIDED, {"sequence_parallel": 3}, (1, 3)),
        (GUIDED, {"guidance_parallel": True}, (2, 1)),
        (GUIDED, {"guidance_parallel": True, "sequence_parallel": 4}, (2, 4)),
    ],
)
def test_guidance_comes_first_and_the_rest_share_the_sequence(sampler, asked, layout):
    assert plan_layout(model(sampler), **asked) == VideoLayout(*layout)
    assert VideoLayout(*layout).processes == layout[0] * layout[1]


@pytest.mark.parametrize(
    ("sampler", "asked", "says"),
    [
        (GUIDED, {"processes_per_video": 0}, "processes_per_video: got 0; expected a whole number from 1"),
        (GUIDED, {"sequence_parallel": -1}, "sequence_parallel: got -1"),
        (GUIDED, {"processes_per_video": 3, "guidance_parallel": True}, "cannot share 3 processes evenly"),
        (GUIDED, {"processes_per_video": 8, "sequence_parallel": 3}, r"1 x 3 processes .* are not the 8"),
        (UNGUIDED, {"guidance_parallel": True}, "the sampler has no guidance"),
        (UNGUIDED, {"processes_per_video": 2, "guidance_parallel": True}, "the sampler has no guidance"),
        (GUIDED, {"processes_per_video": 2, "model_parallel_size": 2}, "choose one of them"),
        (GUIDED, {"processes_per_video": 62}, "31 processes cannot share 30 attention heads; use 30 at most"),
    ],
)
def test_numbers_that_do_not_go_together_are_one_line(sampler, asked, says):
    with pytest.raises(UserError, match=says):
        plan_layout(model(sampler), **asked)


def test_the_run_is_whole_groups():
    check_world(VideoLayout(2, 2), 8)
    check_world(VideoLayout(), 7)
    with pytest.raises(UserError, match=r"4 does not divide the 1 process of .* --nproc_per_node=4"):
        check_world(VideoLayout(2, 2), 1)


def test_a_model_without_a_sampler_is_not_guided():
    assert not is_guided({}) and not is_guided({"sampler_config": {}})
