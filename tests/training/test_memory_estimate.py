"""The memory that is estimated, against what training then really takes."""

import pytest
import torch

from cogvideox_sat.files.sizes import in_words
from cogvideox_sat.latent_geometry import Bucket
from cogvideox_sat.runs.staging import StagingMemory
from cogvideox_sat.training.memory_estimate import (
    Layout,
    activation_bytes,
    checkpoint_copy_bytes,
    checkpoint_copy_line,
    estimate_memory,
    kept_bytes,
)
from sgm.ema_adam import EmaAdam
from untrained_engines import ADAM, CLIP, engine_of

EMA = {**ADAM, "optimizer": {"type": "sat.ops.FusedEmaAdam", "params": {"lr": 1e-4}}}


def video_inputs(network, clip: Bucket, batch: int) -> dict[str, torch.Tensor]:
    frames = (clip.frames - 1) // 4 + network.patch[0]
    shape = (batch, frames, network.in_channels, clip.height // 8, clip.width // 8)
    inputs = {"x": torch.randn(shape), "timesteps": torch.full((batch,), 3), "context": torch.randn(batch, 64, 64)}
    return inputs if network.ofs_embed_dim is None else {**inputs, "ofs": torch.full((batch,), 2.0)}


def kept_by_forward(network, inputs) -> int:
    """Return the bytes that autograd keeps for the backward pass, without the weights."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*network.parameters(), *network.buffers())}
    kept = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # held, so that the address stays its own
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = network(**inputs)
    assert output.requires_grad
    return sum(size for size, _ in kept.values())


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("lora", [False, True], ids=["network", "adapter"])
@pytest.mark.parametrize("family", ["2b", "1.5_i2v"])
def test_what_the_forward_pass_keeps(tiny, family, lora, recompute):
    network = engine_of(tiny.config(family), lora, recompute).network
    measured = kept_by_forward(network, video_inputs(network, CLIP, batch=2))
    assert kept_bytes(network, CLIP, 2, element=4) == pytest.approx(measured, rel=0.2)


@pytest.mark.parametrize("lora", [False, True], ids=["network", "adapter"])
def test_the_peak_is_above_what_is_kept(tiny, lora):
    """The difference is the gradients in progress, and one layer if it is recomputed."""
    network = engine_of(tiny.config("2b"), lora).network
    plain, kept = (function(network, CLIP, 2, element=4) for function in (activation_bytes, kept_bytes))
    network.transformer.checkpoint_activations = True
    recomputed, kept_then = (function(network, CLIP, 2, element=4) for function in (activation_bytes, kept_bytes))
    assert kept < plain and kept_then < recomputed < plain
    assert recomputed - kept_then > plain - kept


@pytest.mark.parametrize("lora", [False, True], ids=["network", "adapter"])
def test_weights_gradients_and_optimizer(tiny, lora):
    engine = engine_of(tiny.config("2b"), lora)
    trained = [parameter for parameter in engine.network.parameters() if parameter.requires_grad]
    optimizer = EmaAdam(trained)
    engine.network(**video_inputs(engine.network, CLIP, batch=1)).sum().backward()
    optimizer.step()
    memory = estimate_memory(engine, Layout.from_config(EMA, torch.float32), CLIP, 1)
    tensors = [tensor for state in optimizer.state.values() for tensor in state.values() if torch.is_tensor(tensor)]
    assert memory.optimizer == sum(tensor.nbytes for tensor in tensors)
    assert memory.gradients == sum(parameter.grad.nbytes for parameter in trained)
    assert memory.weights == sum(t.nbytes for t in (*engine.network.parameters(), *engine.network.buffers()))
    assert memory.host == memory.encoding == 0


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize(("lora", "full"), [(False, True), (True, False), (True, True)])
def test_the_copy_of_a_checkpoint(tiny, lora, full, bf16):
    """The bytes that are staged, and then those of the moving average in half precision."""
    engine = engine_of(tiny.config("2b"), lora, bf16=bf16)
    network = engine.network
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    count = sum(parameter.numel() for parameter in trained)
    zero = {"zero_optimization": {"stage": 2}, "bf16": {"enabled": True}} if bf16 else {}
    layout = Layout.from_config({**EMA, **zero}, engine.dtype)
    memory = StagingMemory(pinned=False)
    memory.start_over(1)  # slabs of what is asked for
    for tensor in network.state_dict().values() if full else trained:
        memory.copy(tensor)
    for _ in range(3 + bf16):
        for parameter in trained:
            memory.copy(parameter.float())
    staged = sum(slab.nbytes for slab in memory.slabs)
    assert checkpoint_copy_bytes(network, layout, full) == staged + 2 * count * bf16
    line = checkpoint_copy_line(network, layout, full)
    assert line.startswith("background_checkpoints: ") and in_words(staged + 2 * count * bf16) in line


# ---------------------------------------------------------------- ZeRO


def test_zero_divides(tiny):
    engine = engine_of(tiny.config("5b"), bf16=True)
    weights = sum(t.nbytes for t in (*engine.network.parameters(), *engine.network.buffers()))
    trained = sum(p.numel() for p in engine.network.parameters() if p.requires_grad)
    small_bucket = {"reduce_bucket_size": 1000, "overlap_comm": True}

    def estimate(processes: int, **zero):
        section = {**EMA, "zero_optimization": {**small_bucket, **zero}, "bf16": {"enabled": True}}
        return estimate_memory(engine, Layout.from_config(section, torch.bfloat16, processes), CLIP, 1)

    states, stepping = 4 * (3 + 1) * trained, 4 * trained  # three of the optimizer and master weights; gradients
    for stage, buckets, shares in ((1, 8000, (1, 1, 4)), (2, 4000, (1, 4, 4)), (3, 2000, (4, 4, 4))):
        memory = estimate(4, stage=stage)
        expected = weights / shares[0], 2 * trained / shares[1] + buckets, states / shares[2]
        assert (memory.weights, memory.gradients, memory.optimizer) == pytest.approx(expected, abs=4)
        assert memory.stepping == pytest.approx(stepping / 4, abs=4)
    memory = estimate(4, stage=3, offload_optimizer={"device": "cpu"}, offload_param={"device": "cpu"})
    assert (memory.weights, memory.optimizer, memory.stepping) == (0, 0, 0)
    assert memory.host == pytest.approx((weights + states + stepping) / 4, abs=4)
    assert estimate(1, stage=0) == estimate(1, stage=1), "half precision without ZeRO runs as stage 1"


def test_model_parallel_processes_share_activations(tiny):
    network = engine_of(tiny.config("5b")).network
    two, four = (activation_bytes(network, CLIP, 1, 4, model_parallel=size) for size in (2, 4))
    assert two / 2 < four < two
