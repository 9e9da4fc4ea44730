"""Best of n while sampling: candidates start from different noise, and the latent reward chooses among them
on the way.

PAVRM predicts from a half-finished latent whether it will become a good video. So candidates need not be
finished to be compared, and nothing has to be decoded. Every generator that has a reward model can be sampled
like this, aligned or not. There are two ways:

resample    (the default) A video has n places, with one candidate in each. After each step from t = .81 to
            .44 the places are filled anew: each place draws one of the candidates with the probabilities
            softmax(r). So a good candidate fills several places, and a weak one disappears. Copies get new
            noise, so that they become different videos: x_t = (1 - t) x_0 + t x_1. Here x_0 is the clean
            latent to which the velocity of the last Euler step points, and x_1 is the new noise. At t = .38
            the best candidate is chosen and finished alone. (These times are for 16 Euler steps.) This is
            close to LatSearch (arXiv 2603.14526), which resamples at fewer times and compares sums of
            rewards.
drop        Bad candidates are dropped at a few times and never replaced. This takes fewer forward passes for
            the same n. But with the untrained base 8 candidates that are dropped give worse videos than 3
            that are resampled, which take fewer passes. With a generator that was aligned by a good reward
            model no difference could be told (results/search_mismatched.md).

    python sample.py --prompt "a red circle moving to the right" --best_of 4
    python evaluate.py checkpoints --best_of 8 --search drop --drops .75:4,.56:2,.37:1

Axes: m videos, k candidates of each video, c channels, f frames, h height, w width, l text tokens.
"""
from dataclasses import dataclass

import torch

import common
import flow
from common import InputError, arg

FIRST, LAST = 0.8125, 0.375     # times: resampling begins at the first; at the last the best is chosen


@dataclass
class Flags:
    """The flags of sample.py and evaluate.py about the search."""
    best_of: int = arg(1, "candidates made per video; the reward model chooses one of them", above=0)
    search: str = arg("resample", "what happens to candidates that the reward model finds weak. resample: "
                      "after each step from t = .81 to .44, copies of good candidates, with new "
                      "noise, replace them; at .38, or at the nearest time of the schedule, the best one is "
                      "chosen. drop: they are dropped at "
                      "the times of --drops; this takes fewer forward passes for the same number of "
                      "candidates, but with the untrained base 8 that are dropped give worse videos than 3 "
                      "that are resampled",
                      choices=("resample", "drop"), only="!best_of 1")
    drops: str | None = arg(None, "when candidates are dropped: a list of time:number kept. "
                            ".75:4,.56:2,.37:1 keeps 4 at t = .75, 2 at .56 and 1 at .37; 0:1 compares "
                            "finished videos only. Default: half are kept at .75, a quarter at .5625, one at "
                            ".375", only="search drop, !best_of 1")


def drops_of(config):
    """The flags -> the `drops` of best_of. Raises InputError."""
    if config.search == "drop":
        return parse_drops(config.best_of, config.drops)
    return None


