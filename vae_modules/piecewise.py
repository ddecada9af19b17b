"""A coder run layer by layer over pieces of a clip in time: the numbers of the whole in a fraction of its memory.

Every layer goes through all pieces before the next one starts, so each norm knows the statistics of the whole: they are
summed up while the pieces come into being. What waits between two layers, and beside a block for its shortcut, waits in
a `WaitingRoom`; convolutions leave the next piece its causal frames as they do for the next chunk of a clip.

Where ranks share the frames, each has pieces of its own. Before a convolution goes through them, the ranks exchange
their last frames, so that none waits for another's pieces; these frames alone are normalized twice.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from sgm.modules.autoencoding.clip import Chunk, TailCache
from sgm.modules.autoencoding.waiting import Waiting, WaitingRoom
from vae_modules.layers import (
    CausalConv3d,
    Downsample3D,
    Norm,
    ResnetBlock3D,
    Upsample3D,
    left_bias,
    normalize_and_convolve,
)
from vae_modules.modulation import write_modulated_silu

MAPS = 7
"""Features of a piece, at the widest place, that are in memory at once. For the full size 5 to 6.2 are counted, with
the workspaces of convolutions."""

Layer = CausalConv3d | ResnetBlock3D | Downsample3D | Upsample3D


@dataclass
class Pieces:
    """The pieces of a clip.

    Attributes:
        waiting: the frames of each, between two layers.
        clip: where all of them lie in the clip, and the ranks that have its other frames.
        chunks: where each lies, for this rank.
        latents: the latent frames that belong to each, one each, for norms that are conditioned on them; or none.
        room: where the pieces wait.
        statistics: the sums of what waits, for the norm that comes next.
        offset: (channel,), is to be added to what waits; see `layers.left_bias`.
    """

    waiting: list[Waiting]
    clip: Chunk
    chunks: list[Chunk]
    latents: list[tuple[Tensor, ...]]
    room: WaitingRoom
    statistics: Tensor | None = None
    offset: Tensor | None = None

    def replace(self, step: Callable[[int, Waiting], Tensor], norm: Norm | None, offset: Tensor | None = None) -> None:
        """Put step(index, piece) in the place of each piece, and take the sums for the `norm` that follows, if any.

        Args:
            offset: (channel,), is to be added to each.
        """
        total = None
        for index in range(len(self.waiting)):
            y = step(index, self.waiting[index])
            if norm is not None:
                sums = norm.statistics(y, offset)
                total = sums if total is None else total + sums
            self.waiting[index] = self.room.keep(y)
            del y
        self.statistics, self.offset = None if norm is None else self.clip.total(total, norm.gather_norm), offset

    def exchange_tails(self, conv: CausalConv3d, of: Callable[[int], Tensor]) -> None:
        """Let the first piece have the frames before it, where another rank has them, and the next rank the last ones.

        Args:
            of: returns what the convolution will see of a piece.
        """
        count = conv.conv.kernel_size[0] - 1
        if self.clip.group is None or not count:
            return
        ends: list[Tensor] = []
        for index in reversed(range(len(self.waiting))):
            if sum(end.shape[2] for end in ends) < count:
                ends.insert(0, of(index)[:, :, -count:].clone())
        before = self.clip.tail_before(conv, torch.cat(ends, dim=2)[:, :, -count:], count)
        if before is not None:
            self.chunks[0].tails[conv] = before


@torch.no_grad()
def run(layers: Iterable[Layer], norm_out: Norm, conv_out: CausalConv3d, pieces: Pieces) -> Tensor:
    """Return what the layers and conv_out(norm_out(...)) make of the pieces, put together along time."""
    layers = list(layers)
    for layer, following in zip(layers, [*layers[1:], norm_out], strict=True):
        _run_layer(layer, pieces, _first_norm(following))
    pieces.exchange_tails(conv_out, lambda index: _normalized(norm_out, pieces, index))
    results = [
        normalize_and_convolve(norm_out, conv_out, [piece.take()], chunk, *z, statistics=pieces.statistics)
        for piece, chunk, z in zip(pieces.waiting, pieces.chunks, pieces.latents, strict=True)
    ]
    return torch.cat(results, dim=2)


def cut(x: Tensor, lengths: list[int], chunk: Chunk, latents: list[Tensor] | None, room: WaitingRoom) -> Pieces:
    """Return the pieces of `x` (batch, channel, time, height, width) that have so many frames each.

    Args:
        chunk: where `x` lies in its clip.
        latents: those of each piece, for norms that are conditioned on them.
        room: where pieces wait.
    """
    last, is_shared = len(lengths) - 1, chunk.group is not None
    tails: TailCache = {} if is_shared else chunk.tails  # those between ranks are exchanged beside the pieces
    chunks = [
        replace(
            chunk,
            group=None,
            tails=tails,
            lead=chunk.lead and index == 0,
            last=(chunk.last or is_shared) and index == last,
            keep=chunk.keep if index == last else torch.clone,  # the next piece comes at once
        )
        for index in range(len(lengths))
    ]
    z = [(each,) for each in latents] if latents else [()] * len(lengths)
    return Pieces([room.keep(piece) for piece in x.split(lengths, dim=2)], chunk, chunks, z, room)


def _normalized(norm: Norm, pieces: Pieces, index: int) -> Tensor:
    """Return what a norm makes of a piece, which goes on waiting."""
    x, z = pieces.waiting[index].copy(), pieces.latents[index]
    assert pieces.statistics is not None
    passes = norm.passes(pieces.statistics, x.dtype, pieces.chunks[index], *z, offset=pieces.offset)
    write_modulated_silu(x, x, *passes)
    return x


def _first_norm(layer: nn.Module) -> Norm | None:
    """The norm that the input of a layer goes through first."""
    if isinstance(layer, ResnetBlock3D):
        return layer.norm1
    return layer if isinstance(layer, Norm) else None


def _run_layer(layer: Layer, pieces: Pieces, norm: Norm | None) -> None:
    """Replace the pieces by what the layer makes of them; `norm` is what comes next."""
    if not isinstance(layer, ResnetBlock3D):
        if isinstance(layer, CausalConv3d):
            pieces.exchange_tails(layer, lambda index: pieces.waiting[index].copy())
        left = left_bias(layer.conv)
        pieces.replace(lambda index, piece: layer(piece.take(), pieces.chunks[index], biased=left is None), norm, left)
        return
    shortcuts: list[Waiting] = []
    before, offset = pieces.statistics, pieces.offset

    def first(index: int, piece: Waiting) -> Tensor:
        held = [piece.take()]
        shortcuts.append(pieces.room.keep(layer.shortcut(held[0], biased=False)))
        chunk, z = pieces.chunks[index], pieces.latents[index]
        return layer.first_round(held, chunk, *z, statistics=before, offset=offset)

    pieces.exchange_tails(layer.conv1, lambda index: _normalized(layer.norm1, pieces, index))
    pieces.replace(first, layer.norm2, left_bias(layer.conv1.conv))
    between = pieces.statistics

    def second(index: int, piece: Waiting) -> Tensor:
        chunk, z = pieces.chunks[index], pieces.latents[index]
        h = layer.second_round([piece.take()], chunk, *z, statistics=between)
        return layer.add_shortcut(h, shortcuts[index].take(), offset)

    pieces.exchange_tails(layer.conv2, lambda index: _normalized(layer.norm2, pieces, index))
    pieces.replace(second, norm)
