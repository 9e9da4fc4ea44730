"""The methods beside PRFL that take no gradient through the reward: RWR, DiffusionNFT and Flow-GRPO.

All three let PAVRM judge finished latents of the generator, at t = 0, and decode nothing.

RWR   flow matching on samples of the untrained generator, each weighted by exp(reward). This is the simplest
      way to use a reward, and the weakest in results/table1.md: it can only prefer some of what the untrained
      generator already makes.
NFT   DiffusionNFT (arXiv 2509.16117): flow matching on samples of an old policy, towards the good ones and
      away from the bad ones. The old policy follows the generator as a moving average.
GRPO  Flow-GRPO (arXiv 2505.05470): a few steps of the rollout are stochastic, so that their results have a
      probability. If a video is better than the others of its prompt, the steps that led to it become more
      probable.

An iteration of NFT or GRPO makes a batch of samples, `group_size` of each prompt, and then `inner_updates`
updates on them. Before that, train_align.py makes an SFT update, as for PRFL.

    NFT    x_T --rollout of the old policy--> x_0 --PAVRM--> r;   x_0 --noised to t--> x_t --> v_theta, v_old
    GRPO   x_T --Euler steps--> x_t --stochastic steps--> x_s --Euler steps--> x_0 --PAVRM--> r

If a generator has two experts, both make the samples, each its own steps. The times of NFT's updates, and the
stochastic steps of GRPO, are those of the --expert that trains.

Axes: b batch, c channels, f frames, h height, w width, l text tokens, m samples of all ranks.
"""
import hashlib
import math
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

import common
import experts
import flow
from common import InputError, arg
from formats import lock, runs
from formats.shards import Shards, write_shards
from model import image_inputs, pin


@dataclass
class Flags:
    """Flags of train_align.py for NFT and GRPO."""
    group_size: int = arg(8, "number of samples of each prompt, which are compared with each other; it must "
                          "divide the videos per update", at_least=1, only="method nft grpo")
    inner_updates: int = arg(4, "updates on each batch of samples; with grpo it is also the number of "
                             "stochastic steps in a rollout, because each gets one update", above=0,
                             only="method nft grpo")
    advantage_clip: float | None = arg(None, "a sample's advantage, which is how much better it is than the "
                                       "others of its prompt in standard deviations, is clipped at +- this "
                                       "value; default: nft 1, grpo 5", above=0, only="method nft grpo")
    nft_reward: str = arg("advantage", "how good a sample is, from 0 to 1: its advantage in its group, "
                          "scaled by --advantage_clip, or the probability that PAVRM gives it",
                          choices=("advantage", "probability"), only="method nft")
    nft_beta: float = arg(1.0, "good samples train v_old + beta (v - v_old), bad ones v_old - beta "
                          "(v - v_old), where v is the generator's velocity and v_old the old policy's; a "
                          "smaller beta lets the generator move further", above=0, only="method nft")
    old_decay: float = arg(0.5, "share of the old policy that stays in each iteration, while the rest "
                           "follows the generator; 0: the old policy is the generator itself", at_least=0,
                           below=1, only="method nft")
    noise_level: float = arg(0.7, "a in sigma = a sqrt(t / (1 - t)), the noise of the stochastic steps",
                             above=0, only="method grpo")
    clip_range: float = arg(1e-4, "how far the ratio of probabilities may move from 1", above=0,
                            only="method grpo")
    kl_weight: float = arg(0.04, "weight of the divergence from the generator as it started; 0: none",
                           at_least=0, only="method grpo")


SHARD_BYTES = 2 ** 27           # size of a shard of RWR's own samples, as in data.py
DEFAULTS = {  # published values, for those of these flags of train_align.py that are not given
    "nft": {"rollout_passes": 10, "advantage_clip": 1.0},               # Algorithm 1; 10 steps: Sec. 4.1
    "grpo": {"rollout_passes": 10, "advantage_clip": 5.0},              # Sec. 4.3; 5: the released code
}


# ---- RWR
def rwr_weights(rewards):
    """-> (weights [m], the effective sample size as a share of m)

    rewards [m]: logits. The weights are exp(reward), scaled to mean 1. With a constant reward RWR is SFT on
    own samples.
    """
    # The largest reward is subtracted so that exp cannot overflow.
    weights = torch.exp(rewards.double() - rewards.max().double())
    weights = weights / weights.mean()
    return weights.float(), (weights.sum() ** 2 / weights.square().sum() / len(weights)).item()


