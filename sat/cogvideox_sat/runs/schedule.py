"""Decide after which steps a run logs, evaluates, saves and ends, without PyTorch."""

from dataclasses import dataclass

from cogvideox_sat.configuration.settings import LoopSettings


@dataclass(frozen=True)
class Schedule:
    """The actions after a step; everything done at intervals is also done after the last step."""

    settings: LoopSettings

    def is_last(self, step: int) -> bool:
        """Return whether the run ends after `step`, counted from 1."""
        return step >= self.settings.train_iters

    def logs(self, step: int) -> bool:
        """Return whether a line of the log is due after `step`."""
        return self._is_due(step, self.settings.log_interval)

    def evaluates(self, step: int) -> bool:
        """Return whether an evaluation is due after `step`."""
        return self.settings.eval_interval is not None and self._is_due(step, self.settings.eval_interval)

    def saves(self, step: int) -> bool:
        """Return whether a checkpoint is due after `step`."""
        return self._is_due(step, self.settings.save_interval)

    def _is_due(self, step: int, interval: int) -> bool:
        return step % interval == 0 or self.is_last(step)
