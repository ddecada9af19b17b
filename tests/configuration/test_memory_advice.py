"""Test that full memory ends a command with exit code 2 and one line of advice.

Checkpoints are kept.
"""

import subprocess
from pathlib import Path

import pytest
import torch

import processes
import train_video
from cogvideox_sat.configuration.argument_lists import SamplingArguments, TrainingArguments
from cogvideox_sat.configuration.memory_advice import precompute_advice, sampling_advice, training_advice
from cogvideox_sat.training import latent_cache_shards, validation
from diffusion_video import SATVideoDiffusionEngine
from distributed import environments_of_ranks, killed_at_the_end
from sgm.modules.encoders import t5_loading
from training_clips import write_dataset
from training_runs import ROOT, runs_of, weights, write_config

pytestmark = pytest.mark.usefixtures("one_thread")

# A training command in which the step of one process fails, as on a GPU with full memory.
FAILING = """
import sys, torch
sys.path[:0] = [{root!r}, {root!r} + "/sat", {root!r} + "/tests"]
import torch.distributed as dist
import train_video
from diffusion_video import SATVideoDiffusionEngine
step = SATVideoDiffusionEngine.shared_step
calls = []
def fail(self, *args, **kwargs):
    calls.append(1)
    if len(calls) == 2 and dist.get_rank() == 1:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    return step(self, *args, **kwargs)
SATVideoDiffusionEngine.shared_step = fail
sys.exit(train_video.main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("clips") / "data", clips=4, frames=12, sizes=[(64, 96)])


def fill_memory(*_, **__) -> None:
    """Raise the error of a CPU without free memory."""
    torch.empty(2**50)


def on_call(number: int, function, fail=fill_memory):
    """Return `function`, whose n-th call fails."""
    calls = []

    def call(*args, **kwargs):
        calls.append(1)
        return fail() if len(calls) == number else function(*args, **kwargs)

    return call


def last_line(caplog) -> str:
    assert not any(record.exc_info for record in caplog.records), "a traceback"
    return caplog.messages[-1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("owner", "name", "says"),
    [
        (SATVideoDiffusionEngine, "encode_batch", "encoding clips: host memory is full"),
        (SATVideoDiffusionEngine, "forward", "training: host memory is full"),
    ],
)
def test_a_training_step(tmp_path, tiny, clips, caplog, monkeypatch, owner, name, says):
    """Memory is full in the third step; the checkpoint of the second stays and loads."""
    monkeypatch.setattr(owner, name, on_call(3, getattr(owner, name)))
    config = write_config(tmp_path / "config.yaml", tiny, "5b", clips, save_interval=2)
    assert train_video.main(["--base", str(config)]) == 2
    line = last_line(caplog)
    (run,) = runs_of(config)
    assert line.startswith(f"error: {says}") and "tools/precompute_latents.py" in line and "--vae_tile_size" in line
    assert line.endswith(f"the last checkpoint is kept; resume with --resume {run}")
    assert ("--checkpoint_activations" in line) == (name == "forward")
    assert (run / "latest").read_text() == "2" and weights(run)
    monkeypatch.undo()
    assert train_video.main(["--base", str(config), "--resume", str(run)]) == 0


@pytest.mark.slow
def test_the_first_step_leaves_no_checkpoint_to_name(tmp_path, tiny, clips, caplog, monkeypatch):
    monkeypatch.setattr(SATVideoDiffusionEngine, "forward", fill_memory)
    config = write_config(tmp_path / "config.yaml", tiny, "5b", clips)
    assert train_video.main(["--base", str(config)]) == 2
    assert "checkpoint is kept" not in last_line(caplog)


@pytest.mark.slow
def test_an_optimizer_of_deepspeed(tmp_path, tiny, clips, caplog, monkeypatch):
    import deepspeed

    monkeypatch.setattr(deepspeed, "initialize", fill_memory)
    config = write_config(tmp_path / "config.yaml", tiny, "5b", clips, zero=2)
    assert train_video.main(["--base", str(config)]) == 2
    line = last_line(caplog)
    assert line.startswith("error: making the optimizer: host memory is full") and "offload_optimizer" in line


@pytest.mark.slow
@pytest.mark.parametrize("part", ["validation_loss", "save_samples"])
def test_an_evaluation(tmp_path, tiny, clips, caplog, monkeypatch, part):
    monkeypatch.setattr(validation, part, fill_memory)
    config = write_config(tmp_path / "config.yaml", tiny, "5b", clips, valid_data=[str(clips)], eval_interval=2)
    assert train_video.main(["--base", str(config)]) == 2
    line = last_line(caplog)
    assert line.startswith("error: evaluation: host memory is full") and "--num_log_videos 0" in line


def test_the_text_encoder(tmp_path, tiny, clips, caplog, monkeypatch):
    """The text encoder's loader reports everything as a mistake of its own."""
    monkeypatch.setattr(t5_loading, "stored_weights", fill_memory)
    config = write_config(tmp_path / "config.yaml", tiny, "5b", clips)
    assert train_video.main(["--base", str(config)]) == 2
    line = last_line(caplog)
    assert line.startswith("error: loading the text encoder: host memory is full")
    assert "tools/precompute_latents.py" in line and not list((tmp_path / "runs").glob("*"))


