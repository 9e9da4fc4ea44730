"""data.py encode under torchrun: the same folder, byte for byte, as of one process, for any number of ranks,
killed or not."""
import json
import shutil
import signal
import subprocess
import sys
import time

import launch
import numpy as np
import pytest
from launch import ENV, ROOT, Launch

import data
from common import InputError
from formats import lock
from formats.video import write_video

FLAGS = ["--batch_size", "4", "--clips_per_shard", "8"]
BAD = {"cut.mp4": "damaged", "none.mp4": "no such file", "large.mp4": "is 64x64",
       "sub/../3.mp4": "listed twice", "short.mp4": "too short", "row 21": "not a JSON object"}
# encode whose rank 0 stops behind its first shard, and one whose rank 1 has no memory left
STOPS = """
import sys, time, common, data
write = data.write_shards
def slow(*args, **more):
    write(*args, **more), print("a shard", flush=True), time.sleep(600)
data.write_shards = slow
common.cli(data.encode_command, data.Encode, "", sys.argv[1:])
"""
FAILS = """
import sys, common, data, torch
encode = data.encode_batch
def encode_batch(*args):
    if common.rank() == 1:
        raise torch.OutOfMemoryError("out of memory")
    return encode(*args)
data.encode_batch = encode_batch
common.cli(data.encode_command, data.Encode, "", sys.argv[1:])
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """clips/: 16 good ones, three in every four rows, and the bad ones; one/: what one process makes."""
    folder = tmp_path_factory.mktemp("encode")
    clips, rng = folder / "clips", np.random.default_rng(0)
    for name, frames, side in [*((f"{i}.mp4", 9, 32) for i in range(16)), ("large.mp4", 9, 64),
                               ("short.mp4", 4, 32)]:
        write_video(clips / name, rng.integers(0, 255, (frames, side, side, 3), np.uint8))
    (clips / "cut.mp4").write_bytes((clips / "0.mp4").read_bytes()[:700])
    rows = [{"file_name": f"{i}.mp4", "prompt": "clip " * (1 + i % 5) + str(i), "label": i % 2}
            for i in range(16)]
    for place, name in zip((0, 5, 9, 13, 17), BAD):
        rows.insert(place, {"file_name": name, "prompt": "x"})
    lines = [*map(json.dumps, rows[:20]), "nonsense", *map(json.dumps, rows[20:])]
    (clips / "metadata.jsonl").write_text("".join(f"{line}\n" for line in lines))
    (folder / "stops.py").write_text(STOPS)
    (folder / "fails.py").write_text(FAILS)
    assert encode(folder, 1, "one").returncode == 0
    return folder


def command(out, script=ROOT / "data.py", clips="clips"):
    return [script, *["encode"] * (script.name == "data.py"), clips, "--out", out, *FLAGS]


def encode(folder, ranks, *how):
    return launch.python(*command(*how), ranks=ranks if ranks > 1 else None, cwd=folder)


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != lock.NAME}


def test_one_process_encodes_what_can_be_and_names_the_rest(folder):
    shards = data.Shards(folder / "one")
    assert [row["file_name"] for row in shards.rows] == [f"{i}.mp4" for i in range(16)]
    # of chunks of 3, 3, 3, 3, 3 and 1
    assert [entry["count"] for entry in shards.index["shards"]] == [6, 6, 4]
    report = [json.loads(line) for line in (folder / "one/report.jsonl").read_text().splitlines()]
    assert [row["file_name"].split("jsonl ")[-1] for row in report] == list(BAD)
    assert all(reason in row["reason"] for row, reason in zip(report, BAD.values()))
    assert len(json.loads((folder / "one/contents.json").read_text())) == 18       # whatever could be read


@pytest.mark.parametrize("ranks", (2, 3))
def test_any_number_of_ranks_makes_the_same_folder(folder, ranks):
    done = encode(folder, ranks, f"of-{ranks}")
    assert done.returncode == 0, done.stderr
    assert files(folder / f"of-{ranks}") == files(folder / "one")
    lines = done.stdout.splitlines()                                                # told once
    assert len(lines) == 7 and lines[-1].startswith(f"of-{ranks}: 16 of 22 clips encoded, 6 skipped")


def test_killed_and_resumed_by_another_number_of_ranks(folder):
    with Launch(*command("killed", folder / "stops.py"), ranks=2, cwd=folder) as run:
        while run.running and "a shard\n" not in run.texts()[0]:
            time.sleep(0.01)
        assert run.running
        run.signal(signal.SIGKILL)
    assert 0 < len(data.Shards(folder / "killed")) < 16
    shutil.copytree(folder / "killed", folder / "killed too")
    for count, out in ((1, "killed"), (2, "killed too")):
        done = encode(folder, count, out)
        assert done.returncode == 0, done.stderr
        assert files(folder / out) == files(folder / "one")


@pytest.mark.parametrize("script, how, code, wanted", [
    ("data.py", ("theirs", "clips"), 2, "--out theirs: holds files that are not ours"),
    ("data.py", ("none", "bad"), 2, "bad: no clip could be encoded: see none/report.jsonl"),
    ("fails.py", ("memory", "clips"), 1, "out of memory")])
def test_what_ends_one_rank_ends_all_with_one_line(folder, script, how, code, wanted):
    (folder / "theirs").mkdir(exist_ok=True), (folder / "bad").mkdir(exist_ok=True)
    (folder / "theirs/notes.txt").touch(), (folder / "bad/metadata.jsonl").write_text('{"file_name": '
                                                                                      '"a.mp4", "prompt": '
                                                                                      '"x"}\n')
    out, clips = how
    words = command(out, (ROOT if script == "data.py" else folder) / script, clips)
    if out == "none":                                           # once as a user starts it
        done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone",
                               "--nproc_per_node=2", *words], cwd=folder, env=ENV, capture_output=True,
                              text=True, timeout=300)
        ours, summary = done.stderr.split("torch/distributed/elastic", 1)
        assert f"exitcode  : {code} " in summary                # torchrun's own is always 1
    else:
        done = launch.python(*words, ranks=2, cwd=folder)
        ours = done.stderr
        assert done.returncode == code
    assert ours.count("error: ") == 1 and f"error: {wanted}" in ours and "Traceback" not in ours, done.stderr


def test_check_is_one_process(folder, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="start it without torchrun"):
        data.check_command(data.Check(str(folder / "clips")))
