"""Count floating-point operations and bytes, and their least time on an H100.

n tokens, d the width, L the layers, b clips of a batch. One layer, forward: 24·n·d² in products with weight matrices,
4·n²·d in the attention. U is one tensor of hidden states, b·n·d elements of two bytes.
"""

from dataclasses import dataclass

# One H100: FLOP/s that its libraries reach, and bytes/s of a copy.
PRODUCTS, ATTENTION, BANDWIDTH = 790e12, 490e12, 3.0e12
FUSED_UNITS = 14  # least number of U that a layer moves, with all possible fusion
BYTES = 2


@dataclass(frozen=True)
class Work:
    """A pass of a batch of `batch` clips of `tokens` tokens, text included."""

    layers: int
    width: int
    tokens: int
    batch: int = 2

    @property
    def products(self) -> int:
        """Return the FLOP of the products with weight matrices."""
        return self.batch * self.layers * 24 * self.tokens * self.width**2

    @property
    def attention(self) -> int:
        """Return the FLOP of the attention."""
        return self.batch * self.layers * 4 * self.tokens**2 * self.width

    @property
    def flops(self) -> int:
        return self.products + self.attention

    @property
    def unit(self) -> int:
        """Return the size of U in bytes."""
        return self.batch * self.tokens * self.width * BYTES

    @property
    def floor(self) -> float:
        """Return the least seconds of the pass on one H100."""
        elementwise = FUSED_UNITS * self.layers * self.unit / BANDWIDTH
        return self.products / PRODUCTS + self.attention / ATTENTION + elementwise


def attention_flops(batch: int, heads: int, tokens: int, head_dim: int) -> int:
    """Return the FLOP of one attention, forward: two products.

    The backward pass of kernels that keep no weights has five.
    """
    return 4 * batch * heads * tokens**2 * head_dim
