"""Best of n while sampling: candidates start from different noise, and the latent reward drops bad ones on
the way.

PAVRM predicts from a half-finished latent whether a good video will come of it. So a bad candidate need not
be finished, and nothing has to be decoded. Every generator that has a reward model can be sampled like this,
aligned or not.

    n candidates --steps--> x_t --PAVRM r(x_t, t, p)--> the best few --steps--> ... the best --steps--> x_0

    python sample.py --prompt "a red circle moving to the right" --best_of 8 --drops .75:4,.56:2,.37:1
    python evaluate.py checkpoints --best_of 8

Axes: m videos, k candidates left of each video, c channels, f frames, h height, w width, l text tokens.
"""
from dataclasses import dataclass

import torch

import common
import flow
from common import InputError, arg


@dataclass
class Flags:
    """The flags of sample.py and evaluate.py about the search."""
    best_of: int = arg(1, "candidates made per video; the reward model keeps one of them", above=0)
    drops: str | None = arg(None, "when candidates are dropped: a list of time:number kept. "
                            ".75:4,.56:2,.37:1 keeps 4 at t = .75, 2 at .56 and 1 at .37; 0:1 compares "
                            "finished videos only. Default: half are kept at .75, a quarter at .5625, one at "
                            ".375", only="!best_of 1")


def default_drops(n):
    """The drops of best_of for n candidates: half of them stay at t = 3/4, a quarter at 9/16, one at 3/8."""
    drops = [(1.0, n)]
    for t, keep in ((0.75, -(-n // 2)), (0.5625, -(-n // 4)), (0.375, 1)):
        if keep < drops[-1][1]:
            drops.append((t, keep))
    return tuple(drops)


def parse_drops(n, text=None):
    """--best_of n and --drops, such as ".75:4,.56:2,.37:1" (None: default_drops) -> the drops of best_of.

    They always end with one candidate: if the text keeps more, the last choice is made at the end, t = 0.
    Raises InputError.
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
            raise InputError(f"--drops {text}: {part!r} must be time:number kept, such as .75:4; times fall "
                             f"from 1 to 0, and numbers from --best_of {n} to 1")
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


@torch.no_grad()
def best_of(dit, pavrm, latent_shape, context, seed, indices, num_steps, drops, *, shift=1.0,
            guidance_scale=1.0, null=None, batch_size=128, max_rows=None, autocast=None, **image):
    """-> (the best candidates' latents [m, c, f, h, w], forward passes of dit per video).

    A pass of the reward model counts as the share of dit's blocks that it runs. The noise of a candidate
    depends only on (seed, index, its number); number 0 is what flow.sample makes. drops: ((1, n), (t, keep),
    ..., (t, 1)) from default_drops or parse_drops: of n candidates the reward keeps `keep` at the step
    nearest to t. With one candidate this is flow.sample, and pavrm may be None. batch_size: candidates in one
    pass. max_rows: the largest m of all ranks, for models that are sharded over them. The rest as in
    flow.sample.
    """
    m, n = len(indices), drops[0][1]
    times = flow.schedule(num_steps, shift)
    keep_at = {int((times - t).abs().argmin()): keep for t, keep in drops[1:]}  # by step; the last one counts
    image = {name: z for name, z in image.items() if z is not None}
    cost_of_step = passes_per_step(guidance_scale)
    cost_of_reward = len(pavrm.trunk.blocks) / len(dit.blocks) if n > 1 else 0

    def each(function, x):
        """function(candidates, their context, their image) over x [m, k, ...], in batches -> [m, k, ...]"""
        k, flat, found = x.shape[1], x.flatten(0, 1), []
        with autocast() if autocast else torch.autocast(context.device.type, enabled=False):
            for j, counts in common.equal_batches(m * k, batch_size, (max_rows or m) * k):
                video = torch.arange(m * k, device=context.device)[j] // k
                given = {name: z[video] for name, z in image.items()}
                result = function(flat[j], context[video], **given)
                if counts:
                    found.append(result)
        return torch.cat(found).unflatten(0, (m, -1))

    x = [common.noise(latent_shape, seed, "sample", candidate, indices) for candidate in range(n)]
    x, step, passes = torch.stack(x, 1).to(context.device), 0, 0                    # [m, k, c, f, h, w]
    for stop in sorted({*keep_at, num_steps}):
        def rollout(x, text, **given):
            return flow.rollout(dit, x, text, num_steps, start=step, stop=stop, shift=shift,
                                guidance_scale=guidance_scale, null=null, **given)

        def reward(x, text, **given):
            return pavrm(x, times[stop].expand(len(x)).to(x.device), text, **given)

        x = each(rollout, x)
        passes += (stop - step) * cost_of_step * x.shape[1]
        step = stop
        if stop in keep_at:
            r = each(reward, x)                                                     # [m, k]
            passes += cost_of_reward * x.shape[1]
            best = r.nan_to_num(nan=-torch.inf).topk(keep_at[stop], 1).indices      # [m, keep]
            x = x[torch.arange(m, device=x.device)[:, None], best]
    return x[:, 0], passes
