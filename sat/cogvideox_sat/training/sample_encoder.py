"""Encode clips and captions as the tensors of a cache."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from diffusion_video import SATVideoDiffusionEngine
from sgm.errors import UserError
from sgm.memory_errors import memory_guard
from sgm.modules.autoencoding.distributions import DiagonalGaussianDistribution
from sgm.modules.diffusionmodules.key_frames import noise_pictures
from sgm.randomness import per_sample
from sgm.seeds import sample_seed


class Encoder:
    """Encodes clips and captions as a cache's tensors, on the CPU and in its dtype.

    The VAE stays on the engine's device. The text encoder, which is far larger, is there only while it is used.
    """

    def __init__(self, engine: SATVideoDiffusionEngine, encoding: Mapping[str, Any]):
        self.engine = engine
        self.encoding = encoding
        self.dtype = getattr(torch, encoding["dtype"])

    def build(self) -> None:
        """Load the weights of both."""
        self.engine.build("first_stage_model")
        self.engine.build("conditioner", device="cpu")

    def clip(self, frames: Tensor, index: int) -> dict[str, Tensor]:
        """Return the tensors of the clip of sample `index`, by their names in a cache.

        The random numbers of the first frame and of latents are the same as training draws for the sample.

        Args:
            frames: (1, frames, 3, height, width).

        Raises:
            UserError: a tensor is not finite.
        """
        clip = self.engine.load_clip(frames)
        store, variants = self.encoding["store"], self.encoding["image_variants"]
        encoded = {}
        for epoch in range(max(variants, 1)):
            with per_sample([sample_seed(self.encoding["seed"], epoch, index)]):
                if variants:
                    encoded[f"{index}.image_{store}.{epoch}"] = self._encode(noise_pictures(clip[:, :, :1]))
                if self.encoding.get("key_frames"):
                    encoded[f"{index}.key_{store}.{epoch}"] = self._kept(self.engine.encode_key_frames(clip))
                if epoch == 0:
                    encoded[f"{index}.{store}"] = self._encode(clip)
        return {name: self._stored(tensor, f"sample {index}") for name, tensor in encoded.items()}

    def _encode(self, clip: Tensor) -> Tensor:
        with memory_guard("encoding clips"):
            return self._kept(self.engine.encode_moments(clip))

    def _kept(self, moments: Tensor) -> Tensor:
        """Return the stored form: the moments, or one draw of latents."""
        return moments if self.encoding["store"] == "moments" else DiagonalGaussianDistribution(moments).sample()

    @torch.no_grad()
    def captions(self, captions: Mapping[int, str]) -> dict[str, Tensor]:
        """Return the embedding of each caption (tokens, features), named `{index}.text`."""
        conditioner = self.engine.conditioner
        with memory_guard("the text encoder"), on_device(conditioner, self.engine.device):
            return {
                f"{index}.text": self._stored(conditioner({"txt": [text]}, drop=False)["crossattn"], f"'{text[:60]}'")
                for index, text in captions.items()
            }

    def _stored(self, tensor: Tensor, what: str) -> Tensor:
        stored = tensor[0].to("cpu", self.dtype).contiguous()
        if not torch.isfinite(stored).all():
            computed_in, dtype = self.encoding["computed_in"], self.encoding["dtype"]
            raise UserError(f"{what} is not finite, computed in {computed_in} and stored in {dtype}; use bfloat16")
        return stored


@contextmanager
def on_device(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Keep a frozen module on `device` within the block.

    Its tensors on the CPU are kept, and used again afterwards.
    """
    home = [(tensor, tensor.data) for tensor in (*module.parameters(), *module.buffers())]
    try:
        for tensor, data in home:
            tensor.data = data.to(device)
        yield
    finally:
        for tensor, data in home:
            tensor.data = data
