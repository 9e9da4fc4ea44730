"""Seconds and peak memory of one update at the true Wan2.1 size, on this machine, with random weights.

    python -m study.node                                    wan2.1-t2v-1.3b. On a CPU: latents of 3x8x8, adapters alone, one process
                                                            and two under fsdp (a quarter of an hour, 12 GB): writes node.md
    python -m study.node --output_dir results               on GPUs: 81 frames of 832*480 and 1280*720, every weight, ddp beside
                                                            fsdp and shared clips: writes gpu.md
    python -m study.node --model wan2.1-t2v-14b --layouts fsdp:8 fsdp:8:4
    torchrun --nproc_per_node=2 -m study.node --update prfl --parallel fsdp         one row alone, as JSON

Updates, each a backward pass, clipping and an AdamW step: `sft` (flow matching), `prfl` and `prfl_steady` (rollout without
gradients, one step with, PAVRM; the paper's recipe, and ours), `refl_first` and `refl_all` (rollout, one step, x_0, VAE
decoder and a pixel reward with gradients). bf16 autocast, float32 weights, activation checkpointing. The weights are drawn
once, and every process reads its own. The decoder is Wan2.1's own, from diffusers and with random weights in bf16; without
diffusers those rows are skipped and say so. Rewarded steps are the mean ones: the middle of the rollout for prfl, the middle
of its last third for refl, so a row's seconds stand for an average update.

peak: the most bytes that PyTorch had handed out at one time, on the process that had most; on a CPU by the profiler's record
of every allocation. planned: scale/plan.py's. MFU is FLOPs done, by the planner's formulas and recomputation counted, over
seconds over the speed of a bf16 matrix product, measured by the same processes. Out of memory is a result: its row says so.
"""
import contextlib
import dataclasses
import json
import math
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, profile

import common
import prfl
import refl_baseline
from common import InputError, arg
from formats import runs
from formats.weights import Later, write_folder
from model import PRESETS, VideoDiT, export_transformer, load_transformer
from pavrm import PAVRM, load_pavrm
from scale import lora, parallel, plan

UPDATES = ("sft", "prfl", "prfl_steady", "refl_first", "refl_all")
RESIDENT = "resident: the most that a process held, with libraries and pages of files. Seconds say that it runs, not how fast."
TOKENS = "tokens/s: the tokens of all clips by the seconds of the whole update, rollout included."


@dataclass
class Config(parallel.Flags):
    model: str = arg("wan2.1-t2v-1.3b", "the generator", choices=tuple(PRESETS), alias="preset")
    frames: int | None = arg(None, "video frames, 4 k + 1; without, 81 on a GPU, 9 on a CPU", above=0)
    size: tuple[str, ...] = arg((), "width*height, one or several; without, 832*480 and 1280*720 on a GPU, 64*64 on a CPU")
    updates: tuple[str, ...] = arg((), "which; without, all on a GPU, all but refl_all on a CPU", choices=UPDATES)
    layouts: tuple[str, ...] = arg((), "parallel:processes:of each clip, such as ddp:1 fsdp:8 fsdp:8:4; without, one, and "
                                          "on GPUs all of them by ddp, fsdp and with shared clips, on a CPU two by fsdp")
    lora_rank: int | None = arg(None, "adapters of this rank alone train; 0: every weight. Without, 0 on a GPU, 16 on a CPU",
                                at_least=0)
    batch_size: int = arg(1, "videos per update and process, or group of processes", above=0)
    num_inference_steps: int | None = arg(None, "N, Euler steps of a rollout; without, 40 on a GPU, 8 on a CPU", above=2)
    depth: int = arg(8, "K, blocks of the reward model", above=0)
    rounds: int | None = arg(None, "updates a row; of several the first warms up, and the median of the rest counts; without, 4 "
                             "on a GPU, 1 on a CPU", above=0)
    gradient_checkpointing: bool = arg(True, "recompute each block in the backward pass")
    matmul: int | None = arg(None, "side of the measured matrix product; without, 8192 on a GPU, 1024 on a CPU", above=0)
    weights_dir: str = arg("runs/node/weights", "where the random weights are kept, or found: 4 bytes each")
    output_dir: str = arg("runs/node", "where the table and the JSON go")
    update: str | None = arg(None, "measure this one alone, in the processes that torchrun started", choices=UPDATES)
    seed: int = arg(0, "seed of weights and noise", at_least=0)


