"""Runs the resampling search of search.py on the same held-out prompts as study/candidates.py.

    python -m study.resampling --reward checkpoints/reward --count 4

Writes resampled.safetensors: what the annotator measures on m videos, [m, 1] for each name in ANNOTATED of
study/search.py.
"""
from dataclasses import dataclass

import torch

import common
import flow
import search
from common import arg
from study.candidate_files import Flags, annotated, load, write
from study.search import SEED, STEPS
from world import scene


@dataclass
class Config(Flags):
    output_dir: str = arg("runs/resampling", "folder for resampled.safetensors")
    count: int = arg(4, "candidates per video", above=1)


def passes(n):
    """Forward passes of the generator for one video, if a reward costs as much as a forward pass."""
    choices = search.choices_of(flow.schedule(STEPS), n)
    last = max(choices)                                         # from here on one candidate is left
    return n * (last + len(choices)) + STEPS - last


@torch.no_grad()
def main(config):
    runtime = common.setup(config.mixed_precision, config.seed)
    dit, pavrm, vae, text = load(config.reward, config.transformer, runtime)
    prompts = scene.draw_prompts(config.num_videos, SEED + 1, "test")   # as in evaluate.py with --seed 0
    rows, together = [], max(1, 128 // config.count)                    # videos per batch
    for i in common.progress(range(0, len(prompts), together), f"batches of up to {together} videos"):
        some = prompts[i:i + together]
        x, _ = search.best_of(dit, pavrm, scene.LATENT_SHAPES["tiny"], text.encode(some), SEED + config.seed,
                              range(i, i + len(some)), STEPS, config.count, autocast=runtime.autocast)
        rows.append(annotated(vae, x, some))
    write(f"{config.output_dir}/resampled.safetensors", rows, 1)


if __name__ == "__main__":
    common.cli(main, Config, __doc__, prog="python -m study.resampling")
