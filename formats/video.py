"""Video files in and out: any container and codec that PyAV reads -> RGB frames as a player shows them, at one size and
rate; H.264 and PNG out. One frame is decoded at a time, so memory is that of the frames asked for, whatever the file.

Axes: F frames of the result, f frames, H W its pixels, h w pixels, n videos.
"""
import contextlib
import math
import os
import re
import stat
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
from av.video.reformatter import Interpolation, VideoReformatter

from common import InputError
from formats import colour
from formats.metadata import replace_bytes


# ---- in
def read_video(path):
    """-> uint8 [f, h, w, 3], upright. Raises InputError if the file cannot be decoded to its end."""
    return read_clip(path)[0]


@dataclass
class Facts:
    """What was done to a clip's frames so that they fit: what a user wants to know before training on them."""
    kept: float = 1.0               # share of the picture that the crop leaves
    repeated: int = 0               # images that only fill up the rate of a slower file
    still: int = 0                  # images that equal the one before, in the file itself
    colours: str | None = None      # None, or formats/colour.py's "converted" or "approximate"


def read_clip(path, size=None, frames=None, fps=None, largest=None):
    """-> (video uint8 [F, H, W, 3], its frames per second).

    size (W, H): scaled to cover it, then centre-cropped. frames: reading stops after as many. fps: resampled to this
    rate, image i being the frame nearest to i / fps seconds; frames of a slower file repeat. Raises InputError if the
    file cannot be decoded, ends before it says it does, or (largest) holds more bytes of such frames.
    """
    return read_clip_facts(path, size, frames, fps, largest)[:2]


def read_clip_facts(path, size=None, frames=None, fps=None, largest=None):
    """`read_clip`, and the Facts of what it did."""
    require_file(path)
    pixels, shapes, count, reformatter, facts, last = bytearray(), set(), 0, VideoReformatter(), Facts(), None
    fps = fps and Fraction(fps).limit_denominator(1001)
    try:
        with av.open(str(path), metadata_errors="replace") as container:  # titles of any encoding
            stream = container.streams.best("video")
            if stream is None:
                raise InputError(f"{path}: holds no video stream")
            if stream.codec_context is None:  # an index cut short, or a codec that FFmpeg does not know
                raise InputError(f"{path}: damaged or not a video (no decoder for it)")
            stream.codec_context.thread_count = 1  # many clips at once use more cores than threads within one
            stream.codec_context.options = {"err_detect": "explode"}  # no frames made up for damaged ones
            native = stream.average_rate or stream.guessed_rate or Fraction(8)
            for frame, times in _resampled(_decoded(path, container, stream, native), fps, native):
                if stream.metadata.get("alpha_mode") == "1" and not _may_be_transparent(frame):
                    raise InputError(f"{path}: has an alpha channel that its decoder leaves out: put it on a background first")
                image = _to_rgb(path, frame, size, stream.sample_aspect_ratio or 1, reformatter, facts)
                shapes.add(image.shape)
                facts.still += last is not None and np.array_equal(image, last)
                last = image
                for i in range(min(times, (frames or math.inf) - count)):
                    pixels += image.data.cast("B")
                    count += 1
                    facts.repeated += i > 0
                    if largest and len(pixels) > largest:
                        raise InputError(f"{path}: more than {largest >> 20} MiB of frames: pass --size and --frames")
                if count == frames:
                    break
    except (av.FFmpegError, OSError) as e:
        raise InputError(f"{path}: damaged or not a video ({e.strerror or e})") from None
    if len(shapes) != 1:
        raise InputError(f"{path}: " + ("its frames differ in size" if shapes else "holds no frames"))
    return torch.frombuffer(pixels, dtype=torch.uint8).view(count, *shapes.pop()), float(fps or native), facts


