"""Stage 2: align the generator. --method prfl is Algorithm 1; the other methods are baselines.

    python train_align.py                                           PRFL, embedded world, the steady recipe
    python train_align.py --recipe paper --max_train_steps 100      Algorithm 1 to the letter, stopped in time
    python train_align.py --method sft --learning_rate 3e-4 --max_train_steps 960     as many updates as PRFL
    python train_align.py --method refl --frames_decoded first --reward runs/reward_rgb/reward
    python train_align.py --method nft                              or grpo: reinforcement learning
    torchrun --nproc_per_node=8 train_align.py --data encoded --reward runs/reward/reward --parallel fsdp
    python train_align.py --task i2v --reward runs/reward_i2v/reward
    python train_align.py --model Wan2.2-A14B --expert low --data encoded --reward runs/reward/reward
    python train_align.py --resume latest

What an iteration makes:

    prfl    an SFT update on curated videos, then a reward update at a random step of a rollout
    refl    as prfl, but the reward judges decoded pixels of the clean video that is predicted at a late step
    sft     one flow-matching update on curated videos (Eq. 10)
    rwr     one flow-matching update on the generator's own samples, each weighted by exp(reward); the samples
            are made before the first iteration and kept in <output_dir>/own_samples
    nft     an SFT update, then a batch of samples, several for each prompt, made by a moving average of the
            generator, and --inner_updates updates on this batch (DiffusionNFT)
    grpo    as nft, but the generator itself makes the samples, and the updates are those of Flow-GRPO

Without --data the curated videos are clean clips of the embedded world, which are written as mp4 and encoded
like a user's clips. With --data the curated videos are all clips of the shards that are not labelled 0. So
unlabelled clips, and clips that are neither good nor bad, are curated too.

The script writes to <output_dir>: checkpoint-<step>/ every --checkpointing_steps; transformer/, the weights
after the last iteration, which need not be the best; metrics.jsonl; samples/, which each validation makes
from the same prompts and the same noise; and best/, the weights whose samples the annotator or --judge scored
highest.

Axes: b batch, c channels, f frames, h height, w width, l text tokens.
"""
import dataclasses
import math
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

import common
import data
import experts
import flow
import prfl
import refl_baseline
import rl_baselines
import validation
from common import InputError, arg
from families import null_context, of_config, sampling_defaults, training_defaults, video_size
from formats import runs
from formats.encoders import drop_contexts
from formats.weights import TASKS, resolve_model, transformer_folder
from model import image_inputs, load_transformer
from pavrm import load_pavrm
from scale import lora, parallel
from world import clips, scene


