"""Write the configuration of converted weights, as changes to a released model's file."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from cogvideox_sat.conversion.model_sizes import ModelSizes, released_config, title
from cogvideox_sat.conversion.released_models import CONFIGS
from cogvideox_sat.conversion.weight_family import AutoencoderFamily, NetworkFamily
from cogvideox_sat.files.shipped import CONFIGS as CONFIG_FOLDER
from cogvideox_sat.latent_geometry import SPACE_FACTOR, TIME_FACTOR
from sgm.errors import UserError

CLIP_SIZES = ("num_frames", "latent_height", "latent_width")  # keys of the network's params


def model_config(
    family: NetworkFamily,
    sizes: ModelSizes,
    autoencoder: AutoencoderFamily,
    *,
    load: Path,
    vae: Path,
    text_encoder: Path | None,
    fp16: bool,
    bf16: bool,
) -> dict[str, Any]:
    """Return the content of a configuration file for a model; `include` is its first key.

    Args:
        load, vae, text_encoder: the paths of the parts; without a text encoder, the released model's is named.

    Raises:
        UserError: a configuration cannot describe the autoencoder.
    """
    params: dict[str, Any] = {
        **family.parameters(),
        "num_frames": sizes.num_frames,
        "latent_height": sizes.latent_height,
        "latent_width": sizes.latent_width,
        "modules": {
            "pos_embed_config": {"params": _positions(family, sizes)},
            "patch_embed_config": {"params": {"text_hidden_size": family.text_hidden_size}},
        },
    }
    schedule = {"params": {"discretization_config": {"params": {"shift_scale": sizes.shift_scale}}}}
    coder = {"params": _coder(autoencoder)}
    wanted = {
        "args": {"load": str(load), "fp16": fp16, "bf16": bf16},
        "model": {
            "scale_factor": sizes.scale_factor,
            "network_config": {"params": params},
            "denoiser_config": schedule,
            "loss_fn_config": {"params": {"sigma_sampler_config": schedule}},
            "sampler_config": schedule,
            "first_stage_config": {"params": {"ckpt_path": str(vae), "encoder_config": coder, "decoder_config": coder}},
        },
    }
    released = released_config(family)
    content = _difference(wanted, released)
    if any(name in content["model"].get("network_config", {}).get("params", {}) for name in CLIP_SIZES):
        # The size of the released model's clip, which is the default, may be larger than this model takes.
        content["args"]["sampling_image_size"] = [SPACE_FACTOR * sizes.latent_height, SPACE_FACTOR * sizes.latent_width]
        content["args"]["sampling_num_frames"] = (sizes.num_frames - 1) // TIME_FACTOR + family.patch[0]
    if text_encoder is not None:
        embedders = released["model"]["conditioner_config"]["params"]["emb_models"]
        embedders[0]["params"] |= {"model_dir": str(text_encoder), "max_length": sizes.text_length}
        content["model"]["conditioner_config"] = {"params": {"emb_models": embedders}}
    return {"include": str(CONFIG_FOLDER / f"{CONFIGS[family.name]}.yaml"), **content}


def _positions(family: NetworkFamily, sizes: ModelSizes) -> dict[str, Any]:
    if family.rotary:
        return {"text_length": sizes.text_length, "hidden_size_head": family.head_dim}
    return {
        "text_length": sizes.text_length,
        "height_interpolation": sizes.interpolation,
        "width_interpolation": sizes.interpolation,
    }


def _coder(family: AutoencoderFamily) -> dict[str, Any]:
    if any(width % family.widths[0] for width in family.widths):
        raise UserError(f"the autoencoder's channels {list(family.widths)} are not multiples of the first")
    return {
        "ch": family.widths[0],
        "ch_mult": [width // family.widths[0] for width in family.widths],
        "num_res_blocks": family.num_res_blocks,
        "z_channels": family.z_channels,
        "in_channels": family.in_channels,
        "out_ch": family.in_channels,
    }


def _difference(wanted: Mapping[str, Any], released: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of `wanted` that `released` does not have.

    A missing value is the same as an empty one and as a switch that is off.
    """
    difference = {}
    for key, value in wanted.items():
        there = released.get(key)
        if isinstance(value, Mapping):
            if inner := _difference(value, there or {}):
                difference[key] = inner
        elif value != there and (value or there):
            difference[key] = value
    return difference


def inference_config(family: NetworkFamily) -> dict[str, Any]:
    """Return the content of the file that follows the model's file, for sampling.

    An image-to-video model asks for prompts, since the sample prompts name no images.
    """
    content: dict[str, Any] = {"include": str(CONFIG_FOLDER / "inference.yaml")}
    if family.image_to_video:
        content["args"] = {"input_type": "cli"}
    return content


def write_yaml(path: Path, content: Mapping[str, Any], family: NetworkFamily, what: str) -> None:
    """Write content as YAML, below a comment that names the model and `what` the file is."""
    text = yaml.safe_dump(dict(content), sort_keys=False, allow_unicode=True)
    path.write_text(f"# {title(family)}: {what}\n{text}", encoding="utf-8")
