"""Handle values that are not finite: steps are skipped and counted.

Too many skipped steps end the run. This module imports no PyTorch.
"""

import logging
import math
from collections.abc import Mapping

from sgm.errors import UserError

KEPT = "the last checkpoint is kept"
PRECISION = "train in bf16 or float32"


class SkippedSteps:
    """Counts the skipped steps of a run, whose loss or gradients are not finite.

    Skipped steps do not change the weights.

    Args:
        limit: number of skipped steps in a row that ends the run.
        rate: name of the argument for the learning rate, in words.
        log: logger for each skipped step.
        state: a result of `state`, to continue from.
    """

    def __init__(self, limit: int, rate: str, log: logging.Logger, state: Mapping[str, int] | None = None):
        self.limit, self.rate, self.log = limit, rate, log
        self.in_a_row, self.in_all = (state["in a row"], state["in all"]) if state else (0, 0)

    def state(self) -> dict[str, int]:
        """Return the counts, for a checkpoint."""
        return {"in a row": self.in_a_row, "in all": self.in_all}

    def made(self) -> None:
        """Record a step that was made."""
        self.in_a_row = 0

    def left_out(self, step: int, finite_loss: bool) -> None:
        """Record that `step` was skipped.

        Raises:
            UserError: too many steps in a row were skipped.
        """
        self.in_a_row += 1
        self.in_all += 1
        what = "gradients are" if finite_loss else "loss is"
        counts = (self.in_a_row, self.in_all)
        self.log.warning("step %d is left out: the %s not finite (%d in a row, %d in all)", step, what, *counts)
        if self.in_a_row >= self.limit:
            raise UserError(
                f"{self.in_a_row} steps in a row had no finite loss and gradients; lower {self.rate}, or {PRECISION}; "
                f"{KEPT}"
            )


def check_finite(values: Mapping[str, float], step: int, rate: str) -> None:
    """Check the values of a run that makes every step, whatever its gradients are.

    Args:
        rate: name of the argument for the learning rate, in words.

    Raises:
        UserError: a value is not finite.
    """
    if wrong := [name for name, value in values.items() if not math.isfinite(value)]:
        raise UserError(f"{wrong[0]} is not finite at step {step}; lower {rate}, or {PRECISION}; {KEPT}")
