"""Decode files of latents into videos: the part of `tools/decode_latents.py` with PyTorch."""

import copy
import json
import logging
from collections.abc import Sequence

import torch
from einops import rearrange
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from cogvideox_sat.configuration.memory_advice import DECODING, FRAMES, TILES, one_of
from cogvideox_sat.configuration.model_checks import check_autoencoder_sizes
from cogvideox_sat.configuration.video_records import record_path, write_record
from cogvideox_sat.files.content_hashes import hash_of_file
from cogvideox_sat.media.video_output import VideoWriter
from cogvideox_sat.parallel.devices import choose_device, fast_dtype
from cogvideox_sat.sampling.latent_files import LatentFile
from sgm.config_places import section
from sgm.errors import UserError
from sgm.memory_errors import memory_guard
from sgm.models.video_coder import VideoCoder
from sgm.util import instantiate_from_config

logger = logging.getLogger(__name__)

TARGET = ("model", "first_stage_config", "target")
VAE = "vae_modules.autoencoder.VideoAutoencoderInferenceWrapper"


def run(
    files: Sequence[LatentFile],
    device_name: str | None,
    dtype_name: str | None,
    tile_size: int | None,
    frames_at_once: int | None = None,
) -> int:
    """Decode files; return the exit code, 1 if some of them could not be decoded, else 0.

    Raises:
        UserError: the device does not exist, or no file could be decoded.
    """
    device = choose_device(device_name)
    torch.backends.cudnn.deterministic = True  # as in sampling, so that the video is the same
    vae, built_for, failures = None, None, []
    for file in files:
        dtype = fast_dtype(getattr(torch, dtype_name or file.dtype or "float32"), device)
        try:
            with memory_guard(DECODING, advice(tile_size, dtype, frames_at_once)):
                wanted = (json.dumps(file.first_stage_config, sort_keys=True), dtype)
                if wanted != built_for:
                    vae = None  # frees the old one before the new one is built
                    vae, built_for = build_vae(file, device, dtype, tile_size, frames_at_once), wanted
                decode_file(file, vae, tile_size)
        except UserError as error:
            failures.append(error)
            if len(files) > 1:
                logger.error("failed: %s: %s", file.path, error)
        else:
            logger.info("wrote %s", file.video)
    if failures and len(failures) == len(files):
        if len(files) > 1:
            raise UserError(f"none of {len(files)} files could be decoded; see the lines above")
        raise failures[0]
    return 1 if failures else 0


def advice(tile_size: int | None, dtype: torch.dtype, frames_at_once: int | None = None) -> str:
    """Return what the user can do when memory is full."""
    options = [TILES] if tile_size is None else [f"smaller tiles than --vae_tile_size {tile_size}"]
    if frames_at_once is None:
        options.insert(0, FRAMES)
    if dtype == torch.float32:
        options.append("--dtype bfloat16 (half the memory)")
    return one_of(options)


def build_vae(
    file: LatentFile, device: torch.device, dtype: torch.dtype, tile_size: int | None, frames_at_once: int | None = None
) -> VideoCoder:
    """Return the VAE for a file of latents, with its weights, on one process.

    Raises:
        UserError: the VAE cannot be built as described, or its weights cannot be read or do not fit.
    """
    config = copy.deepcopy(file.first_stage_config)
    config["params"]["cp_size"] = 1
    with section("model", {"first_stage_config": config}, file.sources):
        check_autoencoder_sizes(config["params"])
        vae = instantiate_from_config(config)
    if not isinstance(vae, VideoCoder):
        raise UserError(f"{file.sources.place(TARGET)}: {config['target']} decodes no video in chunks; name {VAE}")
    if tile_size is not None:
        vae.use_tiles(tile_size)
    if frames_at_once is not None:
        vae.use_frames_at_once(frames_at_once)
    vae = vae.to(device, dtype).eval().requires_grad_(False)
    vae.lay_out_weights()
    return vae


@torch.no_grad()
def decode_file(file: LatentFile, vae: VideoCoder, tile_size: int | None) -> None:
    """Write the video of a file of latents, and its record if the file holds one.

    Raises:
        UserError: the latents do not fit the VAE or are not finite, or the video cannot be written.
    """
    latents = read_latents(file)
    weight = next(vae.parameters())
    scaled = (rearrange(latents, "1 t c h w -> 1 c t h w") / file.scale_factor).to(weight.device, weight.dtype)
    channels = vae.decoder.conv_in.conv.in_channels
    if scaled.shape[1] != channels:
        raise UserError(
            f"{file.path}: the latents have {scaled.shape[1]} channels, but the VAE takes {channels}; "
            "give the configuration of the model that made them as --base"
        )
    factor = vae.decoder.space_factor
    height, width = (factor * side for side in latents.shape[3:])
    with VideoWriter(file.video, file.fps, height, width) as video:
        for frames in vae.decode_chunks(scaled):
            video.write(rearrange(frames, "1 c t h w -> t c h w"))
        record_path(file.video).unlink(missing_ok=True)  # the record of a video that is being replaced
    if file.record is not None:
        record = {**file.record, "video": {"hash": f"sha256:{hash_of_file(file.video)}"}}
        record["computed_in"] = str(weight.dtype).removeprefix("torch.")
        record["arguments"] = {
            **record["arguments"],
            "vae_tile_size": vae.tile_size,
            "vae_frames_at_once": vae.frames_at_once,
        }
        write_record(file.video, record)


def read_latents(file: LatentFile) -> Tensor:
    """Return the latents (1, t, c, h, w).

    Raises:
        UserError: the latents cannot be read, or are not finite.
    """
    try:
        latents = load_file(file.path)["latents"]
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file.path} cannot be read: {str(error).partition(chr(10))[0]}") from error
    if not latents.is_floating_point() or not torch.isfinite(latents).all():
        raise UserError(f"{file.path}: the latents are not finite numbers; sample again, in bf16 or float32")
    return latents[None] if latents.ndim == 4 else latents
