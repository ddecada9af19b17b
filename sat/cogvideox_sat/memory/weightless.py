"""Build the engine without weights, to measure its memory.

Modules are built on PyTorch's meta device, where tensors have shapes but no content.
"""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from cogvideox_sat.clips.latent_identity import conditioner_for_cache
from cogvideox_sat.configuration.meta_device import instantiate_on_meta
from cogvideox_sat.memory.encoding_memory import meta_encoder
from diffusion_video import SATVideoDiffusionEngine
from sgm.models.video_coder import VideoCoder
from sgm.modules.diffusionmodules.wrappers import OpenAIWrapper
from sgm.modules.encoders.t5_loading import CONFIG_FILE, empty_t5
from sgm.util import instantiate_from_config


class WeightlessEngine(SATVideoDiffusionEngine):
    """Engine whose parts have the right shapes and dtypes but take no memory.

    Attributes:
        unknown: the reason why the size of the text encoder is not known; None: it is known, or there is no text
            encoder.

    Args:
        assumes_t5: if the size of the text encoder is not known, assume that of the released models.
    """

    def __init__(self, *args: Any, assumes_t5: bool = False, **options: Any):
        # Set directly, since a module cannot set attributes before it is initialised.
        self.__dict__["assumes_t5"] = assumes_t5
        super().__init__(*args, **options)

    def _build_network(self, device: torch.device | str) -> nn.Module:
        network = instantiate_on_meta(self.config["network_config"]).to(self.dtype)
        return OpenAIWrapper(network, compile_model=False, dtype=self.dtype)

    def _build_first_stage(self, device: torch.device | str) -> nn.Module:
        first_stage = meta_encoder(self.config["first_stage_config"], self.dtype)
        if self.settings.vae_tile_size is not None and isinstance(first_stage, VideoCoder):
            first_stage.use_tiles(self.settings.vae_tile_size)
        if self.settings.vae_frames_at_once is not None and isinstance(first_stage, VideoCoder):
            first_stage.use_frames_at_once(self.settings.vae_frames_at_once)
        return first_stage.eval().requires_grad_(False)

    def _build_conditioner(self, device: torch.device | str) -> nn.Module:
        conditioner = instantiate_from_config(conditioner_for_cache(self.config["conditioner_config"]))
        params = self.config["conditioner_config"]["params"]["emb_models"][0]["params"]
        folder = Path(params["model_dir"])
        self.unknown = None if (folder / CONFIG_FILE).is_file() else f"{folder / CONFIG_FILE} does not exist"
        if self.unknown is None or self.assumes_t5:
            conditioner.text_encoder = empty_t5(folder, self.dtype).requires_grad_(False)
        return conditioner


class FirstOfGroup:
    """Substitute for a group of processes, of which only the first exists."""

    group_name = "counted"

    def __init__(self, size: int):
        self._size = size

    def size(self) -> int:
        return self._size

    def rank(self) -> int:
        return 0


def module_bytes(module: nn.Module) -> int:
    """Return the bytes of a module's parameters and buffers."""
    tensors = [*module.parameters(), *module.buffers()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def short_count(number: int) -> str:
    """Return a number of parameters in three digits and a unit: `5.57 B`."""
    for unit, size in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= 0.9995 * size:  # which rounds to one
            return f"{number / size:.3g} {unit}"
    return str(number)