def require_file(path):
    """Raises InputError if `path` is no file that can be read, or is empty: as the kernel's own are, some of which never end."""
    try:
        found = os.stat(path)
        if not stat.S_ISREG(found.st_mode):
            raise InputError(f"{path}: is not a file")
        if not found.st_size:
            raise InputError(f"{path}: damaged or not a video (it is empty)")
        open(path, "rb").close()
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"{path}: there is no such file") from None
    except OSError as e:  # permissions, a name that is too long, a loop of links
        raise InputError(f"{path}: cannot be read ({e.strerror})") from None
    except ValueError as e:
        if isinstance(e, InputError):
            raise
        raise InputError(f"{path}: no file can have such a name") from None


def _decoded(path, container, stream, native):
    """Yields (frame, seconds since the first one, exact). Matroska and MPEG files may be cut off anywhere without an
    error, so the end is compared with the one that the file's header promises."""
    start, time, end = None, None, 0
    for packet in container.demux(stream):
        frames = packet.decode()
        if packet.is_corrupt or any(frame.is_corrupt for frame in frames):
            raise InputError(f"{path}: damaged or not a video (corrupt packet)")
        for frame in frames:
            stamp = None if frame.pts is None else frame.pts * frame.time_base
            start = stamp if start is None else start
            time = stamp - start if stamp is not None else Fraction(0) if time is None else time + 1 / native
            end = max(end, time + 1 / native)
            yield frame, time
        if None not in (packet.pts, packet.duration, start):  # the last frame may be shown for long
            end = max(end, (packet.pts + packet.duration) * packet.time_base - start)
    promised = _promised(container, stream, max(float(start or 0), 0))
    if end < promised - 0.5:
        raise InputError(f"{path}: damaged: ends after {float(end):.1f} of its {promised:.1f} seconds")


def _promised(container, stream, start):
    """Seconds that the video should last according to the file's header, 0 if that does not say. A stream's duration counts
    from its first frame, which is shown at `start` seconds; Matroska's tag and the whole file's duration count from 0."""
    if stream.duration:
        return float(stream.duration * stream.time_base)
    if tag := re.fullmatch(r"(\d+):(\d+):(\d+(\.\d+)?)", stream.metadata.get("DURATION", "")):  # Matroska
        return 3600 * int(tag[1]) + 60 * int(tag[2]) + float(tag[3]) - start
    return (container.duration or 0) / av.time_base - start if len(container.streams) == 1 else 0  # sound may last longer


def _resampled(timed, fps, native):
    """Yields (frame, how often it is shown) so that image i is the frame nearest to i / fps, the later of two."""
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
    """-> uint8 [H, W, 3]: square pixels, turned and mirrored as the file asks (phones store portrait clips lying down), on
    black where it is transparent, in BT.709's colours."""
    across, flip_x, flip_y = _orientation(frame)
    turn = slice(None, None, -1 if across else 1)
    width, height = (max(1, round(frame.width * pixel_aspect)), frame.height)[turn]
    scale = max(size[0] / width, size[1] / height) if size else 1
    wide, high = (round(width * scale), round(height * scale))
    if size and wide * high > 8 * size[0] * size[1]:
        raise InputError(f"{path}: {width}x{height} is too narrow to be cropped to {size[0]}x{size[1]}")
    how = Interpolation.AREA if scale < 1 else Interpolation.BICUBIC if scale > 1 else Interpolation.BILINEAR
    tags = frame.color_trc, frame.color_primaries
    colours = colour.kind(*tags, frame.colorspace)
    if _may_be_transparent(frame):
        rgba = reformatter.reformat(frame, format="rgba", threads=1).to_ndarray()
        on_black = (rgba[..., :3] * (rgba[..., 3:] / np.float32(255))).round().astype(np.uint8)
        frame = av.VideoFrame.from_ndarray(on_black, format="rgb24")
    deep = colours == "converted"
    if deep:
        frame.colorspace = colour.matrix_of(*tags, frame.colorspace)
    scaled = reformatter.reformat(frame, *(wide, high)[turn], "rgb48le" if deep else "rgb24", interpolation=how, threads=1)
    image = scaled.to_ndarray()
    image = image.transpose(1, 0, 2) if across else image
    image = image[::-1 if flip_y else 1, ::-1 if flip_x else 1]
    if size:
        left, top = (wide - size[0]) // 2, (high - size[1]) // 2
        image = image[top:top + size[1], left:left + size[0]]
        facts.kept = min(facts.kept, size[0] * size[1] / (wide * high))
    facts.colours = facts.colours or colours
    return np.ascontiguousarray(colour.to_bt709(image, *tags) if deep else image)


