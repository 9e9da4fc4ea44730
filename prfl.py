"""PRFL, process reward feedback learning (Algorithm 1): reward the generator's own noisy latents, never pixels.

Each iteration makes two optimizer updates: an SFT update on curated data, then a reward update, in which a sample is
rolled out from noise to a random step without gradients, takes ONE step with gradients, and is judged right there by
PAVRM. The gradient goes through the frozen PAVRM and that one step into the generator. There is no VAE.

    x_T ~ N(0, I) --rollout, no grad--> x_{s+dt} --one step, with grad--> x_s --PAVRM--> r(x_s, s, p),  loss = -lambda r

Where this differs, on purpose, from the released code (all of it as the paper has it):
1. The loss is -lambda * r on the raw logit. The released 0.1 * relu(2 - sigmoid(r)) is "sigmoid_hinge" below: its hinge
   never bites, and where the reward is sure of itself its gradient vanishes.
2. Euler with one dt, so the step with gradients moves exactly dt.
3. Any of the N steps can be rewarded, the last one too (the release never takes that).
4. The SFT and the reward update each have their own backward, clipping and optimizer step; gradients never mix.
5. PAVRM is frozen whole, in eval mode: no gradients pile up on it.

Axes: b batch, c channels, f frames, h height, w width, l text tokens.
"""
import torch
import torch.nn.functional as F

from common import InputError, generator
from flow import add_noise, euler_step, flow_matching_loss, rollout, schedule

# Table 3: which third of the trajectory is rewarded. For N = 40: steps 1-13, 14-26, 27-40.
PARTS = {"early": (0, 1), "middle": (1, 2), "late": (2, 3), "full": (0, 3)}

REWARD_LOSSES = {
    "linear": lambda r: -r,                                     # Alg. 1
    "logsigmoid": lambda r: F.softplus(-r),                     # -log sigmoid(r)
    "sigmoid_hinge": lambda r: 0.1 * F.relu(2 - torch.sigmoid(r)),   # the released code
}


def draw_step(seed, iteration, num_steps, part="full"):
    """The rewarded step of this iteration, 1 .. num_steps, uniform over a part of the trajectory (Alg. 1).

    Drawn from (seed, iteration) alone: the same on every rank and after a resume.
    """
    first, last = (num_steps * third // 3 for third in PARTS[part])
    if last <= first:
        raise InputError(f"--num_inference_steps {num_steps} leaves the {part} part of the trajectory without a step")
    return int(torch.randint(first + 1, last + 1, (1,), generator=generator(seed, "reward step", iteration)))


def reward_update_loss(policy, pavrm, x_T, context, step, num_steps, *, reward_weight=1.0, loss="linear",
                       grad_steps=1, shift=1.0, **image):
    """Alg. 1, the reward update: returns (loss, reward); call backward on the loss.

    policy, pavrm: the VideoDiT in training and the frozen reward model. x_T [b, c, f, h, w]: noise. context
    [b, l, d_text]. step: 1 .. num_steps, the step whose result is rewarded. reward_weight: lambda. grad_steps: how
    many of the steps up to there carry gradients; 1 is the paper's, more needs policy.gradient_checkpointing to fit.
    image: y and clip of an image-to-video model.
    Returns a scalar loss and the logits r(x_s, s, p) [b], detached.
    """
    times = schedule(num_steps, shift, x_T.device)
    first = max(0, step - grad_steps)
    x = rollout(policy, x_T, context, num_steps, last=first, shift=shift, **image)     # x_{s+dt}, without gradients
    torch.clear_autocast_cache()        # on torch < 2.13, weights it cast without gradients would be used below
    for i in range(first, step):
        t, s = times[i].expand(len(x)), times[i + 1].expand(len(x))
        x = euler_step(x, policy(x, t, context, **image), t, s)                         # Eq. 7, with gradients: x_s
    r = pavrm(x, s, context, **image)                                                   # [b]
    return reward_weight * REWARD_LOSSES[loss](r).mean(), r.detach()


def sft_loss(policy, x0, x1, t, context, weight=None, **image):
    """Alg. 1, the SFT update (Eq. 10): flow matching on curated latents x0 [b, c, f, h, w] noised by x1 to t [b].

    weight [b]: RWR passes exp(reward) here, with the policy's own samples as x0 (rwr_baseline.py).
    """
    return flow_matching_loss(policy(add_noise(x0, x1, t), t, context, **image), x0, x1, weight)
