"""Parts that are not of this package; test_diffusion_video.py builds our own ones."""

import pytest
import torch
from torch import nn

from cogvideox_sat.configuration.settings import EngineSettings
from cogvideox_sat.engine.parts import build_first_stage, network_wrapper, set_lora_scale, share_tokens
from cogvideox_sat.parallel.video_groups import ALONE
from sgm.errors import UserError
from sgm.modules.diffusionmodules.wrappers import OpenAIWrapper


def test_a_first_stage_of_another_kind_needs_none_of_our_methods():
    config = {"target": "torch.nn.Linear", "params": {"in_features": 2, "out_features": 2}}
    settings = EngineSettings({}, vae_tile_size=64, vae_frames_at_once=4)
    first_stage = build_first_stage(config, settings, "cpu", torch.bfloat16, ALONE)
    assert first_stage.weight.dtype == torch.bfloat16 and not first_stage.weight.requires_grad
    assert not first_stage.training


def test_the_wrapper_of_a_configuration():
    assert network_wrapper({}, None) is OpenAIWrapper
    assert network_wrapper({"network_wrapper": "torch.nn.Identity"}, None) is nn.Identity


def test_a_network_that_cannot_share_tokens():
    with pytest.raises(UserError, match="sequence_parallel: Identity has no `share_tokens`"):
        share_tokens(nn.Identity(), object())


def test_the_strength_of_an_adapter():
    layer = nn.Linear(2, 2)
    layer.matrix_A, layer.lora_alpha, layer.r = nn.Linear(2, 4), 8, 4
    set_lora_scale(nn.Sequential(nn.Identity(), layer), 0.5)
    assert layer.scaling == 1.0
