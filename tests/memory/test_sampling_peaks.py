"""Test that the estimated memory of sampling is the memory of a run on fake tensors."""

import importlib
import json
from pathlib import Path

import pytest
import torch

from cogvideox_sat.configuration.files import load_configs
from cogvideox_sat.configuration.settings import EngineSettings
from cogvideox_sat.configuration.video_layout import VideoLayout
from cogvideox_sat.latent_geometry import Bucket
from cogvideox_sat.memory.sampling_peaks import (
    IMAGE,
    LIBRARIES,
    NETWORK,
    TEXT,
    VIDEO,
    MemoryPolicy,
    SamplingMemory,
    VideoSize,
)
from long_cases import long
from sgm.modules.encoders.t5_loading import T5_V1_1_XXL

ROOT = Path(__file__).resolve().parents[2]
GIB = 2**30


def settings(model: str, layers: int, text_encoder: Path | None = None) -> EngineSettings:
    config = load_configs([ROOT / "configs" / f"{model}.yaml"])["model"]
    config["network_config"]["params"]["num_layers"] = layers
    if text_encoder is not None:
        config["conditioner_config"]["params"]["emb_models"][0]["params"]["model_dir"] = str(text_encoder)
    return EngineSettings(config, bf16=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "video", "policy"),
    [
        long("cogvideox_5b", VideoSize(3, 240, 352), MemoryPolicy("none", 2)),
        long("cogvideox1.5_5b_i2v", VideoSize(4, 256, 384), MemoryPolicy("sequential", 2)),
        ("cogvideox_2b", VideoSize(3, 240, 352), MemoryPolicy("stage", 1, 4)),
        long("cogvideox_2b_lora", VideoSize(3, 64, 64), MemoryPolicy("stage", 2)),
    ],
)
def test_within_15_percent_of_a_run_on_fake_tensors(monkeypatch, tmp_path, model, video, policy):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    fake_memory = importlib.import_module("measuring.fake_memory")
    (tmp_path / "config.json").write_text(json.dumps({**T5_V1_1_XXL, "num_layers": 3}))
    asked = settings(model, layers=3, text_encoder=tmp_path)
    memory = SamplingMemory(asked, [video, VideoSize(1 + video.latent_frames % 2, 64, 64)])
    counted = fake_memory.stage_peaks(asked, video, policy, steps=1)
    told = {stage: taken - LIBRARIES for stage, taken in memory.stages(policy).items()}
    assert told.keys() == counted.keys() == {TEXT, NETWORK, VIDEO} | ({IMAGE} if "i2v" in model else set())
    for stage, taken in counted.items():
        assert told[stage] == pytest.approx(taken, rel=0.15), stage


@pytest.mark.slow
def test_each_means_takes_from_its_stage():
    memory = SamplingMemory(settings("cogvideox_5b", layers=4), [VideoSize(13, 480, 720)])
    none, stage, sequential = (memory.stages(MemoryPolicy(offload, 2)) for offload in ("none", "stage", "sequential"))
    assert none[TEXT] > stage[TEXT] > 4 * (sequential[TEXT] - LIBRARIES)
    modulations = 4 * 2 * 513 * 12 * 3072
    assert none[NETWORK] - stage[NETWORK] == pytest.approx(modulations + memory.parts[VIDEO].whole, rel=0.01)
    assert stage[NETWORK] > sequential[NETWORK]
    halves = memory.stages(MemoryPolicy("stage", 1))
    assert stage[NETWORK] - halves[NETWORK] > 0.4 * (stage[NETWORK] - LIBRARIES - memory.parts[NETWORK].whole)
    assert {**halves, NETWORK: 0} == {**stage, NETWORK: 0}
    assert none[VIDEO] - stage[VIDEO] == memory.parts[NETWORK].whole
    assert memory.stages(MemoryPolicy("stage", 2, 4))[VIDEO] < 0.5 * stage[VIDEO]


@pytest.mark.slow
def test_chunks_that_are_decoded_at_once():
    memory = SamplingMemory(settings("cogvideox_2b", layers=1), [VideoSize(13, 64, 96)])
    one, two, three, clip = (
        memory.stages(MemoryPolicy("stage", 2, frames))[VIDEO] - LIBRARIES for frames in (8, 16, 24, 48)
    )
    assert one < two < three and clip - three > 2 * (three - two)


@pytest.mark.slow
def test_what_is_not_made_is_not_counted():
    asked, video = settings("cogvideox_5b", layers=2), VideoSize(1, 64, 64)
    state = torch.get_rng_state()
    latents = SamplingMemory(asked, [video], decodes=False).stages(MemoryPolicy("none", 2))
    both = SamplingMemory(asked, [video]).stages(MemoryPolicy("none", 2))
    typed = SamplingMemory(asked, [video], keeps_text_encoder=True)
    assert torch.equal(torch.get_rng_state(), state)
    assert VIDEO not in latents and both[NETWORK] > latents[NETWORK]
    assert typed.stages(MemoryPolicy("none", 2))[NETWORK] - both[NETWORK] == typed.parts[TEXT].whole
    assert typed.peak(MemoryPolicy("stage", 2)) == max(typed.stages(MemoryPolicy("stage", 2)).values())


@pytest.mark.slow
def test_81_frames_of_1_5_in_12_gib():
    """The 12 GiB include the memory of CUDA itself."""
    memory = SamplingMemory(settings("cogvideox1.5_5b", layers=3), [VideoSize(22, 768, 1360)])  # others wait elsewhere
    assert memory.peak(MemoryPolicy("sequential", 1, 4)) < 12 * GIB


@pytest.mark.slow
def test_a_process_that_shares_a_video(monkeypatch):
    """Compare a process that shares a video with a run on fake tensors.

    It has its share of the tokens, with the tensors it sends and receives, one half of guidance, and the VAE's frames
    of all processes.
    """
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    shared_clips = importlib.import_module("measuring.shared_clips")
    asked, video = settings("cogvideox_5b", layers=2), VideoSize(13, 480, 720)
    alone = SamplingMemory(asked, [video])
    memory = SamplingMemory(asked, [video], layout=VideoLayout(guidance=2, sequence=4))
    counted = shared_clips.counted_shares("cogvideox_5b", Bucket(49, 480, 720), 4, layers=2).sampling
    weights = memory.parts[NETWORK].whole
    assert memory.network_activations(1, False) + weights == pytest.approx(counted, rel=0.15)
    assert memory.stages(MemoryPolicy("stage", 2))[NETWORK] == memory.stages(MemoryPolicy("stage", 1))[NETWORK]
    assert memory.network_activations(1, False) < 0.4 * alone.network_activations(1, False)
    frames = memory.stages(MemoryPolicy("stage", 2))[VIDEO] - alone.stages(MemoryPolicy("stage", 2))[VIDEO]
    assert frames == 17 * 12 * 3 * 480 * 720 * 2
