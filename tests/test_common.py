"""common.py against what it promises: draws, checkpoints, resume, and one-line errors."""
import contextlib
import dataclasses
import io
import json
import math
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import launch
import pytest
import torch
from launch import ROOT

import common
from common import InputError, arg
from formats import runs


@dataclasses.dataclass
class Config:
    output_dir: str = arg("run", "run folder")
    learning_rate: float = arg(1e-4, "100 % of it", above=0)
    max_train_steps: int = arg(10, "steps", at_least=1)
    ema: float = arg(0.9, "decay", at_least=0, at_most=1)
    dropout: float = arg(0.0, "share", at_least=0, below=1)
    resume_from_checkpoint: str | None = arg(None, "where from", alias="resume")
    seeds: tuple[int, ...] = arg((0, 1), "seeds", at_least=0)
    method: str = arg("prfl", "which", choices=("prfl", "sft"))
    gradient_checkpointing: bool = arg(False, "less memory")


def parse(*argv):
    return common.parse(Config, "doc", list(argv))


# ---- command line
def test_parse_types_aliases_and_defaults():
    assert parse() == Config()
    got = parse("--learning_rate", "3e-4", "--resume", "a", "--seeds", "4", "5", "--gradient_checkpointing")
    assert (got.learning_rate, got.resume_from_checkpoint) == (3e-4, "a")
    assert (got.seeds, got.gradient_checkpointing) == ((4, 5), True)
    assert parse("--resume_from_checkpoint", "x").resume_from_checkpoint == "x"
    assert parse("--no-gradient_checkpointing").gradient_checkpointing is False


@pytest.mark.parametrize("cpu, gpu, wanted", [({"avx512_bf16": True}, None, "bf16"),
                          ({"avx512_f": True, "avx512_bf16": False}, None, "no"), ({}, None, "no"),
                          ({}, True, "bf16"), ({"avx512_bf16": True}, False, "no")])
