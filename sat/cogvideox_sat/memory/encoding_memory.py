"""Compute the memory for encoding a clip with a configured VAE.

See `sgm.models.video_coder_memory`.
"""

import copy
import math
from collections.abc import Mapping
from typing import Any

import torch

from cogvideox_sat.configuration.meta_device import instantiate_on_meta
from cogvideox_sat.latent_geometry import Bucket
from sgm.models.video_coder import VideoCoder
from sgm.models.video_coder_memory import peak_bytes


def encoding_peak(
    first_stage_config: Mapping[str, Any],
    bucket: Bucket,
    dtype: torch.dtype,
    device_type: str = "cuda",
    tile_size: int | None = None,
    processes: int = 1,
    frames_at_once: int | None = None,
) -> int:
    """Return the peak number of bytes in use, besides weights, while encoding one clip.

    Args:
        first_stage_config: configuration of the VAE.
        bucket: the clip's frames, height and width.
        dtype: dtype of the computation.
        device_type: "cpu" or "cuda".
        tile_size: the side of the VAE's tiles in pixels; None: whole frames.
        processes: processes that share the frames of a clip. On a CPU in float32 they take more: convolutions of
            frames that are sent do not overwrite their input, which is not counted.
        frames_at_once: frames that pass through a layer at a time; None: all.
    """
    frames = -(-(bucket.frames - 1) // processes) + 1 if processes > 1 else bucket.frames
    side = tile_size or max(bucket.height, bucket.width)
    tile = Bucket(frames, min(side, bucket.height), min(side, bucket.width))
    vae = meta_encoder(first_stage_config, dtype)
    rest = math.prod(bucket) - math.prod(tile)  # values of the clip outside of the tile
    return 3 * rest * dtype.itemsize + peak_bytes(vae, "encode", *tile, frames_at_once, device_type)


def meta_encoder(first_stage_config: Mapping[str, Any], dtype: torch.dtype) -> Any:
    """Return a configured VAE on the meta device, for one process and whole frames."""
    config = copy.deepcopy(dict(first_stage_config))
    config["params"] = {
        name: value for name, value in config["params"].items() if name not in ("ckpt_path", "ignore_keys")
    }
    config["params"]["cp_size"] = 1
    vae = instantiate_on_meta(config).to(dtype)
    if isinstance(vae, VideoCoder):
        vae.use_tiles(None)
    return vae
