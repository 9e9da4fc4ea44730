"""study/why.py: without a variant it is train_align.py bit for bit; each variant by hand; a resumed average
is the same."""
import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny import same

import common
import flow
import train_align
from formats import lock
from formats.weights import WEIGHTS
from model import VideoDiT, load_transformer
from pavrm import PAVRM
from study import why

N = 6


def run(script, folder, output, *flags):
    common.cli(script.main, script.Config, "",
               [*flags, "--curated_dir", str(folder / "curated"), "--num_curated", "16", "--batch_size", "4",
                "--max_train_steps", "2", "--checkpointing_steps", "1",
                "--output_dir", str(folder / output),
                *([] if "--num_validation" in flags else ["--num_validation", "0"])])
    return load_file(folder / output / "transformer" / WEIGHTS)


def test_it_validates_as_train_align_does(folder, cpu):
    flags = ("--num_validation", "2", "--validation_steps", "1", "--learning_rate", "1e-4",
             "--rollout_passes", "4", "--reward_loss", "logsigmoid", "--lr_scheduler", "constant")
    found = []
    for script in (why, train_align):
        run(script, folder, f"seen-{script.__name__}", *flags)
        lines = (folder / f"seen-{script.__name__}/metrics.jsonl").read_text().splitlines()
        found.append([json.loads(line)[f"validation_{name}"] for line in lines
                      for name in ("qualified", "speed")])
    assert found[0] == found[1] and len(found[0]) == 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("why")


@pytest.mark.parametrize("flags", ["--rollout_passes 4 --reward_loss logsigmoid --lr_scheduler linear",
                                   "--rollout_passes 0 --reward_loss linear --max_grad_norm .1"])
def test_without_a_variant_it_is_train_align(folder, cpu, flags):
    flags += " --learning_rate 1e-4" + " --lr_scheduler constant" * ("scheduler" not in flags)
    ours, theirs = (run(script, folder, f"same-{script.__name__}", *flags.split())
                    for script in (why, train_align))
    assert same(ours, theirs)


def test_a_resumed_average_is_the_uninterrupted_one(folder, cpu):
    whole = run(why, folder, "ema", "--variant", "ema", "--strength", ".5")
    shutil.copytree(folder / "ema/checkpoint-000001", folder / "ema-resumed/checkpoint-000001")
    assert same(run(why, folder, "ema-resumed", "--variant", "ema", "--strength", ".5", "--resume", "latest"),
                whole)
    first, last = (load_file(folder / f"ema/checkpoint-00000{k}/transformer" / WEIGHTS) for k in (1, 2))
    trained = torch.load(folder / "ema/checkpoint-000002/train_state.pt", weights_only=True)["model"]
    assert all(torch.allclose(last[name], (first[name] + x.view_as(first[name])) / 2, atol=1e-6) for name,
               x in trained.items())


def test_an_adamw_for_each_kind_of_update(folder, cpu):
    """The gradients of two iterations, of two updates each, replayed: by two AdamW in turn, and by one."""
    gradients, step = [], torch.optim.AdamW.step

    def watched(self, *args, **kwargs):
        gradients.append([p.grad.clone() for p in self.param_groups[0]["params"]])
        return step(self, *args, **kwargs)

    for variant, count in (("moments", 2), ("none", 1)):
        gradients.clear()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.optim.AdamW, "step", watched)
            found = run(why, folder, f"adamw-{variant}", "--variant", variant)
        model = load_transformer(why.BASE)
        optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0) for _ in range(count)]
        for i, update in enumerate(gradients):
            for p, g in zip(model.parameters(), update):
                p.grad = g
            optimizers[i % count].step()
        assert len(gradients) == 4 and all(torch.allclose(found[name], p, atol=1e-7) for name,
                                           p in model.state_dict().items())


def test_bad_flags_are_one_line(folder, cpu, capsys):
    with pytest.raises(SystemExit) as stop:
        run(why, folder, "bad", "--variant", "exact_last", "--strength", "1")
    assert stop.value.code == 2 and capsys.readouterr().err == ("error: --strength means nothing with "
        "--variant exact_last: leave it out\n") and not (folder / "bad").exists()


@pytest.mark.parametrize("variant, strength",
                         [("ema", "1"), ("ema", "0"), ("noise", "0"), ("pull", "0"), ("words", "1")])
def test_a_strength_that_changes_nothing_is_refused(folder, cpu, capsys, variant, strength):
    with pytest.raises(SystemExit):
        run(why, folder, "bad", "--variant", variant, "--strength", strength)
    assert "changes nothing, or lets nothing change" in capsys.readouterr().err


def test_one_run_in_a_folder_that_is_its_own(folder, cpu, capsys):
    with lock.hold(folder / "held"), pytest.raises(SystemExit):
        run(why, folder, "held")
    assert "is writing there" in capsys.readouterr().err
    (folder / "mine").mkdir()
    (folder / "mine/notes.txt").touch()
    with pytest.raises(SystemExit):
        run(why, folder, "mine")
    assert "holds files that are not ours" in capsys.readouterr().err
    run(why, folder, "seeded")
    with pytest.raises(SystemExit):
        run(why, folder, "seeded", "--seed", "1", "--resume", "latest")
    assert "that run has --seed 0 (now 1)" in capsys.readouterr().err


