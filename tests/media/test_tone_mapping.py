"""Test that high dynamic range becomes standard range, with equal mid tones and colours."""

import numpy as np
import pytest

from cogvideox_sat.media.tone_mapping import HLG, PQ, WHITE, ToneMap, dimmed, pq_code, pq_light


def picture(*colours) -> np.ndarray:
    """Return an image uint16 (1, n, 3) of coded values in [0, 1]."""
    return np.rint(np.array([colours], np.float64) * 65535).astype(np.uint16)


def test_the_code_of_light_and_back():
    light = np.array([0.0, 0.01, 1, 100, 203, 1000, 10000])
    assert pq_light(pq_code(light)) == pytest.approx(light, rel=1e-6, abs=1e-6)
    assert pq_code(100.0) == pytest.approx(0.5081, abs=1e-4)  # of ITU-R BT.2100
    assert pq_code(10000.0) == pytest.approx(1)


def test_the_curve_leaves_dark_parts_alone_and_never_falls():
    light = np.geomspace(0.01, 5000, 500)
    mapped = dimmed(light)
    assert (np.diff(mapped) >= -1e-6 * mapped[1:]).all()
    assert mapped[light < 50] == pytest.approx(light[light < 50])
    assert mapped[-1] == pytest.approx(WHITE)
    assert mapped.max() <= WHITE * 1.0001


@pytest.mark.parametrize("transfer", [PQ, HLG])
def test_grey_stays_grey_and_becomes_brighter_with_light(transfer):
    steps = np.linspace(0, 1, 40)
    mapped = ToneMap(transfer).apply(picture(*np.stack([steps] * 3, axis=1)))[0].astype(int)
    assert (np.ptp(mapped, axis=1) <= 1).all()
    assert (np.diff(mapped[:, 0]) >= 0).all()
    assert mapped[0].max() == 0
    assert mapped[-1].min() == 255


def test_mid_grey_of_hlg_looks_as_on_an_old_screen():
    """HLG was made to look right without mapping, so the result is near the coded value."""
    mapped = ToneMap(HLG).apply(picture([0.4] * 3))
    assert mapped.max() == pytest.approx(0.4 * 255, abs=16)


def test_primaries_of_bt709_come_out_pure():
    """The input is red of BT.709, 100 cd/m2, in the primaries of BT.2020."""
    red = pq_code(np.array([0.6274, 0.0691, 0.0164]) * 100)
    mapped = ToneMap(PQ).apply(picture(red))[0, 0]
    assert mapped[0] == pytest.approx(255 * (100 / WHITE) ** (1 / 2.4), abs=4)
    assert mapped[1:].max() <= 24
