"""The pictures and clips of a request as latents.

Sampling is conditioned on these latents, or starts from them.
"""

from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from cogvideox_sat.configuration.model_limits import ModelLimits
from cogvideox_sat.sampling.requests import SampleRequest
from diffusion_video import SATVideoDiffusionEngine
from sgm.modules.diffusionmodules.sampling_start import NOISE, Start


class Pixels(NamedTuple):
    """The pictures and clips of a request.

    Args:
        key_frames: pictures (3, height, width), by the latent frame to which each belongs.
        video: the clip (frames, 3, height, width) that sampling starts from.
        context: the clip (frames, 3, height, width) with which the video begins and which the network continues.
    """

    key_frames: dict[int, Tensor]
    video: Tensor | None = None
    context: Tensor | None = None


class EncodedInputs(NamedTuple):
    """The pictures and clips of a request, as latents on the CPU.

    Args:
        key_frames: (1, 1, c, h, w) by latent frame, in the engine's dtype.
        start: what sampling starts from, in float32; for 1.5 models the first latent is repeated.
        random_state: random state of the request after its key frames are drawn; None: the request has no key frames.
    """

    key_frames: dict[int, Tensor]
    start: Start = NOISE
    random_state: Tensor | None = None


def load_pixels(request: SampleRequest, limits: ModelLimits) -> Pixels:
    """Return the pictures and clips of a request to a model of the given limits.

    Functions that return pictures and clips are called here.

    Raises:
        UserError: a picture or clip cannot be read or does not fit.
    """
    clips = (request.load_clip(name, limits) for name in ("video", "context"))
    return Pixels(request.load_key_frames(limits), *clips)


@torch.no_grad()
def encode_inputs(engine: SATVideoDiffusionEngine, request: SampleRequest, pixels: Pixels) -> EncodedInputs:
    """Return the latents of the pictures and clips of a request.

    Key frames are drawn from their posteriors, one after the other. These draws are the first that use the request's
    seed. For clips, the means of the posteriors are used, which take no random numbers.
    """
    torch.manual_seed(request.seed)
    key_frames = {
        number: engine.encode_condition_image(rearrange(picture, "c h w -> 1 c 1 h w").to(engine.device)).cpu()
        for number, picture in sorted(pixels.key_frames.items())
    }
    random_state = torch.get_rng_state() if key_frames else None

    def latents_of(clip: Tensor | None) -> Tensor | None:
        if clip is None:
            return None
        latents = engine.encode_means(rearrange(clip, "t c h w -> 1 c t h w"))
        return engine.with_extra_frame(rearrange(latents, "1 c t h w -> 1 t c h w")).float().cpu()

    start = Start(latents_of(pixels.video), request.share, latents_of(pixels.context))
    return EncodedInputs(key_frames, start, random_state)
