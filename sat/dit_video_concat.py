"""The CogVideoX diffusion transformer (arXiv:2408.06072).

Text and video tokens are concatenated and attend to each other. `DiffusionTransformer` is a SwissArmyTransformer
`BaseModel`. The parts specific to CogVideoX are its mixins, here in the order of the data flow: patch embedding,
position embedding, adaptive layer norm with QK norm, final layer.

Shapes: b batch, t latent frames, c channels, h and w latent height and width, d `hidden_size`, l text tokens, n = l + v
tokens, of which v = (t/o)·(h/p)·(w/q) belong to the video, (o, p, q) the patch.
"""

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from sat.model.base_model import BaseMixin, BaseModel, non_conflict
from sat.model.transformer import BaseTransformer
from sat.transformer_defaults import ARGS_DEFAULT
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from cogvideox_sat.configuration.recomputation import recomputation_mode
from cogvideox_sat.configuration.video_layout import check_shares
from cogvideox_sat.latent_geometry import Grid, patch_sizes
from cogvideox_sat.network.activation_checkpointing import ActivationCheckpointing
from cogvideox_sat.network.attention_choice import AttentionChoice
from cogvideox_sat.network.block import tokens_of
from cogvideox_sat.network.compiled_layers import NotCompilable, compiled_layers, layer_weights
from cogvideox_sat.network.layer_runner import LayerContext, LayerRunner, RunLayer
from cogvideox_sat.network.lean_layers import lean_layers
from cogvideox_sat.network.modulation_table import ModulationTable
from cogvideox_sat.network.module_converters import Converter, convert_modules
from cogvideox_sat.network.position_tables import leading_corner, rotary_angles, sincos_3d
from cogvideox_sat.network.sequence_parallel import TokenShare
from cogvideox_sat.parallel.process_groups import initialize_process_groups
from sgm.attention_kernels import KERNELS
from sgm.errors import UserError
from sgm.modules.diffusionmodules.util import timestep_embedding
from sgm.util import instantiate_from_config

# For the norms defined here. SwissArmyTransformer's norms use `layernorm_epsilon` of `transformer_args` (1e-5).
LAYERNORM_EPSILON = 1e-6

OWN_MIXINS = (__name__, "sat.model.finetune.lora2")
# Keywords that denoisers and losses pass to every network.
HANDED_ON = ("idx", "scale_emb")