def test_bf16_where_it_is_not_emulated(monkeypatch, cpu, gpu, wanted):
    """gpu: whether it has bf16; None: there is none."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: cpu)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu is not None)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: gpu)
    assert runs.fast_precision() == runs.precision_flag().default == wanted


@pytest.mark.parametrize("argv, wanted", [
    (["--learning_rate", "nan"], "--learning_rate must be a finite number above 0, got nan"),
    (["--learning_rate", "inf"], "--learning_rate must be a finite number, got inf"),
    (["--learning_rate", "-1"], "--learning_rate must be a finite number above 0, got -1.0"),
    (["--max_train_steps", "0"], "--max_train_steps must be a finite number at least 1, got 0"),
    (["--max_train_steps", "2.5"], "--max_train_steps: invalid int value: '2.5'"),
    (["--max_train_steps", str(2 ** 63)],
     f"--max_train_steps must be a finite number below 2 ** 63, got {2 ** 63}"),
    (["--dropout", "1"], "--dropout must be a finite number below 1, got 1.0"),
    (["--ema", "1.5"], "--ema must be a finite number at most 1, got 1.5"),
    (["--seeds", "1", "-2"], "--seeds must be a finite number at least 0, got -2"),
    (["--learnin_rate", "1"], "unknown flag: --learnin_rate"),
    (["--learning", "1"], "unknown flag: --learning"),  # no abbreviations
    (["--parallel", "fsdp", "--seed=1", "a"], "unknown flag: --parallel, --seed=1"),
    (["--method", "sft", "prfl"], "prfl: one value too many: --method takes one"),
    (["prfl", "--method", "sft"], "prfl: one value too many: leave it out"),
    (["--max_train_steps"], "--max_train_steps: expected one argument"),
])
def test_parse_errors_name_the_flag(argv, wanted):
    with pytest.raises(InputError) as error:
        parse(*argv)
    assert str(error.value) == wanted


def test_parse_choice_error():
    with pytest.raises(InputError, match="--method: invalid choice: 'pfl' .*prfl.*sft"):
        parse("--method", "pfl")


SCRIPT = '''
import sys
sys.path.insert(0, {root!r})
import dataclasses, common
from common import arg

@dataclasses.dataclass
class Config:
    learning_rate: float = arg(1e-4, "lr", above=0)
    raises: str = arg("none", "what main raises")

def main(config):
    if config.raises == "input": raise common.InputError("data/x.mp4: no good,\\nsee there")
    if config.raises == "number": raise FloatingPointError("step 17: loss is nan")
    if config.raises == "access": raise PermissionError(13, "Permission denied", "/there")
    if config.raises == "interrupt": raise KeyboardInterrupt
    if config.raises == "bug": raise KeyError("a bug")
    print("ran", config.learning_rate)

if __name__ == "__main__":
    common.cli(main, Config, "doc")
'''


def test_cli_exit_codes_and_one_line(tmp_path):
    """One process does them all: importing torch costs more than the test."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(root=str(ROOT)))
    cases = [(["--raises", "none"], 0, ""),
             (["--raises", "input"], 2, "error: data/x.mp4: no good, see there\n"),
             (["--raises", "number"], 1, "error: step 17: loss is nan\n"),
             (["--raises", "interrupt"], 130, "error: interrupted\n"),
             (["--raises", "access"], 2, "error: [Errno 13] Permission denied: '/there'\n"),
             (["--bogus"], 2, "error: unknown flag: --bogus\n"),
             (["--learning_rate", "nan"], 2,
              "error: --learning_rate must be a finite number above 0, got nan\n")]
    driver = tmp_path / "driver.py"
    driver.write_text(textwrap.dedent(f"""
        import contextlib, io, json, sys
        sys.path.insert(0, {str(tmp_path)!r})
        import script, common
        for argv in {[c[0] for c in cases]!r}:
            err, code = io.StringIO(), 0
            with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
                try:
                    common.cli(script.main, script.Config, "doc", argv)
                except SystemExit as e:
                    code = e.code
            print(json.dumps([code, err.getvalue()]))
    """))
    done = launch.python(driver)
    assert list(map(json.loads, done.stdout.splitlines())) == [[code, text] for _, code, text in cases]
    # The real thing, once: exit status and streams of a process; and a bug keeps its traceback.
    done = subprocess.run([sys.executable, script, "--learning_rate", "nan"], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", cases[-1][2])
    done = launch.python(script, "--raises", "bug")
    assert done.returncode == 1 and "Traceback" in done.stderr


def test_help_says_rules_in_words_and_one_default():
    @dataclasses.dataclass
    class Rules:
        kind: str = arg("a", "KIND", choices=("a", "b", "c"), positional=True)
        data: str | None = arg(None, "DATA; default: none")
        names: tuple[str, ...] = arg((), "NAMES")
        keep: bool = arg(True, "KEEP")
        rank: int = arg(0, "RANK")
        one: int = arg(1, "ONE", only="kind a b")
        two: int = arg(2, "TWO", only="!data")
        three: int | None = arg(None, "THREE", only="data, !rank 0")
        four: float = arg(4.5, "FOUR 5 %", only="kind c, keep or data or !kind a")
        five: int | None = arg(None, "FIVE", only="rank 3 or kind a b c, data")

    text = io.StringIO()
    with contextlib.redirect_stdout(text), pytest.raises(SystemExit):
        common.parse(Rules, "doc", ["--help"])
    words = " ".join(text.getvalue().split())
    for line in ("DATA; default: none --", "NAMES --", "KEEP (default: True) --", "RANK (default: 0) --",
                 "ONE (only if kind is a or b; default: 1) --", "TWO (only without --data; default: 2) --",
                 "THREE (only with --data and if --rank is not 0) --", "FOUR 5 % (only if kind is c and with "
                 "--keep, or with --data, or if kind is not a; default: 4.5)",
                 "FIVE (only if --rank is 3, or if kind is a, b or c and with --data)"):
        assert line in words, (line, words)
    assert "None" not in words and "()" not in words


def test_settings_know_where_they_come_from(capsys):
    config = parse("--learning_rate", "3e-4")
    config.resume_from_checkpoint = None
    settled, origin = common.settle(config, {
                                        "the recipe": {"resume_from_checkpoint": None, "learning_rate": 9.0},
                                        "the model": {"resume_from_checkpoint": "x", "not_a_flag": 1,
                                                      "ema": 0.1}})
    assert settled == dataclasses.replace(config,
        resume_from_checkpoint="x") and config.resume_from_checkpoint is None
    assert origin == {"learning_rate": "given", "resume_from_checkpoint": "the model"}
    common.print_settings(settled, origin)
    assert capsys.readouterr().out == ("settings, given: --learning_rate 0.0003\n"
                                       "settings, the model: --resume_from_checkpoint x\n")
    common.print_settings(*common.settle(parse(), {}))
    assert capsys.readouterr().out == ""


# ---- random draws
def test_draws_depend_on_seed_purpose_step_and_index_only():
    alone = common.noise((3, 4), 0, "x1", 5, [7])
    among = common.noise((3, 4), 0, "x1", 5, torch.tensor([2, 7, 3]))
    assert torch.equal(alone[0], among[1])
    assert torch.equal(common.uniform(0, "t", 5, [7]), common.uniform(0, "t", 5, [1, 7])[1:])
    others = [common.noise((3, 4), 1, "x1", 5, [7]), common.noise((3, 4), 0, "x2", 5, [7]),
              common.noise((3, 4), 0, "x1", 6, [7]), common.noise((3, 4), 0, "x1", 5, [8])]
    assert not any(torch.equal(alone, other) for other in others)


def test_draws_have_the_right_distribution():
    x = common.noise((16,), 0, "x", 0, range(1000)).flatten()
    u = common.uniform(0, "u", 0, range(4000))
    assert abs(x.mean()) < 4 / math.sqrt(16000) and abs(x.var() - 1) < 4 * math.sqrt(2 / 16000)
    assert 0 <= u.min() and u.max() < 1
    bins = torch.histc(u, 10, 0, 1)
    assert (bins - 400).abs().max() < 5 * math.sqrt(400 * 0.9)


def test_two_ranks_cover_the_global_batch_of_one():
    one = common.Runtime(0, 1, torch.device("cpu"), torch.float32)
    two = [common.Runtime(r, 2, torch.device("cpu"), torch.float32) for r in range(2)]
    assert one.indices(8) == two[0].indices(4) + two[1].indices(4)
    assert sorted(i for r in two for m in range(3) for i in r.indices(4, m)) == list(range(24))


def test_two_processes_average_gradients_as_one_with_both_halves(tmp_path):
    """Two ranks of batch 4 give the gradient norms and weights of one process of batch 8."""
    worker = tmp_path / "worker.py"
    worker.write_text(textwrap.dedent(f"""
        import sys; sys.path.insert(0, {str(ROOT)!r})
        import torch, common
        runtime = common.setup("no", 3)
        model = torch.nn.Linear(6, 2)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        norms = []
        for step in range(3):
            x = common.noise((6,), 0, "x", step, runtime.indices(8 // runtime.world_size))
            loss = model(x).square().mean()
            loss.backward()
            norms.append(common.average_and_clip_gradients(model.parameters(), 0.5, step))
            optimizer.step(); optimizer.zero_grad()
        value = torch.tensor(float(runtime.rank)); common.all_reduce_mean_([value])
        common.BUCKET_BYTES = 64        # three together, one alone, one alone that is not contiguous, float64
        mixed = [torch.full((2,), 1.0), torch.arange(6.).view(2, 3).T, torch.ones(1), torch.arange(20.),
                 torch.arange(20.).view(4, 5).T, torch.ones(3, dtype=torch.float64)]
        mixed = [x.mul_(runtime.rank + 1) for x in mixed]
        common.all_reduce_mean_(mixed)
        if runtime.rank == 0:
            torch.save([[p.detach() for p in model.parameters()], norms, value, mixed], sys.argv[1])
        common.teardown()
    """))
    for ranks in (1, 2):
        launch.torchrun(ranks, worker, tmp_path / f"{ranks}.pt")
    one, two = torch.load(tmp_path / "1.pt"), torch.load(tmp_path / "2.pt")
    torch.testing.assert_close(one[:2], two[:2])
    assert all(torch.equal(1.5 * x, y) for x, y in zip(one[3], two[3], strict=True))
    assert one[2] == 0 and two[2] == 0.5


# ---- gradients
def test_buckets_hold_neighbours_of_a_dtype_up_to_their_size():
    sizes = [3, 4, 3, 30, 1, 2, 2]
    tensors = [torch.zeros(n, dtype=torch.float64 if i == 5 else torch.float32) for i, n in enumerate(sizes)]
    found = common.buckets(tensors, 28)
    assert [[x.numel() for x in bucket] for bucket in found] == [[3, 4], [3], [30], [1], [2], [2]]
    assert common.buckets([], 28) == []


def test_average_and_clip_gradients_returns_the_norm_before_and_scales_to_the_limit():
    p = torch.nn.Parameter(torch.zeros(2))
    p.grad = torch.tensor([3.0, 4.0])
    assert common.average_and_clip_gradients([p], 1.0) == 5.0
    torch.testing.assert_close(p.grad, torch.tensor([0.6, 0.8]))
    assert abs(common.average_and_clip_gradients([p], None) - 1) < 1e-5
    p.grad[0] = float("nan")
    with pytest.raises(FloatingPointError, match="step 17: .*norm is nan"):
        common.average_and_clip_gradients([p], 1.0, 17)


# ---- checkpoints
def write_weights(value):
    return lambda path: (Path(path) / "w.safetensors").write_bytes(value)


def save(folder, step, content=b"weights", **more):
    config = Config(output_dir=str(folder))
    if not (Path(folder) / "args.json").exists():
        runs.start_run(config)
    return runs.save_checkpoint(folder, step, {"transformer": write_weights(content)}, {"position": step},
                                config, **more)


def test_checkpoint_layout_and_resolution(tmp_path):
    save(tmp_path, 9), save(tmp_path, 200)
    path = tmp_path / "checkpoint-000200"
    assert sorted(str(p.relative_to(path)) for p in path.rglob("*") if p.is_file()) == [
        "args.json", "train_state.pt", "transformer/w.safetensors"]
    saved = json.loads((path / "args.json").read_text())
    assert saved.pop("made_from") == {} and Config(**saved
                                                   | {"seeds": (0, 1)}) == Config(output_dir=str(tmp_path))
    for spec in ("latest", str(path), "checkpoint-000200", str(tmp_path)):
        assert runs.resolve_checkpoint(tmp_path, spec) == path
    assert runs.load_state(path) == {"step": 200, "position": 200}
    save(tmp_path, 300, keep=2)
    assert [step for step, _ in runs.list_checkpoints(tmp_path)] == [200, 300]


def test_resolve_says_what_is_wrong(tmp_path, monkeypatch):
    # nothing is there yet: a fresh start
    assert runs.resolve_checkpoint(tmp_path / "empty", "latest") is None
    with pytest.raises(InputError, match="there is no .*empty/checkpoint-<step>/train_state.pt"):
        runs.resolve_checkpoint(tmp_path, str(tmp_path / "empty"))
    with pytest.raises(InputError, match="--resume_from_checkpoint nowhere"):
        runs.resolve_checkpoint(tmp_path, "nowhere")
    path = save(tmp_path, 1)
    state = (path / "train_state.pt").read_bytes()
    for broken in (state[:len(state) // 2], b"", b"not a checkpoint"):
        (path / "train_state.pt").write_bytes(broken)
        with pytest.raises(InputError, match="train_state.pt is truncated or damaged") as error:
            runs.load_state(path)
        assert "\n" not in str(error.value)
    monkeypatch.chdir(tmp_path.parent)
    run = tmp_path.name
    for spec in ("checkpoint-000002", f"{run}/checkpoint-000002"):
        with pytest.raises(InputError) as error:
            runs.resolve_checkpoint(run, spec)
        assert str(error.value) == (f"--resume_from_checkpoint {spec}: there is no {run}/checkpoint-000002/"
                                    f"train_state.pt; the last one there is {run}/checkpoint-000001")
    (path / "train_state.pt").unlink()
    with pytest.raises(InputError, match="there is no .*checkpoint-000001/train_state.pt$"):
        runs.resolve_checkpoint(tmp_path, "latest")


@pytest.mark.parametrize("name, at",
                         [("rename", 0), ("replace", 0), ("replace", 1), ("fsync", 0), ("fsync", 2)])
def test_a_kill_while_saving_leaves_the_previous_checkpoint(tmp_path, monkeypatch, name, at):
    """On a step that exists already. rename 0: before the old folder gets out of the way; replace 1: just
    after it has."""
    for step in (1, 2):
        save(tmp_path, step, b"old")
    calls, real = [], getattr(os, name)

    def die(*args):
        calls.append(args)
        if len(calls) == at + 1:
            raise KeyboardInterrupt  # what a kill leaves behind, as no handler of ours runs
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(os, name, die)
        with pytest.raises(KeyboardInterrupt):
            save(tmp_path, 2, b"new")
    latest = runs.resolve_checkpoint(tmp_path, "latest")
    assert (latest / "transformer/w.safetensors").read_bytes() == b"old"
    assert runs.load_state(latest)["step"] == 2
    final = save(tmp_path, 3, b"next")
    assert runs.resolve_checkpoint(tmp_path, "latest") == final and not list(tmp_path.glob("*.tmp"))
    save(tmp_path, 2, b"new")
    assert sorted(p.name for p in tmp_path.iterdir()
                  if "point" in p.name) == [f"checkpoint-00000{n}" for n in (1, 2, 3)]


def test_kill_9_at_a_random_moment(tmp_path):
    """A process that saves without pause is killed; whatever `latest` then names is whole."""
    script = tmp_path / "saver.py"
    script.write_text(textwrap.dedent(f"""
        import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]
        import test_common, torch
        for step in range(1, 10 ** 6):
            test_common.save(sys.argv[1], step % 7 + 1, bytes([step % 7 + 1]) * 20000)
    """))
    for pause in (0.05, 0.13):
        folder = tmp_path / f"run-{pause}"               # of its own: the second kill, too, interrupts saving
        with launch.Launch(script, folder) as process:
            deadline = time.time() + 120                 # a busy machine is slow
            while len(runs.list_checkpoints(folder)) < 2 and time.time() < deadline:
                assert process.running, "the saver ended by itself"
                time.sleep(0.01)
            time.sleep(pause)
            process.signal(signal.SIGKILL)
        latest = runs.resolve_checkpoint(folder, "latest")
        step = runs.load_state(latest)["step"]
        assert (latest / "transformer/w.safetensors").read_bytes() == bytes([step]) * 20000


def test_resumed_adamw_equals_an_uninterrupted_one_bit_for_bit(tmp_path):
    def run(first, last, state=None):
        torch.manual_seed(0)
        model = torch.nn.Linear(5, 3)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        if state:
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
        for step in range(first, last):
            model(common.noise((5,), 0, "x", step, range(4))).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        return {"model": model.state_dict(), "optimizer": optimizer.state_dict()}

    whole = run(0, 6)
    runs.start_run(Config(output_dir=str(tmp_path)))
    path = runs.save_checkpoint(tmp_path, 3, {}, run(0, 3), Config())
    resumed = run(3, 6, runs.load_state(path))
    assert all(torch.equal(whole["model"][k], resumed["model"][k]) for k in whole["model"])
    for i, slot in whole["optimizer"]["state"].items():
        assert all(torch.equal(v, resumed["optimizer"]["state"][i][k]) for k, v in slot.items())


# ---- metrics
def test_metrics_are_flushed_and_cut_back_on_resume(tmp_path):
    log = runs.MetricsLog(tmp_path)
    for step in range(1, 5):
        log.log(step, loss=torch.tensor(0.5), note="a")
    lines = lambda: list(map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines()))
    read = lambda: [line["step"] for line in lines()]
    assert read() == [1, 2, 3, 4] and lines()[0] == {"step": 1, "loss": 0.5, "note": "a"}
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')  # a kill in the middle of a line
    runs.MetricsLog(tmp_path, resume_step=2).log(3, loss=1.0)
    assert read() == [1, 2, 3]
    with pytest.raises(FloatingPointError, match="step 4: loss is nan"):
        runs.MetricsLog(tmp_path, resume_step=3).log(4, loss=torch.tensor(float("nan")))
    assert read() == [1, 2, 3]
    runs.MetricsLog(tmp_path)
    assert read() == []


def test_progress_counts_iterables_and_numbers(capsys):
    assert list(common.progress([1, 2], "work")) == [1, 2]
    bar = common.progress(10, "work", initial=4)
    bar.update(6)
    bar.close()
    assert bar.n == bar.total == 10 and "10/10" in capsys.readouterr().err
