"""What keeps PRFL from collapsing? This script trains with variants of PRFL that are not flags of
train_align.py.

    python -m study.why --variant noise --reward runs/reward/reward --output_dir runs/why/noise
    python -m study.why --variant ema --resume latest
    python -m study.reproduce why           all variants but words, leaps and direct_align, on one seed

Each variant could prevent the collapse, or explain why coarse rollouts prevent it:
noise        adds Gaussian noise of strength (1 - t) to the exact rollout's state: does the spread of the
             states matter?
exact_last   makes the last step before the rewarded one exact, after a coarse rollout: does the blur where
             the rewarded step starts matter?
no_rollout   starts the rewarded step at a noised curated clip: must the states be the generator's own?
ema          validates and writes an average of the weights over iterations, with factor strength
pull         adds strength (v - v_ref)^2 in the rewarded step; v_ref is the untrained generator's velocity
ceiling      uses the loss -min(r, strength), so nothing is learned from a reward above strength
words        leaves each word of a prompt out with probability strength and shuffles the others, in both
             updates: does this help with unseen wordings (evaluate.py --split reworded)?
moments      has one AdamW for the SFT updates and another for the reward updates: what does sharing cost?
none         gives the same numbers as train_align.py --method prfl, so a variant differs in nothing else

Two more are other methods' updates, brought into the latent space (study/rivals.py compares them):
leaps        LeapAlign (arXiv 2604.15311): two states of a sampled trajectory are drawn. The generator leaps
             with gradients from the first state to the second, and from there to a video, which the reward
             judges
direct_align Direct-Align (of SRPO, arXiv 2509.06942): noise is added to a sampled video and remembered. A
             step with gradients starts from this noisy video; then the same noise is taken away, and the
             reward judges the result

--rewarded_step per_video draws a step for each video of a batch, instead of one for the whole batch.

The script runs on the embedded world, in one process. Each iteration makes an SFT update and a reward update
with the random draws of train_align.py. The script writes what train_align.py writes: metrics.jsonl,
transformer/, checkpoints and samples/.

Axes: b batch, c channels, f frames, h height, w width, l text tokens.
"""
import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch

import common
import data
import flow
import prfl
from common import InputError, arg
from families import load_text_encoder
from formats import runs
from formats.weights import SHIPPED
from model import export_transformer, load_transformer
from pavrm import load_pavrm
from scale import parallel
from validation import make_validation
from world import clips

BASE = SHIPPED["t2v"]
# what --strength is if it is not given
STRENGTH = {"noise": 0.2, "ema": 0.98, "pull": 1.0, "ceiling": 2.0, "words": 0.15}
VARIANTS = ("none", "noise", "exact_last", "no_rollout", "ema", "pull", "ceiling", "words", "moments",
            "leaps", "direct_align")
DISCOUNT = 0.3                          # factor of the gradient that the second leap passes to the first


@dataclass
class Config:
    variant: str = arg("none", "what is changed in the reward update; the list above explains the variants",
                       choices=VARIANTS)
    strength: float | None = arg(None, "strength of noise, pull, ceiling or words, or factor of ema; "
                                 "default: " + ", ".join(f"{name} {x:g}" for name, x in STRENGTH.items()),
                                 at_least=0)
    rewarded_step: str = arg("per_batch", "per_batch: one random step for the whole batch (Alg. 1); "
                             "per_video: one for each video, spread evenly over the trajectory",
                             choices=("per_batch", "per_video"))
    rollout_passes: int = arg(0, "the rollout takes at most this many long Euler steps; 0: it takes the N "
                              "steps one by one (Alg. 1)", at_least=0)
    reward_loss: str = arg("linear", "loss of the reward's logit r: linear is -r (Alg. 1), logsigmoid is "
                           "-log sigmoid(r), sigmoid_hinge is the released code's",
                           choices=tuple(prfl.REWARD_LOSSES))
    reward: str = arg(str(BASE / "reward"), "folder of the reward model")
    output_dir: str = arg("runs/why", "run folder")
    curated_dir: str | None = arg(None, "folder for the curated clips; those that are there already are used "
                                  "again. Default: <output_dir>/curated")
    num_curated: int = arg(1024, "number of curated clips to render", above=0)
    num_inference_steps: int = arg(16, "N, the number of Euler steps in a rollout", above=0)
    learning_rate: float = arg(1e-4, "AdamW's learning rate", above=0)
    lr_scheduler: str = arg("constant", "constant keeps the learning rate; linear lets it fall to 0 at "
                            "--max_train_steps", choices=("constant", "linear"))
    max_train_steps: int = arg(480, "number of iterations", above=0)
    batch_size: int = arg(32, "curated videos per SFT update, and prompts per reward update", above=0)
    max_grad_norm: float = arg(1.0, "the gradient of each update is clipped to this norm", above=0)
    mixed_precision: str = runs.precision_flag()
    checkpointing_steps: int = arg(40, "iterations between checkpoints", above=0)
    validation_steps: int = arg(40, "iterations between validations", above=0)
    num_validation: int = arg(256, "number of videos per validation; 0: none", at_least=0)
    resume_from_checkpoint: str | None = arg(None, "continue from a checkpoint: its folder, or 'latest' (the "
                                             "last one in --output_dir)", alias="resume")
    seed: int = arg(0, "seed of order, times, noise and rewarded steps", at_least=0)


