"""Pictures to look at: text on pixels, a wall of videos side by side, a looping GIF. PyAV and NumPy alone.

Axes: f frames, h height, w width, n prompts (rows), m checkpoints (columns), 3 RGB.
"""
import contextlib
import os
import textwrap
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

# A pixel font of our own: a character is 8 rows of 5 pixels, a row one digit of base 32 (e is 01110, v 11111).
CHARACTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789abcdefghijklmnopqrstuvwxyz.,-%:/()[]_=+'? "
ROWS = """
    ehhvhhh0 uhhuhhu0 ehggghe0 sihhhis0 vgguggv0 vgguggg0 ehgnhhf0 hhhvhhh0 e44444e0 72222ic0 hikokih0 ggggggv0 hrllhhh0
    hhpljhh0 ehhhhhe0 uhhuggg0 ehhhlid0 uhhukih0 fgge11u0 v4444440 hhhhhhe0 hhhhha40 hhhllla0 hha4ahh0 hhha4440 v1248gv0
    ehjlphe0 4c4444e0 eh1248v0 v2421he0 26aiv220 vgu11he0 68guhhe0 v1248880 ehhehhe0 ehhf12c0 00e1fhf0 ggmphhu0 00egghe0
    11djhhf0 00ehvge0 698s8880 00fhhf1e ggmphhh0 40c444e0 206222ic ggikoki0 c44444e0 00qllhh0 00mphhh0 00ehhhe0 00uhhugg
    00fhhf11 00mpggg0 00fge1u0 88s88960 00hhhjd0 00hhha40 00hhlla0 00ha4ah0 00hhhf1e 00v248v0 00000cc0 00000c48 000v0000
    op248j30 0cc0cc00 01248g00 24888420 84222480 e88888e0 e22222e0 000000v0 00v0v000 044v4400 c4800000 eh124040 00000000
""".split()
FONT = {character: np.array([[int(digit, 32) >> (4 - x) & 1 for x in range(5)] for digit in rows], bool)      # [8, 5]
        for character, rows in zip(CHARACTERS, ROWS, strict=True)}
GREEN, RED, WHITE, GREY = (70, 190, 110), (215, 70, 70), (255, 255, 255), (150, 150, 160)
PAPER = (24, 24, 30)


def draw_text(image, text, left, top, color=WHITE, scale=1):
    """Writes one line into image, uint8 [h, w, 3], in place; a character is 6 scale wide, what does not fit is cut off.
    What the font lacks is shown as a question mark."""
    for i, character in enumerate(text):
        glyph = FONT.get(character, FONT["?"]).repeat(scale, 0).repeat(scale, 1)                # [8 scale, 5 scale]
        x = left + 6 * scale * i
        patch = image[top:top + len(glyph), x:x + glyph.shape[1]]
        patch[glyph[:patch.shape[0], :patch.shape[1]]] = color


def wall(videos, prompts, titles, verdicts=None, cell=64):
    """Videos side by side, as one video uint8 [f, H, W, 3]: a row a prompt (at the left), a column a checkpoint.

    videos: {column: uint8 [n, f, h, w, 3]}; prompts: n strings; titles: {column: lines above it}; verdicts: {column:
    bool [n]} frames each clip green or red. Clips are enlarged by whole pixels to about `cell` of height, or not at all
    where they are larger.
    """
    first = np.asarray(next(iter(videos.values())))
    n, f, h, w, _ = first.shape
    k = max(1, round(cell / h))
    high, wide, gap, text, head = h * k + 8, w * k + 8, 6, 150, 34
    canvas = np.empty((f, head + n * (high + gap), text + len(videos) * (wide + gap), 3), np.uint8)
    canvas[:] = PAPER
    for i, prompt in enumerate(prompts[:n]):
        lines = textwrap.wrap(prompt, (text - 12) // 6)[:(high - 8) // 10]
        for j, line in enumerate(lines):
            draw_text(canvas[0], line, 8, head + i * (high + gap) + high // 2 - 5 * len(lines) + 10 * j, GREY)
    for column, name in enumerate(videos):
        left = text + column * (wide + gap)
        for j, line in enumerate(titles[name]):
            draw_text(canvas[0], line[:wide // 6], left + 2, 6 + 14 * j, WHITE if j == 0 else GREY)
    canvas[:] = canvas[:1]                                                                      # text is the same in all frames
    for column, (name, clips) in enumerate(videos.items()):
        left = text + column * (wide + gap)
        for i, clip in enumerate(np.asarray(clips)):
            top = head + i * (high + gap)
            if verdicts is not None:
                canvas[:, top:top + high, left:left + wide] = GREEN if verdicts[name][i] else RED
            canvas[:, top + 4:top + high - 4, left + 4:left + wide - 4] = clip.repeat(k, 1).repeat(k, 2)
    return canvas


def write_gif(path, video, fps=8, hold=4):
    """Writes uint8 [f, h, w, 3] as a GIF that loops for ever, whole or not at all; its last frame stays `hold` frames.
    One palette of 256 colours is made for all frames."""
    video = np.concatenate([video, np.repeat(video[-1:], hold, 0)])
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    graph = av.filter.Graph()
    rate = Fraction(fps).limit_denominator(1001)
    source = graph.add_buffer(width=video.shape[2], height=video.shape[1], format="rgb24", time_base=1 / rate)
    split, palette, use = graph.add("split"), graph.add("palettegen", "stats_mode=full"), graph.add("paletteuse", "dither=none")
    sink = graph.add("buffersink")
    source.link_to(split)
    split.link_to(palette, 0, 0)
    split.link_to(use, 1, 0)
    palette.link_to(use, 0, 1)
    use.link_to(sink)
    graph.configure()
    for i, image in enumerate(video):
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
        frame.pts, frame.time_base = i, 1 / rate
        graph.push(frame)
    graph.push(None)
    try:
        with av.open(str(temporary), "w", format="gif", options={"loop": "0"}) as container:
            stream = container.add_stream("gif", rate=rate)
            stream.height, stream.width, stream.pix_fmt = *video.shape[1:3], "pal8"
            for _ in video:
                container.mux(stream.encode(sink.pull()))
            container.mux(stream.encode())
        os.replace(temporary, path)
    except av.FFmpegError as e:                                 # a full disk, or one that cannot be written
        raise OSError(e.errno, e.strerror, str(path)) from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
