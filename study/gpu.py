"""Seconds and peak memory of each kind of update at the true Wan2.1 size, on one GPU, with random weights.

    python -m study.gpu --output_dir results                 wan2.1-t2v-1.3b, 81 frames of 832*480: writes gpu.md, gpu.json
    python -m study.gpu --preset tiny-t2v                    the same code at a small size, on a CPU in a minute

Updates, each a backward pass, clipping and an AdamW step: `sft` (flow matching), `prfl` (rollout without gradients, one
step with, PAVRM), `refl_first` and `refl_all` (rollout, one step, x_0, VAE decoder and a pixel reward with gradients).
bf16 autocast, float32 weights, activation checkpointing in generator and reward model. The decoder is Wan2.1's own, from
diffusers and with random weights in bf16; without diffusers, or refl_baseline.py, those rows are skipped and say so. PAVRM
has --depth blocks; the pixel reward is refl_baseline.PixelReward. Rewarded steps are the mean ones: the middle of the
rollout for prfl, the middle of its last third for refl, so a row's seconds stand for an average update.

MFU is FLOPs done, by plan.py's formulas and recomputation counted, over seconds over the speed of a bf16 matrix product
measured in the same run. "planned" is plan.py's peak. Out of memory is a result: its row says so.
"""
import dataclasses
import json
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

import common
import pavrm
import prfl
from common import InputError, arg
from formats import runs
from model import PRESETS, VideoDiT
from scale import plan

UPDATES = ("sft", "prfl", "refl_first", "refl_all")


@dataclass
class Config:
    preset: str = arg("wan2.1-t2v-1.3b", "the generator", choices=tuple(p for p in PRESETS if "t2v" in p))
    frames: int | None = arg(None, "video frames, 4 k + 1; without, 81 for Wan's presets, 9 for small ones", above=0)
    size: str | None = arg(None, "width*height; without, 832*480 for Wan's presets, 32*32 for small ones")
    batch_size: int = arg(1, "videos per update", above=0)
    updates: tuple[str, ...] = arg(UPDATES, "which updates to measure", choices=UPDATES)
    num_inference_steps: int = arg(40, "N, Euler steps of a rollout", above=2)
    depth: int = arg(8, "K, blocks of the reward model", above=0)
    rounds: int = arg(3, "timed updates a row, behind one that warms up; the median counts", above=0)
    matmul: int | None = arg(None, "side of the measured matrix product; without, 8192 on a GPU, 512 on a CPU", above=0)
    output_dir: str = arg("runs/gpu", "where gpu.md and gpu.json go")
    seed: int = arg(0, "seed of weights and noise", at_least=0)


class WanDecoder:
    """`decode` of Wan2.1's VAE with random weights: latents [b, 16, f, h, w] -> video [b, 3, F, H, W]."""

    def __init__(self, device):
        from diffusers import AutoencoderKLWan
        self.vae = AutoencoderKLWan().to(device, torch.bfloat16).requires_grad_(False).eval()
        del self.vae.encoder, self.vae.quant_conv                                   # never used here
        statistic = lambda name: torch.tensor(self.vae.config[name], device=device).view(1, -1, 1, 1, 1)
        self.mean, self.std = statistic("latents_mean"), statistic("latents_std")

    def decode(self, latents):
        return self.vae.decode((latents * self.std + self.mean).bfloat16(), return_dict=False)[0].float()


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def matmul_speed(device, side):
    """FLOP/s of a bf16 product of two square matrices: the best of ten, after two."""
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    times = []
    for _ in range(12):
        synchronize(device)
        start = time.perf_counter()
        a @ b
        synchronize(device)
        times.append(time.perf_counter() - start)
    return 2 * side ** 3 / min(times[2:])


def make_refl(frames, text_dim, device):
    """(refl_update_loss, reward, decoder), or a string: why it cannot be measured."""
    try:
        import refl_baseline
    except ImportError:
        return "skipped: refl_baseline.py is not there"
    try:
        decoder = WanDecoder(device)
    except ImportError:
        return "skipped: diffusers is not installed, and its AutoencoderKLWan is the decoder"
    reward = refl_baseline.PixelReward(frames, text_dim).to(device).requires_grad_(False).eval()
    return refl_baseline.refl_update_loss, reward, decoder


