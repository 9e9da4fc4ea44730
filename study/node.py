"""Measures the seconds and peak memory of one update at Wan's true size, on this machine, with random
weights.

    python -m study.node
        On a CPU: wan2.1-t2v-1.3b, latents of 3x8x8, only adapters train, in one process and in two with fsdp.
        This takes a quarter of an hour and 12 GB, and writes node.md.
    python -m study.node --output_dir results
        On GPUs: 81 frames of 832*480 and of 1280*720, every weight trains, with ddp, with fsdp, and with
        clips that several GPUs share. Writes gpu.md.
    python -m study.node --model wan2.1-t2v-14b --layouts fsdp:8 fsdp:8:4
    python -m study.node --model wan2.1-t2v-14b --layers 4 --profile
        Only four blocks, at their true width, which takes seconds. Also lists the kernels that take the time.
    python -m study.node --first_hour
        Asks a GPU the most important questions, in 13 minutes, the most important first (FIRST below). Each
        question is a part. Its answer is printed and written to results/gpu.md at once. If a part fails, runs
        out of memory or takes too long, its answer says so, and the next part begins.
    python -m study.node --first_hour --parts 1 5 --minutes 5
        Only parts 1 and 5.
    torchrun --nproc_per_node=2 -m study.node --update prfl --parallel fsdp
        A single row, printed as JSON.

An update is a loss, its backward pass, clipping and an AdamW step. The losses:
- sft: flow matching.
- prfl, prfl_steady: a rollout without gradients, one step with gradients, and PAVRM, with the paper's recipe
  or ours.
- refl_first, refl_all: a rollout without gradients, then with gradients a step to x_0, the VAE decoder (of
  the first frame or of all) and a reward model of pixels.
- vae: no update, but Wan2.1's VAE in float32, which encodes and decodes one clip, as data.py and sample.py
  do.

Weights are drawn once and kept in bf16. Every process reads the weights that it needs, and turns those that
train into float32. Autocast is bf16, and activation checkpointing is on. The decoder of refl is Wan2.1's,
from diffusers, with random weights in bf16. If diffusers is missing, the rows that need it say so. The
rewarded step is the middle one of those that training draws from (all N steps for prfl, the last third for
refl). So a row's seconds are those of an average update.

peak: the most bytes that PyTorch had allocated at one time, in the process that had the most. On a CPU this
comes from the profiler's record of every allocation. planned: what scale/plan.py predicts. MFU: the update's
FLOPs per second (by the planner's formulas, with recomputation) / the FLOPs per second of a bf16 matrix
product, which the same processes measure. If an update runs out of memory, its row says so.
"""
import contextlib
import dataclasses
import itertools
import json
import math
import os
import platform
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, profile

import common
import prfl
import refl_baseline
from common import InputError, arg
from formats import runs
from formats.metadata import replace_text
from formats.weights import Later, write_folder
from model import PRESETS, VideoDiT, export_transformer, load_transformer
from pavrm import PAVRM, load_pavrm
from scale import lora, parallel, plan

UPDATES = ("sft", "prfl", "prfl_steady", "refl_first", "refl_all", "vae")
DRAWN = 4_194_301                                       # a prime, so that no two rows of a matrix are alike
RESIDENT = ("resident: the most memory that a process held, including libraries and cached files. The "
            "seconds only show that it runs: they say nothing about a GPU.")
TOKENS = "tokens/s: the tokens of all clips / the seconds of the whole update, including the rollout."


