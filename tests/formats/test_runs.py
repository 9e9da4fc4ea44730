"""formats/runs.py: what a run does to its folder, and with the training scripts: a run that goes on is the
same run or is refused; one writer; a disk that fails."""
import dataclasses
import io
import json
import os
import shutil
import sys
from types import SimpleNamespace

import av
import launch
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import command, metrics, one_line, run, same, weights, write_data

from common import InputError, arg
from formats import disk, fingerprint, lock, runs
from formats.video import write_video
from formats.weights import WEIGHTS

pytestmark = pytest.mark.usefixtures("cpu")


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    """What is flushed is test_disk.py's; here it would only cost time."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


# ---- what a run does to its folder, with a script of a few lines
@dataclasses.dataclass
class Config:
    output_dir: str = arg("run", "run folder")
    learning_rate: float = arg(1e-4, "rate")
    max_train_steps: int = arg(4, "steps")
    lora: str | None = arg(None, "a file")
    fsdp_group_size: int = arg(0, "a flag that had another name")
    resume_from_checkpoint: str | None = arg(None, "where from")


def play(folder, **flags):
    """A run that writes all that our scripts write, each file with the rate and the step."""
    config = Config(str(folder), **flags)
    path, state = runs.open_checkpoint(config)
    log = runs.start_run(config, state["step"] if path else None)
    write = lambda name, step: (lambda path: (path / name).write_text(f"{config.learning_rate} {step}"))
    for step in range(state["step"] + 1, config.max_train_steps + 1):
        log.log(step, rate=config.learning_rate)
        (folder / "samples").mkdir(exist_ok=True)
        write(f"step-{step}.png", step)(folder / "samples")
        if step % 2 == 0:
            runs.save_checkpoint(folder, step, {"transformer": write("w", step)}, {}, config)
        best = folder / "best.tmp"
        best.mkdir()
        runs.write_json(best / "best.json", {"step": step})
        disk.put(best, folder / "best")
    for name in ("transformer", "reward"):
        (folder / name).mkdir(exist_ok=True)
        write("w", config.max_train_steps)(folder / name)
    write("report.json", 0)(folder)
    write("pytorch_lora_weights.safetensors", 0)(folder)
    log.file.close()
    log.folder_lock.close()


def files(folder, but=("earlier-", ".lock")):
    """{path: bytes}, without what begins with one of `but`."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*"))
            if path.is_file() and not str(path.relative_to(folder)).startswith(but)}


def without_args(found):
    return {name: content for name, content in found.items() if not name.endswith("args.json")}


