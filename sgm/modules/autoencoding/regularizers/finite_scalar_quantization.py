"""Finite scalar quantization: every channel is rounded to one of a few levels."""

from collections.abc import Sequence
from math import prod

from torch import Tensor

from sgm.errors import UserError
from sgm.modules.autoencoding.regularizers.base import AbstractQuantizer, Log, straight_through


class FSQ(AbstractQuantizer):
    """Codes on a grid of levels (Mentzer et al. 2023, arXiv:2309.15505, section 3.1).

    The codebook is fixed, and the log has no penalty. The rounding is that of `vector_quantize_pytorch`: a channel of L
    levels takes the values -(L // 2), ..., (L - 1) // 2, divided by L // 2.

    Args:
        levels: number of levels of each channel, at least 3; the paper uses [8, 6, 5] for 2^8 codes, [8, 5, 5, 5] for
            2^10, [7, 5, 5, 5, 5] for 2^12, [8, 8, 8, 6, 5] for 2^14, [8, 8, 8, 5, 5, 5] for 2^16.
        dim: channels of the latents; default: len(levels) * num_codebooks, the number of quantized channels.
        num_codebooks: tokens at each place.
    """

    def __init__(self, levels: Sequence[int], dim: int | None = None, num_codebooks: int = 1):
        levels = list(levels)
        if not levels or not all(type(level) is int and level >= 3 for level in levels):
            raise UserError(f"FSQ: levels: got {levels}; expected whole numbers, each at least 3")
        if num_codebooks < 1:
            raise UserError(f"FSQ: num_codebooks: got {num_codebooks}; expected at least 1")
        code_dim = len(levels) * num_codebooks
        super().__init__(code_dim if dim is None else dim, code_dim, prod(levels))
        # Imported here, since the import takes seconds, which models with continuous latents need not spend.
        import vector_quantize_pytorch

        self.grid = vector_quantize_pytorch.FSQ(levels, num_codebooks=num_codebooks, keep_num_codebooks_dim=True)

    def quantize(self, x: Tensor) -> tuple[Tensor, Tensor, Log]:
        codes, tokens = (each.squeeze(0) for each in self.grid(x.unsqueeze(0)))
        tokens = tokens.long()
        if not self.tokens_shape:
            tokens = tokens.squeeze(-1)
        # The library's codes have the right gradient, but some are one ulp off the grid.
        return straight_through(self.codes(tokens), codes), tokens, {}

    def codes(self, tokens: Tensor) -> Tensor:
        return self.grid.indices_to_codes(tokens.reshape(len(tokens), -1))

    @property
    def tokens_shape(self) -> tuple[int, ...]:
        return (self.grid.num_codebooks,) if self.grid.num_codebooks > 1 else ()
