"""Real files in: a folder of mixed containers, codecs, sizes, rates and damages gives an exact report, and
what is read of the good ones is right picture by picture. A film's grey level is its time, so that any
resampling can be checked.
"""
import json
import os
import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch

import common
import data
from common import InputError
from formats import video, weights

FRAMES, SECONDS, SLOPE = 17, 1.3, 120                           # the test encodes 17 frames at 16 fps
WANTED = (64, 48)

# name: codec, pixel format, stored size, frames per second, more
GOOD = {
    "h264.mp4": ("libx264", "yuv420p", (100, 60), 24, {}),
    "h264 of a phone.mov": ("libx264", "yuv420p", (64, 48), 30, {"turned": True}),
    "60 per second.mp4": ("libx264", "yuv420p", (64, 48), 60, {}),
    "8 per second.mp4": ("libx264", "yuv420p", (64, 48), 8, {"slow": True}),
    "ntsc.mkv": ("libx264", "yuv420p", (72, 48), Fraction(24000, 1001), {}),
    "variable.mkv": ("libx264", "yuv420p", (96, 64), 30, {"variable": True}),
    "variable.mp4": ("libx264", "yuv420p", (64, 96), 30, {"variable": True}),
    "sound.mp4": ("libx264", "yuv420p", (64, 64), 25, {"sound": "aac"}),
    "sound.webm": ("libvpx-vp9", "yuv420p", (64, 64), 25, {"sound": "libopus"}),
    "anamorphic.mp4": ("libx264", "yuv420p", (40, 60), 25, {"aspect": Fraction(2)}),
    "ten bits.mp4": ("libx265", "yuv420p10le", (64, 96), 30, {}),
    "prores.mov": ("prores_ks", "yuv422p10le", (96, 64), 25, {}),
    "vp8.webm": ("libvpx", "yuv420p", (90, 50), 20, {}),
    "odd.mkv": ("ffv1", "yuv444p", (33, 47), 18, {}),
    "mpeg4.mp4": ("mpeg4", "yuv420p", (80, 60), 25, {}),
    "mpeg2.mkv": ("mpeg2video", "yuv420p", (80, 60), 25, {}),
    "av1.mp4": ("libsvtav1", "yuv420p10le", (96, 80), 24, {}),
    "pictures.mov": ("mjpeg", "yuvj422p", (64, 48), 24, {}),
    "rgb.mov": ("qtrle", "rgb24", (50, 40), 24, {}),
    "title.mkv": ("libx264", "yuv420p", (64, 48), 25, {"title": "caf\N{LATIN SMALL LETTER E WITH ACUTE}"}),
}
# name: what the report says of it
BAD = {"zero.mp4": "damaged or not a video", "text.mp4": "damaged or not a video",
       "missing.mp4": "there is no such file", "cut.mp4": "damaged or not a video",
       "cut index.mp4": "damaged or not a video (no decoder", "cut.mkv": "damaged: ends after 0.",
       "cut.webm": "damaged: ends after 0.", "sound only.mp4": "holds no video stream",
       "photo.png": "too short: 1 frames of 17 at 16 fps",
       "short.mp4": "too short: 13 frames of 17 at 16 fps",
       "narrow.mkv": "is too narrow to be cropped to 64x48", "h264.mp4": "listed twice",
       "./rgb.mov": "listed twice", "nameless.mp4": "empty prompt",}


def can_write(codec):
    try:
        return bool(av.Codec(codec, "w"))
    except ValueError:                                          # this build of FFmpeg lacks it
        return False


