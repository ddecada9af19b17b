"""Decide which layers recompute their activations, so that training fills the memory that is free: the `auto` of
`checkpoint_activations`.
"""

from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import nn

from cogvideox_sat.configuration.recomputation import AUTO, Recomputation
from cogvideox_sat.latent_geometry import Bucket
from cogvideox_sat.memory.weightless import GIB
from cogvideox_sat.parallel.devices import processes_here
from cogvideox_sat.runs.host_memory import free_host_memory
from cogvideox_sat.training.memory_estimate import Layout, estimate_memory
from cogvideox_sat.weights.stored_values import waiting_bytes
from diffusion_video import SATVideoDiffusionEngine

# Of the free memory, what may be used: estimates are not exact, memory is taken in pieces, and a host has other work.
USABLE = {"cuda": 0.9, "cpu": 0.75}
LIBRARIES = {"cuda": GIB, "cpu": 0}


def candidates(layers: int) -> Iterator[Recomputation]:
    """Yield what a network may do, the fastest first.

    Attention is what takes longest to compute again, and its results are small: they are given up last.
    """
    yield from (Recomputation(0, count) for count in range(layers + 1))
    yield from (Recomputation(count, layers - count) for count in range(1, layers + 1))


def fastest_that_fits(layers: int, needs: Callable[[Recomputation], int], free: int) -> Recomputation:
    """Return the first of `candidates` that needs no more than the `free` bytes, else the last."""
    last = Recomputation(layers)
    return next((each for each in candidates(layers) if needs(each) <= free), last)


def decide(engine: SATVideoDiffusionEngine, layout: Layout, bucket: Bucket, micro_batch: int) -> str | None:
    """Decide for the network of an engine that is on its device, and return the line for the log; None, and change
    nothing, if its `checkpoint_activations` is not `AUTO`.

    All processes decide the same, by the memory of the one that has least: those that share a network compute together.

    Args:
        layout, bucket, micro_batch: as for `estimate_memory`.
    """
    network: nn.Module = engine.network
    transformer, layers = network.transformer, network.num_layers
    if transformer.checkpoint_activations != AUTO:
        return None
    device = next(network.parameters()).device
    free = least_of_processes(free_memory(device))
    if free is None:
        transformer.checkpoint_activations = Recomputation(layers)
        return "checkpoint_activations: auto recomputes all layers: how much memory is free is not known"
    usable = max(int(free * USABLE[device.type]) - LIBRARIES[device.type], 0)

    # Weights are there already, but for those of which ZeRO-3 has not taken this process's share yet.
    waiting = 0 if layout.offload_parameters else waiting_bytes(network) // layout.data_parallel

    def needs(choice: Recomputation) -> int:
        transformer.checkpoint_activations = choice
        memory = estimate_memory(engine, layout, bucket, micro_batch)
        host = memory.host if device.type == "cpu" else 0
        return memory.total - memory.weights + waiting + host

    choice = fastest_that_fits(layers, needs, usable)
    needed = needs(choice)
    transformer.checkpoint_activations = choice
    what = choice.in_words(layers) or "nothing recomputed"
    line = (
        f"checkpoint_activations: auto: {what} of {layers} layers; beside the weights that needs "
        f"{needed / GIB:.2f} GiB, and {usable / GIB:.2f} of {free / GIB:.2f} GiB free may be used"
    )
    return line if needed <= usable else f"{line}, so memory may run out"


def free_memory(device: torch.device) -> int | None:
    """Return the bytes that this process can still take on a device; None where that is not known."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + unused
    free = free_host_memory()
    return None if free is None else free // processes_here()


def least_of_processes(free: int | None) -> int | None:
    """Return the least that any process has; None if one does not know."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return free
    everyone: list[int | None] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, free)
    known = [each for each in everyone if each is not None]
    return min(known) if len(known) == len(everyone) else None
