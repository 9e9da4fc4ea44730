"""Stage 2: align the generator. `--method prfl` is Algorithm 1; `sft` and `rwr` are the baselines beside it.

    python train_align.py                                               PRFL on the embedded world
    python train_align.py --method sft --max_train_steps 160            as many updates as 80 iterations of PRFL
    torchrun --nproc_per_node=8 train_align.py --data clips_encoded --reward runs/reward/reward
    python train_align.py --resume latest

prfl: each iteration an SFT update on curated videos, then a reward update at a random step of a rollout.
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
import flow
import prfl
import world
from common import InputError, arg
from model import export_transformer, first_frame_condition, load_text_encoder, load_transformer
from pavrm import load_pavrm
from vae import from_pixels, load_vae, to_pixels

METHODS = ("prfl", "sft", "rwr")


@dataclass
class Config:
    method: str = arg("prfl", "what to train with", choices=METHODS)
    model: str = arg(str(Path(__file__).parent / "checkpoints"),
                     "generator: a folder with transformer/ (and text_encoder/, vae/ for the embedded world)")
    reward: str | None = arg(None, "folder of the reward model (prfl, rwr); without, <model>/reward")
    data: str | None = arg(None, "curated shards from `data.py encode`; without, clean clips of the embedded world")
    output_dir: str = arg("runs/align", "run folder")
    size: str = arg("tiny", "size of the embedded world (without --data)", choices=tuple(world.SIZES))
    num_curated: int = arg(1024, "curated clips to render (without --data)", above=0)
    num_samples: int = arg(2048, "own samples that rwr weights", above=0)
    num_inference_steps: int = arg(16, "N, Euler steps of a rollout; the paper has 40", above=0)
    reward_weight: float = arg(1.0, "lambda of Alg. 1; Adam and clipping make its size matter little", above=0)
    reward_loss: str = arg("linear", "-lambda r (Alg. 1), or a variant", choices=tuple(prfl.REWARD_LOSSES))
    trajectory_part: str = arg("full", "which steps can be rewarded (Table 3)", choices=tuple(prfl.PARTS))
    grad_steps: int = arg(1, "steps with gradients before the reward; 1 is Alg. 1", above=0)
    sft_updates: bool = arg(True, "prfl's SFT update, which keeps the reward from being hacked (Alg. 1)")
    learning_rate: float = arg(3e-5, "AdamW's, the best for prfl in results/table1.md; the paper has 5e-6 at 14B", above=0)
    weight_decay: float = arg(0.0, "AdamW's", at_least=0)
    max_train_steps: int = arg(80, "iterations", above=0)
    batch_size: int = arg(32, "videos, and prompts, per update and rank (30 in all in the paper)", above=0)
    gradient_accumulation_steps: int = arg(1, "batches per update; SFT and reward gradients never mix", above=0)
    max_grad_norm: float = arg(1.0, "each update's gradient is clipped to this norm", above=0)
    mixed_precision: str = arg("bf16", "autocast dtype; weights, optimizer and rollout state are fp32",
                               choices=("no", "bf16"))
    gradient_checkpointing: bool = arg(False, "recompute each block in the backward pass")
    checkpointing_steps: int = arg(40, "iterations between checkpoints", above=0)
    validation_steps: int = arg(40, "iterations between validations (embedded world)", above=0)
    num_validation: int = arg(128, "videos of a validation; 0 for none", at_least=0)
    resume_from_checkpoint: str | None = arg(None, "'latest' or a checkpoint folder", alias="resume")
    seed: int = arg(0, "seed of order, t, noise and steps", at_least=0)


def weighted_samples(config, runtime, policy, pavrm, shards, curated):
    """RWR's data: the untrained policy's own samples of the curated prompts x0 [m, c, f, h, w], their context
    [m, l, d], exp(reward) of each with mean 1 [m], and {y, clip} of an image-to-video model."""
    picked = curated[data.order(len(curated), config.seed + 1, 0, range(config.num_samples), config.num_samples)]
    batch = shards.batch(picked)
    context = batch["context"].to(runtime.device)
    image = data.image_inputs(policy.config, batch, runtime.device)
    x0 = flow.sample(policy, shards.latent_shape, context, config.seed + 2, range(config.num_samples),
                     config.num_inference_steps, autocast=runtime.autocast, **image)
    with torch.no_grad(), runtime.autocast():
        rewards = torch.cat([pavrm(x0[i:i + 128], torch.zeros(len(x0[i:i + 128]), device=runtime.device),
                                   context[i:i + 128], **{name: z[i:i + 128] for name, z in image.items()})
                             for i in range(0, len(x0), 128)])
    common.check_finite(rewards.sum(), "the reward", 0)
    weights, effective = prfl.rwr_weights(rewards)
    if runtime.rank == 0:
        print(f"rwr: {len(x0)} own samples, effective sample size {effective:.0%}")
    return x0, context, weights, image


def make_validation(config, runtime):
    """-> validate(policy, step) -> metrics of fixed held-out prompts and noise, with a strip of samples (rank 0)."""
    n = config.num_validation
    vae = load_vae(f"{config.model}/vae").to(runtime.device)
    text = load_text_encoder(f"{config.model}/text_encoder").to(runtime.device)
    clips, prompts, _ = world.make(n, 900, "clean", config.size, split="test")
    folder = Path(config.output_dir) / "samples"

    @torch.no_grad()
    def validate(policy, step):
        if runtime.rank > 0:
            return {}
        image_to_video = policy.config["model_type"] == "i2v"
        y = first_frame_condition(vae.encode(from_pixels(clips.to(runtime.device)))) if image_to_video else None
        latents = flow.sample(policy, world.LATENT_SHAPES[config.size], text.encode(prompts), 900, range(n),
                              config.num_inference_steps, y=y, autocast=runtime.autocast)
        videos = to_pixels(vae.decode(latents)).cpu()
        folder.mkdir(parents=True, exist_ok=True)
        data.contact_sheet(videos[:8], folder / f"step-{step:06d}.png")
        return world.summary(world.annotate(videos, prompts))

    return validate


def main(config):
    runtime = common.setup(config.mixed_precision, config.seed)
    policy = load_transformer(config.model).to(runtime.device).train()
    policy.gradient_checkpointing = config.gradient_checkpointing
    rewarded = config.method in ("prfl", "rwr")
    pavrm = load_pavrm(config.reward or f"{config.model}/reward", policy).to(runtime.device) if rewarded else None
    if pavrm is not None:
        pavrm.trunk.gradient_checkpointing = config.gradient_checkpointing
    resume = config.resume_from_checkpoint and common.resolve_checkpoint(config.output_dir,
                                                                         config.resume_from_checkpoint)
    state = common.load_state(resume) if resume else {"step": 0}
    prfl.draw_step(config.seed, 0, config.num_inference_steps, config.trajectory_part)     # fails early if it must

    shards = data.Shards(config.data) if config.data else data.clean_clips(
        Path(config.output_dir) / "curated", config.model, config.num_curated, config.size, config.seed + 500, runtime)
    shards.require(channels=policy.config["out_dim"],
                   context_shape=(min(shards.context_shape[0], policy.config["text_len"]),
                                  policy.config["text_dim"]), image_dim=policy.config["image_dim"])
    curated = (shards.labels != 0).nonzero()[:, 0]              # good or unlabelled: what is called bad is not curated
    if not len(curated):
        raise InputError(f"{shards.folder}: every clip is labelled 0; alignment needs good ones")
    if config.method == "rwr":
        own_x0, own_context, own_weights, own_image = weighted_samples(
            config, runtime, policy, pavrm, shards, curated)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
    if resume:
        try:
            policy.load_state_dict(state["policy"])
            optimizer.load_state_dict(state["optimizer"])
        except (KeyError, ValueError, RuntimeError):
            raise InputError(f"--resume_from_checkpoint {resume}: not a checkpoint of this script with this "
                             "--model") from None
        for group in optimizer.param_groups:                    # the flags of this call hold, not the saved ones
            group["lr"], group["weight_decay"] = config.learning_rate, config.weight_decay
    common.start_run(config, state["step"] if resume else None)
    log = common.MetricsLog(config.output_dir, state["step"] if resume else None)
    validate = make_validation(config, runtime) if config.num_validation and not config.data else None
    params = list(policy.parameters())
    accumulation = config.gradient_accumulation_steps
    global_batch = config.batch_size * runtime.world_size * accumulation

    def sft_loss(step, indices):
        """Eq. 10 on curated videos, or RWR's weighted version on own samples."""
        if config.method == "rwr":
            j = data.order(len(own_x0), config.seed, step, indices, global_batch).to(runtime.device)
            x0, context, weight = own_x0[j], own_context[j], own_weights[j]
            image = {name: z[j] for name, z in own_image.items()}
        else:
            batch = shards.batch(curated[data.order(len(curated), config.seed, step, indices, global_batch)])
            x0, context, weight = batch["latents"].to(runtime.device), batch["context"].to(runtime.device), None
            image = data.image_inputs(policy.config, batch, runtime.device)
        t = common.uniform(config.seed, "sft t", step, indices).to(runtime.device)
        x1 = common.noise(x0.shape[1:], config.seed, "sft x1", step, indices).to(runtime.device)
        with runtime.autocast():
            return prfl.sft_loss(policy, x0, x1, t, context, weight, **image), {}

    def reward_loss(step, indices):
        """Alg. 1's reward update on the prompts of the curated set."""
        batch = shards.batch(curated[data.order(len(curated), config.seed + 1, step, indices, global_batch)])
        context = batch["context"].to(runtime.device)
        x_T = common.noise(shards.latent_shape, config.seed, "x_T", step, indices).to(runtime.device)
        s = prfl.draw_step(config.seed, step, config.num_inference_steps, config.trajectory_part)
        with runtime.autocast():
            loss, reward = prfl.reward_update_loss(
                policy, pavrm, x_T, context, s, config.num_inference_steps, reward_weight=config.reward_weight,
                loss=config.reward_loss, grad_steps=config.grad_steps,
                **data.image_inputs(policy.config, batch, runtime.device))
        return loss, {"reward": reward.mean(), "rewarded_step": float(s)}

    def update(name, loss_fn, step):
        """One optimizer update: backward over the accumulated batches, one clip, one step."""
        clock = time.perf_counter()
        optimizer.zero_grad()
        total = {}
        for micro in range(accumulation):
            loss, extra = loss_fn(step, runtime.indices(config.batch_size, micro))
            common.check_finite(loss.detach(), f"the {name} loss", step + 1)
            (loss / accumulation).backward()
            for key, value in {f"{name}_loss": loss.detach(), **extra}.items():
                total[key] = total.get(key, 0) + torch.as_tensor(
                    value, dtype=torch.float32, device=runtime.device) / accumulation
        norm = common.clip_gradients(params, config.max_grad_norm, step + 1)
        optimizer.step()
        common.average(list(total.values()))
        return {**{k: v.item() for k, v in total.items()}, f"{name}_grad_norm": norm,
                f"{name}_seconds": time.perf_counter() - clock}

    bar = common.progress(config.max_train_steps, config.method, initial=state["step"])
    if validate and not resume:
        log.log(0, **{f"validation_{k}": v for k, v in validate(policy, 0).items()})
    for step in range(state["step"], config.max_train_steps):
        metrics = {"learning_rate": config.learning_rate}
        if config.method != "prfl" or config.sft_updates:
            metrics |= update("rwr" if config.method == "rwr" else "sft", sft_loss, step)
        if config.method == "prfl":
            metrics |= update("reward", reward_loss, step)

        done = step + 1
        if validate and (done % config.validation_steps == 0 or done == config.max_train_steps):
            found = validate(policy, done)
            metrics |= {f"validation_{k}": v for k, v in found.items()}
            if found:                                           # rank 0
                bar.write("  ".join([f"iteration {done}"] + [f"{k} {v:.3f}" for k, v in found.items()]))
        log.log(done, **metrics)
        bar.set_postfix({k: f"{metrics[k]:.3f}" for k in ("reward", "sft_loss", "rwr_loss") if k in metrics})
        bar.update()
        if done % config.checkpointing_steps == 0 or done == config.max_train_steps:
            common.save_checkpoint(
                config.output_dir, done, {"transformer": lambda path: export_transformer(policy, path, dtype=torch.float32)},
                {"policy": policy.state_dict(), "optimizer": optimizer.state_dict()}, config, keep=2)
    bar.close()
    if runtime.rank == 0:
        export_transformer(policy, Path(config.output_dir) / "transformer", dtype=torch.float32)
        print(f"wrote {Path(config.output_dir) / 'transformer'}")
    common.teardown()


if __name__ == "__main__":
    common.cli(main, Config, __doc__)
