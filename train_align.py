"""Stage 2: align the generator. `--method prfl` is Algorithm 1; `refl`, `sft` and `rwr` are the baselines beside it.

    python train_align.py                                               PRFL on the embedded world, the steady recipe
    python train_align.py --recipe paper --max_train_steps 100          Algorithm 1 to the letter, stopped in time
    python train_align.py --method sft --max_train_steps 240            as many updates as 120 iterations of PRFL
    python train_align.py --method refl --frames_decoded first --reward runs/reward_rgb/reward
    torchrun --nproc_per_node=8 train_align.py --data clips_encoded --reward runs/reward/reward --parallel fsdp
    python train_align.py --task i2v --reward runs/reward_i2v/reward    the image-to-video generator
    python train_align.py --resume latest

prfl: each iteration an SFT update on curated videos, then a reward update at a random step of a rollout.
refl: the same, but the reward judges decoded pixels of the clean video predicted at a late step.
sft:  each iteration one flow-matching update on curated videos (Eq. 10).
rwr:  each iteration one flow-matching update on the generator's own samples, weighted by exp(reward).
Without --data the curated set is clean clips of the embedded world, written as mp4 and encoded like anybody's clips;
with it, the shards' clips that are not labelled 0.
Writes <output_dir>/transformer, metrics.jsonl, samples/ of fixed prompts and noise, and best/, the choice of judge or annotator.

Axes: b batch, c channels, f frames, h height, w width, l text tokens.
"""
import math
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

import common
import data
import prfl
import refl_baseline
import rwr_baseline
import validation
from common import InputError, arg
from formats import runs
from formats.codec import drop_contexts, fill_in, null_context, sampling_defaults, training_defaults
from formats.video import SPACE
from formats.weights import TASKS, resolve_model, transformer_folder
from model import image_inputs, load_transformer
from pavrm import load_pavrm
from scale import lora, parallel
from world import clips, scene


@dataclass
class Config(runs.Flags, validation.Flags, lora.Flags, parallel.Flags):
    method: str = arg("prfl", "what to train with", choices=("prfl", "refl", "sft", "rwr"))
    task: str | None = arg(None, "which shipped generator, without --model: t2v, or i2v (image-to-video)", choices=TASKS)
    model: str | None = arg(None, "another generator: a folder with transformer/, vae/ and text_encoder/")
    reward: str | None = arg(None, "reward model; without, <model>/reward, refl: /reward_rgb_...", only="method prfl refl rwr")
    data: str | None = arg(None, "curated shards from `data.py encode`; without, clean clips of the embedded world")
    output_dir: str = arg("runs/align", "run folder")
    world: str = arg("tiny", "size of the embedded world", choices=tuple(scene.SIZES), only="!data")
    num_curated: int = arg(1024, "curated clips to render", above=0, only="!data")
    curated_dir: str | None = arg(None, "where curated clips are kept, or found; without, <output_dir>/curated", only="!data")
    num_samples: int = arg(2048, "own samples that are weighted", at_least=2, only="method rwr")
    num_inference_steps: int | None = arg(None, "N, Euler steps of a rollout; without, 16, Wan-sized: the paper's 40", above=0,
                                          only="method prfl refl rwr or !num_validation 0")
    shift: float | None = arg(None, "warps times towards noise; without, 1: uniform, Wan2.1: 3, from 720P 5", above=0, at_most=100,
                              only="method prfl refl rwr or !num_validation 0")
    reward_weight: float = arg(1.0, "lambda of Alg. 1; Adam and clipping leave it little effect", above=0, only="method prfl refl")
    recipe: str | None = arg(None, "paper: Alg. 1 to the letter; steady: ours, needs no stopping. Sets the next three "
                             "flags where they are not given. Default: steady for prfl, paper for refl",
                             choices=tuple(prfl.RECIPES), only="method prfl refl")
    rewarded_step: str | None = arg(None, "one random step for the whole batch (Alg. 1), or one for each video, spread "
                                    "evenly over the trajectory", choices=("per_batch", "per_video"), only="method prfl refl")
    rollout_passes: int | None = arg(None, "most Euler steps of the rollout without gradients, each a longer one; 0: every "
                                     "step (Alg. 1)", at_least=0, only="method prfl refl")
    reward_loss: str | None = arg(None, "-lambda r (linear, Alg. 1), -log sigmoid(r), or the released code's",
                                  choices=tuple(prfl.REWARD_LOSSES), only="method prfl refl")
    trajectory_part: str | None = arg(None, "steps that can be rewarded (Table 3); without, full, and late for refl",
                                      choices=tuple(prfl.THIRDS), only="method prfl refl")
    grad_steps: int = arg(1, "steps with gradients before the reward; 1 is Alg. 1", above=0, only="method prfl")
    frames_decoded: str = arg("first", "what is decoded and judged", choices=refl_baseline.FRAMES, only="method refl")
    decoder_checkpointing: bool = arg(False, "decode video by video, long ones in chunks, twice", only="method refl")
    sft_updates: bool = arg(True, "the SFT update that keeps the reward from being hacked (Alg. 1)", only="method prfl refl")
    context_dropout: float = arg(0.0, "share of SFT's prompts that become empty: keeps guidance usable", at_least=0, below=1,
                                 only="method sft or method prfl refl, sft_updates")
    learning_rate: float | None = arg(None, "AdamW's; without, 1e-4 (results/table1.md), Wan-sized: the paper's 5e-6", above=0)
    lr_scheduler: str = arg("constant", "the learning rate stays, or falls linearly to 0 at --max_train_steps",
                            choices=("constant", "linear"))
    weight_decay: float = arg(0.0, "AdamW's", at_least=0)
    max_train_steps: int | None = arg(None, "iterations, of prfl and refl two updates; without, 120, Wan-sized: 800", above=0)
    batch_size: int | None = arg(None, "videos, or prompts, a pass and rank, or group of ranks; without, 32, Wan-sized: 1", above=0)
    gradient_accumulation_steps: int | None = arg(None, "passes per update; without, 1, Wan-sized: 30 videos in all", above=0)
    max_grad_norm: float = arg(1.0, "each update's gradient is clipped to this norm", above=0)
    checkpointing_steps: int = arg(40, "iterations between checkpoints", above=0)
    seed: int = arg(0, "seed of order, t, noise and steps", at_least=0)


