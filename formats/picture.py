"""Pictures to look at: text on pixels, a wall of videos side by side, a looping GIF. They need only PyAV and
NumPy.

Axes: f frames, h height, w width, n prompts (rows), m checkpoints (columns), 3 RGB.
"""
import textwrap
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from formats.video import writing

# A pixel font of our own. A character has 8 rows of 5 pixels; each row is one digit of base 32 (e is 01110).
CHARACTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789abcdefghijklmnopqrstuvwxyz.,-%:/()[]_=+'? "
ROWS = """
    ehhvhhh0 uhhuhhu0 ehggghe0 sihhhis0 vgguggv0 vgguggg0 ehgnhhf0 hhhvhhh0 e44444e0 72222ic0 hikokih0
    ggggggv0 hrllhhh0 hhpljhh0 ehhhhhe0 uhhuggg0 ehhhlid0 uhhukih0 fgge11u0 v4444440 hhhhhhe0 hhhhha40
    hhhllla0 hha4ahh0 hhha4440 v1248gv0 ehjlphe0 4c4444e0 eh1248v0 v2421he0 26aiv220 vgu11he0 68guhhe0
    v1248880 ehhehhe0 ehhf12c0 00e1fhf0 ggmphhu0 00egghe0 11djhhf0 00ehvge0 698s8880 00fhhf1e ggmphhh0
    40c444e0 206222ic ggikoki0 c44444e0 00qllhh0 00mphhh0 00ehhhe0 00uhhugg 00fhhf11 00mpggg0 00fge1u0
    88s88960 00hhhjd0 00hhha40 00hhlla0 00ha4ah0 00hhhf1e 00v248v0 00000cc0 00000c48 000v0000 op248j30
    0cc0cc00 01248g00 24888420 84222480 e88888e0 e22222e0 000000v0 00v0v000 044v4400 c4800000 eh124040
    00000000
""".split()
BITS = np.array([16, 8, 4, 2, 1])
FONT = {character: np.array([int(digit, 32) & BITS for digit in rows]) > 0                      # bool [8, 5]
        for character, rows in zip(CHARACTERS, ROWS, strict=True)}
GREEN, RED, WHITE, GREY = (70, 190, 110), (215, 70, 70), (255, 255, 255), (150, 150, 160)
PAPER = (24, 24, 30)


def draw_text(image, text, left, top, color=WHITE, scale=1):
    """Writes one line of text into image, uint8 [h, w, 3], in place. A character is 6 * scale pixels wide.
    What does not fit is cut off; a character that the font lacks becomes a question mark."""
    for i, character in enumerate(text):
        glyph = FONT.get(character, FONT["?"]).repeat(scale, 0).repeat(scale, 1)        # [8 scale, 5 scale]
        x = left + 6 * scale * i
        patch = image[top:top + len(glyph), x:x + glyph.shape[1]]
        patch[glyph[:patch.shape[0], :patch.shape[1]]] = color


def wall(videos, prompts, titles, verdicts=None, cell=64):
    """-> videos side by side, as one video uint8 [f, H, W, 3]: one row per prompt, whose text is at the left,
    and one column per checkpoint.

    videos: {column: uint8 [n, f, h, w, 3]}. prompts: n strings. titles: {column: lines of text above it}.
    verdicts: {column: bool [n]}; a clip gets a green frame if its verdict is true, else a red frame. Clips
    are enlarged by a whole number, to a height of about `cell` pixels; larger clips keep their size. """
    first = np.asarray(next(iter(videos.values())))
    n, f, h, w, _ = first.shape
    k = max(1, round(cell / h))
    high, wide = h * k + 8, w * k + 8           # size of a clip with its frame
    gap, text, head = 6, 150, 34                # between clips; width of the prompts; height of the titles
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
    canvas[:] = canvas[:1]                                              # the text is the same in all frames
    for column, (name, clips) in enumerate(videos.items()):
        left = text + column * (wide + gap)
        for i, clip in enumerate(np.asarray(clips)):
            top = head + i * (high + gap)
            if verdicts is not None:
                canvas[:, top:top + high, left:left + wide] = GREEN if verdicts[name][i] else RED
            canvas[:, top + 4:top + high - 4, left + 4:left + wide - 4] = clip.repeat(k, 1).repeat(k, 2)
    return canvas


def write_gif(path, video, fps=8, hold=4):
    """Writes uint8 [f, h, w, 3] as a GIF that loops for ever. The last frame is shown `hold` frames longer.
    All frames share one palette of 256 colours. The file is written whole or not at all."""
    video = np.concatenate([video, np.repeat(video[-1:], hold, 0)])
    rate = Fraction(fps).limit_denominator(1001)
    graph = _palette_graph(*video.shape[1:3], rate)
    for i, image in enumerate(video):
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
        frame.pts, frame.time_base = i, 1 / rate
        graph.push(frame)
    graph.push(None)
    with writing(Path(path), "gif", loop="0") as container:
        stream = container.add_stream("gif", rate=rate)
        stream.height, stream.width, stream.pix_fmt = *video.shape[1:3], "pal8"
        for _ in video:
            container.mux(stream.encode(graph.pull()))
        container.mux(stream.encode())


def _palette_graph(height, width, rate):
    """-> a filter graph that reads all RGB frames, makes one palette for them and gives them back in its
    colours."""
    graph = av.filter.Graph()
    source = graph.add_buffer(width=width, height=height, format="rgb24", time_base=1 / rate)
    split = graph.add("split")
    palette = graph.add("palettegen", "stats_mode=full")
    use = graph.add("paletteuse", "dither=none")
    sink = graph.add("buffersink")
    source.link_to(split)
    split.link_to(palette, 0, 0)
    split.link_to(use, 1, 0)
    palette.link_to(use, 0, 1)
    use.link_to(sink)
    graph.configure()
    return graph
