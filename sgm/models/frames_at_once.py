"""Run the encoder or decoder of video on few frames at once, if memory does not hold all.

The numbers are the same. The coders compute in pieces themselves (`in_pieces`, see `vae_modules.piecewise`); here the
number of frames is set, or found by attempts that fill the memory, and the store of waiting pieces gets its size.
"""

import logging
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from sgm.errors import UserError
from sgm.modules.autoencoding import meta_device
from sgm.modules.autoencoding.clip import Chunk
from sgm.modules.autoencoding.waiting import WaitingRoom, in_host_memory

CHUNK = 2
"""The number of latent frames that are decoded, and normalized, together; an odd clip starts with one more."""

USABLE = 0.85
"""The share of a GPU's free memory that pieces of a clip may take; fragmentation needs the rest."""

logger = logging.getLogger(__name__)


class RunsInPieces(nn.Module):
    """The base of `VideoCoder`: runs its `encoder` and `decoder`.

    Attributes:
        group: the ranks that share a clip; None for one process.
        frames_at_once: number of video frames that go through each layer at once, without gradients: the same numbers
            in less memory. None: all of a clip to encode, and of a chunk to decode, unless a GPU's memory is full. From
            16 on, as many whole chunks as fit into this number are decoded at once. `use_frames_at_once` changes it.
        waiting_bytes: GPU memory for the pieces that wait between layers; the others wait in host memory. None: all
            free memory.
    """

    encoder: nn.Module
    decoder: nn.Module
    group: ProcessGroup | None = None
    frames_at_once: int | None = None
    waiting_bytes: int | None = None

    def use_frames_at_once(self, frames: int | None, waiting_bytes: int | None = None) -> None:
        """Pass `frames` video frames through each layer at once, from the next clip on.

        Args:
            frames: a multiple of the coders' `time_factor`, which is one latent frame. None: all frames.
            waiting_bytes: see the attribute.

        Raises:
            UserError: the number does not fit, or the coders do not support pieces.
        """
        if frames is not None:
            factor = self.decoder.time_factor
            if frames < 1 or frames % factor:
                raise UserError(
                    f"vae_frames_at_once: {frames} is not a positive multiple of {factor}; give {factor} or 8"
                )
            for coder in (self.encoder, self.decoder):
                if not hasattr(coder, "in_pieces"):
                    raise UserError(
                        f"vae_frames_at_once: {type(coder).__name__} runs on whole clips only; leave it out"
                    )
        self.frames_at_once, self.waiting_bytes = frames, waiting_bytes

    @property
    def chunks_at_once(self) -> int:
        """Return how many chunks of a clip are decoded at once."""
        return max((self.frames_at_once or 0) // (CHUNK * self.decoder.time_factor), 1)

    def traced_latents(self, latent_frames: int) -> int:
        """Return how many latent frames need as much memory to decode as a long clip.

        Args:
            latent_frames: of the long clip.
        """
        return CHUNK * max(2 * self.chunks_at_once, 3) + latent_frames % CHUNK

    def run_coder(self, coder: nn.Module, x: Tensor, chunk: Chunk, **options: Any) -> Tensor:
        """Return the output of the encoder or decoder for `x`, computed by `frames_at_once`.

        Args:
            x: (batch, channel, time, height, width), the frames of this rank.
            chunk: their place in the clip; a failed attempt does not change its tails.
            options: of the coder; with any, it runs on the whole chunk.
        """
        x = x.contiguous(memory_format=torch.channels_last_3d)
        if torch.is_grad_enabled() or options or not hasattr(coder, "in_pieces"):
            return coder(x, chunk, **options)
        if self.group is not None:  # no second attempt, which only some ranks would make
            if self.frames_at_once is None or x.shape[2] == 0:
                return coder(x, chunk)
            return self._in_pieces(coder, x, chunk, self.frames_at_once)
        # For another attempt. On a CPU none follows, since PyTorch does not report full memory there.
        tails = {} if meta_device.type_of(x) == "cpu" else dict(chunk.tails)
        while (result := self._attempt(coder, x, chunk)) is None:
            chunk.tails.clear()
            chunk.tails.update(tails)  # some were used, or are from the failed attempt
            torch.cuda.empty_cache()
        return result

    def _attempt(self, coder: nn.Module, x: Tensor, chunk: Chunk) -> Tensor | None:
        """Return the output, or None if memory is full; `frames_at_once` is then smaller.

        Raises:
            torch.OutOfMemoryError: `frames_at_once` cannot be smaller.
        """
        try:
            return self._by_parts(coder, x, chunk)
        except torch.OutOfMemoryError:
            least, tried = coder.time_factor, self.frames_at_once
            if tried is not None and tried <= least:
                raise
            frames = self.frames_at_once = 2 * least if tried is None or tried > 2 * least else least
        logger.warning(
            "the memory is too small for %s frames at once: the VAE continues with %d at a time", tried or "all", frames
        )
        return None

    def _by_parts(self, coder: nn.Module, x: Tensor, chunk: Chunk) -> Tensor:
        """Return the output of a chunk, all parts at once or one after the other."""
        frames = self.frames_at_once
        if frames is None or (self.chunks_at_once > 1 and 0 < len(chunk.parts) <= self.chunks_at_once):
            return coder(x, chunk)
        if len(chunk.parts) < 2:
            return self._in_pieces(coder, x, chunk, frames)
        last = len(chunk.parts) - 1
        parts = [
            replace(chunk, lead=chunk.lead and index == 0, last=chunk.last and index == last, parts=())
            for index in range(last + 1)
        ]
        pieces = x.split(chunk.parts, dim=2)
        return torch.cat([self._by_parts(coder, *each) for each in zip(pieces, parts, strict=True)], dim=2)

    def _in_pieces(self, coder: nn.Module, x: Tensor, chunk: Chunk, frames: int) -> Tensor:
        chunk.keep, steps = in_host_memory, frames // coder.time_factor
        return coder.in_pieces(x, chunk, steps, self._waiting_room(coder, x, steps))

    def _waiting_room(self, coder: nn.Module, x: Tensor, steps: int) -> WaitingRoom:
        """Return the store of waiting pieces.

        On a GPU it may use the free memory, except what the piece at work needs.
        """
        if self.waiting_bytes is not None or x.device.type != "cuda" or not torch.cuda.is_available():
            return WaitingRoom(self.waiting_bytes or 0)
        unused = torch.cuda.memory_reserved(x.device) - torch.cuda.memory_allocated(x.device)
        free = torch.cuda.mem_get_info(x.device)[0] + unused
        at_work = coder.piece_bytes(x, steps)
        return WaitingRoom(max(0, int(USABLE * free) - at_work))
