"""Measures the seconds and memory of an iteration on the shipped tiny generator: with SFT, with both recipes
of PRFL, and with RGB ReFL, where the first frame or all frames are decoded.

    python -m study.cost times                           all methods in turn, A B C A B C, at one size
    python -m study.cost cell --method prfl --frames 33  one method at one size, in a process of its own
    python -m study.reproduce table4                     all of these, and the table

An iteration is that of train_align.py: an SFT update, then a reward update.

Training draws one rewarded step per batch: PRFL from all N steps, with both recipes, and RGB ReFL from the
last third. The seconds of an iteration grow linearly with the number of the rewarded step. So this script
always rewards the mean step or, if the mean lies between two steps, these two in turn. results/table4.md was
made when the steady recipe (prfl_steady) still drew a step for each video.

Memory is the peak minus what the process held before the first update, when weights and optimizer were
already allocated. On a CPU both numbers are the process's resident set, on a GPU what torch allocated.

The generator was trained on 9 frames of 32x32 only, and the reward models here were not trained at all. So
the costs are right, but the rewards mean nothing.
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
# the part of the trajectory that rewarded steps are drawn from
PART = {"prfl": "full", "prfl_steady": "full", "refl_first": "late", "refl_all": "late"}
METHODS = ("sft", "prfl", "prfl_steady", "refl_first", "refl_all")


@dataclass
class Config:
    command: str = arg(..., "times measures the seconds of all methods; cell measures the seconds and memory "
                       "of one method", choices=("times", "cell"), positional=True)
    method: str = arg("prfl", "method to measure", choices=METHODS, only="command cell")
    frames: int = arg(9, "number of video frames, 4k + 1", above=0)
    size: str = arg("32*32", "width*height of the videos in pixels")
    batch_size: int = arg(32, "videos per update", above=0)
    num_inference_steps: int = arg(16, "N, the number of Euler steps in a rollout", above=2)
    depth: int = arg(8, "K, how many of the generator's blocks make PRFL's reward model", above=0,
                     only="command times or method prfl prfl_steady")
    rounds: int = arg(8, "number of timed iterations per method, after one that warms up", above=0)
    decoder_checkpointing: bool = arg(False, "save memory in refl: decode in chunks, and decode each chunk "
                                      "again in the backward pass",
                                      only="command times or method refl_first refl_all")
    sft_updates: bool = arg(True, "make the SFT update of each iteration",
                            only="command times or !method sft")
    gradient_checkpointing: bool = arg(False, "recompute each block of the generator and of PAVRM in the "
                                       "backward pass")
    mixed_precision: str = runs.precision_flag()
    seed: int = arg(0, "seed of noise and rewarded steps", at_least=0)
    output_dir: str = arg("runs/cost", "folder for measured.json")


def make_iteration(method, config, runtime):
    """-> a function iteration(i) that makes one training iteration of `method`, on noise instead of data.

    Every call of make_iteration loads another generator and makes another optimizer.
    """
    f, h, w = plan.latent_grid(config.frames, config.size)
    policy = load_transformer(BASE).to(runtime.device).train()
    policy.gradient_checkpointing = config.gradient_checkpointing
    text_len, text_dim = policy.config["text_len"], policy.config["text_dim"]
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-6, weight_decay=0.0)
    for p in policy.parameters():       # AdamW's moments, so that they are there before memory is measured
        optimizer.state[p] = {"step": torch.tensor(0.0), "exp_avg": torch.zeros_like(p),
                              "exp_avg_sq": torch.zeros_like(p)}
    if method.startswith("prfl"):
        reward = PAVRM.from_generator(policy, config.depth).freeze()
        reward.trunk.gradient_checkpointing = config.gradient_checkpointing
    elif method.startswith("refl"):
        frames = method.removeprefix("refl_")
        reward = refl_baseline.PixelReward(frames, text_dim).to(runtime.device).eval().requires_grad_(False)
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
        shape = (16, f, h, w)
        draw = lambda purpose: common.noise(shape, config.seed, purpose, i, indices).to(runtime.device)
        x0 = draw("x0")
        x1 = draw("x1")
        x_T = draw("x_T")
        context = torch.randn(config.batch_size, text_len, text_dim, device=runtime.device)
        t = common.uniform(config.seed, "t", i, indices).to(runtime.device)
        if config.sft_updates or method == "sft":
            update(lambda: prfl.sft_loss(policy, x0, x1, t, context))
        if method == "sft":
            return
        step = mean_step(method, i, N)
        if method in ("prfl", "prfl_steady"):
            recipe = prfl.RECIPES["steady" if method == "prfl_steady" else "paper"]
            update(lambda: prfl.reward_update_loss(policy, reward, x_T, context, step, N,
                                                   rollout_passes=recipe["rollout_passes"],
                                                   loss=recipe["reward_loss"])[0])
        else:
            update(lambda: refl_baseline.refl_update_loss(policy, reward, vae, x_T, context, step, N,
                                                          checkpointing=config.decoder_checkpointing)[0])

    return iteration


def mean_step(method, i, N):
    """The mean of the steps that training draws from or, if the mean lies between two steps, these two in
    turn, by the number i of the iteration."""
    steps = prfl.steps_of_part(PART[method], N)
    return (steps[0] + steps[-1] + i % 2) // 2


def timed(iteration, i, device):
    """Seconds of iteration(i)."""
    start = time.perf_counter()
    iteration(i)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def bytes_now(device):
    """Bytes that the process holds now; `peak` counts from here on.

    On a CPU this is the size of the resident set, after freed memory was given back to the system; systems
    other than Linux only tell the peak so far.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    if sys.platform != "linux":
        return peak(device)
    ctypes.CDLL(None).malloc_trim(0)
    with contextlib.suppress(OSError):                      # resets the peak, which not every system allows
        Path("/proc/self/clear_refs").write_text("5")
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def peak(device):
    """The most bytes that the process held at one time since `bytes_now`."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    if sys.platform == "linux":                 # where ru_maxrss would also count the parent process
        return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if sys.platform == "darwin":                                # macOS counts bytes, other systems kilobytes
        return largest
    return largest * 1024


def main(config):
    runtime = common.setup(config.mixed_precision, config.seed)
    if config.command == "times":
        iterations = {method: make_iteration(method, config, runtime) for method in METHODS}
        seconds = {method: [] for method in METHODS}
        for i in common.progress(range(config.rounds + 1), "rounds"):
            for method, iteration in iterations.items():    # in turn: other load slows all methods alike
                seconds[method].append(timed(iteration, i, runtime.device))
        found = {method: times[1:] for method, times in seconds.items()}
    else:
        iteration = make_iteration(config.method, config, runtime)
        before = bytes_now(runtime.device)
        seconds = [timed(iteration, i, runtime.device) for i in range(config.rounds + 1)][1:]
        found = {**dataclasses.asdict(config), "seconds": seconds, "bytes": peak(runtime.device) - before}
    path = Path(config.output_dir) / "measured.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    runs.write_json(path, found)
    print(f"{json.dumps(found)}\nwrote {path}")


if __name__ == "__main__":
    common.cli(main, Config, __doc__, prog="python -m study.cost")
