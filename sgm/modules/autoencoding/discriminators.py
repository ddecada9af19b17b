"""Patch discriminators: one logit per patch of an image or clip, high for real ones."""

from collections.abc import Callable, Iterator
from math import gcd

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sgm.context_parallel import all_reduce_sum, group_size
from sgm.errors import UserError


class NLayerDiscriminator(nn.Module):
    """PatchGAN (Isola et al. 2017, arXiv:1611.07004): images -> logits (batch, 1, ., .).

    Images are (batch, input_nc, h, w), with at least 3 * 2**n_layers pixels a side. `n_layers` convolutions halve the
    image, and two more keep its size; with 3 layers a logit sees 70x70 pixels.

    Args:
        ndf: channels after the first layer; each layer doubles them, up to eight times `ndf`.
        use_actnorm: normalize by `ActNorm` instead of batch normalization.

    Raises:
        UserError: (on a forward pass) the image is too small.
    """

    dims = 2

    def __init__(self, input_nc: int = 3, ndf: int = 64, n_layers: int = 3, use_actnorm: bool = False):
        super().__init__()
        self.smallest_side = _smallest_side(n_layers)

        def conv(in_channels: int, out_channels: int, stride: int, bias: bool) -> nn.Conv2d:
            return nn.Conv2d(in_channels, out_channels, kernel_size=4, stride=stride, padding=1, bias=bias)

        norm = ActNorm if use_actnorm else nn.BatchNorm2d
        self.main = nn.Sequential(*_layers(conv, norm, input_nc, ndf, n_layers, bias=use_actnorm))
        self.apply(weights_init)

    def forward(self, x: Tensor) -> Tensor:
        _check_size(x, self.smallest_side)
        return self.main(x)


class NLayerDiscriminator3D(nn.Module):
    """PatchGAN for clips (batch, input_nc, time, h, w) -> logits (batch, 1, ., ., .).

    Every convolution sees three frames. Convolutions that halve space also halve time, rounding up, so that any number
    of frames works; with 3 layers a logit sees 47 frames. An image is a clip of one frame. Normalization is by groups
    of channels within one clip, so that a logit does not depend on the other clips of the batch or their ranks.

    Args: those of `NLayerDiscriminator`.

    Raises:
        UserError: (on a forward pass) the frames are too small.
    """

    dims = 3

    def __init__(self, input_nc: int = 3, ndf: int = 64, n_layers: int = 3):
        super().__init__()
        self.smallest_side = _smallest_side(n_layers)

        def conv(in_channels: int, out_channels: int, stride: int, bias: bool) -> nn.Conv3d:
            return nn.Conv3d(in_channels, out_channels, kernel_size=(3, 4, 4), stride=stride, padding=1, bias=bias)

        def norm(channels: int) -> nn.GroupNorm:
            return nn.GroupNorm(gcd(32, channels), channels)

        self.main = nn.Sequential(*_layers(conv, norm, input_nc, ndf, n_layers, bias=True))
        self.apply(weights_init)

    def forward(self, x: Tensor) -> Tensor:
        _check_size(x, self.smallest_side)
        return self.main(x)


class ActNorm(nn.Module):
    """A scale and a shift for each channel (Kingma & Dhariwal 2018, arXiv:1807.03039, 3.1).

    The first training batch, over all processes, sets the scale and the shift such that its channels get mean 0 and
    variance 1; afterwards both are trained. `initialized` records this in the state dict.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.scale = nn.Parameter(torch.ones(1, channels, 1, 1))
        self.register_buffer("initialized", torch.tensor(0, dtype=torch.uint8))
        self._asked = False  # whether `initialized` was read; each read waits for the device

    def forward(self, x: Tensor) -> Tensor:
        if self.training and not self._asked:
            if not self.initialized:
                self._initialize(x)
            self._asked = True
        return self.scale * (x + self.loc)

    @torch.no_grad()
    def _initialize(self, x: Tensor) -> None:
        x = x.float()
        moments = torch.stack([x.mean((0, 2, 3)), x.square().mean((0, 2, 3))])
        world = dist.group.WORLD if dist.is_initialized() else None
        mean, square = all_reduce_sum(moments, world) / group_size(world)
        std = (square - mean.square()).clamp_min(0).sqrt()
        self.loc.copy_(-mean[:, None, None])
        self.scale.copy_(1 / (std + 1e-6)[:, None, None])
        self.initialized.fill_(1)


def _layers(
    conv: Callable[[int, int, int, bool], nn.Module],
    norm: Callable[[int], nn.Module],
    input_nc: int,
    ndf: int,
    n_layers: int,
    bias: bool,
) -> Iterator[nn.Module]:
    """Yield `n_layers` convolutions of stride 2, one of stride 1, and that of the logits.

    Args:
        conv: takes input channels, output channels, stride and bias.
        bias: whether convolutions before a norm have a bias.
    """
    yield conv(input_nc, ndf, 2, True)
    yield nn.LeakyReLU(0.2)
    channels = ndf
    for layer in range(1, n_layers + 1):
        wider = ndf * min(2**layer, 8)
        yield conv(channels, wider, 2 if layer < n_layers else 1, bias)
        yield norm(wider)
        yield nn.LeakyReLU(0.2)
        channels = wider
    yield conv(channels, 1, 1, True)


def _smallest_side(n_layers: int) -> int:
    # Each of the two kernels of size 4 and stride 1 takes one pixel from the image.
    return 3 * 2**n_layers


def _check_size(x: Tensor, smallest_side: int) -> None:
    height, width = x.shape[-2:]
    if min(height, width) < smallest_side:
        raise UserError(
            f"the discriminator needs images of at least {smallest_side}x{smallest_side} pixels, got {height}x{width}; "
            "for smaller images set fewer layers (disc_num_layers, or n_layers in discriminator_config)"
        )


def weights_init(layer: nn.Module) -> None:
    """Draw the weights of a convolution or a norm as in DCGAN.

    Radford et al. 2016, arXiv:1511.06434, section 4.
    """
    if isinstance(layer, nn.Conv2d | nn.Conv3d):
        nn.init.normal_(layer.weight, 0.0, 0.02)
    elif isinstance(layer, nn.BatchNorm2d | nn.GroupNorm):
        nn.init.normal_(layer.weight, 1.0, 0.02)
        nn.init.zeros_(layer.bias)
