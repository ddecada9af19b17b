"""After which steps a run logs, evaluates, saves and ends."""

from cogvideox_sat.configuration.settings import LoopSettings
from cogvideox_sat.runs.schedule import Schedule


def steps(due) -> list[int]:
    return [step for step in range(1, 11) if due(step)]


def test_intervals_and_the_last_step():
    schedule = Schedule(LoopSettings(10, log_interval=3, save_interval=4, eval_interval=5))
    assert steps(schedule.logs) == [3, 6, 9, 10]
    assert steps(schedule.saves) == [4, 8, 10]
    assert steps(schedule.evaluates) == [5, 10]
    assert steps(schedule.is_last) == [10]


def test_a_run_without_evaluations_has_none_at_its_end_either():
    assert steps(Schedule(LoopSettings(10)).evaluates) == []


def test_an_interval_longer_than_the_run():
    assert steps(Schedule(LoopSettings(7, save_interval=500)).saves) == [7, 8, 9, 10]  # beyond the end: at once
