"""RWR, reward-weighted regression: flow matching on the generator's own samples, each weighted by exp(reward).

The simplest way to use a reward, and the paper's weakest (Table 1): no gradient passes through the reward, so it can
only prefer some of what the untrained generator already makes.

Axes: b batch, c channels, f frames, h height, w width, l text tokens, m samples.
"""
import math

import torch

import common
import flow


def rwr_weights(rewards):
    """exp(reward), scaled to mean 1 over the data set, and the effective sample size as a share of it.

    rewards [m]: logits. The largest is subtracted first; a constant reward gives plain SFT on own samples.
    """
    weights = torch.exp(rewards.double() - rewards.max().double())
    weights = weights / weights.mean()
    return weights.float(), (weights.sum() ** 2 / weights.square().sum() / len(weights)).item()


def weighted_samples(policy, pavrm, latent_shape, context, seed, num_steps, batch_size, runtime, shift=1.0, **image):
    """The untrained policy's own samples of given prompts: x0 [m, c, f, h, w], and exp(reward) of each with mean 1 [m].

    context [m, l, d_text]; image: y and clip_tokens [m, ...] of an image-to-video policy. Made batch_size at a time, and split over
    the ranks. Raises FloatingPointError if a reward is not finite.
    """
    m, made = len(context), {}
    at_once = runtime.indices(batch_size, 1)[0] - runtime.indices(batch_size, 0)[0]     # of all ranks
    for i in common.progress(range(math.ceil(m / at_once)), f"rwr samples (x{at_once})"):
        j = [place % m for place in runtime.indices(batch_size, i)]     # the last round begins again: ranks stay in step (fsdp)
        given = {name: z[j] for name, z in image.items()}
        x0 = flow.sample(policy, latent_shape, context[j], seed, j, num_steps, shift=shift, batch_size=batch_size,
                         autocast=runtime.autocast, **given)
        with torch.no_grad(), runtime.autocast():
            reward = pavrm(x0, torch.zeros(len(j), device=context.device), context[j], **given)
        made |= dict(zip(j, zip(x0.cpu(), reward.float().cpu())))
    for part in common.gather(made):
        made |= part
    x0, rewards = (torch.stack(part).to(context.device) for part in zip(*(made[place] for place in range(m))))
    common.check_finite(rewards.sum(), "the reward", 0)
    weights, effective = rwr_weights(rewards)
    if runtime.rank == 0:
        print(f"rwr: {m} own samples, effective sample size {effective:.0%}")
    return x0, weights