def film(path, codec="libx264", pix_fmt="yuv420p", size=(64, 48), fps=24, seconds=SECONDS, variable=False,
         sound=None, aspect=None, turned=False, slow=False, title=None):
    """Writes a film whose grey level is 30 + 120 t, t in seconds, brighter by 20 in the upper half as it is
    stored."""
    rng = np.random.default_rng(len(path.name))
    with av.open(str(path), "w") as container:
        if title:
            container.metadata["title"] = title
        stream = container.add_stream(codec, rate=fps)
        stream.width, stream.height = size
        stream.pix_fmt = pix_fmt
        if variable:
            stream.codec_context.time_base = Fraction(1, 1000)
        if aspect:
            stream.sample_aspect_ratio = aspect
        stream.options = {"libsvtav1": {"preset": "12"},
                          "libx265": {"x265-params": "log-level=none"}}.get(codec, {})
        audio = container.add_stream(sound, rate=48000) if sound else None
        time = Fraction(0)
        while time < seconds:
            image = np.full((size[1], size[0], 3), 30 + SLOPE * float(time) % 200, np.uint8)
            image[:size[1] // 2] += 20
            frame = av.VideoFrame.from_ndarray(image, format="rgb24").reformat(format=pix_fmt)
            frame.time_base = Fraction(1, 1000) if variable else 1 / Fraction(fps)
            frame.pts = round(time / frame.time_base)
            container.mux(stream.encode(frame))
            time += Fraction(int(rng.integers(10, 70)), 1000) if variable else 1 / Fraction(fps)
        container.mux(stream.encode())
        if audio:                                               # a second longer than the picture
            for i in range(int((seconds + 1) * 48000) // 960):
                frame = av.AudioFrame.from_ndarray(np.zeros((1, 960), np.float32), format="fltp",
                                                   layout="mono")
                frame.rate, frame.pts, frame.time_base = 48000, 960 * i, Fraction(1, 48000)
                container.mux(audio.encode(frame))
            container.mux(audio.encode())
    if codec == "libsvtav1" and hasattr(os, "sched_setscheduler"):
        # started by root it gives its caller a real-time policy, under which gloo's polling ranks starve each
        # other
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
    if title:                                                   # not in UTF-8, as old programs wrote it
        raw = path.read_bytes()
        assert title.encode() in raw
        path.write_bytes(raw.replace(title.encode(), title.encode("latin-1").ljust(len(title.encode()))))
    if turned:                                                  # to be shown turned by 90 degrees clockwise
        raw = bytearray(path.read_bytes())
        at = raw.find(b"tkhd") + 44
        raw[at:at + 36] = struct.pack(">9i", 0, 65536, 0, -65536, 0, 0, size[1] << 16, 0, 1 << 30)
        path.write_bytes(raw)


def make_folder(folder, copies=1, seconds=SECONDS, scale=1):
    """`copies` of every good file and one of every bad one, with metadata -> (good names, {bad name:
    reason})."""
    folder.mkdir()
    good, rows = [], []
    for copy in range(copies):
        for name, (codec, pix_fmt, size, fps, more) in GOOD.items():
            if can_write(codec) and (not more.get("sound") or can_write(more["sound"])):
                good.append(f"{copy} {name}" if copy else name)
                film(folder / good[-1], codec, pix_fmt, (scale * size[0], scale * size[1]), fps, seconds,
                     **more)
    for name, codec in (("cut.mp4", "libx264"), ("cut.mkv", "libx264"), ("cut.webm", "libvpx")):
        film(folder / name, codec, seconds=2 * seconds)
        raw = (folder / name).read_bytes()
        (folder / name).write_bytes(raw[:len(raw) * 3 // 10])
    film(folder / "cut index.mp4")                              # its index lies behind the pictures
    raw = (folder / "cut index.mp4").read_bytes()
    (folder / "cut index.mp4").write_bytes(raw[:raw.find(b"stsd")])
    (folder / "zero.mp4").write_bytes(b"")
    (folder / "text.mp4").write_text("not a film\n" * 100)
    video.write_png(folder / "photo.png", np.zeros((48, 64, 3), np.uint8))
    film(folder / "short.mp4", seconds=0.8)
    film(folder / "narrow.mkv", "ffv1", "yuv444p", (2, 90))
    film(folder / "nameless.mp4")
    film(folder / "not listed.mp4")
    with av.open(str(folder / "sound only.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=48000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.rate = 48000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    for i, name in enumerate([*good, *BAD]):
        rows.append({"file_name": name, "prompt": "" if name == "nameless.mp4" else f"film {i}",
                     "label": i % 2})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return good, BAD


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips") / "clips"
    return folder, *make_folder(folder)


def run(command, *argv):
    function, Config = data.COMMANDS[command]
    common.cli(function, Config, "", [str(a) for a in argv])


FLAGS = ["--size", "64*48", "--frames", FRAMES, "--fps", 16]


# ---- one file
@pytest.mark.parametrize("name", GOOD)
def test_every_kind_of_file_gives_the_right_pictures(folder, name):
    codec, _, size, fps, more = GOOD[name]
    if name not in folder[1]:
        pytest.skip(f"this build of PyAV cannot write {codec}")
    got, rate = video.read_clip(folder[0] / name, WANTED, FRAMES, 16)
    assert got.shape == (FRAMES, 48, 64, 3) and got.dtype == torch.uint8 and rate == 16
    got = got.float()
    grey = got.mean((1, 2, 3)) - 10                                                # 20 in half of the picture
    due = 30 + SLOPE * torch.arange(FRAMES) / 16
    longest = 0.070 if more.get("variable") else float(1 / fps)                       # seconds between frames
    assert (grey - due).abs().max() < SLOPE * longest / 2 + 4
    assert (grey - due).mean().abs() < (2.5 if more.get("variable") else 4)                # no lag of a frame
    steps = got.mean((0, 3))                                                               # [48, 64]
    bright, dark = (steps[:, 40:], steps[:, :24]) if more.get("turned") else (steps[:20], steps[28:])
    assert 15 < bright.mean() - dark.mean() < 25


def test_pixels_become_square_and_phones_stand_upright(folder):
    assert video.read_video(folder[0] / "anamorphic.mp4").shape[1:] == (60, 80, 3)
    assert video.read_video(folder[0] / "h264 of a phone.mov").shape[1:] == (64, 48, 3)


def test_sound_may_be_longer_than_the_picture(folder):
    assert len(video.read_video(folder[0] / "sound.mp4")) == 33
    assert len(video.read_clip(folder[0] / "sound.mp4", fps=16)[0]) == 21                   # 33 / 25 s


def test_a_pause_holds_its_picture_to_the_middle(tmp_path):
    """Frames at 0, .1, .9 and 1.0 s read at 10 per second: the nearest in time, the later of two."""
    with av.open(str(tmp_path / "a.mkv"), "w") as container:
        stream = container.add_stream("ffv1", rate=10)
        stream.width, stream.height, stream.pix_fmt = 16, 16, "gray"
        stream.codec_context.time_base = Fraction(1, 1000)
        for i, pts in enumerate((0, 100, 900, 1000)):
            frame = av.VideoFrame.from_ndarray(np.full((16, 16), 50 * i, np.uint8), format="gray")
            frame.pts, frame.time_base = pts, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    got = video.read_clip(tmp_path / "a.mkv", fps=10)[0][:, 0, 0, 0]
    assert [round(int(v) / 50) for v in got] == [0, 1, 1, 1, 1, 2, 2, 2, 2, 2, 3]


def test_memory_is_that_of_the_frames_asked_for(tmp_path):
    film(tmp_path / "long.mp4", size=(1280, 720), fps=30, seconds=2)                          # 166 MB as RGB
    assert video.read_clip(tmp_path / "long.mp4", (64, 48), None, None, 2 ** 20)[0].shape == (60, 48, 64, 3)
    assert len(video.read_clip(tmp_path / "long.mp4", None, 5, None, 2 ** 27)[0]) == 5
    with pytest.raises(InputError, match="long.mp4: more than 128 MiB of frames: pass --size and --frames"):
        video.read_clip(tmp_path / "long.mp4", None, None, None, 2 ** 27)


# ---- a folder
def test_check_is_exact(folder, capsys):
    path, good, bad = folder
    with pytest.raises(SystemExit) as end:
        run("check", path, *FLAGS)
    lines = capsys.readouterr().out.splitlines()
    assert end.value.code == 2 and len(lines) == len(bad) + 4
    for line, (name, reason) in zip(lines, bad.items()):                             # in the metadata's order
        assert line.startswith(f"{name}: ") and reason in line, line
    ones = sum(i % 2 for i in range(len(good)))
    assert lines[-4] == (f"{path}: {len(good)} of {len(good) + len(bad)} clips usable: {ones} good, "
                         f"{len(good) - ones} bad, 0 unlabelled; 64x48, 17 frames, 16 fps")
    if len(good) == len(GOOD):                                                     # by hand from GOOD's sizes
        assert lines[-3] == ("13 of them lose part of their picture to the crop: 50% of it stays at worst, "
                             "74% on average")
    assert lines[-2] == "1 of them are slower than 16 fps: their frames will repeat"
    assert lines[-1] == "1 video files are not in the metadata: not listed.mp4"


def test_a_second_run_does_only_what_is_missing(folder, tmp_path, monkeypatch, capsys):
    path, good, bad = folder
    out, read, real = tmp_path / "out", [], video.read_clip_facts
    monkeypatch.setattr(data, "read_clip_facts", lambda path,
                        *a: read.append(Path(path).name) or real(path, *a))
    run("encode", path, "--out", out, *FLAGS, "--clips_per_shard", 8)
    alone = [name for name, reason in bad.items() if reason != "listed twice"]
    # the first for its kind, too
    assert sorted(read) == sorted(Path(name).name for name in [*good, *alone, good[0]])
    shards = data.Shards(out)
    assert [row["file_name"] for row in shards.rows] == good and shards.latent_shape == (16, 5, 6, 8)
    assert shards.labels.tolist() == [i % 2 for i in range(len(good))]
    report = [json.loads(line) for line in (out / "report.jsonl").read_text().splitlines()]
    assert [row["file_name"] for row in report] == list(bad)
    assert all(bad[row["file_name"]] in row["reason"] for row in report)
    shown = capsys.readouterr()
    assert f"{len(good)} of {len(good) + len(bad)} clips encoded, {len(bad)} skipped" in shown.out

    before = {file.name: file.stat().st_mtime_ns for file in out.glob("shard-*")}
    whole = (path / "cut.mkv").read_bytes()
    try:
        film(path / "cut.mkv", seconds=SECONDS)                                             # mended
        read.clear()
        # the same size
        run("encode", path, "--out", out, "--size", "64x48", *FLAGS[2:], "--clips_per_shard", 8)
    finally:
        (path / "cut.mkv").write_bytes(whole)
    assert sorted(read) == sorted(alone)                   # what was skipped is looked at again, nothing else
    after = data.Shards(out)
    assert [row["file_name"] for row in after.rows] == [*good, "cut.mkv"]
    assert before.items() <= {file.name: file.stat().st_mtime_ns for file in out.glob("shard-*")}.items()
    report = [json.loads(line)["file_name"] for line in (out / "report.jsonl").read_text().splitlines()]
    assert report == [name for name in bad if name != "cut.mkv"]


def test_what_is_encoded_is_what_was_read(folder, tmp_path):
    """The shards hold the shipped VAE's own latents of the pictures, whatever the batch that they went
    through."""
    from families import load_vae
    path, good, _ = folder
    run("encode", path, "--out", tmp_path / "out", *FLAGS, "--batch_size", 3)
    shards = data.Shards(tmp_path / "out")
    vae = load_vae(weights.SHIPPED["t2v"] / "vae")
    for i in (0, len(good) // 2, len(good) - 1):
        clip = video.from_pixels(video.read_clip(path / good[i], WANTED, FRAMES, 16)[0][None])
        torch.testing.assert_close(shards.batch([i])["latents"], vae.encode(clip), rtol=1e-4, atol=1e-4)


def test_a_shard_never_holds_more_than_its_bytes(folder, tmp_path, monkeypatch):
    path, good, _ = folder
    monkeypatch.setattr(data, "SHARD_BYTES", 4 * (4 * 16 * 5 * 6 * 8 + 4 * 8 * 128))           # four clips
    monkeypatch.setattr(data, "BATCH_PIXELS", 2 * 17 * 64 * 48)                              # two clips
    run("encode", path, "--out", tmp_path / "out", *FLAGS)
    counts = [entry["count"] for entry in data.Shards(tmp_path / "out").index["shards"]]
    assert counts == [4] * (len(good) // 4) + [len(good) % 4] * (len(good) % 4 > 0)


# ---- interlaced ones
def two_fields(path, first="tff", marked=True, codec="libx264", pix_fmt="yuv420p", frames=12):
    """A film at 25 frames a second whose bar moves 4 pixels from one field to the next, 8 from frame to
    frame; red, by BT.709's matrix. first: the field that was shot first. marked: frame by frame, or (a
    number) by the container."""
    mark = av.filter.Graph()
    mark.link_nodes(mark.add_buffer(width=128, height=96, format=pix_fmt, time_base=Fraction(1, 25)),
                    mark.add("setfield", first if marked is True else "prog"),
                    mark.add("buffersink")).configure()
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt = 128, 96, pix_fmt
        context = stream.codec_context
        context.colorspace, context.color_range = 1, 1
        if codec == "libx264":
            stream.options = {"crf": "4"} | ({"x264-params": "interlaced=1"} if marked is True else {})
        if marked is not True and marked:
            context.field_order = marked
        for i in range(frames):
            image = np.full((96, 128, 3), (200, 40, 30), np.uint8)
            now = 0 if first == "tff" else 1
            image[now::2, 8 * i:8 * i + 16] = image[1 - now::2, 8 * i + 4:8 * i + 20] = 255
            mark.push(av.VideoFrame.from_ndarray(image, format="rgb24").reformat(format=pix_fmt,
                          dst_colorspace="ITU709"))
            container.mux(stream.encode(mark.pull()))
        container.mux(stream.encode())


def combed(image):
    """How much lines differ from the mean of their neighbours."""
    image = image[..., 1].float()
    return (image[1:-1] - (image[:-2] + image[2:]) / 2).abs().mean()


@pytest.mark.parametrize("name, how", (
    ("a.mp4", {}), ("a.mp4", {"first": "bff"}), ("a.mkv", {"codec": "ffv1"}),
    ("a.mkv", {"codec": "ffv1", "first": "bff", "marked": 3}), ("a.mkv", {"codec": "ffv1", "marked": 2})))
def test_interlaced_clips_become_whole_pictures(tmp_path, name, how):
    two_fields(tmp_path / name, **how)
    got, fps, facts = video.read_clip_facts(tmp_path / name)
    assert got.shape == (12, 96, 128, 3) and fps == 25 and facts.interlaced == 12 and facts.repeated == 0
    for i in (3, 6, 9):                                     # a bar of 16 pixels, where the first field has it
        assert combed(got[i]) < 1
        bar = (got[i, 48, :, 1] > 150).nonzero()[:, 0]
        assert abs(bar[0] - 8 * i) <= 1 and abs(bar[-1] - 8 * i - 15) <= 1, bar
        assert (got[i, 20, 120].int() - torch.tensor([200, 40, 30])).abs().max() <= 4
    assert len(video.read_clip(tmp_path / name, frames=1)[0]) == 1
    assert [len(video.read_clip(tmp_path / name, fps=rate)[0]) for rate in (50, 8)] == [23, 4]     # to .46 s


def test_whole_pictures_stay_untouched_and_the_check_names_the_others(tmp_path, capsys):
    (tmp_path / "clips").mkdir()
    two_fields(tmp_path / "clips/whole.mkv", codec="ffv1", marked=False)
    two_fields(tmp_path / "clips/fields.mp4")
    got, _, facts = video.read_clip_facts(tmp_path / "clips/whole.mkv")
    assert facts.interlaced == 0 and combed(got[3]) > 5
    (tmp_path / "clips/metadata.jsonl").write_text("".join(
        json.dumps({"file_name": name, "prompt": "x"}) + "\n" for name in ("whole.mkv", "fields.mp4")))
    run("check", tmp_path / "clips", "--frames", 9, "--size", "64*48")
    said = "1 of them are interlaced: each pair of fields became one picture, by FFmpeg's bwdif: fields.mp4"
    assert said in capsys.readouterr().out


def test_a_copy_for_the_browser_has_the_times_of_its_source(tmp_path):
    film(tmp_path / "a.mkv", size=(64, 48), fps=30, variable=True)
    film(tmp_path / "b.mp4", size=(64, 48), fps=120, seconds=0.5)
    for name, frames in (("a.mkv", None), ("b.mp4", 30)):
        video.copy_for_browser(tmp_path / name, tmp_path / "copy.mp4")
        got, fps = video.read_clip(tmp_path / "copy.mp4")
        assert fps <= 60 and frames in (None, len(got))
        due = 30 + SLOPE * torch.arange(len(got)) / fps
        assert (got.float().mean((1, 2, 3)) - 10 - due).abs().max() < SLOPE * .070 / 2 + 4