def draw_steps(seed, iteration, num_steps, batch):
    """A rewarded step for each video of the batch -> int64 [b], spread evenly over the trajectory.

    The trajectory is cut into b equal stretches. Each video has one of them, and its step is uniform within
    the stretch.
    """
    stretch = torch.randperm(batch, generator=common.random_generator(seed, "reward steps", iteration))
    within = common.uniform(seed, "reward steps", iteration, range(batch))
    place = (stretch + within) / batch                                                         # [b] in [0, 1)
    return (1 + (place * num_steps).long()).clamp(max=num_steps)


@torch.no_grad()
def rollout_to_each(policy, x, context, num_steps, stop, passes):
    """Like flow.rollout, but each video has its own last step, stop [b]. A video that has arrived waits: its
    dt is 0."""
    times = flow.schedule(num_steps, device=x.device)
    stride = math.ceil(num_steps / passes) if passes else 1
    for i in range(0, int(stop.max()), stride):
        t, t_next = times[stop.clamp(max=i)], times[stop.clamp(max=i + stride)]                 # [b]
        x = flow.euler_step(x, policy(x, t, context), t, t_next)
    torch.clear_autocast_cache()  # torch before 2.13 would use the weights cast here in a pass with gradients
    return x


def other_words(prompt, share, generator):
    """The prompt without a random share of its words, and the others in a random order. At least one word
    stays."""
    words = prompt.split()
    order = torch.randperm(len(words), generator=generator).tolist()
    stay = torch.rand(len(words), generator=generator) >= share
    return " ".join([words[i] for i in order if stay[i]] or [words[order[0]]])


def start_state(config, policy, x_T, context, first, curated, eps):
    """Where the rewarded step of each video starts, x_{s+dt} [b, c, f, h, w], without gradients.

    x_T [b, c, f, h, w]: noise. context [b, l, d_text]. first [b]: the number of steps before the rewarded
    one. curated [b, c, f, h, w]: x0 of curated clips with the same prompts. eps, as large: what the variant
    noise adds.
    """
    N, times = config.num_inference_steps, flow.schedule(config.num_inference_steps, device=x_T.device)
    if config.variant == "no_rollout":
        return flow.add_noise(curated, x_T, times[first])
    if config.variant == "exact_last":
        before = (first - 1).clamp(min=0)
        x = rollout_to_each(policy, x_T, context, N, before, config.rollout_passes)
        with torch.no_grad():                     # a video whose first step is rewarded does not move: dt = 0
            return flow.euler_step(x, policy(x, times[before], context), times[before], times[first])
    x = rollout_to_each(policy, x_T, context, N, first, config.rollout_passes)
    if config.variant == "noise":
        x = x + config.strength * (1 - times[first]).view(-1, 1, 1, 1, 1) * eps
    return x


def leaps_loss(config, policy, pavrm, x_T, context, first, second):
    """LeapAlign's update: -> (loss, reward [b], detached).

    The two leaps start from the trajectory's states after `first` and after `second` of its N steps, 0 <=
    first < second < N. The end of a leap has the value of the trajectory's own state there, and only the
    gradient of the leap. The gradient that reaches the first leap through the second one's input is
    multiplied by DISCOUNT. A video counts more if its leaps end closer to its trajectory: its weight is
    softmax(-d / mean d) of the squared distances d at the end. LeapAlign's abstract leaves open both this
    weight and DISCOUNT.
    """
    N, times = config.num_inference_steps, flow.schedule(config.num_inference_steps, device=x_T.device)
    t_k, t_j, zero = (t.expand(len(x_T)) for t in (times[first], times[second], times[N]))
    states, x, start = [], x_T, 0
    for stop in (first, second, N):
        x = flow.rollout(policy, x, context, N, start=start, stop=stop, passes=config.rollout_passes)
        states.append(x)
        start = stop
    x_k, x_j, x_0 = states
    moved = flow.euler_step(x_k, policy(x_k, t_k, context), t_k, t_j)               # the first leap
    change = moved - moved.detach()                             # 0, with the leap's gradient
    v = policy(x_j + DISCOUNT * change, t_j, context)
    leapt = flow.predict_x0(x_j + change, v, t_j)                                   # the second leap
    r = pavrm(x_0 + leapt - leapt.detach(), zero, context)
    distance = (leapt.detach() - x_0).square().flatten(1).mean(1)                           # [b]
    # every distance is 0 if the second leap is the trajectory's last step
    weight = len(x_T) * (-distance / distance.mean().clamp(min=1e-8)).softmax(0)
    return (weight * prfl.REWARD_LOSSES[config.reward_loss](r)).mean(), r.detach()