@dataclass
class Config(parallel.Flags):
    model: str = arg("wan2.1-t2v-1.3b", "size of the generator", choices=tuple(PRESETS), alias="preset")
    frames: int | None = arg(None, "video frames, 4 k + 1; default: 81 on a GPU, 9 on a CPU", above=0)
    size: tuple[str, ...] = arg((), "one or several width*height; default: 832*480 and 1280*720 on a GPU, "
                                    "64*64 on a CPU")
    layers: int | None = arg(None, "measure a generator of this many blocks, at its true width; default: all "
                                   "of them", above=0)
    updates: tuple[str, ...] = arg((), "which updates to measure; default: all on a GPU, all but refl_all "
                                       "and vae on a CPU",
                                   choices=UPDATES)
    layouts: tuple[str, ...] = arg((), "each parallel:processes or parallel:processes:processes that share a "
                                       "clip, such as ddp:1 fsdp:8 fsdp:8:4; default: ddp:1 and, on GPUs, "
                                       "all of them with ddp, with fsdp and with shared clips, on a CPU "
                                       "fsdp:2")
    lora_rank: int | None = arg(None, "train only adapters of this rank; 0: train every weight. Default: 0 "
                                      "on a GPU, 16 on a CPU", at_least=0)
    batch_size: int = arg(1, "videos per update and process, or per group of processes that share a "
                             "clip", above=0)
    num_inference_steps: int | None = arg(None, "N, Euler steps of a rollout; default: 40 on a GPU, 8 on a "
                                                "CPU",
                                          above=2)
    depth: int | None = arg(None, "K, blocks of the reward model; default: 8, or all if there are fewer",
                            above=0)
    rounds: int | None = arg(None, "updates per row; if there are several, the first warms up and the row "
                                   "has the median of the others. Default: 4 on a GPU, 1 on a CPU", above=0)
    gradient_checkpointing: bool = arg(True, "recompute each block in the backward pass")
    profile: bool = arg(False, "make one more update, and list the kernels that take the time and the kind "
                               "of attention")
    first_hour: bool = arg(False, "ask a GPU the most important questions, in their order, and stop after "
                                  "--minutes. Each question is a part; a flag that is given here replaces "
                                  "that flag in every part")
    minutes: float = arg(13.0, "when --first_hour stops", above=0, only="first_hour")
    parts: tuple[int, ...] = arg((), "parts of --first_hour, by number; default: all of them", above=0,
                                 only="first_hour")
    matmul: int | None = arg(None, "side of the square matrices whose product is timed; default: 8192 on a "
                                   "GPU, 1024 on a CPU", above=0)
    weights_dir: str = arg("runs/node/weights", "folder in which the random weights are kept; 2 bytes per "
                                                "weight")
    output_dir: str | None = arg(None, "folder for the table and the JSON; default: runs/node, or results "
                                       "with --first_hour")
    update: str | None = arg(None, "measure only this update, in the processes that torchrun "
                                   "started", choices=UPDATES)
    seed: int = arg(0, "seed of weights and noise", at_least=0)


ON_GPUS = dict(frames=81, size=("832*480", "1280*720"), updates=UPDATES, lora_rank=0, num_inference_steps=40,
               rounds=4, matmul=8192)                           # for the flags that are not given
ON_A_CPU = dict(frames=9, size=("64*64",), updates=UPDATES[:4], lora_rank=16, num_inference_steps=8,
                rounds=1, matmul=1024)
# --first_hour: (question, seconds at most, flags). The tests come first: it is no use to time wrong numbers.
SMALL, LARGE = dict(model="wan2.1-t2v-1.3b"), dict(model="wan2.1-t2v-14b", layers=4)
AT_480P, AT_720P = dict(size=("832*480",)), dict(size=("1280*720",))
FIRST = (
    ("Does a GPU compute what a CPU does? (tests/gpu.py)", 200, None),
    ("Four blocks of 14B at 480P: is the planner right, which attention is it, where does time go?", 100,
     LARGE | AT_480P | dict(updates=("sft", "prfl_steady"), profile=True)),
    ("1.3B at 480P: how long is an iteration?", 150,
     SMALL | AT_480P | dict(updates=("sft", "prfl_steady"), rounds=3)),
    ("The VAE at 480P", 90, SMALL | AT_480P | dict(updates=("vae",))),
    ("Four blocks of 14B at 480P, compiled: is it worth the wait?", 120,
     LARGE | AT_480P | dict(updates=("sft",), compile=True)),
    ("Four blocks of 14B at 480P, inputs on the host: do the copies hide behind the work?", 60,
     LARGE | AT_480P | dict(updates=("sft",), offload_activations=True)),
    ("Four blocks of 14B at 480P, attention kept: is it an eighth faster?", 60,
     LARGE | AT_480P | dict(updates=("sft",), keep_attention=True)),
    ("Four blocks of 14B at 720P", 90, LARGE | AT_720P | dict(updates=("sft", "prfl_steady"), rounds=2)),
    ("1.3B at 480P by RGB ReFL", 120, SMALL | AT_480P | dict(updates=("refl_first", "refl_all"), rounds=2)),
)


