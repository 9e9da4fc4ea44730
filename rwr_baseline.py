"""RWR, reward-weighted regression: flow matching on the generator's own samples, each weighted by exp(reward).

The simplest way to use a reward, and the paper's weakest (Table 1): no gradient passes through the reward, so it can
only prefer some of what the untrained generator already makes.

Axes: b batch, c channels, f frames, h height, w width, l text tokens, m samples.
"""
import torch

import common
import data
import flow
from model import first_frame_condition


def rwr_weights(rewards):
    """exp(reward), scaled to mean 1 over the data set, and the effective sample size as a share of it.

    rewards [m]: logits. The largest is subtracted first; a constant reward gives plain SFT on own samples.
    """
    weights = torch.exp(rewards.double() - rewards.max().double())
    weights = weights / weights.mean()
    return weights.float(), (weights.sum() ** 2 / weights.square().sum() / len(weights)).item()


def weighted_samples(config, runtime, policy, pavrm, shards, curated):
    """The untrained policy's own samples of the curated prompts: a list of x0 [m, c, f, h, w], their context [m, l, d],
    exp(reward) of each with mean 1 [m], and, for an image-to-video policy, y [m, 4 + c, f, h, w].

    config: train_align.py's. shards, curated: the data, and the indices in it that are not labelled bad.
    """
    picked = curated[data.order(len(curated), config.seed + 1, 0, range(config.num_samples), config.num_samples)]
    batch = shards.batch(picked)
    context = batch["context"].to(runtime.device)
    image_to_video = policy.config["model_type"] == "i2v"
    y = first_frame_condition(batch["latents"].to(runtime.device)) if image_to_video else None
    x0 = flow.sample(policy, shards.latent_shape, context, config.seed + 2, range(config.num_samples),
                     config.num_inference_steps, y=y, autocast=runtime.autocast)
    with torch.no_grad(), runtime.autocast():
        rewards = torch.cat([pavrm(x0[i:i + 128], torch.zeros(len(x0[i:i + 128]), device=runtime.device),
                                   context[i:i + 128], y=None if y is None else y[i:i + 128])
                             for i in range(0, len(x0), 128)])
    common.check_finite(rewards.sum(), "the reward", 0)
    weights, effective = rwr_weights(rewards)
    if runtime.rank == 0:
        print(f"rwr: {len(x0)} own samples, effective sample size {effective:.0%}")
    return x0, context, weights, y
