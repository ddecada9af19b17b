"""High dynamic range (PQ and HLG, BT.2100) to the standard range of BT.709.

Light of 203 cd/m², the white of graphics in BT.2408, becomes white; highlights up to 1000 cd/m² are compressed into the
top of the range by the curve of BT.2390; colours outside of BT.709 are clipped.
"""

import numpy as np

PQ, HLG = 16, 18  # transfer characteristics, as numbered in H.273
WHITE = 203.0  # cd/m²
PEAK = 1000.0  # cd/m², of the display that the video was made for
PQ_TOP = 10000.0  # cd/m²
HLG_GAMMA = 1.2  # of the whole system, for a display of 1000 cd/m²
DISPLAY_GAMMA = 2.4  # BT.1886
LUMINANCE = np.array([0.2627, 0.6780, 0.0593], np.float32)  # of BT.2020
TO_BT709 = np.array(  # from BT.2020, both linear (BT.2087)
    [[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]], np.float32
)
INPUTS = 2**12  # entries of the table that makes light of coded values; codes have 10 or 12 bits
OUTPUTS = 2**14  # entries of the table that makes coded values of light
M1, M2 = 2610 / 16384, 128 * 2523 / 4096  # of PQ (ST 2084)
C1, C2, C3 = 3424 / 4096, 32 * 2413 / 4096, 32 * 2392 / 4096
A, B, C = 0.17883277, 0.28466892, 0.55991073  # of HLG (ARIB STD-B67)


class ToneMap:
    """Maps pictures of one transfer characteristic, PQ or HLG, with the primaries of BT.2020."""

    def __init__(self, transfer: int):
        self.transfer = transfer
        coded = np.linspace(0, 1, INPUTS)
        light = pq_light(coded) / WHITE if transfer == PQ else hlg_scene_light(coded)
        self._light = light.astype(np.float32)
        share = np.linspace(0, 1, OUTPUTS)
        self._coded = np.rint(255 * share ** (1 / DISPLAY_GAMMA)).astype(np.uint8)
        self._dimming = dimming(INPUTS)

    def apply(self, pixels: np.ndarray) -> np.ndarray:
        """Return uint8 (h, w, 3), for a display of BT.709, from uint16 (h, w, 3), full range."""
        light = self._light[pixels >> 4]  # 1 is WHITE
        if self.transfer == HLG:
            luminance = np.maximum(light @ LUMINANCE, 1e-6)[..., None]
            light *= luminance ** (HLG_GAMMA - 1) * np.float32(PEAK / WHITE)
        brightest = light.max(axis=-1)
        step = pq_code(np.minimum(brightest * np.float32(WHITE), np.float32(PEAK))) / np.float32(pq_code(PEAK))
        factor = self._dimming[np.rint(step * np.float32(INPUTS - 1)).astype(np.int32)]
        light *= np.minimum(factor, 1 / np.maximum(brightest, np.float32(1e-6)))[..., None]
        light = np.clip(light @ TO_BT709.T, 0, 1)
        return self._coded[np.rint(light * np.float32(OUTPUTS - 1)).astype(np.int32)]


def pq_light(coded: np.ndarray) -> np.ndarray:
    """Return light in cd/m² of PQ-coded values in [0, 1]."""
    root = np.maximum(coded, 0) ** (1 / M2)
    return PQ_TOP * (np.maximum(root - C1, 0) / (C2 - C3 * root)) ** (1 / M1)


def pq_code(light: np.ndarray | float) -> np.ndarray | float:
    """Return PQ-coded values in [0, 1] of light in cd/m²."""
    root = (light / PQ_TOP) ** M1
    return ((C1 + C2 * root) / (1 + C3 * root)) ** M2


def hlg_scene_light(coded: np.ndarray) -> np.ndarray:
    """Return light in front of the camera, in [0, 1], of HLG-coded values."""
    return np.where(coded <= 0.5, coded**2 / 3, (np.exp((np.maximum(coded, 0.5) - C) / A) + B) / 12)


def dimming(steps: int) -> np.ndarray:
    """Return the factors that dim lights from 0 to PEAK to below WHITE: the curve of BT.2390, section 5.4.

    The lights are equally far apart in PQ. float32 (steps,).
    """
    value = np.linspace(0, 1, steps)
    most = pq_code(WHITE) / pq_code(PEAK)
    knee = 1.5 * most - 0.5
    t = np.clip((value - knee) / (1 - knee), 0, 1)
    curve = (2 * t**3 - 3 * t**2 + 1) * knee + (t**3 - 2 * t**2 + t) * (1 - knee) + (3 * t**2 - 2 * t**3) * most
    light, compressed = pq_light(value * pq_code(PEAK)), pq_light(curve * pq_code(PEAK))
    return np.where(value < knee, 1, compressed / np.maximum(light, 1e-6)).astype(np.float32)