# ---- what an update needs
def random_weights(folder, c, depth, seed):
    """Draws random weights for a generator (config c) and a reward model of `depth` blocks -> their folders.

    A folder that is there already is kept; a new one is written one weight at a time. Matrices have variance
    1 / columns, norms are 1, and biases are 0. The numbers of a large matrix repeat after DRAWN of them, so
    that drawing takes seconds and not minutes.
    """
    generator, reward = Path(folder) / "transformer", Path(folder) / f"reward-{depth}"
    with torch.device("meta"):
        dit = VideoDiT(**c)
        pavrm = PAVRM(dit.config | {"num_layers": depth})

    def draw(name, p):
        if p.dim() == 1:
            return torch.full(p.shape, float(name.endswith("weight")))
        few = torch.randn(min(p.numel(), DRAWN), generator=common.random_generator(seed, name))
        few = few.repeat(math.ceil(p.numel() / len(few)))[:p.numel()]
        return few.view(p.shape) / p[0].numel() ** 0.5

    def drawn(model):
        weights = model.state_dict().items()
        return {name: Later(p.shape, torch.bfloat16, partial(draw, name, p)) for name, p in weights}

    if not generator.exists():
        export_transformer(dit, generator, state=drawn(dit))
    if not reward.exists():
        write_folder(reward, pavrm.config, drawn(pavrm))
    return generator, reward


class WanDecoder:
    """Wan2.1's VAE decoder with random weights, for refl_baseline."""

    def __init__(self, device):
        from diffusers import AutoencoderKLWan
        self.vae = AutoencoderKLWan().to(device, torch.bfloat16).requires_grad_(False).eval()
        del self.vae.encoder, self.vae.quant_conv                                   # a decoder needs neither
        statistic = lambda name: torch.tensor(self.vae.config[name], device=device).view(1, -1, 1, 1, 1)
        self.mean = statistic("latents_mean")
        self.std = statistic("latents_std")

    def decode(self, latents):
        """latents [b, 16, f, h, w] -> video [b, 3, F, H, W]"""
        return self.vae.decode((latents * self.std + self.mean).bfloat16(), return_dict=False)[0].float()


def random_conditions(c, b, f, h, w, device):
    """Random values for the image conditions, y and clip_tokens, that a model of config c accepts."""
    conditions = {}
    if c["model_type"] == "i2v":
        conditions["y"] = torch.randn(b, c["in_dim"] - c["out_dim"], f, h, w)
    if c.get("image_dim"):
        conditions["clip_tokens"] = torch.randn(b, plan.IMAGE_TOKENS, c["image_dim"])
    return {name: x.to(device) for name, x in conditions.items()}


# ---- how it is measured
def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def matmul_speed(device, side):
    """FLOP/s of a bf16 product of two square matrices: the best of ten runs, after two that warm up."""
    a = torch.randn(side, side, device=device, dtype=torch.bfloat16)
    b = torch.randn(side, side, device=device, dtype=torch.bfloat16)
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
    """Yields a list that holds, after the block, the most bytes that PyTorch had allocated at one time within
    it.

    On a CPU this is the weights of `models`, which were allocated before, plus what the block allocates.
    """
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


def kernels_of(update, device, count=12):
    """Profiles one call of `update` -> {"attention": names of the fused kernels that ran, "kernels": [[name,
    milliseconds, calls]], the longest first}. On a CPU it lists operations instead of kernels."""
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as record:
        update()
        synchronize(device)
    events, rows = record.key_averages(), []
    for event in events:
        on_device = event.device_type != torch.autograd.DeviceType.CPU
        if on_device == (device.type == "cuda"):
            time = event.self_device_time_total if on_device else event.self_cpu_time_total
            rows.append([event.key, time / 1000, event.count])
    attention = sorted({event.key.removeprefix("aten::") for event in events
                        if event.key.startswith("aten::_scaled_dot_product_")})
    return {"attention": attention, "kernels": sorted(rows, key=lambda row: -row[1])[:count]}