@pytest.mark.slow
def test_encoding_before_training(tmp_path, tiny, clips, caplog, monkeypatch):
    from tools.precompute_latents import main

    config = write_config(tmp_path / "config.yaml", tiny, "5b", clips)
    monkeypatch.setattr(SATVideoDiffusionEngine, "encode_moments", on_call(3, SATVideoDiffusionEngine.encode_moments))
    monkeypatch.setattr(latent_cache_shards, "SHARD_SAMPLES", 1)
    command = ["--base", str(config), "--device", "cpu", "--output", str(tmp_path / "cache")]
    assert main(command) == 2
    line = last_line(caplog)
    assert line.startswith("error: encoding clips: host memory is full") and "--vae_tile_size" in line
    assert len(list((tmp_path / "cache").glob("rank*.safetensors"))) == 2
    monkeypatch.undo()
    assert main(command) == 0, "it goes on where it was"


@pytest.mark.slow
@pytest.mark.long
def test_one_of_two_processes(tmp_path, tiny, clips):
    """The other process does not wait within a step, and neither shows a traceback."""
    config = write_config(tmp_path / "config.yaml", tiny, "5b", clips, zero=2)
    script = tmp_path / "failing.py"
    script.write_text(FAILING.format(root=str(ROOT)))
    ranks = [
        processes.start([script, "--base", config, "--device", "cpu"], env=environment, stderr=subprocess.PIPE)
        for environment in environments_of_ranks(2)
    ]
    with killed_at_the_end(ranks):
        outputs = [process.communicate(timeout=150)[1] for process in ranks]
    assert [process.returncode for process in ranks] == [2, 2], outputs
    assert "error: training: the memory of the GPU is full (2.00 GiB more were asked for); try" in outputs[1]
    assert "error: another process has failed; see its message" in outputs[0]
    assert not any("Traceback" in output for output in outputs)


@pytest.mark.slow
def test_training_a_vae(tmp_path, caplog, monkeypatch):
    """Memory is full in the second step; the checkpoint of the first stays."""
    import train_vae
    import vae_runs
    from sgm.models.video_autoencoding_engine import VideoAutoencodingEngine

    data = vae_runs.write_mixed_dataset(tmp_path / "data", videos=4, images=0)
    config = vae_runs.write_config(tmp_path / "config.yaml", data, args={"save_interval": 1})
    reconstruct = VideoAutoencodingEngine.reconstruct
    monkeypatch.setattr(VideoAutoencodingEngine, "reconstruct", on_call(2, reconstruct))
    assert train_vae.main(["--base", str(config)]) == 2
    line = last_line(caplog)
    assert line.startswith("error: training: host memory is full") and "checkpoint_levels" in line
    assert "--batch_size 1" in line and "the last checkpoint is kept; resume with --resume " in line


# ---------------------------------------------------------------- what is at hand


def test_advice_names_only_what_is_not_in_use_yet():
    model = {"network_config": {"params": {"modules": {"lora_config": {}}, "transformer_args": {}}}}
    zero = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}, "train_micro_batch_size_per_gpu": 1}
    args = TrainingArguments(model_config=model, deepspeed_config=zero, checkpoint_activations=True, vae_tile_size=256)
    line = training_advice(args, cached=True, checkpoint=None)("training")
    assert line == "try fewer frames or a smaller size (data.params.max_num_frames, video_size)"
    line = training_advice(TrainingArguments(model_config=model), cached=False, checkpoint=None)("training")
    for option in ("precompute_latents", "--vae_tile_size", "--checkpoint_activations", "offload_optimizer"):
        assert option in line
    assert "adapter" not in line, "it is one"


def test_advice_of_sampling():
    advise = sampling_advice(SamplingArguments(bf16=True))
    assert "--vae_tile_size" in advise("decoding")
    assert "--offload sequential" in advise("sampling") and "--vae_tile_size" not in advise("sampling")
    assert "--offload stage" in sampling_advice(SamplingArguments(offload="none"))("loading the text encoder")
    assert "--bf16" in sampling_advice(SamplingArguments())("loading the text encoder")
    assert "--vae_tile_size" not in precompute_advice(TrainingArguments())("loading the text encoder")
