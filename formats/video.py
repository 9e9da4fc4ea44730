"""Video files in and out. Any container and codec that PyAV reads becomes RGB frames as a player shows them,
at one size and rate; H.264 and PNG are written. One frame is decoded at a time, so memory holds only the
frames that are asked for.

Axes: F frames of the result, f frames, H W its pixels, h w pixels, n videos.
"""
import collections
import contextlib
import math
import os
import re
import threading
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
from av.video.reformatter import ColorRange, Colorspace, Interpolation, VideoReformatter

from common import InputError
from formats import colour
from formats.metadata import replace_bytes
from formats.paths import as_url, require_file

FASTEST = 60                            # frames per second of a copy for the browser, at most
FIELDS = {2: "tff", 3: "bff", 4: "bff", 5: "tff"}       # FFmpeg's field orders: which field is shown first
SWSCALE = {colour.BT709: Colorspace.ITU709, colour.BT601: Colorspace.ITU601}


# ---- in
def read_video(path):
    """-> uint8 [f, h, w, 3], upright. Raises InputError if the file cannot be decoded to its end."""
    return read_clip(path)[0]


@dataclass
class Facts:
    """What a clip is, and what was done to its frames so that they fit. A user wants to know this before
    training."""
    fps: float | None = None        # the file's own frames per second
    kept: float = 1.0               # share of the picture that the crop leaves
    repeated: int = 0               # images that only fill up the rate of a slower file
    still: int = 0                  # images of the file that equal the image before
    interlaced: int = 0             # frames of two fields, shot one after the other, that were deinterlaced
    colours: str | None = None      # None, or formats/colour.py's "converted", "guessed" or "approximate"


def read_clip(path, size=None, frames=None, fps=None, largest=None):
    """-> (video uint8 [F, H, W, 3], its frames per second).

    size (W, H): the video is scaled to cover this size, then centre-cropped. frames: reading stops after this
    many. fps: the video is resampled to this rate: image i is the frame nearest to i / fps seconds, and
    frames of a slower file repeat. Raises InputError if the file cannot be decoded, ends earlier than its
    header says, or holds more than `largest` bytes of such frames. """
    return read_clip_facts(path, size, frames, fps, largest)[:2]


def read_clip_facts(path, size=None, frames=None, fps=None, largest=None):
    """Like `read_clip`, but returns Facts about the clip too."""
    pixels, shape, count, facts = bytearray(), None, 0, Facts()
    for image in read_images(path, size, frames, fps, facts):
        pixels += image.data.cast("B")
        shape = image.shape
        count += 1
        if largest and len(pixels) > largest:
            raise InputError(f"{path}: more than {largest >> 20} MiB of frames: pass --size and --frames")
    return torch.frombuffer(pixels, dtype=torch.uint8).view(count, *shape), float(fps or facts.fps), facts


def read_images(path, size=None, frames=None, fps=None, facts=None):
    """Yields the frames of `read_clip`, uint8 [H, W, 3], one by one while the file is decoded. facts: Facts
    to fill in on the way."""
    require_file(path)
    facts = facts or Facts()
    reformatter, last, count = VideoReformatter(), None, 0
    fps = fps and Fraction(fps).limit_denominator(1001)
    options = {"pattern_type": "none"}  # the name of a picture, such as 50%d.png, is a name and no pattern
    try:
        # titles may have any encoding
        with av.open(as_url(path), metadata_errors="replace", options=options) as container:
            stream = container.streams.best("video")
            if stream is None:
                raise InputError(f"{path}: holds no video stream")
            if stream.codec_context is None:  # an index cut short, or a codec that FFmpeg does not know
                raise InputError(f"{path}: damaged or not a video (no decoder for it)")
            stream.codec_context.thread_count = 1  # many clips at once use more cores than threads within one
            stream.codec_context.options = {"err_detect": "explode"}  # damaged frames are errors, not guessed
            native = stream.average_rate or stream.guessed_rate or Fraction(8)
            facts.fps = float(native)
            timed = _decoded(path, container, stream, native)
            timed = _deinterlaced(path, timed, stream.codec_context, facts)
            for frame, times in _resampled(timed, fps, native):
                if stream.metadata.get("alpha_mode") == "1" and not _may_be_transparent(frame):
                    raise InputError(f"{path}: has an alpha channel that its decoder leaves out: "
                                     "put it on a background first")
                image = _to_rgb(path, frame, size, stream.sample_aspect_ratio or 1, reformatter, facts)
                if last is not None:
                    if image.shape != last.shape:
                        raise InputError(f"{path}: its frames differ in size")
                    facts.still += np.array_equal(image, last)
                last = image
                for i in range(times):
                    facts.repeated += i > 0
                    yield image
                    count += 1
                    if count == frames:
                        return
    except (av.FFmpegError, OSError) as e:
        raise InputError(f"{path}: damaged or not a video ({e.strerror or e})") from None
    if not count:
        raise InputError(f"{path}: holds no frames")