def may_overwrite() -> bool:
    """Return whether temporaries may be reused.

    They may not if gradients need them, or while compiling, because a compiler reuses memory better without this.
    """
    return not (torch.is_grad_enabled() or torch.compiler.is_compiling())


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Return x·(1 + scale) + shift, for x (b, n, d) and shift, scale (b, 1, d).

    x is overwritten if possible.
    """
    return torch.addcmul(shift, x, 1 + scale, out=x if may_overwrite() else None)


def add_gated(x: Tensor, gate: Tensor, update: Tensor) -> Tensor:
    """Return x + gate·update, for x and update (b, n, d) and gate (b, 1, d).

    x is overwritten if possible.
    """
    return torch.addcmul(x, gate, update, out=x if may_overwrite() else None)


def joined(whole: Tensor, text: Tensor, vision: Tensor) -> Tensor:
    """Return text tokens followed by vision tokens.

    If both are views of `whole` and were overwritten in place, `whole` is returned.
    """
    return whole if may_overwrite() else torch.cat((text, vision), dim=1)


def gelu_tanh(x: Tensor) -> Tensor:
    """Return gelu(x) in its tanh approximation."""
    return F.gelu(x, approximate="tanh")


def own_arguments(arguments: Mapping[str, Any], share: TokenShare) -> dict[str, Any]:
    """Return the arguments of a call for a process that has a share of the tokens."""
    rotary = arguments["rotary"]
    return {
        "share": share,
        "text_length": share.own_text,
        "rotary": rotary and tuple(map(share.own_rows, rotary)),
    }


# Patch embedding


class ImagePatchEmbeddingMixin(BaseMixin):
    """Projects video patches and text states to tokens (b, n, d), text first.

    The projection is stored as a Conv2d kernel if only space is patched (1.0), and as a Linear weight if time is
    patched, too (1.5). Both are applied as one matrix product on features ordered (c o p q).
    """

    def __init__(
        self,
        in_channels: int,
        hidden_size: int,
        patch_size: int | Sequence[int],
        text_hidden_size: int,
        bias: bool = True,
    ):
        super().__init__()
        self.patch = o, p, q = patch_sizes(patch_size)
        if isinstance(patch_size, int):
            self.proj = nn.Conv2d(in_channels, hidden_size, kernel_size=(p, q), stride=(p, q), bias=bias)
        else:
            self.proj = nn.Linear(in_channels * o * p * q, hidden_size, bias=bias)
        self.text_proj = nn.Linear(text_hidden_size, hidden_size)

    def reinit(self, parent_model: BaseModel | None = None) -> None:
        del self.transformer.word_embeddings  # tokens come from patches, not from a vocabulary
        nn.init.xavier_uniform_(self.proj.weight.view(self.proj.weight.shape[0], -1))
        if self.proj.bias is not None:
            nn.init.zeros_(self.proj.bias)

    def word_embedding_forward(
        self, input_ids: Tensor | None, *, images: Tensor, encoder_outputs: Tensor, **_: Any
    ) -> Tensor:
        """Return the tokens (b, n, d).

        Args:
            images: (b, t, c, h, w).
            encoder_outputs: text states (b, l, text_hidden_size).
        """
        o, p, q = self.patch
        patches = rearrange(images, "b (t o) c (h p) (w q) -> b (t h w) (c o p q)", o=o, p=p, q=q)
        video = F.linear(patches, self.proj.weight.flatten(1), self.proj.bias)
        return torch.cat((self.text_proj(encoder_outputs), video), dim=1)


# Position embedding


class Basic3DPositionEmbeddingMixin(BaseMixin):
    """Absolute sin-cos positions, added to the video tokens; zeros for text.

    They are frozen, but part of the state dict.
    """

    def __init__(
        self,
        height: int,
        width: int,
        compressed_num_frames: int,
        hidden_size: int,
        text_length: int,
        time_interpolation: float = 1.0,
        height_interpolation: float = 1.0,
        width_interpolation: float = 1.0,
    ):
        super().__init__()
        self.grid: Grid = (compressed_num_frames, height, width)
        self.text_length = text_length
        video = sincos_3d(hidden_size, self.grid, time_interpolation, height_interpolation, width_interpolation)
        self.pos_embedding = nn.Parameter(F.pad(video, (0, 0, text_length, 0))[None], requires_grad=False)

    def reinit(self, parent_model: BaseModel | None = None) -> None:
        del self.transformer.position_embeddings

    def position_embedding_forward(
        self, position_ids: Tensor | None, *, grid: Grid, text_length: int, **_: Any
    ) -> Tensor:
        text, video = self.pos_embedding[:, :text_length], self.pos_embedding[:, self.text_length :]
        return torch.cat((text, leading_corner(video, self.grid, grid)), dim=1)

    def rotary(self, grid: Grid, like: Tensor) -> None:
        return None


def rotate_pairs(x: Tensor) -> Tensor:
    """Return (−x₁, x₀) for each pair (x₀, x₁) of neighbouring features."""
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((-second, first), dim=-1).flatten(-2)


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the video tokens of x (b, heads, n, head_dim), which come last.

    x is overwritten if possible.

    Args:
        cos, sin: (v, head_dim).
    """
    text, video = x.split((x.shape[2] - cos.shape[0], cos.shape[0]), dim=2)
    rotated = rotate_pairs(video)
    if may_overwrite():
        video.mul_(cos).addcmul_(rotated, sin)
        return x
    return torch.cat((text, torch.addcmul(video * cos, rotated, sin)), dim=2)


