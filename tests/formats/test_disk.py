"""Disks that fail: full ones, a power loss, disks that cannot flush or lock, nodes without a common one.

One line names the file, nothing is half-written, and work goes on when there is room again. A full disk is
simulated by a limit on the size of files."""
import contextlib
import dataclasses
import errno
import fcntl
import json
import os
import resource
import shutil
from pathlib import Path

import launch
import numpy as np
import pytest
import torch
from launch import ROOT
from tiny import command, run, same, weights

import common
import data
import sample
from common import InputError
from formats import adapters, disk, labels, lock, metadata, picture, runs, video
from formats import weights as weights_of
from scale import parallel

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


@pytest.mark.parametrize("name, write", [("a.mp4", lambda path: video.write_video(path, noisy())),
                          ("a.gif", lambda path: picture.write_gif(path, noisy())),
                          ("a.png", lambda path: video.write_png(path, noisy()[0])),
                          ("a.jsonl", lambda path: metadata.write_rows(path, [{"a": 9999 * "x"}])),
                          ("a.json", lambda path: runs.write_json(path, 9999 * "x")),
                          ("a.safetensors", lambda path: adapters.write_adapters(path,
                               {"blocks.0.ffn.0": (torch.ones(9, 99), torch.ones(99, 9))}))])
def test_a_file_is_whole_or_as_it_was(tmp_path, name, write):
    (tmp_path / name).write_text("as it was")
    with limit(3000), pytest.raises(OSError, match=name):
        write(tmp_path / name)
    assert [path.name
            for path in tmp_path.iterdir()] == [name] and (tmp_path / name).read_text() == "as it was"
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
    (clips / "metadata.jsonl").write_text("".join(json.dumps({"file_name": f"{i}.mp4", "prompt": f"{i}"})
                                                  + "\n" for i in range(6)))
    encode = lambda out, *flags: (data.encode_command, data.Encode, clips, "--out", tmp_path / out, *flags)
    with limit(20_000):                                       # a clip is 12 kB of latents and 4 kB of context
        assert "shard-00000.safetensors" in failed(capsys, *encode("out", "--clips_per_shard", 2))
    assert not list((tmp_path / "out").glob("*.tmp"))
    for out in ("out", "whole"):
        common.cli(*encode(out)[:2], "", [str(x) for x in encode(out, "--clips_per_shard", 2)[2:]])
    a, b = (data.Shards(tmp_path / out) for out in ("out", "whole"))
    assert len(a) == 6 and same(a.batch(range(6)), b.batch(range(6)))


