"""The progress bar of a sampler's steps."""

from collections.abc import Iterable
from typing import Any

import torch.distributed as dist
from tqdm import tqdm


class SamplingBar:
    """Base class of samplers with a progress bar, shown on the first process if `verbose`."""

    verbose: bool = False

    def show_bar(self, shown: bool) -> None:
        """Show the progress bar from now on, or hide it."""
        self.verbose = shown

    def counted(self, steps: range) -> Iterable[int]:
        """Return the steps, with a progress bar if `verbose` is true."""
        first_process = not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0
        return tqdm(steps, desc="Sampling") if self.verbose and first_process else steps


def hide_bar(sampler: Any) -> None:
    """Hide a sampler's progress bar, since something else shows its progress.

    A user's sampler that does not derive from `SamplingBar` may have `verbose`, as the original's samplers do, or no
    bar.
    """
    if isinstance(sampler, SamplingBar):
        sampler.show_bar(False)
    elif hasattr(sampler, "verbose"):
        sampler.verbose = False
