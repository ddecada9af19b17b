"""Random numbers of training: one stream for the process, or streams for each sample.

By default numbers come from the global generators, in the order of the draws. Within `per_sample` every sample of a
batch has its own generators, one for each purpose. Its numbers then depend on its seed alone, not on the other samples
of the batch, the number of processes or earlier draws: a resumed run, a run on more processes and a run from cached
latents use the same numbers.
"""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from sgm.seeds import hashed_seed


class SampleStreams:
    """The generators of a batch, created on first use."""

    def __init__(self, seeds: Sequence[int]):
        self.seeds = list(seeds)
        self.generators: dict[tuple[int, str, str], torch.Generator] = {}

    def of_batch(self, count: int, purpose: str, device: torch.device | str) -> Iterator[torch.Generator]:
        """Yield the generators of the samples, in order, on `device`."""
        if count != len(self.seeds):
            raise ValueError(f"{purpose}: got {count} samples, but {len(self.seeds)} seeds")
        for sample, seed in enumerate(self.seeds):
            key = (sample, purpose, str(device))
            if key not in self.generators:
                self.generators[key] = torch.Generator(device).manual_seed(hashed_seed(seed, purpose))
            yield self.generators[key]


_streams: ContextVar[SampleStreams | None] = ContextVar("sample_streams", default=None)


@contextmanager
def per_sample(seeds: Sequence[int]) -> Iterator[None]:
    """Draw from each sample's own generators within the block, for batches of `len(seeds)`.

    Raises:
        ValueError: (on a draw) the batch has another number of samples.
    """
    token = _streams.set(SampleStreams(seeds))
    try:
        yield
    finally:
        _streams.reset(token)


def normal(
    shape: Sequence[int],
    *,
    purpose: str,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Draw standard normal numbers (batch, ...)."""
    streams = _streams.get()
    if streams is None:
        return torch.randn(*shape, device=device, dtype=dtype)
    out = torch.empty(*shape, device=device, dtype=dtype)
    for sample, generator in zip(out, streams.of_batch(len(out), purpose, out.device), strict=True):
        sample.normal_(generator=generator)
    return out


def uniform(count: int, *, purpose: str, device: torch.device | str | None = None) -> Tensor:
    """Draw uniformly from [0, 1): float32 (count,)."""
    streams = _streams.get()
    if streams is None:
        return torch.rand(count, device=device)
    draws = [torch.rand((), generator=generator) for generator in streams.of_batch(count, purpose, "cpu")]
    return torch.stack(draws).to(device)


def integers(low: int, high: int, count: int, *, purpose: str) -> Tensor:
    """Draw uniformly from low, ..., high - 1: int64 (count,), on the CPU."""
    streams = _streams.get()
    if streams is None:
        return torch.randint(low, high, (count,))
    return torch.cat(
        [torch.randint(low, high, (1,), generator=generator) for generator in streams.of_batch(count, purpose, "cpu")]
    )


def chosen(draws: Tensor, weights: Sequence[float]) -> Tensor:
    """Return the index that each draw chooses by weight: int64, shaped like `draws`.

    Args:
        draws: numbers in [0, 1), as `uniform` returns them, on the CPU.
        weights: not negative, and not all zero; index i is chosen with probability weights[i] / sum of the weights.
    """
    ends = torch.tensor(weights, dtype=torch.float64).cumsum(0)
    # Float64, in which neighbouring float32 draws and the ends of the shares stay apart.
    return torch.searchsorted(ends[:-1] / ends[-1], draws.double(), right=True)


def keep_mask(count: int, drop_rate: float, *, purpose: str, device: torch.device | str | None = None) -> Tensor:
    """Draw a mask of ones, zeros with probability `drop_rate`: float32 (count,)."""
    if _streams.get() is None:
        return torch.bernoulli((1 - drop_rate) * torch.ones(count, device=device))
    return (uniform(count, purpose=purpose, device=device) >= drop_rate).float()


def keep_whole_batch(count: int, drop_rate: float, *, purpose: str, device: torch.device | str | None = None) -> Tensor:
    """Draw `keep_mask`; outside `per_sample`, draw once for the batch by Python's generator.

    The released image-to-video models were trained in this way.
    """
    if _streams.get() is None:
        return torch.full((count,), float(random.random() >= drop_rate), device=device)
    return keep_mask(count, drop_rate, purpose=purpose, device=device)