def _decoded(path, container, stream, native):
    """Yields (frame, seconds since the first frame as an exact Fraction). Matroska and MPEG files may be cut
    off anywhere without an error, so the end is compared with the end that the file's header promises."""
    start, time, end = None, None, 0
    for packet in container.demux(stream):
        frames = packet.decode()
        if packet.is_corrupt or any(frame.is_corrupt for frame in frames):
            raise InputError(f"{path}: damaged or not a video (corrupt packet)")
        for frame in frames:
            stamp = None if frame.pts is None else frame.pts * frame.time_base
            start = stamp if start is None else start
            if stamp is not None:
                time = stamp - start
            elif time is None:
                time = Fraction(0)
            else:
                time += 1 / native
            end = max(end, time + 1 / native)
            yield frame, time
        if None not in (packet.pts, packet.duration, start):  # the last frame may be shown for long
            end = max(end, (packet.pts + packet.duration) * packet.time_base - start)
    promised = _promised(container, stream, max(float(start or 0), 0))
    if end < promised - 0.5:
        raise InputError(f"{path}: damaged: ends after {float(end):.1f} of its {promised:.1f} seconds")


def _promised(container, stream, start):
    """Seconds that the video should last according to the file's header, 0 if the header does not say. A
    stream's duration counts from its first frame, which is shown at `start` seconds; Matroska's tag and the
    whole file's duration count from 0."""
    if stream.duration:
        return float(stream.duration * stream.time_base)
    if tag := re.fullmatch(r"(\d+):(\d+):(\d+(\.\d+)?)", stream.metadata.get("DURATION", "")):  # Matroska
        return 3600 * int(tag[1]) + 60 * int(tag[2]) + float(tag[3]) - start
    if len(container.streams) == 1:     # with several streams the sound may last longer
        return (container.duration or 0) / av.time_base - start
    return 0


def _deinterlaced(path, timed, codec, facts):
    """Yields the (frame, time) pairs of `timed`, after FFmpeg's bwdif made one whole picture of each
    interlaced frame. A frame counts as interlaced if it is marked so, by itself or by the container. Other
    frames stay as they are."""
    graph, format, times = None, None, collections.deque()
    for i, (frame, time) in enumerate(timed):
        first_field = FIELDS.get(codec.field_order)
        interlaced = frame.interlaced_frame or first_field is not None
        facts.interlaced += interlaced
        if graph is None and not interlaced:
            yield frame, time
            continue
        if graph is None:
            graph = _bwdif(frame, None if frame.interlaced_frame else first_field)
            format = frame.width, frame.height, frame.format.name
        if format != (frame.width, frame.height, frame.format.name):    # bwdif looks at a frame's neighbours
            raise InputError(f"{path}: its frames differ in size")
        frame.pts = i
        graph.push(frame)
        times.append(time)
        for done in _pull(graph):
            yield done, times.popleft()
    if graph is not None:
        graph.push(None)
        for done in _pull(graph):
            yield done, times.popleft()


def _bwdif(frame, first_field):
    """-> a filter graph for frames like this one, which gives one picture for each. first_field: tff or bff
    where the frames are not marked themselves."""
    graph = av.filter.Graph()
    graph.threads = 1
    size = {"width": frame.width, "height": frame.height}
    # any time base will do, because `_deinterlaced` keeps the times
    nodes = [graph.add_buffer(**size, format=frame.format, time_base=Fraction(1, 25))]
    if first_field:
        nodes.append(graph.add("setfield", first_field))
    nodes += [graph.add("bwdif", "mode=send_frame:deint=interlaced"), graph.add("buffersink")]
    graph.link_nodes(*nodes)
    graph.configure()
    return graph


