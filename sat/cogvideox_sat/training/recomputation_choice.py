"""Decide which layers recompute activations: the `auto` of `checkpoint_activations`.

Training then fills the free memory.
"""

from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import nn

from cogvideox_sat.configuration.recomputation import AUTO, Recomputation
from cogvideox_sat.files.sizes import GIB
from cogvideox_sat.latent_geometry import Bucket
from cogvideox_sat.parallel.devices import processes_here
from cogvideox_sat.runs.host_memory import free_host_memory
from cogvideox_sat.training.memory_estimate import Layout, estimate_memory
from cogvideox_sat.weights.stored_values import waiting_bytes
from diffusion_video import SATVideoDiffusionEngine

# Usable share of the free memory: estimates are inexact, memory becomes fragmented, and a host has other work.
USABLE = {"cuda": 0.9, "cpu": 0.75}
LIBRARIES = {"cuda": GIB, "cpu": 0}


def candidates(layers: int) -> Iterator[Recomputation]:
    """Yield the possible recomputations of a network, the fastest first.

    Attention takes longest to recompute and has small results, so that these results are given up last.
    """
    yield from (Recomputation(0, count) for count in range(layers + 1))
    yield from (Recomputation(count, layers - count) for count in range(1, layers + 1))


def fastest_that_fits(layers: int, needs: Callable[[Recomputation], int], free: int) -> Recomputation:
    """Return the first of `candidates` that needs at most `free` bytes, else the last one."""
    last = Recomputation(layers)
    return next((each for each in candidates(layers) if needs(each) <= free), last)


def decide(engine: SATVideoDiffusionEngine, layout: Layout, bucket: Bucket, micro_batch: int) -> str | None:
    """Decide what the network of an engine recomputes; return the log line.

    The network must be on its device. If its `checkpoint_activations` is not `AUTO`, nothing is changed, and the result
    is None. All processes decide the same, by the one with the least memory, because those that share a network compute
    together.

    Args:
        layout, bucket, micro_batch: see `estimate_memory`.
    """
    network: nn.Module = engine.network
    transformer, layers = network.transformer, network.num_layers
    if transformer.checkpoint_activations != AUTO:
        return None
    device = next(network.parameters()).device
    free = least_of_processes(free_memory(device))
    if free is None:
        transformer.checkpoint_activations = Recomputation(layers)
        return "checkpoint_activations: auto recomputes all layers, because the free memory is not known"
    usable = max(int(free * USABLE[device.type]) - LIBRARIES[device.type], 0)

    # Weights are already loaded, except for those of which ZeRO-3 has not taken this process's share yet.
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
    """Return the bytes that this process can still take on a device; None if unknown."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + unused
    free = free_host_memory()
    return None if free is None else free // processes_here()


def least_of_processes(free: int | None) -> int | None:
    """Return the minimum over all processes; None if one process does not know."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return free
    everyone: list[int | None] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, free)
    known = [each for each in everyone if each is not None]
    return min(known) if len(known) == len(everyone) else None
