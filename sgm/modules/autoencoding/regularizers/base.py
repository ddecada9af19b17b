"""The base classes of regularizers and of quantizers."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from itertools import chain

import torch
import torch.distributed as dist
from einops import rearrange
from torch import Tensor, nn

from sgm.errors import UserError

Log = dict[str, Tensor]
"""Scalars by name: entries `..._loss` are penalties that the loss weighs, the others are only reported."""


class AbstractRegularizer(nn.Module, ABC):
    """Encoder output (batch, channel, ...) -> latent (batch, channel, ...) and a `Log`."""

    @abstractmethod
    def forward(self, z: Tensor) -> tuple[Tensor, Log]: ...

    def get_trainable_parameters(self) -> Iterator[nn.Parameter]:
        """Return the regularizer's parameters, trained with the autoencoder (such as a codebook)."""
        return self.parameters()


class AbstractQuantizer(AbstractRegularizer):
    """Latents made of the codes of a finite codebook, with straight-through gradients.

    Latents are (batch, dim, ...), with any number of further dimensions; tokens are int64 (batch, ...), or with several
    codebooks (batch, ..., codebooks). Quantization is in float32, under autocast too.

    The log has `perplexity`, the exponential of the entropy of the codes in this batch, and `codebook_use`, the share
    of the codes that this batch uses; both count the samples of this process.

    Args:
        dim: channels of the latents.
        code_dim: numbers that are quantized for each token; if it differs from `dim`, linear layers convert.
        codebook_size: number of codes.
    """

    def __init__(self, dim: int, code_dim: int, codebook_size: int):
        super().__init__()
        self.dim, self.codebook_size = dim, codebook_size
        projected = dim != code_dim
        self.project_in = nn.Linear(dim, code_dim) if projected else nn.Identity()
        self.project_out = nn.Linear(code_dim, dim) if projected else nn.Identity()

    @abstractmethod
    def quantize(self, x: Tensor) -> tuple[Tensor, Tensor, Log]:
        """Return the codes of vectors, their tokens and penalties.

        Args:
            x: float32 (n, code_dim).

        Returns:
            Codes shaped like `x`, differentiable by `x`; tokens (n,) or (n, codebooks); penalties.
        """

    @abstractmethod
    def codes(self, tokens: Tensor) -> Tensor:
        """Return the codes (n, code_dim) of tokens (n,) or (n, codebooks)."""

    def forward(self, z: Tensor) -> tuple[Tensor, Log]:
        """Return the quantized latents (batch, dim, ...) of `z`, and the log.

        Raises:
            UserError: the encoder has another number of channels.
        """
        latent, tokens, log = self._quantize(z)
        return latent, log | usage(tokens, self.codebook_size)

    @torch.no_grad()
    def encode_indices(self, z: Tensor) -> Tensor:
        """Return the tokens of the encoder output (batch, dim, ...)."""
        return self._quantize(z)[1]

    def decode_indices(self, tokens: Tensor) -> Tensor:
        """Return the latents (batch, dim, ...) of tokens, equal to those of `forward`."""
        extra = self.tokens_shape
        latent = self.project_out(self.codes(tokens.reshape(-1, *extra)).to(self._dtype))
        return _channels_second(latent, tokens.shape[: tokens.ndim - len(extra)])

    @property
    def tokens_shape(self) -> tuple[int, ...]:
        """Return the shape of the tokens of one place: () for one, (codebooks,) for several."""
        return ()

    def _quantize(self, z: Tensor) -> tuple[Tensor, Tensor, Log]:
        if z.shape[1] != self.dim:
            raise UserError(f"{type(self).__name__}: the encoder has {z.shape[1]} channels; expected {self.dim}")
        shape = z.shape[:1] + z.shape[2:]
        x = self.project_in(rearrange(z, "b d ... -> (b ...) d"))
        with torch.autocast(z.device.type, enabled=False):
            codes, tokens, log = self.quantize(x.float())
        latent = self.project_out(codes.to(z.dtype))
        return _channels_second(latent, shape), tokens.reshape(shape + self.tokens_shape), log

    @property
    def _dtype(self) -> torch.dtype:
        entries = (entry.dtype for entry in chain(self.parameters(), self.buffers()) if entry.is_floating_point())
        return next(entries, torch.float32)


def _channels_second(x: Tensor, shape: torch.Size) -> Tensor:
    """Return the rows of (n, d) as (batch, d, ...), for the shape (batch, ...)."""
    return x.reshape(*shape, x.shape[-1]).movedim(-1, 1)


def straight_through(quantized: Tensor, x: Tensor) -> Tensor:
    """Return `quantized` with the gradient of `x` (Bengio et al. 2013, arXiv:1308.3432)."""
    return quantized.detach() + (x - x.detach())


@torch.no_grad()
def usage(tokens: Tensor, codebook_size: int) -> Log:
    """Return the perplexity of tokens and the share of codes they use.

    See `AbstractQuantizer`.
    """
    tokens = tokens.flatten()
    counts = torch.zeros(codebook_size, dtype=torch.int64, device=tokens.device)
    counts.scatter_add_(0, tokens, torch.ones_like(tokens))
    shares = counts / tokens.numel()
    return {"perplexity": torch.special.entr(shares).sum().exp(), "codebook_use": (counts > 0).float().mean()}


def measure_perplexity(predicted_indices: Tensor, num_centroids: int) -> tuple[Tensor, Tensor]:
    """Return the perplexity of tokens of any shape, and the number of codes that they use."""
    report = usage(predicted_indices, num_centroids)
    return report["perplexity"], (report["codebook_use"] * num_centroids).round()


def all_reduce_(x: Tensor) -> Tensor:
    """Return the sum over all processes, computed in place and without a gradient."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(x)
    return x


def processes() -> int:
    """Return the number of processes; 1 without torch.distributed."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
