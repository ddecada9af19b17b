"""A signal asks a run to stop after its step; a second Ctrl-C ends it at once."""

import logging
import signal

import pytest

from cogvideox_sat.runs.stop_signals import stop_requests

SIGNALS = (signal.SIGINT, signal.SIGTERM)


def handlers() -> list:
    return [signal.getsignal(number) for number in SIGNALS]


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_noted_and_said(number, caplog):
    before = handlers()
    with caplog.at_level(logging.INFO), stop_requests() as received:
        assert received == [] and handlers() != before
        signal.raise_signal(number)
        assert received == [number]
        assert caplog.messages == [f"{number.name}: finishing the step, then saving"]
    assert handlers() == before


def test_launchers_may_send_sigterm_twice(caplog):
    with caplog.at_level(logging.INFO), stop_requests() as received:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
    assert received == [signal.SIGTERM] * 2 and len(caplog.messages) == 1


def test_a_second_sigint_has_its_usual_effect():
    before = handlers()
    with pytest.raises(KeyboardInterrupt), stop_requests():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
    assert handlers() == before
