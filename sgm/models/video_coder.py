"""Encode and decode video with a causal autoencoder, at once or chunk by chunk.

Several processes can share a clip.
"""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sgm.context_parallel import (
    all_gather_integer,
    broadcast,
    gather_frames,
    group_rank,
    group_size,
    split_evenly,
    split_frames,
    sum_over_ranks,
)
from sgm.errors import UserError
from sgm.models.frames_at_once import CHUNK, RunsInPieces
from sgm.modules.autoencoding import tiling
from sgm.modules.autoencoding.clip import Chunk, TailCache
from sgm.modules.autoencoding.distributions import DiagonalGaussianDistribution
from sgm.modules.autoencoding.regularizers import DiagonalGaussianRegularizer

Clip = defaultdict[int, TailCache]
"""The tails of each tile, from one chunk of a clip to the next."""


def decoding_schedule(latent_frames: int) -> list[int]:
    """Return the number of latent frames of each chunk of a clip: 2, or 3 in an odd first one.

    A clip of 2k+1 latent frames starts with the frame that stands alone in time, and gives 8k+1 frames; a clip of 2k
    has no such frame, and gives 8k. The schedule is fixed, since normalization statistics of chunks affect the result.
    """
    if latent_frames < 1:
        raise UserError(f"latent frames: expected at least 1, got {latent_frames}")
    if latent_frames == 1:
        return [1]
    return [CHUNK + latent_frames % CHUNK] + [CHUNK] * (latent_frames // CHUNK - 1)


class VideoCoder(RunsInPieces):
    """Encodes and decodes video by the `encoder`, `decoder` and `regularization` of a class.

    Video is (batch, channel, time, height, width) in [-1, 1], latents are (batch, z_channels, time, height, width).

    With a context parallel `group` the frames of each call are spread over its ranks (see `split_frames`). Every rank
    makes the same calls. Frames are divided in units of one latent frame, as evenly as possible with larger shares
    first; the first frame of the clip is a unit by itself. With `input_cp` a call takes this rank's share, otherwise
    every rank passes the whole; `output_cp` does the same for results.

    Attributes: those of `RunsInPieces`, and
        tile_size: encode and decode in overlapping tiles of this many pixels a side, for images that do not fit into
            memory; results then differ slightly. None: whole images. `use_tiles` changes it.
    """

    regularization: nn.Module
    tile_size: int | None = None
    _open_clip: tuple[tuple[int, ...], Clip] | None = None  # size and tails of a clip, between calls of `decode`

    def use_tiles(self, size: int | None) -> None:
        """Use tiles of `size` pixels a side from the next clip on; None: whole images."""
        self.tile_size = size

    def lay_out_weights(self) -> None:
        """Convert the weights of 3D convolutions on a GPU to the layout of their inputs.

        Otherwise cuDNN would convert the weights at each call. The method is for a VAE that is not trained.
        """
        for module in self.modules():
            if isinstance(module, nn.Conv3d) and module.weight.device.type != "cpu":
                module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last_3d)

    def get_last_layer(self) -> nn.Parameter:
        """Return the weight of the last layer, for losses that balance terms by its gradient."""
        return self.decoder.conv_out.conv.weight

    # ------------------------------------------------------------ encode

    def encode(
        self,
        x: Tensor,
        return_reg_log: bool = False,
        unregularized: bool = False,
        input_cp: bool = False,
        output_cp: bool = False,
        use_cp: bool = True,
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """Return the k+1 latent frames of a clip of 4k+1 frames, at an eighth of height and width.

        The regularizer always sees the whole clip, on every rank.

        Args:
            return_reg_log: return a pair of the latents and the regularizer's report.
            unregularized: return a pair of the encoder's output, the posterior's moments (batch, 2 * z_channels, ...),
                and an empty report.
            use_cp: False: this process encodes alone.

        Returns:
            The regularizer's result, for a Gaussian a sample with noise from the CPU generator (of the group's first
                rank).

        Raises:
            UserError: the clip's frame count, height or width does not fit.
        """
        if not use_cp:
            with self._alone():
                return self.encode(x, return_reg_log, unregularized)
        shares = self._shares_of_video(x, input_cp)
        if not input_cp:
            x = split_frames(x, self._frames(shares, lead=True), self.group)
        moments = self._encode(x, shares)
        if unregularized and output_cp:
            return moments, {}
        moments = gather_frames(moments, shares, self.group)
        latent, report = (moments, {}) if unregularized else self.regularize(moments)
        if output_cp:
            latent = split_frames(latent, shares, self.group)
        return (latent, report) if return_reg_log or unregularized else latent

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Keep this process from sharing frames with other processes within the block."""
        group, self.group = self.group, None
        try:
            yield
        finally:
            self.group = group

    def _shares_of_video(self, x: Tensor, input_cp: bool) -> list[int]:
        """Return the number of latent frames of each rank for the clip `x`.

        Args:
            input_cp: `x` is this rank's share of the clip.
        """
        time_factor, space_factor = self.encoder.time_factor, self.encoder.space_factor
        leading = int(group_rank(self.group) == 0 or not input_cp)
        frames, height, width = x.shape[2:]
        if (frames - leading) % time_factor or frames < leading or height % space_factor or width % space_factor:
            raise UserError(
                f"cannot encode {frames} frames of {height}x{width}; the number of frames must be "
                f"{time_factor}k{'+1' if leading else ''}, height and width multiples of {space_factor}"
            )
        return self._shares((frames - leading) // time_factor + leading, input_cp)

    def _encode(self, x: Tensor, shares: list[int]) -> Tensor:
        """Return the moments of this rank's frames."""

        def encode_tile(_: int, tile: Tensor) -> Tensor:
            lead = group_rank(self.group) == 0
            chunk = Chunk(lead, group=self.group, gather_norm=_gather_norm(shares))
            return self.run_coder(self.encoder, tile, chunk)

        factor = self.encoder.space_factor
        grid = self._tiles(x.shape[3] // factor, x.shape[4] // factor)
        return tiling.process(grid, x, encode_tile, factor=(factor, 1))

    def regularize(self, moments: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return latents and the regularizer's report, from the encoder's output of whole clips."""
        if self.group is None or not self.regularizes_places_alone:
            return self.regularization(moments)
        # Every rank draws, so that generators stay in the same state, and uses the first rank's noise.
        noise = DiagonalGaussianDistribution(moments).noise().to(moments.device)
        return self.regularization(moments, broadcast(noise, self.group))

    @property
    def regularizes_places_alone(self) -> bool:
        """Return whether the regularizer treats each place of a latent independently.

        Its penalties are then sums over places.
        """
        return isinstance(self.regularization, DiagonalGaussianRegularizer)

    def _regularize_share(self, moments: Tensor, shares: list[int]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the result of `regularize` for this rank's moments; the report is the clip's."""
        batch, channels, _, height, width = moments.shape
        whole = moments.new_empty((batch, channels, sum(shares), height, width), device="meta")
        noise = broadcast(DiagonalGaussianDistribution(whole).noise().to(moments.device), self.group)
        latent, report = self.regularization(moments, split_frames(noise, shares, self.group))
        return latent, {name: sum_over_ranks(value, self.group) for name, value in report.items()}

    # ------------------------------------------------------------ decode

    def decode(
        self,
        z: Tensor,
        input_cp: bool = False,
        output_cp: bool = False,
        use_cp: bool = True,
        clear_fake_cp_cache: bool = False,
        **decode_options: Any,
    ) -> Tensor:
        """Decode one chunk of a clip, to frames at eight times the height and width.

        An odd number 2k+1 of latent frames gives 8k+1 frames, an even number 2k gives 8k. The state for the next chunk
        is kept until a call with `clear_fake_cp_cache`, which marks the last chunk of the clip, or an exception.
        Normalization statistics cover the whole chunk, on any number of ranks.

        Args:
            use_cp: False: this process decodes alone.
            decode_options: passed to the decoder.

        Raises:
            UserError: the last call left a clip of another size unfinished.
        """
        if not use_cp:
            with self._alone():
                return self.decode(z, clear_fake_cp_cache=clear_fake_cp_cache, **decode_options)
        size = (z.shape[0], *z.shape[3:])
        (open_size, clip), self._open_clip = self._open_clip or (size, defaultdict(dict)), None
        if size != open_size:
            raise UserError(
                f"cannot decode a chunk of (batch, height, width) {size} after one of {open_size}; "
                "end the unfinished clip with clear_fake_cp_cache=True"
            )
        shares = self._shares(z.shape[2], input_cp)
        if not input_cp:
            z = split_frames(z, shares, self.group)
        lead = sum(shares) % 2 == 1
        own_lead = lead and group_rank(self.group) == 0
        frames = self._decode(z, clip, own_lead, clear_fake_cp_cache, gather_norm=True, **decode_options)
        if not clear_fake_cp_cache:
            self._open_clip = size, clip
        return frames if output_cp else gather_frames(frames, self._frames(shares, lead), self.group)

    def decode_chunks(self, z: Tensor) -> Iterator[Tensor]:
        """Yield the frames of a clip, (batch, channel, frames, height, width), chunk by chunk.

        The chunks are those of `decoding_schedule`; several are decoded at once if `frames_at_once` allows it. With
        context parallelism each rank decodes one chunk of every round, and all ranks yield the frames of the round. A
        consumer may stop early, if all ranks do.
        """
        schedule = decoding_schedule(z.shape[2])
        ranks, rank = group_size(self.group), group_rank(self.group)
        clip: Clip = defaultdict(dict)
        done = first = 0
        while first < len(schedule):
            together = self.chunks_at_once if self.group is None and not torch.is_grad_enabled() else 1
            parts = schedule[first : first + together * ranks]
            first += len(parts)
            shares = [sum(parts)] if together > 1 else parts + [0] * (ranks - len(parts))
            lead = shares[0] % 2 == 1
            start = done + sum(shares[:rank])
            done += sum(shares)
            chunk = z[:, :, start : start + shares[rank]]
            last = first == len(schedule)
            normed = tuple(parts) if together > 1 else ()
            frames = self._decode(chunk, clip, lead and rank == 0, last, gather_norm=False, parts=normed)
            if together > 1:
                yield from frames.split(self._frames(parts, lead), dim=2)
            else:
                yield gather_frames(frames, self._frames(shares, lead), self.group)

    def decode_at_once(
        self, z: Tensor, input_cp: bool = False, output_cp: bool = False, **decode_options: Any
    ) -> Tensor:
        """Return the 4k+1 frames of k+1 latent frames, decoded in one piece, as in training.

        On several ranks each norm's `gather_norm` decides whether its statistics cover the whole clip or, as in chunks,
        the rank's frames. `decode_options` go to the decoder.
        """
        shares = self._shares(z.shape[2], input_cp)
        if not input_cp:
            z = split_frames(z, shares, self.group)
        frames = self._decode_at_once(z, shares, **decode_options)
        return frames if output_cp else gather_frames(frames, self._frames(shares, lead=True), self.group)

    def _decode_at_once(self, z: Tensor, shares: list[int], **decode_options: Any) -> Tensor:
        """Return the frames of this rank's latent frames."""
        lead = group_rank(self.group) == 0
        return self._decode(z, defaultdict(dict), lead, last=True, gather_norm=_gather_norm(shares), **decode_options)

    def _decode(
        self,
        z: Tensor,
        clip: Clip,
        lead: bool,
        last: bool,
        gather_norm: bool | None,
        parts: tuple[int, ...] = (),
        **decode_options: Any,
    ) -> Tensor:
        def decode_tile(index: int, tile: Tensor) -> Tensor:
            chunk = Chunk(lead, clip[index], last, self.group, gather_norm, parts=parts)
            return self.run_coder(self.decoder, tile, chunk, **decode_options)

        grid = self._tiles(*z.shape[3:])
        return tiling.process(grid, z, decode_tile, factor=(1, self.decoder.space_factor))

    # ------------------------------------------------------------ shared

    def _shares(self, latent_frames: int, input_cp: bool) -> list[int]:
        """Return the number of latent frames of each rank.

        Args:
            latent_frames: of the whole clip, or with `input_cp` of this rank.
        """
        ranks = group_size(self.group)
        if self.group is None or not input_cp:
            return split_evenly(latent_frames, ranks)
        return all_gather_integer(latent_frames, self.group)

    def _frames(self, shares: list[int], lead: bool) -> list[int]:
        """Return the number of video frames of each rank's latent frames."""
        factor = self.decoder.time_factor
        alone = [int(lead and rank == 0) for rank in range(len(shares))]
        return [factor * (share - first) + first for share, first in zip(shares, alone, strict=True)]

    def _tiles(self, height: int, width: int) -> list[tiling.Tile]:
        """Return the tiles of a latent image."""
        if self.tile_size is None:
            return tiling.cover(height, width, max(height, width))
        size, rest = divmod(self.tile_size, self.decoder.space_factor)
        if size < 1 or rest:
            raise UserError(f"tile_size: {self.tile_size} is not a positive multiple of {self.decoder.space_factor}")
        return tiling.cover(height, width, size)


def _gather_norm(shares: list[int]) -> bool | None:
    """Return whether norms take statistics of all ranks' frames; None: each norm's setting.

    A single frame has the same statistics either way, and ranks without frames have none of their own.
    """
    return True if sum(shares) == 1 else None
