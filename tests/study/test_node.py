"""study/node.py at a small size: rows of processes of their own, in the table and the JSON."""
import dataclasses
import json
import time

import launch
import pytest
import torch
from safetensors.torch import load_file
from tiny import one_line

import common
from formats.weights import WEIGHTS
from model import PRESETS
from scale import plan
from study import node


def run(*flags):
    return launch.python("-m", "study.node", *flags)


def test_one_process_and_two(tmp_path):
    """Of four blocks of the generator, all of which are the reward model's too; and what takes the time."""
    done = run("--model", "tiny-t2v", "--updates", "prfl", "--layers", 4, "--layouts", "ddp:1", "fsdp:2",
               "--profile", "--matmul", 64, "--output_dir", tmp_path, "--weights_dir", tmp_path / "weights")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "node.json").read_text())
    assert [(row["parallel"], row["processes"]) for row in found["rows"]] == [("ddp", 1), ("fsdp", 2)]
    for row in found["rows"]:
        assert row["seconds"] > 0 and row["peak_gb"] > 0
        assert row["forward_passes"] == 3                           # steps 1 .. 3 of 8
    text = (tmp_path / "node.md").read_text()
    assert text.count("| prfl |") == 2 and "rollout passes | resident GB |" in text and "MFU" not in text
    row = found["rows"][0]
    assert f"| {row['planned_gb'] / row['peak_gb'] - 1:+.1%} | 3 | {row['resident_gb']:.2f} |" in text
    assert ", 4 blocks, " in text and "K = 4, " in text
    times = [time for _, time, _ in row["kernels"]]
    assert times == sorted(times, reverse=True) and len(times) == 12 and times[-1] > 0
    assert any(name == "aten::mm" for name, _, _ in row["kernels"]) and "| `aten::mm` |" in text
    assert row["attention"] == [] and "attention by no fused kernel" in text        # too few keys on a CPU
    weights = tmp_path / "weights/tiny-t2v-4-blocks/transformer" / WEIGHTS
    assert {x.dtype for x in load_file(weights).values()} == {torch.bfloat16}


def test_large_matrices_repeat_their_numbers_and_rows_differ(tmp_path, monkeypatch):
    monkeypatch.setattr(node, "DRAWN", 101)
    generator, _ = node.random_weights(tmp_path, PRESETS["tiny-t2v"] | {"num_layers": 1}, 1, 0)
    x = load_file(generator / WEIGHTS)["blocks.0.ffn.0.weight"].float()                     # [768, 192]
    assert torch.equal(x.flatten()[:101], x.flatten()[101:202]) and len(x.unique(dim=0)) >= 101
    assert x.std().item() == pytest.approx(192 ** -0.5, rel=0.2)


