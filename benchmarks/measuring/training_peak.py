"""Count the memory of a whole training step on tensors without content.

The count works at any size on any machine. All tensors of the step are counted as they come and go: activations,
gradients, and the float32 tensors of ZeRO's optimizer. Communication buffers and the workspace within operations are
left out.
"""

from typing import Any

import torch
from torch import nn
from torch._subclasses import FakeTensorMode

from cogvideox_sat.latent_geometry import Bucket
from sgm.attention_kernels import KERNELS
from sgm.ema_adam import EmaAdam
from sgm.models.video_coder_memory import AllocatedBytes

TIMESTEP = 500


def counted_peak(network: nn.Module, bucket: Bucket, modes: list[Any], text_width: int) -> dict[Any, int]:
    """Return the peak bytes of the second step on one clip, by `checkpoint_activations`.

    Weights and optimizer are included.

    Args:
        network: a `DiffusionTransformer` on the meta device, in the dtype of training; it is moved to a fake CPU.
        text_width: features of a text state.
    """
    dtype = network.dtype
    with FakeTensorMode(allow_non_fake_inputs=True):
        network.to_empty(device="cpu").train()
        network.disable_untrainable_params()
        network.training_attention = KERNELS["softmax"]
        trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
        masters = [nn.Parameter(torch.empty(p.shape)) if dtype.itemsize < 4 else p for p in trained]
        optimizer = EmaAdam(masters)
        for master in masters:
            master.grad = torch.empty_like(master)
        optimizer.step()  # creates the optimizer's tensors
        optimizer.zero_grad()
        tensors = [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
        held = [*network.parameters(), *network.buffers(), *masters, *tensors]
        storages = {id(tensor.untyped_storage()): tensor.untyped_storage() for tensor in held}
        resident = sum(storage.nbytes() for storage in storages.values())
        peaks = {}
        for mode in modes:
            network.transformer.checkpoint_activations = mode
            with AllocatedBytes(workspaces=False, host=True) as counted:
                counted.leave_out(storages.values())
                _step(network, network_inputs(network, bucket, text_width), trained, masters, optimizer)
            peaks[mode] = resident + counted.peak
    return peaks


def network_inputs(network: nn.Module, bucket: Bucket, text_width: int) -> dict[str, Any]:
    """Return a network's inputs for one clip, with `text_width` features of a text state."""
    frames = (bucket.frames - 1) // 4 + 1
    frames += frames % network.patch[0]
    size = (1, frames, network.in_channels, bucket.height // 8, bucket.width // 8)
    context = (1, network.mixins["pos_embed"].text_length, text_width)
    inputs = {name: torch.empty(shape, dtype=network.dtype) for name, shape in (("x", size), ("context", context))}
    inputs["timesteps"] = torch.full((1,), TIMESTEP)
    return inputs if network.ofs_embed_dim is None else {**inputs, "ofs": torch.full((1,), 2.0)}


def _step(
    network: nn.Module,
    inputs: dict[str, Any],
    trained: list[nn.Parameter],
    masters: list[nn.Parameter],
    optimizer: torch.optim.Optimizer,
) -> None:
    network(**inputs).float().square().mean().backward()
    del inputs
    for parameter, master in zip(trained, masters, strict=True):
        if master is not parameter:
            assert parameter.grad is not None
            master.grad = parameter.grad.float()
    optimizer.step()
    for parameter in (*trained, *masters):
        parameter.grad = None