# ---- each variant by hand
def test_other_words():
    g, prompt = torch.Generator().manual_seed(0), "a red circle moving to the right"
    made = [why.other_words(prompt, 0.15, g).split() for _ in range(2000)]
    assert all(words and len(set(words)) == len(words) and set(words) <= set(prompt.split())
               for words in made)
    assert sum(map(len, made)) / 2000 / 7 == pytest.approx(0.85, abs=0.01)
    assert 0.05 < sum(words[0] == "right"
                      for words in made) / 2000 < 0.25 and why.other_words("red", 0.99, g) == "red"


def test_words_reach_both_updates(folder, cpu, monkeypatch):
    def losses(name, *flags):
        """In float32: in bfloat16 a last bit of the first update is worth 1e-2 of the next loss."""
        run(why, folder, name, "--mixed_precision", "no", *flags)
        rows = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
        return np.array([[row["sft_loss"], row["reward_loss"]] for row in rows])

    none = losses("words-none")
    monkeypatch.setattr(why, "other_words", lambda prompt, share, g: prompt)
    np.testing.assert_allclose(losses("words-kept", "--variant", "words"), none, rtol=0, atol=1e-4)
    asked = []
    monkeypatch.setattr(why, "other_words", lambda prompt, share, g: asked.append((prompt, share)) or "x")
    assert (np.abs(losses("words-x", "--variant", "words") - none) > 0.01).all()
    assert len(asked) == 2 * 2 * 4 and {share for _, share in asked} == {0.15}    # iterations, updates, batch


@pytest.fixture
def parts():
    """(policy, the generator as it was, PAVRM), float64; x_T, curated x0 and noise [3, ...]; contexts;
    steps."""
    torch.manual_seed(0)
    tiny = dict(in_dim=4, out_dim=4, dim=24, ffn_dim=32, num_heads=2, num_layers=2, freq_dim=16, text_dim=8,
                text_len=3)
    models = [VideoDiT(**tiny) for _ in range(2)]
    for dit in models:
        torch.nn.init.normal_(dit.head.head.weight, std=0.2)
    pavrm = PAVRM.from_generator(models[1], 1).freeze()
    x_T, x0, eps = torch.randn(3, 3, 4, 2, 2, 2, dtype=torch.float64)
    return [m.double() for m in (*models, pavrm)], x_T, x0, eps, torch.randn(3, 3, 8,
        dtype=torch.float64), torch.tensor([1, 4, 6])


def start(parts, variant, passes=0, strength=None):
    (policy, _, _), x_T, x0, eps, context, step = parts
    config = why.Config(variant=variant, num_inference_steps=N, rollout_passes=passes, strength=strength)
    return why.start_state(config, policy, x_T, context, step - 1, x0, eps)


def euler(policy, x, context, stops):
    with torch.no_grad():
        for a, b in zip(stops, stops[1:]):
            x = x - (b - a) / N * policy(x, torch.tensor([1 - a / N]), context)
    return x


def test_where_the_rewarded_step_starts(parts):
    (policy, _, _), x_T, x0, eps, context, _ = parts
    every = {1: [0], 4: [0, 1, 2, 3], 6: [0, 1, 2, 3, 4, 5]}
    coarse = {1: [0], 4: [0, 2, 3], 6: [0, 2, 4, 5]}           # strides of two; the last pass is exact anyway
    exact_last = {1: [0], 4: [0, 2, 3], 6: [0, 3, 4, 5]}    # strides of three up to the step before, then one
    by_hand = lambda routes: torch.cat([euler(policy, x_T[i:i + 1], context[i:i + 1], route)
                                        for i, route in enumerate(routes.values())])
    close = lambda a, b: torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    close(start(parts, "none"), by_hand(every))
    close(start(parts, "none", passes=4), by_hand(coarse))
    close(start(parts, "exact_last", passes=2), by_hand(exact_last))
    t = (1 - (torch.tensor([1, 4, 6]) - 1) / N).double().view(3, 1, 1, 1, 1)
    close(start(parts, "noise", strength=0.2), by_hand(every) + 0.2 * (1 - t) * eps)
    close(start(parts, "no_rollout"), (1 - t) * x0 + t * x_T)


def test_pull_and_ceiling(parts):
    (policy, base, pavrm), x_T, x0, eps, context, step = parts

    def update(variant, strength=None, loss="linear"):
        config = why.Config(variant=variant, num_inference_steps=N, strength=strength, reward_loss=loss)
        return why.reward_update_loss(config, policy, base, pavrm, x_T, context, step, x0, eps)

    plain, r = update("none")
    assert plain.item() == pytest.approx(-r.mean().item())
    x, t = start(parts, "none"), flow.schedule(N)[step - 1]
    apart = (policy(x, t, context) - base(x, t, context)).square().mean().item()
    assert apart > 0 and update("pull", 3.0)[0].item() == pytest.approx(plain.item() + 3 * apart, rel=1e-5)
    middle = r.sort().values[1].item()                                  # one reward below, two at or above
    loss, same_r = update("ceiling", middle)
    assert torch.equal(same_r, r) and loss.item() == pytest.approx(-r.clamp(max=middle).mean().item())
    low = update("ceiling", r.min().item() - 1)[0]
    assert all(g is None or not g.any()
               for g in torch.autograd.grad(low, list(policy.parameters()), allow_unused=True))