def test_samples_go_on_when_there_is_room_again(tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("a red circle\na blue square\n")
    argv = ["--prompts", tmp_path / "prompts.txt", "--output_dir", tmp_path / "out", "--num_inference_steps",
            1]
    with limit(900):
        assert ".mp4" in failed(capsys, sample.main, sample.Config, *argv)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {lock.NAME, "sample.json"}
    common.cli(sample.main, sample.Config, "", [str(x) for x in argv])
    assert len(metadata.read_metadata(tmp_path / "out")) == 2 and len(
        video.read_video(tmp_path / "out/000001.mp4")) == 9


def test_where_no_file_can_be_made_is_one_line(tmp_path):
    for path in ("/proc/none", tmp_path / "file/x"):
        (tmp_path / "file").touch()
        with pytest.raises(InputError, match="cannot be"):
            lock.hold(path)
        with pytest.raises(OSError):
            video.write_video(f"{path}/a.mp4", noisy())


def test_pieces_of_two_ranks_that_do_not_fit(folder):
    """fsdp's checkpoint, as ddp's in test_runs.py: the last one whole, one line, and nothing of the new
    one."""
    run(*command(folder, "sft", "full", "--max_train_steps", "2"))
    script, argv = command(folder, "sft", "full", "--resume", "latest", "--max_train_steps", "4")
    done = launch.python(f"{script}.py", *argv, "--batch_size", "4", "--parallel", "fsdp", ranks=2,
                         file_limit=20_000)
    lines = [line for line in done.stderr.splitlines() if "error: " in line]
    assert done.returncode and len(lines) == 1, done.stderr
    assert "checkpoint-000004 could not be written; the last whole one is " in lines[0]
    assert "CheckpointException" not in done.stderr
    assert not [path for path in (folder / "full").iterdir() if "tmp" in path.name]
    run(script, argv)
    run(*command(folder, "sft", "roomy", "--max_train_steps", "4"))
    assert same(weights(folder, "sft", "full"), weights(folder, "sft", "roomy"))


# ---- a power loss: only what was flushed is there
class Recorder:
    """Watches a folder: which content and which names of it were flushed, and are there after a power loss.

    `os.fsync`, renames and removals are recorded; after each of them `look` is called with copies of the
    folder as a kill (everything is there), a power loss (only what was flushed is), and two mixtures leave
    it: all names but only flushed content, as when a disk writes names early; and after a removal, the
    watched folder's own names as they were flushed, but what lies in its subfolders removed already."""

    def __init__(self, root, place, look, monkeypatch):
        self.root, self.place, self.look, self.seen = root, place, look, set()
        # of each inode: what was flushed; handles keep inodes from reuse
        self.content, self.names, self.handles = {}, {}, {}
        self.points = 0
        fsync = os.fsync

        def flushed(handle):
            fsync(handle)
            self.record(handle)

        monkeypatch.setattr(os, "fsync", self.watched(flushed))
        for owner, name in ((os, "rename"), (os, "replace"), (os, "mkdir"), (shutil, "rmtree")):
            monkeypatch.setattr(owner, name, self.watched(getattr(owner, name)))
        self.paused = False

    def watched(self, real, rmtree=shutil.rmtree):
        def call(*args, **more):
            found = real(*args, **more)
            if not self.paused:
                self.paused = True                              # copies are not recorded
                self.check(real is rmtree)
                self.paused = False
            return found
        return call

    def record(self, handle):
        inode = os.fstat(handle).st_ino
        self.handles.setdefault(inode, os.dup(handle))
        if os.path.isdir(f"/proc/self/fd/{handle}"):
            with os.scandir(handle) as entries:
                self.names[inode] = {entry.name: entry.inode() for entry in entries}
        else:
            with open(f"/proc/self/fd/{handle}", "rb") as file:
                self.content[inode] = file.read()

    def check(self, removed):
        live_names, live_content = {}, {}
        for folder, inner, outer in os.walk(self.root):
            live_names[os.stat(folder).st_ino] = {name: os.lstat(f"{folder}/{name}").st_ino for name in inner
                                                  + outer}
            for name in outer:
                path = f"{folder}/{name}"
                live_content[os.stat(path).st_ino] = Path(path).read_bytes()
            for path in (folder, *(f"{folder}/{name}" for name in outer)):
                inode = os.stat(path).st_ino
                if inode not in self.handles:
                    self.handles[inode] = os.open(path, os.O_RDONLY)
        top = os.stat(self.root).st_ino
        states = [(live_names, live_content), (self.names, self.content), (live_names, self.content)]
        if removed:
            states.append((live_names | {top: self.names.get(top, {})}, self.content | live_content))
        folders = live_names.keys() | self.names.keys()
        for names, content in states:
            self.points += 1
            tree = self.tree(top, names, content, folders)
            if tree in self.seen:
                continue
            self.seen.add(tree)
            shutil.rmtree(self.place, ignore_errors=True)
            self.place.mkdir()
            for name, what in tree:
                path = self.place / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.mkdir(exist_ok=True) if what is None else path.write_bytes(what)
            self.look(self.place)

    def after_power_loss(self):
        """((path, bytes, or None of a folder), ...): what is there after a power loss now."""
        return self.tree(os.stat(self.root).st_ino, self.names, self.content, self.names.keys())

    def tree(self, inode, names, content, folders, prefix=""):
        """((path, bytes, or None of a folder), ...) below a folder."""
        found = []
        for name, inner in sorted(names.get(inode, {}).items()):
            if inner in folders:
                found.append((prefix + name, None))
                found += self.tree(inner, names, content, folders, f"{prefix}{name}/")
            else:
                found.append((prefix + name, content.get(inner, b"")))
        return tuple(found)


@dataclasses.dataclass
class Run:
    output_dir: str = common.arg("run", "")
    max_train_steps: int = common.arg(9, "")
    resume_from_checkpoint: str | None = common.arg(None, "")


def test_after_a_power_loss_the_newest_whole_checkpoint_is_found(tmp_path, monkeypatch):
    """While checkpoints are written, replaced, pruned, set aside and brought back."""
    (tmp_path / "run").mkdir()
    promised, versions = [0], {}

    def look(folder):
        found = []
        for home in (folder, *folder.glob("earlier-*")):
            if runs.list_checkpoints(home):
                path = runs.resolve_checkpoint(home, str(home))
                state = runs.load_state(path)
                assert (path / "model/w").read_bytes() in versions[state["step"]] and runs.read_args(path)
                found.append(state["step"])
        assert max(found, default=0) >= promised[0], (promised,
                                                      sorted(str(path) for path in folder.rglob("*")))

    recorder = Recorder(tmp_path / "run", tmp_path / "after", look, monkeypatch)
    start = lambda **more: runs.start_run(Run(str(tmp_path / "run"), **more),
                                          4 if more else None).folder_lock.close()

    def save(step, content):
        versions[step] = versions.get(step, []) + [content]
        runs.save_checkpoint(tmp_path / "run", step,
                             {"model": lambda path: (path / "w").write_bytes(content)}, {},
                             Run(str(tmp_path / "run")), keep=1)
        promised[0] = max(step, promised[0])

    start()
    for step in (2, 4, 4):
        save(step, f"{step} {len(versions)}".encode())
    start()
    save(1, b"another run's")
    aside, = (tmp_path / "run").glob("earlier-*")
    start(resume_from_checkpoint=str(aside))
    assert [step for step, _ in runs.list_checkpoints(tmp_path / "run")] == [4]
    assert recorder.points > 200 and len(recorder.seen) > 60, (recorder.points, len(recorder.seen))


@pytest.mark.parametrize("name, write",
                         [("a.jsonl", lambda path, text: metadata.write_rows(path, [{"a": text}])),
                          ("a.json", lambda path, text: runs.write_json(path, text)),
                          ("a.safetensors", lambda path,
                           text: adapters.write_adapters(path, {text: (torch.ones(9, 2), torch.ones(2, 9))})),
                          ("transformer", lambda path,
                           text: weights_of.write_folder(path, {"a": text}, {"w": torch.ones(5)})),
                          ("reward", lambda path,
                           text: weights_of.write_folder(path, {"a": text}, {"w": torch.ones(5)}))])
def test_after_a_power_loss_a_file_is_the_old_or_the_new_one(tmp_path, monkeypatch, name, write):
    """Of a folder the old one can be under another name. Once the writer has returned, it is the new one."""
    (tmp_path / "run").mkdir()
    (tmp_path / "whole").mkdir()
    wanted, states = [], set()
    read = lambda path: sorted((file.name, file.read_bytes())
                               for file in path.rglob("*")) if path.is_dir() else path.read_bytes()
    for text in ("first", "second"):
        write(tmp_path / "whole" / name, text)
        wanted.append(read(tmp_path / "whole" / name))

    def look(folder):
        found = [path for path in (folder / name, folder / f"{name}{disk.REPLACED}") if path.exists()]
        assert found or not states
        if found:
            states.add(wanted.index(read(found[0])))            # ValueError: neither of the two

    recorder = Recorder(tmp_path / "run", tmp_path / "after", look, monkeypatch)
    for n, text in enumerate(("first", "second")):
        write(tmp_path / "run" / name, text)
        kept = [content for path,
                content in recorder.after_power_loss() if path.split("/")[0] == name and content is not None]
        assert kept == ([content for _, content in wanted[n]] if isinstance(wanted[n], list) else [wanted[n]])
    assert states == {0, 1}


def test_an_answer_is_there_after_a_power_loss(tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    recorder = Recorder(tmp_path / "run", tmp_path / "after", lambda folder: None, monkeypatch)
    journal = labels.Journal(tmp_path / "run/labels.jsonl")
    for n in range(3):
        journal.append({"n": n})
        assert recorder.after_power_loss() == (("labels.jsonl",
                                                "".join(f'{{"n": {k}}}\n' for k in range(n + 1)).encode()),)


# ---- disks that cannot flush, or have no locks
def failing(number, folders_only):
    fsync = os.fsync

    def fails(handle):
        if not folders_only or os.path.isdir(f"/proc/self/fd/{handle}"):
            raise OSError(number, os.strerror(number))
        fsync(handle)

    return fails


@pytest.mark.parametrize("number, folders_only",
                         [(errno.EINVAL, True), (errno.EIO, True), (errno.EACCES, True),
                          (errno.EINVAL, False), (errno.ENOSYS, False), (errno.EOPNOTSUPP, False)])
def test_a_disk_that_cannot_flush_is_one_warning(tmp_path, monkeypatch, capsys, number, folders_only):
    monkeypatch.setattr(disk, "_warned", set())
    monkeypatch.setattr(os, "fsync", failing(number, folders_only))
    runs.start_run(Run(str(tmp_path / "run")))
    for step in (1, 2, 2):
        runs.save_checkpoint(tmp_path / "run", step, {}, {}, Run(str(tmp_path / "run")))
    labels.Journal(tmp_path / "labels.jsonl").append({"a": 1})
    assert runs.load_state(runs.resolve_checkpoint(tmp_path / "run", "latest"))["step"] == 2
    stderr = capsys.readouterr().err
    assert stderr.count("\n") == 1 and stderr.startswith("warning: ") and "cannot flush (" in stderr, stderr


def test_pieces_of_fsdp_on_a_disk_that_cannot_flush(tmp_path, monkeypatch, capsys):
    """In one process, which makes the same calls."""
    monkeypatch.setattr(disk, "_warned", set())
    monkeypatch.setattr(os, "fsync", failing(errno.ENOSYS, False))
    monkeypatch.setattr(parallel, "DTensor", torch.nn.Parameter)        # so that it counts as cut into pieces
    model = torch.nn.Linear(2, 3)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    runs.start_run(Run(str(tmp_path / "run")))
    parallel.save_checkpoint(tmp_path / "run", 1, {}, model, optimizer, Run(str(tmp_path / "run")))
    assert (tmp_path / "run/checkpoint-000001/sharded_state/.metadata").stat().st_size
    assert capsys.readouterr().err.count("warning: ") == 1


@pytest.mark.parametrize("number, folders_only",
                         [(errno.EIO, False), (errno.ENOSPC, False), (errno.ENOSPC, True)])
def test_a_disk_that_fails_to_flush_what_was_written_is_an_error(tmp_path, monkeypatch, number, folders_only):
    runs.start_run(Run(str(tmp_path / "run")))
    runs.save_checkpoint(tmp_path / "run", 1, {}, {}, Run(str(tmp_path / "run")))
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", failing(number, folders_only))
        with pytest.raises(OSError,
            match="checkpoint-000002 could not be written; the last whole one is .*checkpoint-000001: "):
            runs.save_checkpoint(tmp_path / "run", 2, {}, {}, Run(str(tmp_path / "run")))
    assert runs.load_state(runs.resolve_checkpoint(tmp_path / "run", "latest"))["step"] == 1
    assert not list((tmp_path / "run").glob("*.tmp"))


@pytest.mark.parametrize("number", (errno.ENOLCK, errno.ENOSYS, errno.EINVAL, errno.EIO))
def test_a_disk_without_locks_is_one_warning(tmp_path, monkeypatch, capsys, number):
    def flock(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(disk, "_warned", set())
    monkeypatch.setattr(fcntl, "flock", flock)
    with lock.hold(tmp_path / "run"), lock.hold(tmp_path / "run"):
        labels.Journal(tmp_path / "labels.jsonl").append({"a": 1})
    stderr = capsys.readouterr().err
    assert stderr.count("\n") == 1 and stderr.startswith("warning: ") and "has no locks (" in stderr, stderr


# ---- nodes without a common disk
NODES ="""
import json, os, sys
rank = int(os.environ["RANK"])
sys.path.insert(0, {root!r})
sys.path.insert(0, {tests!r})
import common, data, sample, train_align, train_reward
from formats import disk
common.setup()
found = []
def told(work):
    before = sorted(map(str, __import__("pathlib").Path(".").rglob("*")))
    try:
        work()
        said = None
    except common.InputError as error:
        said = str(error)
    found.append([said, before == sorted(map(str, __import__("pathlib").Path(".").rglob("*")))])
os.chdir(sys.argv[1])
disk.require_shared("common/run", "--output_dir")
disk.require_shared(os.path.join(sys.argv[1], "new/deep/run"), "--output_dir")
os.chdir(f"node-{{rank}}")
disk.PATIENCE = 0.2
for name, argv in json.loads(sys.argv[2]):
    script = sys.modules[name]
    main, Config = data.COMMANDS["encode"] if name == "data" else (script.main, script.Config)
    told(lambda: main(common.parse(Config, "", argv)))
for flag in ("--samples_dir", "--curated_dir"):
    told(lambda: disk.require_shared("there", flag))
with open(f"said.json", "w") as file:
    json.dump(found, file)
common.teardown()
"""


def test_nodes_without_a_common_disk_are_told_before_they_work(folder, tmp_path):
    """Two processes with working folders of their own; on a common one nothing is said. Nothing is left
    behind."""
    (tmp_path / "driver.py").write_text(NODES.format(root=str(ROOT), tests=str(ROOT / "tests")))
    for node in ("node-0", "node-1"):
        (tmp_path / node).mkdir()
    (tmp_path / "node-0/there").mkdir()
    (tmp_path / "clips").mkdir()
    (tmp_path / "prompts.txt").write_text("a red circle\na blue square\n")
    jobs = []
    for name in ("sft", "reward"):
        script, argv = command(folder, name, "x")
        argv[argv.index("--output_dir") + 1] = "runs/out"
        jobs.append([script, argv])
    jobs += [["sample", ["--prompts", str(tmp_path / "prompts.txt"), "--output_dir", "out"]],
             ["sample", ["--prompt", "a red circle", "--num_videos", "2"]],
             ["data", [str(tmp_path / "clips"), "--out", "latents"]],
             ["data", ["clips", "--out", str(tmp_path / "latents")]]]
    (tmp_path / "node-0/clips").mkdir()
    launch.torchrun(2, tmp_path / "driver.py", tmp_path, json.dumps(jobs))
    for node in ("node-0", "node-1"):
        said = json.loads((tmp_path / node / "said.json").read_text())
        assert all(unchanged for _, unchanged in said), said
        flags = ("--output_dir runs/out", "--output_dir runs/out", "--output_dir out", "--output .",
                 "--out latents", "clips: not every process sees this folder", "--samples_dir there",
                 "--curated_dir there")
        for (words, _), flag in zip(said, flags, strict=True):
            assert words and flag in words and "disk that all nodes share" in words, (words, flag)
    assert not [path for path in tmp_path.rglob("*") if "shared-" in path.name
                or path.name in ("common", "new")]