@torch.no_grad()
def measure_vae(config, runtime):
    """Seconds and peak memory of Wan2.1's VAE, with random weights, for one clip -> a row with a note."""
    from diffusers import AutoencoderKLWan
    device = runtime.device
    vae = AutoencoderKLWan().to(device).eval()
    f, h, w = plan.latent_grid(config.frames, config.size[0])
    video = torch.rand(1, 3, config.frames, 8 * h, 8 * w, device=device) * 2 - 1
    said, flops = [], {"encode": plan.encoder_flops(f, h, w), "decode": plan.decoder_costs(f, h, w)["flops"]}
    for name in flops:
        seconds = []
        with peak_of(device, [vae]) as peak:
            for _ in range(min(config.rounds, 2)):
                synchronize(device)
                start = time.perf_counter()
                if name == "encode":
                    latents = vae.encode(video).latent_dist.mode()
                else:
                    vae.decode(latents)
                synchronize(device)
                seconds.append(time.perf_counter() - start)
        said.append(f"{name} {seconds[-1]:.2f} s ({flops[name] / seconds[-1] / 1e12:.3g} TFLOP/s), peak "
                    f"{peak[0] / 1e9:.2f} GB")
        row = {"update": "vae", "size": config.size[0], "parallel": config.parallel, "processes": 1,
               "sequence_parallel": 1, "note": "; ".join(said)}
        say(row, runtime)                               # at once, because decoding may run out of memory
    return row


def measure(config, c, runtime, paths, speed):
    """Measures config.update -> a row of the table, {"update", "seconds", "peak_gb", ...}.

    config.size has one size. c: the generator's config. paths: what `random_weights` returned. speed: what
    `matmul_speed` returned.
    """
    device, b, N = runtime.device, config.batch_size, config.num_inference_steps
    method, _, variant = config.update.partition("_")
    f, h, w = plan.latent_grid(config.frames, config.size[0], plan.vae_of(c).space)
    recipe_name = "steady" if variant == "steady" else "paper"
    recipe = prfl.RECIPES[recipe_name]
    torch.manual_seed(config.seed)
    if method == "refl":
        decoder = WanDecoder(device)
        pixel_reward = refl_baseline.PixelReward(variant, c["text_dim"]).to(device)
        pixel_reward.requires_grad_(False).eval()
    policy = load_transformer(paths[0], load_now=False).train()
    lora.add(policy, config.lora_rank, seed=config.seed)
    # train_align.py casts only on a GPU; here a CPU does too, as its peak has to be like a GPU's
    parallel.shard(parallel.cast_matrices(policy, runtime.dtype), runtime, config)
    models = [policy]
    if method == "prfl":
        pavrm = load_pavrm(paths[1], policy, load_now=False)
        parallel.cast_matrices(pavrm.trunk, runtime.dtype)
        models.append(parallel.shard(pavrm, runtime, config))
    elif method == "refl":
        models += [pixel_reward, decoder.vae]
    trained = [p for p in policy.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-6, foreach=True)
    expected = plan.Config(
        config.model, method, config.frames, config.size[0], recipe_name,
        parallel=config.parallel, sequence_parallel=config.sequence_parallel,
        fsdp_group_size=config.fsdp_group_size, offload_activations=config.offload_activations,
        keep_attention=config.keep_attention, lora_rank=config.lora_rank,
        gradient_checkpointing=config.gradient_checkpointing,
        gpus=runtime.world_size, batch_size=b, num_inference_steps=N, depth=config.depth)
    if method == "refl":
        expected.frames_decoded = variant
        expected.pixel_reward_parameters = sum(p.numel() for p in pixel_reward.parameters())
    planned = plan.costs(expected, c)
    shape, indices = (c["out_dim"], f, h, w), runtime.indices(b)
    x0 = common.noise(shape, config.seed, "x0", 0, indices).to(device)
    x1 = common.noise(shape, config.seed, "x1", 0, indices).to(device)
    context = torch.randn(b, c["text_len"], c["text_dim"]).to(device)
    conditions = random_conditions(c, b, f, h, w, device)
    steps = prfl.steps_of_part("late" if method == "refl" else "full", N)
    step = (steps[0] + steps[-1]) // 2                          # the rewarded step: the middle one
    how = dict(rollout_passes=recipe["rollout_passes"], loss=recipe["reward_loss"], **conditions)

    def loss():
        with runtime.autocast():
            if method == "sft":
                t = torch.full((b,), 0.5, device=device)
                return prfl.sft_loss(policy, x0, x1, t, context, **conditions)
            if method == "prfl":
                return prfl.reward_update_loss(policy, pavrm, x1, context, step, N, **how)[0]
            update_loss = refl_baseline.refl_update_loss
            return update_loss(policy, pixel_reward, decoder, x1, context, step, N, **how)[0]

    def make_update():
        optimizer.zero_grad()
        value = loss()
        value.backward()
        common.average_and_clip_gradients(trained, 1.0)
        optimizer.step()
        common.check_finite(value.detach(), f"the {config.update} loss", 0)

    seconds = []
    with peak_of(device, models) as peak:
        for _ in range(config.rounds):
            synchronize(device)
            start = time.perf_counter()
            make_update()
            synchronize(device)
            seconds.append(time.perf_counter() - start)
    timed = seconds[1:] or seconds                          # the first of several warms up
    passes = 0
    if method != "sft":
        steps_of_a_pass = 1
        if recipe["rollout_passes"]:
            steps_of_a_pass = math.ceil(N / recipe["rollout_passes"])
        passes = math.ceil((step - 1) / steps_of_a_pass)
    flops = planned["update_flops"] + passes * sum(planned["forward"]) + planned["reward_flops"]
    memory = planned["with" if config.gradient_checkpointing else "without"]
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    row = {"update": config.update, "size": config.size[0], "parallel": config.parallel,
            "processes": runtime.world_size, "sequence_parallel": config.sequence_parallel,
            "seconds": statistics.median(timed), "seconds_all": seconds,
            "peak_gb": max(common.gather(peak[0])) / 1e9, "planned_gb": memory["peak"] / 1e9,
            "resident_gb": max(common.gather(resident)) / 1e9,
            "rewarded_step": step, "forward_passes": passes, "tokens": planned["n"] * b * planned["groups"],
            "flops": flops, "matmul_tflops": speed / 1e12}
    if config.profile:
        say(row, runtime)                               # at once, because the profiler may fail
        row |= kernels_of(make_update, device)
    return row


