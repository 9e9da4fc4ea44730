"""Stage 2: align the generator. `--method prfl` is Algorithm 1; `refl`, `sft` and `rwr` are the baselines beside it.

    python train_align.py                                               PRFL on the embedded world
    python train_align.py --method sft --max_train_steps 240            as many updates as 120 iterations of PRFL
    python train_align.py --method refl --frames first --reward runs/reward_rgb/reward
    torchrun --nproc_per_node=8 train_align.py --data clips_encoded --reward runs/reward/reward --parallel fsdp
    python train_align.py --task i2v --reward runs/reward_i2v/reward    the image-to-video generator
    python train_align.py --resume latest

prfl: each iteration an SFT update on curated videos, then a reward update at a random step of a rollout.
refl: the same, but the reward judges decoded pixels of the clean video predicted at a late step.
sft:  each iteration one flow-matching update on curated videos (Eq. 10).
rwr:  each iteration one flow-matching update on the generator's own samples, weighted by exp(reward).
Without --data the curated set is clean clips of the embedded world, written as mp4 and encoded like anybody's clips;
with it, the shards' clips that are not labelled 0.
Writes <output_dir>/transformer, metrics.jsonl, and at each validation samples/step-*.png: fixed prompts, fixed noise.

Axes: b batch, c channels, f frames, h height, w width, l text tokens.
"""
import time
from dataclasses import dataclass
from pathlib import Path

import torch

import common
import data
import lora
import parallel
import prfl
import refl_baseline
import rwr_baseline
import world
from common import InputError, arg
from model import export_transformer, load_transformer
from pavrm import load_pavrm
from validation import make_validation
from weights import TASKS, resolve_model

METHODS = ("prfl", "refl", "sft", "rwr")


@dataclass
class Config:
    method: str = arg("prfl", "what to train with", choices=METHODS)
    task: str | None = arg(None, "which shipped generator, without --model: t2v, or i2v (image-to-video)", choices=TASKS)
    model: str | None = arg(None, "another generator: a folder with transformer/ (and text_encoder/, vae/ "
                            "for the embedded world)")
    reward: str | None = arg(None, "folder of the reward model; without, <model>/reward; refl: /reward_rgb_<frames>")
    data: str | None = arg(None, "curated shards from `data.py encode`; without, clean clips of the embedded world")
    output_dir: str = arg("runs/align", "run folder")
    size: str = arg("tiny", "size of the embedded world (without --data)", choices=tuple(world.SIZES))
    num_curated: int = arg(1024, "curated clips to render (without --data)", above=0)
    curated_dir: str | None = arg(None, "where curated clips are kept, or found; without, <output_dir>/curated")
    num_samples: int = arg(2048, "own samples that rwr weights", above=0)
    num_inference_steps: int = arg(16, "N, Euler steps of a rollout; the paper has 40", above=0)
    reward_weight: float = arg(1.0, "lambda of Alg. 1; Adam and clipping make its size matter little", above=0)
    recipe: str = arg("paper", "prfl and refl: the paper's Alg. 1 to the letter, or steady, which needs no stopping in time: "
                      "sets the three flags below where they are not given", choices=tuple(prfl.RECIPES))
    rewarded_step: str | None = arg(None, "one random step for the whole batch (Alg. 1), or one for each video, spread "
                                    "evenly over the trajectory", choices=("per_batch", "per_video"))
    rollout_passes: int | None = arg(None, "most Euler steps of the rollout without gradients, each a longer one; 0: every "
                                     "step (Alg. 1)", at_least=0)
    reward_loss: str | None = arg(None, "-lambda r (linear, Alg. 1), -log sigmoid(r), or the released code's",
                                  choices=tuple(prfl.REWARD_LOSSES))
    trajectory_part: str | None = arg(None, "steps that can be rewarded (Table 3); without, full, and late for refl",
                                      choices=tuple(prfl.PARTS))
    grad_steps: int = arg(1, "prfl: steps with gradients before the reward; 1 is Alg. 1", above=0)
    frames: str = arg("first", "refl: what is decoded and judged", choices=refl_baseline.FRAMES)
    decoder_checkpointing: bool = arg(False, "refl: decode video by video, long ones in chunks, twice")
    sft_updates: bool = arg(True, "prfl's and refl's SFT update, which keeps the reward from being hacked (Alg. 1)")
    learning_rate: float = arg(1e-4, "AdamW's, the best in results/table1.md; the paper has 5e-6 at 14B", above=0)
    weight_decay: float = arg(0.0, "AdamW's", at_least=0)
    max_train_steps: int = arg(120, "iterations; of prfl and refl, each is two updates", above=0)
    batch_size: int = arg(32, "videos, and prompts, per update and rank (30 in all in the paper)", above=0)
    gradient_accumulation_steps: int = arg(1, "batches per update; SFT and reward gradients never mix", above=0)
    max_grad_norm: float = arg(1.0, "each update's gradient is clipped to this norm", above=0)
    mixed_precision: str = arg("bf16", "autocast dtype; weights, optimizer and rollout state are fp32",
                               choices=("no", "bf16"))
    gradient_checkpointing: bool = arg(False, "recompute each block in the backward pass")
    parallel: str = arg("ddp", "under torchrun: ddp keeps policy (16 bytes a weight: itself, gradient, Adam) and reward "
                        "model whole on each GPU; fsdp, 1 / GPUs of them", choices=parallel.KINDS)
    lora_rank: int = arg(0, "train adapters of this rank (such as 16) beside the frozen q, k, v, o of each attention, "
                         "often at 10 times the learning rate; 0 trains every weight", at_least=0)
    lora_alpha: float | None = arg(None, "adapters are scaled by lora_alpha / lora_rank; without, by 1", above=0)
    checkpointing_steps: int = arg(40, "iterations between checkpoints", above=0)
    keep: int = arg(2, "checkpoints that stay, the newest", above=0)
    validation_steps: int = arg(40, "iterations between validations (embedded world)", above=0)
    num_validation: int = arg(128, "videos of a validation; 0 for none", at_least=0)
    resume_from_checkpoint: str | None = arg(None, "'latest' or a checkpoint folder", alias="resume")
    seed: int = arg(0, "seed of order, t, noise and steps", at_least=0)


