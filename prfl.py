"""PRFL, process reward feedback learning (Algorithm 1): the reward judges noisy latents, never pixels.

Each iteration makes two optimizer updates. The first is an SFT update on curated videos. The second is a
reward update: a sample is rolled out from noise to a random step without gradients, takes ONE step with
gradients, and PAVRM judges the noisy latent after this step. The gradient goes through the frozen PAVRM and
that one step into the generator. There is no VAE. The loop is in train_align.py, which draws noise, times and
the rewarded step, and makes both optimizer steps.

    x_T ~ N(0, I) --rollout, no grad--> x_{s+dt} --one step, with grad--> x_s --PAVRM--> r(x_s, s, p)
                                                                                  loss = -lambda r

Rollout and step are without classifier-free guidance; only sampling and validation have it. The prompts of
both updates are those of the curated videos. The SFT update draws a time t in (0, 1) for each video. The
reward update draws one step for all videos, which always covers one of the N steps of the schedule.

With the recipe "paper" this is Algorithm 1 to the letter. The recipe "steady", which is ours, changes three
things: the rollout without gradients takes at most four long Euler steps, and the loss is -log sigmoid(r),
which stops pushing where the reward is already sure that the video is good. Its learning rate falls to zero
over the run (train_align.py). results/why.md compares the first two changes, at a constant learning rate, in
its rows "step per batch". What that page calls the steady recipe is an earlier form: it has a rewarded step
for each video and a constant learning rate. results/endurance.md has today's form.

Deliberate differences from the released code:
1. The loss is -lambda * r on the raw logit. The released 0.1 * relu(2 - sigmoid(r)) is "sigmoid_hinge" below:
   its relu never cuts anything off, because sigmoid(r) is below 2, and its gradient vanishes where the
   reward is sure.
2. The solver is Euler (Eq. 7), not a second-order one.
3. Any of the N steps can be rewarded, also the last one, which the release never rewards.
4. The SFT update and the reward update each have their own backward pass, clipping and optimizer step.
   Their gradients never mix; the moments of AdamW do.
5. PAVRM is frozen as a whole and in eval mode, so no gradients pile up on it.

Axes: b batch, c channels, f frames, h height, w width, l text tokens.
"""
import torch
import torch.nn.functional as F

from common import InputError, random_generator
from flow import add_noise, euler_step, flow_matching_loss, given_frames, rollout, schedule

# The values of these flags of train_align.py that are not given. rollout_passes 0: every step.
RECIPES = {
    "paper": {"rollout_passes": 0, "reward_loss": "linear", "lr_scheduler": "constant"},        # Alg. 1
    "steady": {"rollout_passes": 4, "reward_loss": "logsigmoid", "lr_scheduler": "linear"},
}

REWARD_LOSSES = {  # from logits r [b] to losses [b]
    "linear": lambda r: -r,                                             # Alg. 1
    "logsigmoid": lambda r: F.softplus(-r),                             # -log sigmoid(r)
    "sigmoid_hinge": lambda r: 0.1 * F.relu(2 - torch.sigmoid(r)),      # the released code
}

# Table 3: thirds of the trajectory, from noise (early) to video (late). N = 40: steps 1-13, 14-26, 27-40.
THIRDS = {"early": (0, 1), "middle": (1, 2), "late": (2, 3), "full": (0, 3)}


def reward_update_loss(policy, pavrm, x_T, context, step, num_steps, *, rollout_passes=0, reward_weight=1.0,
                       loss="linear", shift=1.0, **conditions):
    """Alg. 1, the reward update -> (the loss, a scalar with gradients; the logits [b], detached).

    policy: the generator in training. pavrm: the frozen reward, any function of (x, t, context, **conditions)
    that gives logits [b]. x_T [b, c, f, h, w]: noise. context [b, l, d_text]: the prompts. step: from 1 to
    num_steps, the Euler step whose result is rewarded; `draw_step` draws it. num_steps: N. rollout_passes
    (0: every step) and shift: as in `rollout`. reward_weight: lambda. conditions: what an image-to-video
    model is given beside the prompt.
    """
    times = schedule(num_steps, shift, x_T.device)              # from t = 1 (noise) down to t = 0 (video)
    t = times[step - 1].expand(len(x_T))                        # s + dt, where the rewarded step starts
    s = times[step].expand(len(x_T))                            # where the rewarded step ends

    x = rollout(policy, x_T, context, num_steps, stop=step - 1, passes=rollout_passes, shift=shift,
                **conditions)                                   # x_{s+dt}, without gradients
    v = policy(x, t, context, **conditions)                     # from here on with gradients
    x_s = euler_step(x, v, t, s)                                # Eq. 7
    r = pavrm(x_s, s, context, **conditions)                    # [b]
    return reward_weight * REWARD_LOSSES[loss](r).mean(), r.detach()


def sft_loss(policy, x0, x1, t, context, weight=None, **conditions):
    """Alg. 1, the SFT update (Eq. 10): flow matching on curated latents -> a scalar.

    x0 [b, c, f, h, w]: the latents. x1: noise of the same shape. t [b]: times. context [b, l, d_text]: the
    prompts. weight [b]: a factor for each video; RWR gives exp(reward), scaled to mean 1, and the generator's
    own samples as x0.
    """
    # the model replaces the noised first frame by the given one, if there is one
    v = policy(add_noise(x0, x1, t), t, context, **conditions)
    return flow_matching_loss(v, x0, x1, weight, given=given_frames(conditions))


def steps_of_part(part, num_steps, expert_steps=None):
    """The range of the steps in a part of the trajectory. The first step of a trajectory is step 1.

    expert_steps: the range of the steps of the expert that trains, if the generator has two. Then only steps
    that are in both ranges count. Raises InputError if no step is left.
    """
    begin, end = THIRDS[part]                                   # in thirds
    steps, whose = range(num_steps * begin // 3 + 1, num_steps * end // 3 + 1), ""
    if expert_steps is not None:
        steps = range(max(steps.start, expert_steps.start), min(steps.stop, expert_steps.stop))
        whose = " of the --expert that trains"
    if not steps:
        raise InputError(f"--num_inference_steps {num_steps} leaves the {part} part of the trajectory "
                         f"without a step{whose}")
    return steps


def draw_step(seed, iteration, num_steps, part="full", expert_steps=None):
    """The rewarded step of an iteration, from 1 to num_steps, uniform over a part of the trajectory (Alg. 1).

    expert_steps: as in `steps_of_part`. The step depends only on (seed, iteration), so it is the same on
    every rank and after a resume.
    """
    steps = steps_of_part(part, num_steps, expert_steps)
    generator = random_generator(seed, "reward step", iteration)
    return steps[int(torch.randint(len(steps), (1,), generator=generator))]
