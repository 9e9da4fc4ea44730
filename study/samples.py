"""Samples any generator of the embedded world and writes the labelled samples as shards, which
train_reward.py can train on beside others.

    python -m study.samples --transformer runs/prfl/transformer --seed 1 --output_dir runs/round2
    python train_reward.py --data runs/reward/samples runs/round2/shards

The annotator labels these samples, as it labels the base generator's samples in train_reward.py.
"""
from dataclasses import dataclass

import common
from common import arg
from formats import runs
from formats.weights import SHIPPED
from model import load_transformer
from world import clips


@dataclass
class Config:
    transformer: str | None = arg(None, "folder of the generator; default: the shipped one")
    output_dir: str = arg("runs/samples", "run folder; the shards lie in its shards/")
    count: int = arg(1024, "number of samples", above=0)
    seed: int = arg(0, "seed of prompts and noise", at_least=0)
    num_inference_steps: int = arg(16, "Euler steps per sample", above=0)
    mixed_precision: str = runs.precision_flag()


def main(config):
    runtime = common.setup(config.mixed_precision, config.seed)
    base = str(SHIPPED["t2v"])
    dit = load_transformer(config.transformer or base).eval().to(runtime.device)
    folder = f"{config.output_dir}/shards"                      # shards are refused beside other files
    shards = clips.own_samples(folder, dit, base, config.count, config.num_inference_steps, "tiny",
                               config.seed, runtime, transformer=config.transformer)
    if runtime.rank == 0:
        print(f"{shards.label_note}\nwrote {folder}")
    common.teardown()


if __name__ == "__main__":
    common.cli(main, Config, __doc__, prog="python -m study.samples")