def _pull(graph):
    """Yields the frames that a filter graph has ready."""
    while True:
        try:
            yield graph.pull()
        except (av.BlockingIOError, av.EOFError):
            return


def _resampled(timed, fps, native):
    """Yields (frame, how often it is shown) so that image i is the frame nearest to i / fps seconds, or the
    later of two frames that are equally near."""
    shown, held = 0, None
    for frame, time in timed:
        if fps is None:
            yield frame, 1
        elif held and (times := math.ceil((held[1] + time) / 2 * fps) - shown) > 0:
            yield held[0], times
            shown += times
        held = frame, time
    if fps and held and (times := math.ceil((held[1] + 1 / (2 * native)) * fps) - shown) > 0:
        yield held[0], times


def _to_rgb(path, frame, size, pixel_aspect, reformatter, facts):
    """-> uint8 [H, W, 3]: square pixels, turned and mirrored as the file asks (phones store portrait clips
    lying down), on black where it is transparent, in BT.709's colours."""
    across, flip_x, flip_y = _orientation(frame)
    turn = slice(None, None, -1 if across else 1)
    width, height = (max(1, round(frame.width * pixel_aspect)), frame.height)[turn]
    scale = max(size[0] / width, size[1] / height) if size else 1
    wide, high = (round(width * scale), round(height * scale))
    if size and wide * high > 8 * size[0] * size[1]:
        raise InputError(f"{path}: {width}x{height} is too narrow to be cropped to {size[0]}x{size[1]}")
    if scale < 1:
        how = Interpolation.AREA
    elif scale > 1:
        how = Interpolation.BICUBIC
    else:
        how = Interpolation.BILINEAR
    transfer, primaries, matrix = colour.tags_of(frame)
    colours = colour.kind(transfer, primaries, matrix, frame.height)
    if matrix != colour.RGB:
        frame.colorspace = colour.matrix_of(transfer, primaries, matrix, frame.height)
    if _may_be_transparent(frame):
        rgba = reformatter.reformat(frame, format="rgba", threads=1).to_ndarray()
        on_black = (rgba[..., :3] * (rgba[..., 3:] / np.float32(255))).round().astype(np.uint8)
        frame = av.VideoFrame.from_ndarray(on_black, format="rgb24")
    deep = colours == "converted"
    pixels = "rgb48le" if deep else "rgb24"
    scaled = reformatter.reformat(frame, *(wide, high)[turn], pixels, interpolation=how, threads=1)
    image = scaled.to_ndarray()
    image = image.transpose(1, 0, 2) if across else image
    image = image[::-1 if flip_y else 1, ::-1 if flip_x else 1]
    if size:
        left, top = (wide - size[0]) // 2, (high - size[1]) // 2
        image = image[top:top + size[1], left:left + size[0]]
        facts.kept = min(facts.kept, size[0] * size[1] / (wide * high))
    facts.colours = facts.colours or colours
    if deep:
        image = colour.to_bt709(image, transfer, primaries)
    return np.ascontiguousarray(image)


def _may_be_transparent(frame):
    return frame.format.has_palette or any(component.is_alpha for component in frame.format.components)


def _orientation(frame):
    """-> (rows become columns, then mirrored in x, then in y), by the file's display matrix, to the nearest
    quarter turn."""
    matrix = next((bytes(data) for data in frame.side_data if data.type.name == "DISPLAYMATRIX"), None)
    if matrix is None:
        return False, False, False
    a, b, _, c, d = np.frombuffer(matrix, np.int32)[:5]                 # x' = a x + c y, y' = b x + d y
    across = abs(b) + abs(c) > abs(a) + abs(d)
    return (True, c < 0, b < 0) if across else (False, a < 0, d < 0)


# ---- pixels and the VAE's floats
# What the VAEs of Wan2.1 and of the embedded world make of a video: one latent frame of the first frame and
# of each 4 frames after it; one position of 8 x 8 pixels; 16 channels.
TIME, SPACE, CHANNELS = 4, 8, 16


