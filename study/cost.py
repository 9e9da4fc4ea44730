"""What an update costs: SFT, PRFL by both recipes, RGB ReFL with the first frame or all frames decoded, on the shipped tiny
generator.

    python -m study.cost times                               all methods in turn, A B C A B C, at the world's size
    python -m study.cost cell --method prfl --frames 33      one method at one size, in a process of its own
    python -m study.reproduce table4                                    every cell, and the table

An iteration is what train_align.py makes of it: an SFT update, then the reward update. By the paper's recipe (prfl, refl_first,
refl_all) training draws one rewarded step, from all N for PRFL, from the late third for ReFL, and an iteration's seconds are
linear in it (with one step with gradients): here it is the mean of those steps (the two next to it in turn). By the steady
recipe (prfl_steady) it draws a step for each video, here too. Memory: on CPU the peak resident set of this process less
what it held before the first update, when weights and optimizer were there; on a GPU torch's peak less the same. The generator
is trained at 9 frames of 32x32 only, and the reward models here not at all: what they cost is right, what they say means nothing.
"""
import contextlib
import ctypes
import dataclasses
import gc
import json
import re
import resource
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

import common
import prfl
import refl_baseline
from common import arg
from families import load_vae
from formats import runs
from formats.weights import SHIPPED
from model import load_transformer
from pavrm import PAVRM
from scale import plan

BASE = SHIPPED["t2v"]
PART = {"prfl": "full", "refl_first": "late", "refl_all": "late"}            # of the trajectory, where steps are drawn
METHODS = ("sft", "prfl", "prfl_steady", "refl_first", "refl_all")


@dataclass
class Config:
    command: str = arg(..., "what to do", choices=("times", "cell"), positional=True)
    method: str = arg("prfl", "of the cell", choices=METHODS, only="command cell")
    frames: int = arg(9, "video frames, 4 k + 1", above=0)
    size: str = arg("32*32", "width*height")
    batch_size: int = arg(32, "videos per update", above=0)
    num_inference_steps: int = arg(16, "N, Euler steps of a rollout", above=2)
    depth: int = arg(8, "K, blocks of the generator in PRFL's reward model", above=0,
                     only="command times or method prfl prfl_steady")
    rounds: int = arg(8, "timed iterations of each method, behind one that warms up", above=0)
    decoder_checkpointing: bool = arg(False, "refl: decode video by video, long ones in chunks, twice",
                                      only="command times or method refl_first refl_all")
    sft_updates: bool = arg(True, "the SFT update of an iteration", only="command times or !method sft")
    grad_steps: int = arg(1, "prfl: steps with gradients before the reward", above=0,
                          only="command times or method prfl prfl_steady")
    gradient_checkpointing: bool = arg(False, "keep only the inputs of blocks, of generator and PAVRM")
    mixed_precision: str = runs.precision_flag()
    seed: int = arg(0, "seed of noise and steps", at_least=0)
    output_dir: str = arg("runs/cost", "where measured.json goes")


def make_iteration(method, config, runtime):
    """-> iteration(i): one training iteration on noise in place of data; its generator and optimizer are its own."""
    f, h, w = plan.latent_grid(config.frames, config.size)
    policy = load_transformer(BASE).to(runtime.device).train()
    policy.gradient_checkpointing = config.gradient_checkpointing
    text_len, text_dim = policy.config["text_len"], policy.config["text_dim"]
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-6, weight_decay=0.0)
    for p in policy.parameters():                               # its moments, which a first step would make
        optimizer.state[p] = {"step": torch.tensor(0.0), "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
    if method.startswith("prfl"):
        reward = PAVRM.from_generator(policy, config.depth).freeze()
        reward.trunk.gradient_checkpointing = config.gradient_checkpointing
    elif method.startswith("refl"):
        reward = refl_baseline.PixelReward(method[5:], text_dim).to(runtime.device).eval().requires_grad_(False)
        vae = load_vae(BASE / "vae").to(runtime.device)
    indices, N = range(config.batch_size), config.num_inference_steps

    def update(loss_fn):
        optimizer.zero_grad()
        with runtime.autocast():
            loss = loss_fn()
        loss.backward()
        common.average_and_clip_gradients(list(policy.parameters()), 1.0)
        optimizer.step()

    def iteration(i):
        draw = lambda purpose: common.noise((16, f, h, w), config.seed, purpose, i, indices).to(runtime.device)
        x0, x1, x_T = draw("x0"), draw("x1"), draw("x_T")
        context = torch.randn(config.batch_size, text_len, text_dim, device=runtime.device)
        t = common.uniform(config.seed, "t", i, indices).to(runtime.device)
        if config.sft_updates or method == "sft":
            update(lambda: prfl.sft_loss(policy, x0, x1, t, context))
        step, how = mean_step(method, i, N) if method in PART else None, {}
        if method == "prfl_steady":
            step, steady = prfl.draw_steps(config.seed, i, N, config.batch_size), prfl.RECIPES["steady"]
            how = dict(rollout_passes=steady["rollout_passes"], loss=steady["reward_loss"])
        if method.startswith("prfl"):
            update(lambda: prfl.reward_update_loss(policy, reward, x_T, context, step, N, grad_steps=config.grad_steps, **how)[0])
        elif method != "sft":
            update(lambda: refl_baseline.refl_update_loss(policy, reward, vae, x_T, context, step, N,
                                                          checkpointing=config.decoder_checkpointing)[0])

    return iteration


def mean_step(method, i, N):
    """The mean of the steps that training draws from, or the two next to it in turn."""
    first, last = (N * third // 3 for third in prfl.THIRDS[PART[method]])
    return (first + 1 + last + i % 2) // 2


def timed(iteration, i, device):
    start = time.perf_counter()
    iteration(i)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def held(device):
    """Bytes held now, from where the peak is counted: on CPU the resident set, after freed memory went back to the system
    (other systems than Linux: the peak so far)."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    if sys.platform != "linux":
        return peak(device)
    ctypes.CDLL(None).malloc_trim(0)
    with contextlib.suppress(OSError):                          # not every system lets the peak be set back
        Path("/proc/self/clear_refs").write_text("5")
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def peak(device):
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    if sys.platform == "linux":                                 # ru_maxrss would begin at that of the process that started this
        return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main(config):
    runtime = common.setup(config.mixed_precision, config.seed)
    if config.command == "times":
        iterations = {method: make_iteration(method, config, runtime) for method in METHODS}
        seconds = {method: [] for method in METHODS}
        for i in common.progress(range(config.rounds + 1), "rounds"):
            for method, iteration in iterations.items():        # in turn, so that all see the same machine
                seconds[method].append(timed(iteration, i, runtime.device))
        found = {method: times[1:] for method, times in seconds.items()}
    else:
        iteration = make_iteration(config.method, config, runtime)
        before = held(runtime.device)
        seconds = [timed(iteration, i, runtime.device) for i in range(config.rounds + 1)][1:]
        found = {**dataclasses.asdict(config), "seconds": seconds, "bytes": peak(runtime.device) - before}
    path = Path(config.output_dir) / "measured.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    runs.write_json(path, found)
    print(f"{json.dumps(found)}\nwrote {path}")


if __name__ == "__main__":
    common.cli(main, Config, __doc__)
