"""Distributions of the noise levels in training."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sgm import randomness
from sgm.context_parallel import group_rank, group_size
from sgm.errors import UserError
from sgm.util import instantiate_from_config


@contextmanager
def undivided(sampler: Any) -> Iterator[None]:
    """Draw from all levels in each process within the block.

    `data_parallel_group` would otherwise divide the levels among its processes.
    """
    group = getattr(sampler, "data_parallel_group", None)
    sampler.data_parallel_group = None
    try:
        yield
    finally:
        sampler.data_parallel_group = group


class EDMSampling:
    """log σ ~ N(p_mean, p_std²) (Karras et al. 2022, table 1)."""

    def __init__(self, p_mean: float = -1.2, p_std: float = 1.2):
        self.p_mean = p_mean
        self.p_std = p_std

    def __call__(self, n_samples: int, rand: Tensor | None = None) -> Tensor:
        """Return σ of `n_samples` samples: float32 (n_samples,).

        Args:
            rand: replaces the standard normal draws.
        """
        rand = randomness.normal((n_samples,), purpose="noise level") if rand is None else rand
        return (self.p_mean + self.p_std * rand).exp()


class DiscreteSampling:
    """Uniform over the `num_idx` noise levels of a schedule.

    With `uniform_sampling` the processes of `data_parallel_group` are split into `group_num` equal groups, and each
    group draws from its own share of the levels, lowest indices first: a batch over all processes then covers the
    schedule evenly.

    Args:
        discretization_config: the noise schedule.
        num_idx: number of levels; index 0 is the cleanest, unless `flip` is off.
        do_append_zero, flip: as in `Discretization.__call__`.
        uniform_sampling: stratify over processes.
        group_num: number of groups; 0: the greatest common divisor of processes and levels.

    Attributes:
        data_parallel_group: the processes that train on different samples, set by the loss; None: this process alone.
    """

    data_parallel_group: dist.ProcessGroup | None = None

    def __init__(
        self,
        discretization_config: Mapping[str, Any],
        num_idx: int,
        do_append_zero: bool = False,
        flip: bool = True,
        uniform_sampling: bool = False,
        group_num: int = 0,
    ):
        self.discretization = instantiate_from_config(discretization_config)
        self.levels = self.discretization(num_idx, do_append_zero=do_append_zero, flip=flip)
        self.num_idx = num_idx
        self.num_drawn = num_idx  # indices from this on are not drawn
        self.uniform_sampling = uniform_sampling
        self.group_num = group_num

    def index_range(self) -> tuple[int, int]:
        """Return the first index that this process draws from, and the last one plus 1.

        Raises:
            UserError: `group_num` groups of equal size are not possible.
        """
        if not self.uniform_sampling:
            return 0, self.num_drawn
        rank, processes = group_rank(self.data_parallel_group), group_size(self.data_parallel_group)
        groups = self.group_num or math.gcd(processes, self.num_drawn)
        if processes % groups or self.num_drawn % groups:
            raise UserError(
                f"sigma_sampler_config: group_num is {groups}, but it must divide both the {processes} data-parallel "
                f"processes and num_idx, {self.num_drawn}"
            )
        group = rank // (processes // groups)
        width = self.num_drawn // groups
        return group * width, (group + 1) * width

    def __call__(
        self, n_samples: int, rand: Tensor | None = None, return_idx: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Return the noise levels of `n_samples` samples: float32 (n_samples,), on the CPU.

        Args:
            rand: indices that replace the drawn ones.
            return_idx: also return the indices, int64 (n_samples,).
        """
        idx = self.draw(n_samples) if rand is None else rand
        levels = self.levels[idx]
        return (levels, idx) if return_idx else levels

    def draw(self, n_samples: int) -> Tensor:
        """Draw indices of noise levels: int64 (n_samples,), on the CPU."""
        return randomness.integers(*self.index_range(), n_samples, purpose="noise level")

    def idx_to_sigma(self, idx: Tensor | int) -> Tensor:
        """Return the noise levels of indices, σ or a = sqrt(ᾱ) depending on the schedule."""
        return self.levels[idx]


class PartialDiscreteSampling(DiscreteSampling):
    """Uniform over the first `partial_num_idx` of the `total_num_idx` levels of a schedule.

    These are the cleanest levels, or without `flip` the noisiest: for a model that is used in some steps only.

    Args:
        discretization_config, do_append_zero, flip: see `DiscreteSampling`.
        total_num_idx: number of levels in the table.
        partial_num_idx: number of levels that are drawn.
        kwargs: `uniform_sampling` and `group_num` of `DiscreteSampling`.

    Raises:
        UserError: `partial_num_idx` is not from 1 to `total_num_idx`.
    """

    def __init__(
        self,
        discretization_config: Mapping[str, Any],
        total_num_idx: int,
        partial_num_idx: int,
        do_append_zero: bool = False,
        flip: bool = True,
        **kwargs: Any,
    ):
        if not 1 <= partial_num_idx <= total_num_idx:
            raise UserError(
                f"sigma_sampler_config: partial_num_idx: got {partial_num_idx}; expected 1 to total_num_idx, "
                f"{total_num_idx}"
            )
        super().__init__(discretization_config, total_num_idx, do_append_zero, flip, **kwargs)
        self.num_drawn = partial_num_idx


class LogitNormalSampling(DiscreteSampling):
    """Noise levels of a schedule, mostly from its middle: logit t ~ N(loc, scale²).

    Here t = index / num_idx (Esser et al. 2024, "Scaling rectified flow transformers", section 3.1). A share of the
    samples is uniform, so that both ends are trained too. With `uniform_sampling` each group of processes draws from
    its own share of the distribution, the cleanest levels first.

    Args:
        loc: above 0, most samples have more noise than signal.
        scale: width of the distribution.
        uniform_share: in [0, 1].
        kwargs: see `DiscreteSampling`.

    Raises:
        UserError: `scale` is not positive, or `uniform_share` is not in [0, 1].
    """

    def __init__(self, *args: Any, loc: float = 0.0, scale: float = 1.0, uniform_share: float = 0.0, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if not scale > 0 or not 0 <= uniform_share <= 1:
            raise UserError(
                "sigma_sampler_config: scale must be positive and uniform_share between 0 and 1, got "
                f"{scale} and {uniform_share}"
            )
        t = torch.arange(1, self.num_idx + 1, dtype=torch.float64) / self.num_idx
        logit_normal = torch.special.ndtr((t.logit() - loc) / scale)
        self.cumulative = uniform_share * t + (1 - uniform_share) * logit_normal  # P(index <= i)

    def draw(self, n_samples: int) -> Tensor:
        low, high = self.index_range()
        share = randomness.uniform(n_samples, purpose="noise level").double()
        return torch.searchsorted(self.cumulative, (low + (high - low) * share) / self.num_idx, right=True)
