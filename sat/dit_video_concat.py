"""The CogVideoX diffusion transformer (arXiv:2408.06072).

Text and video tokens are concatenated and attend to each other. `DiffusionTransformer` is a SwissArmyTransformer
`BaseModel`, here from its configuration to its output. Its parts are mixins, which configurations name by this module.
In the order of the data flow they are in `network.patches`, `network.position_embeddings`, `network.adaptive_layer` and
again `network.patches`. How layers run is in `network.layer_execution`.

Shapes: b batch, t latent frames, c channels, h and w latent height and width, d `hidden_size`, l text tokens, n = l + v
tokens, of which v = (t/o)·(h/p)·(w/q) belong to the video, (o, p, q) the patch.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cogvideox_sat.latent_geometry import Grid, patch_sizes
from cogvideox_sat.network.adaptive_layer import AdaLNMixin
from cogvideox_sat.network.call_arguments import (
    check_channels,
    foreign_arguments,
    join_condition,
    own_arguments,
    patch_grid,
)
from cogvideox_sat.network.layer_execution import LayerExecution
from cogvideox_sat.network.module_converters import Converter, convert_modules
from cogvideox_sat.network.patches import FinalLayerMixin, ImagePatchEmbeddingMixin
from cogvideox_sat.network.position_embeddings import Basic3DPositionEmbeddingMixin, Rotary3DPositionEmbeddingMixin
from cogvideox_sat.network.sat_transformer import build_transformer
from cogvideox_sat.network.sequence_parallel import TokenShare
from cogvideox_sat.parallel.process_groups import initialize_process_groups
from sgm.errors import UserError
from sgm.modules.diffusionmodules.util import timestep_embedding
from sgm.util import instantiate_from_config

__all__ = [
    "AdaLNMixin",
    "Basic3DPositionEmbeddingMixin",
    "DiffusionTransformer",
    "FinalLayerMixin",
    "ImagePatchEmbeddingMixin",
    "Rotary3DPositionEmbeddingMixin",
]


class DiffusionTransformer(LayerExecution):
    """Predicts v for noised video latents, given timesteps and T5 states.

    Args:
        num_frames, time_compressed_rate: pixel frames of the longest clip, and how many of them make a latent frame.
        latent_width, latent_height: size of the largest latent, before patching.
        patch_size: `2` for CogVideoX 1.0, `[2, 2, 2]` for 1.5.
        modules: configurations of the mixins: `pos_embed_config`, `patch_embed_config`, `adaln_layer_config`,
            `final_layer_config` and optionally `lora_config`.
        transformer_args: arguments for SwissArmyTransformer (`checkpoint_activations`, `model_parallel_size`, ...).
        ofs_embed_dim: width of the sinusoid of `ofs`, which 1.5 image-to-video takes besides the timestep.
        height_interpolation, width_interpolation, time_interpolation: given here, or with the position embedding.
        adm_in_channels: accepted for older configurations; no CogVideoX model has a class condition.
    """

    def __init__(
        self,
        num_frames: int,
        time_compressed_rate: int,
        latent_width: int,
        latent_height: int,
        patch_size: int | Sequence[int],
        in_channels: int,
        out_channels: int,
        hidden_size: int,
        num_layers: int,
        num_attention_heads: int,
        time_embed_dim: int,
        modules: Mapping[str, Any],
        transformer_args: Mapping[str, Any],
        elementwise_affine: bool = True,
        ofs_embed_dim: int | None = None,
        height_interpolation: float | None = None,
        width_interpolation: float | None = None,
        time_interpolation: float | None = None,
        adm_in_channels: int | None = None,
    ):
        model_parallel_size = transformer_args.get("model_parallel_size") or 1
        if num_attention_heads % model_parallel_size:
            raise UserError(
                f"model_parallel_size {model_parallel_size} does not divide {num_attention_heads} attention heads"
            )
        initialize_process_groups(model_parallel_size)
        transformer = build_transformer(hidden_size, num_layers, num_attention_heads, transformer_args)
        super().__init__(transformer, num_layers, num_attention_heads)
        self.in_channels, self.out_channels = in_channels, out_channels
        self.hidden_size, self.ofs_embed_dim = hidden_size, ofs_embed_dim
        self.patch = patch_sizes(patch_size)

        def embedding_mlp(dim: int) -> nn.Sequential:
            return nn.Sequential(nn.Linear(dim, time_embed_dim), nn.SiLU(), nn.Linear(time_embed_dim, time_embed_dim))

        self.time_embed = embedding_mlp(hidden_size)
        if ofs_embed_dim is not None:
            self.ofs_embed = embedding_mlp(ofs_embed_dim)

        interpolation = {
            "time_interpolation": time_interpolation,
            "height_interpolation": height_interpolation,
            "width_interpolation": width_interpolation,
        }
        self._add_mixins(
            modules,
            position={
                "height": latent_height // self.patch[1],
                "width": latent_width // self.patch[2],
                "compressed_num_frames": (num_frames - 1) // time_compressed_rate + 1,
                "hidden_size": hidden_size,
                **{name: factor for name, factor in interpolation.items() if factor is not None},
            },
            patch_size=patch_size,
            modulated={
                "hidden_size": hidden_size,
                "time_embed_dim": time_embed_dim,
                "elementwise_affine": elementwise_affine,
            },
        )
        convert_modules(self, self.converters())

    def _add_mixins(
        self,
        modules: Mapping[str, Any],
        position: dict[str, Any],
        patch_size: int | Sequence[int],
        modulated: dict[str, Any],
    ) -> None:
        """Build the mixins that `modules` configures.

        Args:
            position: arguments of the position embedding.
            patch_size: as configured, which decides how weights and tables are stored.
            modulated: arguments of the mixins with adaptive layer norms.
        """
        if modules["pos_embed_config"]["target"].endswith("Rotary3DPositionEmbeddingMixin"):
            position["store_tables"] = isinstance(patch_size, int)
        patches = {"in_channels": self.in_channels, "hidden_size": self.hidden_size, "patch_size": patch_size}
        layers = {"num_layers": self.num_layers, "hidden_size_head": self.hidden_size // self.num_attention_heads}
        parts = {
            "pos_embed": position,
            "patch_embed": patches,
            "adaln_layer": layers | modulated,
            "final_layer": {"patch_size": patch_size, "out_channels": self.out_channels, **modulated},
        }
        # A mixin's attention_fn wraps those of the mixins added before it, so QK norm runs before the rotation.
        for name, arguments in parts.items():
            self.add_mixin(name, instantiate_from_config(modules[f"{name}_config"], **arguments), reinit=True)
        if "lora_config" in modules:
            lora = instantiate_from_config(modules["lora_config"], layer_num=self.num_layers)
            self.add_mixin("lora", lora, reinit=True)

    def converters(self) -> Iterator[Converter]:
        """Yield the converters of modules for the built network; a subclass may add its own."""
        if "lora" in self.mixins:
            # Imported here, because the import warns about a missing bitsandbytes, which concerns only adapters.
            from cogvideox_sat.network.fused_lora import fuse_adapter

            yield fuse_adapter

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of the weights, in which latents are expected."""
        return self.time_embed[0].weight.dtype

    def patch_grid(self, latents: Tensor) -> Grid:
        """Return the number of patches along (t, h, w) of latents (b, t, c, h, w).

        Raises:
            UserError: the latents do not divide into patches, or are larger than the position table.
        """
        return patch_grid(latents, self.patch, self.mixins["pos_embed"].grid)

    def embed_condition(self, timesteps: Tensor, ofs: Tensor | None = None) -> Tensor:
        """Return the time embedding (b, time_embed_dim), plus that of `ofs` if the model has one."""
        emb = self.time_embed(timestep_embedding(timesteps, self.hidden_size, dtype=self.dtype))
        if self.ofs_embed_dim is not None:
            if ofs is None:
                raise UserError("this network takes `ofs` (2.0 for CogVideoX1.5 image-to-video), but none was given")
            emb = emb + self.ofs_embed(timestep_embedding(ofs, self.ofs_embed_dim, dtype=self.dtype))
        return emb

    def forward(
        self,
        x: Tensor,
        timesteps: Tensor,
        context: Tensor,
        y: None = None,
        concat_images: Tensor | None = None,
        ofs: Tensor | None = None,
        *,
        idx: Tensor | None = None,
        scale_emb: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Return the network's prediction (b, t, out_channels, h, w).

        Args:
            x: noised latents (b, t, c, h, w), in the network's dtype; c is `in_channels` minus the channels of
                `concat_images`.
            timesteps: integer timestep indices (b,).
            context: text states (b, l, text_hidden_size).
            y: part of the calling convention; no CogVideoX model takes a vector condition.
            concat_images: image condition (b, t, c', h, w), which is joined to `x` along the channels.
            ofs: (b,), for 1.5 image-to-video; other models ignore it.
            idx, scale_emb: keywords that denoisers pass; only foreign mixins read them.
            kwargs: keywords for foreign mixins, which are neither defined here nor an adapter; without such mixins,
                other keywords are errors.

        Raises:
            TypeError: a keyword is unknown.
            UserError: the latents do not fit the network.
        """
        if concat_images is not None:
            x = join_condition(x, concat_images)
        check_channels(x, self.in_channels)
        grid, text_length = self.patch_grid(x), context.shape[1]
        arguments = {
            "emb": self.embed_condition(timesteps, ofs),
            "grid": grid,
            "text_length": text_length,
            "rotary": self.mixins["pos_embed"].rotary(grid, x),
        }
        if self.modulation_table is not None:
            arguments["modulations"] = self.modulation_table(arguments["emb"])
        others = {"idx": idx, "scale_emb": scale_emb, **kwargs}
        arguments |= foreign_arguments(others, arguments, self.has_foreign_mixin)
        hidden = self.hooks["word_embedding_forward"](None, images=x, encoder_outputs=context, **arguments)
        position = self.hooks["position_embedding_forward"](None, **arguments)
        if position is not None:
            hidden = hidden + position
        if self.sequence_group is not None:
            share = TokenShare.of(hidden.shape[1], text_length, self.num_attention_heads, self.sequence_group)
            hidden = share.own_tokens(hidden)
            arguments |= own_arguments(arguments, share)
        hidden = self.run_layers(hidden, timesteps, arguments)
        hidden = self.transformer.final_layernorm(hidden)
        return self.hooks["final_forward"](hidden, **arguments)

    def disable_untrainable_params(self) -> None:
        """Freeze the parameters that are never trained.

        With LoRA, these are all but the adapter. For full fine-tuning, this is a position table of SwissArmyTransformer
        that rotary models do not use.
        """
        if hasattr(self.transformer, "position_embeddings"):
            self.transformer.position_embeddings.requires_grad_(False)
        if "lora" in self.mixins:
            for name, parameter in self.named_parameters():
                parameter.requires_grad_(".matrix_A." in name or ".matrix_B." in name)