def check_flags(config):
    """Fills in what recipe and model say. Raises InputError for flags that cannot work together."""
    config.recipe = config.recipe or ("paper" if config.method == "refl" else "steady")
    fill_in(config, prfl.RECIPES[config.recipe] | training_defaults(transformer_folder(resolve_model(config))[1], "align"))
    config.trajectory_part = config.trajectory_part or ("late" if config.method == "refl" else "full")
    prfl.steps_of(config.trajectory_part, config.num_inference_steps)
    validation.check_flags(config)


def load_curated(config, policy, runtime):
    """-> (shards, indices of their clips to train on, and of those held out to watch); none of them is labelled 0."""
    shards = data.Shards(config.data).relabel() if config.data else clips.clean_clips(
        config.curated_dir or Path(config.output_dir) / "curated", config.model, config.num_curated, config.world,
        config.seed + 500, runtime)
    shards.require_fit(policy, config.model)
    curated = (shards.labels != 0).nonzero()[:, 0]
    if not len(curated):
        raise InputError(f"{shards.folder}: every clip is labelled 0; alignment needs good ones")
    return shards, *validation.hold_out(config, curated)


def main(config):
    # ---- what trains, what rewards it, what it learns from
    check_flags(config)
    runtime = common.setup(config.mixed_precision, config.seed, config.sequence_parallel)
    policy = load_transformer(config.model, whole=False).train()
    lora.add(policy, config.lora_rank, config.lora_alpha, config.seed, config.lora)
    parallel.shard(policy, runtime, config)
    if config.method == "refl":
        pixel_reward, vae = refl_baseline.load_reward_and_decoder(config, policy, runtime)
    elif config.method in ("prfl", "rwr"):
        config.reward = config.reward or f"{config.model}/reward"
        pavrm = parallel.shard(load_pavrm(config.reward, policy, whole=False), runtime, config)
    resume, state = runs.open_checkpoint(config)
    shards, curated, held = load_curated(config, policy, runtime)
    fill_in(config, sampling_defaults(policy.config, SPACE * shards.latent_shape[2]))
    accumulation = config.gradient_accumulation_steps
    global_batch = config.batch_size * runtime.world_size // config.sequence_parallel * accumulation
    N = config.num_inference_steps
    empty = null_context(policy.config, "empty", config.data, config.model, runtime.device) if config.context_dropout else None

    def curated_batch(seed, iteration, indices):
        """-> x0 [b, c, f, h, w], context [b, l, d_text], and {y, clip} of an image-to-video model"""
        batch = shards.batch(curated[data.order(len(curated), seed, iteration, indices, global_batch)])
        return (batch["latents"].to(runtime.device), batch["context"].to(runtime.device),
                image_inputs(policy.config, batch, runtime.device))

    if config.method == "rwr":
        # The untrained policy makes these, also on a resume: so before parallel.load_state fills in trained weights.
        _, own_context, own_image = curated_batch(config.seed + 1, 0, range(config.num_samples))
        own_x0, own_weights = rwr_baseline.weighted_samples(policy, pavrm, shards.latent_shape, own_context, config.seed + 2,
                                                            N, config.batch_size, runtime, config.shift, **own_image)
    # One AdamW for both updates, as in Alg. 1: their gradients never meet, its moments average over both.
    optimizer = torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad], lr=config.learning_rate,
                                  weight_decay=config.weight_decay)
    if resume:
        parallel.load_state(resume, state, policy, optimizer)

    # ---- the losses: each -> loss, {what is logged beside it}; indices are places in the global batch
    def flow_loss(iteration, indices, x0, context, weight=None, **image):
        t = common.uniform(config.seed, "sft t", iteration, indices).to(runtime.device)
        x1 = common.noise(x0.shape[1:], config.seed, "sft x1", iteration, indices).to(runtime.device)
        with runtime.autocast():
            return prfl.sft_loss(policy, x0, x1, t, context, weight, **image), {}

    def curated_loss(iteration, indices):
        """Eq. 10 on curated videos; of some the prompt is dropped."""
        x0, context, image = curated_batch(config.seed, iteration, indices)
        return flow_loss(iteration, indices, x0, drop_contexts(context, config, iteration, indices, empty), **image)

    def rwr_loss(iteration, indices):
        """Eq. 10 on own samples, each weighted by exp(reward)."""
        j = data.order(len(own_x0), config.seed, iteration, indices, global_batch).to(runtime.device)
        return flow_loss(iteration, indices, own_x0[j], own_context[j], own_weights.to(runtime.device)[j],
                        **{name: z[j] for name, z in own_image.items()})

    def reward_loss(iteration, indices):
        """Alg. 1's reward update, or ReFL's, on the prompts of the curated set."""
        _, context, image = curated_batch(config.seed + 1, iteration, indices)
        x_T = common.noise(shards.latent_shape, config.seed, "x_T", iteration, indices).to(runtime.device)
        if config.rewarded_step == "per_video":
            drawn = prfl.draw_steps(config.seed, iteration, N, global_batch, config.trajectory_part)    # of all ranks
        else:
            drawn = torch.tensor([prfl.draw_step(config.seed, iteration, N, config.trajectory_part)]).expand(global_batch)
        how = dict(longest=int(drawn.max()), rollout_passes=config.rollout_passes, shift=config.shift,
                   reward_weight=config.reward_weight, loss=config.reward_loss, **image)
        with runtime.autocast():
            if config.method == "refl":
                loss, reward = refl_baseline.refl_update_loss(policy, pixel_reward, vae, x_T, context, drawn[indices], N,
                                                              checkpointing=config.decoder_checkpointing, **how)
            else:
                loss, reward = prfl.reward_update_loss(policy, pavrm, x_T, context, drawn[indices], N,
                                                       grad_steps=config.grad_steps, **how)
        return loss, {"reward": reward.mean(), "rewarded_step": drawn[indices].float().mean().to(runtime.device)}

    def update(name, loss_fn, iteration):
        """One optimizer update: backward over the accumulated batches, one clip, one step."""
        clock, cpu_clock = time.perf_counter(), time.process_time()
        optimizer.zero_grad()
        rows = []
        for micro in range(accumulation):
            loss, extra = loss_fn(iteration, runtime.indices(config.batch_size, micro))
            common.check_finite(loss.detach(), f"the {name} loss", iteration + 1)
            (loss / accumulation).backward()
            rows.append({f"{name}_loss": loss.detach(), **extra})
        norm = common.average_and_clip_gradients(policy.parameters(), config.max_grad_norm, iteration + 1)
        optimizer.step()
        means = {key: torch.stack([row[key].float() for row in rows]).mean() for key in rows[0]}
        common.all_reduce_mean_(list(means.values()))
        return {**{key: value.item() for key, value in means.items()}, f"{name}_grad_norm": norm,
                f"{name}_seconds": time.perf_counter() - clock,
                f"{name}_cpu_seconds": time.process_time() - cpu_clock}     # of all threads, whatever else runs

    updates = {"rwr": rwr_loss} if config.method == "rwr" else {"sft": curated_loss}
    if config.method in ("prfl", "refl"):
        updates = (updates if config.sft_updates else {}) | {"reward": reward_loss}
    export = partial(lora.export, policy, alpha=config.lora_alpha, kind=config.export)

    # ---- the loop
    validate = config.num_validation and validation.make_validation(config, runtime, policy, shards, held, export)
    log = runs.start_run(config, state["step"] if resume else None, shards)     # last: now the run folder changes
    bar = common.progress(config.max_train_steps, config.method, initial=state["step"])
    if validate and not resume:
        log.log(0, **validate(policy, 0, log))
    for iteration in range(state["step"], config.max_train_steps):
        left = 1 - iteration / config.max_train_steps if config.lr_scheduler == "linear" else 1.0
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * left
        metrics = {"learning_rate": config.learning_rate * left}
        for name, loss_fn in updates.items():
            metrics |= update(name, loss_fn, iteration)

        done = iteration + 1
        last = done == config.max_train_steps
        if validate and (done % config.validation_steps == 0 or last):
            metrics |= validate(policy, done, log)
            last |= metrics.get("validation_since_best", 0) >= (config.patience or math.inf)
        log.log(done, **metrics)
        bar.set_postfix({k: f"{metrics[k]:.3f}" for k in ("reward", "sft_loss", "rwr_loss") if k in metrics})
        bar.update()
        if done % config.checkpointing_steps == 0 or last:
            parallel.save_checkpoint(config.output_dir, done, {"transformer": export}, policy, optimizer, config, config.keep)
        if last:
            break
    bar.close()
    wrote = export(Path(config.output_dir) / "transformer")
    if runtime.rank == 0:
        print(f"wrote {wrote}")
    common.teardown()


if __name__ == "__main__":
    common.cli(main, Config, __doc__)
