"""The I3D network, whose features the Fréchet video distance compares."""

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sgm.weights import assign_weights, module_weights, read_state_dict

SIZE = 224  # pixels per side of a frame
LEAST_FRAMES = 9  # the last pooling needs two steps in time, each of eight frames, rounded up
CLASSES = 400

# Output channels of the branches of each block: 1x1; 1x1 and 3x3; 1x1 and 3x3; 1x1 after pooling.
BLOCKS = {
    "Mixed_3b": (64, 96, 128, 16, 32, 32),
    "Mixed_3c": (128, 128, 192, 32, 96, 64),
    "Mixed_4b": (192, 96, 208, 16, 48, 64),
    "Mixed_4c": (160, 112, 224, 24, 64, 64),
    "Mixed_4d": (128, 128, 256, 24, 64, 64),
    "Mixed_4e": (112, 144, 288, 32, 64, 64),
    "Mixed_4f": (256, 160, 320, 32, 128, 128),
    "Mixed_5b": (256, 160, 320, 32, 128, 128),
    "Mixed_5c": (384, 192, 384, 48, 128, 128),
}
# Kernel and stride of the pooling before these blocks.
POOLING = {
    "Mixed_3b": ((1, 3, 3), (1, 2, 2)),
    "Mixed_4b": ((3, 3, 3), (2, 2, 2)),
    "Mixed_5b": ((2, 2, 2), (2, 2, 2)),
}


class Inception3D(nn.Module):
    """Inception network inflated to three dimensions (arXiv:1705.07750, figure 3).

    Carreira and Zisserman 2017. Video in [-1, 1], with at least 9 frames, gives the logits of Kinetics-400, averaged
    over time. Parameters have the names in the weight files `rgb_imagenet.pt` and `i3d_pretrained_400.pt`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.Conv3d_1a_7x7 = Unit(3, 64, kernel=7, stride=2)
        self.Conv3d_2b_1x1 = Unit(64, 64, kernel=1)
        self.Conv3d_2c_3x3 = Unit(64, 192, kernel=3)
        channels = 192
        for name, widths in BLOCKS.items():
            self.add_module(name, Mixed(channels, widths))
            channels = widths[0] + widths[2] + widths[4] + widths[5]
        self.logits = nn.Module()
        self.logits.conv3d = nn.Conv3d(channels, CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (batch, 400) of video (batch, 3, frames, 224, 224)."""
        x = max_pool_same(self.Conv3d_1a_7x7(x), (1, 3, 3), (1, 2, 2))
        x = self.Conv3d_2c_3x3(self.Conv3d_2b_1x1(x))
        for name in BLOCKS:
            if name in POOLING:
                x = max_pool_same(x, *POOLING[name])
            x = getattr(self, name)(x)
        x = F.avg_pool3d(x, (2, 7, 7), stride=1)
        return self.logits.conv3d(x).mean(dim=(2, 3, 4))


class Mixed(nn.Module):
    """Four branches whose outputs are concatenated along the channels.

    The attributes have the names in the weight files.

    Args:
        channels: input channels.
        widths: output channels, as in `BLOCKS`.
    """

    def __init__(self, channels: int, widths: Sequence[int]):
        super().__init__()
        self.b0 = Unit(channels, widths[0], kernel=1)
        self.b1a = Unit(channels, widths[1], kernel=1)
        self.b1b = Unit(widths[1], widths[2], kernel=3)
        self.b2a = Unit(channels, widths[3], kernel=1)
        self.b2b = Unit(widths[3], widths[4], kernel=3)
        self.b3b = Unit(channels, widths[5], kernel=1)

    def forward(self, x: Tensor) -> Tensor:
        pooled = max_pool_same(x, (3, 3, 3), (1, 1, 1))
        return torch.cat([self.b0(x), self.b1b(self.b1a(x)), self.b2b(self.b2a(x)), self.b3b(pooled)], dim=1)


class Unit(nn.Module):
    """Convolution with TensorFlow's "same" padding, norm and ReLU."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int, stride: int = 1):
        super().__init__()
        self.conv3d = nn.Conv3d(in_channels, out_channels, kernel, stride, bias=False)
        self.bn = nn.BatchNorm3d(out_channels, eps=1e-3, momentum=0.01)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv3d(pad_same(x, self.conv3d.kernel_size, self.conv3d.stride))))


def max_pool_same(x: Tensor, kernel: Sequence[int], stride: Sequence[int]) -> Tensor:
    """Return the maximum pooling with "same" padding.

    The padding is zeros, which are never larger than an activation after a ReLU.
    """
    return F.max_pool3d(pad_same(x, kernel, stride), kernel, stride)


def pad_same(x: Tensor, kernel: Sequence[int], stride: Sequence[int]) -> Tensor:
    """Pad x (batch, channels, t, h, w) with zeros so that ceil(size / stride) positions fit.

    If the padding is odd, the additional zero is at the end.
    """
    padding: list[int] = []
    for size, k, s in zip(x.shape[2:], kernel, stride, strict=True):
        total = max((-(-size // s) - 1) * s + k - size, 0)
        padding = [total // 2, total - total // 2, *padding]
    return F.pad(x, padding) if any(padding) else x


def load_inception3d(path: str | Path) -> Inception3D:
    """Return the network with the weights in a file, for evaluation.

    Raises:
        UserError: the file cannot be read or does not hold the weights of this network.
    """
    with torch.device("meta"):
        network = Inception3D()
    weights = module_weights(read_state_dict(path), what=str(path))
    # The files are older than PyTorch's batch counters, which evaluation does not use.
    counters = [name for name in network.state_dict() if name.endswith("num_batches_tracked")]
    weights = {name: value for name, value in weights.items() if name not in counters}
    assign_weights(network, weights, what=f"{path} (I3D)", allow_missing=counters, device="cpu")
    for unit in network.modules():
        if isinstance(unit, nn.BatchNorm3d):
            unit.num_batches_tracked = None
    return network.eval().requires_grad_(False)


def prepare(frames: Tensor) -> Tensor:
    """Return frames (t, 3, h, w) in [0, 1] as input (1, 3, t, 224, 224) in [-1, 1]."""
    frames = F.interpolate(frames, (SIZE, SIZE), mode="bilinear", align_corners=False)
    return (2 * frames - 1).transpose(0, 1)[None]
