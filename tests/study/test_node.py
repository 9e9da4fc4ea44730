"""study/gpu.py at a small size: every update runs, or says why not; the table and the JSON hold what was measured."""
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def run(*flags):
    return subprocess.run([sys.executable, "-m", "study.gpu", *map(str, flags)], cwd=ROOT, capture_output=True, text=True)


def test_small_benchmark_runs_on_a_cpu(tmp_path):
    done = run("--preset", "tiny-t2v", "--num_inference_steps", 6, "--rounds", 2, "--output_dir", tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "gpu.json").read_text())
    rows = {row["update"]: row for row in found["rows"]}
    assert list(rows) == ["sft", "prfl", "refl_first", "refl_all"] and found["matmul_tflops"] > 0
    for name in ("sft", "prfl"):
        assert len(rows[name]["seconds_all"]) == 2 and min(rows[name]["seconds_all"]) > 0
    assert rows["sft"]["forward_passes"] == 0 and rows["prfl"]["forward_passes"] == 2       # (6 - 1) / 2, whole steps
    assert rows["prfl"]["flops"] > rows["sft"]["flops"] + 2 * rows["sft"]["flops"] / 4.5
    for name in ("refl_first", "refl_all"):
        missing = [module for module in ("refl_baseline", "diffusers") if not importlib.util.find_spec(module)]
        assert ("note" in rows[name]) == bool(missing) and (not missing or missing[0] in rows[name]["note"])
    text = (tmp_path / "gpu.md").read_text()
    assert text.count("\n| ") == 5 and all(f"| {name} |" in text for name in rows) and found["command"] in text


def test_benchmark_refuses():
    for flags, word in ((("--preset", "wan2.1-t2v-1.3b", "--frames", 80), "--frames 80"),
                        (("--preset", "tiny-t2v", "--depth", 9), "--depth"), (("--updates", "ppo"), "ppo")):
        done = run(*flags)
        assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1 and word in done.stderr