def direct_align_loss(config, policy, pavrm, x_T, context, step, eps):
    """Direct-Align's update: -> (loss, reward [b], detached). step, from 1 to N: the step with gradients.
    eps, as large as x_T: the noise that is added and taken away.

    SRPO also compares rewards for prompts with and without words of praise. This is left out, because the
    embedded world has no such words.
    """
    times = flow.schedule(config.num_inference_steps, device=x_T.device)
    x_0 = flow.rollout(policy, x_T, context, config.num_inference_steps, passes=config.rollout_passes)
    t, s = (times[i].expand(len(x_T)) for i in (step - 1, step))
    x_t = flow.add_noise(x_0, eps, t)
    x_s = flow.euler_step(x_t, policy(x_t, t, context), t, s)
    recovered = (x_s - times[step] * eps) / (1 - times[step])   # from Eq. 1; s is below 1
    r = pavrm(recovered, torch.zeros_like(s), context)
    return prfl.REWARD_LOSSES[config.reward_loss](r).mean(), r.detach()


def reward_update_loss(config, policy, base, pavrm, x_T, context, step, curated, eps):
    """prfl.reward_update_loss with the variant in it: -> (loss, reward [b], detached). base: the generator
    before training."""
    times = flow.schedule(config.num_inference_steps, device=x_T.device)
    x = start_state(config, policy, x_T, context, step - 1, curated, eps)
    t, s = times[step - 1], times[step]
    v = policy(x, t, context)
    r = pavrm(flow.euler_step(x, v, t, s), s, context)
    judged = r.clamp(max=config.strength) if config.variant == "ceiling" else r
    loss = prfl.REWARD_LOSSES[config.reward_loss](judged).mean()
    if config.variant == "pull":
        with torch.no_grad():
            v_ref = base(x, t, context)
        loss = loss + config.strength * (v - v_ref).float().square().mean()
    return loss, r.detach()


