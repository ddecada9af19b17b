"""DeepSpeed engines around a network of three layers."""

from collections.abc import Iterator

import pytest
import torch

from cogvideox_sat.configuration.settings import LoopSettings


@pytest.fixture
def linear_as_before() -> Iterator[None]:
    """Restore PyTorch's linear function after the block.

    ZeRO-3 replaces it and does not restore it.
    """
    linear = torch.nn.functional.linear
    yield
    torch.nn.functional.linear = linear


def arguments(stage: int, optimizer: str = "sat.ops.FusedEmaAdam", clipping: float = 0.1, **section):
    from cogvideox_sat.configuration.deepspeed import check_deepspeed_config

    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": clipping,
        "zero_optimization": {"stage": stage},
        "optimizer": {"type": optimizer, "params": {"lr": 0.01, "betas": [0.9, 0.95], "weight_decay": 0.1}},
        **section,
    }
    settings = LoopSettings(20, warmup=0.1, auto_warmup_steps=0, lr_decay_style="cosine", lr_decay_ratio=0.1)
    return check_deepspeed_config(config), settings


def build(args, dtype=torch.float32, model_parallel_size=1):
    """Return an engine around a small network with one frozen layer.

    No tensor divides evenly among processes.
    """
    from cogvideox_sat.parallel.process_groups import initialize_process_groups
    from cogvideox_sat.training import deepspeed_engine

    initialize_process_groups(model_parallel_size)
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(7, 13), torch.nn.LayerNorm(13), torch.nn.Linear(13, 5))
    network[0].bias.requires_grad_(False)
    return deepspeed_engine.initialize(network.to(dtype), *args, dtype)