@dataclass
class Config(rl_baselines.Flags, runs.Flags, validation.Flags, lora.Flags, parallel.Flags):
    method: str = arg("prfl", "training method; the list above says what each one does",
                      choices=("prfl", "refl", "sft", "rwr", "nft", "grpo"))
    task: str | None = arg(None, "t2v (text-to-video) or i2v (image-to-video). Without --model it chooses "
                           "the shipped generator; with a --model that can do both, it chooses the task. "
                           "Default: the --model's own task, else t2v", choices=TASKS)
    model: str | None = arg(None, "folder of another generator, with transformer/, vae/ and text_encoder/; "
                            "default: the shipped one for --task")
    reward: str | None = arg(None, "folder of the reward model. Default: reward/ in the generator's folder; "
                             "for --method refl, reward_rgb_first/ or reward_rgb_all/ there, by "
                             "--frames_decoded (neither is shipped)", only="!method sft")
    expert: str | None = arg(None, "which of the two experts of Wan2.2 A14B is trained; one that is not "
                             "trained still takes part in rollouts. The reward model is made from the "
                             "low-noise expert. In the embedded world training the high-noise expert brings "
                             "more (results/wan22.md). Default: low", choices=experts.CHOICES)
    data: str | None = arg(None, "curated shards from `data.py encode`; default: clean clips of the embedded "
                           "world")
    output_dir: str = arg("runs/align", "run folder")
    world: str = arg("tiny", "size of the embedded world's clips: tiny is 32x32, mid is 48x48, small is "
                     "64x64 pixels", choices=tuple(scene.SIZES), only="!data")
    num_curated: int = arg(1024, "number of curated clips to render", above=0, only="!data")
    curated_dir: str | None = arg(None, "folder where rendered clips are kept, and used again if they are "
                                  "there; default: <output_dir>/curated", only="!data")
    num_samples: int = arg(2048, "number of samples that RWR draws from the untrained generator and weights "
                           "by reward", at_least=2, only="method rwr")
    num_inference_steps: int | None = arg(None, "N, the number of Euler steps in a rollout; default: 16, or "
                                          "for Wan the paper's 40", above=0,
                                          only="!method sft or !num_validation 0")
    shift: float | None = arg(None, "moves the times of the Euler steps towards noise; 1 spaces them evenly. "
                              "Default: 1; Wan2.1: 3, or 5 from 720P on; Wan2.2 TI2V-5B: 5; Wan2.2 A14B: 12, "
                              "or 5 for i2v", above=0, at_most=100, only="!method sft or !num_validation 0")
    reward_weight: float = arg(1.0, "lambda of Alg. 1, the factor of the reward loss; in prfl and refl it "
                               "has little effect, because clipping and Adam rescale the gradient", above=0,
                               only="method prfl refl nft grpo")
    recipe: str | None = arg(None, "paper: Alg. 1 to the letter, which has to be stopped in time; steady: "
                             "ours, which stays good for longer (results/endurance.md). The recipe sets "
                             "--rollout_passes, --reward_loss and --lr_scheduler unless they are given. "
                             "Default: steady for prfl, paper for refl", choices=tuple(prfl.RECIPES),
                             only="method prfl refl")
    rollout_passes: int | None = arg(None, "the rollout without gradients takes at most this many long Euler "
                                     "steps, each of which replaces several of the N; 0: it takes the N "
                                     "steps one by one (Alg. 1). Default: 0 with the paper recipe, 4 with "
                                     "steady, 10 for nft and grpo", at_least=0,
                                     only="method prfl refl nft grpo")
    reward_loss: str | None = arg(None, "loss as a function of the reward's logit r: linear is -lambda r "
                                  "(Alg. 1), logsigmoid is -log sigmoid(r), sigmoid_hinge is the released "
                                  "code's. Default: linear with the paper recipe, logsigmoid with steady",
                                  choices=tuple(prfl.REWARD_LOSSES), only="method prfl refl")
    trajectory_part: str | None = arg(None, "part of the trajectory from which the rewarded step is drawn "
                                      "(Table 3); default: full, for refl late", choices=tuple(prfl.THIRDS),
                                      only="method prfl refl")
    frames_decoded: str = arg("first", "which frames are decoded and judged: the first, or all",
                              choices=refl_baseline.FRAMES, only="method refl")
    decoder_checkpointing: bool = arg(False, "save memory: decode in chunks, and decode each chunk again in "
                                      "the backward pass", only="method refl")
    sft_updates: bool = arg(True, "make the SFT update of each iteration, which guards against reward "
                            "hacking for a time (Alg. 1, results/hacking.md)",
                            only="method prfl refl nft grpo")
    context_dropout: float = arg(0.0, "share of the prompts in SFT updates that are replaced by the empty "
                                 "prompt, so that guidance stays usable", at_least=0, below=1,
                                 only="method sft or method prfl refl nft grpo, sft_updates")
    learning_rate: float | None = arg(None, "AdamW's learning rate. Default: for Wan the paper's 5e-6; in "
                                      "the embedded world 2e-4 for prfl with the steady recipe, else 1e-4 "
                                      "(results/table1.md has 3e-4 for sft)", above=0)
    lr_scheduler: str | None = arg(None, "constant keeps the learning rate; linear lets it fall to 0 at "
                                   "--max_train_steps. Default: linear with the steady recipe, else constant",
                                   choices=("constant", "linear"))
    weight_decay: float = arg(0.0, "AdamW's weight decay", at_least=0)
    max_train_steps: int | None = arg(None, "number of iterations; each makes two updates in prfl and refl, "
                                      "and more in nft and grpo. Default: for Wan the paper's 800; in the "
                                      "embedded world 480 for prfl with the steady recipe, else 120", above=0)
    batch_size: int | None = arg(None, "videos (in a reward update: prompts) per batch on each GPU, or on "
                                 "each group of --sequence_parallel GPUs; default: 32, for Wan 1", above=0)
    gradient_accumulation_steps: int | None = arg(None, "batches per update. Default: 1; for Wan the number "
                                                  "that brings one update on all GPUs together nearest to 30 "
                                                  "videos", above=0)
    max_grad_norm: float = arg(1.0, "the gradient of each update is clipped to this norm", above=0)
    checkpointing_steps: int = arg(40, "iterations between checkpoints", above=0)
    seed: int = arg(0, "seed of the order of clips, times, noise and rewarded steps", at_least=0)


