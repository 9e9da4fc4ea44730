"""What people's own folders hold: lists in every state, clips that changed, encoders that differ, films as
cameras write them. Each is answered in one line, or read as a player would show it."""
import json
import os
import shutil
import struct
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch

import common
import data
import evaluate
import sample
from common import InputError
from formats import colour, fingerprint, labels, lock, metadata, runs, video, weights
from formats import shards as shards_on_disk
from study import parts

ROOT = Path(__file__).resolve().parents[2]


def run(command, *argv):
    function, Config = data.COMMANDS[command]
    common.cli(function, Config, "", [str(a) for a in argv])


def refused(capsys, command, *argv):
    """The one line with which it ends."""
    with pytest.raises(SystemExit) as end:
        run(command, *argv)
    line = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
    assert end.value.code == 2 and len(line) == 1
    return line[0]


def write_list(folder, rows):
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def clips(tmp_path):
    """Six clips of 32x32, 9 frames."""
    folder = tmp_path / "clips"
    folder.mkdir()
    for i in range(6):
        pixels = np.full((9, 32, 32, 3), 40 + 30 * i, np.uint8)
        for f in range(9):
            pixels[f, 8:16, i + 2 * f:i + 2 * f + 8] = 250
        video.write_video(folder / f"{i}.mp4", pixels)
    write_list(folder, [{"file_name": f"{i}.mp4", "prompt": f"clip {i}", "label": i % 2} for i in range(6)])
    return folder