def test_the_first_hour_writes_each_answer_at_once(tmp_path, monkeypatch, capsys):
    """Rehearsed with a part of each kind: tests, an update, the VAE, one that takes too long, and one that
    finds no time left."""
    pages = []

    def measured(config, kind, processes, shared, patience):
        pages.append((tmp_path / "gpu.md").read_text())
        now[0] += 100
        if config.update == "vae":
            return node.measure_vae(config, common.Runtime(0, 1, torch.device("cpu"), torch.float32))
        return measured_apart(config, kind, processes, shared, patience)

    now, measured_apart = [0.0], node.measured_apart
    monkeypatch.setattr(node.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(node, "measured_apart", measured)
    few = dict(model="wan2.1-t2v-14b", size=("832*480",), layers=4)
    monkeypatch.setattr(node, "FIRST", (
        ("Is it right?", 100, None), ("Quick?", 100, few | {"updates": ("sft",)}),
        ("Slow?", 0.01, few | {"updates": ("prfl",)}), ("Pixels?", 100, few | {"updates": ("vae", "sft")})))
    monkeypatch.setattr(node, "run_tests", lambda patience: [f"tests, {patience:.0f} s"])
    common.cli(node.main, node.Config, "", [str(flag) for flag in (
        "--first_hour", "--minutes", 5, "--model", "tiny-t2v", "--size", "16*16", "--frames", 5, "--layers",
        2, "--matmul", 64, "--output_dir", tmp_path, "--weights_dir", tmp_path / "weights")])
    text = (tmp_path / "gpu.md").read_text()
    assert ["Quick?" in page for page in pages] == [False, True, True] and "tests, 100 s" in pages[0]
    assert "not done after 0 s" in text and "no time was left" in text
    assert "encode " in text and " TFLOP/s), peak " in text
    found = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    assert [len(part["rows"]) for part in found] == [0, 1, 1, 2] and found[1]["rows"][0]["seconds"] > 0


def test_what_fails_in_the_first_hour_loses_nothing_else(tmp_path, monkeypatch, capsys):
    """A full disk, a row that fails after it was measured, memory that runs out; and only the parts asked
    for."""
    row = json.dumps({"update": "prfl", "size": "16*16", "parallel": "ddp", "processes": 1,
                      "sequence_parallel": 1, "seconds": 1.0, "peak_gb": 2.0, "planned_gb": 2.0,
                      "forward_passes": 3, "resident_gb": 4.0})
    ends = {"sft": (1, "", "Traceback\nerror: CUDA out of memory. Tried to allocate\n"), "vae": (3, "", ""),
            "prfl": (None, f'{row}\n{{"update": "prf', ""), "prfl_steady": (1, f"{row}\n", "Kineto failed\n"),
            "refl_first": (-9, "", "said")}

    def weights(folder, *more):
        if "14b" in str(folder):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(node, "random_weights", weights)
    monkeypatch.setattr(node, "run_apart", lambda command, patience, environment=None: (
        (1, "", "No module named pytest\n") if "pytest" in command else
        ends[command[command.index("--update") + 1]]))
    monkeypatch.setattr(node, "FIRST", (
        ("Right?", 9, None), ("Left out?", 9, None),
        ("Disk?", 9, dict(model="wan2.1-t2v-14b", updates=("sft",))),
        ("All?", 9, dict(model="tiny-t2v", updates=tuple(ends)))))
    common.cli(node.main, node.Config, "", [str(flag) for flag in (
        "--first_hour", "--size", "16*16", "--frames", 5, "--parts", 1, 3, 4, "--output_dir", tmp_path)])
    text, printed = (tmp_path / "gpu.md").read_text(), capsys.readouterr().out
    for said in ("## 1. Right?\n\n```\nNo module named pytest\n```", "| OSError: [Errno 28] No space left on",
                 "| sft | 16*16 | 1 ddp | out of memory |", "| vae | 16*16 | 1 ddp | exit code 3 |",
                 "| prfl | 16*16 | 1 ddp | 1.000 | 2.00 | 2.00 | +0.0% | 3 | 4.00 |",
                 "prfl, 16*16, after that: not done after 9 s", "after that: Kineto failed",
                 "| refl_first | 16*16 | 1 ddp | out of memory |"):
        assert said in text and said in printed, said
    assert "Left out?" not in text
    found = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    assert [len(part["rows"]) for part in found] == [0, 1, 5]


def test_what_takes_too_long_is_ended_with_all_that_it_started(tmp_path):
    """And what it had printed stays, although what it started still holds the file."""
    script = f"(sleep 2; touch {tmp_path}/late) & echo started; echo oh >&2; sleep 60"
    start = time.monotonic()
    assert node.run_apart(["sh", "-c", script], 0.5) == (None, "started\n", "oh\n")
    assert time.monotonic() - start < 10
    assert node.run_apart(["sh", "-c", "echo yes; exit 3"]) == (3, "yes\n", "")
    time.sleep(2)
    assert not (tmp_path / "late").exists()


def test_what_is_asked_first_fits_a_gpu():
    """Every part of the first hour has flags that go together and fits 80 GB, as far as the planner knows."""
    assert sum(patience for _, patience, _ in node.FIRST[:5]) <= 13 * 60
    for asked, _, flags in node.FIRST:
        config, c = node.settled(dataclasses.replace(node.Config(), **flags or {}), node.ON_GPUS)
        for update in config.updates if flags else ():
            method, _, variant = update.partition("_")
            if method == "vae" or update == "refl_all":         # which is there to be out of memory
                continue
            one = plan.Config(config.model, method, config.frames, config.size[0], parallel="ddp",
                              depth=config.depth, offload_activations=config.offload_activations,
                              keep_attention=config.keep_attention)
            assert plan.costs(one, c)["with"]["peak"] < 80e9, (asked, update)


def test_speeds_of_a_gpu():
    row = {"update": "prfl", "size": "832*480", "parallel": "fsdp", "processes": 8, "sequence_parallel": 4,
           "seconds": 2.0, "peak_gb": 50.0, "planned_gb": 55.0, "forward_passes": 3, "tokens": 1000,
           "flops": 4e14, "matmul_tflops": 500.0}
    config = node.Config(frames=81, lora_rank=0, num_inference_steps=40, rounds=4)
    machine = {"device": "8 X", "torch": "2", "command": "c"}
    lines = node.table(config, [row, row | {"note": "out of memory"}], machine, 8).splitlines()
    assert lines[-4] == ("| prfl | 832*480 | 8 fsdp, 4 per clip | 2.000 | 50.00 | 55.00 | +10.0% | 3 | 500 "
                         "| 200 | 500 | 40.0% |")
    assert len({line.count("|") for line in lines if line.startswith("|")}) == 1
    assert "every weight trains" in lines[2]


@pytest.mark.parametrize("flags, words", [(("--frames", 80), "--frames 80"),
                          (("--layers", 31), "wan2.1-t2v-1.3b has 30"),
                          (("--minutes", 3), "--minutes means nothing"),
                          (("--first_hour", "--parts", 99), "--parts 99: --first_hour has parts 1 to 9"),
                          (("--first_hour", "--layers", 31), "wan2.1-t2v-1.3b has 30"),
                          (("--model", "tiny-t2v", "--depth", 9), "--depth"), (("--updates", "ppo"), "ppo"),
                          (("--layouts", "fsdp"), "--layouts fsdp: wants"),
                          (("--parallel", "fsdp"), "--parallel means nothing without --update")])
def test_bad_input_is_one_line(capsys, flags, words):
    with pytest.raises(SystemExit) as end:
        common.cli(node.main, node.Config, "", [str(flag) for flag in flags])
    stderr = capsys.readouterr().err
    assert end.value.code == 2 and one_line(stderr) and words in stderr, stderr
