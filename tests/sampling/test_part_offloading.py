"""Processes of a machine have the text encoder's weights in host memory once."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cogvideox_sat.configuration.files import load_configs
from cogvideox_sat.configuration.settings import EngineSettings
from cogvideox_sat.sampling.part_offloading import PartOffloader, is_converted, text_encoders
from diffusion_video import SATVideoDiffusionEngine
from distributed import run_distributed
from long_cases import others_long

ROOT = Path(__file__).parents[2]
TINY = ROOT / "configs" / "tiny" / "cogvideox_tiny.yaml"
MIB = 2**20


@pytest.fixture(scope="module")
def large_t5(tmp_path_factory) -> Path:
    """Return the folder of a T5 with random weights of 100 MiB in bfloat16."""
    from transformers import T5Config, T5EncoderModel

    folder = tmp_path_factory.mktemp("t5")
    shutil.copy(ROOT / "assets" / "tiny" / "t5" / "spiece.model", folder)
    config = json.loads((ROOT / "assets" / "tiny" / "t5" / "config.json").read_text())
    config |= {"d_model": 640, "d_ff": 2048, "num_layers": 9, "num_heads": 10, "d_kv": 64}
    torch.manual_seed(0)
    T5EncoderModel(T5Config(**config)).bfloat16().save_pretrained(folder, max_shard_size="60MB")
    return folder


def anonymous_bytes() -> int:
    """Return how much memory this process has for itself alone, which is not that of a file."""
    (line,) = [
        line for line in Path("/proc/self/smaps_rollup").read_text().splitlines() if line.startswith("Anonymous:")
    ]
    return int(line.split()[1]) * 1024


def encoded(folder: Path, dtype: torch.dtype, offload: str, here: int) -> tuple[Tensor, int, int, bool]:
    """Return a prompt's embedding, its memory, and the size of the weights.

    The last value is whether the weights stay in their file in another dtype.
    """
    os.environ["LOCAL_WORLD_SIZE"] = str(here)
    config = load_configs([TINY])["model"]
    config["conditioner_config"]["params"]["emb_models"][0]["params"]["model_dir"] = str(folder)
    engine = SATVideoDiffusionEngine(EngineSettings(config), parts=(), params_dtype=dtype)
    before = anonymous_bytes()
    PartOffloader(engine, offload).use("conditioner")
    embedding = engine.conditioner({"txt": ["a red circle"]}, drop=False)["crossattn"]
    taken = anonymous_bytes() - before
    (encoder,) = text_encoders(engine.conditioner)
    size = sum(parameter.numel() for parameter in encoder.parameters()) * dtype.itemsize
    return embedding, taken, size, is_converted(encoder)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(
    ("dtype", "offload"),
    others_long(("bfloat16", "stage"), ("float32", "none"), ("float32", "sequential")),
)
def test_processes_share_the_text_encoder(large_t5, monkeypatch, dtype, offload):
    """Each process has less than a third of it for itself, in any dtype, to the bit."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    expected, *_ = encoded(large_t5, getattr(torch, dtype), offload, 1)
    results = run_distributed(encoded, 2, large_t5, getattr(torch, dtype), offload, 2)
    for embedding, taken, size, converted in results:
        assert size > 90 * MIB * getattr(torch, dtype).itemsize / 2
        assert taken < 0.3 * size, f"{taken / MIB:.0f} of {size / MIB:.0f} MiB"
        assert converted == (dtype == "float32")
        assert torch.equal(embedding, expected)
