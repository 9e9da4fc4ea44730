"""Run by test_plan.py in a process of its own: updates of small models on real tensors, and the most bytes
that PyTorch's allocator had handed out at one time, by the profiler's record of every allocation; beside it
the planner's, and of PRFL the simulation's. Prints one JSON object a line."""
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch.profiler import ProfilerActivity, profile

import model
import pavrm
import prfl
from scale import lora, parallel, plan
from scale.simulate import gpu_attend, simulate

WIDTH = model.PRESETS["wan2.1-t2v-1.3b"] | dict(dim=256, ffn_dim=1280, num_heads=4, text_len=64, text_dim=128,
                                                freq_dim=64)
CASES = (       # method, checkpointing, rank of adapters, blocks, size
    ("sft", True, 0, 6, "256*256"), ("sft", False, 0, 6, "256*256"), ("sft", True, 0, 6, "64*64"),
    ("prfl", True, 0, 6, "256*256"), ("prfl", False, 0, 4, "256*256"), ("prfl", True, 0, 3, "64*64"),
    ("prfl", True, 8, 6, "256*256"), ("prfl", False, 8, 4, "256*256"),
    ("reward", True, 0, 2, "256*256"), ("reward", False, 0, 2, "256*256"))


def update(method, checkpointing, rank, config, found):
    """One whole update: weights, moments, forward, backward, AdamW."""
    judge = None
    if method == "reward":
        trained = pavrm.PAVRM(config)
        trained.trunk.gradient_checkpointing = checkpointing
        trained.parameter_groups(1e-4, 1e-4)
    else:
        trained = model.VideoDiT(**config)
        trained.gradient_checkpointing = checkpointing
        lora.add(trained, rank)
        parallel.cast_matrices(trained, torch.bfloat16)         # as on a GPU
    if method == "prfl":
        judge = pavrm.PAVRM(config | dict(num_layers=2)).freeze()
        judge.trunk.gradient_checkpointing = checkpointing
        parallel.cast_matrices(judge.trunk, torch.bfloat16)
    # as on a GPU
    optimizer = torch.optim.AdamW([p for p in trained.parameters() if p.requires_grad], foreach=True)
    for p in optimizer.param_groups[0]["params"]:
        optimizer.state[p] = {"step": torch.tensor(0.0), "exp_avg": torch.zeros_like(p),
                              "exp_avg_sq": torch.zeros_like(p)}
    x, t = torch.randn(1, 16, found["f"], found["h"], found["w"]), torch.rand(1)
    context = torch.randn(1, config["text_len"], config["text_dim"])
    with torch.autocast("cpu", torch.bfloat16):
        if method == "reward":
            loss = trained(x, t, context).sum()
        elif method == "prfl":
            loss = prfl.reward_update_loss(trained, judge, x, context, 1, 40)[0]
        else:
            loss = prfl.sft_loss(trained, x, torch.randn_like(x), t, context)
    loss.backward()
    optimizer.step()


if __name__ == "__main__":
    torch.set_num_threads(1)
    model.attend = gpu_attend
    for method, checkpointing, rank, layers, size in CASES:
        config = WIDTH | dict(num_layers=layers)
        flags = plan.Config("tiny-t2v", method, 17, size, "steady" if method == "prfl" else "paper", depth=2,
                            lora_rank=rank,
                            gradient_checkpointing=checkpointing)
        found = plan.costs(flags, config)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
            update(method, checkpointing, rank, config, found)
        now = peak = 0
        for event in sorted(record.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
            if event.name() == "[memory]":
                now += event.nbytes()
                peak = max(peak, now)
        phases = simulate(flags, config, (found["f"], found["h"], found["w"])) if method == "prfl" else {}
        # the update measured here
        simulated = [one["Total"] for phase, one in phases.items() if "SFT" not in phase]
        print(json.dumps({"case": f"{method}, checkpointing {checkpointing}, rank {rank}, {size}",
                          "measured": peak,
                          "planned": found["with" if checkpointing else "without"]["peak"],
                          "simulated": max(simulated, default=None)}), flush=True)
