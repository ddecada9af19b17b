"""Have the parts of a model on the device by turns."""

from cogvideox_sat.network.layer_streaming import stream_layers
from diffusion_video import PART_NAMES, SATVideoDiffusionEngine
from sgm.memory_errors import memory_guard


class PartOffloader:
    """Has the part of the engine that is in use on the device, and, unless `offload` is none, no other.

    With `sequential` the network stays built, since its layers wait in host memory anyway.

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
        if part == "model" and streams and engine.model is None:
            engine.build(part, device="cpu")
            stream_layers(engine.network, engine.device)
        else:
            engine.build(part)
