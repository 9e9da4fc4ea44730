"""RWR, reward-weighted regression: flow matching on the generator's own samples, each weighted by exp(reward).

The simplest way to use a reward, and the paper's weakest (Table 1): no gradient passes through the reward, so it can
only prefer some of what the untrained generator already makes.

Axes: b batch, c channels, f frames, h height, w width, l text tokens, m samples.
"""
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


def weighted_samples(policy, pavrm, latent_shape, context, seed, num_steps, runtime, shift=1.0, **image):
    """The untrained policy's own samples of given prompts: x0 [m, c, f, h, w], and exp(reward) of each with mean 1 [m].

    context [m, l, d_text]; image: y and clip [m, ...] of an image-to-video policy. Raises FloatingPointError if a reward
    is not finite.
    """
    m = len(context)
    x0 = flow.sample(policy, latent_shape, context, seed, range(m), num_steps, shift=shift, autocast=runtime.autocast,
                     **image)
    t = torch.zeros(m, device=context.device)
    with torch.no_grad(), runtime.autocast():
        rewards = torch.cat([pavrm(x0[i:i + 128], t[i:i + 128], context[i:i + 128],
                                   **{name: z[i:i + 128] for name, z in image.items()}) for i in range(0, m, 128)])
    common.check_finite(rewards.sum(), "the reward", 0)
    weights, effective = rwr_weights(rewards)
    if runtime.rank == 0:
        print(f"rwr: {m} own samples, effective sample size {effective:.0%}")
    return x0, weights