def resolve(config):
    """Resolves the flags -> (the settings: config with the flags that were left open filled in; {flag: where
    its value comes from}; the shards of --data or None).

    Raises InputError for flags that cannot work together.
    """
    filled = dataclasses.replace(config)
    model = resolve_model(filled)                               # it also fills in filled.task
    dit_config = transformer_folder(model, filled.task)[1]
    experts.check_flags(config, dit_config)
    shards = data.Shards(config.data).relabel() if config.data else None
    latent_shape = shards.latent_shape if shards else scene.LATENT_SHAPES[config.world]
    sources = {"--model" if config.model else "the shipped generator": {"model": model, "task": filled.task}}
    if config.method in ("prfl", "refl"):
        is_refl = config.method == "refl"
        recipe = config.recipe or ("paper" if is_refl else "steady")
        sources[f"--method {config.method}"] = {"recipe": recipe,
                                                "trajectory_part": "late" if is_refl else "full"}
        sources[f"the {recipe} recipe"] = prfl.RECIPES[recipe]
        if recipe == "steady" and not is_refl:
            family = of_config(dit_config)
            sources[f"the steady recipe, {family.name}"] = family.steady
    if config.method in rl_baselines.LEARNERS:
        sources[f"--method {config.method}"] = rl_baselines.DEFAULTS[config.method]
    if config.method != "sft":
        name = f"reward_rgb_{config.frames_decoded}" if config.method == "refl" else "reward"
        sources["the generator's folder"] = {"reward": f"{model}/{name}"}
    if "boundary_ratio" in dit_config:
        sources["two experts"] = {"expert": "low", "guidance_scale_2": config.guidance_scale}
    sources["the number of clips"] = {"num_validation": validation.default_number(shards)}
    sources[of_config(dit_config).name] = (
        sampling_defaults(dit_config, video_size(dit_config, latent_shape))
        | training_defaults(dit_config, "align", config.batch_size, config.sequence_parallel))
    sources["our default"] = {"lr_scheduler": "constant"}
    settings, origin = common.settle(config, sources)
    validation.check_flags(config, settings.num_validation)
    if settings.trajectory_part:
        prfl.steps_of_part(settings.trajectory_part, settings.num_inference_steps,
                           trained_steps(settings, dit_config))
    return settings, origin, shards


def trained_steps(config, dit_config):
    """The range of the Euler steps that the --expert that trains makes; None if the generator does not have
    two experts."""
    if not config.expert:
        return None
    times = flow.schedule(config.num_inference_steps, config.shift)
    return experts.steps_of_expert(config.expert, times, dit_config["boundary_ratio"])


def split_curated(config, shards):
    """-> (indices of the clips to train on, indices of the clips held out for validation). Clips labelled 0
    are in neither."""
    curated = (shards.labels != 0).nonzero()[:, 0]
    if not len(curated):
        raise InputError(f"{shards.folder}: every clip is labelled 0; alignment needs good ones")
    if not config.data:
        return curated, curated[:0]                     # the embedded world validates on other sentences
    return validation.hold_out(config, shards, curated)