# ---- a step for each video
@pytest.mark.parametrize("B", [1, 7, 32, 80])
def test_steps_per_video_are_spread_evenly(B):
    for iteration in range(50):
        steps = sorted(why.draw_steps(0, iteration, 40, B).tolist())
        for j, step in enumerate(steps):                                # one in each of B equal stretches
            assert 1 + j * 40 // B <= step <= -(-(j + 1) * 40 // B), (iteration, j)


def test_steps_per_video_depend_on_seed_and_iteration_only():
    drawn = lambda seed, iteration: why.draw_steps(seed, iteration, 16, 32).tolist()
    torch.manual_seed(3)
    first = drawn(0, 5)
    torch.manual_seed(4)
    assert drawn(0, 5) == first and drawn(1, 5) != first and drawn(0, 6) != first


class Scaled(torch.nn.Module):
    """The velocity theta x, or theta where x does not matter."""

    def __init__(self, theta=0.5, of_x=True):
        super().__init__()
        self.theta, self.of_x = torch.nn.Parameter(torch.tensor(theta)), of_x

    def forward(self, x, t, context):
        return self.theta * (x if self.of_x else torch.ones_like(x))


def judged(x, t, context):
    """A reward that sums x; it has to be a finished video."""
    assert not t.any()
    return x.flatten(1).sum(1)


@pytest.mark.parametrize("first, second", [(0, 1), (0, 3), (1, 2), (2, 3)])
def test_two_leaps_by_hand(first, second):
    """The reward is that of the video at the end of the trajectory. The gradient: change = d x_j / d theta,
    and the discounted one through the second leap's input."""
    config = why.Config("leaps", num_inference_steps=4)
    policy, x_T, context = Scaled(), torch.randn(1, 2, 1, 2, 2), torch.zeros(1, 3, 8)
    states = [x_T]
    for _ in range(4):
        states.append(states[-1] * (1 - 0.25 * 0.5))
    loss, r = why.leaps_loss(config, policy, judged, x_T, context, first, second)
    torch.testing.assert_close(r, states[4].flatten(1).sum(1))
    loss.backward()
    t_k, t_j, x_k, x_j = 1 - first / 4, 1 - second / 4, states[first].sum(), states[second].sum()
    change = -(t_k - t_j) * x_k
    wanted = change - t_j * (x_j + 0.5 * why.DISCOUNT * change)
    torch.testing.assert_close(policy.theta.grad, -wanted)                          # the loss is -r


def test_leaps_that_miss_their_trajectory_count_less():
    """A constant velocity leaps right; one that depends on x does not, and more so where x is large."""
    config, context = why.Config("leaps", num_inference_steps=4), torch.zeros(2, 3, 8)
    x_T = torch.stack([torch.full((2, 1, 2, 2), 0.1), torch.full((2, 1, 2, 2), 1.0)])
    loss, r = why.leaps_loss(config, Scaled(), judged, x_T, context, 0, 2)
    share = ((-loss - r[1]) / (r[0] - r[1])).item()                     # of the first video in the loss
    assert 0.5 < share < 1
    loss, r = why.leaps_loss(config, Scaled(of_x=False), judged, x_T, context, 0, 2)
    assert torch.isfinite(loss)


@pytest.mark.parametrize("step", [1, 3, 4])
def test_direct_align_recovers_the_video(step):
    """By the right velocity of its noised sample exactly; the gradient of a velocity theta is (t - s) / (1 -
    s), by hand."""
    config, context = why.Config("direct_align", num_inference_steps=4), torch.zeros(1, 3, 8)
    x_T, eps = torch.randn(1, 2, 1, 2, 2), torch.randn(1, 2, 1, 2, 2)
    x_0 = x_T - 0.5                                             # after a rollout with the velocity 1/2
    policy = Scaled(of_x=False)
    loss, r = why.direct_align_loss(config, policy, judged, x_T, context, step, eps)
    loss.backward()
    t, s = 1 - (step - 1) / 4, 1 - step / 4
    missed = (t - s) / (1 - s) * (eps - x_0 - 0.5)              # of the velocity times its coefficient
    torch.testing.assert_close(r, (x_0 + missed).flatten(1).sum(1))
    torch.testing.assert_close(policy.theta.grad, torch.tensor((t - s) / (1 - s) * x_T.numel()))
    torch.manual_seed(0)


@pytest.mark.parametrize("variant", ["leaps", "direct_align"])
def test_other_methods_updates_train(folder, cpu, variant):
    assert not same(run(why, folder, variant, "--variant", variant, "--rollout_passes", "4"),
                    load_file(why.BASE / "transformer" / WEIGHTS))
    with pytest.raises(common.InputError, match="one step for the whole batch"):
        why.main(why.Config(variant, rewarded_step="per_video"))
