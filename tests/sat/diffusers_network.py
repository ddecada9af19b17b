"""The same network in Hugging Face diffusers, an independent implementation, with our weights mapped across."""

import re

import torch
from diffusers import CogVideoXTransformer3DModel
from diffusers.models.embeddings import get_3d_rotary_pos_embed

RENAMED = [
    (r"^mixins\.patch_embed\.(text_)?proj\.", r"patch_embed.\1proj."),
    (r"^mixins\.pos_embed\.pos_embedding$", "patch_embed.pos_embedding"),
    (r"^(time|ofs)_embed\.0\.", r"\1_embedding.linear_1."),
    (r"^(time|ofs)_embed\.2\.", r"\1_embedding.linear_2."),
    (r"^transformer\.layers\.(\d+)\.input_layernorm\.", r"transformer_blocks.\1.norm1.norm."),
    (r"^transformer\.layers\.(\d+)\.post_attention_layernorm\.", r"transformer_blocks.\1.norm2.norm."),
    (r"^transformer\.layers\.(\d+)\.attention\.dense\.", r"transformer_blocks.\1.attn1.to_out.0."),
    (r"^transformer\.layers\.(\d+)\.mlp\.dense_h_to_4h\.", r"transformer_blocks.\1.ff.net.0.proj."),
    (r"^transformer\.layers\.(\d+)\.mlp\.dense_4h_to_h\.", r"transformer_blocks.\1.ff.net.2."),
    (r"^mixins\.adaln_layer\.query_layernorm_list\.(\d+)\.", r"transformer_blocks.\1.attn1.norm_q."),
    (r"^mixins\.adaln_layer\.key_layernorm_list\.(\d+)\.", r"transformer_blocks.\1.attn1.norm_k."),
    (r"^transformer\.final_layernorm\.", "norm_final."),
    (r"^mixins\.final_layer\.norm_final\.", "norm_out.norm."),
    (r"^mixins\.final_layer\.adaLN_modulation\.1\.", "norm_out.linear."),
    (r"^mixins\.final_layer\.linear\.", "proj_out."),
]
UNUSED = r"transformer\.position_embeddings|mixins\.pos_embed\.freqs_"


def map_weights(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """State dict of our DiffusionTransformer under the names of diffusers; every key is accounted for."""
    mapped = {}
    for name, tensor in weights.items():
        if re.match(UNUSED, name):
            continue
        if match := re.match(r"transformer\.layers\.(\d+)\.attention\.query_key_value\.(weight|bias)", name):
            for part, chunk in zip("qkv", tensor.chunk(3), strict=True):
                mapped[f"transformer_blocks.{match[1]}.attn1.to_{part}.{match[2]}"] = chunk
        elif match := re.match(r"mixins\.adaln_layer\.adaLN_modulations\.(\d+)\.1\.(weight|bias)", name):
            chunks = tensor.chunk(12)  # vision then text; of each: shift, scale, gate of attention, then of the MLP
            for norm, start in (("norm1", 0), ("norm2", 3)):
                parts = chunks[start : start + 3] + chunks[start + 6 : start + 9]
                mapped[f"transformer_blocks.{match[1]}.{norm}.linear.{match[2]}"] = torch.cat(parts)
        else:
            for pattern, replacement in RENAMED:
                new_name, found = re.subn(pattern, replacement, name)
                if found:
                    mapped[new_name] = tensor
                    break
            else:
                raise KeyError(name)
    return mapped


def diffusers_network(network: torch.nn.Module, params: dict) -> CogVideoXTransformer3DModel:
    """The diffusers twin of `network`, which was built from `params`; on the same device, in the same dtype."""
    parameter = next(network.parameters())
    twin = build_diffusers_network(params, parameter.device, parameter.dtype)
    weights = map_weights(network.state_dict())
    if not twin.config.use_rotary_positional_embeddings:
        weights.pop("patch_embed.pos_embedding")  # diffusers computes its own
    missing, unexpected = twin.load_state_dict(weights, strict=False)
    assert not unexpected and set(missing) <= {"patch_embed.pos_embedding"}, (missing, unexpected)
    return twin


def build_diffusers_network(
    params: dict, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> CogVideoXTransformer3DModel:
    """The network of diffusers that `params` describe, with random weights."""
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
            patch_size=2,
            patch_size_t=None if isinstance(params["patch_size"], int) else 2,
            patch_bias=True,
            max_text_seq_length=position["params"]["text_length"],
            spatial_interpolation_scale=position["params"].get("height_interpolation", 1.0),
            use_rotary_positional_embeddings="Rotary" in position["target"],
            use_learned_positional_embeddings=position["params"].get("learnable_pos_embed", False),
        )
    return twin.to(dtype).eval()


def diffusers_rotary(params: dict, grid: tuple[int, int, int]) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Cosines and sines as diffusers computes them for a `grid` in patches, or None for sin-cos models."""
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
