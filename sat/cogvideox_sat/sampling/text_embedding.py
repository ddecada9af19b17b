"""Encode the texts of a request."""

import torch
from torch import Tensor

from cogvideox_sat.engine.precision import other_precision
from diffusion_video import SATVideoDiffusionEngine
from sgm.errors import UserError


@torch.no_grad()
def embedded_texts(engine: SATVideoDiffusionEngine, prompt: str, negative_prompt: str) -> tuple[Tensor, Tensor]:
    """Return the embeddings (1, tokens, features) of both texts, on the CPU.

    The engine's conditioner computes them in its dtype. Without a negative prompt, the unconditional embedding is
    zeros, as in training, where a dropped caption becomes zeros.

    Raises:
        UserError: the embeddings are not finite.
    """

    def embed(text: str) -> Tensor:
        return engine.conditioner({"txt": [text]}, drop=False)["crossattn"].cpu()

    cond = embed(prompt)
    uncond = embed(negative_prompt) if negative_prompt else torch.zeros_like(cond)
    if not (torch.isfinite(cond).all() and torch.isfinite(uncond).all()):
        raise UserError(f"the text encoder's output is not finite: {other_precision(engine.dtype)}")
    return cond, uncond