def main(config):
    # ---- the settings, the generator that is trained, its reward, and the videos it learns from
    runtime = common.setup(config.mixed_precision, config.seed, config.sequence_parallel)
    config, origin, shards = resolve(config)
    resume, state = runs.open_checkpoint(config)
    policy = load_transformer(config.model, load_now=False, task=config.task).train()
    # A reward model or a judge that does not fit is refused here, before weights are read.
    if config.method not in ("sft", "refl"):
        pavrm = load_pavrm(config.reward, policy, load_now=False)
    if config.judge:
        load_pavrm(config.judge, policy, load_now=False)
    for dit, adapters in experts.to_train(policy, config):
        lora.add(dit, config.lora_rank, config.lora_alpha, config.seed, adapters)
    parallel.shard(policy, runtime, config)
    if config.method == "refl":
        pixel_reward, vae = refl_baseline.load_reward_and_decoder(config, policy, runtime)
    elif config.method != "sft":
        pavrm = parallel.shard(pavrm, runtime, config)
    accumulation = config.gradient_accumulation_steps
    global_batch = config.batch_size * runtime.world_size // config.sequence_parallel * accumulation
    N, expert_steps = config.num_inference_steps, trained_steps(config, policy.config)
    rl_baselines.check(config, global_batch, expert_steps)
    if not config.data:
        folder = config.curated_dir or Path(config.output_dir) / "curated"
        shards = clips.clean_clips(folder, config.model, config.num_curated, config.world, config.seed + 500,
                                   runtime)
    data.require_fit(shards, policy, config.model)
    curated, held_out = split_curated(config, shards)
    if runtime.rank == 0:
        print(f"{global_batch} videos per update: {runtime.world_size // config.sequence_parallel} x "
              f"--batch_size {config.batch_size} x --gradient_accumulation_steps {accumulation}", flush=True)
    empty = None
    if config.context_dropout:
        empty = null_context(policy.config, "empty", config.data, config.model, runtime.device)

    def curated_batch(seed, iteration, indices, group=1):
        """-> (x0 [b, c, f, h, w], context [b, l, d_text], what an image-to-video model is given beside the
        prompt). group: how many neighbours in the global batch are the same clip."""
        places = [i // group for i in indices]
        rows = data.order(len(curated), seed, iteration, places, global_batch // group)
        batch = shards.batch(curated[rows])
        x0, context = batch["latents"].to(runtime.device), batch["context"].to(runtime.device)
        return x0, context, image_inputs(policy.config, batch, runtime.device)

    if config.method == "rwr":
        # Before parallel.load_state reads trained weights, because the untrained policy makes the samples.
        rows = data.order(len(curated), config.seed + 1, 0, range(config.num_samples), global_batch)
        own, own_weights = rl_baselines.own_samples(Path(config.output_dir) / "own_samples", policy, pavrm,
                                                    shards, curated[rows], config, runtime)
        pavrm.to("meta")                            # frees its memory: all rewards are known now
    # One AdamW serves both updates, as in Alg. 1. Their gradients never mix, but AdamW's moments average over
    # both.
    trained = [p for p in policy.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=config.learning_rate, weight_decay=config.weight_decay)
    if config.method in rl_baselines.LEARNERS:
        learner = rl_baselines.LEARNERS[config.method](policy, pavrm, optimizer, config, runtime,
            lambda iteration, indices: curated_batch(config.seed + 1, iteration, indices,
                                                     config.group_size)[1:],
            shards.latent_shape, global_batch, expert_steps)
    if resume:
        parallel.load_state(resume, state, policy, optimizer)

    # ---- the losses: each -> (loss, {metric: tensor}); indices are places in the global batch
    def flow_loss(iteration, indices, x0, context, weight=None, **conditions):
        t = common.uniform(config.seed, "sft t", iteration, indices).to(runtime.device)
        if config.expert:
            t = experts.times_of(config.expert, t, policy.boundary, config.seed, iteration)
        x1 = common.noise(x0.shape[1:], config.seed, "sft x1", iteration, indices).to(runtime.device)
        with runtime.autocast():
            return prfl.sft_loss(policy, x0, x1, t, context, weight, **conditions), {}

    def curated_loss(iteration, indices):
        """Eq. 10 on curated videos, of which a share (--context_dropout) gets the empty prompt."""
        x0, context, conditions = curated_batch(config.seed, iteration, indices)
        context = drop_contexts(context, config, iteration, indices, empty)
        return flow_loss(iteration, indices, x0, context, **conditions)

    def rwr_loss(iteration, indices):
        """Eq. 10 on the generator's own samples, each weighted by exp(reward)."""
        j = data.order(len(own), config.seed, iteration, indices, global_batch)
        batch = own.batch(j)
        x0, context = batch["latents"].to(runtime.device), batch["context"].to(runtime.device)
        conditions = image_inputs(policy.config, batch, runtime.device)
        return flow_loss(iteration, indices, x0, context, own_weights[j].to(runtime.device), **conditions)

    def reward_loss(iteration, indices):
        """Alg. 1's reward update, or ReFL's, on the prompts of the curated set."""
        # seed + 1, so that the clips come in another order than in the SFT updates
        _, context, conditions = curated_batch(config.seed + 1, iteration, indices)
        x_T = common.noise(shards.latent_shape, config.seed, "x_T", iteration, indices).to(runtime.device)
        # the same step on all ranks
        step = prfl.draw_step(config.seed, iteration, N, config.trajectory_part, expert_steps)
        how = dict(rollout_passes=config.rollout_passes, shift=config.shift,
                   reward_weight=config.reward_weight, loss=config.reward_loss, **conditions)
        with runtime.autocast():
            if config.method == "refl":
                loss, reward = refl_baseline.refl_update_loss(policy, pixel_reward, vae, x_T, context, step,
                    N, checkpointing=config.decoder_checkpointing, **how)
            else:
                loss, reward = prfl.reward_update_loss(policy, pavrm, x_T, context, step, N, **how)
        return loss, {"reward": reward.mean(), "rewarded_step": torch.tensor(step, device=runtime.device)}

    def update(name, loss_fn, iteration):
        """One optimizer update: the backward passes of the accumulated batches, one clipping of the gradient,
        one step of AdamW -> {metric: number}"""
        clock, cpu_clock = time.perf_counter(), time.process_time()
        rows = []
        for micro in range(accumulation):
            loss, extra = loss_fn(iteration, runtime.indices(config.batch_size, micro))
            common.check_finite(loss.detach(), f"the {name} loss", iteration + 1)
            (loss / accumulation).backward()
            rows.append({f"{name}_loss": loss.detach(), **extra})
        norm = common.average_and_clip_gradients(policy.parameters(), config.max_grad_norm, iteration + 1)
        optimizer.step()
        optimizer.zero_grad()               # gradients make room for samples, of this method or of validation
        means = {key: torch.stack([row[key].float() for row in rows]).mean() for key in rows[0]}
        common.all_reduce_mean_(list(means.values()))
        metrics = {key: value.item() for key, value in means.items()}
        metrics[f"{name}_grad_norm"] = norm
        metrics[f"{name}_seconds"] = time.perf_counter() - clock
        metrics[f"{name}_cpu_seconds"] = time.process_time() - cpu_clock    # of all threads of this process
        return metrics

    def iterate(iteration):
        """Makes the updates of one iteration, in order; yields the {metric: number} of each."""
        if config.method == "rwr":
            yield update("rwr", rwr_loss, iteration)
        elif config.sft_updates:
            yield update("sft", curated_loss, iteration)
        if config.method in ("prfl", "refl"):
            yield update("reward", reward_loss, iteration)
        elif config.method in rl_baselines.LEARNERS:
            yield learner.collect(iteration)
            for k in range(config.inner_updates):
                yield update(config.method, partial(learner.loss, k), iteration)

    export = partial(lora.export, policy, alpha=config.lora_alpha, kind=config.export)

    # ---- the loop
    validate = None
    if config.num_validation:
        validate = validation.make_validation(config, runtime, policy, shards, held_out, export)
    log = runs.start_run(config, state["step"] if resume else None, shards)     # now the run folder changes
    common.print_settings(config, origin)
    bar = common.progress(config.max_train_steps, config.method, initial=state["step"])
    if validate and not resume:
        log.log(0, **validate(policy, 0, log))
    for iteration in range(state["step"], config.max_train_steps):
        learning_rate = config.learning_rate
        if config.lr_scheduler == "linear":
            learning_rate *= 1 - iteration / config.max_train_steps
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        metrics = {"learning_rate": learning_rate}
        for found in iterate(iteration):
            for name, value in found.items():                   # several updates of one kind: seconds add up
                metrics[name] = value + (metrics.get(name, 0) if name.endswith("seconds") else 0)

        done = iteration + 1
        last = done == config.max_train_steps
        if validate and (done % config.validation_steps == 0 or last):
            metrics |= validate(policy, done, log)
            last |= metrics.get("validation_since_best", 0) >= (config.patience or math.inf)
        log.log(done, **metrics)
        bar.set_postfix({k: f"{metrics[k]:.3f}" for k in ("reward", "sft_loss", "rwr_loss") if k in metrics})
        bar.update()
        if done % config.checkpointing_steps == 0 or last:
            parallel.save_checkpoint(config.output_dir, done, {"transformer": export}, policy, optimizer,
                                     config, config.keep)
        if last:
            break
    bar.close()
    wrote = export(Path(config.output_dir) / "transformer")
    if runtime.rank == 0:
        print(f"wrote {' and '.join(map(str, wrote))}")
    common.teardown()


if __name__ == "__main__":
    common.cli(main, Config, __doc__)
