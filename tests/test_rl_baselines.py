"""rl_baselines.py against closed forms: a Gaussian target, whose velocity is known; the densities of
torch.distributions; minima of quadratics; and whole iterations written out by hand."""
import math
from types import SimpleNamespace

import pytest
import torch
from test_training import one_line
from tiny import command, distance, metrics, run, weights, write_data

import common
import data
import flow
import rl_baselines
import train_align
from common import InputError
from formats import runs
from formats.shards import Shards
from model import VideoDiT, load_transformer
from pavrm import PAVRM, load_pavrm

F64 = torch.float64


# ---- RWR
def test_rwr_weights():
    rewards = torch.tensor([-2.0, 0.0, 1.0, 3.0])
    weights, effective = rl_baselines.rwr_weights(rewards)
    wanted = rewards.double().exp() / rewards.double().exp().mean()
    torch.testing.assert_close(weights, wanted.float())
    assert weights.mean().item() == pytest.approx(1)
    assert effective == pytest.approx((wanted.sum() ** 2 / (wanted ** 2).sum() / 4).item())
    constant, effective = rl_baselines.rwr_weights(torch.full((7,), 1.3))
    assert torch.equal(constant, torch.ones(7)) and effective == pytest.approx(1)
    large, effective = rl_baselines.rwr_weights(torch.tensor([1000.0, 0.0]))     # exp(1000) is no number
    assert torch.equal(large, torch.tensor([2.0, 0.0])) and effective == pytest.approx(0.5)


class Made:
    """RWR's own samples of `run` on shards of 32 clips, with a sampler that returns each sample's index and a
    reward that is a tenth of it. `asked`: the indices of each batch that was made."""

    def __init__(self, tmp_path, monkeypatch):
        self.asked, self.path = [], tmp_path
        write_data(tmp_path / "data")
        self.shards = Shards(tmp_path / "data")
        self.policy = SimpleNamespace(config={"model_type": "t2v"})
        monkeypatch.setattr(rl_baselines.flow, "sample", self.sample)

    def sample(self, policy, shape, context, seed, indices, num_steps, *, shift, batch_size, autocast):
        assert (seed, num_steps, shift, batch_size) == (2, 4, 5.0, len(indices)) and autocast
        assert torch.equal(context, self.shards.batch(self.rows[indices])["context"])
        self.asked.append(list(indices))
        return torch.tensor(indices).float().view(-1, 1, 1, 1, 1).expand(-1, *shape).clone()

    def run(self, name, m=11, rank=0, ranks=1, batch_size=4, seed=0, dtype=torch.float32, reward=None):
        self.rows, self.asked = torch.arange(m).flip(0), []
        config = SimpleNamespace(task="t2v", num_samples=m, num_inference_steps=4, shift=5.0, seed=seed,
                                 batch_size=batch_size)
        runtime = common.Runtime(rank, ranks, torch.device("cpu"), dtype)
        return rl_baselines.own_samples(self.path / name, self.policy,
                                        reward or (lambda x, t, context: x.flatten(1)[:, 0] / 10),
                                        self.shards, self.rows, config, runtime)


@pytest.fixture
def made(tmp_path, monkeypatch):
    return Made(tmp_path, monkeypatch)


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