class Rotary3DPositionEmbeddingMixin(BaseMixin):
    """Rotary positions for queries and keys of video tokens, and optional learnt positions.

    The learnt positions are absolute. Checkpoints of 1.0 models contain the cosines and sines (`store_tables`); those
    of 1.5 models do not.
    """

    def __init__(
        self,
        height: int,
        width: int,
        compressed_num_frames: int,
        hidden_size: int,
        hidden_size_head: int,
        text_length: int,
        theta: float = 10000.0,
        learnable_pos_embed: bool = False,
        store_tables: bool = True,
        time_interpolation: float = 1.0,
        height_interpolation: float = 1.0,
        width_interpolation: float = 1.0,
    ):
        super().__init__()
        if not time_interpolation == height_interpolation == width_interpolation == 1:
            raise UserError(
                "interpolation factors: rotary positions take only 1; use Basic3DPositionEmbeddingMixin for others"
            )
        self.grid: Grid = (compressed_num_frames, height, width)
        self.text_length = text_length
        self.head_dim, self.theta = hidden_size_head, theta
        self.store_tables = store_tables
        if store_tables:
            angles = rotary_angles(hidden_size_head, self.grid, theta)
            self.register_buffer("freqs_sin", angles.sin())
            self.register_buffer("freqs_cos", angles.cos())
        self.pos_embedding = None
        if learnable_pos_embed:
            tokens = text_length + compressed_num_frames * height * width
            self.pos_embedding = nn.Parameter(torch.zeros(1, tokens, hidden_size))

    def position_embedding_forward(
        self, position_ids: Tensor | None, *, grid: Grid, text_length: int, **_: Any
    ) -> Tensor | None:
        if self.pos_embedding is None:
            return None
        text, video = self.pos_embedding[:, :text_length], self.pos_embedding[:, self.text_length :]
        return torch.cat((text, leading_corner(video, self.grid, grid)), dim=1)

    def rotary(self, grid: Grid, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return cosines and sines (v, head_dim) of the leading corner of size `grid`.

        They have the dtype of `like`.
        """
        if self.store_tables:
            return tuple(
                leading_corner(table, self.grid, grid).to(like.dtype) for table in (self.freqs_cos, self.freqs_sin)
            )
        angles = rotary_angles(self.head_dim, grid, self.theta, like.device)
        return angles.cos().to(like.dtype), angles.sin().to(like.dtype)

    @non_conflict
    def attention_fn(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        dropout: nn.Module | None = None,
        *,
        rotary: tuple[Tensor, Tensor],
        old_impl: Callable[..., Tensor],
        **kwargs: Any,
    ) -> Tensor:
        cos, sin = rotary
        return old_impl(apply_rotary(q, cos, sin), apply_rotary(k, cos, sin), v, mask, dropout, **kwargs)


# Transformer layer


class AdaLNMixin(BaseMixin):
    """A pre-norm layer with norms modulated and branches gated by the time embedding.

    Vision and text share weights, but have their own shift, scale and gate ("expert adaptive layer norm"). `qk_ln`
    normalises queries and keys over the head dimension, before the rotary embedding.
    """

    def __init__(
        self,
        hidden_size: int,
        num_layers: int,
        time_embed_dim: int,
        hidden_size_head: int,
        qk_ln: bool = True,
        elementwise_affine: bool = True,
    ):
        super().__init__()
        self.adaLN_modulations = nn.ModuleList(
            nn.Sequential(nn.SiLU(), nn.Linear(time_embed_dim, 12 * hidden_size)) for _ in range(num_layers)
        )
        self.qk_ln = qk_ln
        if qk_ln:

            def norms() -> nn.ModuleList:
                return nn.ModuleList(
                    nn.LayerNorm(hidden_size_head, eps=LAYERNORM_EPSILON, elementwise_affine=elementwise_affine)
                    for _ in range(num_layers)
                )

            self.query_layernorm_list, self.key_layernorm_list = norms(), norms()

    def reinit(self, parent_model: BaseModel | None = None) -> None:
        """Set the modulation to zero, so that initially every layer is the identity.

        This is adaLN-Zero (arXiv:2212.09748).
        """
        for modulation in self.adaLN_modulations:
            nn.init.zeros_(modulation[1].weight)
            nn.init.zeros_(modulation[1].bias)

    def layer_forward(
        self,
        hidden_states: Tensor,
        mask: Tensor | None,
        *,
        layer_id: int,
        emb: Tensor,
        text_length: int,
        modulations: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Return the tokens (b, n, d) after a layer.

        Args:
            hidden_states: (b, n, d), text first.
            emb: (b, time_embed_dim).
            modulations: (layers, b, 12 d) for `emb`, if already computed.
        """
        layer = self.transformer.layers[layer_id]
        split = (text_length, hidden_states.shape[1] - text_length)
        modulation = self.adaLN_modulations[layer_id](emb) if modulations is None else modulations[layer_id]
        chunks = modulation.unsqueeze(1).chunk(12, dim=-1)
        vision_attention, vision_mlp, text_attention, text_mlp = (chunks[i : i + 3] for i in range(0, 12, 3))

        def branch(
            x: Tensor,
            norm: nn.Module,
            run: Callable[[Tensor], Tensor],
            vision: Sequence[Tensor],
            text: Sequence[Tensor],
        ) -> Tensor:
            (shift, scale, gate), (text_shift, text_scale, text_gate) = vision, text
            normed = norm(x)
            t, v = normed.split(split, dim=1)
            update = run(joined(normed, modulate(t, text_shift, text_scale), modulate(v, shift, scale)))
            (t, v), (text_update, update) = x.split(split, dim=1), update.split(split, dim=1)
            return joined(x, add_gated(t, text_gate, text_update), add_gated(v, gate, update))

        attention = partial(layer.attention, mask=mask, layer_id=layer_id, text_length=text_length, **kwargs)
        mlp = partial(layer.mlp, layer_id=layer_id)
        x = branch(hidden_states, layer.input_layernorm, attention, vision_attention, text_attention)
        return branch(x, layer.post_attention_layernorm, mlp, vision_mlp, text_mlp)

    @non_conflict
    def attention_fn(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        dropout: nn.Module | None = None,
        *,
        layer_id: int,
        old_impl: Callable[..., Tensor],
        **kwargs: Any,
    ) -> Tensor:
        if self.qk_ln:
            q = self.query_layernorm_list[layer_id](q)
            k = self.key_layernorm_list[layer_id](k)
        return old_impl(q, k, v, mask, dropout, layer_id=layer_id, **kwargs)


# Final layer


class FinalLayerMixin(BaseMixin):
    """Modulated norm, projection and unpatchify.

    Tokens (b, n, d) become latents (b, t, out_channels, h, w).
    """

    def __init__(
        self,
        hidden_size: int,
        time_embed_dim: int,
        patch_size: int | Sequence[int],
        out_channels: int,
        elementwise_affine: bool = True,
    ):
        super().__init__()
        self.patch = o, p, q = patch_sizes(patch_size)
        self.norm_final = nn.LayerNorm(hidden_size, eps=LAYERNORM_EPSILON, elementwise_affine=elementwise_affine)
        self.linear = nn.Linear(hidden_size, o * p * q * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(time_embed_dim, 2 * hidden_size))

    def reinit(self, parent_model: BaseModel | None = None) -> None:
        for linear in (self.linear, self.adaLN_modulation[1]):
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)

    def final_forward(
        self, logits: Tensor, *, emb: Tensor, grid: Grid, text_length: int, share: TokenShare | None = None, **_: Any
    ) -> Tensor:
        shift, scale = self.adaLN_modulation(emb).unsqueeze(1).chunk(2, dim=-1)
        x = self.linear(modulate(self.norm_final(logits[:, text_length:]), shift, scale))
        if share is not None:
            x = share.gather_video(x)
        (t, h, w), (o, p, q) = grid, self.patch
        return rearrange(x, "b (t h w) (c o p q) -> b (t o) c (h p) (w q)", t=t, h=h, w=w, o=o, p=p, q=q)