def measure(name, config, c, runtime):
    """One row: {"update", "seconds", "peak_gb", ...}, or {"update", "note"} where it could not be measured."""
    device, b, N = runtime.device, config.batch_size, config.num_inference_steps
    method, _, decoded = name.partition("_")
    f, h, w = plan.latent_grid(config.frames, config.size)
    torch.manual_seed(config.seed)
    refl = make_refl(decoded, c["text_dim"], device) if method == "refl" else None
    if isinstance(refl, str):
        return {"update": name, "note": refl}
    planned = plan.costs(plan.Config(config.preset, method=method, frames=config.frames, size=config.size,
                                     parallel="ddp", batch_size=b, num_inference_steps=N, depth=config.depth,
                                     frames_decoded=decoded or "first", pixel_reward_parameters=sum(
                                         p.numel() for p in refl[1].parameters()) if refl else 1), c)
    with torch.device(device):
        dit = VideoDiT(**c)
        torch.nn.init.normal_(dit.head.head.weight, std=0.02)                       # else nothing below it has a gradient
        reward = pavrm.PAVRM(c | dict(num_layers=config.depth)).freeze() if method == "prfl" else None
    dit.gradient_checkpointing = True
    if reward is not None:
        reward.trunk.gradient_checkpointing = True
    optimizer = torch.optim.AdamW(dit.parameters(), lr=1e-6)
    noise = lambda purpose: common.noise((c["out_dim"], f, h, w), config.seed, purpose, 0, range(b)).to(device)
    x0, x1, context = noise("x0"), noise("x1"), torch.randn(b, c["text_len"], c["text_dim"], device=device)
    # rollout steps before the rewarded one: plan.py's mean, to the nearest whole step
    step = int(planned["rollout_steps"]) + 1

    def loss():
        with runtime.autocast():
            if method == "sft":
                return prfl.sft_loss(dit, x0, x1, torch.full((b,), 0.5, device=device), context)
            if method == "prfl":
                return prfl.reward_update_loss(dit, reward, x1, context, step, N)[0]
            update, pixel_reward, decoder = refl
            return update(policy=dit, reward=pixel_reward, vae=decoder, x_T=x1, context=context, step=step,
                          num_steps=N)[0]

    seconds = []
    for i in range(config.rounds + 1):
        if i == 1 and device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        synchronize(device)
        start = time.perf_counter()
        optimizer.zero_grad()
        value = loss()
        value.backward()
        common.average_and_clip_gradients(list(dit.parameters()), 1.0)
        optimizer.step()
        synchronize(device)
        seconds.append(time.perf_counter() - start)
        common.check_finite(value.detach(), f"the {name} loss", i)
    flops = planned["update_flops"] + (step - 1) * bool(method != "sft") * sum(planned["forward"]) + planned["reward_flops"]
    return {"update": name, "seconds": statistics.median(seconds[1:]), "seconds_all": seconds[1:], "rewarded_step": step,
            "tokens": planned["n"], "forward_passes": (step - 1) * (method != "sft"), "flops": flops,
            "peak_gb": torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else None,
            "planned_gb": planned["with"]["peak"] / 1e9}


def table(config, rows, machine):
    """Markdown of the rows."""
    lines = [f"# One update at {config.preset}: seconds and memory", "",
             f"{config.frames} frames of {config.size}, {config.batch_size} per update, N = {config.num_inference_steps}, "
             f"K = {config.depth}; random weights, bf16 autocast, float32 weights, checkpointing on; median of "
             f"{config.rounds}.", "",
             f"{machine['device']}, torch {machine['torch']}; bf16 matrix product {machine['matmul_tflops']:.1f} TFLOP/s. "
             f"Decoder: AutoencoderKLWan of diffusers, random weights.", "",
             f"`{machine['command']}`", "",
             "| update | seconds | peak GB | planned GB | rollout steps | tokens/s | TFLOP/s | MFU |",
             "|---|---|---|---|---|---|---|---|"]
    for row in rows:
        if "note" in row:
            lines.append(f"| {row['update']} | {row['note']} | | | | | | |")
            continue
        speed = row["flops"] / row["seconds"]
        peak = "not measured on a CPU" if row["peak_gb"] is None else f"{row['peak_gb']:.2f}"
        lines.append(f"| {row['update']} | {row['seconds']:.3f} | {peak} | {row['planned_gb']:.2f} | {row['forward_passes']} | "
                     f"{config.batch_size * row['tokens'] / row['seconds']:,.0f} | {speed / 1e12:.2f} | "
                     f"{speed / machine['matmul_tflops'] / 1e12:.1%} |")
    return "\n".join(lines + ["", "tokens/s: the clip's tokens by the seconds of the whole update, rollout included.", ""])


def main(config):
    wan = config.preset.startswith("wan")
    config = dataclasses.replace(config, frames=config.frames or (81 if wan else 9), size=config.size or
                                 ("832*480" if wan else "32*32"))
    c = PRESETS[config.preset]
    plan.latent_grid(config.frames, config.size)
    if config.depth > c["num_layers"]:
        raise InputError(f"--depth must be 1 to {c['num_layers']}, the generator's blocks; got {config.depth}")
    runtime = common.setup("bf16", config.seed)
    if wan and runtime.device.type == "cpu":
        raise InputError(f"--preset {config.preset} wants a GPU, and torch sees none; --preset tiny-t2v runs on a CPU")
    device = runtime.device
    machine = {"command": " ".join(["python", *sys.argv]), "torch": torch.__version__,
               "device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
               "matmul_tflops": matmul_speed(device, config.matmul or (8192 if device.type == "cuda" else 512)) / 1e12}
    rows = []
    for name in config.updates:
        try:
            rows.append(measure(name, config, c, runtime))
        except torch.OutOfMemoryError:
            rows.append({"update": name, "note": "out of memory"})
        print(json.dumps(rows[-1]), flush=True)
    folder = Path(config.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    runs.write_json(folder / "gpu.json", {**machine, "config": dataclasses.asdict(config), "rows": rows})
    (folder / "gpu.md").write_text(table(config, rows, machine))
    print((folder / "gpu.md").read_text())


if __name__ == "__main__":
    common.cli(main, Config, __doc__)
