"""Samples every candidate of every video to its end, with its rewards on the way and the annotator's grades
of the video. From these study/search.py replays any best-of-n plan without sampling again.

    python -m study.candidates --reward checkpoints/reward
    python -m study.candidates --reward checkpoints/reward --count 4 --guidance 1

--guidance moves x along the reward's gradient while it is sampled. At t <= 1/2 the velocity is v - scale t /
(1 - t) grad r(x_t, t, p). This is classifier guidance for the straight path, because r is a log-odds; scale 1
is its strength where r is far below 0.

Writes candidates.safetensors. It holds "rewards" [m, n, times], at the times REWARDED of study/search.py, and
what the annotator says, [m, n] for each name in ANNOTATED.

Axes: m videos, n candidates, b batch of candidates, c channels, f frames, h height, w width, l text tokens.
"""
import itertools
from dataclasses import dataclass
from pathlib import Path

import torch

import common
import flow
from common import arg
from families import load_text_encoder, load_vae
from formats import disk, runs
from formats.video import to_pixels
from formats.weights import SHIPPED, stream_tensors
from model import load_transformer
from pavrm import load_pavrm
from study.search import ANNOTATED, REWARDED, SEED
from world import annotator, scene


@dataclass
class Config:
    reward: str = arg(..., "folder of the reward model")
    transformer: str | None = arg(None, "folder of the generator; default: the shipped one")
    output_dir: str = arg("runs/candidates", "folder for candidates.safetensors")
    first: int = arg(0, "number of the first candidate; the noise of a candidate depends on its number",
                     at_least=0)
    count: int = arg(8, "candidates per video", above=0)
    num_videos: int = arg(512, "number of held-out prompts", above=0)
    split: str = arg("test", "which split of world/scene.py the prompts come from",
                     choices=("test", "validation", "reworded"))
    num_inference_steps: int = arg(16, "Euler steps per candidate", above=0)
    guidance: float = arg(0.0, "scale of the guidance along the reward's gradient; 0: no guidance",
                          at_least=0)
    seed: int = arg(0, "seed of the noise; the prompts are the same with every seed", at_least=0)
    mixed_precision: str = runs.precision_flag()


def along_the_reward(pavrm, x, t, context):
    """The gradient of the reward r(x_t, t, p) by x_t, at x [b, c, f, h, w]; t [b], context [b, l, d]."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        return torch.autograd.grad(pavrm(x, t, context).sum(), x)[0]


@torch.no_grad()
def sample_and_reward(dit, pavrm, x, context, num_steps, guidance):
    """Noise x [b, c, f, h, w] -> (x at t = 0, rewards [b, times] where the steps are nearest to the times
    REWARDED)"""
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
    dit = load_transformer(config.transformer or SHIPPED["t2v"]).to(runtime.device).eval()
    pavrm = load_pavrm(config.reward, dit).to(runtime.device)
    vae = load_vae(SHIPPED["t2v"] / "vae").to(runtime.device)
    prompts = scene.draw_prompts(config.num_videos, SEED + 1, config.split)     # those of evaluate.py, seed 0
    text = load_text_encoder(SHIPPED["t2v"] / "text_encoder").to(runtime.device).eval()
    context = text.encode(prompts)
    shape, n = scene.LATENT_SHAPES["tiny"], config.count
    numbers = range(config.first, config.first + n)
    pairs = list(itertools.product(range(config.num_videos), numbers))              # (video, candidate)
    rows = []
    for i in common.progress(range(0, len(pairs), 128), "candidates (x128)"):
        some = pairs[i:i + 128]
        videos = [video for video, _ in some]
        x_T = torch.cat([common.noise(shape, SEED + config.seed, "sample", k, [video]) for video, k in some])
        with runtime.autocast():
            x, rewards = sample_and_reward(dit, pavrm, x_T.to(runtime.device), context[videos],
                                           config.num_inference_steps, config.guidance)
        annotations = annotator.annotate(to_pixels(vae.decode(x)).cpu(), [prompts[video] for video in videos])
        row = {"rewards": rewards.cpu()}
        for name in ANNOTATED:
            row[name] = annotations[name].float()
        rows.append(row)
    found = {}
    for name in rows[0]:
        flat = torch.cat([row[name] for row in rows])                               # [m n, ...]
        found[name] = flat.unflatten(0, (-1, n)).contiguous()
    path = Path(config.output_dir) / "candidates.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    stream_tensors(found, f"{path}.part")
    disk.put(f"{path}.part", path)
    print(f"{found['qualified'].mean():.3f} of all candidates are qualified\nwrote {path}")


if __name__ == "__main__":
    common.cli(main, Config, __doc__, prog="python -m study.candidates")
