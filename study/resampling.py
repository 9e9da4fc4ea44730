"""Search in the manner of LatSearch (arXiv 2603.14526): candidates are resampled while they are sampled.

    python -m study.resampling --reward checkpoints/reward --count 8

Of each video n candidates are on the way. At the first times of RESAMPLED each place is filled anew by one of
the n, drawn with probabilities softmax(r) of their rewards. So good candidates fill several places and weak
ones go. A candidate that fills several places keeps its state in the first of them. In the others its
predicted clean video gets new noise: x_t = (1 - t) x_0 + t x_1. At the last time the candidate with the
highest sum of rewards stays, and it alone is finished.

What the abstract of LatSearch leaves open is chosen here: the times, which are those of search.py's default,
softmax(r) as the normalised reward, and how copies are made different.

Writes resampled.safetensors: what the annotator measures, [m, 1] each, under the names ANNOTATED of
study/search.py.

Axes: m videos, n candidates, c channels, f frames, h height, w width, l text tokens.
"""
from dataclasses import dataclass

import torch

import common
import flow
from common import arg
from study.candidate_files import Flags, annotated, load, write
from study.search import SEED, STEPS
from world import scene

RESAMPLED = (0.75, 0.5625, 0.375)                               # at the last time one candidate stays


@dataclass
class Config(Flags):
    output_dir: str = arg("runs/resampling", "folder for resampled.safetensors")
    count: int = arg(8, "candidates per video", above=1)


def passes(n, share=1.0):
    """Forward passes of the generator for one video. share: the cost of a reward in forward passes. Each
    resampling takes one pass of all candidates more, because the copies' new states have other velocities."""
    until_one_stays = round((1 - RESAMPLED[-1]) * STEPS)
    rewards, resamplings = len(RESAMPLED), len(RESAMPLED) - 1
    return n * (until_one_stays + rewards * share + resamplings) + STEPS - until_one_stays


def is_copy(chosen):
    """Which of chosen [m, n] stands in an earlier place of the same video too -> [m, n]"""
    same = chosen[:, :, None] == chosen[:, None, :]                                     # [m, place, place]
    return same.tril(-1).any(2)


@torch.no_grad()
def search(dit, pavrm, context, n, seed, indices, shape):
    """-> latents [m, c, f, h, w] of the candidates that stay. context [m, l, d]; indices: of the m videos."""
    m, times = len(indices), flow.schedule(STEPS)
    x = torch.stack([common.noise(shape, seed, "sample", k, indices) for k in range(n)], 1)
    x = x.to(context.device)                                                            # [m, n, c, f, h, w]
    texts = context.repeat_interleave(n, 0)                                             # [m n, l, d]
    total, step = torch.zeros(m, n, device=x.device), 0
    for t in RESAMPLED:
        stop = int((times - t).abs().argmin())
        flat = flow.rollout(dit, x.flatten(0, 1), texts, STEPS, start=step, stop=stop)
        step, now = stop, times[stop].expand(m * n).to(x.device)
        r = pavrm(flat, now, texts).float().unflatten(0, (m, n))                        # [m, n]
        total = total + r
        x = flat.unflatten(0, (m, n))
        if t == RESAMPLED[-1]:
            break
        draws = torch.stack([common.uniform(seed, f"place {stop}", k, indices) for k in range(n)], 1)
        chosen = torch.searchsorted(r.softmax(1).cumsum(1), draws.to(x.device)).clamp(max=n - 1)
        predicted = flow.predict_x0(flat, dit(flat, now, texts), now).unflatten(0, (m, n))
        purpose = f"resampling {stop}"
        noise = torch.stack([common.noise(shape, seed, purpose, k, indices) for k in range(n)], 1)
        video = torch.arange(m, device=x.device)[:, None]
        renewed = (1 - times[stop]) * predicted[video, chosen] + times[stop] * noise.to(x.device)
        x = torch.where(is_copy(chosen)[:, :, None, None, None, None], renewed, x[video, chosen])
        total = total.gather(1, chosen)
    best = x[torch.arange(m, device=x.device), total.argmax(1)]
    return flow.rollout(dit, best, context, STEPS, start=step)


@torch.no_grad()
def main(config):
    runtime = common.setup(config.mixed_precision, config.seed)
    dit, pavrm, vae, text = load(config.reward, config.transformer, runtime)
    prompts = scene.draw_prompts(config.num_videos, SEED + 1, "test")           # those of evaluate.py, seed 0
    rows, together = [], max(1, 128 // config.count)                # so many videos in a batch
    for i in common.progress(range(0, len(prompts), together), f"videos (x{together})"):
        some = prompts[i:i + together]
        with runtime.autocast():
            x = search(dit, pavrm, text.encode(some), config.count, SEED + config.seed,
                       range(i, i + len(some)), scene.LATENT_SHAPES["tiny"])
        rows.append(annotated(vae, x, some))
    write(f"{config.output_dir}/resampled.safetensors", rows, 1)


if __name__ == "__main__":
    common.cli(main, Config, __doc__, prog="python -m study.resampling")