def to_pixels(video):
    """Decoded video [b, 3, F, H, W] in about [-1, 1] -> uint8 [b, F, H, W, 3], the form for files and for the
    annotator."""
    pixels = ((video.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return pixels.permute(0, 2, 3, 4, 1).contiguous()


def from_pixels(video):
    """uint8 [b, F, H, W, 3] -> float [b, 3, F, H, W] in [-1, 1]."""
    video = video.permute(0, 4, 1, 2, 3).contiguous().float()
    return video.div_(127.5).sub_(1)            # in place: clips can be large


# ---- out
def write_video(path, video, fps=8):
    """Writes uint8 [f, h, w, 3] (tensor or array) as H.264, 4:2:0 (odd sizes gain a row or column), with
    tagged colours, whole or not at all. Raises InputError if the name does not end in .mp4."""
    path, video = Path(path), np.asarray(video)
    if path.suffix.lower() != ".mp4":
        raise InputError(f"{path}: the name of a video to write must end in .mp4")
    if video.dtype != np.uint8 or video.ndim != 4 or video.shape[-1] != 3 or not len(video):
        raise ValueError(f"write_video wants uint8 [f, h, w, 3], got {video.dtype} {list(video.shape)}")
    _write_h264(path, video, fps, {"crf": "12", "preset": "veryfast", "threads": "1"})


def copy_for_browser(source, path):
    """Writes the video in the file `source` as an mp4 that browsers play, at the same rate (at most 60 frames
    per second). Frames are converted one by one, so a long video takes no more memory than a short one.
    Raises InputError if `source` cannot be read to its end."""
    fps = min(first_look(source).fps, FASTEST)
    options = {"crf": "16", "preset": "ultrafast", "threads": "2"}
    _write_h264(Path(path), read_images(source, fps=fps), fps, options)


def first_look(path):
    """-> the Facts of a file's first frame. Raises InputError if this frame cannot be read."""
    return read_clip_facts(path, frames=1)[2]


def _write_h264(path, images, fps, options):
    """Writes uint8 images [h, w, 3], an array or a generator of them, as mp4."""
    reformatter, stream = VideoReformatter(), None
    with writing(path, "mp4") as container:
        for image in images:
            image = np.pad(image, ((0, image.shape[0] % 2), (0, image.shape[1] % 2), (0, 0)), mode="edge")
            tags = colour.tags_to_write(image.shape[0])
            if stream is None:
                stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
                stream.height, stream.width, stream.pix_fmt = *image.shape[:2], "yuv420p"
                for name, value in tags.items():
                    setattr(stream.codec_context, name, value)
                # in small pictures x264's mbtree reads memory that nobody set, and bytes differ between runs
                stream.options = options | {"x264-params": "mbtree=0"}
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame = reformatter.reformat(frame, format="yuv420p", dst_colorspace=SWSCALE[tags["colorspace"]],
                                         dst_color_range=ColorRange.MPEG, threads=1)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


@contextlib.contextmanager
def writing(path, format, **options):
    """Gives a container of PyAV to fill: a file with a temporary name, which is renamed to `path` at the end.
    If anything fails, nothing is left of the file. Raises OSError, which names the file, if it cannot be
    written, as on a full disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".writing-{os.getpid()}-{threading.get_ident()}.tmp")   # one for each thread
    try:
        with av.open(as_url(temporary), "w", format=format, options=options) as container:
            yield container
        os.replace(temporary, path)
    except av.FFmpegError as e:
        raise OSError(e.errno, e.strerror, str(path)) from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def write_png(path, image):
    """Writes uint8 [h, w, 3] as PNG, whole or not at all."""
    image = np.ascontiguousarray(image)
    codec = av.CodecContext.create("png", "w")
    codec.height, codec.width, codec.pix_fmt, codec.time_base = *image.shape[:2], "rgb24", Fraction(1, 1)
    packets = codec.encode(av.VideoFrame.from_ndarray(image, format="rgb24")) + codec.encode(None)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    replace_bytes(path, b"".join(bytes(packet) for packet in packets))


def contact_sheet(videos, path, scale=3):
    """Writes uint8 videos [n, f, h, w, 3] as one PNG: one row per video, time to the right."""
    frames = np.asarray(videos).repeat(scale, 2).repeat(scale, 3)     # [n, f, H, W, 3]
    frames = np.pad(frames, ((0, 0), (0, 0), (0, scale), (0, scale), (0, 0)), constant_values=255)
    n, f, h, w, _ = frames.shape
    write_png(path, frames.transpose(0, 2, 1, 3, 4).reshape(n * h, f * w, 3))
