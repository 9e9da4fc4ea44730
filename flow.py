"""Rectified flow: the straight path between data and noise, its velocity, and the Euler rollout.

Time runs from t = 0 (clean data) to t = 1 (pure noise), as in the paper.

Deliberate differences from the released code:
1. The rollout is Euler, as in Eq. 7. The release uses a second-order multistep solver.
2. The grid of times is uniform in the embedded world; for Wan2.1 it is shifted by 3, and by 5 from 720P on.
   The release always shifts by 5.

Axes: b batch, c channels, f frames, h height, w width, l text tokens.
"""
import math

import torch

import common
from model import pin


def shift_time(u, shift):
    """Moves times u in [0, 1] towards noise (t = 1) if shift > 1; 0 and 1 stay where they are."""
    return shift * u / (1 + (shift - 1) * u)


def schedule(num_steps, shift=1.0, device=None):
    """The times of a rollout [num_steps + 1], from 1 down to 0; with shift 1 they are 1 / num_steps apart."""
    return shift_time(torch.linspace(1, 0, num_steps + 1, dtype=torch.float64), shift).float().to(device)


def _like(t, x):
    return t.to(x.dtype).view(-1, *[1] * (x.ndim - 1))           # [b] -> [b, 1, 1, 1, 1]


def add_noise(x0, x1, t):
    """Eq. 1: x_t = (1 - t) x_0 + t x_1, for x0, x1 [b, c, f, h, w] and t [b]."""
    t = _like(t, x0)
    return (1 - t) * x0 + t * x1


def given_frames(conditions):
    """How many latent frames are given clean and not generated: the first one if there is a first_frame, else
    none."""
    return int(conditions.get("first_frame") is not None)


def flow_matching_loss(v, x0, x1, weight=None, given=0):
    """Eq. 2 and 10: mean squared error between the predicted velocity v and x_1 - x_0.

    weight: [b] per-example factors (RWR), mean 1; None weighs all alike. given: this many first latent frames
    are left out of the loss, because they are given and not predicted. Returns a scalar.
    """
    if given:
        v, x0, x1 = v[:, :, given:], x0[:, :, given:], x1[:, :, given:]
    per_example = (v.float() - (x1 - x0).float()).square().flatten(1).mean(1)       # [b]
    return (per_example if weight is None else weight * per_example).mean()


def euler_step(x, v, t, t_next):
    """Eq. 7: x_{t - dt} = x_t - dt v, with dt = t - t_next; x, v [b, c, f, h, w]; t, t_next [b]."""
    return x - _like(t - t_next, x) * v.to(x.dtype)


def predict_x0(x, v, t):
    """The clean latent x_0 = x_t - t v to which velocity v at (x, t) points. It is one Euler step to t = 0;
    x, v [b, c, f, h, w], t [b]."""
    return euler_step(x, v, t, torch.zeros_like(t))


def guided_velocity(dit, x, t, context, guidance_scale=1.0, null=None, **conditions):
    """The velocity [b, c, f, h, w] with classifier-free guidance away from the null prompt; a scale of 1
    switches it off.

    null [l, d_text]: the context of the null prompt, for Wan the encoded negative prompt. None means all
    zeros, with which the embedded world's generators were trained. guidance_scale: a number, or a function of
    t that gives it, as for a generator of two experts.
    """
    v = dit(x, t, context, **conditions)
    if guidance_scale == 1.0:
        return v
    null_context = torch.zeros_like(context) if null is None else null.expand(len(x), -1, -1)
    v_null = dit(x, t, null_context, **conditions)
    scale = guidance_scale(t) if callable(guidance_scale) else guidance_scale
    return v_null + scale * (v - v_null)


@torch.no_grad()
def rollout(dit, x, context, num_steps, *, start=0, stop=None, passes=0, shift=1.0, guidance_scale=1.0,
            null=None, **conditions):
    """Integrates Eq. 7 from noise towards data, without gradients.

    x [b, c, f, h, w] is the state at schedule(num_steps, shift)[start]; the result is the state at
    schedule(num_steps, shift)[stop] (None: num_steps, the finished video). passes: with 0 the rollout takes
    every step of the schedule. With n it takes at most n long steps, each of which covers ceil(num_steps / n)
    steps of the schedule; the last one covers what is left. conditions: what an image-to-video model is given
    beside the prompt: y and clip_tokens, or first_frame, a latent frame that stays in place of frame 0. The
    state stays float32 whatever autocast does.
    """
    x = pin(x, conditions.get("first_frame"))           # the velocity in frame 0 is 0, so no step moves it
    times = schedule(num_steps, shift, x.device)
    stop = num_steps if stop is None else stop
    stride = math.ceil(num_steps / passes) if passes else 1
    for i in range(start, stop, stride):
        t = times[i].expand(len(x))                             # [b]
        t_next = times[min(i + stride, stop)].expand(len(x))
        v = guided_velocity(dit, x, t, context, guidance_scale, null, **conditions)
        x = euler_step(x, v, t, t_next)
    # In torch before 2.13 autocast keeps the copies of the weights that it made here. They have no gradients,
    # and the next step would train with them.
    torch.clear_autocast_cache()
    return x


@torch.no_grad()
def sample(dit, latent_shape, context, seed, indices, num_steps, *, shift=1.0, guidance_scale=1.0, null=None,
           batch_size=128, max_rows=None, autocast=None, **conditions):
    """Samples the videos `indices` -> finished latents [m, c, f, h, w].

    A video's noise depends only on (seed, index). latent_shape: (c, f, h, w). context [m, l, d_text] and
    conditions [m, ...] belong to the indices and lie on the model's device. max_rows: the largest m of all
    ranks; a sharded dit needs this number, because all ranks must make equally many passes
    (common.equal_turns).
    autocast: a function that returns the context manager to sample under; None samples in float32.
    """
    autocast = autocast or (lambda: torch.autocast(context.device.type, enabled=False))
    latents = []
    for j, counts in common.equal_batches(len(indices), batch_size, max_rows):
        x_T = common.noise(latent_shape, seed, "sample", 0, indices[j]).to(context.device)
        its_conditions = {name: z[j] for name, z in conditions.items() if z is not None}
        with autocast():
            x = rollout(dit, x_T, context[j], num_steps, shift=shift, guidance_scale=guidance_scale,
                        null=null, **its_conditions)
        if counts:
            latents.append(x)
    return torch.cat(latents)
