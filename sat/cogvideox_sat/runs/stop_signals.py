"""Stop a run in an orderly way when a signal asks for it."""

import logging
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

logger = logging.getLogger(__name__)


@contextmanager
def stop_requests() -> Iterator[list[int]]:
    """Yield the list of received signals SIGTERM and SIGINT, which no longer stop the process.

    A second SIGINT has its usual effect again.
    """
    received: list[int] = []

    def note(number: int, _: Any) -> None:
        if not received:
            logger.info("%s: finishing the step, then saving", signal.Signals(number).name)
        received.append(number)
        if number == signal.SIGINT:  # launchers may send SIGTERM twice
            signal.signal(number, before[number])

    before: dict[int, Any] = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
