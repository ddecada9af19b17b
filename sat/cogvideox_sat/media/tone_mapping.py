"""Map high dynamic range (PQ and HLG, BT.2100) to the standard range of BT.709.

Light of 203 cd/m², the white of graphics in BT.2408, becomes white. Highlights up to 1000 cd/m² are compressed into the
top of the range by the curve of BT.2390. Colours outside of BT.709 are clipped.
"""

import numpy as np

PQ, HLG = 16, 18  # transfer characteristics, as numbered in H.273
WHITE = 203.0  # cd/m²
PEAK = 1000.0  # cd/m² of the display that the video was made for
PQ_TOP = 10000.0  # cd/m² of the largest PQ value
HLG_GAMMA = 1.2  # system gamma for a display of 1000 cd/m²
DISPLAY_GAMMA = 2.4  # BT.1886
LUMINANCE = np.array([0.2627, 0.6780, 0.0593], np.float32)  # of BT.2020
TO_BT709 = np.array(  # from BT.2020, both linear (BT.2087)
    [[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]], np.float32
)
CODES = 2**12  # entries of tables indexed by coded values, which have 10 or 12 bits
LIGHTS = 2**14  # entries of the table from light to coded values
M1, M2 = 2610 / 16384, 128 * 2523 / 4096  # of PQ (ST 2084)
C1, C2, C3 = 3424 / 4096, 32 * 2413 / 4096, 32 * 2392 / 4096
A, B, C = 0.17883277, 0.28466892, 0.55991073  # of HLG (ARIB STD-B67)


class ToneMap:
    """Map for one transfer characteristic, PQ or HLG, with the primaries of BT.2020.

    Nonlinear functions are looked up in tables: an image of 720x1280 takes about 0.1 s on one core.
    """

    def __init__(self, transfer: int):
        self.transfer = transfer
        coded = np.linspace(0, 1, CODES)
        light = pq_light(coded) / WHITE if transfer == PQ else hlg_scene_light(coded)
        self._light = light.astype(np.float32)
        # Factors for colours, indexed by the PQ code of their brightest component, or by the root of their luminance.
        shown = pq_light(coded) if transfer == PQ else PEAK * coded ** (2 * HLG_GAMMA)
        factor = dimmed(shown) / np.maximum(shown, 1e-9)
        factor[shown < 1e-3] = 1
        if transfer == HLG:
            factor *= PEAK / WHITE * np.maximum(coded, 1 / CODES) ** (2 * (HLG_GAMMA - 1))
        self._factor = factor.astype(np.float32)
        self._coded = np.rint(255 * np.linspace(0, 1, LIGHTS) ** (1 / DISPLAY_GAMMA)).astype(np.uint8)

    def apply(self, pixels: np.ndarray) -> np.ndarray:
        """Return uint8 (h, w, 3), for a display of BT.709, from uint16 (h, w, 3), full range."""
        codes = pixels >> 4
        light = self._light[codes]
        if self.transfer == PQ:
            steps = codes.max(axis=-1)
        else:
            steps = np.rint(np.sqrt(light @ LUMINANCE) * np.float32(CODES - 1)).astype(np.uint16)
        light *= self._factor[steps][..., None]
        light = light @ (TO_BT709.T * np.float32(LIGHTS - 1))
        return self._coded[np.clip(light + np.float32(0.5), 0, LIGHTS - 1).astype(np.uint16)]


def pq_light(coded: np.ndarray) -> np.ndarray:
    """Return light in cd/m² of PQ-coded values in [0, 1]."""
    root = np.maximum(coded, 0) ** (1 / M2)
    return PQ_TOP * (np.maximum(root - C1, 0) / (C2 - C3 * root)) ** (1 / M1)


def pq_code(light: np.ndarray | float) -> np.ndarray | float:
    """Return PQ-coded values in [0, 1] of light in cd/m²."""
    root = (light / PQ_TOP) ** M1
    return ((C1 + C2 * root) / (1 + C3 * root)) ** M2


def hlg_scene_light(coded: np.ndarray) -> np.ndarray:
    """Return the scene light, in [0, 1], of HLG-coded values."""
    return np.where(coded <= 0.5, coded**2 / 3, (np.exp((np.maximum(coded, 0.5) - C) / A) + B) / 12)


def dimmed(light: np.ndarray) -> np.ndarray:
    """Return light in cd/m² compressed so that PEAK becomes WHITE (BT.2390, section 5.4)."""
    top = pq_code(PEAK)
    value, most = np.minimum(pq_code(light) / top, 1), pq_code(WHITE) / top
    knee = 1.5 * most - 0.5
    t = np.clip((value - knee) / (1 - knee), 0, 1)
    curve = (2 * t**3 - 3 * t**2 + 1) * knee + (t**3 - 2 * t**2 + t) * (1 - knee) + (3 * t**2 - 2 * t**3) * most
    return np.where(value < knee, light, pq_light(curve * top))
