"""An error of one process ends the others, which name it; alone, it stays unchanged."""

import pytest

from cogvideox_sat.parallel import process_failures
from cogvideox_sat.parallel.process_failures import LOST_PEER, failing_together
from sgm.errors import UserError


@pytest.fixture
def two_processes(monkeypatch):
    monkeypatch.setattr(process_failures.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(process_failures.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(process_failures.dist, "get_backend", lambda: "gloo")


LOST = "[gloo/transport/tcp/pair.cc:1] Connection closed by peer [127.0.0.1]:1"


def test_a_lost_connection_means_that_another_process_has_failed(two_processes):
    with pytest.raises(UserError, match="another process has failed") as raised, failing_together():
        raise RuntimeError(LOST)
    assert str(raised.value.__cause__) == LOST


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), ValueError(LOST), KeyboardInterrupt()])
def test_errors_of_this_process_stay_what_they_are(two_processes, error):
    with pytest.raises(type(error)) as raised, failing_together():
        raise error
    assert raised.value is error


def test_alone_no_other_process_is_blamed():
    with pytest.raises(RuntimeError, match="Connection closed"), failing_together():
        raise RuntimeError(LOST)


def test_no_error_passes():
    with failing_together():
        pass
    assert not LOST_PEER.search("out of memory")
