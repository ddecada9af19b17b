"""Learning-rate schedules for `torch.optim.lr_scheduler.LambdaLR`.

`LambdaLR` multiplies the base rate by `schedule(step)`. Each schedule is a chain of cycles: a linear warm-up from
`f_start` to `f_max`, then a decay to `f_min`. The cosine decay is that of Loshchilov and Hutter, "SGDR: Stochastic
Gradient Descent with Warm Restarts", eq. 5. After the last cycle the factor stays constant.
"""

import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from sgm.errors import UserError

log = logging.getLogger(__name__)


class _Cycles(ABC):
    """Base class of the schedules: warm-up and decay in each cycle.

    Args:
        warm_up_steps, cycle_lengths: in steps, for each cycle; the warm-up is part of the cycle.
        f_start, f_max, f_min: factors, for each cycle.
        verbosity_interval: number of steps between log lines; 0: never log.

    Attributes:
        last_f: the factor of the latest call, 0 before the first; `last_lr` is another name of it.

    Raises:
        UserError: the lists differ in length, or a warm-up is as long as its cycle.
    """

    def __init__(
        self,
        warm_up_steps: Sequence[int],
        f_min: Sequence[float],
        f_max: Sequence[float],
        f_start: Sequence[float],
        cycle_lengths: Sequence[int],
        verbosity_interval: int = 0,
    ):
        lists = {
            "warm_up_steps": warm_up_steps,
            "f_min": f_min,
            "f_max": f_max,
            "f_start": f_start,
            "cycle_lengths": cycle_lengths,
        }
        name = type(self).__name__
        lengths = {key: len(values) for key, values in lists.items()}
        if len(set(lengths.values())) > 1 or not cycle_lengths:
            raise UserError(f"{name}: each list needs one value per cycle, got the lengths {lengths}")
        for warm_up, length in zip(warm_up_steps, cycle_lengths, strict=True):
            if not 0 <= warm_up < length:
                raise UserError(
                    f"{name}: a warm-up: got {warm_up}; it must be at least 0 and shorter than its cycle of "
                    f"{length} steps"
                )
        # Plain lists of numbers, since checkpoints hold the scheduler's state and are read without running code.
        self.warm_up_steps, self.cycle_lengths = list(warm_up_steps), list(cycle_lengths)
        self.f_min, self.f_max, self.f_start = list(f_min), list(f_max), list(f_start)
        self.verbosity_interval = verbosity_interval
        self.last_f = 0.0

    @property
    def last_lr(self) -> float:
        """Return the factor of the latest call."""
        return self.last_f

    def find_in_interval(self, n: int) -> int:
        """Return the cycle of step `n`, from 0; the last cycle includes all steps after it.

        A step on the border of two cycles is the end of the first.
        """
        ends = list(accumulate(self.cycle_lengths))
        return next((index for index, end in enumerate(ends) if n <= end), len(ends) - 1)

    def schedule(self, n: int, **kwargs: Any) -> float:
        """Return the factor at step `n`, counted from 0; other arguments have no effect."""
        cycle = self.find_in_interval(n)
        length, warm_up = self.cycle_lengths[cycle], self.warm_up_steps[cycle]
        step = min(n - sum(self.cycle_lengths[:cycle]), length)
        if step < warm_up:
            factor = self.f_start[cycle] + (self.f_max[cycle] - self.f_start[cycle]) * step / warm_up
        else:
            factor = self.f_min[cycle] + (self.f_max[cycle] - self.f_min[cycle]) * self._decay(step, warm_up, length)
        if self.verbosity_interval > 0 and n % self.verbosity_interval == 0:
            log.info("step %d: the learning rate is multiplied by %g (cycle %d)", n, factor, cycle)
        self.last_f = factor
        return factor

    def __call__(self, n: int, **kwargs: Any) -> float:
        """Return `schedule(n)`."""
        return self.schedule(n, **kwargs)

    @staticmethod
    @abstractmethod
    def _decay(step: int, warm_up: int, length: int) -> float:
        """Return the remaining share at a step, 0 at the cycle's end; warm_up <= step <= length."""


class LambdaWarmUpCosineScheduler2(_Cycles):
    """Cycles that decay along half a cosine, which begins after the warm-up."""

    @staticmethod
    def _decay(step: int, warm_up: int, length: int) -> float:
        return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / (length - warm_up)))


class LambdaLinearScheduler(_Cycles):
    """Cycles that decay linearly, along the line from f_max at the cycle's *start*.

    After a warm-up the factor jumps.
    """

    @staticmethod
    def _decay(step: int, warm_up: int, length: int) -> float:
        return (length - step) / length


class LambdaWarmUpCosineScheduler(LambdaWarmUpCosineScheduler2):
    """A single cycle of `max_decay_steps` that decays along half a cosine.

    The factor goes from `lr_start` to `lr_max` to `lr_min`.

    Raises:
        UserError: the warm-up is as long as the cycle.
    """

    def __init__(
        self,
        warm_up_steps: int,
        lr_min: float,
        lr_max: float,
        lr_start: float,
        max_decay_steps: int,
        verbosity_interval: int = 0,
    ):
        super().__init__([warm_up_steps], [lr_min], [lr_max], [lr_start], [max_decay_steps], verbosity_interval)
