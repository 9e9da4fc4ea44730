"""Colours of films as a screen of BT.709 shows them: HLG, PQ and wide gamuts, which phones record, become plain RGB.

As zimg does it with a reference white of 203 cd/m2 (ITU-R BT.2408), every channel by itself: BT.2100's EOTF to light, light
to BT.709's primaries, and BT.1886's gamma of 2.4. What is brighter than that white is clipped.
"""
import functools

import numpy as np

WHITE, HLG_PEAK, PQ_PEAK, GAMMA = 203, 1000, 10000, 2.4                 # cd/m2; a display's gamma
PQ, HLG = 16, 18                                                        # numbers of ITU-T H.273
UNSPECIFIED, BT709, BT2020, P3 = 2, 1, 9, 12
UNKNOWN_PRIMARIES = 4, 8, 10, 11                                        # of 1953, of slides, of cinemas
UNKNOWN_TRANSFERS = 8, 9, 10, 17                                       # linear, logarithmic, of cinemas
UNKNOWN_MATRICES = 8, 10, 11, 12, 13, 14, 15                           # constant luminance, ICtCp, YCgCo and the like
PRIMARIES = {1: ((.640, .330), (.300, .600), (.150, .060)), BT2020: ((.708, .292), (.170, .797), (.131, .046)),
             P3: ((.680, .320), (.265, .690), (.150, .060))}            # x, y of red, green and blue; white is D65 in all


def kind(transfer, primaries, matrix):
    """-> None: to be shown as it is; "converted": `to_bt709` has to do it; "approximate": nothing here can show it right."""
    if transfer in UNKNOWN_TRANSFERS or primaries in UNKNOWN_PRIMARIES or matrix in UNKNOWN_MATRICES:
        return "approximate"
    return "converted" if transfer in (PQ, HLG) or primaries in (BT2020, P3) else None


def matrix_of(transfer, primaries, matrix):
    """The matrix of a film that has to be converted, where it does not say: that of its primaries."""
    wide = primaries == BT2020 or primaries == UNSPECIFIED and transfer in (PQ, HLG)
    return matrix if matrix != UNSPECIFIED else BT2020 if wide else BT709


def to_xyz(primaries):
    """3 x 3, from linear RGB of these primaries to XYZ, of which D65 white has (.9505, 1, 1.089)."""
    columns = np.array([(x / y, 1, (1 - x - y) / y) for x, y in primaries]).T
    return columns * np.linalg.solve(columns, (.3127 / .3290, 1, .3583 / .3290))


@functools.cache
def light_table(transfer):
    """float32 [65536]: code value / 65535 -> light, 1 at the reference white."""
    v = np.linspace(0, 1, 2 ** 16)
    if transfer == PQ:
        m1, m2, c1, c2, c3 = 1305 / 8192, 2523 / 32, 107 / 128, 2413 / 128, 2392 / 128
        p = v ** (1 / m2)
        light = (np.maximum(p - c1, 0) / (c2 - c3 * p)) ** (1 / m1) * PQ_PEAK / WHITE
    elif transfer == HLG:
        a, b, c = .17883277, .28466892, .55991073
        light = np.where(v <= .5, v ** 2 / 3, (np.exp((v - c) / a) + b) / 12) ** 1.2 * HLG_PEAK / WHITE
    else:
        light = v ** GAMMA
    return light.astype(np.float32)


@functools.cache
def code_table():
    """uint8 [4096]: square root of light * 4095 -> code value; the root, so that dark ones keep their steps."""
    return (255 * np.linspace(0, 1, 4096) ** (2 / GAMMA)).round().astype(np.uint8)


def to_bt709(image, transfer, primaries):
    """uint16 RGB [h, w, 3] of that transfer and those primaries (H.273's numbers) -> uint8 [h, w, 3]."""
    primaries = primaries if primaries in PRIMARIES else BT2020 if transfer in (PQ, HLG) else 1
    matrix = np.linalg.solve(to_xyz(PRIMARIES[1]), to_xyz(PRIMARIES[primaries]))
    light = light_table(transfer)[image] @ matrix.T.astype(np.float32)
    return code_table()[(np.sqrt(light.clip(0, 1)) * 4095 + 0.5).astype(np.uint16)]