# ---- what an update needs
def random_weights(folder, c, depth, seed):
    """The folders of a generator and of a reward model of `depth` blocks, drawn one weight at a time where they are not there
    yet: matrices of variance 1 / columns, norms of 1, biases of 0. -> their paths"""
    paths = Path(folder) / "transformer", Path(folder) / f"reward-{depth}"
    with torch.device("meta"):
        dit = VideoDiT(**c)
        judge = PAVRM(dit.config | {"num_layers": depth})

    def drawn(model):
        def draw(name, p):
            if p.dim() == 1:
                return torch.full(p.shape, float(name.endswith("weight")))
            return torch.randn(p.shape, generator=common.random_generator(seed, name)) / p[0].numel() ** 0.5
        return {name: Later(p.shape, torch.float32, lambda name=name, p=p: draw(name, p))
                for name, p in model.state_dict().items()}

    if not paths[0].exists():
        export_transformer(dit, paths[0], state=drawn(dit))
    if not paths[1].exists():
        write_folder(paths[1], judge.config, drawn(judge))
    return paths


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


def image_of(c, b, f, h, w, device):
    """{y, clip_tokens}, at random, where the model takes them."""
    found = {"y": torch.randn(b, c["in_dim"] - c["out_dim"], f, h, w)} if c["model_type"] == "i2v" else {}
    found |= {"clip_tokens": torch.randn(b, plan.IMAGE_TOKENS, c["image_dim"])} if c.get("image_dim") else {}
    return {name: x.to(device) for name, x in found.items()}


# ---- how it is measured
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


def local(p):
    return p.to_local() if isinstance(p, DTensor) else p


