"""Test the values of a training state that a run accepts and refuses."""

import copy
import math

import pytest

from cogvideox_sat.files.training_state import STATE_ERRORS, TRAINING_STATE, VAE_RUN, counters, find_misfit, taken_from
from sgm.errors import UserError

POSITION = {"seed": -3, "epoch": 1, "phases": [[2, 5], (4, 0)], "samples": 9, "fingerprint": 4}
STATE = {
    "step": 10,
    "optimizer": {
        "kinds": ["exp_avg"],
        "lacking": {"exp_avg": ["bias"]},
        "model_parallel_size": 1,
        "state": {"step": 10},
        "group": {"bias_correction": 1},
        "rates": [1e-3, 0],
        "loss_scaler": {},
    },
    "optimizer_type": "EmaAdam",
    "data": POSITION,
    "schedule": {"decay_style": "linear", "num_iters": 3},
    "random": [{"python": [3, [], None]}],
    "losses": [math.nan, 1],
    "skipped": {"in a row": 0, "in all": 2},
    "reader": None,
}


def test_a_state_of_a_run_fits_and_so_does_an_older_one():
    assert find_misfit(STATE, TRAINING_STATE) is None
    older = copy.deepcopy(STATE)
    del older["reader"], older["optimizer"]["lacking"]
    assert find_misfit(older, TRAINING_STATE) is None


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("step", -1),
        ("step", 1e308),
        ("step", 10**30),
        ("step", True),
        ("optimizer", []),
        ("optimizer.kinds", "exp_avg"),
        ("optimizer.kinds", [[]]),
        ("optimizer.lacking", {"exp_avg": 3}),
        ("optimizer.state", {"step": "10"}),
        ("optimizer.rates", [math.inf]),
        ("optimizer.group", {"lr": []}),
        ("data.phases", [[0, 1]]),
        ("data.phases", [[1]]),
        ("data.epoch", 0.5),
        ("schedule", None),
        ("random", [3]),
        ("losses", [1.0]),
        ("skipped.in all", -2),
        ("reader", {"video_backend": 3}),
    ],
)
def test_values_that_no_run_writes_are_named_with_their_place(place, value):
    state = copy.deepcopy(STATE)
    *outer, last = place.split(".")
    inner = state
    for key in outer:
        inner = inner[key]
    inner[last] = value
    assert place in find_misfit(state, TRAINING_STATE)
    del inner[last]
    may_be_left_out = place in ("reader", "optimizer.lacking")
    assert find_misfit(state, TRAINING_STATE) == (None if may_be_left_out else f"it has no {place}")


@pytest.mark.parametrize("state", [None, [], "text", 3])
def test_a_state_that_is_no_mapping(state):
    assert "not a mapping" in find_misfit(state, TRAINING_STATE)


def test_an_autoencoder_s_run():
    run = {"step": 1, "data": POSITION, "ranks": [{"random": {}, "means": {"loss": (1.0, 2)}}]}
    assert find_misfit(run, VAE_RUN) is None
    assert "ranks" in find_misfit({**run, "ranks": [3]}, VAE_RUN)


def test_counters_are_numbers_all_the_way_down():
    assert counters({"loop": {"total": {"ready": 3, "done": None}, "last": [True, {}]}})
    assert not counters({"loop": {"total": "3"}})
    assert not counters({1: 2})


def test_damage_is_one_line_about_the_file_and_other_mistakes_keep_their_traceback(tmp_path):
    says = r"^resume: .*state.json is damaged: 'step'; name another checkpoint$"
    with pytest.raises(UserError, match=says), taken_from(tmp_path / "state.json"):
        {}["step"]
    with pytest.raises(RuntimeError, match="of ours"), taken_from(tmp_path / "state.json", STATE_ERRORS):
        raise RuntimeError("a mistake of ours")
