"""Draw the latents of a request: the network's part of sampling a video."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from cogvideox_sat.latent_geometry import SPACE_FACTOR
from cogvideox_sat.sampling.requests import Progress, SampleRequest
from cogvideox_sat.sampling.visual_inputs import EncodedInputs
from diffusion_video import SATVideoDiffusionEngine


class Drawing:
    """The sampling of a request's latents: `drawing(report)` sets `latents`.

    Attributes:
        latents: (1, t, c, h, w), float32, scaled, on the CPU, without the leading frame that 1.5 models add.

    Args:
        request: request with one window.
        asked_steps: number of steps; None: the sampler's own number.
        texts: embeddings (1, tokens, features) of the prompt and of the negative prompt.
        inputs: the encoded pictures and clips of the request.
        channels: number of channels of the latents.
        sampler: the engine's sampler, or another one for this request.
    """

    latents: Tensor

    def __init__(
        self,
        engine: SATVideoDiffusionEngine,
        request: SampleRequest,
        asked_steps: int | None,
        texts: tuple[Tensor, Tensor],
        inputs: EncodedInputs,
        channels: int,
        sampler: Any,
    ):
        self.channels, self.sampler = channels, sampler
        self.engine, self.request, self.asked_steps = engine, request, asked_steps
        self.texts, self.inputs = texts, inputs

    @torch.no_grad()
    def __call__(self, report: Callable[[Progress], None]) -> None:
        """Sample, and call `report` after each step.

        Raises:
            UserError: an output of the network is not finite, or the sampler cannot start from the request's clip.
        """
        device = self.engine.device
        # The current device is a state of each thread, and this may be another thread than the caller's.
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            self._draw(report)

    def _draw(self, report: Callable[[Progress], None]) -> None:
        engine, request, inputs = self.engine, self.request, self.inputs
        torch.manual_seed(request.seed)
        concat_images = ofs = None
        if inputs.key_frames:
            torch.set_rng_state(inputs.random_state)
            key_frames = {number: latent.to(engine.device) for number, latent in inputs.key_frames.items()}
            concat_images = engine.concat_key_frames(key_frames, request.frames)
            ofs = engine.default_ofs(1)
        cond, uncond = self.texts
        height, width = (side // SPACE_FACTOR for side in request.size)
        # A user's own engine may have the original's `sample` without these arguments; it then uses its own sampler.
        other = {} if self.sampler is engine.sampler else {"sampler": self.sampler}
        if request.video is not None or request.context is not None:
            other["start"] = inputs.start

        def tell(step: int, steps: int, denoised: Tensor | None = None) -> None:
            report(Progress(step, steps, None if denoised is None else engine.drop_extra_frame(denoised)))

        latents = engine.sample(
            {"crossattn": cond.to(engine.device)},
            {"crossattn": uncond.to(engine.device)},
            batch_size=1,
            shape=(request.frames, self.channels, height, width),
            concat_images=concat_images,
            ofs=ofs,
            num_steps=self.asked_steps,
            callback=tell,
            check_finite=True,
            **other,
        )
        self.latents = engine.drop_extra_frame(latents).cpu()
