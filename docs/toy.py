"""PRFL on points of a plane: this repository's own functions, with two small MLPs in the place of DiT and reward model.

    python -m docs.toy                      10 seconds of one core; put a breakpoint anywhere and step through

The base learns a ring; points of its right half are good. A reward model learns that from the base's own points at every
noise level, as PAVRM does; what lies off the ring nobody told it. Algorithm 1 then trains the base, with its SFT updates and
without. Three panels, green where a point is good: the base has the whole ring; PRFL its right half; without SFT updates the
reward is content and the points have left the ring: hacked. A "video" is a point: x [b, 2, 1, 1, 1], without a prompt.
"""
import copy
from dataclasses import dataclass

import torch
from torch import nn

from common import arg, average_and_clip_gradients, cli, progress, random_generator
from flow import add_noise, rollout
from formats.picture import GREEN, PAPER, RED, draw_text
from formats.video import write_png
from pavrm import bce_loss
from prfl import draw_step, reward_update_loss, sft_loss

SHAPE, N, BATCH = (2, 1, 1, 1), 16, 256                 # of a point; Euler steps; points of an update
noise = lambda n, *keys: torch.randn(n, *SHAPE, generator=random_generator(*keys))


@dataclass
class Config:
    output: str = arg("runs/toy.png", "the picture")
    seed: int = arg(0, "of everything random", at_least=0)


class MLP(nn.Sequential):       # two outputs: velocity [b, 2, 1, 1, 1], called as VideoDiT is; one: logit [b], as PAVRM is
    def __init__(self, outputs, d=96):
        super().__init__(nn.Linear(3, d), nn.SiLU(), nn.Linear(d, d), nn.SiLU(), nn.Linear(d, d), nn.SiLU(), nn.Linear(d, outputs))

    def forward(self, x, t, context):
        y = super().forward(torch.cat([x.flatten(1), t[:, None]], 1))               # [b, outputs]
        return y.view_as(x) if y.shape[1] == 2 else y[:, 0]


def ring(seed, step, span):                             # points whose angle to the x axis is at most span; pi: the whole ring
    angle = (2 * torch.rand(BATCH, generator=random_generator(seed, "angle", step)) - 1) * span
    radius = 1 + 0.04 * torch.randn(BATCH, generator=random_generator(seed, "radius", step))
    return torch.stack([radius * angle.cos(), radius * angle.sin()], 1).view(-1, *SHAPE)


def is_good(x):                                         # the truth: on the ring, and in its right half -> bool [b]
    return ((x.flatten(1).norm(dim=1) - 1).abs() < 0.15) & (x[:, 0].flatten() > 0)


def update(model, optimizer, loss, step):
    optimizer.zero_grad()
    loss.backward()
    average_and_clip_gradients(model.parameters(), 1.0, step)
    optimizer.step()


def flow_loss(model, seed, step, span):                 # Eq. 10, on points of the ring
    t = torch.rand(BATCH, generator=random_generator(seed, "t", step))
    return sft_loss(model, ring(seed, step, span), noise(BATCH, seed, "x1", step), t, None)


def train_reward(base, seed):                           # Eq. 6: the finished point's label, at every noise level
    optimizer = torch.optim.AdamW((reward := MLP(1)).parameters(), 2e-3)
    own = rollout(base, noise(4096, seed, "own"), None, N)
    labels = is_good(own).float()
    for step in progress(range(300), "reward model"):
        i = torch.randint(len(own), (BATCH,), generator=random_generator(seed, "batch", step))
        t = torch.rand(BATCH, generator=random_generator(seed, "reward t", step))
        x_t = add_noise(own[i], noise(BATCH, seed, "reward x1", step), t)
        update(reward, optimizer, bce_loss(reward(x_t, t, None), labels[i]), step)
    return reward.requires_grad_(False)


def align(name, base, reward, seed, sft_updates=True, reward_updates=True):         # Algorithm 1, or half of it
    policy = copy.deepcopy(base)
    optimizer = torch.optim.AdamW(policy.parameters(), 3e-4)
    for k in progress(range(120), name):
        if sft_updates:
            update(policy, optimizer, flow_loss(policy, seed + 1, k, 0.6 * torch.pi), k)      # curated: five in six are good
        if reward_updates:
            x_T, s = noise(BATCH, seed, "x_T", k), draw_step(seed, k, N)
            update(policy, optimizer, reward_update_loss(policy, reward, x_T, None, s, N)[0], k)
    return policy


def panel(x, title, size=120):                          # a dot for each point of [-2.5, 2.5]^2 -> uint8 [2 size, 2 size, 3]
    image = torch.tensor(PAPER, dtype=torch.uint8).expand(size, size, 3).clone()
    column, row = ((x.flatten(1) * torch.tensor([1, -1]) / 5 + 0.5) * size).long().clamp(0, size - 1).T
    image[row, column] = torch.tensor([RED, GREEN], dtype=torch.uint8)[is_good(x).long()]
    draw_text((image := image.repeat_interleave(2, 0).repeat_interleave(2, 1)).numpy(), title, 6, 6)
    return image


def main(config):
    torch.manual_seed(config.seed)
    seed, base = config.seed, MLP(2)
    optimizer = torch.optim.AdamW(base.parameters(), 2e-3)
    for step in progress(range(500), "base"):
        update(base, optimizer, flow_loss(base, seed, step, torch.pi), step)
    reward = train_reward(base, seed)
    policies = {"base": base, "PRFL": align("PRFL", base, reward, seed),
                "without SFT": align("without SFT", base, reward, seed, sft_updates=False),
                "SFT alone": align("SFT alone", base, reward, seed, reward_updates=False)}
    good, pleased, panels = {}, {}, []
    for name, policy in policies.items():
        x = rollout(policy, noise(2000, seed, "test"), None, N)
        good[name], pleased[name] = is_good(x).float().mean().item(), reward(x, torch.zeros(len(x)), None).mean().item()
        panels.append(panel(x, f"{name}: {good[name]:.0%} good"))
        print(f"{name:12} good {good[name]:.3f}   reward {pleased[name]:+.2f}")
    write_png(config.output, torch.cat(panels[:3], 1))
    print(f"wrote {config.output}")
    assert abs(good["base"] - 0.5) < 0.1, "the base has the whole ring"
    assert good["PRFL"] > good["SFT alone"] + 0.03 > good["base"] + 0.1, "the reward adds to SFT"
    assert good["without SFT"] < 0.2 and pleased["without SFT"] > pleased["base"] + 2, "the reward content, the points bad"


if __name__ == "__main__":
    cli(main, Config, __doc__)
