"""Vector quantization: each latent vector becomes the nearest code of a table."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sgm.errors import UserError
from sgm.modules.autoencoding.regularizers.base import AbstractQuantizer, Log, all_reduce_, processes, straight_through

LARGEST_TABLE = 2**24  # elements of a matrix with a row for each vector and a column for each code


class VectorQuantizer(AbstractQuantizer):
    """A codebook trained by gradient (van den Oord et al. 2017, arXiv:1711.00937, eq. 3).

    `vq_loss` moves codes towards their vectors, and with the factor `beta` vectors towards their codes.

    Args:
        n_e: number of codes.
        e_dim: channels of the latents.
        beta: weight of the commitment.
    """

    def __init__(self, n_e: int, e_dim: int, beta: float = 0.25):
        _check_size(n_e, e_dim)
        super().__init__(e_dim, e_dim, n_e)
        self.beta = beta
        self.embedding = nn.Embedding(n_e, e_dim)
        nn.init.uniform_(self.embedding.weight, -1 / n_e, 1 / n_e)

    def quantize(self, x: Tensor) -> tuple[Tensor, Tensor, Log]:
        codebook = self.embedding.weight.float()
        tokens = nearest(x, codebook)
        codes = F.embedding(tokens, codebook)
        loss = F.mse_loss(codes, x.detach()) + self.beta * F.mse_loss(x, codes.detach())
        return straight_through(codes, x), tokens, {"vq_loss": loss}

    def codes(self, tokens: Tensor) -> Tensor:
        return self.embedding(tokens)


class EMAVectorQuantizer(AbstractQuantizer):
    """A codebook of running means of vectors (van den Oord et al. 2017, appendix A).

    A code is the running mean of the vectors that were nearest to it. Forward passes in training mode with gradients
    update the means, from the vectors of all processes. A code that is nearest to hardly any vector is replaced by a
    vector of the batch, and so is every code that the first batch does not use, which fits the codebook to the latents
    at once. The update uses no random numbers: copies of the codebook stay equal, and a resumed run continues exactly.

    Args:
        n_embed: number of codes.
        embedding_dim: channels of the latents.
        beta: weight of the commitment, in `vq_loss`.
        decay: of the running means, per step.
        eps: least running number of vectors for which a code is updated.
        revival_threshold: a code is replaced if its running number of vectors is below this share of the mean over
            codes; 0: never.
    """

    def __init__(
        self,
        n_embed: int,
        embedding_dim: int,
        beta: float = 0.25,
        decay: float = 0.99,
        eps: float = 1e-5,
        revival_threshold: float = 0.1,
    ):
        _check_size(n_embed, embedding_dim)
        if not 0 <= decay < 1:
            raise UserError(f"EMAVectorQuantizer: decay: got {decay}; expected at least 0 and less than 1")
        super().__init__(embedding_dim, embedding_dim, n_embed)
        self.beta, self.decay, self.eps, self.revival_threshold = beta, decay, eps, revival_threshold
        self.register_buffer("embedding", torch.empty(n_embed, embedding_dim).uniform_(-1 / n_embed, 1 / n_embed))
        self.register_buffer("cluster_size", torch.zeros(n_embed))
        self.register_buffer("cluster_sum", torch.zeros(n_embed, embedding_dim))
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))

    def quantize(self, x: Tensor) -> tuple[Tensor, Tensor, Log]:
        tokens = nearest(x, self.embedding.float())
        codes = self.codes(tokens).float()
        # Without gradients this is not a step of the autoencoder, but the discriminator's on the same batch.
        if self.training and torch.is_grad_enabled():
            self._update(x.detach(), tokens)
        return straight_through(codes, x), tokens, {"vq_loss": self.beta * F.mse_loss(x, codes)}

    def codes(self, tokens: Tensor) -> Tensor:
        return F.embedding(tokens, self.embedding)

    @torch.no_grad()
    def _update(self, x: Tensor, tokens: Tensor) -> None:
        """Update the means by vectors `x` (n, dim) and their tokens (n,); replace dead codes.

        Equations 6 to 8 of the appendix: N ← γN + (1 − γ)n, m ← γm + (1 − γ)Σx, code = m/N.
        """
        size, total = _clusters(x, tokens, self.codebook_size)
        gathered = all_reduce_(torch.cat([size[:, None], total, self._candidates(x)], dim=1))
        size, total, candidates = gathered.split([1, self.dim, self.dim], dim=1)

        size = torch.lerp(size[:, 0], self.cluster_size, self.decay)
        total = torch.lerp(total, self.cluster_sum, self.decay)
        mean_size = size.mean()
        code = torch.where((size > self.eps)[:, None], total / size.clamp_min(self.eps)[:, None], self.embedding)

        dead = size < self.revival_threshold * mean_size
        self.embedding.copy_(torch.where(dead[:, None], candidates, code))
        self.cluster_size.copy_(torch.where(dead, mean_size, size))
        self.cluster_sum.copy_(torch.where(dead[:, None], mean_size * candidates, total))
        self.updates.add_(1)

    def _candidates(self, x: Tensor) -> Tensor:
        """Return one vector for each code (codes, dim), zeros where another process provides it.

        The vectors are spread over the batches of all processes. Their places are integer hashes of the code and the
        number of updates, read as fractions of 2^32.
        """
        code = torch.arange(self.codebook_size, device=x.device)
        place = ((code + self.updates * self.codebook_size) * 2654435769) % 2**32  # 2^32 / golden ratio: evenly spread
        rank = torch.distributed.get_rank() if processes() > 1 else 0
        here = place * processes() // 2**32 == rank
        vector = (place * processes() % 2**32) * len(x) // 2**32
        return x[vector] * here[:, None]


@torch.no_grad()
def nearest(x: Tensor, codebook: Tensor) -> Tensor:
    """Return the index of the row of `codebook` (codes, d) nearest to each row of `x` (n, d).

    The distance is Euclidean; the indices are int64 (n,).
    """
    half_squares = codebook.square().sum(1) / 2
    parts = x.split(_rows(len(codebook)))
    return torch.cat([torch.addmm(half_squares, part, codebook.T, alpha=-1).argmin(1) for part in parts])


def _clusters(x: Tensor, tokens: Tensor, codes: int) -> tuple[Tensor, Tensor]:
    """Return how many rows of `x` (n, d) each code has (codes,), and their sums (codes, d).

    Matrix products make the sums reproducible; atomic additions on a GPU would not.
    """
    size, total = x.new_zeros(codes), x.new_zeros(codes, x.shape[1])
    each = torch.arange(codes, device=x.device)
    for part, its_tokens in zip(x.split(_rows(codes)), tokens.split(_rows(codes)), strict=True):
        one_hot = (its_tokens == each[:, None]).to(x.dtype)
        size += one_hot.sum(1)
        total.addmm_(one_hot, part)
    return size, total


def _rows(codes: int) -> int:
    return max(1, LARGEST_TABLE // codes)


def _check_size(codes: int, dim: int) -> None:
    if min(codes, dim) < 1:
        raise UserError(f"vector quantization: {codes} codes of {dim} channels; expected at least 1 of both")
