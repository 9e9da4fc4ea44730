"""A generator of two experts: which one answers at which time, what trains, and that two processes, sharded
or not, and a resumed run give what one gives.
"""
import json
import re
import shutil
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
import torch.distributed.checkpoint as dcp
from launch import torchrun
from safetensors.torch import load_file
from tiny import DRIVER, apart, command, generator, metrics, one_line, run

import common
import experts
import families
import flow
import prfl
import rl_baselines
import sample
import train_align
from common import InputError
from experts import Experts
from formats.adapters import FILES
from formats.weights import WEIGHTS, save_module
from model import export_transformer, load_transformer
from pavrm import PAVRM, load_pavrm
from scale import lora, parallel

pytestmark = pytest.mark.usefixtures("cpu")
BOUNDARY, SHAPE, FOLDERS = 0.6, (16, 2, 4, 4), {"high": "transformer", "low": "transformer_2"}


def pair():
    """Two tiny generators with other weights."""
    high, low = generator(), generator()
    for p in high.parameters():
        torch.nn.init.normal_(p, std=0.1, generator=torch.Generator().manual_seed(7))
    return Experts(high, low, BOUNDARY)


def draw(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def model(folder):
    """A folder with two experts, their reward model and VAE."""
    path, both = folder / "experts", pair()
    shutil.copytree(folder / "generator/vae", path / "vae")
    for name in experts.NAMES:
        export_transformer(getattr(both, name), path / FOLDERS[name], notes=both.notes(name, experts.NAMES))
    reward = PAVRM.from_generator(both.low, 1)
    torch.nn.init.normal_(reward.mlp[-1].weight, generator=torch.Generator().manual_seed(3))
    save_module(reward, path / "reward")
    return path


# ---- which expert answers
def test_the_time_decides():
    both, x, context = pair(), draw(3, *SHAPE), draw(3, 3, 8)
    with torch.no_grad():
        for t, dit in ((0.59, both.low), (BOUNDARY, both.high), (1.0, both.high), (0.0, both.low)):
            t = torch.full((3,), t)
            assert torch.equal(both(x, t, context), dit(x, t, context))
        t = torch.tensor([0.9, 0.1, 0.7])                       # on both sides: each video by its own
        found = both(x, t, context)
        for i, dit in enumerate((both.high, both.low, both.high)):
            torch.testing.assert_close(found[i:i + 1], dit(x[i:i + 1], t[i:i + 1], context[i:i + 1]))
    assert both.config == both.low.config | {"boundary_ratio": BOUNDARY} and len(both.blocks) == 2


def test_a_given_frame_goes_with_its_video():
    dit = [generator(model_type="i2v") for _ in experts.NAMES]
    torch.nn.init.normal_(dit[0].head.head.weight)
    x, context, first, t = draw(2, *SHAPE), draw(2, 3, 8), draw(2, 16, 1, 4, 4), torch.tensor([0.2, 0.8])
    found = Experts(*dit, BOUNDARY)(x, t, context, first_frame=first)
    for i, one in enumerate((dit[1], dit[0])):
        torch.testing.assert_close(found[i:i + 1], one(x[i:i + 1], t[i:i + 1], context[i:i + 1],
                                                       first_frame=first[i:i + 1]))


@pytest.mark.parametrize("scale, scale_2", [(4.0, 3.0), (2.0, None), (1.0, 3.0)])
def test_a_rollout_by_hand(scale, scale_2):
    """Shift 2: steps from t = 1, .91, .8 and .67 the high-noise expert's, from .5 and .29 the low's."""
    both, x, context, null = pair(), draw(2, *SHAPE), draw(2, 3, 8), draw(3, 8)
    found = flow.rollout(both, x, context, 6, shift=2.0, null=null,
                         guidance_scale=experts.guidance(both, scale, scale_2))
    times = [2 * u / (1 + u) for u in (1 - i / 6 for i in range(7))]
    used = []
    for a, b in zip(times, times[1:]):
        dit, g = (both.high, scale) if a >= BOUNDARY else (both.low, scale_2 or scale)
        used.append(g)
        t = torch.full((2,), a)
        with torch.no_grad():
            v, v_null = dit(x, t, context), dit(x, t, null.expand(2, -1, -1))
        x = x - (a - b) * (v_null + g * (v - v_null))
    assert used == [scale] * 4 + [scale_2 or scale] * 2
    torch.testing.assert_close(found, x, rtol=1e-4, atol=1e-4)


def test_the_one_that_is_not_called_rests(monkeypatch):
    """Where `resting`, an expert comes to the device of its input, and the other one leaves it first. To move
    both at once moves neither."""
    both = parallel.whole(pair(), torch.float32)                # for sample.py and evaluate.py
    assert both.resting and both.to("meta") is both and not any(p.is_meta for p in both.parameters())
    both, moves = pair(), []
    for name in experts.NAMES:
        dit = getattr(both, name)
        monkeypatch.setattr(dit, "to", lambda device, name=name: moves.append((name, str(device))))
        monkeypatch.setattr(dit, "cpu", lambda name=name: moves.append((name, "cpu")))
    gpu = torch.device("meta")
    monkeypatch.setattr(torch, "clear_autocast_cache", lambda: moves.append("autocast's copies"))
    both.wake("high", gpu)
    assert moves == []
    both.resting = True
    assert both.wake("high", gpu) is both.high
    assert moves == ["autocast's copies", ("low", "cpu"), ("high", "meta")]
    both.wake("low", torch.device("cpu"))                      # it is there
    assert len(moves) == 3


@pytest.mark.parametrize("trains, kind, rests", [(("low",), "ddp", True), (("high", "low"), "ddp", False)])
def test_only_a_frozen_expert_rests(model, trains, kind, rests):
    """What trains has its optimizer's state beside it."""
    both = load_transformer(model, load_now=False)
    for name in set(experts.NAMES) - set(trains):
        getattr(both, name).requires_grad_(False)
    runtime = common.Runtime(0, 1, torch.device("cpu"), torch.float32)
    parallel.shard(both, runtime, parallel.Flags(parallel=kind))
    assert both.resting == rests and set(both.trained()) == set(trains)
    wanted = load_transformer(model).state_dict()
    assert all(torch.equal(x, wanted[name]) for name, x in both.state_dict().items())


# ---- times and steps of what trains
@pytest.mark.parametrize("expert, wanted, middle", [
    ("high", {1, 2, 3}, {3}), ("low", {4, 5, 6}, {4}), ("both", {1, 2, 3, 4, 5, 6}, {3, 4})])
def test_the_rewarded_step_is_one_of_the_experts(expert, wanted, middle):
    """Six steps, from t = 1, .83, .67, .5, .33 and .17; the third third's start is the low-noise expert's."""
    expert_steps = experts.steps_of_expert(expert, flow.schedule(6), BOUNDARY)
    assert {prfl.draw_step(0, i, 6, expert_steps=expert_steps) for i in range(200)} == wanted
    assert {prfl.draw_step(0, i, 6, "middle", expert_steps) for i in range(99)} == middle


def test_a_step_from_the_boundary_is_the_high_noise_experts():
    times = flow.schedule(8)                                    # .75 and .25 are exact
    for expert, boundary, steps in (("high", 0.75, range(1, 4)), ("low", 0.75, range(4, 9)),
                                    ("high", 0.76, range(1, 3)), ("both", 0.76, range(1, 9))):
        assert experts.steps_of_expert(expert, times, boundary) == steps
    for part, expert in (("early", "low"), ("late", "high")):
        with pytest.raises(InputError, match=f"leaves the {part} part .* without a step of the --expert"):
            prfl.steps_of_part(part, 8, experts.steps_of_expert(expert, times, 0.75))


def test_sft_times_are_on_the_side_of_the_expert():
    u = torch.cat([torch.rand(1000, generator=torch.Generator().manual_seed(0)),
                   torch.tensor([0.0, 1 - 2.0 ** -24])])        # the least and the largest that uniform gives
    for boundary in (0.6, 0.875, 0.9):
        low, high = (experts.times_of(name, u, boundary, 0, 0) for name in ("low", "high"))
        assert (low < boundary).all() and low.min() == 0 and low.max() > boundary - 1e-3
        assert (high >= boundary).all() and high.max() <= 1
        torch.testing.assert_close(low.sort().indices, u.sort().indices)
    sides = Counter((experts.times_of("both", u[:8], 0.75, 0, i) >= 0.75).float().mean().item()
                    for i in range(400))
    assert sides.keys() == {0.0, 1.0} and abs(sides[1.0] / 400 - 0.25) < 0.07   # an update has one side
    assert torch.equal(experts.times_of("both", u, 0.75, 3, 5), experts.times_of("both", u, 0.75, 3, 5))


# ---- training
def weights(folder, output):
    """{name: weight} of the experts that a run wrote"""
    return {f"{name}.{key}": x for name, part in FOLDERS.items() if (folder / output / part).is_dir()
            for key, x in load_file(folder / output / part / WEIGHTS).items()}


def start(model, like):
    found = load_transformer(model).state_dict()
    return {name: found[name] for name in like}


JOBS = {"low": ("prfl", []), "high": ("prfl", ["--expert", "high"]), "both": ("steady", ["--expert", "both"]),
        "sft": ("sft", ["--expert", "both"]), "rwr": ("rwr", []), "refl": ("refl", []),
        "lora": ("steady", ["--expert", "both", "--lora_rank", "2"]),
        "nft": ("nft", []), "nft-both": ("nft", ["--expert", "both"]),
        "grpo": ("grpo", ["--expert", "high"]), "grpo-both": ("grpo", ["--expert", "both"])}


def job(folder, model, name, output, *more, **how):
    kind, flags = JOBS[name]
    reward = f"{model}/reward" if kind != "refl" else f"{folder}/generator/reward_rgb_first"
    if kind != "sft":
        flags = [*flags, "--reward", reward]
    flags = ["--model", str(model), *flags, "--learning_rate", "1e-3", *more]
    return command(folder, kind, output, *flags, **how)


@pytest.fixture(scope="module")
def alone(folder, model):
    """Every run of JOBS on one rank."""
    for name in JOBS:
        run(*job(folder, model, name, f"one-{name}"))
    return "one-"


@pytest.mark.parametrize("name", JOBS)
def test_what_trains_is_written_and_nothing_else(folder, model, alone, name):
    flags = JOBS[name][1]
    wanted = {"high": {"high"}, "both": {"high", "low"}}.get(flags[1] if flags else "low", {"low"})
    found, base = weights(folder, f"one-{name}"), load_transformer(model).state_dict()
    assert {key.split(".")[0] for key in found} == wanted
    both = load_transformer(folder / f"one-{name}")             # the other one comes from --model
    changed = {key.split(".")[0] for key, x in both.state_dict().items() if not torch.equal(x, base[key])}
    assert changed == wanted and both.boundary == BOUNDARY
    rows = metrics(folder, f"one-{name}")
    if name in ("low", "high", "both"):                         # of N = 4 steps, t = 1, .75, .5, .25
        steps = {row["rewarded_step"] for row in rows}
        assert steps <= {"low": {3, 4}, "high": {1, 2}, "both": {1, 2, 3, 4}}[name]


def test_one_iteration_by_hand(folder, model):
    """The frozen expert makes the first steps of the rollout; SFT's times are below the boundary."""
    run(*job(folder, model, "low", "hand", "--max_train_steps", "1"))
    row, = metrics(folder, "hand")
    both, pavrm = load_transformer(model), load_pavrm(model / "reward")
    shards, indices = train_align.data.Shards(folder / "data"), range(8)
    good = (shards.labels != 0).nonzero()[:, 0]
    order = train_align.data.order
    batch = shards.batch(good[order(len(good), 0, 0, indices, 8)])
    x0, x1 = batch["latents"], common.noise(SHAPE, 0, "sft x1", 0, indices)
    t = BOUNDARY * common.uniform(0, "sft t", 0, indices)
    t_ = t.view(-1, 1, 1, 1, 1)
    v = both.low((1 - t_) * x0 + t_ * x1, t, batch["context"])
    loss = ((v - (x1 - x0)) ** 2).mean()
    assert row["sft_loss"] == pytest.approx(loss.item(), rel=1e-4)
    optimizer = torch.optim.AdamW(both.low.parameters(), lr=1e-3, weight_decay=0)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(both.low.parameters(), 1.0)
    optimizer.step()
    context = shards.batch(good[order(len(good), 1, 0, indices, 8)])["context"]
    x, step = common.noise(SHAPE, 0, "x_T", 0, indices), int(row["rewarded_step"])
    assert step in (3, 4)
    with torch.no_grad():
        for i in range(step):                                   # t = 1 and .75: the frozen one's
            dit = both.high if i < 2 else both.low
            x = x - dit(x, torch.full((8,), 1 - i / 4), context) / 4
        r = pavrm(x, torch.full((8,), 1 - step / 4), context)
    assert row["reward"] == pytest.approx(r.mean().item(), rel=1e-3)


class ByHand:
    """One iteration of NFT or GRPO, without an SFT update, on 2 prompts with 4 videos each: `row` is what the
    run has logged. `both` starts where it started, and `update` trains it in the same way."""

    def __init__(self, folder, model, kind, expert):
        self.output, self.folder, self.model = f"hand-{kind}-{expert}", folder, model
        run(*job(folder, model, kind, self.output, "--expert", expert, "--max_train_steps", "1",
                 "--group_size", "4", "--no-sft_updates"))
        self.row, = metrics(folder, self.output)
        self.both, pavrm = load_transformer(model), load_pavrm(model / "reward")
        shards, order = train_align.data.Shards(folder / "data"), train_align.data.order
        good = (shards.labels != 0).nonzero()[:, 0]
        self.context = shards.batch(good[order(len(good), 1, 0, [i // 4 for i in range(8)], 2)])["context"]
        self.reward = lambda x0: pavrm(x0, torch.zeros(8), self.context)
        self.optimizer = torch.optim.AdamW(self.both.parameters(), lr=1e-3, weight_decay=0)

    def velocity(self, x, t, rows=slice(None)):
        """t: a number, or times [b] of which all are on one side of the boundary"""
        t = torch.as_tensor(t).expand(len(x))
        dit = self.both.high if t[0] >= BOUNDARY else self.both.low
        return dit(x, t, self.context[rows])

    @torch.no_grad()
    def euler(self, x, first, last, rows=slice(None)):
        for i in range(first, last):
            x = x - self.velocity(x, 1 - i / 4, rows) / 4
        return x

    def update(self, loss):
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.both.parameters(), 1.0)
        self.optimizer.step()

    def require_moved_alike(self, reward, loss, trained):
        """trained: {names of the experts that moved}"""
        found, wanted = weights(self.folder, self.output), self.both.state_dict()
        before = start(self.model, wanted)
        assert self.row["reward"] == pytest.approx(reward.mean().item(), rel=1e-3)
        assert self.row[f"{self.output.split('-')[1]}_loss"] == pytest.approx(loss.item(), rel=1e-3, abs=1e-6)
        moved = {name.split(".")[0] for name, x in wanted.items() if not torch.equal(x, before[name])}
        assert moved == trained <= {name.split(".")[0] for name in found}
        wanted, before = ({name: x[name] for name in found} for x in (wanted, before))
        assert apart(found, wanted) < 0.02 * apart(wanted, before)


@pytest.mark.parametrize("expert", experts.CHOICES)
def test_one_iteration_of_nft_by_hand(folder, model, expert):
    """Both experts make the samples. The times of an update are on the side of the expert that it trains, and
    the old policy's velocities are that expert's."""
    hand, sides, draws = ByHand(folder, model, "nft", expert), [], []
    x0 = hand.euler(common.noise(SHAPE, 0, "x_T", 0, range(8)), 0, 4)
    reward = hand.reward(x0).detach()
    advantage = (reward.view(2, 4) - reward.view(2, 4).mean(1, keepdim=True)).flatten()
    good = 0.5 + (advantage / (reward.std(correction=0) + 1e-4)).clamp(-1, 1) / 2
    for k in range(2):
        sides.append(expert)
        if expert == "both":
            below = common.uniform(0, f"nft expert {k}", 0, [0]) < BOUNDARY
            sides[k] = "low" if below else "high"
        u = common.uniform(0, f"nft t {k}", 0, range(8))
        x1 = common.noise(SHAPE, 0, f"nft x1 {k}", 0, range(8))
        t = BOUNDARY * u if sides[k] == "low" else BOUNDARY + (1 - BOUNDARY) * u
        t_ = t.view(-1, 1, 1, 1, 1)
        x_t = (1 - t_) * x0 + t_ * x1
        draws.append((x_t, t, x1 - x0, hand.velocity(x_t, t).detach()))
    for x_t, t, target, v_old in draws:
        v, beta = hand.velocity(x_t, t), 0.5
        square = lambda v, target=target: (v - target).square().flatten(1).mean(1)
        loss = (good * square((1 - beta) * v_old + beta * v)
                + (1 - good) * square((1 + beta) * v_old - beta * v)).mean()
        hand.update(loss)
    hand.require_moved_alike(reward, loss, set(sides))


@pytest.mark.parametrize("expert", experts.CHOICES)
def test_one_iteration_of_grpo_by_hand(folder, model, expert):
    """Of the steps from t = 1, .75, .5 and .25 the first two are the high-noise expert's. Two neighbours
    among those of what trains are stochastic; where both train, one of each expert can be."""
    hand, steps = ByHand(folder, model, "grpo", expert), []
    skipped, last = {"high": (0, 2), "low": (2, 4), "both": (0, 4)}[expert]
    first = int(torch.randint(skipped, last - 1, (1,),
                              generator=common.random_generator(0, "stochastic steps", 0)))
    heads = [0, 4]                                  # one rollout for each group, up to where it parts

    def step_of(x, i):
        t, at = 1 - i / 4, 1 - max(i, 1) / 4
        sigma, v = 0.7 * (at / (1 - at)) ** 0.5, hand.velocity(x, t)
        return torch.distributions.Normal(x - (v + sigma ** 2 / (2 * t) * (x + (1 - t) * v)) / 4, sigma / 2)

    with torch.no_grad():
        x = hand.euler(common.noise(SHAPE, 0, "x_T", 0, (0, 1)), 0, first, heads).repeat_interleave(4, 0)
        for k in range(2):
            step = step_of(x, first + k)
            led = step.mean + step.stddev * common.noise(SHAPE, 0, f"sde {k}", 0, range(8))
            steps.append((x, led, step))
            x = led
        reward = hand.reward(hand.euler(x, first + 2, 4))
    groups = reward.view(2, 4)
    advantage = ((groups - groups.mean(1, keepdim=True))
                 / (groups.std(1, correction=0, keepdim=True) + 1e-4)).flatten()
    for k, (x, led, before) in enumerate(steps):
        now, mean = step_of(x, first + k), lambda z: z.flatten(1).mean(1)
        ratio = (mean(now.log_prob(led)) - mean(before.log_prob(led))).exp()
        kl = mean(torch.distributions.kl_divergence(now, before)).mean()
        clipped = ratio.clamp(1 - 1e-4, 1 + 1e-4)
        loss = -torch.minimum(ratio * advantage, clipped * advantage).mean() + 0.04 * kl
        hand.update(loss)
    trained = {"high" if first + k < 2 else "low" for k in range(2)}
    hand.require_moved_alike(reward, loss, trained)


def test_the_old_policy_follows_an_expert_that_rests():
    """It lies with the optimizer on the GPU (here meta), also while the expert's weights wait on the host."""
    p, old = torch.ones(3), torch.zeros(3, device="meta")
    with pytest.raises(RuntimeError, match="device"):           # without the move: two devices
        old.clone().lerp_(p, 0.5)
    learner = SimpleNamespace(trained=[p], config=SimpleNamespace(old_decay=0.5),
                              optimizer=SimpleNamespace(state={p: {"old": old}}))
    rl_baselines.NFT.begin(learner, 0)
    assert learner.old == [old] and old.is_meta and not p.is_meta


@pytest.mark.parametrize("name", ["low", "both"])
def test_accumulation_changes_nothing(folder, model, alone, name):
    run(*job(folder, model, name, "micro", "--gradient_accumulation_steps", "2", "--gradient_checkpointing",
             batch_size=4))
    found, wanted = weights(folder, "micro"), weights(folder, f"one-{name}")
    assert apart(found, wanted) < 0.005 * apart(wanted, start(model, wanted))


@pytest.mark.parametrize("name", ["low", "both", "lora", "nft-both", "grpo"])
def test_a_resumed_run_is_the_uninterrupted_one(folder, model, alone, name):
    output = f"resumed-{name}"
    shutil.copytree(folder / f"one-{name}/checkpoint-000004", folder / output / "checkpoint-000004")
    run(*job(folder, model, name, output, "--resume", "latest"))
    found, wanted = weights(folder, output), weights(folder, f"one-{name}")
    assert found.keys() == wanted.keys() and all(torch.equal(x, wanted[key]) for key, x in found.items())


def test_another_expert_is_another_run(folder, model, alone, capsys):
    shutil.copytree(folder / "one-low/checkpoint-000004", folder / "other/checkpoint-000004")
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run(*job(folder, model, "low", "other", "--resume", "latest", "--expert", "both"))
    assert stop.value.code == 2 and "--expert low (now both)" in capsys.readouterr().err


TWO = [("ddp", "low"), ("ddp", "both"), ("fsdp", "low"), ("fsdp", "both"), ("fsdp", "lora"),
       ("shared", "both"), ("fsdp", "nft"), ("fsdp", "nft-both"), ("fsdp", "grpo"), ("fsdp", "grpo-both")]


@pytest.fixture(scope="module")
def two_ranks(folder, model):
    """The same runs under torchrun, 2 ranks with batch 4, ddp and fsdp."""
    flags = {"ddp": ["--parallel", "ddp"], "fsdp": ["--parallel", "fsdp"],
             "shared": ["--sequence_parallel", "2"]}
    jobs = [job(folder, model, name, f"{kind}-{name}", *flags[kind], batch_size=8 if kind == "shared" else 4)
            for kind, name in TWO]
    torchrun(2, "-c", DRIVER, json.dumps(jobs))


@pytest.mark.parametrize("kind, name", TWO)
def test_two_ranks_are_one_process_with_twice_the_batch(folder, model, alone, two_ranks, kind, name):
    wanted, found = weights(folder, f"one-{name}"), weights(folder, f"{kind}-{name}")
    assert apart(found, wanted) < 0.005 * apart(wanted, start(model, wanted))
    for row, other in zip(metrics(folder, f"one-{name}"), metrics(folder, f"{kind}-{name}"), strict=True):
        assert row == pytest.approx(other, rel=1e-3, abs=1e-5)


def test_sharded_training_state_is_of_what_trains(folder, model, two_ranks):
    read = lambda name: set(dcp.FileSystemReader(folder / f"fsdp-{name}/checkpoint-000005" / parallel.PIECES)
                            .read_metadata().state_dict_metadata)
    assert {name.split(".")[0] for name in read("low")} == {"low"}
    assert {name.split(".")[0] for name in read("both")} == {"low", "high"}
    assert all(".lora_" in name for name in read("lora"))
    shutil.copytree(folder / "fsdp-both/checkpoint-000004", folder / "from-fsdp/checkpoint-000004")
    run(*job(folder, model, "both", "from-fsdp", "--resume", "latest"))        # pieces, on one rank
    wanted = weights(folder, "one-both")
    assert apart(weights(folder, "from-fsdp"), wanted) < 0.005 * apart(wanted, start(model, wanted))


def test_validation_samples_with_both(folder, model, monkeypatch):
    """best/ has what trained, and is a whole generator."""
    _, flags = job(folder, model, "low", "watched", "--judge", str(folder / "judge"), "--validation_steps",
                   "2")
    judge = PAVRM.from_generator(generator(), 1)
    torch.nn.init.normal_(judge.mlp[-1].weight)
    save_module(judge, folder / "judge")
    flags[flags.index("--num_validation") + 1] = "4"
    run("train_align", flags)
    assert [path.name for path in (folder / "watched/best").iterdir() if path.is_dir()] == ["transformer_2"]
    assert isinstance(load_transformer(folder / "watched/best"), Experts)
    rows = [row for row in metrics(folder, "watched") if "validation_judge" in row]
    assert len(rows) == 4 and all("validation_sft_loss" in row for row in rows)
    found = []
    for guidance in (["1"], ["2"], ["1", "--guidance_scale_2", "2"], ["2", "--guidance_scale_2", "1"]):
        run("train_align", [*flags, "--guidance_scale", *guidance, "--max_train_steps", "1"])
        found.append(metrics(folder, "watched")[0]["validation_judge"])
    assert len(set(found)) == 4                                 # each of the two guidances counts
    asked, null_context = [], families.null_context             # guided by one alone: by the negative prompt
    monkeypatch.setattr(families, "null_context", lambda *how: asked.append(how[1]) or null_context(*how))
    run("train_align", [*flags, "--guidance_scale", "1", "--guidance_scale_2", "2", "--max_train_steps", "1"])
    assert asked == ["negative"]


def test_training_starts_from_the_adapters_of_an_expert(folder, model, alone):
    """And sampling has them."""
    file = folder / "one-lora/pytorch_lora_weights_2.safetensors"
    run(*job(folder, model, "low", "onwards", "--lora_2", str(file), "--learning_rate", "1e-9"))
    before, after = load_file(file), load_file(folder / "onwards" / file.name)
    assert before.keys() == after.keys() and all(torch.allclose(x, after[name]) for name, x in before.items())
    assert not (folder / "onwards" / FILES["transformer"]).exists()
    both = load_transformer(model)
    for dit, path in experts.with_adapters(both, sample.Config(lora_2=str(file))):
        lora.attach(dit, path)
    merged, x, context = load_transformer(folder / "onwards"), draw(1, *SHAPE), draw(1, 3, 8)
    for t in (torch.tensor([0.2]), torch.tensor([0.8])):
        with torch.no_grad():
            torch.testing.assert_close(both(x, t, context), merged(x, t, context), rtol=1e-4, atol=1e-5)


# ---- what is refused
REFUSED = {
    "--expert low": (False, "--expert means nothing to a generator of one expert"),
    "--lora_2 x": (False, "--lora_2 means nothing to a generator of one expert"),
    "--guidance_scale_2 3 --num_validation 4": (False, "--guidance_scale_2 means nothing to a generator of"),
    "--lora x": (True, "--lora x: is of the high-noise expert, which does not train: .* --expert high or b"),
    "--lora_2 x --expert high": (True, "--lora_2 x: is of the low-noise expert, which does not train"),
    "--lora x --expert both": (True, "give --lora and --lora_2, or --lora_rank"),
    "--method grpo --group_size 2 --num_inference_steps 4 --inner_updates 3": (
        True, "--expert low makes 2 of the 4 steps .* --method grpo needs 3: .* or fewer --inner_updates"),
    "--method nft --group_size 2 --num_inference_steps 1": (
        True, "--expert low makes 0 of the 1 steps .* --method nft needs 1: give more --num_inference_steps"),
    "--trajectory_part early": (True, "leaves the early part of the trajectory without a step of the --exp"),
}


@pytest.mark.parametrize("words", REFUSED)
def test_flags_that_mean_nothing(folder, model, capsys, words):
    two, reason = REFUSED[words]
    name = "sft" if "--method" in words else "prfl"
    _, flags = command(folder, name, "refused", "--model", str(model if two else folder / "generator"))
    if "--num_validation" in words:
        del flags[flags.index("--num_validation"):][:2]
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run("train_align", [*flags, *words.split()])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and one_line(error) and re.search(reason, error), error
    assert not (folder / "refused").exists()