def say(row, runtime):
    """Prints a row on rank 0, for `measured_apart`, which takes the last row that it finds."""
    if runtime.rank == 0:
        print(json.dumps(row), flush=True)


# ---- one process for each row
def layouts_of(config, gpus, heads):
    """[(parallel, processes, processes that share a clip)]. heads: the number of attention heads of the
    generator. Raises InputError."""
    layouts = []
    for layout in config.layouts:
        kind, *numbers = layout.split(":")
        positive = all(number.isdecimal() and int(number) for number in numbers)
        if kind not in parallel.KINDS or len(numbers) not in (1, 2) or not positive:
            raise InputError(f"--layouts {layout}: wants parallel:processes, or parallel:processes:processes "
                             "that share a clip, as in fsdp:8:4")
        if len(numbers) == 1:
            numbers.append(1)
        layouts.append((kind, int(numbers[0]), int(numbers[1])))
    if layouts:
        return layouts
    if gpus == 0:
        return [("ddp", 1, 1), ("fsdp", 2, 1)]
    if gpus == 1:
        return [("ddp", 1, 1)]
    shared = max(n for n in (1, 2, 4, 8) if gpus % n == 0 and heads % n == 0)
    layouts = [("ddp", 1, 1), ("ddp", gpus, 1), ("fsdp", gpus, 1)]
    if shared > 1:
        layouts.append(("fsdp", gpus, shared))
    return layouts


def flags_of(config):
    """The flags that make this config."""
    flags = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value == field.default:
            continue
        if value is True:
            flags.append(f"--{field.name}")
        elif value is False:
            flags.append(f"--no-{field.name}")
        elif isinstance(value, tuple):
            flags += [f"--{field.name}", *map(str, value)]
        else:
            flags += [f"--{field.name}", str(value)]
    return flags


