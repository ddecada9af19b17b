"""Measures of a video against the inputs of its request, with values worked out by hand."""

from pathlib import Path

import pytest
import torch

from cogvideox_sat.sampling.input_files import KeyFrameFile
from cogvideox_sat.sampling.prompt_requests import PromptRequest
from cogvideox_sat.shapes.input_fidelity import InputFidelity, seam_ratio, window_frames
from sgm.errors import UserError


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


@pytest.mark.parametrize(
    ("request_", "says"),
    [
        (PromptRequest(3, "a", extend=1), "prompt 3 has 5 frames, too few for 2 windows; give the --input_file"),
        (PromptRequest(3, "a", keyframes=(KeyFrameFile(Path("a.png"), 5),)), "has 5 frames, too few for key frame 5"),
    ],
)
def test_a_video_of_another_request_is_refused(request_, says):
    with pytest.raises(UserError, match=says):
        InputFidelity().measure(request_, torch.zeros(5, 3, 16, 16), fps=8)