def main(config):
    common.refuse(config, () if config.variant in STRENGTH else ("strength",),
                  f"with --variant {config.variant}")
    if config.variant == "moments" and config.resume_from_checkpoint:
        raise InputError("--resume: a checkpoint keeps one AdamW, so --variant moments starts anew each time")
    if config.variant in ("leaps", "direct_align") and config.rewarded_step == "per_video":
        raise InputError(f"--variant {config.variant} has one step for the whole batch: leave out "
                         "--rewarded_step per_video")
    config.strength = STRENGTH.get(config.variant) if config.strength is None else config.strength
    if config.variant in ("noise", "pull", "ema", "words") and not (
            0 < config.strength < (1 if config.variant in ("ema", "words") else math.inf)):
        raise InputError(f"--strength {config.strength}: changes nothing, or lets nothing change, with "
                         f"--variant {config.variant}")
    config.model, config.world = str(BASE), "tiny"          # make_validation reads more than the flags here
    config.data, config.judge, config.parallel = None, None, "ddp"
    config.shift, config.guidance_scale, config.guidance_scale_2 = 1.0, 1.0, None
    runtime = common.setup(config.mixed_precision, config.seed)
    if runtime.world_size > 1:
        raise InputError("study.why runs in one process: start it without torchrun")
    frozen = lambda folder: load_transformer(folder).to(runtime.device).eval().requires_grad_(False)
    policy, base = load_transformer(BASE).to(runtime.device).train(), frozen(BASE)
    pavrm = load_pavrm(config.reward, policy).to(runtime.device)
    resume, state = runs.open_checkpoint(config)
    shards = clips.clean_clips(config.curated_dir or Path(config.output_dir) / "curated", config.model,
                               config.num_curated, config.world, config.seed + 500, runtime)
    curated = (shards.labels != 0).nonzero()[:, 0]
    text = load_text_encoder(BASE / "text_encoder").to(runtime.device) if config.variant == "words" else None
    new = lambda: torch.optim.AdamW(policy.parameters(), lr=config.learning_rate, weight_decay=0.0)
    optimizer = new()
    optimizers = {"sft": optimizer, "reward": new() if config.variant == "moments" else optimizer}
    if resume:
        parallel.load_state(resume, state, policy, optimizer)
    average = frozen(resume / "transformer" if resume else BASE) if config.variant == "ema" else policy
    validate = make_validation(config, runtime, policy) if config.num_validation else None
    log = runs.start_run(config, state["step"] if resume else None, shards)
    indices, B, N = range(config.batch_size), config.batch_size, config.num_inference_steps

    def curated_batch(seed, iteration):
        rows = curated[data.order(len(curated), seed, iteration, indices, B)]
        batch = shards.batch(rows)
        if config.variant == "words":
            g = common.random_generator(seed, "words", iteration)
            with torch.no_grad(), torch.autocast(runtime.device.type, enabled=False):
                batch["context"] = text.encode([other_words(shards.rows[i]["prompt"], config.strength, g)
                                                for i in rows.tolist()])
        return batch["latents"].to(runtime.device), batch["context"].to(runtime.device)

    def draw(purpose, iteration):
        return common.noise(shards.latent_shape, config.seed, purpose, iteration, indices).to(runtime.device)

    def sft_loss(iteration):
        """Eq. 10 on curated videos."""
        x0, context = curated_batch(config.seed, iteration)
        t = common.uniform(config.seed, "sft t", iteration, indices).to(runtime.device)
        return prfl.sft_loss(policy, x0, draw("sft x1", iteration), t, context), {}

    def reward_loss(iteration):
        x0, context = curated_batch(config.seed + 1, iteration)
        if config.rewarded_step == "per_video":
            step = draw_steps(config.seed, iteration, N, B)
        else:
            step = torch.tensor([prfl.draw_step(config.seed, iteration, N)]).expand(B)
        x_T, eps = draw("x_T", iteration), draw("why noise", iteration)
        if config.variant == "leaps":
            drawn = torch.randperm(N, generator=common.random_generator(config.seed, "leaps", iteration))
            first, second = sorted(drawn[:2].tolist())
            loss, reward = leaps_loss(config, policy, pavrm, x_T, context, first, second)
        elif config.variant == "direct_align":
            loss, reward = direct_align_loss(config, policy, pavrm, x_T, context, int(step[0]), eps)
        else:
            loss, reward = reward_update_loss(config, policy, base, pavrm, x_T, context, step, x0, eps)
        return loss, {"reward": reward.mean().item(), "rewarded_step": step.float().mean().item()}

    def update(name, loss_fn, iteration):
        """Makes one optimizer update, as train_align.py does."""
        clock, cpu_clock = time.perf_counter(), time.process_time()
        optimizers[name].zero_grad()
        with runtime.autocast():
            loss, extra = loss_fn(iteration)
        common.check_finite(loss.detach(), f"the {name} loss", iteration + 1)
        loss.backward()
        norm = common.average_and_clip_gradients(policy.parameters(), config.max_grad_norm, iteration + 1)
        optimizers[name].step()
        return {f"{name}_loss": loss.item(), **extra, f"{name}_grad_norm": norm,
                f"{name}_seconds": time.perf_counter() - clock,
                f"{name}_cpu_seconds": time.process_time() - cpu_clock}

    def export(path):
        export_transformer(average, path, dtype=torch.float32)

    bar = common.progress(config.max_train_steps, config.variant, initial=state["step"])
    if validate and not resume:
        log.log(0, **validate(average, 0))
    for iteration in range(state["step"], config.max_train_steps):
        learning_rate = config.learning_rate
        if config.lr_scheduler == "linear":
            learning_rate *= 1 - iteration / config.max_train_steps
        for group in (*optimizers["sft"].param_groups, *optimizers["reward"].param_groups):
            group["lr"] = learning_rate
        metrics = {"learning_rate": learning_rate}
        for name, loss_fn in (("sft", sft_loss), ("reward", reward_loss)):
            metrics |= update(name, loss_fn, iteration)
        if average is not policy:
            with torch.no_grad():
                torch._foreach_lerp_(list(average.parameters()), list(policy.parameters()),
                                     1 - config.strength)
        done = iteration + 1
        if validate and (done % config.validation_steps == 0 or done == config.max_train_steps):
            metrics |= validate(average, done)
        log.log(done, **metrics)
        bar.set_postfix(reward=f"{metrics['reward']:.3f}")
        bar.update()
        if done % config.checkpointing_steps == 0 or done == config.max_train_steps:
            parallel.save_checkpoint(config.output_dir, done, {"transformer": export}, policy, optimizer,
                                     config, with_weights=average is not policy)
    bar.close()
    export(Path(config.output_dir) / "transformer")
    print(f"wrote {Path(config.output_dir) / 'transformer'}")


if __name__ == "__main__":
    common.cli(main, Config, __doc__, prog="python -m study.why")
