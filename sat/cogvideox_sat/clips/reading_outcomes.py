"""Outcomes of tasks that a reading process sends to its parent."""

from dataclasses import dataclass
from typing import Any

from sgm.errors import UserError


@dataclass(frozen=True)
class Done:
    """Task that ended with a result."""

    number: int
    result: Any


@dataclass(frozen=True)
class Failed:
    """Task that ended with an exception, which `raise_here` raises.

    Attributes:
        text: the message of a UserError, the traceback of any other exception.
    """

    number: int
    kind: type[Exception]
    text: str

    def raise_here(self) -> None:
        """Raise the exception, or a RuntimeError if its class takes other arguments."""
        if issubclass(self.kind, UserError):
            raise UserError(self.text)
        try:
            error = self.kind(f"in a process that reads clips:\n{self.text}")
        except TypeError:  # the constructor takes other arguments
            error = RuntimeError(f"{self.kind.__name__} in a process that reads clips:\n{self.text}")
        raise error


@dataclass(frozen=True)
class Stuck:
    """Task that ended without a result because of one clip; its process has ended.

    Attributes:
        place: position of the sample in its batch.
        name: name of the clip.
        reason: the reason why the clip counts as unreadable.
    """

    number: int
    place: int
    name: str
    reason: str


Outcome = Done | Failed | Stuck