def test_rwr_samples_are_made_once_and_read_from_shards(made):
    """11 samples in batches of 4: each with the prompt of its own row and its reward, and found again."""
    for batches in ([[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 0]], []):
        own, weights = made.run("own")
        assert made.asked == batches and len(own) == 11
    batch = own.batch(range(11))
    assert batch["latents"].flatten(1).mean(1).tolist() == list(range(11))
    assert torch.equal(batch["context"], made.shards.batch(made.rows)["context"])
    assert batch["prompt"] == [f"prompt {i}" for i in range(10, -1, -1)]
    torch.testing.assert_close(weights, rl_baselines.rwr_weights(torch.arange(11.) / 10)[0])
    with pytest.raises(InputError, match="own: RWR's own samples were made with other seed: remove"):
        made.run("own", seed=1)
    (made.path / "own/shard-00000.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match="own samples are damaged .*: remove this folder, and they"):
        made.run("own")


def test_rwr_samples_of_two_ranks_are_those_of_one(made, monkeypatch):
    """Byte for byte, in shards of two batches."""
    monkeypatch.setattr(rl_baselines, "SHARD_BYTES", 8 * 4 * (512 + 24 + 1))
    made.run("one", 19)
    sent = []
    monkeypatch.setattr(common, "gather", lambda value, to=None: sent.append(value) or [value][to == 0:])
    made.run("one", 19, rank=1, ranks=2)                        # which then finds what the one rank has made
    assert made.asked == [[4, 5, 6, 7], [12, 13, 14, 15], [1, 2, 3, 4]]
    other = iter([part for part in sent if isinstance(part, list)])
    monkeypatch.setattr(common, "gather", lambda value, to=None: [value, next(other)] if to == 0 else [value])
    made.run("two", 19, ranks=2)
    assert made.asked == [[0, 1, 2, 3], [8, 9, 10, 11], [16, 17, 18, 0]]            # as many on each rank
    assert files_of(made.path / "one") == files_of(made.path / "two")
    assert [entry["count"] for entry in Shards(made.path / "one").index["shards"]] == [8, 8, 3]


def test_rwr_goes_on_after_a_kill_while_the_samples_are_made(made, monkeypatch):
    """With the whole shards that are there; the folder is then as if nothing had happened."""
    monkeypatch.setattr(rl_baselines, "SHARD_BYTES", 8 * 4 * (512 + 24 + 1))
    made.run("whole", 19)
    write, written = rl_baselines.write_samples, []

    def killed(folder, samples, *more):
        written.append(len(samples))
        if len(written) == 2:                       # half of the second shard is there, and nothing names it
            (folder / "shard-00001.safetensors").write_bytes(b"half")
            raise KeyboardInterrupt
        write(folder, samples, *more)

    monkeypatch.setattr(rl_baselines, "write_samples", killed)
    with pytest.raises(KeyboardInterrupt):
        made.run("killed", 19)
    assert written == [8, 8] and len(Shards(made.path / "killed")) == 8
    made.run("killed", 19)
    assert made.asked == [[8, 9, 10, 11], [12, 13, 14, 15], [16, 17, 18, 0]]
    assert files_of(made.path / "killed") == files_of(made.path / "whole")


def test_rwr_judges_in_the_dtype_of_autocast_and_without_gradients(made):
    weight, asked = torch.ones(1, requires_grad=True), []

    def reward(x, t, context):
        asked.append((torch.is_autocast_enabled("cpu"), torch.is_grad_enabled(), t.tolist()))
        return context[:, 0, 0] * weight

    _, weights = made.run("own", 3, batch_size=3, dtype=torch.bfloat16, reward=reward)
    assert asked == [(True, False, [0, 0, 0])] and not weights.requires_grad
    with pytest.raises(FloatingPointError, match="the reward is nan"):
        made.run("nan", 3, batch_size=3, reward=lambda x, t, context: torch.full((3,), torch.nan))
    assert not (made.path / "nan/shards.json").exists()


@pytest.mark.usefixtures("cpu")
def test_the_reward_model_goes_when_rwr_has_its_samples(folder, monkeypatch):
    """Its weights are freed before the first update, in a run that made the samples and in one that found
    them."""
    loaded, load, loss = [], train_align.load_pavrm, train_align.prfl.sft_loss

    def sft_loss(*inputs, **how):
        assert all(p.is_meta for p in loaded[-1].parameters())
        return loss(*inputs, **how)

    monkeypatch.setattr(train_align, "load_pavrm", lambda *how, **more: loaded.append(load(*how, **more)) or
                        loaded[-1])
    monkeypatch.setattr(train_align.prfl, "sft_loss", sft_loss)
    run(*command(folder, "rwr", "freed", "--max_train_steps", "2"))
    run(*command(folder, "rwr", "freed", "--max_train_steps", "3", "--resume", "latest"))
    assert len(loaded) == 2 and [row["step"] for row in metrics(folder, "freed")] == [1, 2, 3]


# ---- advantages
def test_advantages_by_hand():
    r = torch.tensor([1.0, 3.0, 2.0, 2.0, -40.0, 0.0])
    by_group = rl_baselines.advantages(r, 2, 5.0)
    torch.testing.assert_close(by_group, torch.tensor([-1.0, 1, 0, 0, -1, 1]), atol=1e-3, rtol=0)
    std = r.double().sub(r.double().mean()).square().mean().sqrt().item()
    of_all = rl_baselines.advantages(r, 2, 1.0, by_group=False)
    wanted = [-1 / std, 1 / std, 0, 0, -1, 1]                                       # -20 and 20 are clipped
    torch.testing.assert_close(of_all, torch.tensor(wanted), atol=1e-3, rtol=0)
    assert torch.equal(rl_baselines.advantages(torch.full((6,), 0.7), 3, 5.0), torch.zeros(6))


def test_r_of_nft_lies_between_0_and_1():
    r = torch.tensor([-2.0, 0.0, 1.0, 9.0])
    learner = lambda **how: SimpleNamespace(config=SimpleNamespace(group_size=2, **how))
    found = rl_baselines.NFT.weigh(learner(nft_reward="advantage", advantage_clip=0.5), r)
    std = r.std(correction=0).item()
    wanted = [0.5 - min(1, 1 / std / 0.5) / 2, 0.5 + min(1, 1 / std / 0.5) / 2, 0.0, 1.0]
    torch.testing.assert_close(found, torch.tensor(wanted), atol=1e-3, rtol=0)
    found = rl_baselines.NFT.weigh(learner(nft_reward="probability", advantage_clip=5.0), r)
    torch.testing.assert_close(found, 1 / (1 + torch.exp(-r)))


# ---- the stochastic steps
MEAN, STD = 1.7, 0.6                                            # of a Gaussian x_0 in one dimension


def gaussian_velocity(x, t):
    """E[x_1 - x_0 | x_t = x] where x_0 ~ N(MEAN, STD^2) and x_1 ~ N(0, 1)."""
    variance = (1 - t) ** 2 * STD ** 2 + t ** 2
    centred = x - (1 - t) * MEAN
    return t * centred / variance - (MEAN + (1 - t) * STD ** 2 * centred / variance)


def marginals(num_steps, noise_level, start=0.8):
    """The exact mean and variance of x at each time of the chain of stochastic steps, from the right ones at
    time `start` -> [(t, mean, variance)]. A step is linear in x, so two points tell what it does to a
    distribution."""
    times = torch.linspace(start, 0, num_steps + 1, dtype=F64)
    mean, variance, found = (1 - start) * MEAN, (1 - start) ** 2 * STD ** 2 + start ** 2, []
    for t, t_next in zip(times, times[1:]):
        x = torch.tensor([0.0, 1.0], dtype=F64).view(2, 1, 1, 1, 1)
        led, std = rl_baselines.sde_step(x, gaussian_velocity(x, t), t.expand(2), t_next.expand(2),
                                         noise_level)
        offset, slope = led[0].item(), (led[1] - led[0]).item()
        mean, variance = offset + slope * mean, slope ** 2 * variance + std[0].item() ** 2
        found.append((t_next.item(), mean, variance))
    return found


@pytest.mark.parametrize("noise_level", [0.3, 0.7, 1.5])
def test_stochastic_steps_have_the_marginals_of_the_flow(noise_level):
    """x_t ~ N((1 - t) MEAN, (1 - t)^2 STD^2 + t^2), up to an error in proportion to the step."""
    def errors(num_steps):
        found = marginals(num_steps, noise_level)
        return (max(abs(mean - (1 - t) * MEAN) for t, mean, _ in found),
                max(abs(variance - (1 - t) ** 2 * STD ** 2 - t ** 2) for t, _, variance in found))

    (mean, coarse), (_, fine) = errors(100), errors(800)
    assert mean < 1e-5 and coarse < 0.06 and fine == pytest.approx(coarse / 8, rel=0.2)


def test_the_first_stochastic_step_is_too_noisy_however_small_it_is():
    """At t = 1 its variance is (1 - a^2 / 2)^2 + a^2 = 1 + a^4 / 4, as sigma^2 dt does not vanish."""
    x = torch.tensor([0.0, 1.0], dtype=F64).view(2, 1, 1, 1, 1)
    for dt in (1e-2, 1e-3):
        led, std = rl_baselines.sde_step(x, torch.zeros_like(x), torch.ones(2), torch.full((2,), 1 - dt), 0.7)
        variance = (led[1] - led[0]).item() ** 2 + std[0].item() ** 2
        assert variance == pytest.approx(1 + 0.7 ** 4 / 4, abs=2 * dt)


def test_a_stochastic_step_by_hand():
    """At t = .75 with a = .7: sigma = .7 sqrt(3). At t = 1 sigma is that of the next time. Without noise it
    is Euler's."""
    x, v = torch.full((1, 1, 1, 1, 1), 0.4, dtype=F64), torch.full((1, 1, 1, 1, 1), -1.2, dtype=F64)
    at = lambda t: torch.tensor([t])
    mean, std = rl_baselines.sde_step(x, v, at(0.75), at(0.5), 0.7)
    sigma = 0.7 * math.sqrt(3)
    assert mean.item() == pytest.approx(
        0.4 - 0.25 * (-1.2 + sigma ** 2 / 1.5 * (0.4 + 0.25 * -1.2)))
    assert std.item() == pytest.approx(sigma * 0.5)
    mean, std = rl_baselines.sde_step(x, v, at(1.0), at(0.75), 0.7)
    assert mean.item() == pytest.approx(0.4 - 0.25 * (-1.2 + sigma ** 2 / 2 * 0.4))
    assert std.item() == pytest.approx(sigma * 0.5)
    mean, _ = rl_baselines.sde_step(x, v, at(0.75), at(0.5), 1e-9)
    torch.testing.assert_close(mean, flow.euler_step(x, v, at(0.75), at(0.5)))


def test_log_probabilities_and_divergence_are_those_of_normal_distributions():
    x, mean, other = torch.randn(3, 2, 4, 1, 3, 2, dtype=F64)
    std = torch.tensor([0.3, 2.0], dtype=F64).view(2, 1, 1, 1, 1)
    normal = torch.distributions.Normal
    torch.testing.assert_close(rl_baselines.log_prob(x, mean, std),
                               normal(mean, std).log_prob(x).flatten(1).mean(1))
    kl = torch.distributions.kl_divergence(normal(mean, std), normal(other, std)).flatten(1).mean(1)
    torch.testing.assert_close(rl_baselines.kl_of_steps(mean, other, std), kl)


def test_the_divergence_is_the_published_one_of_velocities():
    """dt / 2 (sigma (1 - t) / (2 t) + 1 / sigma)^2 |v - v_ref|^2"""
    x, v, v_ref = torch.randn(3, 2, 4, 1, 3, 2, dtype=F64)
    t, t_next = torch.tensor([0.6, 0.3]), torch.tensor([0.5, 0.1])
    steps = [rl_baselines.sde_step(x, z, t, t_next, 0.7) for z in (v, v_ref)]
    found = rl_baselines.kl_of_steps(steps[0][0], steps[1][0], steps[0][1])
    t, t_next = t.double(), t_next.double()
    sigma = 0.7 * (t / (1 - t)).sqrt()
    factor = (t - t_next) / 2 * (sigma * (1 - t) / (2 * t) + 1 / sigma) ** 2
    torch.testing.assert_close(found, factor * (v - v_ref).square().flatten(1).mean(1), rtol=1e-5, atol=0)


def test_the_first_gradient_of_grpo_is_the_policy_gradient():
    """At ratio 1: -A grad log p, whatever the clip."""
    x, mean = torch.randn(2, 3, 2, 1, 2, 2, dtype=F64)
    mean.requires_grad_(True)
    std, advantage = torch.full((3, 1, 1, 1, 1), 0.4, dtype=F64), torch.tensor([1.5, -0.5, 0.0], dtype=F64)
    before = rl_baselines.log_prob(x, mean, std).detach()
    loss, clipped = rl_baselines.grpo_loss(x, mean, std, before, advantage, 1e-4)
    found, = torch.autograd.grad(loss, mean)
    wanted, = torch.autograd.grad(-(advantage * rl_baselines.log_prob(x, mean, std)).mean(), mean)
    torch.testing.assert_close(found, wanted)
    assert loss.item() == pytest.approx(-1 / 3) and clipped == 0


def test_the_clip_of_grpo_by_hand():
    """It holds what has already become more probable and is good, or less probable and is bad."""
    ratio = torch.tensor([1.3, 1.3, 0.8, 0.8, 1.05], dtype=F64)
    advantage = torch.tensor([1.0, -1, 1, -1, 1], dtype=F64)
    mean = torch.zeros(5, 1, 1, 1, 2, dtype=F64, requires_grad=True)
    x, std = torch.ones(5, 1, 1, 1, 2, dtype=F64), torch.ones(5, 1, 1, 1, 1, dtype=F64)
    old = rl_baselines.log_prob(x, mean, std).detach() - ratio.log()
    loss, clipped = rl_baselines.grpo_loss(x, mean, std, old, advantage, 0.1)
    assert loss.item() == pytest.approx(-(1.1 - 1.3 + 0.8 - 0.9 + 1.05) / 5)
    assert clipped.item() == pytest.approx(2 / 5)
    grad, = torch.autograd.grad(loss, mean)
    moves = grad.flatten(1).abs().sum(1) > 0
    assert moves.tolist() == [False, True, True, False, True]


# ---- the objective of NFT
@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_the_minimum_of_nft_is_the_published_one(beta):
    """v = v_old + (2 / beta) E[r (x_1 - x_0 - v_old)], where v_old is the mean velocity of all samples."""
    x0, x1 = torch.randn(2, 64, 2, 1, 2, 2, dtype=F64)
    r, v_old = torch.rand(64, dtype=F64), (x1 - x0).mean(0, keepdim=True)
    best = v_old + 2 / beta * (r.view(-1, 1, 1, 1, 1) * (x1 - x0 - v_old)).mean(0, keepdim=True)
    loss = lambda v: rl_baselines.nft_loss(v.expand_as(x0), v_old.expand_as(x0), x0, x1, r, beta)
    best.requires_grad_(True)
    grad, = torch.autograd.grad(loss(best), best)
    assert grad.abs().max() < 1e-7                              # the loss is float32
    for _ in range(9):                                          # it is quadratic: any way from there is worse
        assert loss(best + torch.randn_like(best)) > loss(best)


def test_nft_is_flow_matching_where_all_is_good_and_its_mirror_where_all_is_bad():
    v, v_old, x0, x1 = torch.randn(4, 3, 2, 2, 2, 2)
    ones = torch.ones(3)
    good = rl_baselines.nft_loss(v, v_old, x0, x1, ones, 1.0)
    torch.testing.assert_close(good, flow.flow_matching_loss(v, x0, x1))
    bad = rl_baselines.nft_loss(v, v_old, x0, x1, 0 * ones, 1.0)
    torch.testing.assert_close(bad, flow.flow_matching_loss(2 * v_old - v, x0, x1))
    v[:, :, 0] += 7                                             # a given frame counts nowhere
    torch.testing.assert_close(rl_baselines.nft_loss(v, v_old, x0, x1, ones, 1.0, given=1),
                               flow.flow_matching_loss(v[:, :, 1:], x0[:, :, 1:], x1[:, :, 1:]))


# ---- weights in place of others
def test_the_weights_are_as_before_also_after_an_error():
    trained = [torch.nn.Parameter(torch.randn(3, 2)), torch.nn.Parameter(torch.randn(4))]
    others = [torch.randn(3, 2), torch.randn(4)]
    before, kept = ([x.detach().clone() for x in values] for values in (trained, others))
    with pytest.raises(RuntimeError, match="inside"):
        with rl_baselines.in_place_of(trained, others):
            assert all(torch.equal(p, q) for p, q in zip(trained, kept))
            raise RuntimeError("inside")
    assert all(torch.equal(p, q) for p, q in zip(trained, before))
    assert all(torch.equal(p, q) for p, q in zip(others, kept))


# ---- iterations by hand
SHAPE = (16, 2, 4, 4)
G, EIGHT = 4, range(8)


class ByHand:
    """The policy, its reward model, and plain AdamW updates."""

    def __init__(self, folder):
        self.folder = folder
        self.policy = load_transformer(folder / "generator")
        self.pavrm = load_pavrm(folder / "generator/reward")
        self.optimizer = torch.optim.AdamW(self.policy.parameters(), lr=1e-4, weight_decay=0)
        shards = data.Shards(folder / "data")
        good = (shards.labels != 0).nonzero()[:, 0]
        rows = data.order(len(good), 1, 0, [i // G for i in EIGHT], 2)              # two prompts, four each
        self.context = shards.batch(good[rows])["context"]
        self.reward = lambda x0: self.pavrm(x0, torch.zeros(len(x0)), self.context)

    def require_moved_alike(self, method):
        """The weights that the run hand-<method> wrote are these, up to rounding."""
        written = weights(self.folder, method, f"hand-{method}")
        moved = distance(written, load_transformer(self.folder / "generator").state_dict())
        assert moved > 1e-4
        assert distance(written, self.policy.state_dict()) < 0.02 * moved

    def update(self, loss):
        self.optimizer.zero_grad()
        loss.backward()
        norm = torch.stack([p.grad.norm() for p in self.policy.parameters()]).norm()
        for p in self.policy.parameters():
            p.grad.mul_(min(1.0, 1.0 / norm.item()))
        self.optimizer.step()

    def euler(self, x, context, first, last, N=4):
        for i in range(first, last):
            x = x - self.policy(x, torch.full((len(x),), 1 - i / N), context) / N
        return x


def normalized(r, by_group):
    groups = r.view(2, G)
    std = groups.std(1, correction=0, keepdim=True) if by_group else r.std(correction=0)
    return ((groups - groups.mean(1, keepdim=True)) / (std + 1e-4)).flatten()


@pytest.mark.usefixtures("cpu")
def test_one_iteration_of_nft_by_hand(folder):
    run(*command(folder, "nft", "hand-nft", "--max_train_steps", "1", "--group_size", str(G),
                 "--nft_beta", "0.5", "--reward_weight", "7", "--no-sft_updates"))
    hand, beta = ByHand(folder), 0.5
    with torch.no_grad():
        x0 = hand.euler(common.noise(SHAPE, 0, "x_T", 0, EIGHT), hand.context, 0, 4)
        reward = hand.reward(x0)
        r = 0.5 + normalized(reward, by_group=False).clamp(-1, 1) / 2
        old = {name: p.clone() for name, p in hand.policy.named_parameters()}
    for k in range(2):
        t, x1 = common.uniform(0, f"nft t {k}", 0, EIGHT), common.noise(SHAPE, 0, f"nft x1 {k}", 0, EIGHT)
        t_ = t.view(-1, 1, 1, 1, 1)
        x_t = (1 - t_) * x0 + t_ * x1
        with torch.no_grad():
            v_old = torch.func.functional_call(hand.policy, old, (x_t, t, hand.context))
        v, target = hand.policy(x_t, t, hand.context), x1 - x0
        positive = ((1 - beta) * v_old + beta * v - target).square().flatten(1).mean(1)
        negative = ((1 + beta) * v_old - beta * v - target).square().flatten(1).mean(1)
        loss = 7 * (r * positive + (1 - r) * negative).mean()
        hand.update(loss)
    row, = metrics(folder, "hand-nft")
    assert row["reward"] == pytest.approx(reward.mean().item(), rel=1e-4)
    assert row["nft_loss"] == pytest.approx(loss.item(), rel=1e-4)                  # of the last update
    hand.require_moved_alike("nft")


@pytest.mark.usefixtures("cpu")
def test_one_iteration_of_grpo_by_hand(folder):
    run(*command(folder, "grpo", "hand-grpo", "--max_train_steps", "1", "--group_size", str(G),
                 "--kl_weight", "3", "--clip_range", "0.01", "--no-sft_updates"))
    hand, N, steps = ByHand(folder), 4, []
    first = int(torch.randint(3, (1,), generator=common.random_generator(0, "stochastic steps", 0)))
    normal = torch.distributions.Normal

    def step_of(x, i):
        """A normal distribution of x_{t - dt}."""
        t, at = 1 - i / N, 1 - max(i, 1) / N
        sigma, v = 0.7 * math.sqrt(at / (1 - at)), hand.policy(x, torch.full((8,), t), hand.context)
        mean = x - (v + sigma ** 2 / (2 * t) * (x + (1 - t) * v)) / N
        return normal(mean, sigma * math.sqrt(1 / N))

    with torch.no_grad():
        x = hand.euler(common.noise(SHAPE, 0, "x_T", 0, (0, 1)), hand.context[[0, G]], 0, first)
        x = x.repeat_interleave(G, 0)                           # the groups part here
        for k in range(2):
            step = step_of(x, first + k)
            led = step.mean + step.stddev * common.noise(SHAPE, 0, f"sde {k}", 0, EIGHT)
            steps.append((x, led, step))
            x = led
        reward = hand.reward(hand.euler(x, hand.context, first + 2, N))
    advantage = normalized(reward, by_group=True)
    for k, (x, led, before) in enumerate(steps):
        now = step_of(x, first + k)
        mean = lambda z: z.flatten(1).mean(1)
        ratio = (mean(now.log_prob(led)) - mean(before.log_prob(led))).exp()
        kl = mean(torch.distributions.kl_divergence(now, before)).mean()
        loss = -torch.minimum(ratio * advantage, ratio.clamp(0.99, 1.01) * advantage).mean() + 3 * kl
        hand.update(loss)
    row, = metrics(folder, "hand-grpo")
    assert row["reward"] == pytest.approx(reward.mean().item(), rel=1e-4)
    assert row["grpo_kl"] == pytest.approx(kl.item(), rel=1e-3) and kl > 0
    assert row["grpo_loss"] == pytest.approx(loss.item(), rel=1e-3, abs=1e-6)
    hand.require_moved_alike("grpo")


@pytest.mark.usefixtures("cpu")
def test_the_old_policy_is_a_moving_average_that_checkpoints_hold(folder):
    run(*command(folder, "nft", "average", "--max_train_steps", "3", "--checkpointing_steps", "1",
                 "--keep", "3", "--old_decay", "0.7", "--no-sft_updates"))
    folders = [folder / f"average/checkpoint-{step:06d}" for step in (1, 2, 3)]
    states = [runs.load_state(checkpoint) for checkpoint in folders]
    made = [load_transformer(checkpoint).state_dict() for checkpoint in folders]
    names = [name for name, _ in load_transformer(folder / "generator").named_parameters()]
    start = load_transformer(folder / "generator").state_dict()
    for i, name in enumerate(names):
        old = [state["optimizer"]["state"][i]["old"] for state in states]
        assert torch.equal(old[0], start[name])
        for before, after, weights_then in zip(old, old[1:], made):
            wanted = 0.7 * before + 0.3 * weights_then[name]
            torch.testing.assert_close(after, wanted, rtol=1e-5, atol=1e-7)


def test_a_given_first_frame_is_kept_and_has_no_probability():
    torch.manual_seed(0)
    policy = VideoDiT(model_type="i2v", in_dim=4, out_dim=4, dim=24, ffn_dim=32, num_heads=2, num_layers=2,
                      freq_dim=16, text_dim=8, text_len=3)
    torch.nn.init.normal_(policy.head.head.weight, std=0.2)
    pavrm = PAVRM.from_generator(policy, 1).freeze()
    first_frame, context = torch.randn(1, 4, 1, 2, 2).expand(4, -1, -1, -1, -1), torch.randn(1, 3, 8)
    config = SimpleNamespace(seed=0, num_inference_steps=5, inner_updates=2, rollout_passes=0, shift=1.0,
                             group_size=4, noise_level=0.7, kl_weight=0.1, advantage_clip=5.0,
                             reward_weight=1, clip_range=1e-4, batch_size=4, gradient_accumulation_steps=1)
    learner = rl_baselines.GRPO(policy, pavrm, None, config, common.setup(), lambda *_: (
        context.expand(4, -1, -1), {"first_frame": first_frame}), (4, 3, 2, 2), 4)
    learner.collect(0)
    batch = learner.batches[0]
    assert torch.equal(batch["x0"][:, :, :1], first_frame)
    for x, _, _, x_next, _ in batch["steps"]:
        assert torch.equal(x_next[:, :, :1], first_frame) and torch.equal(x[:, :, :1], first_frame)
    loss, _ = learner.loss(0, 0, [0, 1, 2, 3])
    assert loss.item() == pytest.approx(-learner.weights.mean().item(), abs=1e-5)   # the ratio is 1
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in policy.parameters() if p.grad is not None)


@pytest.mark.parametrize("flags, words", [
    ("--group_size 3", "--group_size 3 does not divide the 8 videos per update"),
    ("--group_size 1", "--group_size 1: a sample is compared with the others"),
    ("--method grpo --inner_updates 4", "--inner_updates 4: so many steps of a rollout are stochastic, and "
     "--num_inference_steps 4 is not more")])
@pytest.mark.usefixtures("cpu")
def test_what_cannot_work_is_refused_in_one_line(folder, capsys, flags, words):
    with pytest.raises(SystemExit) as stop:
        run(*command(folder, "nft" if "grpo" not in flags else "sft", "refused", *flags.split(),
                     *(("--num_inference_steps", "4") if "grpo" in flags else ())))
    stderr = capsys.readouterr().err
    assert stop.value.code == 2 and one_line(stderr) and words in stderr, stderr
    assert not (folder / "refused").exists()


def test_one_sample_of_a_prompt_is_enough_for_a_probability():
    config = SimpleNamespace(method="nft", nft_reward="probability", group_size=1)
    assert rl_baselines.check(config, 7) is None
    with pytest.raises(InputError, match="compared"):
        rl_baselines.check(SimpleNamespace(method="grpo", nft_reward="advantage", group_size=1), 7)
