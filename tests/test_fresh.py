"""The same seed in a fresh folder, without --data: clips are rendered, samples made and judged anew, and the
training is the same; on two ranks as on one, and killed and resumed as uninterrupted."""
import json
import shutil

import launch
import pytest
import torch
from safetensors.torch import load_file
from tiny import DRIVER, RUNS, apart, kill, run, same

from formats.weights import SHIPPED, WEIGHTS
from model import load_transformer
from pavrm import PAVRM

pytestmark = pytest.mark.usefixtures("cpu")
STEPS = 3
FRESH = {"prfl": "--method prfl --num_curated 32 --num_validation 0 --num_inference_steps 4",
         "reward": "--num_samples 96 --num_inference_steps 8 --holdout 16 --depth 2"}


def command(name, out, batch_size=8):
    return RUNS[name][0], [*FRESH[name].split(), "--output_dir", str(out), "--batch_size", str(batch_size),
                           "--mixed_precision", "no", "--max_train_steps", str(STEPS),
                           "--checkpointing_steps", "1"]


def result(name, out):
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return load_file(out / RUNS[name][1] / WEIGHTS), [{k: v for k,
                                                       v in row.items() if not k.endswith("seconds")}
                                                      for row in rows]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """{name: folder} of uninterrupted runs on one rank."""
    folder = tmp_path_factory.mktemp("fresh")
    for name in FRESH:
        run(*command(name, folder / name))
    return {name: folder / name for name in FRESH}


def test_two_ranks_in_fresh_folders_are_one(whole, tmp_path):
    jobs = [command(name, tmp_path / name, batch_size=4) for name in FRESH]
    launch.torchrun(2, "-c", DRIVER, json.dumps(jobs))
    torch.manual_seed(0)
    base = load_transformer(SHIPPED["t2v"])
    start = {"prfl": base.state_dict(), "reward": PAVRM.from_generator(base, 2).state_dict()}
    for name in FRESH:
        (one, rows), (two, others) = result(name, whole[name]), result(name, tmp_path / name)
        assert apart(one, two) < 5e-3 * apart(one, start[name])
        for row, other in zip(rows, others, strict=True):
            assert row == pytest.approx(other, rel=1e-3, abs=1e-5)
            for loss in row.keys() & {"loss", "sft_loss", "reward_loss"}:
                assert row[loss] == pytest.approx(other[loss], abs=1e-5)


@pytest.mark.parametrize("name", FRESH)
def test_killed_and_resumed_in_another_fresh_folder_is_uninterrupted(whole, tmp_path, name):
    script, argv = command(name, tmp_path / name)
    kill([(script, argv)])
    run(script, [*argv, "--resume", "latest"])
    assert same(result(name, tmp_path / name), result(name, whole[name]))
    shutil.rmtree(tmp_path)
