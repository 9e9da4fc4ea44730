"""prfl.py against Algorithm 1 written out by hand, finite differences, and the formulas of its losses."""
import math
from collections import Counter

import pytest
import torch

import flow
import prfl
from common import InputError
from model import VideoDiT
from pavrm import PAVRM

TINY = dict(in_dim=4, out_dim=4, dim=24, ffn_dim=32, num_heads=2, num_layers=2, freq_dim=16, text_dim=8,
            text_len=3)
N = 6


@pytest.fixture
def models():
    """A policy with a random head (Wan's own start is zero) and its reward model, float64."""
    torch.manual_seed(0)
    policy = VideoDiT(**TINY)
    torch.nn.init.normal_(policy.head.head.weight, std=0.2)
    pavrm = PAVRM.from_generator(policy, 1).freeze()
    return policy.double(), pavrm.double()


@pytest.fixture
def batch():
    g = torch.Generator().manual_seed(1)
    return (torch.randn(3, 4, 2, 2, 2, generator=g, dtype=torch.float64),
            torch.randn(3, 3, 8, generator=g, dtype=torch.float64))


def gradients(policy, loss):
    policy.zero_grad(set_to_none=True)
    loss.backward()
    return {name: p.grad.clone() for name, p in policy.named_parameters()}


def euler(policy, x, context, first, last):
    """Steps first + 1 .. last of N, by hand: dt = 1 / N, from t = 1 - first / N."""
    for i in range(first, last):
        t = torch.full((len(x),), 1 - i / N, dtype=torch.float64)
        x = x - policy(x, t, context) / N
    return x


def judged(pavrm, x, context, step):
    return pavrm(x, torch.full((len(x),), 1 - step / N, dtype=torch.float64), context)


def close(a, b, rtol=1e-4):
    """t is float32 in the code and float64 by hand: equal to about 1e-6."""
    return all(torch.allclose(a[name], b[name], rtol=rtol, atol=rtol * a[name].abs().max().item())
               for name in a)


# ---- the reward update
@pytest.mark.parametrize("step", [1, 4, N])
def test_gradient_is_the_finite_difference_of_the_one_step(models, batch, step):
    policy, pavrm = models
    x_T, context = batch
    loss, _ = prfl.reward_update_loss(policy, pavrm, x_T, context, step, N)
    grads = gradients(policy, loss)
    times = flow.schedule(N)
    x = flow.rollout(policy, x_T, context, N, stop=step - 1)  # x_{s+dt}: held while the weights move
    t, s = times[step - 1].expand(3), times[step].expand(3)

    @torch.no_grad()
    def one_step():
        return -pavrm(x - (t[0] - s[0]).double() * policy(x, t, context), s, context).mean().item()

    g, h = torch.Generator().manual_seed(2), 1e-5
    for name, p in policy.named_parameters():
        way = torch.randn(p.shape, generator=g, dtype=torch.float64)
        way /= way.norm()
        start, values = p.detach().clone(), []
        for sign in (1, -1):
            p.data.copy_(start + sign * h * way)
            values.append(one_step())
        p.data.copy_(start)
        slope = (values[0] - values[1]) / (2 * h)
        assert (grads[name] * way).sum().item() == pytest.approx(slope, rel=1e-5, abs=1e-9), name


def test_loss_reward_and_gradient_are_algorithm_1_by_hand(models, batch):
    policy, pavrm = models
    x_T, context = batch
    loss, reward = prfl.reward_update_loss(policy, pavrm, x_T, context, 4, N)
    with torch.no_grad():
        x = euler(policy, x_T, context, 0, 3)
    r = judged(pavrm, euler(policy, x, context, 3, 4), context, 4)
    torch.testing.assert_close(reward, r.detach(), rtol=1e-5, atol=1e-7)
    assert loss.item() == pytest.approx(-r.mean().item(), rel=1e-5) and not reward.requires_grad
    grads = gradients(policy, loss)
    assert close(grads, gradients(policy, -r.mean()))
    through_all = -judged(pavrm, euler(policy, x_T, context, 0, 4), context, 4).mean()
    assert not close(grads, gradients(policy, through_all), rtol=1e-2)   # no gradient through the rollout


@pytest.mark.parametrize("N, passes, step, route", [
    (6, 4, 1, [0]), (6, 4, 4, [0, 2, 3]), (6, 4, 6, [0, 2, 4, 5]),  # strides of ceil(6 / 4) = 2, or the rest
    (10, 4, 5, [0, 3, 4]), (10, 4, 10, [0, 3, 6, 9]),
    (10, 1, 2, [0, 1]), (10, 1, 10, [0, 9]),                            # one pass, straight to x_{s+dt}
    (6, 0, 3, [0, 1, 2])])                                              # every step
def test_steady_by_hand(models, batch, N, passes, step, route):
    """A coarse rollout up to x_{s+dt}, one step of 1 / N with gradients, -log sigmoid(r)."""
    policy, pavrm = models
    x, context = batch
    at = lambda place: torch.full((3,), 1 - place / N)
    with torch.no_grad():
        for a, b in zip(route, route[1:]):
            x = x - (b - a) / N * policy(x, at(a), context)
    assert route[-1] == step - 1
    x = x - policy(x, at(step - 1), context) / N
    r = pavrm(x, at(step), context)
    wanted = -torch.log(1 / (1 + torch.exp(-r))).mean()
    loss, reward = prfl.reward_update_loss(policy, pavrm, *batch, step, N, rollout_passes=passes,
                                           loss="logsigmoid")
    torch.testing.assert_close(reward, r.detach(), rtol=1e-5, atol=1e-6)
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    assert close(gradients(policy, loss), gradients(policy, wanted))


