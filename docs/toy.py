"""PRFL on points of a plane: this repository's own functions, with two small MLPs as generator and reward
model.

    python -m docs.toy                      10 seconds of one core; put a breakpoint anywhere and step through

A "video" is a point, x [b, 2, 1, 1, 1], and has no prompt. The base generator learns a ring. Points on the
right half of the ring are good. The reward model learns this from the base's own points at every noise level,
as PAVRM does. It hardly sees a finished point off the ring. Then Algorithm 1 trains the base, with SFT
updates and without.

The picture has three panels, in which good points are green. The base makes the whole ring. PRFL makes its
right half. Without SFT updates the points have left the ring, and still the reward is high: it has been
hacked.
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

SHAPE = (2, 1, 1, 1)                                    # of a point
N = 16                                                  # Euler steps of a rollout
BATCH = 256                                             # points per update
noise = lambda n, *keys: torch.randn(n, *SHAPE, generator=random_generator(*keys))


@dataclass
class Config:
    output: str = arg("runs/toy.png", "file for the picture")
    seed: int = arg(0, "seed of everything random", at_least=0)


class MLP(nn.Sequential):
    """Called as VideoDiT or PAVRM. With 2 outputs: a velocity [b, 2, 1, 1, 1]. With 1 output: a logit [b]."""

    def __init__(self, outputs, d=96):
        super().__init__(nn.Linear(3, d), nn.SiLU(), nn.Linear(d, d), nn.SiLU(), nn.Linear(d, d), nn.SiLU(),
                         nn.Linear(d, outputs))

    def forward(self, x, t, context):
        y = super().forward(torch.cat([x.flatten(1), t[:, None]], 1))               # [b, outputs]
        if y.shape[1] == 2:
            return y.view_as(x)
        return y[:, 0]


def ring(seed, step, span):
    """Points of the ring whose angle to the x axis is at most `span`. With pi they are on the whole ring."""
    angle = (2 * torch.rand(BATCH, generator=random_generator(seed, "angle", step)) - 1) * span
    radius = 1 + 0.04 * torch.randn(BATCH, generator=random_generator(seed, "radius", step))
    return torch.stack([radius * angle.cos(), radius * angle.sin()], 1).view(-1, *SHAPE)


def is_good(x):
    """The truth: is a point on the ring, and in its right half? -> bool [b]"""
    return ((x.flatten(1).norm(dim=1) - 1).abs() < 0.15) & (x[:, 0].flatten() > 0)


def update(model, optimizer, loss, step):
    optimizer.zero_grad()
    loss.backward()
    average_and_clip_gradients(model.parameters(), 1.0, step)
    optimizer.step()


def flow_loss(model, seed, step, span):
    """Eq. 10, on points of the ring."""
    t = torch.rand(BATCH, generator=random_generator(seed, "t", step))
    return sft_loss(model, ring(seed, step, span), noise(BATCH, seed, "x1", step), t, None)


def train_reward(base, seed):
    """Eq. 6: predicts the label of the finished point, at every noise level."""
    reward = MLP(1)
    optimizer = torch.optim.AdamW(reward.parameters(), 2e-3)
    own = rollout(base, noise(4096, seed, "own"), None, N)
    labels = is_good(own).float()
    for step in progress(range(300), "reward model"):
        i = torch.randint(len(own), (BATCH,), generator=random_generator(seed, "batch", step))
        t = torch.rand(BATCH, generator=random_generator(seed, "reward t", step))
        x_t = add_noise(own[i], noise(BATCH, seed, "reward x1", step), t)
        update(reward, optimizer, bce_loss(reward(x_t, t, None), labels[i]), step)
    return reward.requires_grad_(False)


def align(name, base, reward, seed, sft_updates=True, reward_updates=True):
    """Algorithm 1, or half of it. Of the curated points five in six are good."""
    policy = copy.deepcopy(base)
    optimizer = torch.optim.AdamW(policy.parameters(), 3e-4)
    for k in progress(range(120), name):
        if sft_updates:
            update(policy, optimizer, flow_loss(policy, seed + 1, k, 0.6 * torch.pi), k)
        if reward_updates:
            x_T = noise(BATCH, seed, "x_T", k)
            step = draw_step(seed, k, N)
            loss, _ = reward_update_loss(policy, reward, x_T, None, step, N)
            update(policy, optimizer, loss, k)
    return policy


def panel(x, title, size=120):
    """A picture, uint8 [2 size, 2 size, 3], of the plane from -2.5 to 2.5, with a dot for each point."""
    image = torch.tensor(PAPER, dtype=torch.uint8).expand(size, size, 3).clone()
    column, row = ((x.flatten(1) * torch.tensor([1, -1]) / 5 + 0.5) * size).long().clamp(0, size - 1).T
    image[row, column] = torch.tensor([RED, GREEN], dtype=torch.uint8)[is_good(x).long()]
    image = image.repeat_interleave(2, 0).repeat_interleave(2, 1)
    draw_text(image.numpy(), title, 6, 6)
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
    good, logit, panels = {}, {}, []
    for name, policy in policies.items():
        x = rollout(policy, noise(2000, seed, "test"), None, N)
        good[name] = is_good(x).float().mean().item()
        logit[name] = reward(x, torch.zeros(len(x)), None).mean().item()
        panels.append(panel(x, f"{name}: {good[name]:.0%} good"))
        print(f"{name:12} good {good[name]:.3f}   reward {logit[name]:+.2f}")
    write_png(config.output, torch.cat(panels[:3], 1))
    print(f"wrote {config.output}")
    assert abs(good["base"] - 0.5) < 0.1, "the base should make the whole ring"
    assert good["PRFL"] > good["SFT alone"] + 0.03 > good["base"] + 0.1, "the reward should add to SFT"
    hacked = good["without SFT"] < 0.2 and logit["without SFT"] > logit["base"] + 2
    assert hacked, "without SFT the reward should rise while the points become bad"


if __name__ == "__main__":
    cli(main, Config, __doc__)
