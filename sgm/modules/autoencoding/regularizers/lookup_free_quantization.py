"""Lookup-free quantization: a token is the binary number of the signs of its channels."""

import torch
import torch.nn.functional as F
from torch import Tensor

from sgm.errors import UserError
from sgm.modules.autoencoding.regularizers.base import AbstractQuantizer, Log, all_reduce_, processes, straight_through


class LFQ(AbstractQuantizer):
    """Codes at the corners of a cube, all -1 and 1 (Yu et al. 2023, arXiv:2310.05737, sec. 3).

    `entropy_loss` is the mean entropy of each vector's code, minus `diversity_gamma` times the entropy of the codes of
    all vectors of all processes (MAGVIT-v2, eq. 5, in nats): each vector should have a clear code, and all codes should
    be used. A code c has a probability proportional to exp(-inv_temperature * |x - c|^2). Both entropies are exact; no
    table of vectors and codes is needed, since the probability is a product over the signs.

    Args:
        dim: channels of the latents; default: log2(codebook_size), the number of quantized channels.
        codebook_size: number of codes, a power of two; default: 2^dim.
        entropy_loss_weight: factor in `entropy_loss`.
        commitment_loss_weight: factor in `commitment_loss`, the mean squared distance from the codes; 0: not reported.
        diversity_gamma: see above.
        inv_temperature: see above.
    """

    def __init__(
        self,
        dim: int | None = None,
        codebook_size: int | None = None,
        entropy_loss_weight: float = 0.1,
        commitment_loss_weight: float = 0.0,
        diversity_gamma: float = 1.0,
        inv_temperature: float = 100.0,
    ):
        if codebook_size is None:
            if dim is None:
                raise UserError("LFQ: neither dim nor codebook_size is given; give one of them")
            codebook_size = 2**dim
        bits = codebook_size.bit_length() - 1
        if codebook_size < 2 or codebook_size != 2**bits:
            raise UserError(f"LFQ: codebook_size: got {codebook_size}; expected a power of two")
        super().__init__(bits if dim is None else dim, bits, codebook_size)
        self.bits = bits
        self.entropy_loss_weight, self.commitment_loss_weight = entropy_loss_weight, commitment_loss_weight
        self.diversity_gamma, self.inv_temperature = diversity_gamma, inv_temperature

    def quantize(self, x: Tensor) -> tuple[Tensor, Tensor, Log]:
        positive = x > 0
        codes = torch.where(positive, 1.0, -1.0)
        tokens = (positive.long() << self._places(x)).sum(1)
        each, batch = self.entropies(x)
        log = {"entropy_loss": self.entropy_loss_weight * (each - self.diversity_gamma * batch)}
        if self.commitment_loss_weight:
            log["commitment_loss"] = self.commitment_loss_weight * F.mse_loss(x, codes)
        return straight_through(codes, x), tokens, log

    def codes(self, tokens: Tensor) -> Tensor:
        return ((tokens[:, None] >> self._places(tokens)) & 1) * 2.0 - 1.0

    def entropies(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean entropy of each vector's code, and that of the codes of all vectors.

        Args:
            x: (n, bits).
        """
        # exp(-t |x - c|^2) over all codes c is a product over channels: +1 rather than -1 has the log odds 4 t x.
        odds = 4 * self.inv_temperature * x
        each = (F.softplus(-odds.abs()) + odds.abs() * torch.sigmoid(-odds.abs())).sum(1).mean()
        # The mean over vectors of the product of both halves of the channels equals a matrix product.
        left, right = (_joint(half) for half in odds.tensor_split([self.bits // 2], dim=1))
        probability = left.T @ right / len(x)
        # Only in training steps, which all processes take together; the number of other batches may differ by process.
        if self.training and torch.is_grad_enabled():
            # The gradient is that of this process's vectors: data parallel training takes the mean over processes.
            mean = all_reduce_(probability.detach().clone()) / processes()
            probability = probability + (mean - probability).detach()
        return each, -(probability * probability.clamp_min(torch.finfo(x.dtype).tiny).log()).sum()

    def _places(self, like: Tensor) -> Tensor:
        return torch.arange(self.bits - 1, -1, -1, device=like.device)


def _joint(odds: Tensor) -> Tensor:
    """Return the probability (n, 2^bits) of every combination of independent signs.

    Args:
        odds: log odds (n, bits) of the sign +1.
    """
    joint = odds.new_ones(len(odds), 1)
    for sign in torch.stack([-odds, odds]).sigmoid().unbind(2):  # (2, n): of -1, of 1
        joint = (joint[:, :, None] * sign.T[:, None]).flatten(1)
    return joint
