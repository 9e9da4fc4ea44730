"""study/node.py at a small size: rows of processes of their own, in the table and the JSON."""
import json
import subprocess
import sys

import pytest
from tiny import ENV, ROOT


def run(*flags):
    return subprocess.run([sys.executable, "-m", "study.node", *map(str, flags)], cwd=ROOT, capture_output=True, text=True, env=ENV)


def test_one_process_and_two(tmp_path):
    done = run("--model", "tiny-t2v", "--updates", "prfl", "--depth", 4, "--layouts", "ddp:1", "fsdp:2", "--matmul", 64,
               "--output_dir", tmp_path, "--weights_dir", tmp_path / "weights")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "node.json").read_text())
    assert [(row["parallel"], row["processes"]) for row in found["rows"]] == [("ddp", 1), ("fsdp", 2)]
    for row in found["rows"]:
        assert row["seconds"] > 0 and row["peak_gb"] > 0 and row["forward_passes"] == 3, row       # steps 1 .. 3 of 8
    assert (tmp_path / "node.md").read_text().count("| prfl |") == 2


@pytest.mark.parametrize("flags, words", [(("--frames", 80), "--frames 80"), (("--model", "tiny-t2v", "--depth", 9), "--depth"),
                                          (("--updates", "ppo"), "ppo"), (("--layouts", "fsdp"), "--layouts fsdp: wants"),
                                          (("--parallel", "fsdp"), "--parallel means nothing without --update")])
def test_bad_input_is_one_line(flags, words):
    done = run(*flags)
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1 and words in done.stderr, done.stderr
