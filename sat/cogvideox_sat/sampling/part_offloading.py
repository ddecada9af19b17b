"""Have the parts of a model on the device by turns."""

import torch
from torch import nn

from cogvideox_sat.network.layer_streaming import move_all_but, stream_blocks, stream_layers
from diffusion_video import PART_NAMES, SATVideoDiffusionEngine
from sgm.memory_errors import memory_guard
from sgm.modules.encoders.modules import FrozenT5Embedder


class PartOffloader:
    """Has the part of the engine that is in use on the device, and, unless `offload` is none, no other.

    With `sequential` the layers of the network and of the text encoder wait in host memory and come when they run; the
    network stays built therefore. Unless `offload` is none, the weights behind its modulations wait there too.

    Args:
        offload: one of `model_limits.OFFLOAD_POLICIES`.
    """

    def __init__(self, engine: SATVideoDiffusionEngine, offload: str):
        self.engine, self.offload = engine, offload

    def use(self, part: str) -> None:
        """Build a part with its weights unless it is there, after the others have made room for it.

        Raises:
            UserError: its weights cannot be read or do not fit.
            OutOfMemory: there is no room for it.
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
        if streams and part != "first_stage_model" and getattr(engine, part) is None:
            engine.build(part, device="cpu")
            if part == "model":
                tabulate_modulations(engine.network, engine.device)
                stream_layers(engine.network, engine.device)
            else:
                stream_text_encoders(engine.conditioner, engine.device)
        elif getattr(engine, part) is None:
            engine.build(part)
            # On a CPU the weights would stay in the memory that they are in.
            if part == "model" and self.offload != "none" and engine.device.type != "cpu":
                tabulate_modulations(engine.network, engine.device)


def tabulate_modulations(network: nn.Module, device: torch.device) -> None:
    """Work modulations out ahead and keep their weights in host memory, if the network knows how to."""
    if hasattr(network, "tabulate_modulations"):
        network.tabulate_modulations(device)


def stream_text_encoders(conditioner: nn.Module, device: torch.device) -> None:
    """Move a conditioner to `device`, all but the blocks of its T5 encoders, which come when they run."""
    encoders = [module for module in conditioner.modules() if isinstance(module, FrozenT5Embedder)]
    move_all_but(conditioner, [list(encoder.blocks) for encoder in encoders], device)
    for encoder in encoders:
        stream_blocks(encoder, list(encoder.blocks), device)
