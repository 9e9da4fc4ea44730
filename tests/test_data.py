"""data.py: what is read equals what was written, and every bad file is named in one line."""
import json
import os
import shutil
import struct
from pathlib import Path
from types import SimpleNamespace

import av
import launch
import numpy as np
import pytest
import torch
from launch import ROOT

import common
import data
from common import InputError
from formats import metadata
from formats.video import from_pixels, read_clip, read_video, to_pixels, write_video


def clip(frames=9, height=32, width=32, seed=0):
    """A square that slides over a smooth background; colours vary slowly, so that 4:2:0 loses little."""
    g = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    base = np.stack([60 + 60 * y / height, 80 + 40 * x / width, np.full(y.shape, 90)], -1)
    base = base + g.integers(0, 20, 3)
    video = np.stack([base] * frames).astype(np.uint8)
    for f in range(frames):
        video[f, 8:20, 2 * (f % 8):2 * (f % 8) + 12] += 40
    return video


# ---- video files
def test_what_is_read_is_what_was_written(tmp_path):
    for video in (clip(), torch.from_numpy(clip(17, 64, 48))):
        write_video(tmp_path / "new/a.mp4", video, fps=8)
        got = read_video(tmp_path / "new/a.mp4")
        assert got.dtype == torch.uint8 and got.shape == video.shape
        error = (got.float() - torch.as_tensor(video).float()).abs()
        assert error.mean() < 2 and error.max() < 40
        assert [p.name for p in (tmp_path / "new").iterdir()] == ["a.mp4"]  # nothing temporary is left
    with av.open(str(tmp_path / "new/a.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.pix_fmt, stream.average_rate) == ("h264", "yuv420p", 8)


def test_odd_sizes_gain_a_row_and_bad_arguments_are_named(tmp_path):
    write_video(tmp_path / "a.mp4", clip(5, 33, 31))
    assert read_video(tmp_path / "a.mp4").shape == (5, 34, 32, 3)
    with pytest.raises(InputError, match="must end in .mp4"):
        write_video(tmp_path / "a.gif", clip())
    with pytest.raises(ValueError, match="uint8"):
        write_video(tmp_path / "b.mp4", clip().astype(np.float32))


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    write_video(tmp_path / "a.mp4", clip(5))
    monkeypatch.setattr(data.os, "replace", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        write_video(tmp_path / "a.mp4", clip(9))
    monkeypatch.undo()
    assert len(read_video(tmp_path / "a.mp4")) == 5


def test_float_and_back():
    video = torch.arange(256, dtype=torch.uint8).repeat(3 * 4).view(1, 1, 32, 32, 3)
    x = from_pixels(video)
    assert x.shape == (1, 3, 1, 32, 32) and x.min() == -1 and x.max() == 1
    assert torch.equal(to_pixels(x), video)


def damaged_files(folder):
    write_video(folder / "good.mp4", clip(17, 64, 64))
    whole = (folder / "good.mp4").read_bytes()
    start, hole = whole.find(b"mdat") + 4, len(whole) // 2
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "text.mp4").write_text("not a video at all\n" * 50)
    (folder / "cut.mp4").write_bytes(whole[:len(whole) // 2])
    (folder / "hole.mp4").write_bytes(whole[:start] + bytes(hole) + whole[start + hole:])
    (folder / "folder.mp4").mkdir()
    with av.open(str(folder / "sound.mp4"), "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=44100)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 2048), np.float32), format="fltp", layout="mono")
        frame.rate = 44100
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return ["empty.mp4", "text.mp4", "cut.mp4", "hole.mp4", "folder.mp4", "sound.mp4", "missing.mp4"]


def test_every_damaged_file_is_one_line_naming_it(tmp_path):
    for name in damaged_files(tmp_path):
        with pytest.raises(InputError) as error:
            read_video(tmp_path / name)
        assert str(error.value).startswith(f"{tmp_path / name}: ") and "\n" not in str(error.value)
    assert len(read_video(tmp_path / "good.mp4")) == 17


def test_scaling_covers_and_crops_the_centre(tmp_path):
    video = np.zeros((5, 64, 128, 3), np.uint8)
    video[:, :, 32:96] = 200  # the centre square is bright; sides are dark
    write_video(tmp_path / "a.mp4", video)
    got, _ = read_clip(tmp_path / "a.mp4", size=(32, 32))
    assert got.shape == (5, 32, 32, 3) and got[:, :, 2:-2].min() > 180
    for size in ((48, 16), (16, 48), (96, 96), (256, 160)):
        assert read_clip(tmp_path / "a.mp4", size=size)[0].shape == (5, size[1], size[0], 3)


def test_frames_are_resampled_to_the_nearest_in_time(tmp_path):
    grey = np.arange(48, dtype=np.uint8)[:, None, None, None] * np.ones((1, 32, 32, 3), np.uint8) * 5
    write_video(tmp_path / "a.mp4", grey, fps=24)
    for fps, picks in ((8, np.arange(0, 48, 3)), (16, np.arange(32) * 1.5), (24, np.arange(48)),
                       (30, np.arange(60) * 0.8), (48, np.arange(95) / 2)):
        got, rate = read_clip(tmp_path / "a.mp4", fps=fps)
        index = got[:, 16, 16, 0].float().numpy() / 5
        assert rate == fps and len(got) == len(picks) and np.abs(index - picks).max() <= 0.75
    assert len(read_clip(tmp_path / "a.mp4", frames=9, fps=8)[0]) == 9


def test_portrait_clips_of_phones_stand_upright(tmp_path):
    video = np.zeros((5, 32, 64, 3), np.uint8)
    video[:, :16, :32] = 220  # upper left
    write_video(tmp_path / "a.mp4", video)
    raw = bytearray((tmp_path / "a.mp4").read_bytes())
    at = raw.find(b"tkhd") + 44  # the matrix of a phone held upright: turn by 90 degrees clockwise
    raw[at:at + 36] = struct.pack(">9i", 0, 65536, 0, -65536, 0, 0, 32 << 16, 0, 1 << 30)
    (tmp_path / "a.mp4").write_bytes(raw)
    got = read_video(tmp_path / "a.mp4")
    assert got.shape == (5, 64, 32, 3)
    expected = np.rot90(video[0], -1)
    assert (got[0].numpy().astype(int) - expected).__abs__().mean() < 5
    assert read_clip(tmp_path / "a.mp4", size=(16, 32))[0].shape == (5, 32, 16, 3)


# ---- metadata
def test_aliases_and_labels(tmp_path):
    lines = ['{"file_name": "a.mp4", "prompt": "one", "label": 1}', '',
             '{"video": "b.mp4", "text": "two", "reward": 0.0}',
             '{"file": "c.mp4", "caption": "three", "label": null}',
             '{"file_name": "d.mp4", "prompt": "vier ä"}',
             '{"file_name": "e.mp4", "prompt": "five", "label": false}']
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")
    rows = metadata.read_metadata(tmp_path)
    assert [r["label"] for r in rows] == [1, 0, None, None, 0]
    assert rows[1] == {"file_name": "b.mp4", "prompt": "two", "label": 0} and rows[3]["prompt"] == "vier ä"
    table = tmp_path / "table"
    table.mkdir()
    text = '\ufeffvideo,caption,reward\na.mp4,"one, and",1\nb.mp4,two,\nc.mp4,three,0.0\n'
    (table / "metadata.csv").write_text(text, encoding="utf-8")
    assert metadata.read_metadata(table) == [{"file_name": "a.mp4", "prompt": "one, and", "label": 1},
                                         {"file_name": "b.mp4", "prompt": "two", "label": None},
                                         {"file_name": "c.mp4", "prompt": "three", "label": 0}]


@pytest.mark.parametrize("line, wanted", [
    ('{"file_name": "a.mp4", "label": 0.7}', "row 2: label must be 0, 1 or missing, got 0.7"),
    ('{"file_name": "a.mp4", "label": -1}', "row 2: label must be 0, 1 or missing, got -1"),
    ('{"file_name": "a.mp4", "label": "good"}', "row 2: label must be 0, 1 or missing, got 'good'"),
    ('{"prompt": "x"}', "row 2: no file_name"), ('{"file_name": 3}', "row 2: no file_name"),
    ('{"file_name": ', "row 2: not a JSON object"), ('[1, 2]', "row 2: not a JSON object")])
def test_unusable_rows_are_named(tmp_path, line, wanted):
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "ok.mp4", "prompt": "x"}\n' + line + "\n")
    with pytest.raises(InputError) as error:
        metadata.read_metadata(tmp_path)
    message = str(error.value)
    assert wanted in message and "metadata.jsonl" in message and "\n" not in message


def test_missing_metadata(tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        metadata.read_metadata(tmp_path / "nowhere")
    with pytest.raises(InputError, match="no metadata.jsonl or metadata.csv in it"):
        metadata.read_metadata(tmp_path)
    (tmp_path / "metadata.jsonl").write_text("")
    with pytest.raises(InputError, match="has no rows"):
        metadata.read_metadata(tmp_path)


# ---- shards
def make_shards(folder, counts=(5, 3), labels=(0, 1, None)):
    g = torch.Generator().manual_seed(0)
    x, c, y, p = [], [], [], []
    for k, n in enumerate(counts):
        x.append(torch.randn(n, 16, 3, 4, 4, generator=g))
        c.append(torch.randn(n, 8, 32, generator=g))
        y.append([labels[i % len(labels)] for i in range(n)])
        p.append([f"prompt {k} {i}" for i in range(n)])
        data.write_shards(folder, x[-1], c[-1], y[-1], p[-1], append=True)
    return torch.cat(x), torch.cat(c), sum(y, []), sum(p, [])


def test_shards_return_what_was_written(tmp_path):
    x, c, y, p = make_shards(tmp_path)
    shards = data.Shards(tmp_path)
    assert len(shards) == 8 and shards.latent_shape == (16, 3, 4, 4) and shards.context_shape == (8, 32)
    assert shards.labels.tolist() == [-1 if v is None else v for v in y] and shards.labels.dtype == torch.int8
    pick = [7, 0, 4, 5, 0]
    got = shards.batch(torch.tensor(pick))
    assert torch.equal(got["latents"], x[pick]) and torch.equal(got["context"], c[pick])
    assert got["prompt"] == [p[i] for i in pick] and got["label"].tolist() == shards.labels[pick].tolist()
    data.write_shards(tmp_path, x[:2], c[:2], torch.tensor([1, -1]), p[:2])  # no append: in their place
    shards = data.Shards(tmp_path)
    assert len(shards) == 2 and shards.labels.tolist() == [1, -1] and shards.rows[1]["label"] is None
    with pytest.raises(InputError, match="another shape"):
        data.write_shards(tmp_path, x[:2, :8], c[:2], [0, 1], p[:2], append=True)


def test_resident_memory_does_not_grow_with_the_data(tmp_path):
    n = 512
    data.write_shards(tmp_path, torch.zeros(n, 16, 5, 30, 52), torch.zeros(n, 8, 32), [0] * n, ["p"] * n)

    def resident():  # KiB, views of files included
        text = Path("/proc/self/status").read_text()
        return int(text.split("VmRSS:")[1].split()[0])

    shards, before = data.Shards(tmp_path), resident()
    for step in range(64):
        shards.batch(range(8 * step, 8 * step + 8))
    assert (tmp_path / "shard-00000.safetensors").stat().st_size > 240e6 and resident() - before < 40_000


def test_a_kill_while_appending_leaves_whole_shards(tmp_path, monkeypatch):
    x, c, y, p = make_shards(tmp_path)
    real, calls = os.replace, []
    for stop in (1, 2, 3):  # shard, metadata.jsonl, shards.json
        def die(*args):
            calls.append(args)
            if len(calls) == stop:
                raise KeyboardInterrupt
            real(*args)

        calls.clear()
        with monkeypatch.context() as patch:
            patch.setattr(data.os, "replace", die)
            with pytest.raises(KeyboardInterrupt):
                data.write_shards(tmp_path, x, c, y, p, append=True)
        shards = data.Shards(tmp_path)
        assert len(shards) == 8 and torch.equal(shards.batch(range(8))["latents"], x)
    data.write_shards(tmp_path, x, c, y, p, append=True)
    assert len(data.Shards(tmp_path)) == 16
    # and while others take their place
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("formats.shards.stream_tensors", die)
        calls[:] = [0, 0]
        data.write_shards(tmp_path, x, c, y, p)
    with pytest.raises(InputError, match="shards.json is missing"):
        data.Shards(tmp_path)


def test_what_shards_say_of_themselves_where_nobody_said_it(tmp_path, capsys):
    x, c, y, p = make_shards(tmp_path)
    shards = data.Shards(tmp_path)
    assert shards.fps == 8 and shards.settings == {}
    assert shards.contents == 8 * [None] and shards.dropped == set()
    assert [row["file_name"] for row in shards.rows[:2]] == ["shard-00000.safetensors#0",
        "shard-00000.safetensors#1"]
    dit = type("Dit", (), {"config": {"patch_size": (1, 2, 2), "text_len": 8, "text_dim": 32, "out_dim": 16,
                           "image_dim": None, "model_type": "t2v", "dim": 192}})
    for fps, told in ((8.1, False), (8.5, True), (7.5, True)):
        data.write_shards(tmp_path, x, c, y, p, fps=fps, settings={"encoders": {"vae": "x"}})
        data.require_fit(data.Shards(tmp_path), dit)
        assert ("it will learn another speed" in capsys.readouterr().out) == told


@pytest.mark.parametrize("shape, patch",
                         [((3, 5, 4), (1, 2, 2)), ((3, 4, 5), (1, 2, 2)), ((3, 4, 4), (2, 2, 2))])
def test_latents_that_patches_do_not_divide_are_refused(tmp_path, shape, patch):
    data.write_shards(tmp_path, torch.zeros(2, 16, *shape), torch.zeros(2, 8, 32), [0, 1], ["a", "b"])
    with pytest.raises(InputError, match="do not divide: encode with another --size"):
        data.require_fit(data.Shards(tmp_path), type("Dit", (), {"config": {"patch_size": patch}}))


@pytest.mark.parametrize("good, bad, held",
                         [(5, 5, 2), (2, 2, 2), (30, 30, 12), (700, 300, 200), (1500, 1500, 400)])
def test_a_fifth_is_held_out_and_400_at_most(good, bad, held):
    shards = Labelled([1] * good + [0] * bad + [-1])
    train, chosen = data.labelled_split(shards, None, 0)
    assert len(chosen) == held and (shards.labels[chosen] == 0).sum() == max(1,
        round(held * bad / (good + bad)))
    assert torch.equal(torch.cat([train, chosen]).sort().values, torch.arange(good + bad))


def test_broken_shards_are_one_line(tmp_path):
    def broken(change, wanted):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        make_shards(folder)
        change(folder)
        with pytest.raises(InputError, match=wanted) as error:
            data.Shards(folder)
        assert "\n" not in str(error.value) and str(folder) in str(error.value)

    cut = lambda p, n: p.write_bytes(p.read_bytes()[:n])
    edit = lambda folder, **change: (folder / "shards.json").write_text(
        json.dumps(json.loads((folder / "shards.json").read_text()) | change))
    for length in (0, 5, 100, 3000):
        broken(lambda f: cut(f / "shard-00001.safetensors", length), "00001.safetensors: truncated or dam")
    broken(lambda f: (f / "shard-00000.safetensors").unlink(), "shard-00000.safetensors")
    broken(lambda f: (f / "shards.json").unlink(), "shards.json is missing")
    broken(lambda f: cut(f / "shards.json", 40), "shards.json: damaged")
    broken(lambda f: cut(f / "shards.json", 0), "shards.json: damaged")
    broken(lambda f: (f / "shards.json").write_text("{}"), "shards.json: damaged")
    broken(lambda f: edit(f, shards=[{"file": "\ud800", "count": 4}]), "shards.json: damaged")
    broken(lambda f: edit(f, count=9), "counts 9 clips, the shards hold 8")
    broken(lambda f: edit(f, latent_shape=[16, 3, 8, 8]), "not what shards.json says")
    broken(lambda f: cut(f / "metadata.jsonl", 130), "metadata.jsonl")
    broken(lambda f: (f / "metadata.jsonl").write_text((f / "metadata.jsonl").read_text().replace(
        '"label": 1', '"label": 0')), "differ in labels")
    with pytest.raises(InputError, match="nowhere"):
        data.Shards(tmp_path / "nowhere")


def test_require_names_the_field(tmp_path):
    make_shards(tmp_path / "a")
    shards = data.Shards(tmp_path / "a")
    shards.require(channels=16, context_shape=(8, 32))
    for wants, wanted in ((dict(channels=48), "latents have 16 channels, the model has 48"),
                          (dict(context_shape=(512, 4096)), r"context is \[8, 32\] .*not \[512, 4096\]")):
        with pytest.raises(InputError, match=wanted):
            shards.require(**wants)
    shards.require(labelled=True)                                       # the unlabelled ones are left out
    make_shards(tmp_path / "d", labels=(None,))
    with pytest.raises(InputError, match="no clip has a label: a reward model needs 0 and 1"):
        data.Shards(tmp_path / "d").require(labelled=True)
    make_shards(tmp_path / "b", labels=(1, None))
    with pytest.raises(InputError, match="every label is 1: .*; labels as they were encoded"):
        data.Shards(tmp_path / "b").require(labelled=True)
    make_shards(tmp_path / "c", labels=(0, 1))
    data.Shards(tmp_path / "c").require(16, (8, 32), labelled=True)
    tiny = {"patch_size": (1, 2, 2), "text_len": 8, "text_dim": 32, "out_dim": 16, "image_dim": None}
    data.require_fit(data.Shards(tmp_path / "c"), SimpleNamespace(config=tiny))
    with pytest.raises(InputError, match=r"latents are .*patches of \[1, 3, 2\] do not divide: encode with "
                                         r"another --size"):
        data.require_fit(data.Shards(tmp_path / "c"),
                         SimpleNamespace(config=tiny | {"patch_size": (1, 3, 2)}))


# ---- order
@pytest.mark.parametrize("n, batch", [(10, 4), (7, 8), (3, 8)])
def test_order_covers_each_epoch_once_whatever_the_number_of_ranks(n, batch):
    stream = torch.cat([data.order(n, 0, step, range(batch), batch) for step in range(n)])  # batch epochs
    epochs = stream.view(batch, n)
    assert torch.equal(epochs.sort(1).values, torch.arange(n).expand(batch, n))
    assert n == 3 or len({tuple(e.tolist()) for e in epochs}) > 1
    for world_size in (1, 2, 4):
        ranks = [common.Runtime(r, world_size, torch.device("cpu"), torch.float32) for r in range(world_size)]
        again = [data.order(n, 0, step, r.indices(batch // world_size), batch)
                 for step in range(n) for r in ranks]
        assert torch.equal(torch.cat(again), stream)
    assert not torch.equal(torch.cat([data.order(n, 1, s, range(batch), batch) for s in range(n)]), stream)


def test_split_is_disjoint_complete_and_fixed():
    train, held = data.split(100, 0.2, 3)
    assert len(held) == 20 and torch.equal(torch.cat([train, held]).sort().values, torch.arange(100))
    assert torch.equal(data.split(100, 20, 3)[1], held) and not torch.equal(data.split(100, 20, 4)[1], held)
    assert len(data.split(5, 0, 0)[1]) == 0
    for holdout in (5, 9):
        with pytest.raises(InputError, match="leaves nothing"):
            data.split(5, holdout, 0)


# ---- commands
@pytest.fixture
def folder(tmp_path):
    """Ten good clips and six bad ones."""
    rows = []
    for i in range(10):  # the first one has two frames too many
        write_video(tmp_path / f"{i}.mp4", clip(9 if i else 11, seed=i))
        rows.append({"file_name": f"{i}.mp4", "prompt": f"clip {i}", "label": i % 2})
    write_video(tmp_path / "short.mp4", clip(4))
    write_video(tmp_path / "odd.mp4", clip(9, 40, 40))
    write_video(tmp_path / "large.mp4", clip(9, 64, 64))
    (tmp_path / "cut.mp4").write_bytes((tmp_path / "0.mp4").read_bytes()[:700])
    rows += [{"file_name": f"{name}.mp4", "prompt": "x"} for name in ("short", "odd", "large", "cut", "none")]
    rows += [{"file_name": "1.mp4", "prompt": "clip 1", "label": 1}, {"file_name": "2b.mp4", "prompt": " "}]
    write_video(tmp_path / "2b.mp4", clip())
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return tmp_path


PROBLEMS = {"short.mp4": "too short: 4 frames of 5", "odd.mp4": "size 40x40 is not a multiple of 16",
            "large.mp4": "is 64x64, 9 frames, 8 fps, the others are 32x32, 9 frames, 8 fps",
            "cut.mp4": "damaged or not a video", "none.mp4": "no such file", "1.mp4": "listed twice",
            "2b.mp4": "empty prompt"}


def test_check_lists_every_problem(folder, capsys):
    with (folder / "metadata.jsonl").open("a") as file:
        file.write('{"file_name": "five.mp4", "prompt": "x", "label": 5}\n')
    shutil.copy(folder / "3.mp4", folder / "five.mp4")          # it is listed, whatever its label is
    with pytest.raises(SystemExit) as exit:
        common.cli(data.check_command, data.Check, "doc", [str(folder)])
    out = capsys.readouterr().out
    assert exit.value.code == 2
    assert "10 of 18 clips usable: 5 good, 5 bad, 0 unlabelled; 32x32, 9 frames, 8 fps" in out
    assert "row 18: label must be 0, 1 or missing, got 5" in out
    for name, problem in PROBLEMS.items():
        assert any(line.startswith(f"{name}: ") and problem in line for line in out.splitlines()), name
    assert len(out.splitlines()) == 9 and "not in the metadata" not in out


def test_check_passes_what_flags_mend(folder, capsys):
    rows = [r for r in map(json.loads, (folder / "metadata.jsonl").read_text().splitlines())
            if r["file_name"] in ("0.mp4", "3.mp4", "odd.mp4", "large.mp4")]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    flags = ["--size", "32*48", "--frames", "5", "--fps", "4"]
    common.cli(data.check_command, data.Check, "doc", [str(folder), *flags])
    out = capsys.readouterr().out
    assert "4 of 4 clips usable: 1 good, 1 bad, 2 unlabelled; 32x48, 5 frames, 4 fps" in out


@pytest.fixture
def fakes(monkeypatch):
    """A VAE that averages blocks of pixels, a text encoder that counts letters: outputs can be predicted."""
    calls = []

    class VAE(torch.nn.Module):
        def encode(self, video):
            calls.append(len(video))
            b, _, F, H, W = video.shape
            small = torch.nn.functional.adaptive_avg_pool3d(video, ((F + 3) // 4, H // 8, W // 8))
            return small.repeat(1, 6, 1, 1, 1)[:, :16]

    class Text(torch.nn.Module):
        def encode(self, prompts):
            return torch.tensor([[[float(len(p))] * 4] * 2 for p in prompts])

    monkeypatch.setattr(data, "load_vae", lambda path: VAE())
    monkeypatch.setattr(data, "load_text_encoder", lambda path: Text(), raising=False)
    return SimpleNamespace(vae=VAE(), text=Text(), calls=calls)


def encode(folder, *flags):
    common.cli(data.encode_command, data.Encode, "doc", [str(folder), "--out", str(folder / "out"), *flags])


def test_encode_writes_the_usable_clips_and_reports_the_rest(folder, fakes, capsys):
    encode(folder, "--batch_size", "4", "--clips_per_shard", "4")
    shards = data.Shards(folder / "out")
    assert [r["file_name"] for r in shards.rows] == [f"{i}.mp4" for i in range(10)]
    assert shards.labels.tolist() == [i % 2 for i in range(10)] and shards.fps == 8
    assert len(shards.index["shards"]) == 3 and shards.latent_shape == (16, 3, 4, 4)
    video = torch.stack([read_video(folder / f"{i}.mp4")[:9] for i in range(10)])
    batch = shards.batch(range(10))
    torch.testing.assert_close(batch["latents"], fakes.vae.encode(from_pixels(video)))
    torch.testing.assert_close(batch["context"], fakes.text.encode(batch["prompt"]))
    report = map(json.loads, (folder / "out/report.jsonl").read_text().splitlines())
    report = {r["file_name"]: r["reason"] for r in report}
    assert report.keys() == PROBLEMS.keys() and all(PROBLEMS[name] in report[name] for name in report)
    shown = capsys.readouterr()
    assert all(f"skipped {name}: " in shown.out + shown.err for name in PROBLEMS) and "7 skipped" in shown.out


def test_encode_resumes_after_an_interruption(folder, fakes, monkeypatch):
    real = data.write_shards

    def stop(*args, **kwargs):
        real(*args, **kwargs)
        if len(data.Shards(folder / "out")) == 8:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(data, "write_shards", stop)
        with pytest.raises(SystemExit) as exit:
            encode(folder, "--batch_size", "4", "--clips_per_shard", "4")
    assert exit.value.code == 130 and len(data.Shards(folder / "out")) == 8
    fakes.calls.clear()
    encode(folder, "--batch_size", "4", "--clips_per_shard", "4")
    assert fakes.calls == [2]
    assert [r["file_name"] for r in data.Shards(folder / "out").rows] == [f"{i}.mp4" for i in range(10)]
    encode(folder, "--clips_per_shard", "4")
    assert fakes.calls == [2] and len(data.Shards(folder / "out")) == 10  # nothing left to do


def test_encode_refuses_to_mix(folder, fakes, capsys):
    encode(folder)
    for flags, wanted in ((["--frames", "5"], "was encoded with"),
                          (["--frames", "6"], "--frames must be 4k + 1, as 5 is, got 6"),
                          (["--size", "30*30"], "--size must be W*H, both multiples of 16, got 30*30")):
        with pytest.raises(SystemExit):
            encode(folder, *flags)
        assert wanted in capsys.readouterr().err


def test_relabelling_needs_no_new_encoding(folder, fakes):
    """Labels are those beside the clips now: people's answers, else the metadata, else what was encoded."""
    encode(folder)
    encoded, text = [i % 2 for i in range(10)], (folder / "metadata.jsonl").read_text()
    assert data.Shards(folder / "out").relabel().labels.tolist() == encoded
    (folder / "metadata.jsonl").write_text(text.replace('"clip 3", "label": 1', '"clip 3", "label": 0'))
    assert data.Shards(folder / "out").labels.tolist() == encoded
    assert data.Shards(folder / "out").relabel().labels.tolist() == [0, 1, 0, 0, 0, 1, 0, 1, 0, 1]
    fakes.calls.clear()
    encode(folder)  # the change is no reason to refuse or to encode
    assert fakes.calls == []
    row = lambda name, p, d, who="ada": json.dumps({"file_name": name, "annotator": who, "physical": p,
                                                    "deformity": d}) + "\n"
    answers = (row("0.mp4", 2, 2) + row("x/../1.mp4", 0, 0) + row("2.mp4", 2, 1) + row("9.mp4", 2, 0)
               + row("9.mp4", 2, 0, "ben") + row("9.mp4", 2, 2, "eva") + row("elsewhere.mp4", 0, 0))
    (folder / "labels.jsonl").write_text(answers)
    shards = data.Shards(folder / "out").relabel()
    assert shards.labels.tolist() == [1, 0, -1, 0, 0, 1, 0, 1, 0, -1]
    assert shards.label_note == (
        f"labels from {folder}/labels.jsonl: 2, the metadata in {folder}: 6; {folder}/labels.jsonl: 7 of 7 "
        "answers, from an "
        "older label.py, do not say for which content they were given: they count; 2 clips with answers are "
        "neither good nor bad, of which --bad any counts 1 as bad")
    assert shards.batch([0, 2])["label"].tolist() == [1, -1]
    assert data.Shards(folder / "out").relabel(bad="any").labels.tolist() == [1, 0, -1, 0, 0, 1, 0, 1, 0, 0]
    (folder / "other.jsonl").write_text(row("5.mp4", 0, 0))
    assert data.Shards(folder / "out").relabel(folder / "other.jsonl").labels.tolist() == [0, 1, 0, 0, 0, 0,
        0, 1, 0, 1]
    with pytest.raises(InputError, match="--labels /nowhere: there is no such file"):
        data.Shards(folder / "out").relabel("/nowhere")
    (folder / "labels.jsonl").write_text(answers + "garbage}\n" + answers)
    with pytest.raises(InputError, match="labels.jsonl line 8: not a JSON object"):
        data.Shards(folder / "out").relabel()
    (folder / "labels.jsonl").write_text('{"file_name": "0.mp4", "label": 1}\n')
    with pytest.raises(InputError, match="line 1: annotator is None: .* a label of your own goes into"):
        data.Shards(folder / "out").relabel()


def test_shards_that_moved_without_their_clips_keep_the_labels_they_were_encoded_with(folder, fakes,
    tmp_path_factory):
    encode(folder)
    moved = tmp_path_factory.mktemp("node") / "deep/out"
    shutil.copytree(folder / "out", moved)
    shards = data.Shards(moved).relabel()
    assert shards.labels.tolist() == [i % 2
                                      for i in range(10)] and shards.label_note == "labels from encoding: 10"
    together = tmp_path_factory.mktemp("all") / "clips"                 # with them, they find each other
    shutil.copytree(folder, together)
    (together / "labels.jsonl").write_text(json.dumps({"file_name": "0.mp4", "annotator": "a", "physical": 2,
                                                       "deformity": 2}))
    assert data.Shards(together / "out").relabel().labels[0] == 1


def test_the_command_line_as_a_process(tmp_path):
    """The world's clips pass their own check; bad input ends with one line and code 2."""
    def run(*argv):
        command = ["-m", "world.clips"] if argv[:1] == ("clips",) else [ROOT / "data.py"]
        done = launch.python(*command, *argv, cwd=tmp_path)
        return done.returncode, done.stdout, [x for x in done.stderr.splitlines() if x.startswith("error")]

    assert run("clips", "--count", "6", "--kind", "clean")[0] == 0
    rows = metadata.read_metadata(tmp_path / "clips")
    assert len(rows) == 6 and all(row["label"] == 1 and row["prompt"] for row in rows)
    code, out, _ = run("check", "clips")
    assert code == 0 and "6 of 6 clips usable: 6 good" in out
    code, _, errors = run("check", "nowhere")
    assert code == 2 and errors == ["error: nowhere: no such folder"]
    code, _, errors = run("chekc", "clips")
    assert code == 2 and errors == ["error: data.py has check and encode, not chekc"]
    assert run()[0] == 0


# ---- parts of the labelled clips
class Labelled(list):
    """As much of Shards as this takes."""
    folder = "latents"

    def __init__(self, labels):
        super().__init__(labels)
        self.labels = torch.as_tensor(labels, dtype=torch.int8)
        self.contents, self.copies = [None] * len(labels), torch.arange(len(labels))
        self.rows = [{"prompt": "x"}] * len(labels)


@pytest.mark.parametrize("count, held", [(4, 2), (12, 2), (100, 20), (3000, 400)])
def test_a_fifth_is_held_out_unless_told_400_at_most(count, held):
    assert len(data.labelled_split(Labelled([0, 1] * (count // 2)), None, 0)[1]) == held


def test_a_label_of_two_gives_one_to_each_part():
    shards = Labelled([0] * 18 + [1] * 2)
    train, held = (shards.labels[part].tolist() for part in data.labelled_split(shards, 5, 0))
    assert sorted(held) == [0, 0, 0, 0, 1] and sorted(train) == [0] * 14 + [1]


def test_folds_part_the_clips_and_each_has_two_of_each_label():
    for seed in range(20):
        labels = torch.tensor([0, 1] * 4)[torch.randperm(8, generator=torch.Generator().manual_seed(seed))]
        parts = [data.take_fold(Labelled(labels.tolist()), f"{i}/2").labels for i in (1, 2)]
        assert all((part == label).sum() >= 2 for part in parts for label in (0, 1))
        assert torch.equal((parts[0] >= 0).int() + (parts[1] >= 0).int(), torch.ones(8, dtype=torch.int32))


def test_folds_stay_what_they_are():
    """A judge of today must not meet the clips that a reward model of yesterday learned from."""
    part = data.take_fold(Labelled([1] * 12), "1/2").labels >= 0
    assert part.nonzero()[:, 0].tolist() == [2, 5, 6, 8, 9, 10]
