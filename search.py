"""Best of n while sampling: a video's candidates start from different noise, and the latent reward drops them on the way.

PAVRM says of a half-finished latent whether a good video will come of it, so a bad candidate need not be finished, nor
anything decoded. Any generator that has a reward model can be sampled so, aligned or not.

    n candidates --steps--> x_t --PAVRM r(x_t, t, p)--> the best few --steps--> ... --> the best one --steps--> x_0

    python sample.py --prompt "a red circle moving to the right" --best_of 8 --cuts .75:4,.56:2,.37:1
    python evaluate.py checkpoints --best_of 8

Axes: m videos, k candidates of each that are left, c channels, f frames, h height, w width, l text tokens.
"""
from dataclasses import dataclass

import torch

import common
import flow
from common import InputError, arg


@dataclass
class Flags:
    """What sample.py and evaluate.py take for a search."""
    best_of: int = arg(1, "candidates a video, of which the reward model keeps one", above=0)
    cuts: str | None = arg(None, "when it drops them: time:candidates that stay, such as .75:4,.56:2,.37:1; 0:1 judges finished "
                           "ones alone; without, half at .75, a quarter at .56, one at .37", only="!best_of 1")


def default_cuts(n):
    """The cuts of best_of for n candidates: half of them at t = 3/4, of these half at 9/16, the best at 3/8."""
    cuts = [(1.0, n)]
    for t, keep in ((0.75, -(-n // 2)), (0.5625, -(-n // 4)), (0.375, 1)):
        cuts += [(t, keep)] if keep < cuts[-1][1] else []
    return tuple(cuts)


def parse_cuts(n, text=None):
    """--best_of n and --cuts, such as ".75:4,.56:2,.37:1" (None: default_cuts) -> the cuts of best_of, down to one
    candidate: at the end, t = 0, if the text does not say where. Raises InputError."""
    if text is None:
        return default_cuts(n)
    cuts = [(1.0, n)]
    for part in text.split(","):
        try:
            t, keep = (kind(word) for kind, word in zip((float, int), part.split(":"), strict=True))
            fits = 0 <= t < cuts[-1][0] and 0 < keep < cuts[-1][1]
        except ValueError:
            fits = False
        if not fits:
            raise InputError(f"--cuts {text}: {part!r} must be time:candidates, such as .75:4; times fall from 1 to 0, and "
                             f"candidates from --best_of {n} to 1")
        cuts.append((t, keep))
    return tuple(cuts if cuts[-1][1] == 1 else [*cuts, (0.0, 1)])


@torch.no_grad()
def best_of(dit, pavrm, latent_shape, context, seed, indices, num_steps, cuts, *, shift=1.0, guidance_scale=1.0,
            null=None, batch_size=128, autocast=None, **image):
    """-> (the best candidates' latents [m, c, f, h, w], forward passes of dit per video; a reward counts as the share of
    dit's blocks that it runs).

    The noise of a candidate depends only on (seed, index, its number); number 0 is what flow.sample makes. cuts:
    ((1, n), (t, keep), ..., (t, 1)) from default_cuts or parse_cuts: n candidates, of which the reward keeps so many at
    the step nearest to t. batch_size: candidates in one pass. The rest as in flow.sample.
    """
    m, n = len(indices), cuts[0][1]
    times = flow.schedule(num_steps, shift)
    keep_at = {int((times - t).abs().argmin()): keep for t, keep in cuts[1:]}                   # by step; the last one counts
    image = {name: z for name, z in image.items() if z is not None}
    cost_of_step = 1 if guidance_scale == 1 else 2
    cost_of_reward = len(pavrm.trunk.blocks) / len(dit.blocks) if n > 1 else 0

    def each(function, x):
        """function(candidates, their context, their image) over all x [m, k, ...], a batch at a time -> [m, k, ...]"""
        with autocast() if autocast else torch.autocast(context.device.type, enabled=False):
            rows = torch.arange(m * x.shape[1], device=context.device).split(batch_size)
            return torch.cat([function(x.flatten(0, 1)[j], context[j // x.shape[1]],
                                       **{name: z[j // x.shape[1]] for name, z in image.items()})
                              for j in rows]).unflatten(0, (m, -1))

    x = torch.stack([common.noise(latent_shape, seed, "sample", candidate, indices) for candidate in range(n)], 1)
    x, step, passes = x.to(context.device), 0, 0                                                # [m, k, c, f, h, w]
    for cut in sorted({*keep_at, num_steps}):
        x = each(lambda x, text, **image: flow.rollout(dit, x, text, num_steps, start=step, stop=cut, shift=shift,
                                                     guidance_scale=guidance_scale, null=null, **image), x)
        passes += (cut - step) * cost_of_step * x.shape[1]
        step = cut
        if cut in keep_at:
            r = each(lambda x, text, **image: pavrm(x, times[cut].expand(len(x)).to(x.device), text, **image), x)     # [m, k]
            passes += cost_of_reward * x.shape[1]
            best = r.nan_to_num(nan=-torch.inf).topk(keep_at[cut], 1).indices                   # [m, keep]
            x = x[torch.arange(m, device=x.device)[:, None], best]
    return x[:, 0], passes