def test_a_fresh_run_sets_everything_of_the_earlier_one_aside_and_it_comes_back(tmp_path, capsys):
    folder, alone = tmp_path / "run", tmp_path / "alone"
    play(folder)
    first = files(folder)
    for name in ("curated/world.json", "curated/.lock", "notes.txt", "inner/args.json",
                 "latents-1.safetensors"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("kept")
    capsys.readouterr()
    play(folder, learning_rate=2e-4)
    aside, = folder.glob("earlier-*")
    assert capsys.readouterr().out == (f"{folder} held an earlier run. It is now {aside}; to go back to it, "
                                       f"give its flags and --resume {aside}\n")
    play(alone, learning_rate=2e-4)
    kept = {"curated/world.json", "notes.txt", "inner/args.json", "latents-1.safetensors", "curated/.lock"}
    assert files(aside) == first and len(first) == 17
    assert without_args(files(folder)).keys() - kept == without_args(files(alone)).keys()
    assert all(files(folder)[name] == content for name, content in without_args(files(alone)).items())
    # back to the first, as if the second had never been, with two steps more; and back to the second
    play(folder, resume_from_checkpoint=str(aside), max_train_steps=6)
    again, = folder.glob("earlier-*")
    assert again != aside and without_args(files(again)) == without_args(files(alone))
    shutil.rmtree(alone)
    play(alone, max_train_steps=6)
    found = {name: content for name, content in files(folder).items() if name not in kept}
    assert without_args(found) == without_args(files(alone))
    play(folder, resume_from_checkpoint=again.name, learning_rate=2e-4)
    assert "2e-4" not in capsys.readouterr().err and (folder / "transformer/w").read_text() == "0.0002 4"


def test_an_earlier_run_is_a_run_folder_of_its_own(tmp_path):
    play(tmp_path / "run")
    play(tmp_path / "run", learning_rate=2e-4)
    aside, = (tmp_path / "run").glob("earlier-*")
    play(aside, resume_from_checkpoint="latest", max_train_steps=6)
    play(tmp_path / "alone", max_train_steps=6)
    assert without_args(files(aside)) == without_args(files(tmp_path / "alone"))
    # the folder that it is read from stays
    play(tmp_path / "other", resume_from_checkpoint=str(aside), max_train_steps=8)
    assert (aside / "checkpoint-000006").is_dir() and (tmp_path / "other/checkpoint-000008").is_dir()


def test_a_checkpoint_of_another_folder_sets_the_run_that_is_there_aside(tmp_path, capsys):
    play(tmp_path / "a", max_train_steps=2)
    play(tmp_path / "b")
    before = files(tmp_path / "b")
    play(tmp_path / "b", resume_from_checkpoint=str(tmp_path / "a"), max_train_steps=3)
    aside, = (tmp_path / "b").glob("earlier-*")
    assert files(aside) == before
    assert [step for step, _ in runs.read_metrics(tmp_path / "b/metrics.jsonl")] == [3]
    assert f"It is now {aside}" in capsys.readouterr().out


def test_going_back_to_an_older_checkpoint_sets_the_later_ones_aside(tmp_path, capsys):
    folder = tmp_path / "run"
    play(folder, max_train_steps=6)
    capsys.readouterr()
    play(folder, resume_from_checkpoint="checkpoint-000002", learning_rate=2e-4)
    aside, = folder.glob("earlier-*")
    said = (f"{folder}: what the run made after step 2 is now {aside}; to go back to step 6, give "
            f"--resume {aside}")
    assert said in capsys.readouterr().out
    assert [step for step, _ in runs.list_checkpoints(folder)] == [2, 4]
    assert [step for step, _ in runs.list_checkpoints(aside)] == [4, 6]
    assert json.loads(
        (aside / "best/best.json").read_text()) == {"step": 6} and (aside / "transformer/w").is_file()
    assert [step for step, _ in runs.read_metrics(aside / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]
    play(folder, resume_from_checkpoint=str(aside), max_train_steps=8)
    assert [json.loads(line)["rate"] for _, line in runs.read_metrics(folder / "metrics.jsonl")] == 8 * [1e-4]


@pytest.mark.parametrize("then", ("fresh", "latest", "back"))
def test_a_kill_while_a_run_is_moved_loses_nothing(tmp_path, monkeypatch, then):
    """At each rename of setting aside (and of coming back): the next start finishes it, or brings the run
    back."""
    play(tmp_path / "whole")
    if then == "back":
        play(tmp_path / "whole", learning_rate=2e-4)
    rename, at = os.rename, 0
    while True:
        folder, calls = tmp_path / f"run-{at}", []
        shutil.copytree(tmp_path / "whole", folder)
        first = files(next(iter(folder.glob("earlier-*")), folder))

        def die(*paths):
            calls.append(paths)
            if len(calls) == at + 1:
                raise KeyboardInterrupt
            rename(*paths)

        flags = {"resume_from_checkpoint": "latest", "max_train_steps": 4}
        if then == "back":
            flags["resume_from_checkpoint"] = next(iter(folder.glob("earlier-*"))).name
        with monkeypatch.context() as patch:
            patch.setattr(os, "rename", die)
            try:
                runs.start_run(Config(str(folder), **(flags if then == "back" else {})),
                               4 if then == "back" else None)
                break                                           # all renames have been interrupted
            except KeyboardInterrupt:
                at += 1
        if then == "fresh":
            play(folder)
            aside, = folder.glob("earlier-*")
            assert files(aside) == first
        elif then == "latest":
            if not list(folder.glob("earlier-*[0-9]")):         # else it was done
                play(folder, **flags)
                assert without_args(files(folder)) == without_args(first) and not list(
                    folder.glob("earlier-*"))
        else:
            found = [path for path in folder.rglob("checkpoint-*") if (path / "train_state.pt").is_file()]
            assert len(found) == 4 and len(list(folder.rglob("best.json"))) == 2
    assert at > 8


def test_latest_of_nothing_starts(tmp_path, capsys):
    """As in a queue's script, that is started again and again."""
    for n, step in enumerate((2, 4)):
        play(tmp_path / "deep/run", resume_from_checkpoint="latest", max_train_steps=step)
        said = f"--resume latest: there is no checkpoint in {tmp_path}/deep/run yet, so the run starts afresh"
        assert (said in capsys.readouterr().out) == (n == 0)
    play(tmp_path / "alone")
    assert without_args(files(tmp_path / "deep/run")) == without_args(files(tmp_path / "alone"))
    (tmp_path / "early").mkdir()
    runs.start_run(Config(str(tmp_path / "early")))             # killed before its first step
    play(tmp_path / "early", resume_from_checkpoint="latest")
    assert not list((tmp_path / "early").glob("earlier-*"))
    for spec in (str(tmp_path / "nowhere"), "checkpoint-000009"):
        with pytest.raises(InputError, match="there is no .*train_state.pt"):
            play(tmp_path / "early", resume_from_checkpoint=spec)


def test_a_run_does_not_move_what_it_reads(tmp_path):
    play(tmp_path / "run")
    before = files(tmp_path / "run")
    for name in ("pytorch_lora_weights.safetensors", "transformer/w", "best"):
        with pytest.raises(InputError, match=f"--lora .*{name}: belongs to the run in --output_dir"):
            play(tmp_path / "run", lora=str(tmp_path / "run" / name))
    assert files(tmp_path / "run") == before


def test_old_names_of_flags_are_understood(tmp_path):
    play(tmp_path / "run", max_train_steps=2)
    for path in (tmp_path / "run/args.json", tmp_path / "run/checkpoint-000002/args.json"):
        args = json.loads(path.read_text())
        path.write_text(json.dumps({"shard_size" if name == "fsdp_group_size" else name: value for name,
                                    value in args.items()}))
    play(tmp_path / "run", resume_from_checkpoint="latest")
    assert "fsdp_group_size" in runs.read_args(
        tmp_path / "run") and "shard_size" not in runs.read_args(tmp_path / "run")


@pytest.mark.parametrize("where, code", [
    ("import", "raise TypeError('its metaclass\\nis broken')"), ("import", "raise ImportError('libfoo.so')"),
    ("import", "import a_module_that_nobody_has"), ("start", "raise TypeError('protobuf')"),
    ("log", "raise AttributeError('np.bool')")])
def test_a_broken_tensorboard_is_one_warning(tmp_path, monkeypatch, capsys, where, code):
    (tmp_path / "site/tensorboard").mkdir(parents=True)
    (tmp_path / "site/tensorboard/__init__.py").write_text(code if where == "import" else "")
    monkeypatch.syspath_prepend(tmp_path / "site")
    for name in [name for name in sys.modules if name.split(".")[0] == "tensorboard"
                 or name.startswith("torch.utils.tensorboard")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(disk, "_warned", set())
    if where != "import":
        def broken(*args, **more):
            exec(code)
        board = SimpleNamespace(add_scalar=broken, flush=lambda: None)
        writer = broken if where == "start" else lambda *args, **more: board
        monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=writer))
    for rate in (1e-4, 2e-4):
        play(tmp_path / "run", learning_rate=rate)
    stderr = capsys.readouterr().err
    assert stderr.count("\n") == 1 and stderr.startswith("warning: TensorBoard cannot be used ("), stderr
    assert len(runs.read_metrics(tmp_path / "run/metrics.jsonl")) == 4


# ---- the same run, or another

@pytest.fixture(scope="module")
def started(folder):
    """One run of each script that stopped after its second step, in folders of its own; other data, models
    and rewards."""
    for name in ("prfl", "reward"):
        run(*command(folder, name, f"started-{name}", "--max_train_steps", "2"))
    shutil.copytree(folder / "data", folder / "moved/data")
    shutil.copytree(folder / "generator", folder / "moved/model")
    write_data(folder / "relabelled", labels=[(i + 1) % 2 for i in range(32)])
    write_data(folder / "refilmed")
    shard = load_file(folder / "refilmed/shard-00000.safetensors")
    shard["latents"][17] += 1                                                       # one clip is another film
    save_file(shard, folder / "refilmed/shard-00000.safetensors")
    shutil.copytree(folder / "generator", folder / "retrained")
    for part in ("transformer", "reward"):
        state = load_file(folder / "retrained" / part / WEIGHTS)
        state["blocks.1.ffn.2.weight" if part == "transformer" else "mlp.0.weight"][0, 0] += 1
        save_file(state, folder / "retrained" / part / WEIGHTS)
    return folder


def resumed(folder, name, *flags):
    out = folder / f"again-{name}"
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(folder / f"started-{name}", out)
    run(*command(folder, name, out.name, *flags, "--resume", "latest"))
    return out


@pytest.mark.parametrize("name, flags, words", [
    ("prfl", "--method refl", "--method prfl (now refl)"), ("prfl", "--seed 1", "--seed 0 (now 1)"),
    ("prfl", "--data {folder}/relabelled", "--data, what it holds: "),
    ("prfl", "--data {folder}/refilmed", "--data, what it holds: "),
    ("prfl", "--model {folder}/retrained --reward {folder}/generator/reward", "--model, what it holds: "),
    ("prfl", "--reward {folder}/retrained/reward", "--reward, what it holds: "),
    ("prfl", "--recipe steady", "--recipe paper (now steady)"),
    ("prfl", "--num_inference_steps 5", "--num_inference_steps 4 (now 5)"),
    ("prfl", "--num_validation 4", "--num_validation 0 (now 4)"),            # held-out clips, once trained on
    ("prfl", "--lora_rank 2", "--lora_rank 0 (now 2)"),
    ("prfl", "--max_train_steps 1", "--max_train_steps 1: "),
    ("reward", "--holdout 9", "--holdout 8 (now 9)"), ("reward", "--seed 1", "--seed 0 (now 1)"),
    ("reward", "--fixed_t 0.5", "--fixed_t None (now 0.5)"), ("reward", "--loss bt", "--loss bce (now bt)"),
    ("reward", "--data {folder}/relabelled", "--data, what it holds: "),
    ("reward", "--max_train_steps 1", "--max_train_steps 1: "),
])
def test_another_run_is_refused_by_name_and_nothing_changes(started, capsys, name, flags, words):
    with pytest.raises(SystemExit) as stop:
        resumed(started, name, *(word.format(folder=started) for word in flags.split()))
    stderr = capsys.readouterr().err
    assert stop.value.code == 2 and one_line(stderr) and words in stderr, stderr
    read = lambda folder: {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*")
                           if path.is_file()}
    assert read(started / f"again-{name}") == read(started / f"started-{name}")


def test_what_may_change_is_told_and_folders_may_move(started, capsys):
    run(*command(started, "prfl", "whole"))
    out = resumed(started, "prfl", "--data", str(started / "moved/data"), "--model",
                  str(started / "moved/model"))
    assert same(weights(started, "prfl", out.name), weights(started, "prfl", "whole"))
    assert f"goes on from {out}/checkpoint-000002; --max_train_steps 5 (was 2)\n" in capsys.readouterr().out
    resumed(started, "prfl", "--learning_rate", "2e-4", "--keep", "3")
    said = "; --keep 3 (was 2); --learning_rate 0.0002 (was 0.0001); --max_train_steps 5 (was 2)\n"
    assert said in capsys.readouterr().out
    assert not same(weights(started, "prfl", out.name), weights(started, "prfl", "whole"))


def test_damaged_lines_and_args(started, capsys):
    out = resumed(started, "prfl")
    wanted = metrics(started, out.name)
    shutil.rmtree(out)
    shutil.copytree(started / "started-prfl", out)
    text = (out / "metrics.jsonl").read_text().splitlines(True)
    (out / "metrics.jsonl").write_text("".join([text[0], 'garbage}\n', '{"step": 1e999}\n', '[1]\n',
                                                '{"step": null}\n', *text[1:], '{"step": 3, "lo']))
    run(*command(started, "prfl", out.name, "--resume", "latest"))
    assert metrics(started, out.name) == wanted
    for content in ("{", "[]", '{"made_from": 3}'):
        (out / "checkpoint-000005/args.json").write_text(content)
        with pytest.raises(SystemExit):
            run(*command(started, "prfl", out.name, "--resume", "latest"))
        assert "checkpoint-000005/args.json is damaged" in capsys.readouterr().err
    (out / "checkpoint-000005/args.json").write_text((out / "args.json").read_text())
    state = torch.load(out / "checkpoint-000005/train_state.pt")
    for step in (-1, 1.5, "5", True):
        torch.save(state | {"step": step}, out / "checkpoint-000005/train_state.pt")
        with pytest.raises(SystemExit):
            run(*command(started, "prfl", out.name, "--resume", "latest"))
        assert "train_state.pt is truncated or damaged" in capsys.readouterr().err


@pytest.mark.parametrize("name", ("prfl", "reward"))
def test_a_second_run_in_a_folder_leaves_what_it_leaves_in_a_new_one(started, name):
    """Not a file of the first run is left beside the second one's; the first goes on as if there had been no
    second."""
    out, alone = started / f"twice-{name}", started / f"alone-{name}"
    steps = ["--max_train_steps", "2"]
    run(*command(started, name, out.name, *steps))
    run(*command(started, name, out.name, *steps, "--learning_rate", "3e-4"))
    run(*command(started, name, alone.name, *steps, "--learning_rate", "3e-4"))
    assert files(out).keys() == files(alone).keys()
    assert same(weights(started, name, out.name), weights(started, name, alone.name))
    aside, = out.glob("earlier-*")
    run(*command(started, name, out.name, "--resume", str(aside)))
    undisturbed = resumed(started, name).name
    assert same(weights(started, name, out.name), weights(started, name, undisturbed))
    assert metrics(started, out.name) == metrics(started, undisturbed)


@pytest.mark.parametrize("flags, words", [("--num_validation 2 --judge {folder}/generator/reward",
                           "is the reward model that the generator is trained against"),
                          ("--num_validation 2 --validation_prompts {folder}/nowhere.txt", "nowhere.txt"),
                          ("--data {folder}/cut", "shard-00000.safetensors: truncated or damaged"),
                          ("--resume nowhere", "there is no ")])
def test_what_is_refused_late_touches_nothing_of_the_earlier_run(started, capsys, flags, words):
    if not (started / "cut").exists():
        shutil.copytree(started / "data", started / "cut")
        (started / "cut/shard-00000.safetensors").write_bytes(
            (started / "cut/shard-00000.safetensors").read_bytes()[:-40])
    before = files(started / "started-prfl")
    _, argv = command(started, "prfl", "started-prfl")
    place = argv.index("--num_validation")
    with pytest.raises(SystemExit) as stop:
        given = [word.format(folder=started) for word in flags.split()]
        run("train_align", argv[:place] + argv[place + 2:] + given)
    assert stop.value.code == 2 and words in capsys.readouterr().err
    assert files(started / "started-prfl") == before and not list(
        (started / "started-prfl").glob("earlier-*"))


def test_a_trunk_that_was_frozen_stays_frozen(started, capsys):
    with pytest.raises(SystemExit):
        run(*command(started, "reward", "started-reward", "--resume", "latest", "--trunk_learning_rate", "0"))
    assert "that run has --trunk_learning_rate 0.001 (now 0.0): give it the same" in capsys.readouterr().err


def test_a_run_never_writes_over_what_is_not_its(started, capsys):
    """Clips, shards, other programs' runs, this one's model, and what train_reward.py made, for
    train_align.py."""
    def refused(out, words, *flags, name="sft"):
        read = lambda: {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
        before = read()
        with pytest.raises(SystemExit) as stop:
            run(*command(started, name, out, *flags))
        assert stop.value.code == 2 and one_line(
            stderr := capsys.readouterr().err) and words in stderr, stderr
        assert read() == before

    for name, content in (("metadata.jsonl", "{}"), ("metrics.jsonl", '{"mine": 1}\n'),
                          ("shards.json", "{}")):
        (started / f"users-{name}").mkdir()
        (started / f"users-{name}" / name).write_text(content)
        refused(started / f"users-{name}", "holds files that are not ours")
    for number, content in enumerate(('{"lr": 1}', "{}", "[]")):
        (started / f"args-{number}").mkdir()
        (started / f"args-{number}/args.json").write_text(content)
        refused(started / f"args-{number}", "args.json")
    refused(started / "started-reward", "holds a run of another script, as its args.json has --")
    refused(started / "started-prfl", "holds a run of another script, as its args.json has --", name="reward")
    own = shutil.copytree(started / "generator", started / "own")
    for flags in (own, own / "transformer"):
        refused(own, f"holds --model {flags}, which would be written over", "--model", str(flags))
    refused(own, f"holds --model {own}, which", "--model", str(own), name="reward")
    run(*command(started, "sft", "twice", "--max_train_steps", "1"))                    # its own: afresh
    run(*command(started, "sft", "twice", "--max_train_steps", "1"))


def test_the_second_writer_of_a_run_folder_is_refused(started, capsys):
    with lock.hold(started / "held"):
        with pytest.raises(SystemExit) as stop:
            run(*command(started, "sft", "held"))
    assert stop.value.code == 2 and one_line(
        stderr := capsys.readouterr().err) and "is writing there" in stderr
    assert [path.name for path in (started / "held").iterdir()] == [".lock"]


def test_a_disk_that_fails_is_one_line_and_the_last_checkpoint_whole(started):
    """No file may grow past 20 kB, as on a full disk: checkpoint 4 fails, checkpoint 2 and the log stay."""
    for name in ("prfl", "reward"):
        out = started / f"full-{name}"
        shutil.copytree(started / f"started-{name}", out)
        script, argv = command(started, name, out.name, "--resume", "latest")
        done = launch.python(f"{script}.py", *argv, file_limit=20_000)
        last = done.stderr.splitlines()[-1]
        assert done.returncode == 1 and last.startswith(
                                                        "error: [Errno 27] File too large: "
                                                        "checkpoint-000004"), done.stderr
        assert "Traceback" not in done.stderr and f"the last whole one is {out}/checkpoint-000002" in last
        assert not [*out.rglob("*.tmp*")] and runs.load_state(out / "checkpoint-000002")["step"] == 2
        run(script, argv)                                       # there is room again
        assert same(weights(started, name, out.name), weights(started, name, resumed(started, name).name))


def test_a_folder_that_vanishes_ends_the_run(started, capsys, monkeypatch):
    log = runs.MetricsLog.log

    def remove_first(self, step, **values):
        if step == 3:
            shutil.rmtree(started / "vanished")
        log(self, step, **values)

    monkeypatch.setattr(runs.MetricsLog, "log", remove_first)
    with pytest.raises(SystemExit) as stop:
        run(*command(started, "sft", "vanished"))
    assert stop.value.code == 1
    assert "was removed while step 3 was made" in capsys.readouterr().err.splitlines()[-1]
    assert not (started / "vanished").exists()                  # and is not made anew, without its first half
    with pytest.raises(SystemExit) as stop:
        # a file system that takes no folders
        run(*command(started, "sft", "x", "--output_dir", "/proc/none"))
    assert stop.value.code == 2 and "/proc/none" in capsys.readouterr().err


def test_fingerprints_know_content_not_paths(started):
    same_model = {fingerprint.of_weights(started / name)
                  for name in ("generator", "moved/model", "generator/transformer")}
    assert len(same_model) == 1 and fingerprint.of_weights(started / "retrained") not in same_model
    args = json.loads((started / "started-prfl/checkpoint-000002/args.json").read_text())
    assert args["made_from"].keys() == {"model", "reward", "data"}
    assert torch.load(started / "started-prfl/checkpoint-000002/train_state.pt",
                      weights_only=True)["step"] == 2


def test_videos_go_to_tensorboard_as_moving_gifs(tmp_path, monkeypatch):
    """With stand-ins for TensorBoard's three names: what is said of each video, and that its bytes are the
    clip's, moving."""
    told = []
    summary = lambda value: value[0]
    summary.Image, summary.Value = dict, dict
    monkeypatch.setitem(sys.modules, "tensorboard.compat.proto.summary_pb2", SimpleNamespace(Summary=summary))
    for k in range(2):
        write_video(tmp_path / f"samples/{k}.mp4",
                    torch.arange(5).mul(50).byte().view(5, 1, 1, 1).expand(5, 32, 48, 3), 8)
    log = runs.MetricsLog(tmp_path)
    log.board = SimpleNamespace(file_writer=SimpleNamespace(add_summary=lambda *said: told.append(said)))
    log.videos(7, tmp_path / "samples")
    assert [(said["tag"], step) for said, step in told] == [("samples/0", 7), ("samples/1", 7)]
    image = told[1][0]["image"]
    assert (image["width"], image["height"]) == (48, 32)
    with av.open(io.BytesIO(image["encoded_image_string"])) as film:
        levels = [frame.to_ndarray(format="gray").mean() for frame in film.decode(video=0)]
    assert np.allclose(levels[:5], [0, 50, 100, 150, 200], atol=4)