def run_apart(command, patience=None, environment=None):
    """Runs a command -> (its exit code, what it wrote to stdout, what it wrote to stderr). If it is not done
    after `patience` seconds, it and all that it started are ended, and the exit code is None."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        # files and not pipes, because a pipe stays open while anything that the command started still runs
        process = subprocess.Popen(command, stdout=out, stderr=err, env=environment, process_group=0)
        code = None
        try:
            code = process.wait(patience)
        except subprocess.TimeoutExpired:
            pass
        finally:
            if code is None:
                os.killpg(process.pid, signal.SIGTERM)          # torchrun then ends its own processes
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(5)
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        for file in (out, err):
            file.seek(0)
        return code, out.read(), err.read()


def measured_apart(config, kind, processes, shared, patience=None):
    """The row of config.update, measured in processes that are started for it. If they fail, or take more
    than `patience` seconds, a note in the row says why, beside what they had measured by then."""
    config = dataclasses.replace(config, parallel=kind, sequence_parallel=shared, layouts=(), updates=(),
                                 first_hour=False, minutes=Config.minutes, parts=())
    command, environment = [sys.executable], None
    if processes > 1 or kind == "fsdp":
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        environment = {"OMP_NUM_THREADS": "1"} | os.environ
    command += ["-m", "study.node", *flags_of(config)]
    code, printed, said = run_apart(command, patience, environment)
    rows = [line for line in printed.splitlines() if line.startswith('{"update"') and line.endswith("}")]
    row = {"update": config.update, "size": config.size[0], "parallel": kind, "processes": processes,
           "sequence_parallel": shared}
    if rows:
        row = json.loads(rows[-1])
    if rows and code == 0:
        return row
    lines = said.splitlines()
    errors = [line for line in lines if line.startswith("error:")] or lines[-1:]
    if code is None:
        note = f"not done after {patience:.0f} s"
    elif "out of memory" in said or "SIGKILL" in said or code == -signal.SIGKILL:
        note = "out of memory"
    else:
        note = " ".join(errors) or f"exit code {code}"
    return row | {"then" if rows else "note": note}


def table(config, rows, machine, gpus):
    """The Markdown page. Only GPUs get columns of speed, because a CPU emulates bf16 and its speed says
    nothing about a GPU's."""
    lines = [f"# One update of {config.model} on this machine", "", settings_of(config), "",
             f"{machine['device']}, torch {machine['torch']}.", "", f"`{machine['command']}`", ""]
    return "\n".join([*lines, *grid(rows, gpus), "", TOKENS if gpus else RESIDENT, ""])


def grid(rows, gpus):
    """The lines of a table of rows, followed by the kernels of the rows that were profiled."""
    columns = ["update", "size", "processes", "seconds", "peak GB", "planned GB", "apart", "rollout passes"]
    if gpus:
        columns += ["tokens/s", "TFLOP/s of one", "matrix product", "MFU"]
    else:
        columns.append("resident GB")
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for row in rows:
        processes = f"{row['processes']} {row['parallel']}"
        if row["sequence_parallel"] > 1:
            processes += f", {row['sequence_parallel']} per clip"
        cells = [row["update"], row["size"], processes]
        if "note" in row:
            cells.append(row["note"])
        else:
            cells += [f"{row['seconds']:.3f}", f"{row['peak_gb']:.2f}", f"{row['planned_gb']:.2f}",
                      f"{row['planned_gb'] / row['peak_gb'] - 1:+.1%}", f"{row['forward_passes']}"]
            if gpus:
                speed = row["flops"] / row["seconds"] / 1e12
                cells += [f"{row['tokens'] / row['seconds']:,.0f}", f"{speed:.3g}",
                          f"{row['matmul_tflops']:.3g}", f"{speed / row['matmul_tflops']:.1%}"]
            else:
                cells.append(f"{row['resident_gb']:.2f}")
        cells += [""] * (len(columns) - len(cells))
        lines.append("| " + " | ".join(cells) + " |")
    lines += [f"\n{row['update']}, {row['size']}, after that: {row['then']}" for row in rows if "then" in row]
    for row in rows:
        if "kernels" in row:
            lines += ["", f"{row['update']}, {row['size']}: attention by "
                      f"{', '.join(row['attention']) or 'no fused kernel'}.", "",
                      "| kernel | ms | calls |", "|---|---|---|"]
            lines += [f"| `{name[:100].replace('|', '/')}` | {time:.2f} | {calls} |"
                      for name, time, calls in row["kernels"]]
    return lines


