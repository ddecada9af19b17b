"""The state of the random generators goes through JSON and back, to the bit."""

import json
import random

import numpy as np
import torch

from cogvideox_sat.runs.random_state import capture, restore

CPU = torch.device("cpu")


def draw() -> list[float]:
    """Draw one number of each kind; a normal one leaves half a pair in each generator."""
    return [random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), *torch.randn(3).tolist()]


def test_what_is_drawn_after_restoring_is_the_same():
    for seed in (0, 1):
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        draw()
        state = json.loads(json.dumps(capture(CPU)))
        first = [draw() for _ in range(3)]
        assert [draw() for _ in range(3)] != first
        restore(state, CPU)
        assert [draw() for _ in range(3)] == first


def test_a_state_of_a_gpu_is_left_where_there_is_none():
    state = capture(CPU)
    assert state.keys() == {"python", "numpy", "torch"}
    restore({**state, "cuda": "no state"}, CPU)
