"""The one exception type that a command line turns into a single line for its user, and the words for such lines."""

import logging
from collections.abc import Callable, Iterable


class UserError(Exception):
    """A mistake the user can mend: its message says what is wrong, where, and what would fit, on one line."""


def some(names: Iterable[object], shown: int = 3) -> str:
    """The first few of `names` and how many more there are, for a message."""
    names = [str(name) for name in names]
    more = f" ... and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more


def exit_code(command: Callable[[], int], logger: logging.Logger, interrupted: str = "interrupted") -> int:
    """Run a command: its own exit code; 2 for a UserError, whose line is logged; 130 when it is interrupted."""
    try:
        return command()
    except UserError as error:
        logger.error("error: %s", " ".join(str(error).split("\n")))
        return 2
    except KeyboardInterrupt:
        logger.error(interrupted)
        return 130