def _may_be_transparent(frame):
    return frame.format.has_palette or any(component.is_alpha for component in frame.format.components)


def _orientation(frame):
    """-> (rows become columns, then mirrored in x, then in y), of the file's display matrix, to the nearest quarter turn."""
    matrix = next((bytes(data) for data in frame.side_data if data.type.name == "DISPLAYMATRIX"), None)
    if matrix is None:
        return False, False, False
    a, b, _, c, d = np.frombuffer(matrix, np.int32)[:5]                 # x' = a x + c y, y' = b x + d y
    across = abs(b) + abs(c) > abs(a) + abs(d)
    return (True, c < 0, b < 0) if across else (False, a < 0, d < 0)


# ---- pixels and the VAE's floats
# What either VAE makes of a video: one latent frame of 4 frames (the first alone), 1 x 1 of 8 x 8 pixels, 16 channels.
TIME, SPACE, CHANNELS = 4, 8, 16


def to_pixels(video):
    """Decoded video [b, 3, F, H, W] in about [-1, 1] -> uint8 [b, F, H, W, 3], as written to files and judged."""
    return ((video.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 4, 1).contiguous()


def from_pixels(video):
    """uint8 [b, F, H, W, 3] -> float [b, 3, F, H, W] in [-1, 1]."""
    return video.permute(0, 4, 1, 2, 3).contiguous().float().div_(127.5).sub_(1)   # in place: clips can be large


# ---- out
def write_video(path, video, fps=8):
    """Writes uint8 [f, h, w, 3] (tensor or array) as H.264, 4:2:0 (odd sizes gain a row or column), whole or
    not at all. Raises InputError if the name does not end in .mp4."""
    path, video, reformatter = Path(path), np.asarray(video), VideoReformatter()
    if path.suffix.lower() != ".mp4":
        raise InputError(f"{path}: the name of a video to write must end in .mp4")
    if video.dtype != np.uint8 or video.ndim != 4 or video.shape[-1] != 3 or not len(video):
        raise ValueError(f"write_video wants uint8 [f, h, w, 3], got {video.dtype} {list(video.shape)}")
    video = np.pad(video, ((0, 0), (0, video.shape[1] % 2), (0, video.shape[2] % 2), (0, 0)), mode="edge")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with av.open(str(temporary), "w", format="mp4") as container:
            stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
            stream.height, stream.width, stream.pix_fmt = *video.shape[1:3], "yuv420p"
            # x264's mbtree reads memory that nobody set in pictures this small: bytes would differ from run to run
            stream.options = {"crf": "12", "preset": "veryfast", "threads": "1", "x264-params": "mbtree=0"}
            for image in video:
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
                container.mux(stream.encode(reformatter.reformat(frame, format="yuv420p", threads=1)))
            container.mux(stream.encode())
        os.replace(temporary, path)
    except av.FFmpegError as e:                                 # a full disk, or one that cannot be written
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
    """Writes uint8 videos [n, f, h, w, 3] as one PNG: a row a video, time to the right."""
    frames = np.asarray(videos).repeat(scale, 2).repeat(scale, 3)                   # [n, f, H, W, 3]
    frames = np.pad(frames, ((0, 0), (0, 0), (0, scale), (0, scale), (0, 0)), constant_values=255)
    n, f, h, w, _ = frames.shape
    write_png(path, frames.transpose(0, 2, 1, 3, 4).reshape(n * h, f * w, 3))
