"""Run a coder layer by layer over pieces of a clip in time, in a fraction of the memory.

The results equal those of the whole clip. Every layer processes all pieces before the next layer starts, so that each
norm has the statistics of the whole clip; their sums are taken as pieces are made. Between two layers, and beside a
block for its shortcut, pieces wait in a `WaitingRoom`. Convolutions pass causal frames to the next piece as they do to
the next chunk of a clip.

If ranks share the frames, each has its own pieces. Before a convolution processes them, the ranks exchange their last
frames, so that no rank waits for another's pieces; only these frames are normalized twice.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from sgm.modules.autoencoding.clip import Chunk, TailCache
from sgm.modules.autoencoding.waiting import Waiting, WaitingRoom
from vae_modules.convolutions import CausalConv3d
from vae_modules.normalization import Norm, normalize_and_convolve, own_statistics
from vae_modules.passes.modulation import write_modulated_silu
from vae_modules.passes.products import written
from vae_modules.residual_block import ResnetBlock3D
from vae_modules.summands import Summands, with_repeated_frames
from vae_modules.whole import Layer

MAPS = 7
"""Number of feature maps of a piece, at the widest layer, in memory at once. The full size has 5 to 6.2, counted with
the workspaces of convolutions."""


@dataclass
class Pieces:
    """The pieces of a clip.

    Attributes:
        waiting: the frames of each piece, between two layers.
        clip: the place of all pieces in the clip, and the ranks with its other frames.
        chunks: the place of each piece, for this rank.
        latents: the latent frames of each piece, for norms that are conditioned on them; or none.
        room: the store of pieces.
        statistics: the sums of the waiting frames, for the next norm.
        offset: (channel,), still to be added to the waiting frames; see `convolutions.left_bias`.
    """

    waiting: list[Waiting]
    clip: Chunk
    chunks: list[Chunk]
    latents: list[tuple[Tensor, ...]]
    room: WaitingRoom
    statistics: Tensor | None = None
    offset: Tensor | None = None

    def replace(self, step: Callable[[int, Waiting], Summands], norm: Norm | None) -> None:
        """Replace each piece by step(index, piece), and take the sums for the next `norm`.

        Args:
            norm: None: no sums are taken.
        """
        total = None
        for index, chunk in enumerate(self.chunks):
            summands = step(index, self.waiting[index])
            if norm is not None:
                sums = own_statistics(summands, norm, chunk)
                total = sums if total is None else total + sums
            elif summands.other is not None:
                summands = Summands(summands.added(chunk))
            x = written(summands.x)
            if summands.repeats:
                x = with_repeated_frames(x, summands.frames, int(chunk.lead))
            self.waiting[index], self.offset = self.room.keep(x), summands.offset
            del summands, x
        self.statistics = None if norm is None else self.clip.total(total, norm.gather_norm)

    def exchange_tails(self, conv: CausalConv3d, of: Callable[[int], Tensor]) -> None:
        """Exchange last frames with the other ranks: for the first piece, and for the next rank.

        Args:
            of: returns the convolution's input of a piece.
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
    """Return conv_out(norm_out(...)) of the layers' results, concatenated along time."""
    layers = list(layers)
    for layer, following in zip(layers, [*layers[1:], norm_out], strict=True):
        _run_layer(layer, pieces, _first_norm(following))
    pieces.exchange_tails(conv_out, lambda index: _normalized(norm_out, pieces, index))
    results = [
        normalize_and_convolve(norm_out, conv_out, [Summands(piece.take())], chunk, *z, statistics=pieces.statistics)
        for piece, chunk, z in zip(pieces.waiting, pieces.chunks, pieces.latents, strict=True)
    ]
    return torch.cat(results, dim=2)


def cut(x: Tensor, lengths: list[int], chunk: Chunk, latents: list[Tensor] | None, room: WaitingRoom) -> Pieces:
    """Return the pieces of `x` (batch, channel, time, height, width) with `lengths` frames.

    Args:
        chunk: the place of `x` in its clip.
        latents: those of each piece, for norms that are conditioned on them.
        room: the store of pieces.
    """
    last, is_shared = len(lengths) - 1, chunk.group is not None
    tails: TailCache = {} if is_shared else chunk.tails  # ranks exchange their tails separately
    chunks = [
        replace(
            chunk,
            group=None,
            tails=tails,
            lead=chunk.lead and index == 0,
            last=(chunk.last or is_shared) and index == last,
            keep=chunk.keep if index == last else torch.clone,  # the next piece follows immediately
        )
        for index in range(len(lengths))
    ]
    z = [(each,) for each in latents] if latents else [()] * len(lengths)
    return Pieces([room.keep(piece) for piece in x.split(lengths, dim=2)], chunk, chunks, z, room)


def _normalized(norm: Norm, pieces: Pieces, index: int) -> Tensor:
    """Return a norm's output for a piece, which stays stored."""
    x, z = pieces.waiting[index].copy(), pieces.latents[index]
    assert pieces.statistics is not None
    modulation = norm.modulation(pieces.statistics, x.dtype, pieces.chunks[index], *z, offset=pieces.offset)
    write_modulated_silu(x, x, *modulation)
    return x


def _first_norm(layer: nn.Module) -> Norm | None:
    """Return the first norm that processes the input of a layer."""
    if isinstance(layer, ResnetBlock3D):
        return layer.norm1
    return layer if isinstance(layer, Norm) else None


def _run_layer(layer: Layer, pieces: Pieces, norm: Norm | None) -> None:
    """Replace the pieces by the layer's outputs; `norm` is the next one."""
    if not isinstance(layer, ResnetBlock3D):
        if isinstance(layer, CausalConv3d):
            pieces.exchange_tails(layer, lambda index: pieces.waiting[index].copy())
        offset = pieces.offset
        pieces.replace(
            lambda index, piece: layer.run(Summands(piece.take(), offset=offset), pieces.chunks[index]), norm
        )
        return
    shortcuts: list[Waiting] = []
    before, offset = pieces.statistics, pieces.offset
    assert before is not None

    def first(index: int, piece: Waiting) -> Summands:
        chunk, z = pieces.chunks[index], pieces.latents[index]
        held = [Summands(piece.take(), offset=offset)]
        shortcuts.append(pieces.room.keep(layer.shortcut(held[0].x, may_stay_unwritten=False)))
        return layer.first_round(held, chunk, *z, statistics=before)

    pieces.exchange_tails(layer.conv1, lambda index: _normalized(layer.norm1, pieces, index))
    pieces.replace(first, layer.norm2)
    between, bias = pieces.statistics, pieces.offset

    def second(index: int, piece: Waiting) -> Summands:
        chunk, z = pieces.chunks[index], pieces.latents[index]
        h = layer.second_round([Summands(piece.take(), offset=bias)], chunk, *z, statistics=between)
        return layer.with_shortcut(h, shortcuts[index].take(), offset)

    pieces.exchange_tails(layer.conv2, lambda index: _normalized(layer.norm2, pieces, index))
    pieces.replace(second, norm)