def test_the_recipes_are_algorithm_1_and_the_steady_one():
    assert prfl.RECIPES == {
        "paper": {"rollout_passes": 0, "reward_loss": "linear", "lr_scheduler": "constant"},
        "steady": {"rollout_passes": 4, "reward_loss": "logsigmoid", "lr_scheduler": "linear"}}


def test_the_reward_model_stays_bit_for_bit_and_every_block_learns(models, batch):
    policy, pavrm = models
    x_T, context = batch
    before = {name: value.clone() for name, value in pavrm.state_dict().items()}
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3)
    rewards = []
    for _ in range(5):
        optimizer.zero_grad()
        loss, reward = prfl.reward_update_loss(policy, pavrm, x_T, context, N, N)
        loss.backward()
        optimizer.step()
        rewards.append(reward.mean().item())
    assert all(p.grad is None for p in pavrm.parameters())
    assert all(torch.equal(value, before[name]) for name, value in pavrm.state_dict().items())
    for name, p in policy.named_parameters():
        assert p.grad.abs().max() > 0, name
    assert rewards[-1] > rewards[0]                                      # and the reward is what rises


def test_gradient_checkpointing_changes_nothing(models, batch):
    policy, pavrm = models
    update = lambda: gradients(policy, prfl.reward_update_loss(policy, pavrm, *batch, 4, N)[0])
    plain = update()
    policy.gradient_checkpointing = pavrm.trunk.gradient_checkpointing = True
    assert close(plain, update(), rtol=1e-12)


def test_reward_losses(models, batch):
    r = torch.tensor([-30.0, -1.0, 0.0, 2.0, 8.0], dtype=torch.float64, requires_grad=True)
    sigmoid = lambda v: 1 / (1 + math.exp(-v))
    formulas = {"linear": (lambda v: -v, lambda v: -1),
                "logsigmoid": (lambda v: -math.log(sigmoid(v)), lambda v: sigmoid(v) - 1),
                "sigmoid_hinge": (lambda v: 0.1 * (2 - sigmoid(v)),
                                  lambda v: -0.1 * sigmoid(v) * (1 - sigmoid(v)))}
    assert formulas.keys() == prfl.REWARD_LOSSES.keys()
    for name, (value, slope) in formulas.items():
        loss = prfl.REWARD_LOSSES[name](r)
        grad, = torch.autograd.grad(loss.sum(), r)
        torch.testing.assert_close(loss.detach(), r.detach().clone().apply_(value))
        torch.testing.assert_close(grad, r.detach().clone().apply_(slope))
        policy, pavrm = models
        loss, reward = prfl.reward_update_loss(policy, pavrm, *batch, 4, N, loss=name)
        assert loss.item() == pytest.approx(sum(map(value, reward.tolist())) / 3)


def test_lambda_scales_the_gradient(models, batch):
    policy, pavrm = models
    grads = [gradients(policy, prfl.reward_update_loss(policy, pavrm, *batch, 4, N, reward_weight=k)[0])
             for k in (1.0, 5.0)]
    assert close({name: 5 * g for name, g in grads[0].items()}, grads[1], rtol=1e-10)


# ---- the rewarded step
@pytest.mark.parametrize("part, steps", [("early", range(1, 14)), ("middle", range(14, 27)),
                                         ("late", range(27, 41)), ("full", range(1, 41))])
def test_the_rewarded_step_is_uniform_over_its_part(part, steps):
    expected = 60
    counts = Counter(prfl.draw_step(0, i, 40, part) for i in range(expected * len(steps)))
    assert set(counts) == set(steps)
    chi2, free = sum((counts[s] - expected) ** 2 / expected for s in steps), len(steps) - 1
    assert abs(chi2 - free) < 4 * math.sqrt(2 * free)  # neither skewed nor too even for chance


def test_the_rewarded_step_depends_on_seed_and_iteration_only():
    drawn = lambda seed: [prfl.draw_step(seed, i, 40) for i in range(50)]
    torch.manual_seed(3)
    first = drawn(0)
    torch.manual_seed(4)
    assert drawn(0) == first and drawn(1) != first


def test_a_part_without_steps():
    with pytest.raises(InputError, match="--num_inference_steps 2 .*early"):
        prfl.draw_step(0, 0, 2, "early")
    assert {prfl.draw_step(0, i, 1) for i in range(9)} == {1}


# ---- the SFT update
def test_sft_loss_is_flow_matching(models):
    policy, _ = models
    g = torch.Generator().manual_seed(2)
    x0, x1 = (torch.randn(4, 4, 2, 2, 2, generator=g, dtype=torch.float64) for _ in range(2))
    context, t = torch.randn(4, 3, 8, generator=g, dtype=torch.float64), torch.tensor([0.1, 0.4, 0.6, 0.9])
    weight = torch.tensor([0.5, 2.0, 0.0, 1.5])
    errors = []
    for i in range(4):                                                   # Eq. 2, one example at a time
        x_t = (1 - t[i].double()) * x0[i] + t[i].double() * x1[i]
        v = policy(x_t[None], t[i:i + 1], context[i:i + 1])[0]
        errors.append(((v - (x1[i] - x0[i])) ** 2).mean())
    errors = torch.stack(errors)
    plain, weighted = (prfl.sft_loss(policy, x0, x1, t, context, w) for w in (None, weight))
    assert plain.item() == pytest.approx(errors.mean().item(), rel=1e-5)
    assert weighted.item() == pytest.approx((weight * errors).mean().item(), rel=1e-5)
    assert close(gradients(policy, weighted), gradients(policy, (weight * errors).mean()))