def settings_of(config):
    """What all rows have in common, in a sentence."""
    blocks = f", {config.layers} blocks" if config.layers else ""
    said = [f"{config.frames} frames{blocks}", f"{config.batch_size} videos per process or group"]
    if config.batch_size == 1:
        said[1] = "1 video per process or group"
    if config.lora_rank:
        said.append(f"only adapters of rank {config.lora_rank} train")
    else:
        said.append("every weight trains")
    said += [f"N = {config.num_inference_steps}", f"K = {config.depth}",
             "random weights", "bf16 autocast"]
    if config.gradient_checkpointing:
        said.append("checkpointing on")
    else:
        said.append("checkpointing off")
    if config.offload_activations:
        said.append("inputs of blocks offloaded")
    if config.keep_attention:
        said.append("attention kept")
    if config.compile:
        said.append("blocks compiled")
    if config.rounds > 1:
        said.append(f"seconds are the median of {config.rounds - 1} updates after one that warms up")
    else:
        said.append("seconds are those of one update, the first")
    return ", ".join(said) + "."


def described(gpus):
    """The machine, in words."""
    if gpus:
        return f"{gpus} {torch.cuda.get_device_name()}"
    name, cpuinfo = platform.machine(), Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                name = line.split(":")[1].strip()
                break
    load = "unknown"
    if hasattr(os, "getloadavg"):
        load = f"{os.getloadavg()[0]:.0f}"
    return (f"CPU: {os.cpu_count()} cores of {name}, threads per process: {torch.get_num_threads()}, load "
            f"average at the start: {load}")


def generator_of(config):
    """The config of the VideoDiT to measure."""
    c = dict(PRESETS[config.model])
    if config.layers:
        c["num_layers"] = config.layers
    return c


def settled(config, defaults):
    """-> (a copy of config in which flags that were not given have their defaults, the generator's config).
    Raises InputError."""
    missing = {name: value for name, value in defaults.items() if getattr(config, name) in (None, ())}
    config = dataclasses.replace(config, **missing)
    c, most = generator_of(config), PRESETS[config.model]["num_layers"]
    if c["num_layers"] > most:
        raise InputError(f"--layers {config.layers}: {config.model} has {most}")
    config.depth = config.depth or min(8, c["num_layers"])
    if config.depth > c["num_layers"]:
        raise InputError(f"--depth must be 1 to {c['num_layers']}, the generator's blocks; got "
                         f"{config.depth}")
    for size in config.size:
        plan.latent_grid(config.frames, size, plan.vae_of(c).space)
    return config, c


def weights_folder(config):
    """Where the random weights of this generator are kept."""
    return Path(config.weights_dir) / (config.model + f"-{config.layers}-blocks" * bool(config.layers))


def first_hour(config, defaults, gpus, machine):
    """Runs the parts of FIRST, in their order, until --minutes are over. An error in one part does not lose
    the others, because the page is written anew after each row."""
    common.refuse(config, ("layouts", "update"), "with --first_hour, which measures one GPU")
    if wrong := [number for number in config.parts if number > len(FIRST)]:
        raise InputError(f"--parts {wrong[0]}: --first_hour has parts 1 to {len(FIRST)}")
    given = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)
             if getattr(config, field.name) != field.default}
    work = []                                                   # made first, so that bad flags stop it early
    for number, (asked, patience, flags) in enumerate(FIRST, 1):
        if not config.parts or number in config.parts:
            how = None if flags is None else settled(dataclasses.replace(config, **flags | given), defaults)
            work.append((f"{number}. {asked}", patience, how))
    out, parts, end = Path(config.output_dir or "results"), [], time.monotonic() + 60 * config.minutes
    out.mkdir(parents=True, exist_ok=True)
    head = [f"# The first {config.minutes:g} minutes on {machine['device']}", "",
            f"torch {machine['torch']}, `{machine['command']}`", "", TOKENS if gpus else RESIDENT]

    def page_of(parts):
        lines = []
        for part in parts:
            lines += ["", f"## {part['asked']}", "", *part["said"]]
            lines += ["", *grid(part["rows"], gpus)] if part["rows"] else []
        return lines

    def write():
        runs.write_json(out / "gpu.json", machine | {"parts": parts})
        replace_text(out / "gpu.md", "\n".join([*head, *page_of(parts), ""]))

    for asked, patience, how in work:
        start = time.monotonic()
        parts.append({"asked": asked, "seconds": 0.0, "said": [], "rows": []})
        if how is None:
            parts[-1]["said"] = run_tests(min(patience, end - start))
        else:
            parts[-1]["said"] = [f"{how[0].model}, {settings_of(how[0])}"]
        for update in how[0].updates if how else ():
            one = dataclasses.replace(how[0], update=update)
            parts[-1]["rows"].append(answer(one, how[1], patience, end))
            write()
        parts[-1]["seconds"] = time.monotonic() - start
        write()
        print("\n".join(page_of(parts[-1:])), f"\n{parts[-1]['seconds']:.0f} s", flush=True)
    print(f"wrote {out}/gpu.md and gpu.json")


