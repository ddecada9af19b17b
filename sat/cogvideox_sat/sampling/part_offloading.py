"""Load the parts of a model onto the device in turn."""

import torch
from torch import nn

from cogvideox_sat.engine.parts import PART_NAMES
from cogvideox_sat.network.layer_streaming import LayerStreamer, move_all_but, stream_blocks, stream_layers
from cogvideox_sat.parallel.devices import processes_here
from diffusion_video import SATVideoDiffusionEngine
from sgm.memory_errors import memory_guard
from sgm.modules.encoders.modules import FrozenT5Embedder


class PartOffloader:
    """Keeps the part of the engine that is in use on the device.

    Unless `offload` is `none`, the other parts leave the device. With `sequential`, the layers of the network and of
    the text encoder wait in host memory and are copied to the device when they run; the network therefore stays built.
    Unless `offload` is `none`, the weights that compute the network's modulations also wait in host memory.

    Args:
        offload: one of `model_limits.OFFLOAD_POLICIES`.
    """

    def __init__(self, engine: SATVideoDiffusionEngine, offload: str):
        self.engine, self.offload = engine, offload

    def use(self, part: str) -> None:
        """Build a part with its weights if it is not built, after making room for it.

        Raises:
            UserError: its weights cannot be read or do not fit.
            OutOfMemory: the device has too little free memory.
        """
        with memory_guard(f"loading {PART_NAMES[part]}"):
            self._use(part)

    def _use(self, part: str) -> None:
        engine = self.engine
        streams = self.offload == "sequential"
        if self.offload != "none":
            for other in ("conditioner", "first_stage_model", "model"):
                waits_elsewhere = streams and other == "model"
                if other != part and not waits_elsewhere and getattr(engine, other) is not None:
                    engine.release(other)
        if streams and part != "model" and engine.model is not None:
            for around in engine.network.layer_runner.around:
                if isinstance(around, LayerStreamer):
                    around.leave_device()
        if getattr(engine, part) is not None:
            return
        if part == "conditioner":
            self._use_conditioner(streams)
        elif part == "model" and streams:
            engine.build(part, device="cpu")
            tabulate_modulations(engine.network, engine.device)
            stream_layers(engine.network, engine.device)
        else:
            engine.build(part)
            # On a CPU, the weights would only move within the same memory.
            if part == "model" and self.offload != "none" and engine.device.type != "cpu":
                tabulate_modulations(engine.network, engine.device)

    def _use_conditioner(self, streams: bool) -> None:
        """Build the text encoder, with weights shared by the processes of one machine.

        Host memory holds these weights once, as the mapped file.
        """
        engine, shared = self.engine, processes_here() > 1
        on_cpu = engine.device.type == "cpu"
        engine.text_blocks_as_stored = shared and (streams or on_cpu)
        engine.build("conditioner", device="cpu" if streams else None)
        # If weights need another dtype, each block is converted when it runs, instead of all blocks in every process.
        if streams or (shared and on_cpu and any(map(is_converted, text_encoders(engine.conditioner)))):
            stream_text_encoders(engine.conditioner, engine.device, pin=not shared)


def tabulate_modulations(network: nn.Module, device: torch.device) -> None:
    """Compute modulations in advance and keep their weights in host memory, if supported."""
    if hasattr(network, "tabulate_modulations"):
        network.tabulate_modulations(device)


def stream_text_encoders(conditioner: nn.Module, device: torch.device, pin: bool = True) -> None:
    """Move a conditioner to `device`, except the blocks of its T5 encoders.

    These blocks are copied to the device when they run.

    Args:
        pin: see `LayerStreamer`.
    """
    encoders = text_encoders(conditioner)
    move_all_but(conditioner, [list(encoder.blocks) for encoder in encoders], device)
    for encoder in encoders:
        stream_blocks(encoder, list(encoder.blocks), device, encoder.block_dtypes, pin)


def text_encoders(conditioner: nn.Module) -> list[FrozenT5Embedder]:
    """Return the T5 encoders of a conditioner."""
    return [module for module in conditioner.modules() if isinstance(module, FrozenT5Embedder)]


def is_converted(encoder: FrozenT5Embedder) -> bool:
    """Return whether an encoder computes in another dtype than its weights in memory have."""
    stored = [[parameter.dtype for parameter in block.parameters()] for block in encoder.blocks]
    return stored != encoder.block_dtypes
