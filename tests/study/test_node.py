"""study/node.py at a small size: rows of processes of their own, in the table and the JSON."""
import json
import subprocess
import sys

import pytest
from tiny import ENV, ROOT, one_line

import common
from study import node


def run(*flags):
    return subprocess.run([sys.executable, "-m", "study.node", *map(str, flags)], cwd=ROOT, env=ENV,
                          capture_output=True, text=True)


def test_one_process_and_two(tmp_path):
    done = run("--model", "tiny-t2v", "--updates", "prfl", "--depth", 4, "--layouts", "ddp:1", "fsdp:2",
               "--matmul", 64, "--output_dir", tmp_path, "--weights_dir", tmp_path / "weights")
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
                          (("--model", "tiny-t2v", "--depth", 9), "--depth"), (("--updates", "ppo"), "ppo"),
                          (("--layouts", "fsdp"), "--layouts fsdp: wants"),
                          (("--parallel", "fsdp"), "--parallel means nothing without --update")])
def test_bad_input_is_one_line(capsys, flags, words):
    with pytest.raises(SystemExit) as end:
        common.cli(node.main, node.Config, "", [str(flag) for flag in flags])
    stderr = capsys.readouterr().err
    assert end.value.code == 2 and one_line(stderr) and words in stderr, stderr
