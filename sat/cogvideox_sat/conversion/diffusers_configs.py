"""Describe the parts of a CogVideoX pipeline as diffusers' configuration files do."""

from typing import Any

from cogvideox_sat.conversion.model_sizes import ModelSizes
from cogvideox_sat.conversion.weight_family import AutoencoderFamily, NetworkFamily
from cogvideox_sat.latent_geometry import TIME_FACTOR
from sgm.errors import UserError

DIFFUSERS_VERSION = "0.32.0"  # the first version that reads all five families
NORM_GROUPS = 32  # groups of the autoencoder's channels, which its tensors do not show
TRANSFORMER, AUTOENCODER = "CogVideoXTransformer3DModel", "AutoencoderKLCogVideoX"


def transformer_config(family: NetworkFamily, sizes: ModelSizes) -> dict[str, Any]:
    """Return the config.json that builds the same network in diffusers.

    Raises:
        UserError: diffusers has no such network.
    """
    if family.ofs_embed_dim not in (None, family.time_embed_dim):
        raise UserError(
            f"ofs_embed_dim is {family.ofs_embed_dim} and time_embed_dim {family.time_embed_dim}; diffusers takes only "
            "models in which both are equal"
        )
    if family.patch[1] != family.patch[2]:
        raise UserError(f"diffusers takes only square patches, not {family.patch[1]}x{family.patch[2]}")
    return {
        "_class_name": TRANSFORMER,
        "_diffusers_version": DIFFUSERS_VERSION,
        "activation_fn": "gelu-approximate",
        "attention_bias": True,
        "attention_head_dim": family.head_dim,
        "dropout": 0.0,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "in_channels": family.in_channels,
        "max_text_seq_length": sizes.text_length,
        "norm_elementwise_affine": True,
        "norm_eps": 1e-05,
        "num_attention_heads": family.num_attention_heads,
        "num_layers": family.num_layers,
        "ofs_embed_dim": family.ofs_embed_dim,
        "out_channels": family.out_channels,
        "patch_bias": True,
        "patch_size": family.patch[1],
        "patch_size_t": family.patch[0] if family.is_15 else None,
        "sample_frames": sizes.num_frames,
        "sample_height": sizes.latent_height,
        "sample_width": sizes.latent_width,
        "spatial_interpolation_scale": 1.875 if family.rotary else sizes.interpolation,
        "temporal_compression_ratio": TIME_FACTOR,
        "temporal_interpolation_scale": 1.0,
        "text_embed_dim": family.text_hidden_size,
        "time_embed_dim": family.time_embed_dim,
        "timestep_activation_fn": "silu",
        "use_learned_positional_embeddings": family.learnt_positions,
        "use_rotary_positional_embeddings": family.rotary,
    }


def vae_config(family: AutoencoderFamily, scale_factor: float, is_15: bool) -> dict[str, Any]:
    """Return the config.json that builds the same autoencoder in diffusers.

    Raises:
        UserError: diffusers has no such autoencoder.
    """
    if len(family.widths) != 4:
        raise UserError(f"the autoencoder has {len(family.widths)} levels; that of CogVideoX pipelines has 4")
    if odd := [width for width in family.widths if width % NORM_GROUPS]:
        raise UserError(f"the autoencoder has {odd[0]} channels, which do not divide into {NORM_GROUPS} for its norms")
    return {
        "_class_name": AUTOENCODER,
        "_diffusers_version": DIFFUSERS_VERSION,
        "act_fn": "silu",
        "block_out_channels": list(family.widths),
        "down_block_types": ["CogVideoXDownBlock3D"] * 4,
        "force_upcast": True,
        "in_channels": family.in_channels,
        # The released 1.5 pipelines scale the latent of a first frame in this way.
        "invert_scale_latents": is_15,
        "latent_channels": family.z_channels,
        "latents_mean": None,
        "latents_std": None,
        "layers_per_block": family.num_res_blocks,
        "norm_eps": 1e-06,
        "norm_num_groups": NORM_GROUPS,
        "out_channels": family.in_channels,
        "sample_height": 480,
        "sample_width": 720,
        "scaling_factor": scale_factor,
        "shift_factor": None,
        "temporal_compression_ratio": TIME_FACTOR,
        "up_block_types": ["CogVideoXUpBlock3D"] * 4,
        "use_post_quant_conv": False,
        "use_quant_conv": False,
    }


def scheduler_config(family: NetworkFamily, shift_scale: float) -> dict[str, Any]:
    """Return the configuration of the released pipeline's scheduler.

    The 2B pipeline samples with DDIM, the others with DPM-Solver++.
    """
    return {
        "_class_name": "CogVideoXDPMScheduler" if family.rotary else "CogVideoXDDIMScheduler",
        "_diffusers_version": DIFFUSERS_VERSION,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "clip_sample": False,
        "clip_sample_range": 1.0,
        "num_train_timesteps": 1000,
        "prediction_type": "v_prediction",
        "rescale_betas_zero_snr": True,
        "sample_max_value": 1.0,
        "set_alpha_to_one": True,
        "snr_shift_scale": shift_scale,
        "steps_offset": 0,
        "timestep_spacing": "trailing",
        "trained_betas": None,
    }


def pipeline_index(family: NetworkFamily, with_text: bool) -> dict[str, Any]:
    """Return the content of model_index.json.

    Without T5, its parts must be given to `from_pretrained`.
    """
    absent = [None, None]
    return {
        "_class_name": "CogVideoXImageToVideoPipeline" if family.image_to_video else "CogVideoXPipeline",
        "_diffusers_version": DIFFUSERS_VERSION,
        "scheduler": ["diffusers", scheduler_config(family, 1.0)["_class_name"]],
        "text_encoder": ["transformers", "T5EncoderModel"] if with_text else absent,
        "tokenizer": ["transformers", "T5Tokenizer"] if with_text else absent,
        "transformer": ["diffusers", TRANSFORMER],
        "vae": ["diffusers", AUTOENCODER],
    }
