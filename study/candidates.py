"""Samples every candidate of every video to the end and keeps its rewards on the way and what the annotator
measures on the finished video. From these numbers study/search.py can tell what any way of dropping
candidates would have kept, without sampling again.

    python -m study.candidates --reward checkpoints/reward
    python -m study.candidates --reward checkpoints/reward --count 4 --guidance 1

--guidance moves the candidates along the reward's gradient while they are sampled. At t <= 1/2 the velocity
is v - scale t / (1 - t) grad r(x_t, t, p). This is classifier guidance for the straight path, because r is a
log-odds. Where r is far below 0, a scale of 1 guides by the gradient of log sigmoid(r).

Writes candidates.safetensors, which holds "rewards" [m, n, times] at the times REWARDED of study/search.py,
and what the annotator measures, [m, n] for each name in ANNOTATED.

Axes: m videos, n candidates, b batch of candidates, c channels, f frames, h height, w width, l text tokens.
"""
import itertools
from dataclasses import dataclass

import torch

import common
import flow
from common import arg
from study.candidate_files import Flags, annotated, load, write
from study.search import REWARDED, SEED
from world import scene


@dataclass
class Config(Flags):
    output_dir: str = arg("runs/candidates", "folder for candidates.safetensors")
    first: int = arg(0, "number of the first candidate; the noise of a candidate depends on its number",
                     at_least=0)
    count: int = arg(8, "candidates per video", above=0)
    split: str = arg("test", "which split of world/scene.py the prompts come from",
                     choices=("test", "validation", "reworded"))
    num_inference_steps: int = arg(16, "Euler steps per candidate", above=0)
    guidance: float = arg(0.0, "scale of the guidance along the reward's gradient; 0: no guidance",
                          at_least=0)


def along_the_reward(pavrm, x, t, context):
    """The gradient of the reward r(x_t, t, p) by x_t, at x [b, c, f, h, w]; t [b], context [b, l, d]."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        return torch.autograd.grad(pavrm(x, t, context).sum(), x)[0]


@torch.no_grad()
def sample_and_reward(dit, pavrm, x, context, num_steps, guidance):
    """Samples from noise x [b, c, f, h, w] -> (x at t = 0, rewards [b, times] at the times of the schedule
    that are nearest to REWARDED)"""
    times = flow.schedule(num_steps, device=x.device)
    rewarded = {int((times - t).abs().argmin()) for t in REWARDED}
    rewards = []
    for i in range(num_steps + 1):
        t = times[i].expand(len(x))
        if i in rewarded:
            rewards.append(pavrm(x, t, context).float())
        if i < num_steps:
            v = dit(x, t, context)
            if guidance and times[i] <= 0.5:
                v = v - guidance * times[i] / (1 - times[i]) * along_the_reward(pavrm, x, t, context)
            x = flow.euler_step(x, v, t, times[i + 1].expand(len(x)))
    return x, torch.stack(rewards, 1)


@torch.no_grad()
def main(config):
    runtime = common.setup(config.mixed_precision, config.seed)
    dit, pavrm, vae, text = load(config.reward, config.transformer, runtime)
    # the prompts of evaluate.py with --seed 0
    prompts = scene.draw_prompts(config.num_videos, SEED + 1, config.split)
    context = text.encode(prompts)
    shape, n = scene.LATENT_SHAPES["tiny"], config.count
    numbers = range(config.first, config.first + n)
    pairs = list(itertools.product(range(config.num_videos), numbers))              # (video, candidate)
    rows = []
    for i in common.progress(range(0, len(pairs), 128), "candidates, batches of up to 128"):
        some = pairs[i:i + 128]
        videos = [video for video, _ in some]
        x_T = torch.cat([common.noise(shape, SEED + config.seed, "sample", k, [video]) for video, k in some])
        with runtime.autocast():
            x, rewards = sample_and_reward(dit, pavrm, x_T.to(runtime.device), context[videos],
                                           config.num_inference_steps, config.guidance)
        seen = annotated(vae, x, [prompts[video] for video in videos])
        rows.append({"rewards": rewards.cpu()} | seen)
    write(f"{config.output_dir}/candidates.safetensors", rows, n)


if __name__ == "__main__":
    common.cli(main, Config, __doc__, prog="python -m study.candidates")
