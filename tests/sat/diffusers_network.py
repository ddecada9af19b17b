"""The network in diffusers, an independent implementation, with our weights."""

import torch
from diffusers import CogVideoXTransformer3DModel
from diffusers.models.embeddings import get_3d_rotary_pos_embed

from cogvideox_sat.latent_geometry import patch_sizes
from cogvideox_sat.weights.diffusers_names import POSITION_TABLE, assemble, to_diffusers


def map_weights(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return weights or gradients of our DiffusionTransformer by diffusers' names."""
    mapped = {name: assemble(pieces, weights) for name, pieces in to_diffusers(weights).items()}
    if POSITION_TABLE in weights:  # among gradients there is nothing that tells whether it is learnt
        mapped["patch_embed.pos_embedding"] = weights[POSITION_TABLE]
    return mapped


def diffusers_network(network: torch.nn.Module, params: dict) -> CogVideoXTransformer3DModel:
    """Return the diffusers twin of `network`, built from `params`, same device and dtype."""
    parameter = next(network.parameters())
    twin = build_diffusers_network(params, parameter.device, parameter.dtype)
    weights = map_weights(network.state_dict())
    if not twin.config.use_rotary_positional_embeddings:
        weights.pop("patch_embed.pos_embedding")  # diffusers computes its own
    twin.load_state_dict(weights)
    return twin


def build_diffusers_network(
    params: dict, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> CogVideoXTransformer3DModel:
    """Return the network of diffusers that `params` describe, with random weights."""
    position = params["modules"]["pos_embed_config"]
    with torch.device(device):
        twin = CogVideoXTransformer3DModel(
            num_attention_heads=params["num_attention_heads"],
            attention_head_dim=params["hidden_size"] // params["num_attention_heads"],
            in_channels=params["in_channels"],
            out_channels=params["out_channels"],
            time_embed_dim=params["time_embed_dim"],
            ofs_embed_dim=params.get("ofs_embed_dim"),
            text_embed_dim=params["modules"]["patch_embed_config"]["params"]["text_hidden_size"],
            num_layers=params["num_layers"],
            sample_width=params["latent_width"],
            sample_height=params["latent_height"],
            sample_frames=params["num_frames"],
            patch_size=patch_sizes(params["patch_size"])[1],
            patch_size_t=None if isinstance(params["patch_size"], int) else 2,
            patch_bias=True,
            max_text_seq_length=position["params"]["text_length"],
            spatial_interpolation_scale=position["params"].get("height_interpolation", 1.0),
            use_rotary_positional_embeddings="Rotary" in position["target"],
            use_learned_positional_embeddings=position["params"].get("learnable_pos_embed", False),
        )
    return twin.to(dtype).eval()


def diffusers_rotary(params: dict, grid: tuple[int, int, int]) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Return diffusers' cosines and sines for a `grid` in patches, None for sin-cos models."""
    if "Rotary" not in params["modules"]["pos_embed_config"]["target"]:
        return None
    frames, height, width = grid
    is_15 = not isinstance(params["patch_size"], int)
    table = (params["latent_height"] // 2, params["latent_width"] // 2)
    return get_3d_rotary_pos_embed(
        embed_dim=params["hidden_size"] // params["num_attention_heads"],
        crops_coords=None if is_15 else ((0, 0), (height, width)),
        grid_size=(height, width),
        temporal_size=frames,
        grid_type="slice" if is_15 else "linspace",
        max_size=table if is_15 else None,
    )
