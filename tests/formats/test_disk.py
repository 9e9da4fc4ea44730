"""A disk that is full, or takes no files: one line that names the file, nothing half-written, and there is room again: on it goes.

No file may grow past a limit, which is to a program what a full disk is."""
import contextlib
import json
import resource
import subprocess
import sys

import numpy as np
import pytest
import torch
from tiny import ENV, ROOT, command, run, same, weights

import common
import data
import sample
from common import InputError
from formats import adapters, labels, lock, metadata, picture, runs, video

pytestmark = pytest.mark.usefixtures("cpu")


@contextlib.contextmanager
def limit(size):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def noisy(frames=9, seed=0):
    return np.random.default_rng(seed).integers(0, 255, (frames, 64, 64, 3), np.uint8)


@pytest.mark.parametrize("name, write", [
    ("a.mp4", lambda path: video.write_video(path, noisy())), ("a.gif", lambda path: picture.write_gif(path, noisy())),
    ("a.png", lambda path: video.write_png(path, noisy()[0])),
    ("a.jsonl", lambda path: metadata.write_rows(path, [{"a": 9999 * "x"}])),
    ("a.json", lambda path: runs.write_json(path, 9999 * "x")),
    ("a.safetensors", lambda path: adapters.write_adapters(path, {"blocks.0.ffn.0": (torch.ones(9, 99), torch.ones(99, 9))}))])
def test_a_file_is_whole_or_as_it_was(tmp_path, name, write):
    (tmp_path / name).write_text("as it was")
    with limit(3000), pytest.raises(OSError, match=name):
        write(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == [name] and (tmp_path / name).read_text() == "as it was"
    write(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == [name] and (tmp_path / name).stat().st_size > 3000


def test_an_answer_that_does_not_fit_is_not_said(tmp_path):
    journal = labels.Journal(tmp_path / "labels.jsonl")
    line = {"file_name": "a.mp4", "annotator": "a", "physical": 2, "deformity": 2}
    journal.append(line)
    before = (tmp_path / "labels.jsonl").read_bytes()
    with limit(len(before) + 20), pytest.raises(OSError):
        journal.append(line)
    assert (tmp_path / "labels.jsonl").read_bytes() == before
    journal.append(line)
    assert (tmp_path / "labels.jsonl").read_bytes() == 2 * before


def failed(capsys, main, Config, *argv):
    """The one line with which it ends."""
    with pytest.raises(SystemExit) as stop:
        common.cli(main, Config, "", [str(x) for x in argv])
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert stop.value.code == 1 and len(lines) == 1 and "File too large" in lines[0], lines
    return lines[0]


def test_encode_goes_on_when_there_is_room_again(tmp_path, capsys):
    clips = tmp_path / "clips"
    for i in range(6):
        video.write_video(clips / f"{i}.mp4", noisy(seed=i))
    (clips / "metadata.jsonl").write_text("".join(json.dumps({"file_name": f"{i}.mp4", "prompt": f"{i}"}) + "\n" for i in range(6)))
    encode = lambda out, *flags: (data.encode_command, data.Encode, clips, "--out", tmp_path / out, *flags)
    with limit(20_000):                                         # a clip is 12 kB of latents and 4 kB of context
        assert "shard-00000.safetensors" in failed(capsys, *encode("out", "--clips_per_shard", 2))
    assert not list((tmp_path / "out").glob("*.tmp"))
    for out in ("out", "whole"):
        common.cli(*encode(out)[:2], "", [str(x) for x in encode(out, "--clips_per_shard", 2)[2:]])
    a, b = (data.Shards(tmp_path / out) for out in ("out", "whole"))
    assert len(a) == 6 and same(a.batch(range(6)), b.batch(range(6)))


def test_samples_go_on_when_there_is_room_again(tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("a red circle\na blue square\n")
    argv = ["--prompts", tmp_path / "prompts.txt", "--output_dir", tmp_path / "out", "--num_inference_steps", 1]
    with limit(900):
        assert ".mp4" in failed(capsys, sample.main, sample.Config, *argv)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {lock.NAME, "sample.json"}
    common.cli(sample.main, sample.Config, "", [str(x) for x in argv])
    assert len(data.read_metadata(tmp_path / "out")) == 2 and len(video.read_video(tmp_path / "out/000001.mp4")) == 9


def test_where_no_file_can_be_made_is_one_line(tmp_path):
    for path in ("/proc/none", tmp_path / "file/x"):
        (tmp_path / "file").touch()
        with pytest.raises(InputError, match="cannot be"):
            lock.hold(path)
        with pytest.raises(OSError):
            video.write_video(f"{path}/a.mp4", noisy())


def test_pieces_of_two_ranks_that_do_not_fit(folder):
    """fsdp's checkpoint, as ddp's in test_runs.py: the last one whole, one line, and nothing of the new one."""
    run(*command(folder, "sft", "full", "--max_train_steps", "2"))
    script, argv = command(folder, "sft", "full", "--resume", "latest", "--max_train_steps", "4")
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
                           ROOT / f"{script}.py", *argv, "--batch_size", "4", "--parallel", "fsdp"], env=ENV, capture_output=True,
                          text=True, timeout=600, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)))
    lines = [line for line in done.stderr.splitlines() if "error: " in line]
    assert done.returncode and len(lines) == 1, done.stderr
    assert "checkpoint-000004 could not be written; the last whole one is " in lines[0]
    assert "CheckpointException" not in done.stderr
    assert not [path for path in (folder / "full").iterdir() if "tmp" in path.name]
    run(script, argv)
    run(*command(folder, "sft", "roomy", "--max_train_steps", "4"))
    assert same(weights(folder, "sft", "full"), weights(folder, "sft", "roomy"))
