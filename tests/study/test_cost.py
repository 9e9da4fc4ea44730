"""study/cost.py: what it times is what training draws, its memory is that of the update; table 4 says what it
measured."""
import json

import launch
import numpy as np
import pytest

import prfl
from study import cost, parts, reproduce, table4

# Each cell is measured in a process of its own.
CELLS = """
import json, os, sys, common
from study import cost
for argv in json.loads(sys.argv[1]):
    child = os.fork()
    if not child:
        common.cli(cost.main, cost.Config, "", argv)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
"""


def run(folder, cells):
    """-> what was measured of each of cells {name: flags}"""
    commands = [[*map(str, flags), "--output_dir", str(folder / name)] for name, flags in cells.items()]
    done = launch.python("-c", CELLS, json.dumps(commands))
    assert done.returncode == 0, done.stderr
    return {name: json.loads((folder / name / "measured.json").read_text()) for name in cells}


@pytest.mark.parametrize("method", cost.PART)
@pytest.mark.parametrize("N", [16, 40])
def test_the_timed_step_is_the_mean_of_those_that_training_draws(method, N):
    drawn = {prfl.draw_step(0, i, N, cost.PART[method]) for i in range(2000)}
    assert np.mean([cost.mean_step(method, i, N) for i in range(2)]) == np.mean(list(drawn))


def test_memory_of_a_cell_is_that_of_its_update(tmp_path):
    size = "--frames", 33, "--size", "64*64", "--batch_size", 2, "--rounds", 1, "--num_inference_steps", 8
    all_frames = "--method", "refl_all"
    cells = {"kept": (), "again": ("--gradient_checkpointing",), "whole": all_frames,
             "chunks": (*all_frames, "--decoder_checkpointing")}
    found = run(tmp_path, {name: ("cell", *size, *flags) for name, flags in cells.items()})
    measured = {name: one["bytes"] for name, one in found.items()}
    assert measured["again"] < 0.9 * measured["kept"], measured
    assert measured["chunks"] < 0.9 * measured["whole"], measured


def test_times_of_every_method(tmp_path):
    found = run(tmp_path,
                {"times": ("times", "--rounds", 2, "--batch_size", 1, "--num_inference_steps", 3)})["times"]
    assert list(found) == list(cost.METHODS) and all(len(times) == 2 and min(times) > 0
                                                     for times in found.values())


def test_table4_has_a_verdict_on_the_papers_factor_and_not_only_on_its_sign(tmp_path, monkeypatch):
    def measured(work, name, command, *flags):
        if command == "times":                  # RGB ReFL: 1.2 times PRFL's seconds at N = 16, 1.6 at N = 40
            ratio = 1.2 if flags[flags.index("--num_inference_steps") + 1] == 16 else 1.6
            return {"sft": [0.1] * 4, "prfl": [1.0, 1.1, 1.0, 1.1], "prfl_steady": [0.4, 0.44] * 2,
                    "refl_first": [ratio, 1.1 * ratio] * 2, "refl_all": [2.0] * 4}
        return {"bytes": 1e6 * (2 + ("refl_all" in flags)), "seconds": [1, 2], "flags": list(map(str, flags))}

    monkeypatch.setattr(table4, "measured", measured)
    monkeypatch.setattr(table4, "wan_peak", lambda preset, frames, method, decoded="first": 1e9 * frames)
    config = reproduce.Config("table4", "quick", output_dir=str(tmp_path), results_dir=str(tmp_path))
    table4.table4(parts.Work(config))
    text = (tmp_path / "table4.md").read_text()
    assert "| N = 16, K = 8 | holds | holds | does not hold |" in text
    assert "| N = 40, K = 8 | holds | holds | holds |" in text
    assert "1.20 [1.20, 1.20]" in text and "| wan2.1-t2v-14b | 77 | 77 | 77 |" in text
    assert "| N = 16, K = 8 | 0.40 [0.40, 0.40] | 3.00 [3.00, 3.00] |" in text
    assert "| N = 40, K = 2 | 0.40 [0.40, 0.40] | 4.00 [4.00, 4.00] |" in text
    found = json.loads((tmp_path / "table4.json").read_text())
    assert len(found["cells"]) == 30 and len(found["ratios"]) == 12
