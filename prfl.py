"""PRFL, process reward feedback learning (Algorithm 1): reward the generator's own noisy latents, never pixels.

Each iteration makes two optimizer updates: an SFT update on curated data, then a reward update, in which a sample is
rolled out from noise to a random step without gradients, takes ONE step with gradients, and is judged right there by
PAVRM. The gradient goes through the frozen PAVRM and that one step into the generator. There is no VAE.

    x_T ~ N(0, I) --rollout, no grad--> x_{s+dt} --one step, with grad--> x_s --PAVRM--> r(x_s, s, p),  loss = -lambda r

The paper's recipe has to be stopped in time (results/hacking.md). "steady" (RECIPES), which is ours, did not have to be
in 480 iterations: every video has a step of its own, spread evenly over the trajectory; the rollout without gradients takes
at most four long Euler steps; and the loss saturates where the reward is sure (results/steady.md; which of the three it
needs: results/why.md).

Where this differs, on purpose, from the released code (with the recipe "paper" each of these is as the paper has it):
1. The loss is -lambda * r on the raw logit. The released 0.1 * relu(2 - sigmoid(r)) is "sigmoid_hinge" below: its hinge
   never bites, and where the reward is sure of itself its gradient vanishes.
2. Euler (Eq. 7), not a second-order solver.
3. Any of the N steps can be rewarded, the last one too (the release never takes that).
4. The SFT and the reward update each have their own backward, clipping and step: gradients never mix; AdamW's moments do.
5. PAVRM is frozen whole, in eval mode: no gradients pile up on it.

Axes: b batch, B global batch, c channels, f frames, h height, w width, l text tokens.
"""
import torch
import torch.nn.functional as F

from common import InputError, random_generator, uniform
from flow import add_noise, euler_step, flow_matching_loss, rollout, schedule

RECIPES = {  # what train_align.py's flags of these names are when they are not given
    "paper": {"rewarded_step": "per_batch", "rollout_passes": 0, "reward_loss": "linear"},              # Alg. 1
    "steady": {"rewarded_step": "per_video", "rollout_passes": 4, "reward_loss": "logsigmoid"},
}

# Table 3: which third of the trajectory, from noise (early) to video (late). For N = 40: steps 1-13, 14-26, 27-40.
THIRDS = {"early": (0, 1), "middle": (1, 2), "late": (2, 3), "full": (0, 3)}

REWARD_LOSSES = {
    "linear": lambda r: -r,                                     # Alg. 1
    "logsigmoid": lambda r: F.softplus(-r),                     # -log sigmoid(r)
    "sigmoid_hinge": lambda r: 0.1 * F.relu(2 - torch.sigmoid(r)),   # the released code
}


def steps_of(part, num_steps):
    """The steps first + 1 .. last of a part of the trajectory -> (first, last). Raises InputError if there are none."""
    first, last = (num_steps * third // 3 for third in THIRDS[part])
    if last <= first:
        raise InputError(f"--num_inference_steps {num_steps} leaves the {part} part of the trajectory without a step")
    return first, last


def draw_step(seed, iteration, num_steps, part="full"):
    """The rewarded step of this iteration, 1 .. num_steps, uniform over a part of the trajectory (Alg. 1).

    Drawn from (seed, iteration) alone: the same on every rank and after a resume.
    """
    first, last = steps_of(part, num_steps)
    return int(torch.randint(first + 1, last + 1, (1,), generator=random_generator(seed, "reward step", iteration)))


def draw_steps(seed, iteration, num_steps, global_batch, part="full"):
    """A rewarded step for each video of the global batch -> int64 [B], stratified: the part of the trajectory is cut into
    B equal stretches, each video has one of them, and its step is uniform within. Each alone is as `draw_step`'s.

    Drawn from (seed, iteration) alone: every rank draws all, and takes those of its own videos.
    """
    first, last = steps_of(part, num_steps)
    stretch = torch.randperm(global_batch, generator=random_generator(seed, "reward steps", iteration))
    within = uniform(seed, "reward steps", iteration, range(global_batch))
    place = (stretch + within) / global_batch                                                   # [B] in [0, 1)
    return (first + 1 + (place * (last - first)).long()).clamp(max=last)


def reward_update_loss(policy, pavrm, x_T, context, step, num_steps, *, longest=None, rollout_passes=0, reward_weight=1.0,
                       loss="linear", grad_steps=1, shift=1.0, **image):
    """Alg. 1, the reward update -> (a scalar loss to call backward on, the logits r(x_s, s, p) [b], detached).

    policy, pavrm: the VideoDiT in training and the frozen reward model. x_T [b, c, f, h, w]: noise. context
    [b, l, d_text]. step: 1 .. num_steps, the step whose result is rewarded, one for all or [b]. longest: the largest
    step of the whole update, so that all its ranks and batches make as many passes. rollout_passes: as in `rollout`.
    reward_weight: lambda. grad_steps: how many of the steps up to there carry gradients; 1 is the paper's, more needs
    policy.gradient_checkpointing to fit. image: y and clip_tokens of an image-to-video model.
    """
    times = schedule(num_steps, shift, x_T.device)
    step = torch.as_tensor(step).expand(len(x_T))                                                   # [b]
    longest = int(step.max()) if longest is None else longest
    first = (step - grad_steps).clamp(min=0)                                                        # [b]
    x = rollout(policy, x_T, context, num_steps, last=first, longest=max(0, longest - grad_steps), passes=rollout_passes,
                shift=shift, **image)                                   # x_{s+dt}, without gradients
    torch.clear_autocast_cache()        # on torch < 2.13, weights it cast without gradients would be used below
    for i in range(min(grad_steps, longest)):
        t, s = (times[torch.minimum(first + k, step).to(x.device)] for k in (i, i + 1))            # [b]
        x = euler_step(x, policy(x, t, context, **image), t, s)                         # Eq. 7, with gradients: x_s
    r = pavrm(x, s, context, **image)                                                   # [b]
    return reward_weight * REWARD_LOSSES[loss](r).mean(), r.detach()


def sft_loss(policy, x0, x1, t, context, weight=None, **image):
    """Alg. 1, the SFT update (Eq. 10): flow matching on curated latents x0 [b, c, f, h, w] noised by x1 to t [b].

    weight [b]: RWR passes exp(reward) here, with the policy's own samples as x0 (rwr_baseline.py).
    """
    return flow_matching_loss(policy(add_noise(x0, x1, t), t, context, **image), x0, x1, weight)
