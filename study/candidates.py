"""Every candidate of every video to its end, with the reward on the way and the annotator's verdict: what study/search.py
replays any best-of-n plan from, without sampling again.

    python -m study.candidates --reward checkpoints/reward
    python -m study.candidates --reward checkpoints/reward --count 4 --guidance 1

--guidance moves x along the reward's gradient as it is sampled: v - scale t / (1 - t) grad r(x_t, t, p) at t <= 1/2, which is
classifier guidance for the straight path (r is a log-odds, and scale 1 its own strength where r is far below 0).

Writes candidates.safetensors: rewards [m, n, times] at REWARDED, and [m, n] each of what the annotator says.

Axes: m videos, n candidates, b batch of candidates, c channels, f frames, h height, w width, l text tokens.
"""
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
from study.search import REWARDED, SEED
from world import annotator, scene

JUDGED = ("qualified", "physical", "deformity", *annotator.PANEL, *annotator.LIMITS, "absent")


@dataclass
class Config:
    reward: str = arg(..., "reward model, a folder")
    transformer: str | None = arg(None, "generator, a folder; without, the shipped one")
    output_dir: str = arg("runs/candidates", "where candidates.safetensors goes")
    first: int = arg(0, "number of the first candidate", at_least=0)
    count: int = arg(8, "candidates of a video", above=0)
    num_videos: int = arg(512, "held-out prompts", above=0)
    split: str = arg("test", "of the prompts", choices=("test", "validation", "reworded"))
    num_inference_steps: int = arg(16, "Euler steps", above=0)
    guidance: float = arg(0.0, "by the reward's gradient; 0 is none", at_least=0)
    seed: int = arg(0, "of the noise; prompts are the same with every seed", at_least=0)
    mixed_precision: str = runs.precision_flag()


def along_the_reward(pavrm, x, t, context):
    """The gradient of r(x_t, t, p) at x [b, c, f, h, w]."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        return torch.autograd.grad(pavrm(x, t, context).sum(), x)[0]


@torch.no_grad()
def sample_and_reward(dit, pavrm, x, context, num_steps, guidance):
    """x [b, c, f, h, w] of noise -> (x at t = 0, rewards [b, times] at the steps nearest to REWARDED)"""
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
    prompts = scene.draw_prompts(config.num_videos, SEED + 1, config.split)                     # evaluate.py's, seed 0
    context = load_text_encoder(SHIPPED["t2v"] / "text_encoder").to(runtime.device).eval().encode(prompts)
    shape, n = scene.LATENT_SHAPES["tiny"], config.count
    pairs = [(video, candidate) for video in range(config.num_videos) for candidate in range(config.first, config.first + n)]
    rows = []
    for i in common.progress(range(0, len(pairs), 128), "candidates (x128)"):
        some = pairs[i:i + 128]
        x_T = torch.cat([common.noise(shape, SEED + config.seed, "sample", k, [video]) for video, k in some])
        with runtime.autocast():
            x, rewards = sample_and_reward(dit, pavrm, x_T.to(runtime.device), context[[video for video, _ in some]],
                                           config.num_inference_steps, config.guidance)
        judged = annotator.annotate(to_pixels(vae.decode(x)).cpu(), [prompts[video] for video, _ in some])
        rows.append({"rewards": rewards.cpu()} | {name: judged[name].float() for name in JUDGED})
    found = {name: torch.cat([row[name] for row in rows]).unflatten(0, (-1, n)).contiguous() for name in rows[0]}
    path = Path(config.output_dir) / "candidates.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    stream_tensors(found, f"{path}.part")
    disk.put(f"{path}.part", path)
    print(f"{found['qualified'].mean():.3f} of all candidates are qualified\nwrote {path}")


if __name__ == "__main__":
    common.cli(main, Config, __doc__, prog="python -m study.candidates")
