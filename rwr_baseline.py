"""RWR, reward-weighted regression: flow matching on the generator's own samples, each weighted by exp(reward).

The simplest way to use a reward, and the paper's weakest (Table 1): no gradient passes through the reward, so it can
only prefer some of what the untrained generator already makes.

Axes: b batch, c channels, f frames, h height, w width, l text tokens, m samples.
"""
import torch

import common
import data
import flow


def rwr_weights(rewards):
    """exp(reward), scaled to mean 1 over the data set, and the effective sample size as a share of it.

    rewards [m]: logits. The largest is subtracted first; a constant reward gives plain SFT on own samples.
    """
    weights = torch.exp(rewards.double() - rewards.max().double())
    weights = weights / weights.mean()
    return weights.float(), (weights.sum() ** 2 / weights.square().sum() / len(weights)).item()


def weighted_samples(config, runtime, policy, pavrm, shards, curated):
    """The untrained policy's own samples of the curated prompts: x0 [m, c, f, h, w], their context [m, l, d],
    exp(reward) of each with mean 1 [m], and {y, clip} of an image-to-video policy.

    config: train_align.py's. shards, curated: the data, and the indices in it that are not labelled bad.
    """
    picked = curated[data.order(len(curated), config.seed + 1, 0, range(config.num_samples), config.num_samples)]
    batch = shards.batch(picked)
    context = batch["context"].to(runtime.device)
    image = data.image_inputs(policy.config, batch, runtime.device)
    x0 = flow.sample(policy, shards.latent_shape, context, config.seed + 2, range(config.num_samples),
                     config.num_inference_steps, autocast=runtime.autocast, **image)
    with torch.no_grad(), runtime.autocast():
        rewards = torch.cat([pavrm(x0[i:i + 128], torch.zeros(len(x0[i:i + 128]), device=runtime.device),
                                   context[i:i + 128], **{name: z[i:i + 128] for name, z in image.items()})
                             for i in range(0, len(x0), 128)])
    common.check_finite(rewards.sum(), "the reward", 0)
    weights, effective = rwr_weights(rewards)
    if runtime.rank == 0:
        print(f"rwr: {len(x0)} own samples, effective sample size {effective:.0%}")
    return x0, context, weights, image
