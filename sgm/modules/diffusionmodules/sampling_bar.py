"""The progress bar of a sampler's steps."""

from collections.abc import Iterable
from typing import Any

import torch.distributed as dist
from tqdm import tqdm


class SamplingBar:
    """What samplers derive from to show a progress bar while `verbose` is true, on the first process only."""

    verbose: bool = False

    def show_bar(self, shown: bool) -> None:
        """Let the sampler show its bar from now on, or not."""
        self.verbose = shown

    def counted(self, steps: range) -> Iterable[int]:
        """Return the steps, with a progress bar where it is asked for."""
        first_process = not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0
        return tqdm(steps, desc="Sampling") if self.verbose and first_process else steps


def hide_bar(sampler: Any) -> None:
    """Let a sampler show no bar, since something else shows how far it is.

    One of the user's own that does not derive from ours may have `verbose`, as the original's samplers do, or no bar.
    """
    if isinstance(sampler, SamplingBar):
        sampler.show_bar(False)
    elif hasattr(sampler, "verbose"):
        sampler.verbose = False