def main(config):
    unused = ("grad_steps",) if config.method == "refl" else ("frames", "decoder_checkpointing")
    common.refuse(config, unused, f"with --method {config.method}")
    for name, value in prfl.RECIPES[config.recipe].items():
        if getattr(config, name) is None:
            setattr(config, name, value)
    runtime = common.setup(config.mixed_precision, config.seed)
    policy = load_transformer(resolve_model(config)).train()
    lora.add(policy, config.lora_rank, config.lora_alpha, config.seed)
    parallel.shard(policy, runtime, config.parallel)
    policy.gradient_checkpointing = config.gradient_checkpointing
    if config.method == "refl":
        vae = refl_baseline.load_decoder(config.model, policy.config["out_dim"]).to(runtime.device)
        reward_model = refl_baseline.load_pixel_reward(config.reward or f"{config.model}/reward_rgb_{config.frames}",
                                                       config.frames, policy.config["text_dim"]).to(runtime.device)
    elif config.method != "sft":
        reward_model = load_pavrm(config.reward or f"{config.model}/reward", policy)
        parallel.shard(reward_model, runtime, config.parallel)
        reward_model.trunk.gradient_checkpointing = config.gradient_checkpointing
    resume = config.resume_from_checkpoint and common.resolve_checkpoint(config.output_dir,
                                                                         config.resume_from_checkpoint)
    state = common.load_state(resume) if resume else {"step": 0}
    part = config.trajectory_part or ("late" if config.method == "refl" else "full")
    prfl.steps_of(part, config.num_inference_steps)                                         # fails early if it must

    shards = data.Shards(config.data) if config.data else data.clean_clips(
        config.curated_dir or Path(config.output_dir) / "curated", config.model, config.num_curated, config.size, config.seed + 500, runtime)
    shards.require_fit(policy)
    curated = (shards.labels != 0).nonzero()[:, 0]              # good or unlabelled: what is called bad is not curated
    if not len(curated):
        raise InputError(f"{shards.folder}: every clip is labelled 0; alignment needs good ones")
    if config.method == "rwr":
        own_x0, own_context, own_weights, own_image = rwr_baseline.weighted_samples(
            config, runtime, policy, reward_model, shards, curated)
    params = [p for p in policy.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=config.learning_rate, weight_decay=config.weight_decay)
    if resume:
        parallel.load_state(resume, state, policy, optimizer)
    common.start_run(config, state["step"] if resume else None)
    log = common.MetricsLog(config.output_dir, state["step"] if resume else None)
    validate = make_validation(config, runtime) if config.num_validation and not config.data else None
    accumulation = config.gradient_accumulation_steps
    global_batch = config.batch_size * runtime.world_size * accumulation

    def curated_batch(seed, step, indices):
        """-> x0 [b, c, f, h, w], context [b, l, d_text], and {y, clip} of an image-to-video model"""
        batch = shards.batch(curated[data.order(len(curated), seed, step, indices, global_batch)])
        x0, context = batch["latents"].to(runtime.device), batch["context"].to(runtime.device)
        return x0, context, data.image_inputs(policy.config, batch, runtime.device)

    def sft_loss(step, indices):
        """Eq. 10 on curated videos, or RWR's weighted version on own samples."""
        if config.method == "rwr":
            j = data.order(len(own_x0), config.seed, step, indices, global_batch).to(runtime.device)
            x0, context, weight = own_x0[j], own_context[j], own_weights[j]
            image = {name: z[j] for name, z in own_image.items()}
        else:
            (x0, context, image), weight = curated_batch(config.seed, step, indices), None
        t = common.uniform(config.seed, "sft t", step, indices).to(runtime.device)
        x1 = common.noise(x0.shape[1:], config.seed, "sft x1", step, indices).to(runtime.device)
        with runtime.autocast():
            return prfl.sft_loss(policy, x0, x1, t, context, weight, **image), {}

    def reward_loss(step, indices):
        """Alg. 1's reward update, or ReFL's, on the prompts of the curated set."""
        _, context, image = curated_batch(config.seed + 1, step, indices)
        x_T = common.noise(shards.latent_shape, config.seed, "x_T", step, indices).to(runtime.device)
        if config.rewarded_step == "per_video":
            steps = prfl.draw_steps(config.seed, step, config.num_inference_steps, global_batch, part)      # of all ranks
            s, longest = steps[indices], int(steps.max())
        else:
            s = longest = prfl.draw_step(config.seed, step, config.num_inference_steps, part)
        how = dict(longest=longest, rollout_passes=config.rollout_passes, reward_weight=config.reward_weight,
                   loss=config.reward_loss, **image)
        with runtime.autocast():
            if config.method == "refl":
                loss, reward = refl_baseline.refl_update_loss(
                    policy, reward_model, vae, x_T, context, s, config.num_inference_steps,
                    checkpointing=config.decoder_checkpointing, **how)
            else:
                loss, reward = prfl.reward_update_loss(policy, reward_model, x_T, context, s, config.num_inference_steps,
                                                       grad_steps=config.grad_steps, **how)
        return loss, {"reward": reward.mean(), "rewarded_step": torch.as_tensor(s, device=runtime.device).float().mean()}

    def update(name, loss_fn, step):
        """One optimizer update: backward over the accumulated batches, one clip, one step."""
        clock, cpu_clock = time.perf_counter(), time.process_time()
        optimizer.zero_grad()
        total = {}
        for micro in range(accumulation):
            loss, extra = loss_fn(step, runtime.indices(config.batch_size, micro))
            common.check_finite(loss.detach(), f"the {name} loss", step + 1)
            (loss / accumulation).backward()
            for key, value in {f"{name}_loss": loss.detach(), **extra}.items():
                total[key] = total.get(key, 0) + value.float() / accumulation
        norm = common.clip_gradients(policy.parameters(), config.max_grad_norm, step + 1)
        optimizer.step()
        common.average(list(total.values()))
        return {**{k: v.item() for k, v in total.items()}, f"{name}_grad_norm": norm,
                f"{name}_seconds": time.perf_counter() - clock,
                f"{name}_cpu_seconds": time.process_time() - cpu_clock}     # of all threads, whatever else runs

    def export(path, state):
        export_transformer(policy, path, dtype=torch.float32, state=lora.merge(state, config.lora_alpha))
        lora.save(state, path.parent, config.lora_alpha)        # the adapters, if there are any

    bar = common.progress(config.max_train_steps, config.method, initial=state["step"])
    if validate and not resume:
        log.log(0, **validate(policy, 0))
    for step in range(state["step"], config.max_train_steps):
        metrics = {"learning_rate": config.learning_rate}
        if config.method in ("sft", "rwr") or config.sft_updates:
            metrics |= update("rwr" if config.method == "rwr" else "sft", sft_loss, step)
        if config.method in ("prfl", "refl"):
            metrics |= update("reward", reward_loss, step)

        done = step + 1
        if validate and (done % config.validation_steps == 0 or done == config.max_train_steps):
            metrics |= validate(policy, done)
        log.log(done, **metrics)
        bar.set_postfix({k: f"{metrics[k]:.3f}" for k in ("reward", "sft_loss", "rwr_loss") if k in metrics})
        bar.update()
        if done % config.checkpointing_steps == 0 or done == config.max_train_steps:
            parallel.save_checkpoint(config.output_dir, done, {"transformer": export}, policy, optimizer, config, config.keep)
    bar.close()
    weights = parallel.full_state(policy)
    if runtime.rank == 0:
        export(Path(config.output_dir) / "transformer", weights)
        print(f"wrote {Path(config.output_dir) / 'transformer'}")
    common.teardown()


if __name__ == "__main__":
    common.cli(main, Config, __doc__)
