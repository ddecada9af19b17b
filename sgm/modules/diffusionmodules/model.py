"""The 2D encoder and decoder of an image autoencoder.

Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models" (the first stage, app. G), after Esser et
al., "Taming Transformers for High-Resolution Image Synthesis", table 7. Images are (b, channel, h, w).
"""

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sgm.errors import UserError
from sgm.modules.attention_layers import LinearAttention, Normalize, SpatialSelfAttention

# ---------------------------------------------------------------- layers


def silu(x: Tensor) -> Tensor:
    """Return the SiLU of a temporary tensor; without gradients, overwrite the tensor."""
    return F.silu(x, inplace=not torch.is_grad_enabled())


class ResnetBlock(nn.Module):
    """Two rounds of norm, SiLU and convolution, with a shortcut.

    (b, in_channels, h, w) -> (b, out_channels, h, w). He et al., "Identity Mappings in Deep Residual Networks", fig.
    1b.
    """

    def __init__(self, in_channels: int, out_channels: int, dropout: float = 0.0):
        super().__init__()
        self.norm1 = Normalize(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = Normalize(out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return (b, out_channels, h, w) for x (b, in_channels, h, w)."""
        h = self.conv1(silu(self.norm1(x)))
        h = self.conv2(self.dropout(silu(self.norm2(h))))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class Downsample(nn.Module):
    """Halve height and width, by a strided convolution or by the mean.

    The convolution pads with zeros at the right and the bottom only.
    """

    def __init__(self, channels: int, with_conv: bool):
        super().__init__()
        if with_conv:
            self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """Return (b, channels, h / 2, w / 2) for x (b, channels, h, w)."""
        return self.conv(F.pad(x, (0, 1, 0, 1))) if hasattr(self, "conv") else F.avg_pool2d(x, 2)


class Upsample(nn.Module):
    """Double height and width by nearest neighbour, with an optional convolution."""

    def __init__(self, channels: int, with_conv: bool):
        super().__init__()
        if with_conv:
            self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Return (b, channels, 2 h, 2 w) for x (b, channels, h, w)."""
        x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        return self.conv(x) if hasattr(self, "conv") else x


def make_resblock(in_channels: int, out_channels: int, dropout: float) -> nn.Module:
    """Return the residual block of a 2D network, with the arguments of `ResnetBlock`."""
    return ResnetBlock(in_channels, out_channels, dropout)


def make_conv(in_channels: int, out_channels: int, kernel_size: int) -> nn.Module:
    """Return a 2D convolution that keeps height and width, for an odd kernel."""
    return nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2)


def make_attn(channels: int, attn_type: str = "vanilla") -> nn.Module:
    """Return the attention layer between the pixels of an image.

    `linear` has neither a norm nor a residual.

    Raises:
        UserError: `attn_type` is unknown.
    """
    if attn_type not in ATTENTION:
        raise UserError(f"attn_type: '{attn_type}' is unknown; use one of {', '.join(map(repr, ATTENTION))}")
    return ATTENTION[attn_type](channels)


ATTENTION: dict[str, Callable[[int], nn.Module]] = {
    "vanilla": SpatialSelfAttention,
    "vanilla-xformers": lambda channels: SpatialSelfAttention(channels, attn_type="softmax-xformers"),
    "linear": lambda channels: LinearAttention(channels, heads=1, dim_head=channels),
    "none": lambda channels: nn.Identity(),
}


# ---------------------------------------------------------------- networks


class _Coder(nn.Module):
    """The base of encoder and decoder: arguments, and factories that subclasses replace."""

    def __init__(self, *, dropout: float, resamp_with_conv: bool, attn_type: str, use_linear_attn: bool):
        super().__init__()
        self.dropout, self.resamp_with_conv = dropout, resamp_with_conv
        self.attn_type = "linear" if use_linear_attn else attn_type

    def _make_attn(self, channels: int) -> nn.Module:
        return make_attn(channels, self.attn_type)

    def _make_resblock(self, in_channels: int, out_channels: int) -> nn.Module:
        return make_resblock(in_channels, out_channels, self.dropout)

    def _make_conv(self, in_channels: int, out_channels: int, kernel_size: int) -> nn.Module:
        return make_conv(in_channels, out_channels, kernel_size)

    def _make_mid(self, channels: int) -> nn.Module:
        mid = nn.Module()
        mid.block_1 = self._make_resblock(channels, channels)
        mid.attn_1 = self._make_attn(channels)
        mid.block_2 = self._make_resblock(channels, channels)
        return mid

    def _make_level(self, channels: int, out_channels: int, blocks: int, attention: bool) -> nn.Module:
        level = nn.Module()
        level.block, level.attn = nn.ModuleList(), nn.ModuleList()
        for index in range(blocks):
            level.block.append(self._make_resblock(out_channels if index else channels, out_channels))
            if attention:
                level.attn.append(self._make_attn(out_channels))
        return level


def _level_layers(level: nn.Module) -> Iterator[nn.Module]:
    for index, block in enumerate(level.block):
        yield block
        if len(level.attn):
            yield level.attn[index]


class Encoder(_Coder):
    """Image (b, in_channels, h, w) -> moments (b, 2 * z_channels, h / f, w / f).

    f is 2^(len(ch_mult) - 1).

    Args:
        ch, ch_mult: level i has ch * ch_mult[i] channels.
        resolution, attn_resolutions: levels have attention if their size, for images of `resolution` pixels, is among
            `attn_resolutions`. Images of any size work.
        resamp_with_conv: halve sizes by a convolution rather than a mean.
        double_z: return means and log-variances rather than z_channels values.
        attn_type: `vanilla`, `vanilla-xformers`, `linear` or `none`; `use_linear_attn` is short for `linear`.
        out_ch, give_pre_end, tanh_out: of the decoder, accepted since configurations share one set of arguments.

    Raises:
        UserError: an image's sides are not multiples of f.
    """

    def __init__(
        self,
        *,
        ch: int,
        z_channels: int,
        resolution: int,
        in_channels: int = 3,
        out_ch: int = 3,
        ch_mult: Sequence[int] = (1, 2, 4, 8),
        num_res_blocks: int,
        attn_resolutions: Sequence[int] = (),
        dropout: float = 0.0,
        resamp_with_conv: bool = True,
        double_z: bool = True,
        use_linear_attn: bool = False,
        attn_type: str = "vanilla",
        give_pre_end: bool = False,
        tanh_out: bool = False,
    ):
        super().__init__(
            dropout=dropout, resamp_with_conv=resamp_with_conv, attn_type=attn_type, use_linear_attn=use_linear_attn
        )
        self.space_factor = 2 ** (len(ch_mult) - 1)
        self.conv_in = make_conv(in_channels, ch, 3)
        channels = ch
        self.down = nn.ModuleList()
        for index, multiple in enumerate(ch_mult):
            attention = resolution // 2**index in attn_resolutions
            level = self._make_level(channels, ch * multiple, num_res_blocks, attention)
            channels = ch * multiple
            if index < len(ch_mult) - 1:
                level.downsample = Downsample(channels, resamp_with_conv)
            self.down.append(level)
        self.mid = self._make_mid(channels)
        self.norm_out = Normalize(channels)
        self.conv_out = make_conv(channels, 2 * z_channels if double_z else z_channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Return the moments (b, 2 * z_channels, h / f, w / f) of images x (b, in_channels, h, w).

        Raises:
            UserError: height or width is not a multiple of f.
        """
        height, width = x.shape[2:]
        if height % self.space_factor or width % self.space_factor:
            raise UserError(
                f"image size: height and width: got {height}x{width}; it must be multiples of {self.space_factor}"
            )
        h = self.conv_in(x)
        for level in self.down:
            for layer in _level_layers(level):
                h = layer(h)
            if hasattr(level, "downsample"):
                h = level.downsample(h)
        h = self.mid.block_2(self.mid.attn_1(self.mid.block_1(h)))
        return self.conv_out(silu(self.norm_out(h)))


class Decoder(_Coder):
    """Latent (b, z_channels, h, w) -> image (b, out_ch, f * h, f * w), mirroring the encoder.

    The decoder has one more block per level than the encoder.

    Args: those of the encoder, including `in_channels` and `double_z`, which have no effect here, and
        give_pre_end: return the last features, before norm and convolution.
        tanh_out: apply tanh to the image.
    """

    def __init__(
        self,
        *,
        ch: int,
        z_channels: int,
        resolution: int,
        in_channels: int = 3,
        out_ch: int = 3,
        ch_mult: Sequence[int] = (1, 2, 4, 8),
        num_res_blocks: int,
        attn_resolutions: Sequence[int] = (),
        dropout: float = 0.0,
        resamp_with_conv: bool = True,
        double_z: bool = True,
        use_linear_attn: bool = False,
        attn_type: str = "vanilla",
        give_pre_end: bool = False,
        tanh_out: bool = False,
    ):
        super().__init__(
            dropout=dropout, resamp_with_conv=resamp_with_conv, attn_type=attn_type, use_linear_attn=use_linear_attn
        )
        self.give_pre_end, self.tanh_out = give_pre_end, tanh_out
        self.space_factor = 2 ** (len(ch_mult) - 1)
        channels = ch * ch_mult[-1]
        self.conv_in = make_conv(z_channels, channels, 3)
        self.mid = self._make_mid(channels)
        levels = []
        for index, multiple in reversed(list(enumerate(ch_mult))):
            attention = resolution // 2**index in attn_resolutions
            level = self._make_level(channels, ch * multiple, num_res_blocks + 1, attention)
            channels = ch * multiple
            if index > 0:
                level.upsample = Upsample(channels, resamp_with_conv)
            levels.append(level)
        self.up = nn.ModuleList(reversed(levels))  # up[i] is the level of ch_mult[i], as in the encoder
        self.norm_out = Normalize(channels)
        self.conv_out = self._make_conv(channels, out_ch, 3)

    def forward(self, z: Tensor) -> Tensor:
        """Return the images (b, out_ch, f * h, f * w) of latents z (b, z_channels, h, w)."""
        return self._decode(z, lambda layer, h: layer(h))

    def get_last_layer(self) -> nn.Parameter:
        """Return the weight of the last layer, for losses that balance terms by its gradient."""
        return self.conv_out.weight

    def _decode(self, z: Tensor, call: Callable[[nn.Module, Tensor], Tensor]) -> Tensor:
        """Run the layers in order, each as `call(layer, input)`."""
        h = z
        for layer in self._body():
            h = call(layer, h)
        if self.give_pre_end:
            return h
        image = call(self.conv_out, silu(self.norm_out(h)))
        return image.tanh() if self.tanh_out else image

    def _body(self) -> Iterator[nn.Module]:
        yield from (self.conv_in, self.mid.block_1, self.mid.attn_1, self.mid.block_2)
        for level in reversed(self.up):
            yield from _level_layers(level)
            if hasattr(level, "upsample"):
                yield level.upsample