@contextlib.contextmanager
def peak_of(device, models):
    """A list that holds, after the block, the most bytes that PyTorch had handed out within it at one time; on a CPU those of
    the weights of `models`, which are there, and what came on top."""
    peak = []
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        yield peak
        peak.append(torch.cuda.max_memory_allocated())
        return
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        yield peak
    now = most = sum(p.nbytes for one in models for p in map(local, one.parameters()))
    for event in sorted(record.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    peak.append(most)


def measure(config, c, runtime, paths, speed):
    """One row: {"update", "seconds", "peak_gb", ...}. config.size has one size."""
    device, b, N = runtime.device, config.batch_size, config.num_inference_steps
    method, _, variant = config.update.partition("_")
    f, h, w = plan.latent_grid(config.frames, config.size[0])
    recipe = prfl.RECIPES["steady" if variant == "steady" else "paper"]
    torch.manual_seed(config.seed)
    if method == "refl":
        decoder = WanDecoder(device)
        pixel_reward = refl_baseline.PixelReward(variant, c["text_dim"]).to(device).requires_grad_(False).eval()
    policy = load_transformer(paths[0], load_now=False).train()
    lora.add(policy, config.lora_rank, seed=config.seed)
    parallel.shard(policy, runtime, config)
    pavrm = parallel.shard(load_pavrm(paths[1], policy, load_now=False), runtime, config) if method == "prfl" else None
    trained = [p for p in policy.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-6, foreach=True)
    planned = plan.costs(plan.Config(
        config.model, method, config.frames, config.size[0], variant if variant == "steady" else "paper",
        gpus=runtime.world_size, batch_size=b, num_inference_steps=N, depth=config.depth,
        frames_decoded=variant if method == "refl" else "first", **{flag: getattr(config, flag) for flag in (
            "parallel", "sequence_parallel", "fsdp_group_size", "offload_activations", "lora_rank", "gradient_checkpointing")},
        pixel_reward_parameters=sum(p.numel() for p in pixel_reward.parameters()) if method == "refl" else 1), c)
    draw = lambda purpose: common.noise((c["out_dim"], f, h, w), config.seed, purpose, 0, runtime.indices(b)).to(device)
    x0, x1, context = draw("x0"), draw("x1"), torch.randn(b, c["text_len"], c["text_dim"]).to(device)
    image = image_of(c, b, f, h, w, device)
    first = 2 * N // 3 if method == "refl" else 0           # of the steps first + 1 .. N the middle one is rewarded
    step = (first + N - 1) // 2 + 1
    how = dict(rollout_passes=recipe["rollout_passes"], loss=recipe["reward_loss"], **image)

    def loss():
        with runtime.autocast():
            if method == "sft":
                return prfl.sft_loss(policy, x0, x1, torch.full((b,), 0.5, device=device), context, **image)
            if method == "prfl":
                return prfl.reward_update_loss(policy, pavrm, x1, context, step, N, **how)[0]
            return refl_baseline.refl_update_loss(policy, pixel_reward, decoder, x1, context, step, N, **how)[0]

    seconds = []
    models = [policy] + ([pavrm] if method == "prfl" else [pixel_reward, decoder.vae] if method == "refl" else [])
    with peak_of(device, models) as peak:
        for i in range(config.rounds):
            synchronize(device)
            start = time.perf_counter()
            optimizer.zero_grad()
            value = loss()
            value.backward()
            common.average_and_clip_gradients(trained, 1.0, i)
            optimizer.step()
            synchronize(device)
            seconds.append(time.perf_counter() - start)
            common.check_finite(value.detach(), f"the {config.update} loss", i)
    timed = seconds[len(seconds) > 1:]
    passes = (method != "sft") * math.ceil((step - 1) / (math.ceil(N / how["rollout_passes"]) if how["rollout_passes"] else 1))
    flops = planned["update_flops"] + passes * sum(planned["forward"]) + planned["reward_flops"]
    found = planned["with" if config.gradient_checkpointing else "without"]
    return {"update": config.update, "size": config.size[0], "parallel": config.parallel, "processes": runtime.world_size,
            "sequence_parallel": config.sequence_parallel, "seconds": statistics.median(timed), "seconds_all": seconds,
            "peak_gb": max(common.gather(peak[0])) / 1e9, "planned_gb": found["peak"] / 1e9,
            "resident_gb": max(common.gather(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)) * 1024 / 1e9,
            "rewarded_step": step, "forward_passes": passes, "tokens": planned["n"] * b * planned["groups"],
            "flops": flops, "matmul_tflops": speed / 1e12}


# ---- one process for each row
def layouts_of(config, gpus, heads):
    """[(parallel, processes, of each clip)]. Raises InputError."""
    if not config.layouts:
        shared = max(n for n in (1, 2, 4, 8) if not max(gpus, 1) % n and not heads % n)
        every = [("ddp", 1, 1), ("ddp", gpus, 1), ("fsdp", gpus, 1), ("fsdp", gpus, shared)]
        return list(dict.fromkeys(every[:1] if gpus == 1 else every)) if gpus else [("ddp", 1, 1), ("fsdp", 2, 1)]
    found = []
    for layout in config.layouts:
        kind, *numbers = layout.split(":")
        if kind not in parallel.KINDS or not 1 <= len(numbers) <= 2 or not all(n.isdecimal() and int(n) for n in numbers):
            raise InputError(f"--layouts {layout}: wants parallel:processes, or parallel:processes:of each clip, as in fsdp:8:4")
        found.append((kind, int(numbers[0]), int(numbers[1]) if len(numbers) > 1 else 1))
    return found


def measured_apart(config, kind, processes, shared):
    """The row of config.update, measured by processes of its own; what stopped them is its note."""
    config = dataclasses.replace(config, parallel=kind, sequence_parallel=shared, layouts=(), updates=())
    flags = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value != field.default:
            flags += [f"--{'no-' * (value is False)}{field.name}"]
            flags += [] if isinstance(value, bool) else map(str, value if isinstance(value, tuple) else [value])
    start = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 or kind == "fsdp" \
        else []
    done = subprocess.run([sys.executable, *start, "-m", "study.node", *flags], capture_output=True, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")} if start else None)
    rows = [line for line in done.stdout.splitlines() if line.startswith('{"update"')]
    if rows:
        return json.loads(rows[-1])
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")] or done.stderr.splitlines()[-1:]
    note = "out of memory" if "out of memory" in done.stderr or done.returncode == -9 or "SIGKILL" in done.stderr else \
        " ".join(errors) or f"exit code {done.returncode}"
    return {"update": config.update, "size": config.size[0], "parallel": kind, "processes": processes,
            "sequence_parallel": shared, "note": note}


def table(config, rows, machine, gpus):
    """The Markdown page. Speeds are a GPU's alone: a CPU's say nothing of it, and it emulates bf16."""
    how = f"adapters of rank {config.lora_rank} train" if config.lora_rank else "every weight trains"
    lines = [f"# One update of {config.model} on this machine", "",
             f"{config.frames} frames, {config.batch_size} video{'s' * (config.batch_size > 1)} a process or group, {how}; N = "
             f"{config.num_inference_steps}, K = {config.depth}; random weights, bf16 autocast, float32 weights, checkpointing "
             f"{'on' if config.gradient_checkpointing else 'off'}"
             + ", inputs offloaded" * config.offload_activations + ", blocks compiled" * config.compile + "; "
             + (f"median of {config.rounds - 1}, after one." if config.rounds > 1 else "one update a row, the first."), "",
             f"{machine['device']}, torch {machine['torch']}.", "", f"`{machine['command']}`", "",
             "| update | size | processes | seconds | peak GB | planned GB | apart | rollout passes | "
             + ("tokens/s | TFLOP/s of one | matrix product | MFU |" if gpus else "resident GB |"),
             "|" + "---|" * (12 if gpus else 9)]
    for row in rows:
        shared = f", {row['sequence_parallel']} a clip" * (row["sequence_parallel"] > 1)
        start = f"| {row['update']} | {row['size']} | {row['processes']} {row['parallel']}{shared} |"
        if "note" in row:
            lines.append(f"{start} {row['note']} |" + " |" * (8 if gpus else 5))
            continue
        speed = row["flops"] / row["seconds"] / 1e12
        lines.append(f"{start} {row['seconds']:.3f} | {row['peak_gb']:.2f} | {row['planned_gb']:.2f} | "
                     f"{row['planned_gb'] / row['peak_gb'] - 1:+.1%} | {row['forward_passes']} | "
                     + (f"{row['tokens'] / row['seconds']:,.0f} | {speed:.3g} | {row['matmul_tflops']:.3g} | "
                        f"{speed / row['matmul_tflops']:.1%} |" if gpus else f"{row['resident_gb']:.2f} |"))
    return "\n".join([*lines, "", TOKENS if gpus else RESIDENT, ""])


def described(gpus):
    """The machine, in words."""
    if gpus:
        return f"{gpus} {torch.cuda.get_device_name()}"
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    load = f"{os.getloadavg()[0]:.0f} processes waiting" if hasattr(os, "getloadavg") else "load unknown"
    return (f"CPU: {os.cpu_count()} cores of {names[0] if names else platform.machine()}, {torch.get_num_threads()} "
            f"thread{'s' * (torch.get_num_threads() > 1)} a process; {load} for them at the start")


def main(config):
    common.refuse(config, () if config.update else ("parallel", "sequence_parallel"), "without --update: give --layouts")
    gpus, c = torch.cuda.device_count() if torch.cuda.is_available() else 0, PRESETS[config.model]
    usual = dict(frames=81, size=("832*480", "1280*720"), updates=UPDATES, lora_rank=0, num_inference_steps=40, rounds=4,
                 matmul=8192) if gpus else dict(frames=9, size=("64*64",), updates=UPDATES[:-1], lora_rank=16,
                                                num_inference_steps=8, rounds=1, matmul=1024)
    config = dataclasses.replace(config, **{name: value for name, value in usual.items() if getattr(config, name) in (None, ())})
    for size in config.size:
        plan.latent_grid(config.frames, size)
    if config.depth > c["num_layers"]:
        raise InputError(f"--depth must be 1 to {c['num_layers']}, the generator's blocks; got {config.depth}")
    folder = Path(config.weights_dir) / config.model
    if config.update:
        runtime = common.setup("bf16", config.seed, config.sequence_parallel)
        speed = matmul_speed(runtime.device, config.matmul)
        row = measure(config, c, runtime, random_weights(folder, c, config.depth, config.seed), speed)
        if runtime.rank == 0:
            print(json.dumps(row), flush=True)
        return common.teardown()
    layouts = layouts_of(config, gpus, c["num_heads"])
    machine = {"command": " ".join(["python -m study.node", *sys.argv[1:]]), "torch": torch.__version__, "device": described(gpus)}
    random_weights(folder, c, config.depth, config.seed)
    cases = [(update, size, layout) for size in config.size for layout in layouts for update in config.updates]
    rows, name, out = [], "gpu" if gpus else "node", Path(config.output_dir)
    out.mkdir(parents=True, exist_ok=True)
    for update, size, layout in common.progress(cases, "updates"):
        rows.append(measured_apart(dataclasses.replace(config, update=update, size=(size,)), *layout))
        print(json.dumps(rows[-1]), flush=True)
        runs.write_json(out / f"{name}.json", {**machine, "config": dataclasses.asdict(config), "rows": rows})
        (out / f"{name}.md").write_text(table(config, rows, machine, gpus))
    print(f"{(out / f'{name}.md').read_text()}\nwrote {out / f'{name}.md'} and {name}.json")


if __name__ == "__main__":
    common.cli(main, Config, __doc__, prog="python -m study.node")