def answer(one, c, patience, end):
    """The row of one update of --first_hour, which ends at the time `end`. If the update could not be
    measured, a note in the row says why."""
    nothing = {"update": one.update, "size": one.size[0], "parallel": "ddp", "processes": 1,
               "sequence_parallel": 1}
    try:
        if one.update != "vae" and time.monotonic() < end:
            random_weights(weights_folder(one), c, one.depth, one.seed)
        left = end - time.monotonic()
        if left < 1:
            return nothing | {"note": "no time was left"}
        return measured_apart(one, "ddp", 1, 1, min(patience, left))
    except Exception as error:                                  # such as a full disk: the other parts go on
        return nothing | {"note": " ".join(f"{type(error).__name__}: {error}".split())}


def run_tests(patience):
    """Runs tests/gpu.py -> lines that say how it went."""
    if patience < 1:
        return ["No time was left."]
    tests = Path(__file__).resolve().parents[1] / "tests/gpu.py"
    command = [sys.executable, "-u", "-m", "pytest", "-v", "--no-header", "-rfEsp", str(tests)]
    code, out, err = run_apart(command, patience)
    words = ("E ", "FAILED", "ERROR", "SKIPPED", "PASSED", " passed", " failed", " skipped")
    said = [line for line in out.splitlines() if any(word in line for word in words)]
    if code is None:
        said += [*out.splitlines()[-1:], f"not done after {patience:.0f} s"]
    elif not said:                                              # such as: No module named pytest
        said = err.splitlines()[-1:] or [f"exit code {code}"]
    return ["```", *said, "```"]


def main(config):
    if not config.update:
        common.refuse(config, ("parallel", "sequence_parallel"), "without --update: give --layouts")
    gpus, defaults = 0, ON_A_CPU
    if torch.cuda.is_available():
        gpus, defaults = torch.cuda.device_count(), ON_GPUS
    machine = {"command": " ".join(["python -m study.node", *sys.argv[1:]]), "torch": torch.__version__,
               "device": described(gpus)}
    if config.first_hour:
        return first_hour(config, defaults, gpus, machine)
    config, c = settled(config, defaults)
    folder = weights_folder(config)
    if config.update:
        runtime = common.setup("bf16", config.seed, config.sequence_parallel)
        if config.update == "vae":
            row = measure_vae(config, runtime)
        else:
            speed = matmul_speed(runtime.device, config.matmul)
            row = measure(config, c, runtime, random_weights(folder, c, config.depth, config.seed), speed)
        say(row, runtime)
        return common.teardown()
    layouts = layouts_of(config, gpus, c["num_heads"])
    random_weights(folder, c, config.depth, config.seed)
    name = "gpu" if gpus else "node"
    out = Path(config.output_dir or "runs/node")
    out.mkdir(parents=True, exist_ok=True)
    rows, page = [], ""
    cases = list(itertools.product(config.size, layouts, config.updates))
    for size, layout, update in common.progress(cases, "updates"):
        rows.append(measured_apart(dataclasses.replace(config, update=update, size=(size,)), *layout))
        print(json.dumps(rows[-1]), flush=True)
        runs.write_json(out / f"{name}.json", {**machine, "config": dataclasses.asdict(config), "rows": rows})
        page = table(config, rows, machine, gpus)
        (out / f"{name}.md").write_text(page)
    print(f"{page}\nwrote {out / name}.md and {name}.json")


if __name__ == "__main__":
    common.cli(main, Config, __doc__, prog="python -m study.node")
