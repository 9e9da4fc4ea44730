"""RWR, reward-weighted regression: flow matching on the generator's own samples, each weighted by
exp(reward).

This is the simplest way to use a reward, and the weakest in results/table1.md: no gradient passes through the
reward, so it can only prefer some of what the untrained generator already makes.

Axes: b batch, c channels, f frames, h height, w width, l text tokens, m samples.
"""
import math

import torch

import common
import flow


def rwr_weights(rewards):
    """-> (weights [m], the effective sample size as a share of m)

    rewards [m]: logits. The weights are exp(reward), scaled to mean 1. With a constant reward RWR is SFT on
    own samples.
    """
    # The largest reward is subtracted so that exp cannot overflow.
    weights = torch.exp(rewards.double() - rewards.max().double())
    weights = weights / weights.mean()
    return weights.float(), (weights.sum() ** 2 / weights.square().sum() / len(weights)).item()


def weighted_samples(policy, pavrm, latent_shape, context, seed, num_steps, batch_size, runtime, shift=1.0,
                     **conditions):
    """Samples of the untrained policy and their weights: x0 [m, c, f, h, w] and `rwr_weights` [m].

    context [m, l, d_text]: one prompt per sample. conditions: y and clip_tokens [m, ...] of an image-to-video
    policy. The ranks share the samples and make batch_size at a time. Raises FloatingPointError if a reward
    is not finite.
    """
    m, made = len(context), {}
    at_once = runtime.indices(batch_size, 1)[0] - runtime.indices(batch_size, 0)[0]     # samples of all ranks
    for i in common.progress(range(math.ceil(m / at_once)), f"rwr samples (x{at_once})"):
        # The last turn is filled up with the first samples: under fsdp all ranks must call the model equally
        # often.
        j = [place % m for place in runtime.indices(batch_size, i)]
        given = {name: z[j] for name, z in conditions.items()}
        x0 = flow.sample(policy, latent_shape, context[j], seed, j, num_steps, shift=shift,
                         batch_size=batch_size, autocast=runtime.autocast, **given)
        with torch.no_grad(), runtime.autocast():
            reward = pavrm(x0, torch.zeros(len(j), device=context.device), context[j], **given)
        made |= dict(zip(j, zip(x0.cpu(), reward.float().cpu())))
    for of_rank in common.gather(made):
        made |= of_rank
    x0 = torch.stack([made[place][0] for place in range(m)]).to(context.device)
    rewards = torch.stack([made[place][1] for place in range(m)]).to(context.device)
    common.check_finite(rewards.sum(), "the reward", 0)
    weights, effective = rwr_weights(rewards)
    if runtime.rank == 0:
        print(f"rwr: {m} own samples, effective sample size {effective:.0%}")
    return x0, weights
