"""Build the parts of an engine from its configuration, with their weights."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from cogvideox_sat.configuration.meta_device import instantiate_on_meta
from cogvideox_sat.configuration.settings import EngineSettings
from cogvideox_sat.parallel.video_groups import VideoGroups
from cogvideox_sat.weights.loading import load_network
from sgm.config_places import Place
from sgm.errors import UserError
from sgm.models.video_coder import VideoCoder
from sgm.modules.diffusionmodules.wrappers import OpenAIWrapper
from sgm.util import class_at, instantiate_from_config

PARTS = ("conditioner", "first_stage_model", "model")
PART_NAMES = {"conditioner": "the text encoder", "first_stage_model": "the VAE", "model": "the network"}


def build_conditioner(
    config: Mapping[str, Any], device: torch.device | str, dtype: torch.dtype, blocks_as_stored: bool = False
) -> nn.Module:
    """Return the conditioner of a `conditioner_config`, with its weights on `device`.

    Args:
        dtype: dtype of the text encoder.
        blocks_as_stored: see `FrozenT5Embedder`.
    """
    # The dtype is passed to the text encoder, which keeps some layers in float32 when it runs in float16, and reads
    # weights from its file one by one. Casting later would lose both.
    config = copy.deepcopy(dict(config))
    for embedder in config["params"]["emb_models"]:
        if embedder["target"].endswith("FrozenT5Embedder"):
            embedder["params"] |= {"dtype": dtype, "device": device}
            if blocks_as_stored:
                embedder["params"]["blocks_as_stored"] = True
    return instantiate_from_config(config).to(device)


def build_first_stage(
    config: Mapping[str, Any],
    settings: EngineSettings,
    device: torch.device | str,
    dtype: torch.dtype,
    groups: VideoGroups,
) -> nn.Module:
    """Return the frozen first stage of a `first_stage_config`, with its weights on `device`.

    Args:
        settings: how many frames and pixels are coded at once.
        groups: the processes that make a video together; they share its coding.
    """
    first_stage = instantiate_from_config(config)
    is_coder = isinstance(first_stage, VideoCoder)  # a user's own first stage has none of these settings
    if is_coder and settings.vae_tile_size is not None:
        first_stage.use_tiles(settings.vae_tile_size)
    if is_coder and groups.splits_work:
        first_stage.group = groups.group
    if is_coder and settings.vae_frames_at_once is not None:
        first_stage.use_frames_at_once(settings.vae_frames_at_once, settings.vae_waiting_bytes)
    first_stage = first_stage.to(device=device, dtype=dtype).eval().requires_grad_(False)
    if is_coder:
        first_stage.lay_out_weights()
    return first_stage


def build_network(
    config: Mapping[str, Any], settings: EngineSettings, device: torch.device | str, dtype: torch.dtype
) -> nn.Module:
    """Return the network of a `network_config`, with the weights of `settings.load`, if given.

    Raises:
        UserError: weights or an adapter cannot be read or do not fit.
    """
    overrides = {}
    if (size := settings.model_parallel_size) is not None:
        overrides["transformer_args"] = {**config["params"]["transformer_args"], "model_parallel_size": size}
    if settings.load:
        network = instantiate_on_meta(config, **overrides).to(dtype)
        load_network(
            network,
            settings.load,
            lora_load=settings.lora_load,
            allow_missing=settings.force_inference,
            new_adapter=settings.new_adapter,
            device=device,
            in_shares=settings.weights_in_shares,
        )
    else:
        network = instantiate_from_config(config, **overrides).to(device=device, dtype=dtype)
    if settings.lora_scale is not None:
        set_lora_scale(network, settings.lora_scale)
    return network


def set_lora_scale(network: nn.Module, scale: float) -> None:
    """Multiply the contribution of every LoRA layer by `scale`; 0 gives the base model."""
    for module in network.modules():
        if hasattr(module, "matrix_A"):
            module.scaling = scale * module.lora_alpha / module.r


def share_tokens(network: nn.Module, sequence: dist.ProcessGroup) -> None:
    """Divide the tokens of each batch between the processes of a group.

    Raises:
        UserError: the network is a user's own that cannot do so.
    """
    if not hasattr(network, "share_tokens"):
        raise UserError(
            f"sequence_parallel: {type(network).__name__} has no `share_tokens`; use guidance_parallel alone"
        )
    network.share_tokens(sequence)


def network_wrapper(section: Mapping[str, Any], sources: Any) -> type:
    """Return the class that calls the network: `network_wrapper` in `section`, or ours.

    Args:
        section: a `model:` section.
        sources: its configuration files, for messages.

    Raises:
        UserError: the class does not exist.
    """
    if not section.get("network_wrapper"):
        return OpenAIWrapper
    place = Place(("model",), section, sources).below("network_wrapper")
    return class_at(section["network_wrapper"], place, place.slot)
