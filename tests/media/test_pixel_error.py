"""PSNR of pictures and clips, by hand."""

import math

import pytest
import torch

from cogvideox_sat.media.pixel_error import psnr


@pytest.mark.parametrize("shape", [(3, 4, 5), (3, 2, 4, 5)])
def test_psnr_by_hand(shape):
    """0.2 in [-1, 1] is a tenth of the range, which is 20 dB below the peak."""
    picture = torch.zeros(2, *shape, dtype=torch.bfloat16)
    other = torch.stack([picture[0], picture[1] + 0.2])
    equal, lighter = psnr(other, picture).tolist()
    assert equal == math.inf and lighter == pytest.approx(20, abs=0.01)