def own_samples(folder, policy, pavrm, shards, rows, config, runtime):
    """Makes samples of the untrained policy -> (their Shards, their `rwr_weights` [m] on the CPU).

    The samples are made once and kept in `folder`, each with its reward. After a kill, whole shards stay, and
    only the missing samples are made. rows int64 [m]: the clips of `shards` from which the samples take their
    prompts and, if the policy is image-to-video, their first frames. config: train_align.py's. The ranks make
    config.batch_size samples at a time and rank 0 writes them, so that the folder is the same for any number
    of ranks. Raises InputError if `folder` was made with other settings, and FloatingPointError if a reward
    is not finite.
    """
    m, b, done = len(rows), config.batch_size, 0
    if runtime.rank == 0:
        lock.require_ours(folder, "shards", ("shards.json",))
        folder_lock = lock.hold(folder, "shards")               # until all samples are there
        settings = settings_of_samples(config, shards, rows)
        done = count_samples(folder, settings)
    done = written = common.gather(done)[0]
    at_once = runtime.indices(b, 1)[0] - runtime.indices(b, 0)[0]                       # samples of all ranks
    turns = range(math.ceil((m - done) / at_once))
    sends, waiting = runtime.rank % runtime.sequence_parallel == 0, []
    for i in common.progress(turns, f"rwr samples, batches of up to {at_once}") if turns else ():
        # The last turn is filled up with the first samples, because under fsdp all ranks must call the model
        # equally often.
        j = [(done + place) % m for place in runtime.indices(b, i)]
        batch = shards.batch(rows[j])
        context = batch["context"].to(runtime.device)                                           # [b, l, d]
        conditions = image_inputs(policy.config, batch, runtime.device)
        x0 = flow.sample(policy, shards.latent_shape, context, config.seed + 2, j, config.num_inference_steps,
                         shift=config.shift, batch_size=b, autocast=runtime.autocast, **conditions)
        with torch.no_grad(), runtime.autocast():
            reward = pavrm(x0, torch.zeros(b, device=runtime.device), context, **conditions).float()    # [b]
        common.check_finite(reward.sum(), "the reward", 0)
        made = {"latents": x0, "context": context, "reward": reward}
        if "y" in conditions:
            made["condition"] = conditions["y"][:, 4:]          # from which image_inputs makes the same y
        if "clip_tokens" in conditions:
            made["clip_fea"] = conditions["clip_tokens"]
        part = [batch["prompt"], {name: x.cpu() for name, x in made.items()}] if sends else [[], {}]
        for prompts, columns in common.gather(part, to=0):      # on rank 0; nothing on the others
            samples = [dict(zip(columns, values)) for values in zip(*columns.values())]
            waiting += zip(prompts, samples)
        del waiting[m - written:]                               # what filled up the last turn
        while waiting:
            # whole batches, so that a run that continues after a kill makes the same shards
            count = max(1, SHARD_BYTES // (b * sum(x.nbytes for x in waiting[0][1].values()))) * b
            if len(waiting) < min(count, m - written):
                break
            write_samples(folder, waiting[:count], shards.fps, settings)
            written += len(waiting[:count])
            del waiting[:count]
    if runtime.rank == 0:
        folder_lock.close()
    common.gather(None)                                         # the other ranks wait for the shards
    own = Shards(folder)
    weights, effective = rwr_weights(own.batch(range(m), ["reward"])["reward"])
    if runtime.rank == 0:
        print(f"rwr: {m} own samples in {folder}, effective sample size {effective:.0%}")
    return own, weights


def settings_of_samples(config, shards, rows):
    """The settings on which own samples depend, as shards.json has them. Those that only change how samples
    are rounded, --mixed_precision and --batch_size, are not among them: a resumed run may change them."""
    names = ("task", "num_samples", "num_inference_steps", "shift", "seed")
    clips = hashlib.blake2b(repr(rows.tolist()).encode(), digest_size=8).hexdigest()
    return {name: getattr(config, name) for name in names} | runs.contents(config, shards) | {"clips": clips}


def count_samples(folder, settings):
    """How many samples lie in the whole shards of `folder`. Raises InputError if they were made with other
    settings."""
    if not (Path(folder) / "shards.json").exists():
        return 0
    try:
        found = Shards(folder)
    except InputError as error:
        raise InputError(f"{folder}: RWR's own samples are damaged ({error}): remove this folder, and they "
                         "are made again") from None
    changed = [name for name in settings if found.settings.get(name) != settings[name]]
    if changed:
        raise InputError(f"{folder}: RWR's own samples were made with other {', '.join(changed)}: remove "
                         "this folder, or name another --output_dir")
    return len(found)


def write_samples(folder, samples, fps, settings):
    """Writes one more shard. samples: [(prompt, {name: tensor})]"""
    prompts, values = zip(*samples)
    columns = {name: torch.stack([value[name] for value in values]) for name in values[0]}
    write_shards(folder, columns.pop("latents"), columns.pop("context"), [None] * len(prompts), prompts,
                 fps=fps, settings=settings, append=True, **columns)


# ---- what NFT and GRPO share
def advantages(rewards, group_size, clip, by_group=True):
    """How much better each sample is than the others of its prompt, in standard deviations (arXiv 2505.05470,
    Eq. 4) -> [m].

    rewards [m]: logits; the group_size samples of a prompt are neighbours, a group. A = (r - mean) / std,
    clipped at +-clip. The mean is that of the group, and so is the standard deviation if by_group; otherwise
    it is that of all m samples.
    """
    groups = rewards.view(-1, group_size)                                                   # [prompts, group]
    std = groups.std(1, correction=0, keepdim=True) if by_group else rewards.std(correction=0)
    return ((groups - groups.mean(1, keepdim=True)) / (std + 1e-4)).clamp(-clip, clip).flatten()


@torch.no_grad()
def swap(weights, others):
    """Exchanges the values of two lists of tensors, in place."""
    for p, q in zip(weights, others):
        kept = p.clone()
        p.copy_(q)
        q.copy_(kept)
    torch.clear_autocast_cache()                        # autocast would still use copies of the old values


@contextmanager
def in_place_of(weights, others):
    """In a `with` block of this, the trained weights have the values of `others`. After the block, all are as
    before, bit for bit."""
    swap(weights, others)
    try:
        yield
    finally:
        swap(weights, others)


def check(config, global_batch, expert_steps=None):
    """Raises InputError for flags of NFT and GRPO that cannot work with a global batch of this size.
    expert_steps: as in `Learner`."""
    if config.method not in LEARNERS:
        return
    if global_batch % config.group_size:
        raise InputError(f"--group_size {config.group_size} does not divide the {global_batch} videos per "
                         "update (--batch_size times --gradient_accumulation_steps, on all GPUs): choose one "
                         f"of {common.divisors(global_batch)}, or another --gradient_accumulation_steps")
    if config.group_size == 1 and config.nft_reward == "advantage":
        raise InputError("--group_size 1: a sample is compared with the others of its prompt: give 2 or "
                         "more")
    if config.method == "grpo" and config.inner_updates >= config.num_inference_steps:
        raise InputError(f"--inner_updates {config.inner_updates}: so many steps of a rollout are "
                         f"stochastic, and --num_inference_steps {config.num_inference_steps} is not more")
    needed = config.inner_updates if config.method == "grpo" else 1
    if expert_steps is not None and len(expert_steps) < needed:
        raise InputError(f"--expert {config.expert} makes {len(expert_steps)} of the "
                         f"{config.num_inference_steps} steps of a rollout, and --method {config.method} "
                         f"needs {needed}: give more --num_inference_steps"
                         f"{' or fewer --inner_updates' * (needed > 1)}")


class Learner:
    """Makes a batch of samples in each iteration, and the losses of the updates on these samples.

    prompts(iteration, indices) -> (context [b, l, d_text], conditions of an image-to-video policy). indices
    are places in the global batch; the places of a group are neighbours and have the same prompt.
    expert_steps: the range of the Euler steps that train (experts.steps_of_expert); None if the generator
    does not have two experts.
    """

    def __init__(self, policy, pavrm, optimizer, config, runtime, prompts, latent_shape, global_batch,
                 expert_steps=None):
        self.policy, self.pavrm, self.optimizer = policy, pavrm, optimizer
        self.config, self.runtime, self.prompts = config, runtime, prompts
        self.latent_shape, self.global_batch, self.expert_steps = latent_shape, global_batch, expert_steps
        self.trained = [p for p in policy.parameters() if p.requires_grad]
        self.batches, self.weights = {}, None

    def collect(self, iteration):
        """Makes this iteration's samples, a batch at a time, and their rewards, and compares the rewards of
        all ranks -> metrics."""
        clock, cpu_clock = time.perf_counter(), time.process_time()
        self.batches, rewards = {}, {}
        self.begin(iteration)
        for micro in range(self.config.gradient_accumulation_steps):
            indices = self.runtime.indices(self.config.batch_size, micro)
            context, conditions = self.prompts(iteration, indices)
            with torch.no_grad(), self.runtime.autocast():
                batch = self.sample(iteration, indices, context, conditions)
                t = torch.zeros(len(indices), device=context.device)
                r = self.pavrm(batch["x0"], t, context, **conditions)
            self.batches[indices[0]] = batch | {"context": context, "conditions": conditions}
            rewards |= dict(zip(indices, r.tolist()))
        for of_rank in common.gather(rewards):
            rewards |= of_rank
        r = torch.tensor([rewards[i] for i in range(self.global_batch)])                                # [m]
        common.check_finite(r.sum(), "the reward", iteration + 1)
        self.weights = self.weigh(r).to(self.runtime.device)
        return {"reward": r.mean().item(), "sampling_seconds": time.perf_counter() - clock,
                "sampling_cpu_seconds": time.process_time() - cpu_clock}

    def noise(self, purpose, iteration, indices):
        x = common.noise(self.latent_shape, self.config.seed, purpose, iteration, indices)
        return x.to(self.runtime.device)

    def loss(self, k, iteration, indices):
        """The loss of update k on these samples -> (lambda times the loss, a scalar with gradients; {metric:
        number})."""
        with self.runtime.autocast():
            loss, logged = self.loss_of(k, self.weights[indices], **self.batches[indices[0]])
        return self.config.reward_weight * loss, logged

    def begin(self, iteration):
        """Is called before the samples of an iteration are made."""


# ---- NFT
def nft_loss(v, v_old, x0, x1, r, beta, given=0):
    """DiffusionNFT's objective (arXiv 2509.16117, Eq. 5) -> a scalar.

        r |v+ - (x_1 - x_0)|^2 + (1 - r) |v- - (x_1 - x_0)|^2
        v+ = (1 - beta) v_old + beta v,   v- = (1 + beta) v_old - beta v

    v and v_old [b, c, f, h, w]: velocities of the generator and of the old policy at x_t; v_old has no
    gradients. r [b] in [0, 1]: how good x_0 is. given: as in flow_matching_loss. The implicit positive policy
    v+ learns from good samples, and the implicit negative policy v- from bad samples. The minimum is at
    v = v_old + (2 / beta) E[r (x_1 - x_0 - v_old)] (Eq. 6).
    """
    positive = (1 - beta) * v_old + beta * v
    negative = (1 + beta) * v_old - beta * v
    return (flow.flow_matching_loss(positive, x0, x1, r, given)
            + flow.flow_matching_loss(negative, x0, x1, 1 - r, given))


class NFT(Learner):
    """DiffusionNFT, Algorithm 1 of arXiv 2509.16117.

    Three differences, on purpose: the loss compares velocities at t ~ U(0, 1), not x_0 with adaptive weights.
    The share of the old policy that stays is constant, not rising. There is no second loss that holds the
    generator near its start.
    """

    def __init__(self, policy, pavrm, optimizer, *more):
        super().__init__(policy, pavrm, optimizer, *more)
        for p in self.trained:              # "old" is beside AdamW's moments, so that checkpoints hold it
            optimizer.state[p] = {"step": torch.tensor(0.0), "exp_avg": torch.zeros_like(p),
                                  "exp_avg_sq": torch.zeros_like(p), "old": p.detach().clone()}

    @torch.no_grad()
    def begin(self, iteration):
        """Lets the old policy follow the generator: old <- decay old + (1 - decay) theta."""
        self.old = [self.optimizer.state[p]["old"] for p in self.trained]
        for p, old in zip(self.trained, self.old):
            old.lerp_(p.to(old.device), 1 - self.config.old_decay)      # an expert may rest on the host

    def sample(self, iteration, indices, context, conditions):
        """-> x0 [b, c, f, h, w], which the old policy samples, and for each update times [b], noise x1 and
        the old policy's velocity at x_t."""
        c, draws = self.config, []
        with in_place_of(self.trained, self.old):
            x0 = flow.rollout(self.policy, self.noise("x_T", iteration, indices), context,
                              c.num_inference_steps, passes=c.rollout_passes, shift=c.shift, **conditions)
            for k in range(c.inner_updates):
                t = common.uniform(c.seed, f"nft t {k}", iteration, indices)
                if self.expert_steps:
                    t = experts.times_of(c.expert, t, self.policy.boundary, c.seed, iteration,
                                         f"nft expert {k}")
                t = t.to(x0.device)
                x1 = self.noise(f"nft x1 {k}", iteration, indices)
                draws.append((t, x1, self.policy(flow.add_noise(x0, x1, t), t, context, **conditions)))
        return {"x0": x0, "draws": draws}

    def weigh(self, r):
        """Logits r [m] -> how good each sample is, in [0, 1]: 1/2 + A / 2, with the advantage A clipped and
        scaled to [-1, 1], as in Algorithm 1; or the sigmoid of r."""
        if self.config.nft_reward == "probability":
            return torch.sigmoid(r)
        clip = self.config.advantage_clip
        return 0.5 + advantages(r, self.config.group_size, clip, by_group=False) / clip / 2

    def loss_of(self, k, r, x0, draws, context, conditions):
        t, x1, v_old = draws[k]
        v = self.policy(flow.add_noise(x0, x1, t), t, context, **conditions)
        return nft_loss(v, v_old, x0, x1, r, self.config.nft_beta, flow.given_frames(conditions)), {}


# ---- GRPO
def sde_step(x, v, t, t_next, noise_level):
    """Flow-GRPO's stochastic step (arXiv 2505.05470, Eq. 9) from t [b] to t_next [b] -> mean [b, c, f, h, w]
    and standard deviation [b, 1, 1, 1, 1] of x_{t - dt}.

        x_{t-dt} = x_t - (v + sigma^2 / (2 t) (x_t + (1 - t) v)) dt + sigma sqrt(dt) eps,  dt = t - t_next
        sigma = a sqrt(t / (1 - t)),  a = noise_level

    In the limit of small steps x_t has at every t the same distribution as with Euler steps. The first step
    is an exception: at t = 1 sigma is infinite, so the sigma of t_next is used, and then sigma^2 dt is a^2
    however small dt is. This makes the variance too large by a^4 / 4 of it.
    """
    t, t_next = (z.float().view(-1, *[1] * (x.ndim - 1)) for z in (t, t_next))
    at = torch.where(t < 1, t, t_next)
    sigma, dt = noise_level * (at / (1 - at)).sqrt(), t - t_next
    drift = v + sigma.square() / (2 * t) * (x + (1 - t) * v)
    return x - drift * dt, sigma * dt.sqrt()


def log_prob(x, mean, std):
    """The log density of x under N(mean, std^2) -> [b], the mean over the elements of x and not their sum.

    The published code takes the mean as well, because a ratio of densities of whole videos would be 0 or
    infinite.
    """
    z = (x - mean) / std
    return (-z.square() / 2 - std.log() - math.log(2 * math.pi) / 2).flatten(1).mean(1)


def grpo_loss(x, mean, std, old_log_prob, advantage, clip_range):
    """-min(ratio A, clip(ratio, 1 - eps, 1 + eps) A) (arXiv 2505.05470, Eq. 5), mean over the batch ->
    (a scalar, the share that is clipped).

    x [b, c, f, h, w]: the latents after a stochastic step. mean, std: those of the same step by the generator
    now. old_log_prob [b]: the log-probability of x when it was sampled. advantage [b]: A. clip_range: eps.
    """
    ratio = (log_prob(x, mean, std) - old_log_prob).exp()                                               # [b]
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    loss = -torch.minimum(ratio * advantage, clipped * advantage)
    return loss.mean(), (clipped * advantage < ratio * advantage).float().mean()


def kl_of_steps(mean, other, std):
    """KL(N(mean, std^2) || N(other, std^2)) [b], as the mean over the elements."""
    return ((mean - other) / std).square().flatten(1).mean(1) / 2


class GRPO(Learner):
    """Flow-GRPO, with few stochastic steps as in its authors' later "Fast" variant.

    The samples of a group share their noise and all steps before the first stochastic step, where they part.
    So only the stochastic steps make the rewards of a group differ, and only they enter the loss.

    Two differences, on purpose: the neighbouring steps that are stochastic are drawn anew in each iteration,
    from the whole trajectory. And each of them gets its own update, so that the ratios of the later steps are
    not 1.
    """

    def __init__(self, policy, pavrm, optimizer, config, *more):
        super().__init__(policy, pavrm, optimizer, config, *more)
        # a checkpoint is read only later, so that a resumed run has the untrained weights here too
        self.start = [p.detach().clone() for p in self.trained] if config.kl_weight else None

    def first_step(self, iteration):
        """How many steps come before the stochastic steps; the same number on all ranks."""
        generator = common.random_generator(self.config.seed, "stochastic steps", iteration)
        steps = self.expert_steps or range(1, self.config.num_inference_steps + 1)
        choices = steps[:len(steps) - self.config.inner_updates + 1]    # a stochastic step for each update
        return choices[int(torch.randint(len(choices), (1,), generator=generator))] - 1

    def sample(self, iteration, indices, context, conditions):
        """-> {"x0": [b, c, f, h, w], "steps", "means"}. steps: for each stochastic step the latents before
        it, its times t and t_next [b], the latents after it, and their log-probability [b]. means: for each
        step its mean under the untrained policy, or None without kl_weight."""
        c, N, first = self.config, self.config.num_inference_steps, self.first_step(iteration)
        how = dict(passes=c.rollout_passes, shift=c.shift)
        groups = [i // c.group_size for i in indices]
        heads = list(dict.fromkeys(groups))     # each group has one rollout, up to where its samples part
        rows = [groups.index(group) for group in heads]
        its_conditions = {name: z[rows] for name, z in conditions.items()}
        x = flow.rollout(self.policy, self.noise("x_T", iteration, heads), context[rows], N, stop=first,
                         **how, **its_conditions)
        x = x[[heads.index(group) for group in groups]]                                     # [b, c, f, h, w]
        times, steps = flow.schedule(N, c.shift, x.device), []
        frame, start = conditions.get("first_frame"), flow.given_frames(conditions)
        for k in range(c.inner_updates):
            t, t_next = (times[first + k + j].expand(len(x)) for j in (0, 1))
            mean, std = sde_step(x, self.policy(x, t, context, **conditions), t, t_next, c.noise_level)
            x_next = pin(mean + std * self.noise(f"sde {k}", iteration, indices), frame)
            steps.append((x, t, t_next, x_next, log_prob(x_next[:, :, start:], mean[:, :, start:], std)))
            x = x_next
        x0 = flow.rollout(self.policy, x, context, N, start=first + c.inner_updates, **how, **conditions)
        means = [None] * len(steps)
        if self.start:
            with in_place_of(self.trained, self.start):
                for k, (x, t, t_next, *_) in enumerate(steps):
                    v = self.policy(x, t, context, **conditions)
                    means[k], _ = sde_step(x, v, t, t_next, c.noise_level)
        return {"x0": x0, "steps": steps, "means": means}

    def weigh(self, r):
        """The advantage of each sample in its group: A = (r - mean) / std."""
        return advantages(r, self.config.group_size, self.config.advantage_clip)

    def loss_of(self, k, advantage, x0, steps, means, context, conditions):
        """The loss of stochastic step k: -min(ratio A, clip(ratio) A) + kl_weight KL."""
        x, t, t_next, x_next, old_log_prob = steps[k]
        start = flow.given_frames(conditions)
        v = self.policy(x, t, context, **conditions)
        mean, std = sde_step(x, v, t, t_next, self.config.noise_level)
        mean, x_next = mean[:, :, start:], x_next[:, :, start:]
        loss, clipped = grpo_loss(x_next, mean, std, old_log_prob, advantage, self.config.clip_range)
        logged = {"grpo_clipped": clipped}
        if self.start:
            kl = kl_of_steps(mean, means[k][:, :, start:], std).mean()
            loss, logged["grpo_kl"] = loss + self.config.kl_weight * kl, kl.detach()
        return loss, logged


LEARNERS = {"nft": NFT, "grpo": GRPO}
