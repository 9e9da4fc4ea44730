"""Rectified flow: the straight path between data and noise, its velocity, and the Euler rollout.

Time runs from t = 0 (clean data) to t = 1 (pure noise), as in the paper. Differences from the released code, on
purpose: (1) the rollout is Euler, as in Eq. 7, where the release uses a second-order multistep solver;
(2) the grid is uniform, and for Wan2.1 shifted by 3 (from 720P on by 5), where the release always shifts by 5.

Axes: b batch, c channels, f frames, h height, w width, l text tokens.
"""
import math

import torch

import common


def shift_time(u, shift):
    """Warp times u in [0, 1] towards the noisy end (shift > 1); 0 and 1 stay. Wan samples with shift 3 to 8."""
    return shift * u / (1 + (shift - 1) * u)


def schedule(num_steps, shift=1.0, device=None):
    """The num_steps + 1 times of a rollout, from 1 down to 0; uniform (dt = 1 / N) at shift 1."""
    return shift_time(torch.linspace(1, 0, num_steps + 1, dtype=torch.float64), shift).float().to(device)


def _like(t, x):
    return t.to(x.dtype).view(-1, *[1] * (x.ndim - 1))           # [b] -> [b, 1, 1, 1, 1]


def add_noise(x0, x1, t):
    """Eq. 1: x_t = (1 - t) x_0 + t x_1, for x0, x1 [b, c, f, h, w] and t [b]."""
    t = _like(t, x0)
    return (1 - t) * x0 + t * x1


def flow_matching_loss(v, x0, x1, weight=None):
    """Eq. 2 and 10: mean squared error between the predicted velocity v and x_1 - x_0.

    weight: [b] per-example factors (RWR), mean 1; None weighs all alike. Returns a scalar.
    """
    per_example = (v.float() - (x1 - x0).float()).square().flatten(1).mean(1)       # [b]
    return (per_example if weight is None else weight * per_example).mean()


def euler_step(x, v, t, t_next):
    """Eq. 7: x_{t - dt} = x_t - dt v, with dt = t - t_next; t, t_next: [b]."""
    return x - _like(t - t_next, x) * v.to(x.dtype)


def predict_x0(x, v, t):
    """The clean latent that velocity v at (x, t) points to: x_0 = x_t - t v."""
    return x - _like(t, x) * v.to(x.dtype)


def guided_velocity(dit, x, t, context, guidance_scale=1.0, null=None, **image):
    """Velocity with classifier-free guidance; 1 switches it off. null [l, d_text]: the context of the prompt that it leads
    away from, for Wan the encoded negative prompt; None is all zeros, as the embedded world's generators were trained."""
    v = dit(x, t, context, **image)
    if guidance_scale == 1.0:
        return v
    v_null = dit(x, t, torch.zeros_like(context) if null is None else null.expand(len(x), -1, -1), **image)
    return v_null + guidance_scale * (v - v_null)


@torch.no_grad()
def rollout(dit, x, context, num_steps, *, first=0, last=None, longest=None, passes=0, shift=1.0, guidance_scale=1.0,
            null=None, **image):
    """Integrate from noise towards data without gradients. image: y and clip of an image-to-video model.

    x: [b, c, f, h, w] at schedule(num_steps)[first]; runs steps first .. last - 1 (last = num_steps: to t = 0), so
    the result is at schedule(num_steps)[last]. last: one number, or [b] of them, a video each. passes: 0 takes every
    step; n takes at most n passes however many steps there are, each over ceil(num_steps / n) steps at once or what is
    left of them. longest: the largest `last` of all ranks, as under FSDP every rank must call dit equally often.
    The state stays float32 whatever autocast does.
    """
    times = schedule(num_steps, shift, x.device)
    last = torch.as_tensor(num_steps if last is None else last).expand(len(x))                  # on the CPU
    stride = math.ceil(num_steps / passes) if passes else 1
    starts = range(first, int(last.max()), stride)
    count = len(starts if longest is None else range(first, longest, stride))
    for i, counts in common.equal_turns(starts, count, spare=first):
        moving = (last > i).nonzero()[:, 0] if counts else torch.tensor([0])    # the videos that are not there yet
        t, t_next = (times[last[moving].clamp(max=k).to(x.device)] for k in (i, i + stride))
        j = moving.to(x.device)
        v = guided_velocity(dit, x[j], t, None if context is None else context[j], guidance_scale, null,
                            **{name: z[j] for name, z in image.items() if z is not None})
        if counts:                                                          # else a pass for the other ranks' sake
            x = x.index_copy(0, j, euler_step(x[j], v, t, t_next))
    return x


@torch.no_grad()
def sample(dit, latent_shape, context, seed, indices, num_steps, *, shift=1.0, guidance_scale=1.0, null=None,
           batch_size=128, max_rows=None, autocast=None, **image):
    """Finished latents [m, c, f, h, w] of examples `indices`, whose noise depends only on (seed, index).

    latent_shape: (c, f, h, w); context [m, l, d_text], y and clip [m, ...] belong to the indices, on the model's device.
    max_rows: the largest m of all ranks, if dit is sharded over them: all make as many passes (common.equal_turns).
    """
    latents = []
    for j, counts in common.equal_batches(len(indices), batch_size, max_rows):
        x_T = common.noise(latent_shape, seed, "sample", 0, indices[j]).to(context.device)
        with autocast() if autocast else torch.autocast(context.device.type, enabled=False):
            x = rollout(dit, x_T, context[j], num_steps, shift=shift, guidance_scale=guidance_scale, null=null,
                        **{name: z[j] for name, z in image.items() if z is not None})
        if counts:
            latents.append(x)
    return torch.cat(latents)
