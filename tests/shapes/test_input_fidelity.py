"""Measures of a video against the inputs of its request, with values worked out by hand."""

import pytest
import torch

from cogvideox_sat.sampling.prompt_requests import PromptRequest
from cogvideox_sat.shapes.input_fidelity import seam_ratio, window_frames


def test_a_jump_where_windows_join_is_counted_as_a_multiple_of_the_median():
    values = torch.arange(13.0) / 20
    values[9:] += 0.1  # three times a usual difference, at the only seam of windows of 9 frames
    frames = values[:, None, None, None].expand(13, 3, 2, 2)
    assert seam_ratio(frames, 9) == pytest.approx(3)
    assert seam_ratio(torch.zeros(13, 3, 2, 2), 9) == 0


def test_windows_are_counted_from_the_request():
    assert window_frames(PromptRequest(0, "a"), 9) is None
    assert window_frames(PromptRequest(0, "a", extend=4), 25) == 9
    assert window_frames(PromptRequest(0, "a", extend=("b",)), 13) == 9
