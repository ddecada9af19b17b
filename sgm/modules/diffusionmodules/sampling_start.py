"""The start of sampling: noise or a noised clip, and the frames to continue."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sgm.errors import UserError, shown


def steps_of_strength(strength: float, num_steps: int) -> int:
    """Return the number of steps from a clip: the last share `strength` of `num_steps`.

    The number is rounded down.
    """
    return min(math.floor(strength * num_steps + 1e-6), num_steps)  # 0.58 · 50 is 28.999999999999996


@dataclass(frozen=True, eq=False)
class Start:
    """The start of sampling.

    Args:
        clip: clean samples (batch, frames, ...) that are noised to the level at which sampling begins (Meng et al.
            2022, SDEdit); None: noise alone.
        strength: share of the steps that are taken from a clip. 1: all steps; 0: no steps, and the clip is the result.
        prefix: clean samples (batch, fewer frames, ...) that stay at the front while the rest is denoised; None: none.

    Raises:
        UserError: the strength is not between 0 and 1.
    """

    clip: Tensor | None = None
    strength: float = 1.0
    prefix: Tensor | None = None

    def __post_init__(self) -> None:
        if type(self.strength) not in (int, float) or not 0 <= self.strength <= 1:
            raise UserError(f"strength: got {shown(self.strength)}; expected a number from 0 to 1")

    def steps(self, num_steps: int) -> int:
        """Return how many of `num_steps` steps are taken."""
        return num_steps if self.clip is None else steps_of_strength(self.strength, num_steps)

    def with_prefix(
        self, x: Tensor, a: float = 1.0, s: float = 0.0, noise: Callable[[Tensor], Tensor] | None = None
    ) -> Tensor:
        """Return `x` (batch, frames, ...) with the prefix in its first frames.

        Args:
            a, s: levels of a noised prefix, a·x0 + s·ε.
            noise: returns fresh noise shaped like its argument; None: the prefix stays clean.
        """
        if self.prefix is None or not self.prefix.shape[1]:
            return x
        prefix = self.prefix.to(x)
        front = prefix if noise is None else a * prefix + s * noise(prefix)
        return torch.cat((front, x[:, prefix.shape[1] :]), dim=1)


NOISE = Start()
