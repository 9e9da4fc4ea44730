"""Colours of films: how frames that are read become plain RGB, and how frames that are written are tagged.

Reading: HLG, PQ and wide gamuts, which phones record, become RGB for a screen of BT.709. This is done as in
zimg with a reference white of 203 cd/m2 (ITU-R BT.2408), for every channel by itself: BT.2100's EOTF to
light, light to BT.709's primaries, and BT.1886's gamma of 2.4. What is brighter than that white is clipped.
If a file does not name the matrix of its YCbCr, the number of its lines decides, as in players and browsers.

Writing: a file gets the matrix that players take for its number of lines, and a tag that says so. Then
programs that read the tag and programs that count lines show the same colours. """
import functools

import numpy as np

WHITE, HLG_PEAK, PQ_PEAK, GAMMA = 203, 1000, 10000, 2.4                 # cd/m2; a display's gamma
HD_LINES = 720                                          # from this many on players take BT.709's matrix
# Numbers of ITU-T H.273, as in PyAV.
UNSPECIFIED, BT709 = 2, 1                               # of transfers, primaries and matrices
PQ, HLG = 16, 18                                        # transfers
BT2020, P3 = 9, 12                                      # primaries; 9 is also a matrix
RGB, BT601 = 0, 6                                       # matrices
LIMITED = 1                                             # FFmpeg's number of the range of 16 to 235
UNKNOWN_PRIMARIES = 4, 8, 10, 11                        # NTSC's of 1953, those of slides, those of cinemas
UNKNOWN_TRANSFERS = 8, 9, 10, 17                        # linear, logarithmic, those of cinemas
UNKNOWN_MATRICES = 8, 10, 11, 12, 13, 14, 15            # constant luminance, ICtCp, YCgCo and the like
# x, y of red, green and blue; the white of all is D65
PRIMARIES = {BT709: ((.640, .330), (.300, .600), (.150, .060)),
             BT2020: ((.708, .292), (.170, .797), (.131, .046)),
             P3: ((.680, .320), (.265, .690), (.150, .060))}


# ---- tags
def tags_to_write(lines):
    """-> {attribute of PyAV's codec context: number}: the tags of a video with this many lines and BT.709's
    (sRGB's) colours."""
    return {"colorspace": usual_matrix(lines), "color_primaries": BT709, "color_trc": BT709,
            "color_range": LIMITED}


def usual_matrix(lines):
    """The matrix that players take for this many lines if a file names none."""
    return BT709 if lines >= HD_LINES else BT601


def tags_of(frame):
    """-> (transfer, primaries, matrix) of a frame of PyAV, in H.273's numbers. Pixels that are RGB, grey or
    numbers in a palette need no matrix, and get RGB's."""
    has_matrix = not (frame.format.is_rgb or frame.format.has_palette or len(frame.format.components) < 3)
    return frame.color_trc, frame.color_primaries, frame.colorspace if has_matrix else RGB


def kind(transfer, primaries, matrix, lines=0):
    """What reading does to a frame of these tags and this many lines:

    None: it is shown as it is. "converted": `to_bt709` converts it. "guessed": it names no matrix and has as
    many lines as players read with BT.709's, while other programs take BT.601's. "approximate": nothing here
    can show it right. """
    if transfer in UNKNOWN_TRANSFERS or primaries in UNKNOWN_PRIMARIES or matrix in UNKNOWN_MATRICES:
        return "approximate"
    if transfer in (PQ, HLG) or primaries in (BT2020, P3):
        return "converted"
    if matrix == UNSPECIFIED and usual_matrix(lines) != BT601:
        return "guessed"
    return None


def matrix_of(transfer, primaries, matrix, lines=0):
    """The matrix to read a frame with: the one that it names, or else that of its wide primaries, or else the
    usual one."""
    if matrix != UNSPECIFIED:
        return matrix
    if primaries == BT2020 or primaries == UNSPECIFIED and transfer in (PQ, HLG):
        return BT2020
    if primaries == P3 or transfer in (PQ, HLG):
        return BT709
    return usual_matrix(lines)


# ---- pixels
def to_xyz(primaries):
    """The 3 x 3 matrix from linear RGB of these primaries to XYZ, in which D65 white is (.9505, 1, 1.089)."""
    columns = np.array([(x / y, 1, (1 - x - y) / y) for x, y in primaries]).T
    return columns * np.linalg.solve(columns, (.3127 / .3290, 1, .3583 / .3290))


@functools.cache
def light_table(transfer):
    """float32 [65536]: the light of each code value; the reference white has 1."""
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
    """uint8 [4096]: the code value of each (square root of light) * 4095. The root keeps dark values apart.
    """
    return (255 * np.linspace(0, 1, 4096) ** (2 / GAMMA)).round().astype(np.uint8)


def to_bt709(image, transfer, primaries):
    """uint16 RGB [h, w, 3] of that transfer and those primaries (H.273's numbers) -> uint8 [h, w, 3]."""
    if primaries not in PRIMARIES:
        primaries = BT2020 if transfer in (PQ, HLG) else BT709
    matrix = np.linalg.solve(to_xyz(PRIMARIES[BT709]), to_xyz(PRIMARIES[primaries]))
    light = light_table(transfer)[image] @ matrix.T.astype(np.float32)
    return code_table()[(np.sqrt(light.clip(0, 1)) * 4095 + 0.5).astype(np.uint16)]