def default_drops(n):
    """The drops of best_of for n candidates: half of them stay at t = 3/4, a quarter at 9/16, one at 3/8."""
    drops = [(1.0, n)]
    for t, keep in ((0.75, -(-n // 2)), (0.5625, -(-n // 4)), (0.375, 1)):
        if keep < drops[-1][1]:
            drops.append((t, keep))
    return tuple(drops)


def parse_drops(n, text=None):
    """--best_of n and --drops, such as ".75:4,.56:2,.37:1" (None: default_drops) -> the `drops` of best_of.

    The drops always end with one candidate: if the text keeps more, the last choice is made at the end, at t
    = 0. Raises InputError.
    """
    if text is None:
        return default_drops(n)
    drops = [(1.0, n)]
    for part in text.split(","):
        t_before, kept_before = drops[-1]
        try:
            t_text, keep_text = part.split(":")
            t, keep = float(t_text), int(keep_text)
            fits = 0 <= t < t_before and 0 < keep < kept_before
        except ValueError:
            fits = False
        if not fits:
            raise InputError(f"--drops {text}: {part!r} must be time:number kept, such as .75:{n // 2}; "
                             "times fall from 1 to 0, and each number is below the one before, the first "
                             f"below --best_of {n}")
        drops.append((t, keep))
    if drops[-1][1] > 1:
        drops.append((0.0, 1))
    return tuple(drops)


def passes_per_step(guidance_scale):
    """Forward passes of the generator in one Euler step: guidance needs a second one."""
    return 1 if guidance_scale == 1 else 2


def cost_in_words(n, passes, num_steps, guidance_scale):
    """One line about what a search cost. passes: what best_of returned."""
    times = passes / (num_steps * passes_per_step(guidance_scale))
    return f"best of {n}: {passes:g} forward passes per video, {times:.1f} times those of one candidate"


def choices_of(times, n, drops=None):
    """When the reward chooses among n candidates -> {number of steps made: how many candidates stay}.

    times: those of the Euler steps, from flow.schedule. drops: as in best_of. While candidates are resampled
    all n stay.
    """
    def nearest(t):
        return int((times - t).abs().argmin())

    if n == 1:
        return {}
    if drops:
        return {nearest(t): keep for t, keep in drops[1:]}      # if two are at one step, the last one counts
    last = max(1, nearest(LAST))
    return {step: n for step in range(1, last) if times[step] <= FIRST} | {last: 1}


def resample(x, predicted, r, t, draws, noise):
    """Fills the k places of each video anew -> states [m, k, c, f, h, w].

    x [m, k, c, f, h, w]: the candidates at times t [m]. predicted, as large: the clean latents to which their
    velocities point. r [m, k]: their rewards. draws [m, k]: uniform in [0, 1), one for each place. noise, as
    large as x: for the copies. A candidate that fills several places keeps its state in the first of them.
    """
    m, k = r.shape
    chosen = torch.searchsorted(r.softmax(1).cumsum(1), draws).clamp(max=k - 1)     # [m, k], candidates
    video = torch.arange(m, device=x.device)[:, None]
    renewed = flow.add_noise(predicted[video, chosen], noise, t)                    # Eq. 1
    copies = is_copy(chosen).view(m, k, 1, 1, 1, 1)
    return torch.where(copies, renewed, x[video, chosen])


def is_copy(chosen):
    """chosen [m, k]: the candidate in each place -> bool [m, k], whether an earlier place of the same video
    has the same candidate."""
    same = chosen[:, :, None] == chosen[:, None, :]                                 # [m, place, place]
    return same.tril(-1).any(2)


@torch.no_grad()
def best_of(dit, pavrm, latent_shape, context, seed, indices, num_steps, n, drops=None, *, shift=1.0,
            guidance_scale=1.0, null=None, batch_size=128, max_rows=None, autocast=None, **conditions):
    """-> (the best candidates' latents [m, c, f, h, w], forward passes of dit per video).

    A pass of the reward model counts as the share of dit's blocks that it has. All noise depends only on
    (seed, purpose, step, index, number of the candidate or place). Candidate 0 starts from the noise of
    flow.sample, so with one candidate the result is flow.sample's, and pavrm may be None.

    n: candidates per video. drops: None to resample, or ((1, n), (t, keep), ..., (t, 1)) from default_drops
    or parse_drops: at the step nearest to t the reward keeps `keep` candidates. batch_size: candidates in one
    pass. max_rows: the largest m of all ranks, for models that are sharded over them. The other arguments are
    those of flow.sample.
    """
    m, device = len(indices), context.device
    times = flow.schedule(num_steps, shift)
    choices = choices_of(times, n, drops)
    conditions = {name: z for name, z in conditions.items() if z is not None}
    cost_of_reward = len(pavrm.trunk.blocks) / len(dit.blocks) if n > 1 else 0

    def each(function, step, x):
        """function(step, candidates, their contexts, their conditions) over x [m, k, ...], in batches -> [m,
        k, ...]"""
        k, flat, found = x.shape[1], x.flatten(0, 1), []
        with autocast() if autocast else torch.autocast(device.type, enabled=False):
            for j, counts in common.equal_batches(m * k, batch_size, (max_rows or m) * k):
                video = torch.arange(m * k, device=device)[j] // k
                its_conditions = {name: z[video] for name, z in conditions.items()}
                result = function(step, flat[j], context[video], **its_conditions)
                if counts:
                    found.append(result)
        return torch.cat(found).unflatten(0, (m, -1))

    def next_state(step, x, text, **its_conditions):
        return flow.rollout(dit, x, text, num_steps, start=step - 1, stop=step, shift=shift,
                            guidance_scale=guidance_scale, null=null, **its_conditions)

    def reward_at(step, x, text, **its_conditions):
        return pavrm(x, times[step].expand(len(x)).to(device), text, **its_conditions)

    def noise_for(purpose):
        """-> [m, n, c, f, h, w]"""
        found = [common.noise(latent_shape, seed, purpose, candidate, indices) for candidate in range(n)]
        return torch.stack(found, 1).to(device)

    x, passes = noise_for("sample"), 0
    for step in range(num_steps + 1):                           # number of Euler steps made
        if step > 0:
            before, x = x, each(next_state, step, x)
            passes += passes_per_step(guidance_scale) * x.shape[1]
        if step not in choices:
            continue
        r = each(reward_at, step, x).float().nan_to_num(nan=torch.finfo(torch.float32).min)        # [m, k]
        passes += cost_of_reward * x.shape[1]
        if drops is None and step < max(choices):               # resample; at the last choice one stays
            velocity = (before - x) / (times[step - 1] - times[step])           # of the last step, Eq. 7
            t = times[step].expand(m).to(device)
            predicted = flow.predict_x0(x, velocity, t)
            draws = torch.stack([common.uniform(seed, f"place {step}", i, indices) for i in range(n)], 1)
            x = resample(x, predicted, r, t, draws.to(device), noise_for(f"resampling {step}"))
        else:
            best = r.topk(choices[step], 1).indices                                 # [m, keep]
            x = x[torch.arange(m, device=device)[:, None], best]
    return x[:, 0], passes
