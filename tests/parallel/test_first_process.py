"""One process's result or error reaches all; `test_video_groups.py` uses more processes."""

import pickle

import pytest
import torch.distributed as dist

from cogvideox_sat.clips.selection import UnusablePlace
from cogvideox_sat.parallel.first_process import made_by_first
from cogvideox_sat.parallel.process_groups import initialize_process_groups
from sgm.config_places import ConfigError
from sgm.errors import UserError
from sgm.memory_errors import OutOfMemory


def refuse() -> None:
    raise ConfigError("a.yaml: model.x: no")


def test_one_process_makes_and_fails_for_itself():
    initialize_process_groups()
    calls = []
    assert made_by_first(lambda: 3, True, None, before=lambda: calls.append("before")) == 3
    with pytest.raises(ConfigError, match=r"model\.x: no"):
        made_by_first(refuse, True, dist.group.WORLD, before=lambda: calls.append("before"))
    assert calls == ["before", "before"]


def kinds(base: type) -> set[type]:
    return {base}.union(*map(kinds, base.__subclasses__()))


def test_all_errors_of_users_travel_between_processes():
    errors = [UserError("a"), ConfigError("b"), UnusablePlace("c"), OutOfMemory("decoding", "the GPU is full", "wait")]
    own = {kind for kind in kinds(UserError) if not kind.__module__.startswith(("test", "conftest"))}
    assert own == {type(error) for error in errors}, "a new kind of error: see whether it can be pickled"
    for error in errors:
        copy = pickle.loads(pickle.dumps(error))
        assert type(copy) is type(error) and str(copy) == str(error) and vars(copy) == vars(error)
