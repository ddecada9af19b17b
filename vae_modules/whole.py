"""Run a coder on all frames at once, without gradients, in few passes over large tensors.

Each layer passes a sum on that it has not taken (`Summands`), so that the next one adds while it reads.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from sgm.modules.autoencoding.clip import Chunk
from vae_modules.convolutions import CausalConv3d
from vae_modules.normalization import Norm, normalize_and_convolve
from vae_modules.resampling import Downsample3D, Upsample3D
from vae_modules.residual_block import ResnetBlock3D
from vae_modules.summands import Summands

Layer = CausalConv3d | ResnetBlock3D | Downsample3D | Upsample3D


@torch.no_grad()
def run(layers: Sequence[Layer], norm_out: Norm, conv_out: CausalConv3d, x: Tensor, chunk: Chunk, *z: Tensor) -> Tensor:
    """Return conv_out(norm_out(...)) of the layers' result.

    Args:
        layers: the first is a convolution, which does not overwrite `x`.
        x: (batch, channel, time, height, width).
        z: the latent, for norms that are conditioned on it.
    """
    summands = Summands(x)
    for layer in layers:
        summands = layer.run(summands, chunk, *z)
    held = [summands]
    del summands
    return normalize_and_convolve(norm_out, conv_out, held, chunk, *z, overwrite=True)