# The network


class DiffusionTransformer(BaseModel):
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
        settings = SimpleNamespace(
            **{
                "vocab_size": 1,
                "max_sequence_length": 64,
                "layernorm_order": "pre",
                "skip_init": False,
                **{name: value for name, value in transformer_args.items() if value is not None},
            }
        )
        recompute = getattr(settings, "checkpoint_activations", False)
        settings.checkpoint_activations = recomputation_mode("checkpoint_activations", recompute)
        # Built here, because BaseModel would reseed the global random generators.
        transformer = BaseTransformer(
            num_layers=num_layers,
            vocab_size=settings.vocab_size,
            hidden_size=hidden_size,
            num_attention_heads=num_attention_heads,
            max_sequence_length=settings.max_sequence_length,
            layernorm_order=settings.layernorm_order,
            skip_init=settings.skip_init,
            layernorm=nn.LayerNorm,
            activation_func=gelu_tanh,
            **{
                **{name: getattr(settings, arg, default) for name, (arg, default) in ARGS_DEFAULT.items()},
                "row_parallel_linear_final_bias": False,  # the bias is added within the matrix product
                **{
                    "checkpoint_num_layers": 1,
                    "checkpoint_skip_layers": 0,
                },  # for SwissArmyTransformer's own loop over layers
            },
        )
        transformer.checkpoint_skip_layers = getattr(settings, "checkpoint_skip_layers", 0)
        super().__init__(settings, transformer=transformer)
        self.in_channels, self.out_channels = in_channels, out_channels
        self.hidden_size, self.num_layers, self.ofs_embed_dim = hidden_size, num_layers, ofs_embed_dim
        self.num_attention_heads = num_attention_heads
        self.patch = patch_sizes(patch_size)
        self.checkpointing = ActivationCheckpointing(transformer)
        self.layer_runner = LayerRunner([self.checkpointing])
        self.attention = self.training_attention = KERNELS["softmax"]
        self.attention_name = "softmax"
        self.use_attention(None)
        self.compiles_layers = False
        self.modulation_table: ModulationTable | None = None
        self.sequence_group: ProcessGroup | None = None
        self.sequence_processes = 1  # number of processes that share the tokens of a call

        def embedding_mlp(dim: int) -> nn.Sequential:
            return nn.Sequential(nn.Linear(dim, time_embed_dim), nn.SiLU(), nn.Linear(time_embed_dim, time_embed_dim))

        self.time_embed = embedding_mlp(hidden_size)
        if ofs_embed_dim is not None:
            self.ofs_embed = embedding_mlp(ofs_embed_dim)

        # A mixin's attention_fn wraps those of the mixins added before it, so QK norm runs before the rotation.
        interpolation = {
            "time_interpolation": time_interpolation,
            "height_interpolation": height_interpolation,
            "width_interpolation": width_interpolation,
        }
        pos_embed_config = modules["pos_embed_config"]
        position = {
            "height": latent_height // self.patch[1],
            "width": latent_width // self.patch[2],
            "compressed_num_frames": (num_frames - 1) // time_compressed_rate + 1,
            "hidden_size": hidden_size,
            **{name: factor for name, factor in interpolation.items() if factor is not None},
        }
        if pos_embed_config["target"].endswith("Rotary3DPositionEmbeddingMixin"):
            position["store_tables"] = isinstance(patch_size, int)
        self.add_mixin("pos_embed", instantiate_from_config(pos_embed_config, **position), reinit=True)
        self.add_mixin(
            "patch_embed",
            instantiate_from_config(
                modules["patch_embed_config"], in_channels=in_channels, hidden_size=hidden_size, patch_size=patch_size
            ),
            reinit=True,
        )
        width = {"hidden_size": hidden_size, "time_embed_dim": time_embed_dim, "elementwise_affine": elementwise_affine}
        self.add_mixin(
            "adaln_layer",
            instantiate_from_config(
                modules["adaln_layer_config"],
                num_layers=num_layers,
                hidden_size_head=hidden_size // num_attention_heads,
                **width,
            ),
            reinit=True,
        )
        self.add_mixin(
            "final_layer",
            instantiate_from_config(
                modules["final_layer_config"], patch_size=patch_size, out_channels=out_channels, **width
            ),
            reinit=True,
        )
        if "lora_config" in modules:
            self.add_mixin("lora", instantiate_from_config(modules["lora_config"], layer_num=num_layers), reinit=True)
        convert_modules(self, self.converters())

    def converters(self) -> Iterator[Converter]:
        """Yield the converters of modules for the built network; a subclass may add its own."""
        if "lora" in self.mixins:
            # Imported here, because the import warns about a missing bitsandbytes, which concerns only adapters.
            from cogvideox_sat.network.fused_lora import fuse_adapter

            yield fuse_adapter

    def use_attention(self, choice: AttentionChoice | None) -> None:
        """Compute attention with another kernel from now on; None: PyTorch's choice."""
        own = KERNELS["softmax"], KERNELS["written-out"]
        self.attention, self.training_attention = (choice.function,) * 2 if choice and choice.function else own
        self.attention_name = choice.kernel if choice else "softmax"
        others = [each for each in self.layer_runner.around if not isinstance(each, AttentionChoice)]
        self.layer_runner.around = (*others, choice) if choice and choice.backends else tuple(others)

    def share_tokens(self, group: ProcessGroup | None) -> None:
        """Hold only a share of the tokens of each call from now on.

        The other processes of the group hold the other shares. All of them must be called with the same inputs, and
        return the same. None: hold all tokens.

        Args:
            group: the group of processes.

        Raises:
            UserError: the group has more processes than the network has heads.
        """
        if group is not None:
            check_shares(group.size(), "attention heads", self.num_attention_heads)
        self.sequence_group, self.sequence_processes = group, 1 if group is None else group.size()

    def compile_layers(self) -> bool:
        """Compile the layers from now on; return False and change nothing if that is impossible.

        Layers in which an unsupported part for `network.compiled_layers` is found later run without a compiler.
        """
        with suppress(NotCompilable):
            layer_weights(self, 0)
            self.compiles_layers = True
        return self.compiles_layers

    def tabulate_modulations(self, device: torch.device) -> bool:
        """Compute modulations in advance for sampling, with their weights in host memory.

        Return False, and change nothing, if layers may use these weights in another way.

        Args:
            device: device on which the network runs.
        """
        if self.why_layers_are_not_plain() is None:
            self.modulation_table = ModulationTable(self.mixins["adaln_layer"].adaLN_modulations, device)
        return self.modulation_table is not None

    def why_layers_are_not_plain(self) -> str | None:
        """Return why layers may compute something else than `network.block`, or None."""
        if self.has_foreign_mixin:
            return "it has a mixin that is not defined here"
        own = (DiffusionTransformer.attention_fn, DiffusionTransformer.layer)
        if (type(self).attention_fn, type(self).layer) != own:
            return f"{type(self).__name__} runs its layers in its own way"
        if self.transformer.layernorm_order != "pre":
            return f"its layernorm_order is {self.transformer.layernorm_order}"
        watched = (self.transformer.layers, self.mixins["adaln_layer"])
        if any(each._forward_hooks or each._forward_pre_hooks for part in watched for each in part.modules()):
            return "its modules have hooks, as with ZeRO-3"
        return None

    @property
    def dtype(self) -> torch.dtype:
        return self.time_embed[0].weight.dtype

    def collect_hooks_(self) -> dict[str, Any]:
        hooks = super().collect_hooks_()
        if hasattr(self, "transformer"):  # sub-layers look up their hooks there
            self.transformer.hooks.clear()
            self.transformer.hooks.update(hooks)
        # Mixins that are neither defined here nor an adapter; they may read any keyword.
        self.has_foreign_mixin = any(type(mixin).__module__ not in OWN_MIXINS for mixin in self.mixins.values())
        return hooks

    def attention_fn(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        dropout: nn.Dropout | None = None,
        *,
        share: TokenShare | None = None,
        **_: Any,
    ) -> Tensor:
        """Return full attention of q, k, v (b, heads, n, head_dim), without a mask."""
        dropout_p = dropout.p if dropout is not None else 0.0
        if share is not None:
            kernel = self.training_attention if torch.is_grad_enabled() else self.attention
            return share.attend(kernel)(q, k, v, dropout_p=dropout_p)
        if not torch.is_grad_enabled():
            return self.attention(q, k, v, dropout_p=dropout_p)
        # The backward pass keeps v. Since v is a view of q, k and v together, a copy allows the others to be freed.
        v = v.transpose(1, 2).contiguous().transpose(1, 2)
        return self.training_attention(q, k, v, dropout_p=dropout_p)

    def patch_grid(self, latents: Tensor) -> Grid:
        """Return the number of patches along (t, h, w) of latents (b, t, c, h, w).

        Raises:
            UserError: the latents do not divide into patches, or are larger than the position table.
        """
        size, patch, largest = (latents.shape[1], *latents.shape[3:]), self.patch, self.mixins["pos_embed"].grid
        if any(s % p for s, p in zip(size, patch, strict=True)):
            raise UserError(f"latents of size {size} (frames, height, width) do not divide into patches of {patch}")
        grid = tuple(s // p for s, p in zip(size, patch, strict=True))
        if any(g > limit for g, limit in zip(grid, largest, strict=True)):
            limits = tuple(limit * p for limit, p in zip(largest, patch, strict=True))
            raise UserError(f"latents of size {size} (frames, height, width) exceed this model's {limits}")
        return grid

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
            x = self.join_condition(x, concat_images)
        if x.shape[2] != self.in_channels:
            raise UserError(
                f"the latents have {x.shape[2]} channels, but this network takes {self.in_channels}; channels of an "
                "image condition (concat_images) count too"
            )
        grid, text_length = self.patch_grid(x), context.shape[1]
        arguments = {
            "emb": self.embed_condition(timesteps, ofs),
            "grid": grid,
            "text_length": text_length,
            "rotary": self.mixins["pos_embed"].rotary(grid, x),
        }
        if self.modulation_table is not None:
            arguments["modulations"] = self.modulation_table(arguments["emb"])
        arguments |= self.foreign_arguments({"idx": idx, "scale_emb": scale_emb, **kwargs}, arguments)
        hidden = self.hooks["word_embedding_forward"](None, images=x, encoder_outputs=context, **arguments)
        position = self.hooks["position_embedding_forward"](None, **arguments)
        if position is not None:
            hidden = hidden + position
        if self.sequence_group is not None:
            share = TokenShare.of(hidden.shape[1], text_length, self.num_attention_heads, self.sequence_group)
            hidden = share.own_tokens(hidden)
            arguments |= own_arguments(arguments, share)
        run_layer, compiled = self.layers_of_call(arguments, hidden)
        for layer in range(self.num_layers):
            context = LayerContext(
                layer,
                self.num_layers,
                timesteps,
                grid,
                arguments["text_length"],
                self.training,
                self.layer_runner.sampling,
                keeps_attention=compiled and self.compiles_layers,
            )
            hidden = self.layer_runner(run_layer(layer), hidden, context)
        hidden = self.transformer.final_layernorm(hidden)
        return self.hooks["final_forward"](hidden, **arguments)

    def join_condition(self, x: Tensor, condition: Tensor) -> Tensor:
        """Return `x` (b, t, c, h, w) with the channels of an image condition appended.

        Raises:
            UserError: the two differ in another dimension than channels.
        """
        if condition.ndim != 5 or (*x.shape[:2], *x.shape[3:]) != (*condition.shape[:2], *condition.shape[3:]):
            raise UserError(
                f"concat_images has the shape {tuple(condition.shape)}; beside latents of {tuple(x.shape)} it must be "
                "(b, t, channels, h, w) with the same b, t, h and w"
            )
        return torch.cat((x, condition.to(x.dtype)), dim=2)

    def foreign_arguments(self, keywords: Mapping[str, Any], own: Container[str]) -> dict[str, Any]:
        """Return the keywords of a call that are for foreign mixins.

        Raises:
            TypeError: no foreign mixin is registered, or a keyword has the name of one that the network sets itself.
        """
        given = {name: value for name, value in keywords.items() if value is not None or name not in HANDED_ON}
        unknown = [name for name in given if name in own or not (self.has_foreign_mixin or name in HANDED_ON)]
        if unknown:
            known = ("x", "timesteps", "context", "y", "concat_images", "ofs", *HANDED_ON)
            raise TypeError(
                f"DiffusionTransformer.forward() got an unexpected keyword argument '{unknown[0]}'; it takes "
                f"{', '.join(known)}, and other keywords only if your own mixin is registered"
            )
        return given if self.has_foreign_mixin else {}

    def layers_of_call(self, arguments: Mapping[str, Any], hidden: Tensor) -> tuple[Callable[[int], RunLayer], bool]:
        """Return a function from index to layer, and whether the layers are compiled.

        Each layer is a function of the tokens alone: compiled, or made of parts that keep little for a backward pass,
        if all layers support that.
        """
        share = arguments.get("share")
        if self.compiles_layers:
            tokens = tokens_of(arguments["text_length"], hidden.shape[1], arguments["rotary"], hidden.device)
            emb, modulations = F.silu(arguments["emb"]), arguments.get("modulations")
            with suppress(NotCompilable):
                plain = [self.layer(layer_id, arguments) for layer_id in range(self.num_layers)]
                return compiled_layers(self, emb, tokens, plain, modulations, share).__getitem__, True
        elif torch.is_grad_enabled() and not torch.compiler.is_compiling() and "modulations" not in arguments:
            with suppress(NotCompilable):
                emb = F.silu(arguments["emb"])
                layers = lean_layers(self, emb, arguments["text_length"], arguments["rotary"], share)
                return layers.__getitem__, False
        return (lambda layer_id: self.layer(layer_id, arguments)), False

    def layer(self, layer_id: int, arguments: Mapping[str, Any]) -> RunLayer:
        """Return a layer as a function of the tokens (b, n, d) alone."""
        layer_forward = self.hooks["layer_forward"]
        return lambda hidden: layer_forward(hidden, None, layer_id=layer_id, **arguments)

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
