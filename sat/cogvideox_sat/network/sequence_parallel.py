"""Sequence parallelism: each process of a group holds a share of a clip's tokens.

The method is Ulysses (arXiv:2309.14509). Most operations of a layer treat each token separately. Attention does not:
before it, processes exchange tokens for heads, so that each process has all tokens of some heads; after it, they
exchange them back. Shares and heads need not be equal. Nothing else is exchanged between layers; the small output of
the last layer is gathered.
Shapes: b batch, h heads of e channels, n tokens of the call, text first; h_r and n_r are those of rank r.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cogvideox_sat.configuration.video_layout import check_shares
from cogvideox_sat.parallel.torch_internals import group_named
from sgm.context_parallel import all_gather_uneven, split_evenly


@dataclass(frozen=True)
class TokenShare:
    """The tokens and heads of a call that each process of a group has.

    Attributes:
        tokens, heads: how many each rank has, in the order of ranks.
        text: number of text tokens among all tokens.
        rank: rank of this process.
        group: name of the group.
    """

    tokens: tuple[int, ...]
    heads: tuple[int, ...]
    text: int
    rank: int
    group: str

    @classmethod
    def of(cls, tokens: int, text: int, heads: int, group: dist.ProcessGroup) -> "TokenShare":
        """Return the division of a call's tokens over a group.

        Raises:
            UserError: a process would have no token or no head.
        """
        size = group.size()
        check_shares(size, "attention heads", heads)
        check_shares(size, "tokens", tokens)
        shares = tuple(split_evenly(tokens, size)), tuple(split_evenly(heads, size))
        return cls(*shares, text, group.rank(), group.group_name)

    @property
    def first(self) -> int:
        """Return the index of this process's first token."""
        return sum(self.tokens[: self.rank])

    def text_of(self, rank: int) -> int:
        """Return how many of a rank's tokens are text."""
        return min(max(self.text - sum(self.tokens[:rank]), 0), self.tokens[rank])

    @property
    def own_text(self) -> int:
        """Return how many of this process's tokens are text."""
        return self.text_of(self.rank)

    def own_tokens(self, hidden: Tensor) -> Tensor:
        """Return a copy of this process's share of all tokens (b, n, d)."""
        return hidden.narrow(1, self.first, self.tokens[self.rank]).clone()

    def own_rows(self, table: Tensor) -> Tensor:
        """Return the rows of a table (video tokens, ...) for this process's tokens."""
        return table.narrow(0, max(self.first - self.text, 0), self.tokens[self.rank] - self.own_text)

    def gather_video(self, x: Tensor) -> Tensor:
        """Return the video tokens (b, v, f) of all processes, given this one's (b, v_r, f).

        The gradient assumes that every process computes the whole loss: the mean over the group of a parameter's
        gradients is the gradient of that loss.
        """
        counts = [tokens - self.text_of(rank) for rank, tokens in enumerate(self.tokens)]
        return gather_tokens(x, counts, self.rank, self.group)

    def attend(self, kernel: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Return full attention with `kernel`, for q, k, v (b, h, n_r, e) of this process.

        The same kernel always gives the same function. Keyword arguments are passed to the kernel.
        """
        return _spread(self, kernel)


@lru_cache(maxsize=64)  # a new function would make a compiler compile again
def _spread(share: TokenShare, kernel: Callable[..., Tensor]) -> Callable[..., Tensor]:
    places = share.tokens, share.heads, share.rank, share.group

    def attend(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        q, k, v = tokens_to_heads([q, k, v], *places).unbind()
        return heads_to_tokens(kernel(q, k, v, **options)[None], *places)[0]

    return attend


# ---------------------------------------------------------------------------------------------------------------------
# The exchange, as custom operators, which a compiler does not trace into.
# ---------------------------------------------------------------------------------------------------------------------


@torch.library.custom_op("cogvideox::tokens_to_heads", mutates_args=())
def tokens_to_heads(
    parts: Sequence[Tensor], tokens: Sequence[int], heads: Sequence[int], rank: int, group: str
) -> Tensor:
    """Return all tokens of this process's heads, given all heads of its tokens.

    Args:
        parts: tensors (b, h, n_r, e).
        tokens, heads, rank, group: see `TokenShare`.

    Returns:
        (parts, b, h_r, n, e).
    """
    count, (b, _, own, e) = len(parts), parts[0].shape
    sent_sizes = [own * count * b * each * e for each in heads]
    received_sizes = [each * count * b * heads[rank] * e for each in tokens]
    sent = parts[0].new_empty(sum(sent_sizes))
    for block, first, each in zip(sent.split(sent_sizes), _starts(heads), heads, strict=True):
        block = block.view(own, count, b, each, e)
        for number, part in enumerate(parts):
            block[:, number] = part.narrow(1, first, each).permute(2, 0, 1, 3)
    received = _exchange(sent, sent_sizes, received_sizes, group)
    return received.view(sum(tokens), count, b, heads[rank], e).permute(1, 2, 3, 0, 4)


@torch.library.custom_op("cogvideox::heads_to_tokens", mutates_args=())
def heads_to_tokens(x: Tensor, tokens: Sequence[int], heads: Sequence[int], rank: int, group: str) -> Tensor:
    """Return all heads of this process's tokens: the inverse of `tokens_to_heads`.

    Args:
        x: (parts, b, h_r, n, e).

    Returns:
        (parts, b, h, n_r, e).
    """
    count, b, _, _, e = x.shape
    own = tokens[rank]
    sent_sizes = [each * count * b * heads[rank] * e for each in tokens]
    received_sizes = [own * count * b * each * e for each in heads]
    sent = x.permute(3, 0, 1, 2, 4).reshape(-1)
    received = _exchange(sent, sent_sizes, received_sizes, group)
    joined = x.new_empty(count, b, own, sum(heads), e)
    for block, first, each in zip(received.split(received_sizes), _starts(heads), heads, strict=True):
        joined.narrow(3, first, each).copy_(block.view(own, count, b, each, e).permute(1, 2, 0, 3, 4))
    return joined.transpose(2, 3)


def _starts(sizes: Sequence[int]) -> list[int]:
    return [sum(sizes[:number]) for number in range(len(sizes))]


def _exchange(sent: Tensor, sent_sizes: list[int], received_sizes: list[int], group: str) -> Tensor:
    received = sent.new_empty(sum(received_sizes))
    dist.all_to_all_single(received, sent, received_sizes, sent_sizes, group=group_named(group))
    return received


@torch.library.custom_op("cogvideox::gather_tokens", mutates_args=())
def gather_tokens(x: Tensor, tokens: Sequence[int], rank: int, group: str) -> Tensor:
    """Return the tokens (b, n, f) of all processes, given this one's (b, tokens[rank], f)."""
    return all_gather_uneven(x, tokens, group_named(group), dim=1)


@tokens_to_heads.register_fake
def _(parts: Sequence[Tensor], tokens: Sequence[int], heads: Sequence[int], rank: int, group: str) -> Tensor:
    b, _, _, e = parts[0].shape
    return parts[0].new_empty(sum(tokens), len(parts), b, heads[rank], e).permute(1, 2, 3, 0, 4)


@heads_to_tokens.register_fake
def _(x: Tensor, tokens: Sequence[int], heads: Sequence[int], rank: int, group: str) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[1], tokens[rank], sum(heads), x.shape[4]).transpose(2, 3)


@gather_tokens.register_fake
def _(x: Tensor, tokens: Sequence[int], rank: int, group: str) -> Tensor:
    return x.new_empty(x.shape[0], sum(tokens), x.shape[2])


def _keep_places(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.places = inputs[1:]


def _gradients_of_parts(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    return list(heads_to_tokens(gradient, *ctx.places).unbind()), *(None for _ in ctx.places)


def _gradient_of_heads(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    return tokens_to_heads(list(gradient.unbind()), *ctx.places), *(None for _ in ctx.places)


def _gradient_of_own(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    tokens, rank, _ = ctx.places
    own = gradient.narrow(1, sum(tokens[:rank]), tokens[rank])
    return own * len(tokens), *(None for _ in ctx.places)


# Each operator moves values without changing them, so that its gradient is the inverse move.
tokens_to_heads.register_autograd(_gradients_of_parts, setup_context=_keep_places)
heads_to_tokens.register_autograd(_gradient_of_heads, setup_context=_keep_places)
gather_tokens.register_autograd(_gradient_of_own, setup_context=_keep_places)