# ---- the list
def problems(folder, text, name="metadata.csv"):
    folder.mkdir(exist_ok=True)
    (folder / "a.here").touch()                                 # a clip, whatever its name ends in
    (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogateescape"))
    rows, notes = metadata.read_listing(folder)
    return [row for _, row, _ in rows], [f"{place}: {problem}" for place, _,
                                         problem in rows if problem], notes


def test_case_and_blanks_of_the_header_do_not_matter(tmp_path):
    rows, bad, notes = problems(tmp_path / "a", 'File_Name , PROMPT, Label,width\na.mp4, "one, '
                                                'two",TRUE,3\nb.mp4,x, 0 ,\n')
    assert rows == [{"file_name": "a.mp4", "prompt": "one, two", "label": 1},
                    {"file_name": "b.mp4", "prompt": "x", "label": 0}]
    assert not bad and len(notes) == 1 and notes[0].endswith("columns that are not read: width")
    rows, bad, notes = problems(tmp_path / "b", '{"Video": "a.mp4", "Text ": "x", "REWARD": 1, "lable": 0, '
                                                '"fps": 8}\n' * 2,
                                "metadata.jsonl")
    assert [row["label"] for row in rows] == [1, 1] and not bad and notes[0].endswith("not read: lable, fps")


@pytest.mark.parametrize("text, wanted", [
    ("file_name,label,prompt\nb.mp4,0,x\na.mp4,1,a red circle, moving right\n",
     "row 2 (line 3): has 4 fields where the first row names 3"),
    ("file_name,prompt,label\na.mp4,x\n", "row 1 (line 2): has 2 fields where"),
    ("file_name,prompt,label\na.mp4,x,7\n", "row 1 (line 2): label must be 0, 1 or missing, got '7'"),
    ("file_name,video,prompt\na.mp4,b.mp4,x\n", "row 1 (line 2): gives two file_names, 'a.mp4' and 'b.mp4'"),
    (b"file_name,prompt\na.mp4,caf\xe9\n", "row 1 (line 2): prompt holds '\\udce9', which is not UTF-8")])
def test_a_csv_row_that_means_two_things_is_its_own_problem(tmp_path, text, wanted):
    _, bad, _ = problems(tmp_path / "a", text)
    assert len(bad) == 1 and wanted in bad[0]


@pytest.mark.parametrize("text, wanted", [('file_name,prompt\na.mp4,"a red circle\nb.mp4,a blue square\n',
                           "row 1 (line 2): "), ('\nfile_name,prompt\n\n,\na.mp4,"a red circle\n',
                           "row 1 (line 5): its quotes do not fit (one is not closed)"),
                          ('file_name,prompt\na.mp4,"a red circle\nb.mp4,a "blue" square\n',
                           "row 1 (line 2): its quotes do not fit"),
                          ('file_name,prompt,label\nz.mp4,x,0\na.mp4,"red,1\nb.mp4,blue",1\n',
                           "row 2 (line 3): a quote that is not closed"),
                          ('prompt,file_name\n"red,a.here\n"blue",a.here\n', "row 1 (line 2): "),
                          ('prompt,file_name\nx,a.here\n"red,a.here\nblue",a.here\n',
                           "row 2 (line 3): a quote that is not closed"),
                          ("file_name;prompt;label\na.mp4;x;1\n", "separated by semicolons"),
                          ("file_name\tprompt\na.mp4\tx\n", "separated by tabs"),
                          ("name,prompt\na.mp4,x\n", "names no column file_name (or video, file), but name, "
                           "prompt"), ("file_name,prompt,Prompt\na.mp4,x,y\n", "has the column prompt twice"),
                          ("file_name,prompt\na.mp4,x\n".encode("utf-16"), "save it as UTF-8"),
                          ("", "names no column")])
def test_a_csv_whose_rows_cannot_be_told_apart_is_refused(tmp_path, text, wanted):
    with pytest.raises(InputError) as error:
        problems(tmp_path / "a", text)
    assert wanted in str(error.value) and "\n" not in str(error.value) and "metadata.csv" in str(error.value)


def test_a_caption_may_have_lines(tmp_path):
    rows, bad, _ = problems(tmp_path / "a", 'file_name,prompt\na.mp4,"a circle\nand a ""square"""\nb.mp4,x\n')
    assert not bad and [row["prompt"] for row in rows] == ['a circle\nand a "square"', "x"]


@pytest.mark.parametrize("line, wanted",
                         [('{"file_name": "a.mp4", "prompt": ["a red circle", "a blue square"]}',
                           "prompt must be text, got ['a red circle'"),
                          ('{"file_name": "a.mp4", "prompt": {"en": "x"}}',
                           "prompt must be text, got {'en': 'x'}"),
                          ('{"file_name": "a.mp4", "prompt": 7}', "prompt must be text, got 7"),
                          ('{"file_name": "a.mp4", "prompt": "a circle \\ud83d"}', "prompt holds '\\ud83d'"),
                          ('{"file_name": "a.mp4", "prompt": "x", "prompt": "y"}',
                           "gives two prompts, 'x' and 'y'"),
                          ('{"file_name": "a.mp4", "prompt": "x", "text": "y"}', "gives two prompts"),
                          ('{"file_name": "a.mp4", "label": NaN}', "label must be 0, 1 or missing, got nan"),
                          ('{"file_name": "a.mp4", "label": [1]}', "label must be 0, 1 or missing"),
                          ('{"file_name": "a\\u0000.mp4"}', "no file can be"),
                          ('{"file_name": "\\ud83d.mp4"}', "no file can be called"),
                          ("[" * 100000, "not a JSON object"), ("{} {}", "not a JSON object")])
def test_a_json_row_that_cannot_be_used_is_its_own_problem(tmp_path, line, wanted):
    _, bad, _ = problems(tmp_path / "a", '{"file_name": "ok.mp4", "prompt": '
                                         '"x"}\n' + line + "\n", "metadata.jsonl")
    assert len(bad) == 1 and "row 2: " in bad[0] and wanted in bad[0]
    assert "\n" not in bad[0] and len(bad[0]) < 300


@pytest.mark.parametrize("text", ['[{"file_name": "a.mp4"}]\n', '[\n {"file_name": '
                                                                '"a.mp4"}\n]\n', '{\n "file_name": '
                                                                                 '"a.mp4"\n}\n',
                                  '\n \n[\n'])
def test_one_json_document_is_refused_as_such(tmp_path, text):
    with pytest.raises(InputError, match="row [13]: the file is one JSON document"):
        problems(tmp_path / "a", text, "metadata.jsonl")


def test_two_lists_are_refused(tmp_path):
    (tmp_path / "metadata.csv").write_text("file_name,prompt\n")
    with pytest.raises(InputError, match="has metadata.csv and metadata.jsonl: keep the one that counts"):
        problems(tmp_path, "", "metadata.jsonl")
    (tmp_path / "b").mkdir()
    (tmp_path / "b/metadata.json").write_text("[]")
    with pytest.raises(InputError, match="no metadata.jsonl or metadata.csv in it, only metadata.json"):
        metadata.read_listing(tmp_path / "b")


@pytest.mark.parametrize("read", [
    lambda path: data.Shards(path), lambda path: weights.read_config(path), lambda path: runs.read_args(path),
    lambda path: fingerprint.of_encoder(path, "vae"), lambda path: labels.read_answers(path / "labels.jsonl"),
    lambda path: parts.part_of(path)])
def test_a_file_of_ours_nested_without_end_is_damaged(tmp_path, read):
    for name in ("shards.json", "config.json", "args.json", "labels.jsonl", "part.json"):
        (tmp_path / name).write_text(100_000 * "[" + "\n")
    with pytest.raises(InputError, match="damaged|not JSON|not a JSON|nested"):
        read(tmp_path)
    assert runs.read_metrics(
        tmp_path / "args.json") == [] and fingerprint.Contents(tmp_path / "args.json").known == {}


def test_shards_in_a_folder_that_cannot_be_are_one_line(tmp_path):
    with pytest.raises(InputError, match="File name too long"):
        data.Shards(tmp_path / ("n" * 300))


# ---- whose folder it is
def test_nothing_of_the_users_is_written_over(clips, tmp_path, capsys):
    before = {path.name: path.read_bytes() for path in clips.iterdir()}
    assert "is the folder of the clips" in refused(capsys, "encode", clips, "--out", clips)
    other = shutil.copytree(clips, tmp_path / "other")
    assert "holds files that are not ours" in refused(capsys, "encode", clips, "--out", other)
    for folder in (clips, other):
        assert before == {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(InputError, match="not ours"):
        data.write_shards(other, torch.zeros(1, 16, 3, 4, 4), torch.zeros(1, 8, 32), [1], ["x"])
    from world import clips as world
    with pytest.raises(InputError, match="not ours"):
        world.main(world.Config(str(other), count=1))
    world.main(world.Config(str(tmp_path / "world"), count=1))
    with pytest.raises(InputError, match="already: name a new folder"):
        world.main(world.Config(str(tmp_path / "world"), count=1))
    assert "not ours" in refused(capsys, "encode", clips, "--out", tmp_path / "world")  # ours, but no shards
    runtime = common.Runtime(0, 1, torch.device("cpu"), torch.float32)
    dit = type("Dit", (), {"config": {"model_type": "t2v"}})
    for make in (lambda: world.own_samples(other, dit, weights.SHIPPED["t2v"], 2, 1, "tiny", 0, runtime),
                 lambda: world.clean_clips(other, weights.SHIPPED["t2v"], 2, "tiny", 0, runtime),
                 lambda: evaluate.main(evaluate.Config(output_dir=str(other))),
                 lambda: sample.check_flags(sample.Config("x", output_dir=str(other)))):
        with pytest.raises(InputError, match="not ours"):
            make()
    assert before == {path.name: path.read_bytes() for path in other.iterdir()}
    # and one writer at a time
    with evaluate.lock_output_dir(evaluate.Config(output_dir=str(tmp_path / "mine")), runtime):
        with pytest.raises(InputError, match=f"process {os.getpid()} on .* is writing there"):
            evaluate.lock_output_dir(evaluate.Config(output_dir=str(tmp_path / "mine")), runtime)
    (tmp_path / "mine/table.md").touch()
    # its own, once more
    evaluate.lock_output_dir(evaluate.Config(output_dir=str(tmp_path / "mine")), runtime).close()
    with pytest.raises(InputError, match="its path is not UTF-8: name another folder"):
        lock.require_ours(os.fsdecode(b"caf\xe9"), "shards")


def test_a_killed_first_run_can_be_continued(clips, tmp_path, monkeypatch):
    def die(path, text):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(shards_on_disk, "write_rows", die)                # a shard, and no list of it yet
        run("encode", clips, "--out", tmp_path / "out")
    run("encode", clips, "--out", tmp_path / "out")
    assert len(data.Shards(tmp_path / "out")) == 6


def test_one_encode_at_a_time(clips, tmp_path, capsys):
    with lock.hold(tmp_path / "out", "shards"):
        line = refused(capsys, "encode", clips, "--out", tmp_path / "out")
        assert f"process {os.getpid()} on " in line
    run("encode", clips, "--out", tmp_path / "out")


# ---- a cache knows what it was made from
def test_what_is_no_longer_listed_is_not_trained_on_and_what_changed_is_encoded_again(clips, tmp_path,
    capsys):
    out = tmp_path / "out"
    run("encode", clips, "--out", out)
    first, rows = data.Shards(out), metadata.read_metadata(clips)
    assert [row["file_name"] for row in first.rows] == [f"{i}.mp4" for i in range(6)]
    old, before = first.batch(range(6))["latents"], fingerprint.of_shards(first)

    write_list(clips, rows[1:])                                 # 0 is no longer listed
    os.replace(clips / "5.mp4", clips / "2.mp4")                # 2 is another film now, 5 is gone
    os.utime(clips / "3.mp4")                                   # touched, and the same
    rows[4]["prompt"] = "another caption"
    write_list(clips, rows[1:])
    capsys.readouterr()
    run("encode", clips, "--out", out)
    shown = capsys.readouterr().out
    assert "4 clips that it holds are no longer listed, or have changed: left out" in shown
    assert "4 of 5 clips encoded, 1 skipped" in shown
    shards = data.Shards(out)
    assert [row["file_name"]
            for row in shards.rows] == ["1.mp4", "3.mp4", "2.mp4", "4.mp4"] and len(shards) == 4
    got = shards.batch(range(4))
    torch.testing.assert_close(got["latents"], old[[1, 3, 5, 4]], rtol=1e-4, atol=1e-4)
    assert got["prompt"] == ["clip 1", "clip 3", "clip 2",
                             "another caption"] and got["label"].tolist() == [1, 1, 0, 0]
    assert fingerprint.of_shards(shards) == fingerprint.of_shards(data.Shards(out)) != before

    before = (out / "shards.json").read_bytes(), sorted(path.name for path in out.glob("shard-*"))
    run("encode", clips, "--out", out)                          # nothing has changed: nothing is done
    assert before == ((out / "shards.json").read_bytes(), sorted(path.name for path in out.glob("shard-*")))
    write_list(clips, [rows[0]])                                # 0 comes back: its latents are still there
    run("encode", clips, "--out", out)
    shards = data.Shards(out)
    assert torch.equal(shards.batch([0])["latents"],
                       old[:1]) and len(shards) == 1 and len(list(out.glob("shard-*"))) == 2


def test_encoders_are_known_by_their_content(clips, tmp_path, capsys, folder):
    """The same VAE under another path is the same; another one is another, in encode and in training."""
    from safetensors.torch import load_file, save_file
    shipped, out = weights.SHIPPED["t2v"], tmp_path / "out"
    run("encode", clips, "--out", out)
    copy = shutil.copytree(shipped / "vae", tmp_path / "model/vae")
    shutil.copytree(shipped / "text_encoder", tmp_path / "model/text_encoder")
    run("encode", clips, "--out", out, "--vae", copy)
    tensors = load_file(copy / weights.WEIGHTS)
    name = sorted(tensors)[-1]
    save_file(tensors | {name: tensors[name] * 1.01}, copy / weights.WEIGHTS, {"format": "pt"})
    assert "another vae" in refused(capsys, "encode", clips, "--out", out, "--vae", copy)
    dit = type("Dit", (), {"config": {"patch_size": (1, 2, 2), "text_len": 8,
                           "text_dim": data.Shards(out).context_shape[1], "out_dim": 16, "image_dim": None,
                           "model_type": "t2v", "dim": 192}})
    data.require_fit(data.Shards(out), dit, shipped)
    with pytest.raises(InputError, match="was encoded with another vae than .*: encode with --model"):
        data.require_fit(data.Shards(out), dit, tmp_path / "model")
    capsys.readouterr()
    data.write_shards(tmp_path / "fast", torch.zeros(2, 16, 3, 4, 4),
                      torch.zeros(2, 8, dit.config["text_dim"]), [0, 1], ["a", "b"], fps=30.0,
                      settings=data.Shards(out).settings)
    data.require_fit(data.Shards(tmp_path / "fast"), dit, shipped)
    assert "clips run at 30 frames per second, the model's own videos at 8" in capsys.readouterr().out


def test_large_weights_are_sampled_tensor_by_tensor(tmp_path, monkeypatch):
    from safetensors.torch import save_file
    monkeypatch.setattr(fingerprint, "WHOLE", 1000)
    (tmp_path / "config.json").write_text('{"a": 1, "_name_or_path": "x"}')
    tensors = {"a": torch.zeros(5000), "b": torch.zeros(3)}

    def of(**changes):
        save_file(tensors | changes, tmp_path / "model.safetensors")
        return fingerprint.of_encoder(tmp_path, "vae")

    same = of()
    (tmp_path / "config.json").write_text('{"_name_or_path": "y", "a": 1}')
    assert of() == same and of(b=torch.tensor([0, 0, 1.0])) != same
    assert of(a=torch.eye(1, 5000)[0]) != same != of(a=torch.eye(1, 5000)[0].flip(0))


def test_encode_with_a_model_takes_its_encoders(clips, tmp_path, capsys):
    model = weights.SHIPPED["i2v"]
    line = refused(capsys, "encode", clips, "--out", tmp_path / "a", "--model", model, "--vae", "x")
    assert "--vae means nothing with --model" in line
    run("encode", clips, "--out", tmp_path / "i2v", "--model", model)
    shards = data.Shards(tmp_path / "i2v")
    batch = shards.batch(range(6))
    # as that model was trained
    assert torch.equal(batch["condition"][:, :, 1:], torch.zeros_like(batch["condition"][:, :, 1:]))
    # causal
    torch.testing.assert_close(batch["condition"][:, :, 0], batch["latents"][:, :, 0], rtol=1e-4, atol=1e-4)
    run("encode", clips, "--out", tmp_path / "t2v", "--model", weights.SHIPPED["t2v"])
    assert "condition" not in data.Shards(tmp_path / "t2v").shapes
    (tmp_path / "bare/transformer").mkdir(parents=True)
    shutil.copy(weights.SHIPPED["t2v"] / "transformer/config.json", tmp_path / "bare/transformer")
    assert "there is no vae/ in it" in refused(capsys, "encode", clips, "--out", tmp_path / "b", "--model",
                                               tmp_path / "bare")


def test_check_with_a_model_finds_what_git_lfs_did_not_fetch(clips, tmp_path, capsys):
    model = shutil.copytree(weights.SHIPPED["t2v"], tmp_path / "model")
    run("check", clips, "--model", model)
    for part in ("text_encoder", "vae", "transformer"):
        (model / part / weights.WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\n")
        line = refused(capsys, "check", clips, "--model", model)
        assert f"{model / part / weights.WEIGHTS}: is a pointer of git-lfs and not the file: run" in line


# ---- one row never ends a run
def test_check_finds_what_encode_refuses(clips, tmp_path, capsys):
    names = "n" * 300 + ".mp4", "0.mp4/a.mp4", "sub", "loop.mp4", "new\nline.mp4", "endless.mp4"
    rows = [{"file_name": name, "prompt": "x"} for name in names]
    (clips / "sub").mkdir()
    (clips / "loop.mp4").symlink_to("loop.mp4")
    (clips / "endless.mp4").symlink_to("/proc/kmsg")            # of no size, and whoever reads it waits
    strange = os.fsdecode(b"caf\xe9.mp4")
    shutil.copy(clips / "0.mp4", clips / strange)
    with (clips / "metadata.jsonl").open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
        file.write('{"file_name": "1.mp4", "prompt": "a circle \\ud83d"}\n{"file_name": "2.mp4", "prompt": '
                   '["x"]}\nnonsense\n')
        file.write(json.dumps({"file_name": strange, "prompt": "x"}) + "\n")
    command = [sys.executable, ROOT / "data.py", "check", clips]
    done = subprocess.run(command, capture_output=True, env=os.environ | {"PYTHONIOENCODING": "ascii:strict"})
    lines = done.stdout.decode("ascii").splitlines()
    assert done.returncode == 2 and b"Traceback" not in done.stderr and len(lines) == 11
    assert lines.pop().startswith("2 of 7 clips are copies of others, 0 share their prompt")
    for reason in ("File name too long", "0.mp4/a.mp4: there is no", "is not a file", "Too many levels",
                   "endless.mp4: damaged or not a video (it is empty)",
                   "new\\nline.mp4: there is no"):
        assert sum(reason in line for line in lines) == 1, reason
    assert lines[-1].startswith(f"{clips}: 7 of 16 clips usable")
    run("encode", clips, "--out", tmp_path / "out")
    shards = data.Shards(tmp_path / "out")
    assert [row["file_name"] for row in shards.rows] == [*(f"{i}.mp4" for i in range(6)), strange]
    report = [json.loads(line)["reason"] for line in (tmp_path / "out/report.jsonl").read_text().splitlines()]
    assert len(report) == 9 and sorted(report) == sorted(
        line.split(": ", 2 if "row" in line else 1)[-1] for line in lines[:-1])
    assert len(shards.relabel().labels) == 7                    # training does not trip over them either


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give up its rights and take them back")
def test_what_may_not_be_read_is_that_clips_reason(clips, monkeypatch):
    (clips / "locked").mkdir()
    shutil.move(clips / "0.mp4", clips / "locked/0.mp4")
    (clips / "locked").chmod(0)
    (clips / "1.mp4").chmod(0)
    monkeypatch.chdir(clips)                                  # nobody may be kept out of the folders above it
    try:
        os.seteuid(65534)
        assert len(video.read_clip(Path("2.mp4"))[0]) == 9
        for name in ("locked/0.mp4", "1.mp4"):
            with pytest.raises(InputError, match="cannot be read .Permission denied"):
                video.read_clip(Path(name))
    finally:
        os.seteuid(0)


# ---- films
def write_film(path, pictures=None, frames=13, fps=8, start=0, codec="libx264", pix_fmt="yuv420p", **tags):
    """pictures (uint8 [h, w, 3 or 4], or frames), or grey ones, brighter by 10 each; the first is shown at
    `start` seconds."""
    pictures = [np.full((48, 64, 3), 40 + 10 * i, np.uint8)
                for i in range(frames)] if pictures is None else pictures
    made = [x if isinstance(x, av.VideoFrame)
            else av.VideoFrame.from_ndarray(x, format="rgba" if x.shape[-1] == 4 else "rgb24")
            for x in pictures]
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=fps)
        stream.width, stream.height, stream.pix_fmt = made[0].width, made[0].height, pix_fmt
        stream.options = {"x265-params": "log-level=none"} if codec == "libx265" else {}
        for name, value in tags.items():
            setattr(stream.codec_context, name, value)
        for i, frame in enumerate(made):
            frame = frame.reformat(format=pix_fmt)
            frame.time_base, frame.pts = Fraction(1, 1000), round(1000 * (start + i / fps))
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


@pytest.mark.parametrize("name, codec", [("a.mp4", "libx264"), ("a.mov", "libx264"), ("a.mkv", "libx264"),
                          ("a.webm", "libvpx"), ("a.ts", "libx264"), ("a.flv", "libx264"), ("a.nut", "ffv1"),
                          ("a.avi", "mpeg4")])
@pytest.mark.parametrize("start", (0, 2, 30))
def test_a_film_that_starts_late_is_whole(tmp_path, name, codec, start):
    if start and name == "a.avi":
        pytest.skip("AVI knows no start")
    write_film(tmp_path / name, start=start, codec=codec)
    got, _ = video.read_clip(tmp_path / name, fps=8)
    assert len(got) == 13
    assert (got[:, 24, 32, 0].float() - torch.arange(40, 170, 10)).abs().max() < 8


def test_a_late_film_that_was_cut_off_is_still_found(tmp_path):
    write_film(tmp_path / "a.mkv", frames=20, fps=4, start=2)
    raw = (tmp_path / "a.mkv").read_bytes()
    (tmp_path / "a.mkv").write_bytes(raw[:len(raw) // 2])
    with pytest.raises(InputError, match="damaged: ends after"):
        video.read_clip(tmp_path / "a.mkv")


MATRICES = {"plain": (1, 0, 0, 1), "mirrored": (-1, 0, 0, 1), "upside down": (1, 0, 0, -1),
            "half a turn": (-1, 0, 0, -1), "clockwise": (0, 1, -1, 0), "anticlockwise": (0, -1, 1, 0),
            "transposed": (0, 1, 1, 0), "transversed": (0, -1, -1, 0)}


@pytest.mark.parametrize("name", MATRICES)
def test_the_display_matrix_with_its_mirrors(tmp_path, name):
    """Every stored pixel (x, y) goes where the matrix sends it: x' = a x + c y, y' = b x + d y, moved into
    the picture."""
    stored = np.zeros((32, 64, 3), np.uint8)
    stored[:16, :32], stored[:16, 32:], stored[16:, :32] = 60, 120, 180
    video.write_video(tmp_path / "a.mp4", np.stack([stored] * 5))
    a, b, c, d = MATRICES[name]
    raw = bytearray((tmp_path / "a.mp4").read_bytes())
    at = raw.find(b"tkhd") + 44
    raw[at:at + 36] = struct.pack(">9i", a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)
    (tmp_path / "a.mp4").write_bytes(raw)
    y, x = np.mgrid[:32, :64]
    to_x, to_y = a * x + c * y, b * x + d * y
    wanted = np.zeros((64, 32, 3) if a == 0 else (32, 64, 3))
    wanted[to_y - to_y.min(), to_x - to_x.min()] = stored
    got = video.read_video(tmp_path / "a.mp4")[2].numpy().astype(float)
    assert got.shape == wanted.shape and np.abs(got - wanted).mean() < 4


BT2020 = {"color_primaries": 9, "colorspace": 9}


def hdr_film(path, rgb, transfer, said=BT2020):
    """A film of one colour of BT.709 (0 to 255) as HLG or PQ in BT.2020: colour.py's way backwards, written
    out by hand."""
    to_2020 = np.linalg.solve(colour.to_xyz(colour.PRIMARIES[9]), colour.to_xyz(colour.PRIMARIES[1]))
    nits = 203 * to_2020 @ (np.array(rgb) / 255) ** 2.4
    if transfer == colour.HLG:                                  # BT.2100: OOTF backwards, then the OETF
        e = (nits / 1000) ** (1 / 1.2)
        v = np.where(e <= 1 / 12, np.sqrt(3 * e),
                     .17883277 * np.log(np.maximum(12 * e - .28466892, 1e-9)) + .55991073)
    else:                                                       # SMPTE ST 2084
        y = (nits / 10000) ** .1593017578125
        v = ((.8359375 + 18.8515625 * y) / (1 + 18.6875 * y)) ** 78.84375
    luma = v @ (.2627, .6780, .0593)
    planes = 64 + 876 * luma, 512 + 896 * (v[2] - luma) / 1.8814, 512 + 896 * (v[0] - luma) / 1.4746
    frames = [av.VideoFrame(64, 48, "yuv420p10le") for _ in range(9)]
    for frame in frames:
        for plane, value in zip(frame.planes, planes):
            plane.update(np.full((plane.height, plane.line_size // 2), round(value), "<u2").tobytes())
    write_film(path, frames, codec="libx265", pix_fmt="yuv420p10le", color_trc=transfer, color_range=1,
               **said)


@pytest.mark.parametrize("transfer", (colour.HLG, colour.PQ))
def test_hdr_that_does_not_say_its_matrix_has_that_of_its_primaries(tmp_path, transfer):
    for said in ({}, {"color_primaries": 9}):
        hdr_film(tmp_path / "a.mp4", (192, 64, 32), transfer, said)
        got, _, facts = video.read_clip_facts(tmp_path / "a.mp4")
        assert facts.colours == "converted" and (got[4, 16, 16].int()
                                                 - torch.tensor((192, 64, 32))).abs().max() <= 5
    assert [colour.matrix_of(1, 12, matrix)
            for matrix in (2, 6)] == [1, 6] and colour.matrix_of(14, 9, 2) == 9


@pytest.mark.parametrize("transfer", (colour.HLG, colour.PQ))
@pytest.mark.parametrize("rgb", ((192, 64, 32), (20, 40, 60), (128, 128, 128), (30, 200, 90), (255, 255, 255),
                          (0, 0, 0)))
def test_hlg_and_pq_become_bt709(tmp_path, transfer, rgb):
    hdr_film(tmp_path / "a.mp4", rgb, transfer)
    for size in (None, (32, 32)):
        got, _, facts = video.read_clip_facts(tmp_path / "a.mp4", size)
        assert facts.colours == "converted" and (got[4, 16, 16].int() - torch.tensor(rgb)).abs().max() <= 5


def test_a_phones_hlg_clip_as_zscale_shows_it(tmp_path):
    """(143, 79, 48) is how a colour looks in HLG where nothing is converted that zscale shows as (192, 64,
    32)."""
    light = colour.light_table(colour.HLG)
    assert light[round(.75 * 65535)] == pytest.approx(1, abs=0.02)      # BT.2408: 75 % is the reference white
    image = np.array([[[143, 79, 48]]], np.uint16) * 257
    assert np.abs(colour.to_bt709(image, colour.HLG, 9).astype(int) - (192, 64, 32)).max() <= 12
    # wide, and not of ours
    assert [colour.kind(1, primaries, 1) for primaries in (4, 8, 10, 11)] == 4 * ["approximate"]
    assert colour.kind(8, 1, 1) == "approximate"
    assert colour.kind(1, 1, 1) is None and colour.kind(2, 2, 2) is None


@pytest.mark.parametrize("name, codec, pix_fmt",
                         [("a.mov", "qtrle", "argb"), ("a.mov", "prores_ks", "yuva444p10le"),
                          ("a.mkv", "ffv1", "yuva420p"), ("a.png", "png", "rgba")])
def test_what_is_transparent_lies_on_black(tmp_path, name, codec, pix_fmt):
    picture = np.full((48, 64, 4), (200, 100, 40, 255), np.uint8)
    picture[:, :20, 3], picture[:, 20:40, 3] = 0, 128
    write_film(tmp_path / name, [picture] * (1 if codec == "png" else 5), codec=codec, pix_fmt=pix_fmt)
    got = video.read_clip(tmp_path / name)[0][-1]
    for x, share in ((8, 0), (30, 128 / 255), (55, 1)):
        assert (got[24, x].float() - share * torch.tensor([200., 100, 40])).abs().max() < 8


def test_an_alpha_channel_that_the_decoder_leaves_out_is_refused(tmp_path):
    picture = np.full((48, 64, 4), (200, 100, 40, 128), np.uint8)
    write_film(tmp_path / "a.webm", [picture] * 5, codec="libvpx-vp9", pix_fmt="yuva420p")
    with pytest.raises(InputError, match="alpha"):
        video.read_clip(tmp_path / "a.webm")


def test_check_counts_what_fitting_does_to_the_clips(tmp_path, capsys):
    folder = tmp_path / "clips"
    folder.mkdir()
    moving = [np.roll(np.tile(np.arange(90, dtype=np.uint8)[None, :, None] * 2, (160, 1, 3)), 3 * i, 1)
              for i in range(48)]
    write_film(folder / "narrow.mp4", moving, fps=16)
    write_film(folder / "slow.mp4", [x[:54] for x in moving[:24]], fps=8)
    write_film(folder / "frozen.mp4", [moving[0][:54]] * 48, fps=16)
    hdr_film(folder / "hdr.mp4", (192, 64, 32), colour.HLG)
    write_film(folder / "short.mp4", [x[:54] for x in moving[:20]], fps=16)
    long = "a red circle " * 12
    write_list(folder, [{"file_name": name, "prompt": prompt} for name,
                prompt in (("narrow.mp4", long + "left"), ("slow.mp4", long + "right"), ("frozen.mp4", "x"),
                           ("short.mp4", "x"))])
    with pytest.raises(SystemExit):
        run("check", folder, "--size", "160*96", "--frames", 41, "--fps", 16)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "short.mp4: too short: 20 frames of 41 at 16 fps: --frames 17 takes it"
    assert lines[1].startswith(f"{folder}: 3 of 4 clips usable")
    assert lines[2:6] == ["1 of them lose part of their picture to the crop: 34% of it stays at worst, 34% "
                          "on average",
                          "2 of their captions are longer than the 128 bytes that "
                          f"{weights.SHIPPED['t2v'] / 'text_encoder'} reads: the rest is cut off",
                          "1 of them stand still for a quarter of their frames or longer: frozen.mp4",
                          "1 of them are slower than 16 fps: their frames will repeat"]
    run("check", folder.parent / "clips", "--size", "160*96", "--fps", 16, "--frames", 17)
    write_list(folder, [{"file_name": "hdr.mp4", "prompt": "x"}])
    capsys.readouterr()
    run("check", folder)
    assert "1 of them are HDR or of a wide gamut: converted to BT.709" in capsys.readouterr().out


# ---- splits
def stand_in(folder, labels, prompts=None, contents=None, copies=None):
    """As much of Shards as a split takes; default: clips of one prompt, no two of them copies."""
    n = len(labels)
    return SimpleNamespace(folder=folder, labels=torch.as_tensor(labels), contents=contents or [None] * n,
                           rows=[{"prompt": prompt} for prompt in prompts or ["x"] * n],
                           copies=torch.arange(n) if copies is None else torch.as_tensor(copies))


@pytest.mark.parametrize("seed", range(6))
def test_the_holdout_is_stratified(tmp_path, seed):
    labels = torch.tensor([1] * 37 + [0] * 2)[torch.randperm(39,
                                                  generator=torch.Generator().manual_seed(seed))]
    shards = stand_in(tmp_path, torch.cat([labels, torch.tensor([-1, -1])]))
    train, held = data.labelled_split(shards, 5, seed)
    assert len(held) == 5 and torch.equal(torch.cat([train, held]).sort().values, torch.arange(39))
    assert sorted(labels[held].tolist()) == [0, 1, 1, 1, 1] and (labels[train] == 0).sum() == 1
    assert torch.equal(data.labelled_split(shards, 5, seed)[1], held)
    shards.labels = torch.where(labels < 0, labels, 1 - labels)     # two good ones
    assert sorted(shards.labels[data.labelled_split(shards, 5, seed)[1]].tolist()) == [0, 0, 0, 0, 1]
    shards = stand_in(tmp_path, [0, 1] * 50 + [1] * 100)        # a quarter is bad
    assert (shards.labels[data.labelled_split(shards, 40, seed)[1]] == 0).sum() == 10


@pytest.mark.parametrize("labels, holdout, wanted", [
    ([1] * 9 + [0], 3, "1 clips are labelled 0; .* label more"), ([1, 0] * 5, 10, "leaves nothing .*try "
                                                                                  "--holdout 2"),
    ([1, 0] * 5, 9, "2 to 8 can be held out.*try --holdout 2"), ([1, 0] * 5, 1, "2 to 8 can be held out")])
def test_a_holdout_that_cannot_be_names_the_remedy(tmp_path, labels, holdout, wanted):
    shards = stand_in(tmp_path, labels)
    with pytest.raises(InputError, match=wanted):
        data.labelled_split(shards, holdout, 0)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("labels",
                         ([0] * 4 + [1] * 35, [0, 1] * 2, [1, 0, 0] * 4 + [-1] * 20, [0] * 4 + [1] * 4))
def test_each_fold_of_a_small_set_has_both_labels(tmp_path, labels, seed):
    labels = torch.tensor(labels)[torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))]
    folds = []
    for fold in ("1/2", "2/2"):
        shards = stand_in(tmp_path, labels)
        folds.append(data.take_fold(shards, fold).labels)
        counts = [(folds[-1] == label).sum() for label in (0, 1)]
        assert all(count >= min(2, (labels == label).sum() // 2) for label, count in enumerate(counts))
    assert torch.equal(torch.where(folds[0] < 0, folds[1], folds[0]),
                       labels) and not ((folds[0] >= 0) & (folds[1] >= 0)).any()
    for fold in ("1/1", "0/2", "3/2", "1/2/3", "2", "a/b", "-1/2", "1/"):
        with pytest.raises(InputError, match=f"--fold {fold}: must be i/n"):
            data.take_fold(shards, fold)
    assert data.take_fold(shards, None) is shards


def test_labels_that_come_later_move_no_clip_to_another_fold(tmp_path):
    labels = torch.arange(200) % 2
    before, after = (data.take_fold(stand_in(tmp_path, x), "1/2").labels >= 0
                     for x in (labels, labels.masked_fill(torch.arange(200) % 7 == 0, -1)))
    assert torch.equal(before & (torch.arange(200) % 7 != 0), after)
    assert before.sum() == 100 and before[:12].nonzero()[:, 0].tolist() == [1, 2, 3, 5, 6, 8, 9]  # for years


# ---- copies and prompts in splits
def groups_on_both_sides(groups, *sides):
    a, b = ({groups[i] for i in side.tolist()} for side in sides)
    return a & b


@pytest.mark.parametrize("seed", range(4))
def test_copies_stay_on_one_side(tmp_path, seed):
    copies = torch.arange(60) // 2  # each clip twice, under two names, with labels by chance
    labels = torch.randint(0, 2, (60,), generator=torch.Generator().manual_seed(seed))
    shards = stand_in(tmp_path, labels, copies=copies)
    train, held = data.labelled_split(shards, 12, seed)
    assert torch.equal(torch.cat([train, held]).sort().values, torch.arange(60)) and 9 <= len(held) <= 12
    assert not groups_on_both_sides(copies.tolist(), train, held)
    assert set(labels[held].tolist()) == set(labels[train].tolist()) == {0, 1}
    assert torch.equal(data.labelled_split(shards, 12, seed)[1], held)
    parts = [(data.take_fold(stand_in(tmp_path, labels, copies=copies), f"{i}/3").labels >= 0).nonzero()[:, 0]
             for i in (1, 2, 3)]
    assert [len(part) for part in parts] == [20, 20, 20]
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert not groups_on_both_sides(copies.tolist(), parts[a], parts[b])


@pytest.mark.parametrize("number, each, "
                         "apart", [(20, 2, True), (12, 16, True), (9, 4, False), (12, 17, False)])
def test_prompts_stay_on_one_side_where_there_are_enough(tmp_path, number, each, apart):
    n = number * each
    # alike, but for case
    prompts = [f"Prompt {i % number}" if i % 3 else f" prompt {i % number}" for i in range(n)]
    groups, labels = [i % number for i in range(n)], torch.arange(n) // number % 2
    make = lambda **more: stand_in(tmp_path, labels, prompts, contents=[f"{i}" for i in range(n)], **more)
    train, held = data.labelled_split(make(), None, 0)
    folds = [(data.take_fold(make(), f"{i}/2").labels >= 0).nonzero()[:, 0] for i in (1, 2)]
    assert bool(groups_on_both_sides(groups, train, held)) != apart and bool(
        groups_on_both_sides(groups, *folds)) != apart
    assert n // 10 <= len(held) <= max(2, n // 5) and abs(len(folds[0]) - len(folds[1])) <= each
    assert set(labels[held].tolist()) == set(
        labels[folds[0]].tolist()) == set(labels[folds[1]].tolist()) == {0, 1}
    told = data.describe_split(make(), train, held)
    assert told == (f"0 of {n} clips are copies of others, {n} share their prompt with others ({number} "
                    "prompts); no copy is on "
                    f"both sides of the split, and {len(groups_on_both_sides(groups, train, held))} prompts "
                    "are")
    own = stand_in(tmp_path, labels, prompts)  # a generator's own samples: as if each stood for itself
    assert torch.equal(data.labelled_split(own, None, 0)[1],
                       data.labelled_split(stand_in(tmp_path, labels), None, 0)[1])


def test_one_prompt_of_most_clips_does_not_make_a_lopsided_part(tmp_path):
    prompts = ["x"] * 70 + [f"{i}" for i in range(30)]
    make = lambda: stand_in(tmp_path, torch.arange(100) % 2, prompts, contents=[f"{i}" for i in range(100)])
    sizes = [(data.take_fold(make(), f"{i}/4").labels >= 0).sum().item() for i in (1, 2, 3, 4)]
    assert sizes == [25, 25, 25, 25]
    assert 10 <= len(data.labelled_split(make(), 20, 0)[1]) <= 20
    # only two of 11 prompts fit into a holdout of 18
    prompts = [f"{i // 11}" for i in range(99)] + ["good", "bad"]
    shards = stand_in(tmp_path, [i // 11 % 2 for i in range(99)] + [1, 0], prompts,
                      [f"{i}" for i in range(101)])
    assert len(data.labelled_split(shards, 18, 0)[1]) == 18


def test_splits_without_copies_and_few_prompts_are_those_of_always(tmp_path):
    """As they were before anybody looked for copies: written out again."""
    labels = torch.randint(-1, 2, (300,), generator=torch.Generator().manual_seed(5))
    shards = stand_in(tmp_path, labels, [f"{i % 9}" for i in range(300)], [f"{i}" for i in range(300)])
    part = torch.randperm(300, generator=common.random_generator(0, "fold")) % 3
    for i in (1, 2, 3):
        fold = stand_in(tmp_path, labels.clone(), [f"{i % 9}" for i in range(300)],
                        [f"{i}" for i in range(300)])
        assert torch.equal(data.take_fold(fold, f"{i}/3").labels, labels.masked_fill(part != i - 1, -1))
    held, wanted = [], round(40 * (labels == 0).sum().item() / (labels >= 0).sum().item())
    for label, count in ((0, wanted), (1, 40 - wanted)):
        where = (labels == label).nonzero()[:, 0]
        held.append(where[torch.randperm(len(where),
                                         generator=common.random_generator(f"7 {label}", "split"))[:count]])
    assert torch.equal(data.labelled_split(shards, 40, 7)[1], torch.cat(held).sort().values)


def test_a_label_whose_clips_are_all_copies_is_refused_and_a_large_group_can_be_held_out(tmp_path):
    with pytest.raises(InputError, match="clips of one label are copies of one another.*label more"):
        data.labelled_split(stand_in(tmp_path, [0, 0, 0, 1, 1, 1], copies=[0, 0, 0, 3, 4, 5]), 2, 0)
    train, held = data.labelled_split(stand_in(tmp_path, [0] * 6 + [1] * 6,
                                               copies=[0, 0, 0, 3, 3, 3, *range(6, 12)]), 2, 0)
    assert sorted(held.tolist())[:3] in ([0, 1, 2], [3, 4, 5]) and len(held) == 4 and len(train) == 8


def test_labels_that_come_later_move_no_group_to_another_fold(tmp_path):
    copies, prompts = torch.arange(200) // 2, [f"{i // 4}" for i in range(200)]
    make = lambda labels: stand_in(tmp_path, labels, prompts, [f"{i}" for i in range(200)], copies)
    labels = torch.randint(0, 2, (200,), generator=torch.Generator().manual_seed(0))
    few = labels.masked_fill(torch.arange(200) % 5 > 0, -1)
    after, before = (data.take_fold(make(x.clone()), "1/2").labels >= 0 for x in (labels, few))
    assert torch.equal(before, after & (few >= 0)) and after.sum() == 100


def test_few_labels_move_whole_groups(tmp_path):
    copies = torch.tensor([0, 0, 2, 2, 4, 4, 6, 6, *range(8, 40)])
    labels = torch.tensor([0] * 8 + [1] * 32)
    for i in (1, 2):
        got = data.take_fold(stand_in(tmp_path, labels.clone(), copies=copies), f"{i}/2").labels
        assert (got[:8] == 0).sum() >= 2 and torch.equal(got[0:8:2], got[1:8:2])
    one = torch.zeros(40, dtype=torch.long)  # all clips of a label in one group: it stays whole
    one[8:] = torch.arange(8, 40)
    got = [(data.take_fold(stand_in(tmp_path, labels.clone(), copies=one), f"{i}/2").labels == 0).sum().item()
           for i in (1, 2)]
    assert sorted(got) == [0, 8]


def test_two_pairs_of_copies_are_one_for_each_fold(tmp_path):
    copies = torch.arange(40) // 2 * 2
    for first, second in ((0, 2), (4, 10), (6, 30), (8, 38), (12, 20), (14, 26), (16, 18), (22, 34)):
        labels = torch.ones(40, dtype=torch.long)
        labels[[first, first + 1, second, second + 1]] = 0
        for i in (1, 2):
            got = data.take_fold(stand_in(tmp_path, labels.clone(), copies=copies), f"{i}/2").labels
            assert (got == 0).sum() == 2 and torch.equal(got[::2], got[1::2])


def test_a_prompt_of_most_clips_does_not_empty_the_training_set(tmp_path):
    prompts = ["x"] * 60 + [f"{i}" for i in range(12)]
    shards = stand_in(tmp_path, [1] * 72, prompts, [f"{i}" for i in range(72)])
    assert len(data.without_relatives(shards, torch.arange(1, 72), torch.tensor([0]))) == 71
    assert len(data.without_relatives(shards, torch.arange(71), torch.tensor([71]))) == 71


def test_copies_are_found_by_files_and_by_latents(tmp_path):
    x = torch.randn(6, 16, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    x[3] = x[1]                                                 # another file, the same picture
    x[4, 0, 0, 0] = x[2, 0, 0, 0]                               # the same beginning only
    for k, part in enumerate((slice(0, 3), slice(3, 6))):
        data.write_shards(tmp_path, x[part], torch.zeros(3, 8, 32), [0, 1, 0], ["a", "b", "c"], append=k > 0,
                          contents=["p", "q", "r"] if k == 0 else ["s", "t", "p"])
    shards = data.Shards(tmp_path)
    assert shards.copies.tolist() == [0, 1, 2, 1, 4, 0]
    assert data.without_relatives(shards, torch.tensor([1, 2, 4, 5]), torch.tensor([0, 3])).tolist() == [2, 4]
    with pytest.raises(InputError, match="nothing is left to train on"):
        data.without_relatives(shards, torch.tensor([1, 5]), torch.tensor([0, 3]))


def test_equal_values_join_rows_over_other_rows():
    assert shards_on_disk.join_equal([1, 2, None, 2, None, 3],
                                     [None, "a", "b", "c", "c", "b"]).tolist() == [0, 1, 2, 1, 1, 2]
    assert shards_on_disk.join_equal([]).tolist() == []


def test_check_counts_copies_and_prompts(clips, capsys):
    rows = metadata.read_metadata(clips)
    for i in range(3):
        shutil.copy(clips / f"{i}.mp4", clips / f"again{i}.mp4")
        rows.append({"file_name": f"again{i}.mp4", "prompt": f"CLIP  {i % 2}", "label": 1})
    write_list(clips, rows)
    run("check", clips)
    assert capsys.readouterr().out.splitlines()[-1] == (
        "6 of 9 clips are copies of others, 5 share their prompt with others (6 prompts)")


# ---- an answer knows the content it was given for
def test_shards_take_answers_for_what_they_hold(clips, tmp_path):
    path = clips / "labels.jsonl"

    def answer(name, grade, **more):
        line = {"file_name": name, "annotator": "ada", "physical": grade, "deformity": grade} | more
        with path.open("a") as file:
            file.write(json.dumps({"contents": labels.contents_beside(path, line)} | line) + "\n")

    answer("0.mp4", 2), answer("1.mp4", 0), answer("2.mp4", 2, contents=None)
    run("encode", clips, "--out", tmp_path / "out")
    assert data.Shards(tmp_path / "out").relabel().labels.tolist() == [1, 0, 1, 1, 0, 1]
    for name in ("0.mp4", "2.mp4"):  # another film comes: the shards still hold the old one
        shutil.copy(clips / "5.mp4", clips / name)
    answer("0.mp4", 0)
    shards = data.Shards(tmp_path / "out").relabel()
    # so the answer for the old film counts, not the new one
    assert shards.labels.tolist() == [1, 0, 1, 1, 0, 1]
    run("encode", clips, "--out", tmp_path / "out")
    shards = data.Shards(tmp_path / "out").relabel()
    got = {row["file_name"]: label for row, label in zip(shards.rows, shards.labels.tolist())}
    assert got == {"0.mp4": 0, "1.mp4": 0, "2.mp4": 1, "3.mp4": 1, "4.mp4": 0, "5.mp4": 1}
    assert "do not say for which content" in shards.label_note and "other content" not in shards.label_note
    path.write_text("".join(path.read_text().splitlines(True)[:1]))
    # the answer was for the old film alone: the list's label counts
    shards = data.Shards(tmp_path / "out").relabel()
    assert shards.labels[[row["file_name"] for row in shards.rows].index("0.mp4")] == 0
    assert "1 of 1 answers were given for other content" in shards.label_note


# ---- the same seed, the same bytes
def test_two_processes_make_the_worlds_clips_byte_for_byte(tmp_path):
    made = []
    for name in ("a", "b"):  # MALLOC_PERTURB_: memory that nobody set differs
        subprocess.run([sys.executable, "-m", "world.clips", tmp_path / name, "--count", "48"], check=True,
                       cwd=ROOT, capture_output=True,
                       env=os.environ | {"MALLOC_PERTURB_": {"a": "17", "b": "201"}[name]})
        made.append({path.name: path.read_bytes() for path in sorted((tmp_path / name).rglob("*.*"))
                     if path.name != lock.NAME})
    assert made[0] == made[1] and len(made[0]) == 49
