"""The report before the first step."""

from argparse import Namespace

import torch

from cogvideox_sat.files.sizes import GIB
from cogvideox_sat.latent_geometry import Bucket
from cogvideox_sat.training.memory_estimate import Layout, encoding_bytes, estimate_memory
from cogvideox_sat.training.parameter_report import report
from untrained_engines import ADAM, CLIP, engine_of


class Buckets(list):
    bucket = list.__getitem__


def test_report(tiny):
    """The largest clip counts, not the last."""
    args = Namespace(deepspeed_config=ADAM, background_checkpoints=False)
    engine = engine_of(tiny.config("5b"), lora=True, recompute=True, parts=("model", "first_stage_model"))
    lines = report(engine, args, Buckets([Bucket(1, 32, 48), CLIP, Bucket(9, 96, 144)]))
    assert lines[0].startswith("trainable parameters: 16.4 k of ") and lines[0].endswith("adapter 16.4 k")
    memory = estimate_memory(engine, Layout.from_config(ADAM, torch.float32), CLIP, 2)
    assert f"2 x 17 frames of 96x144: {memory.total / GIB:.2f} GiB (weights" in lines[1]
    assert "activations (recomputed)" in lines[1] and "host" not in lines[1]
    assert memory.encoding == encoding_bytes(engine, CLIP, 2, element=4) > 0
    assert memory.weights > sum(t.nbytes for t in engine.network.parameters()), "the VAE's count too"
