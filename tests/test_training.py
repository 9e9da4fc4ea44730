"""train_reward.py and train_align.py: Algorithm 1 by hand, two ranks against one, kill and resume, bad input.

Everything runs on the CPU, on a tiny random generator and random labelled shards.
"""
import json
import shutil
import subprocess
import sys

import pytest
import torch
from launch import ENV, ROOT, torchrun
from safetensors.torch import load_file, save_file
from tiny import (
    DRIVER,
    RUNS,
    STEPS,
    TINY,
    apart,
    command,
    distance,
    generator,
    kill,
    metrics,
    one_line,
    run,
    same,
    weights,
    write_data,
)

import common
import data
import families
import prfl
import rl_baselines
import train_align
import train_reward
from common import InputError
from formats import encoders, runs
from formats.weights import WEIGHTS, save_module
from model import PRESETS, export_transformer, load_transformer
from pavrm import PAVRM, load_pavrm
from refl_baseline import PixelReward
from scale import parallel

pytestmark = pytest.mark.usefixtures("cpu")


@pytest.fixture(scope="module")
def one_rank(folder):
    """Every run of RUNS, uninterrupted on one rank; -> the first part of their folders' names."""
    for name in RUNS:
        run(*command(folder, name, f"one-{name}"))
    return "one-"


def test_the_task_comes_from_the_generator_that_is_named(folder):
    for script, given in ((train_align, {"method": "sft"}), (train_reward, {})):
        assert script.resolve(script.Config(**given))[1]["task"] == "the shipped generator"
        assert script.resolve(script.Config(model=str(folder / "generator"), **given))[1]["task"] == "--model"


# ---- the loop
@pytest.mark.parametrize("name, N, shift", [
    ("prfl", 4, 1), ("prfl", 4, 3), ("steady", 4, 1), ("steady", 7, 1)])
def test_one_iteration_is_algorithm_1_by_hand(folder, name, N, shift):
    """The paper's recipe without and with --shift, where rollout, rewarded step and PAVRM's t are at the
    warped times; and the steady recipe, whose strides are of two steps (N = 4) or of four (N = 7)."""
    flags = [] if shift == 1 else ["--shift", str(shift)]
    run(*command(folder, name, "hand", "--max_train_steps", "1", "--learning_rate", "1e-4",
                 "--num_inference_steps", str(N), *flags))
    times = [shift * u / (1 + (shift - 1) * u) for u in (1 - i / N for i in range(N + 1))]
    policy, pavrm = load_transformer(folder / "generator"), load_pavrm(folder / "generator/reward")
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-4, weight_decay=0)
    shards, indices = data.Shards(folder / "data"), range(8)

    def update(loss):
        for p in policy.parameters():
            p.grad = None
        loss.backward()
        norm = torch.stack([p.grad.norm() for p in policy.parameters()]).norm()
        for p in policy.parameters():
            p.grad.mul_(min(1.0, 1.0 / norm.item()))                                # clipped to norm 1
        optimizer.step()
        return norm.item()

    good = (shards.labels != 0).nonzero()[:, 0]                 # a clip that is labelled bad is not curated
    curated = shards.batch(good[data.order(len(good), 0, 0, indices, 8)])
    x0, x1 = curated["latents"], common.noise((16, 2, 4, 4), 0, "sft x1", 0, indices)
    t = common.uniform(0, "sft t", 0, indices)
    t_ = t.view(-1, 1, 1, 1, 1)
    sft = ((policy((1 - t_) * x0 + t_ * x1, t, curated["context"]) - (x1 - x0)) ** 2).mean()     # Eq. 10
    sft_norm = update(sft)
    context = shards.batch(good[data.order(len(good), 1, 0, indices, 8)])["context"]
    x_T, rewards = common.noise((16, 2, 4, 4), 0, "x_T", 0, indices), []
    step, stride = prfl.draw_step(0, 0, N), 1 if name == "prfl" else -(-N // 2)
    for i in range(8):                                                              # one video at a time
        x, stops = x_T[i:i + 1], [*range(0, step - 1, stride), step - 1, step]
        for a, b in zip(stops, stops[1:]):
            x = x.detach()                                      # only the last step has gradients
            x = x - (times[a] - times[b]) * policy(x, torch.tensor([times[a]]), context[i:i + 1])
        rewards.append(pavrm(x, torch.tensor([times[step]]), context[i:i + 1]))
    r = torch.cat(rewards)
    loss = -r.mean() if name == "prfl" else torch.log(1 + torch.exp(-r)).mean()
    reward_norm = update(loss)

    row, = metrics(folder, "hand")
    wanted = {"sft_loss": sft.item(), "sft_grad_norm": sft_norm, "reward": r.mean().item(),
              "reward_loss": loss.item(), "reward_grad_norm": reward_norm, "rewarded_step": step}
    assert {k: row[k] for k in wanted} == pytest.approx(wanted, rel=1e-4)
    start = load_transformer(folder / "generator").state_dict()
    moved = distance(weights(folder, name, "hand"), start)
    assert 1e-4 < moved < 3e-4 and distance(weights(folder, name, "hand"), policy.state_dict()) < 0.01 * moved


@pytest.mark.parametrize("fixed_t", [None, 0.3])
def test_three_steps_of_the_reward_model_by_hand(folder, fixed_t):
    """Eq. 4 to 6. A quarter of the videos get another one's prompt and are bad then, t is uniform or the one
    given, both rates fall linearly, a logit above 0 counts as good."""
    flags = [] if fixed_t is None else ["--fixed_t", str(fixed_t)]
    run(*command(folder, "reward", "hand-reward", "--max_train_steps", "3", "--learning_rate", "3e-2",
                 "--trunk_learning_rate", "6e-3", "--weight_decay", "0.01", *flags))
    torch.manual_seed(0)
    pavrm = PAVRM.from_generator(load_transformer(folder / "generator"), 2)
    shards, indices = data.Shards(folder / "data"), range(8)
    train, _ = data.labelled_split(shards, 8, 0)
    heads = [p for name, p in pavrm.named_parameters() if not name.startswith("trunk.")]
    blocks = [p for name, p in pavrm.named_parameters() if name.startswith("trunk.blocks.")]
    optimizer = torch.optim.AdamW([{"params": heads}, {"params": blocks}], weight_decay=0.01)
    for step in range(3):
        rows = data.order(len(train), 0, step, indices, 8)
        batch, y = shards.batch(train[rows]), shards.labels[train[rows]].float()
        for i in (common.uniform(0, "mismatched", step, indices) < 0.25).nonzero()[:, 0]:
            other = int(common.uniform(0, "other prompt", step, [int(i)]).double() * 23)    # one of 23 others
            other += int(other >= int(rows[i]))
            batch["context"][i], y[i] = shards.batch(train[[other]])["context"][0], 0
        t = common.uniform(0, "t", step, indices) if fixed_t is None else torch.full((8,), fixed_t)
        t_, x1 = t.view(-1, 1, 1, 1, 1), common.noise((16, 2, 4, 4), 0, "x1", step, indices)
        logits = pavrm((1 - t_) * batch["latents"] + t_ * x1, t, batch["context"])
        p = logits.sigmoid()
        loss = -(y * p.log() + (1 - y) * (1 - p).log()).mean()                          # Eq. 6
        optimizer.zero_grad()
        loss.backward()
        norm = torch.stack([p.grad.norm() for p in heads + blocks]).norm()
        for p in heads + blocks:
            p.grad.mul_(min(1.0, 1.0 / norm.item()))
        for group, rate in zip(optimizer.param_groups, (3e-2, 6e-3)):
            group["lr"] = rate * (3 - step) / 3
        optimizer.step()
        wanted = {"loss": loss.item(), "grad_norm": norm.item(), "learning_rate": 3e-2 * (3 - step) / 3,
                  "accuracy": ((logits > 0).float() == y).float().mean().item()}
        row = metrics(folder, "hand-reward")[step]
        assert {key: row[key] for key in wanted} == pytest.approx(wanted, rel=2e-4)
    start = PAVRM.from_generator(load_transformer(folder / "generator"), 2).state_dict()
    trunk = lambda state: {name: x for name, x in state.items() if "trunk" in name}
    moved = distance(trunk(pavrm.state_dict()), trunk(start))
    assert distance(weights(folder, "reward", "hand-reward"), pavrm.state_dict()) < 0.02 * moved


def test_a_recipe_is_its_three_flags(folder):
    """Bit for bit; a flag that is given goes before the recipe's; args.json holds what they came to."""
    spelled = {"paper": "--rollout_passes 0 --reward_loss linear --lr_scheduler constant",
               "steady": "--rollout_passes 4 --reward_loss logsigmoid --lr_scheduler linear"}
    other = {"paper": "steady", "steady": "paper"}
    for recipe, flags in spelled.items():
        method = ["--method", "prfl", "--num_inference_steps", "7", "--max_train_steps", "2",
                  "--learning_rate", "1e-4", "--recipe"]
        run(*command(folder, "sft", f"named-{recipe}", *method, recipe))
        run(*command(folder, "sft", f"spelled-{recipe}", *method, other[recipe], *flags.split()))
        named, spelled_out = (metrics(folder, f"{kind}-{recipe}") for kind in ("named", "spelled"))
        assert named == spelled_out
        args = json.loads((folder / f"spelled-{recipe}/args.json").read_text())
        assert {name: args[name] for name in prfl.RECIPES[recipe]} == prfl.RECIPES[recipe]
    assert metrics(folder, "named-paper")[1] != metrics(folder, "named-steady")[1]


def test_a_share_of_the_prompts_is_dropped_in_sft():
    config = train_align.Config(context_dropout=0.3, seed=4)
    context, null = torch.randn(1000, 3, 8), torch.randn(5, 8)
    found = encoders.drop_contexts(context, config, 7, range(1000), None)
    dropped = (found == 0).flatten(1).all(1)
    assert 0.25 < dropped.float().mean() < 0.35 and torch.equal(found[~dropped], context[~dropped])
    given = encoders.drop_contexts(context, config, 7, range(1000), null)
    assert torch.equal(given[dropped], null[:3].expand(int(dropped.sum()), 3, 8))
    of_a_rank = encoders.drop_contexts(context[300:400], config, 7, range(300, 400), None)
    assert torch.equal(of_a_rank, found[300:400])
    assert encoders.drop_contexts(context, train_align.Config(), 7, range(1000), None) is context


def test_folds_are_disjoint_and_together_everything(folder):
    labels = [data.take_fold(data.Shards(folder / "data"), f"{i}/3").labels for i in (1, 2, 3)]
    assert [int((x >= 0).sum()) for x in labels] in ([11, 11, 10], [11, 10, 11], [10, 11, 11])
    assert torch.equal(torch.stack(labels).max(0).values, data.Shards(folder / "data").labels)
    assert (torch.stack(labels) >= 0).sum(0).eq(1).all()
    assert data.take_fold(data.Shards(folder / "data"), None).labels.ge(0).all()
    for fold in ("0/2", "3/2", "1", "a/b", "1/2/3", "-1/2", ""):
        with pytest.raises(InputError, match="--fold"):
            data.take_fold(data.Shards(folder / "data"), fold)
    run(*command(folder, "reward", "folded", "--fold", "2/2", "--holdout", "4"))
    assert json.loads((folder / "folded/report.json").read_text())["trained_on"] == 12


def test_defaults_are_the_papers_where_the_model_is_wans_size(monkeypatch):
    for preset, rate, head, batch in (("tiny-t2v", 1e-4, 2e-3, 32), ("wan2.1-t2v-1.3b", 5e-6, 1e-5, 1),
                                      ("wan2.1-i2v-14b", 5e-6, 1e-5, 1)):
        align, reward = train_align.Config(learning_rate=None), train_reward.Config(max_train_steps=7)
        families.fill_in(align, families.training_defaults(PRESETS[preset], "align"))
        families.fill_in(reward, families.training_defaults(PRESETS[preset], "reward"))
        assert (align.learning_rate, align.batch_size) == (rate, batch)
        assert (reward.learning_rate, reward.max_train_steps) == (head, 7)
    assert (align.num_inference_steps, align.max_train_steps) == (40, 800)
    assert align.gradient_accumulation_steps == 30
    assert reward.trunk_learning_rate == 1e-6
    monkeypatch.setenv("WORLD_SIZE", "8")
    on_8_ranks = families.training_defaults(PRESETS["wan2.1-t2v-14b"], "align")
    assert on_8_ranks["gradient_accumulation_steps"] == 4       # 32 videos
    given = train_align.Config(learning_rate=1e-3)
    families.fill_in(given, families.training_defaults(PRESETS["wan2.1-t2v-14b"], "align"))
    assert given.learning_rate == 1e-3


def test_updates_and_what_they_move(folder, one_rank):
    updates_per_iteration = {"prfl": 2, "steady": 2, "refl": 2, "sft": 1, "rwr": 1, "nft": 3, "grpo": 3}
    for name, updates in updates_per_iteration.items():
        state = torch.load(folder / f"one-{name}/checkpoint-000005/train_state.pt", weights_only=True)
        assert state["step"] == STEPS and state["optimizer"]["state"][0]["step"] == STEPS * updates
        assert state["model"] == {}                             # the weights are written once, here:
        saved = load_file(folder / f"one-{name}/checkpoint-000005/transformer" / WEIGHTS)
        assert distance(saved, weights(folder, name, f"one-{name}")) == 0
        assert [row["step"] for row in metrics(folder, f"one-{name}")] == [1, 2, 3, 4, 5]
    start, trained = generator().state_dict(), weights(folder, "reward", "one-reward")
    for name, value in trained.items():  # the embeddings are frozen
        mine = name.removeprefix("trunk.")
        moves = mine == name or mine.startswith("blocks.")
        assert mine == name or torch.equal(value, start[mine]) != moves, name
    for name in ("reward", "reward_rgb"):
        report = json.loads((folder / f"one-{name}/report.json").read_text())
        assert (report["trained_on"], report["held_out"], len(report["accuracy"])) == (24, 8, 5)
        assert report["clean"].keys() == {"accuracy", "balanced_accuracy", "auc", "prompt_accuracy",
                                          "prompt_auc"}


def test_an_older_checkpoint_goes_on(folder, one_rank):
    """It holds the weights in its state too, and in its folder with the digits of the dtype that they were
    loaded in."""
    older = folder / "older-sft/checkpoint-000004"
    shutil.copytree(folder / "one-sft/checkpoint-000004", older)
    exact = load_file(older / "transformer" / WEIGHTS)
    save_file({name: x.bfloat16() for name, x in exact.items()}, older / "transformer" / WEIGHTS)
    state = torch.load(older / "train_state.pt", weights_only=True)
    torch.save(state | {"model": exact}, older / "train_state.pt")
    run(*command(folder, "sft", "older-sft", "--resume", "latest"))
    assert distance(weights(folder, "sft", "older-sft"), weights(folder, "sft", "one-sft")) == 0


@pytest.mark.parametrize("name", ["prfl", "refl", "rwr", "nft", "grpo"])
def test_accumulation_and_checkpointing_change_nothing(folder, one_rank, name):
    wanted = weights(folder, name, f"one-{name}")
    moved = apart(wanted, generator().state_dict())
    flags = ["--gradient_accumulation_steps", "2", "--gradient_checkpointing"]
    if name == "refl":
        flags.append("--decoder_checkpointing")
    run(*command(folder, name, f"micro-{name}", *flags, batch_size=4))
    assert apart(weights(folder, name, f"micro-{name}"), wanted) < 0.005 * moved


@pytest.mark.parametrize("name", ["prfl", "refl"])
def test_lambda_and_the_sft_updates_are_switches(folder, name):
    run(*command(folder, name, f"no-sft-{name}", "--no-sft_updates", "--reward_weight", "3",
                 "--max_train_steps", "2"))
    for row in metrics(folder, f"no-sft-{name}"):
        assert "sft_loss" not in row and row["reward_loss"] == pytest.approx(-3 * row["reward"], rel=1e-5)


def test_the_rewarded_steps_are_those_of_the_part(folder, one_rank):
    steps = lambda output: {row["rewarded_step"] for row in metrics(folder, output)}
    assert steps("one-prfl") - {3, 4} and steps("one-refl") <= {3, 4}   # of N = 4 steps: all, the late ones
    for name, part, wanted in (("prfl", "early", {1}), ("prfl", "middle", {2}), ("prfl", "late", {3, 4}),
                               ("refl", "early", {1})):
        run(*command(folder, name, "part", "--trajectory_part", part, "--max_train_steps", "3"))
        assert steps("part") <= wanted


@pytest.mark.parametrize("name", ["steady", "nft", "reward"])
def test_no_gradient_is_kept_behind_an_update(folder, monkeypatch, name):
    """While samples are made and judged, and in validation, nothing needs them."""
    found, save, begin = [], parallel.save_checkpoint, rl_baselines.NFT.begin

    def save_checkpoint(output_dir, step, folders, model, *more):       # where validation has been made
        found.append([p.grad for p in model.parameters()])
        save(output_dir, step, folders, model, *more)

    monkeypatch.setattr(parallel, "save_checkpoint", save_checkpoint)
    monkeypatch.setattr(rl_baselines.NFT, "begin", lambda self, iteration: found.append(
        [p.grad for p in self.trained]) or begin(self, iteration))
    run(*command(folder, name, f"gradients-{name}", "--max_train_steps", "2"))
    assert len(found) == (3 if name == "nft" else 1) and {x for row in found for x in row} == {None}


def test_block_checkpointing_changes_no_gradient(folder):
    norms = []
    for flags in ((), ("--gradient_checkpointing",)):
        run(*command(folder, "prfl", "steps", "--max_train_steps", "1", *flags))
        norms.append(metrics(folder, "steps")[0]["reward_grad_norm"])
    assert norms[1] == pytest.approx(norms[0], rel=1e-5)


@pytest.mark.parametrize("name, flags", [
    ("reward", "--pooling attention"), ("reward", "--pooling multihead"), ("reward_rgb", "--loss bt"),
    ("prfl", "--reward_loss sigmoid_hinge"), ("refl", "--frames_decoded all")])
def test_smoke_ablations(folder, name, flags):
    """Runs once in bfloat16 what no test of test_flags.py runs; what it computes is tested elsewhere."""
    run(*command(folder, name, f"ablation-{name}", *flags.split(), "--max_train_steps", "1",
                 "--mixed_precision", "bf16"))
    assert metrics(folder, f"ablation-{name}")[0]["step"] == 1


def test_smoke_image_to_video(folder):
    """Runs image-to-video once, from the first frame of each clip; its numbers are tested elsewhere."""
    dit = generator(model_type="i2v", in_dim=36)  # 16 noisy + 4 mask + 16 first frame
    shutil.copytree(folder / "generator", folder / "i2v")
    export_transformer(dit, folder / "i2v/transformer")
    for name in ("reward", "reward_rgb"):
        run(*command(folder, name, f"i2v-{name}", "--model", str(folder / "i2v"), "--max_train_steps", "1"))
    for name, reward, *flags in (("prfl", "i2v-reward"), ("rwr", "i2v-reward"),
                                 ("nft", "i2v-reward"), ("grpo", "i2v-reward"),
                                 ("refl", "i2v-reward_rgb", "--frames_decoded", "all")):
        run(*command(folder, name, f"i2v-{name}", "--model", str(folder / "i2v"), "--max_train_steps", "1",
                     "--reward", str(folder / reward / "reward"), *flags))
        assert 0 < distance(weights(folder, name, f"i2v-{name}"), dit.state_dict()) < 1e-3


@pytest.mark.parametrize("name", ["reward", "prfl"])
def test_image_to_video_resumes_bit_for_bit(folder, capsys, name):
    """With given first frames (`condition`), which must matter; and not as text-to-video."""
    model, shards = folder / "i2v-resumed/model", folder / "i2v-resumed/data"
    if not model.exists():
        shutil.copytree(folder / "generator", model)
        dit = generator(model_type="i2v", in_dim=36)
        export_transformer(dit, model / "transformer")
        save_module(PAVRM.from_generator(dit, 1), model / "reward")
        write_data(shards, condition=torch.randn(32, 16, 2, 4, 4, generator=torch.Generator().manual_seed(2)))
    flags = ["--task", "i2v", "--model", str(model), "--max_train_steps", "4", "--data"]
    whole, parts, bare = (f"i2v-{kind}-{name}" for kind in ("whole", "parts", "bare"))
    run(*command(folder, name, whole, *flags, str(shards)))
    killed_after = "checkpoint-000002"
    shutil.copytree(folder / whole / killed_after, folder / parts / killed_after)
    run(*command(folder, name, parts, *flags, str(shards), "--resume", "latest"))
    assert same(weights(folder, name, parts), weights(folder, name, whole))
    run(*command(folder, name, bare, *flags, str(folder / "data")))     # without the condition
    assert not same(weights(folder, name, bare), weights(folder, name, whole))
    with pytest.raises(SystemExit) as stop:
        run(*command(folder, name, parts, "--resume", "latest"))        # with a t2v --model
    stderr = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2 and "that run has --task i2v (now t2v)" in stderr, stderr


# ---- two ranks against one
@pytest.fixture(scope="module")
def two_ranks(folder):
    """The same runs under torchrun, 2 ranks with batch 4: PRFL as a user starts it, the others in one go."""
    jobs = {name: command(folder, name, f"two-{name}", batch_size=4) for name in RUNS}
    script, argv = jobs.pop("prfl")
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
                    ROOT / f"{script}.py", *argv], env=ENV, check=True, timeout=600)
    torchrun(2, "-c", DRIVER, json.dumps(list(jobs.values())))
    return "two-"


@pytest.mark.parametrize("name", RUNS)
def test_two_ranks_are_one_rank_with_twice_the_batch(folder, one_rank, two_ranks, name):
    alone, together = (weights(folder, name, f"{ranks}{name}") for ranks in (one_rank, two_ranks))
    start = load_transformer(folder / "generator")
    torch.manual_seed(0)                                                            # as the scripts seed them
    if name.startswith("reward"):
        start = PAVRM.from_generator(start, 2) if name == "reward" else PixelReward("all", TINY["text_dim"])
    assert apart(alone, together) < 0.005 * apart(alone, start.state_dict())
    run(*command(folder, name, f"half-{name}", batch_size=4))   # half the data is another run
    assert distance(weights(folder, name, f"half-{name}"), alone) > 0.2 * distance(alone, start.state_dict())
    for row, other in zip(metrics(folder, f"one-{name}"), metrics(folder, f"two-{name}"), strict=True):
        assert row == pytest.approx(other, rel=1e-3, abs=1e-5)


COUNTED = """
import os, sys, common, model, train_align
forward, count = model.VideoDiT.forward, []

def counted(self, x, *more, **how):
    count.append(self.training)             # the policy trains, PAVRM's trunk is frozen in eval mode
    return forward(self, x, *more, **how)

model.VideoDiT.forward, leave = counted, common.teardown
common.teardown = lambda: (open(f"{sys.argv[1]}-{os.environ['RANK']}", "w").write(str(sum(count))), leave())
common.cli(train_align.main, train_align.Config, "", sys.argv[2:])
"""


def test_both_ranks_make_the_same_number_of_passes(folder):
    """Under FSDP they must, and so all ranks reward the same step."""
    _, argv = command(folder, "prfl", "counted", "--recipe", "steady", "--num_inference_steps", "8",
                      "--no-sft_updates", "--checkpointing_steps", "9", batch_size=1)
    torchrun(2, "-c", COUNTED, folder / "passes", *argv)
    passes = lambda step: -(-(step - 1) // 2) + 1               # strides of two, and one step with gradients
    needed = sum(passes(prfl.draw_step(0, i, 8)) for i in range(STEPS))
    assert [int((folder / f"passes-{rank}").read_text()) for rank in range(2)] == [needed, needed]


# ---- kill and resume
@pytest.fixture(scope="module")
def killed(folder):
    kill([command(folder, name, f"killed-{name}") for name in RUNS])


@pytest.mark.parametrize("name", RUNS)
def test_killed_and_resumed_is_uninterrupted_bit_for_bit(folder, one_rank, killed, name):
    script, argv = command(folder, name, f"killed-{name}")
    out, whole = folder / f"killed-{name}", folder / f"one-{name}"
    assert (out / "checkpoint-000004.tmp").is_dir() and not (out / RUNS[name][1]).exists()
    assert metrics(folder, out.name)[-1]["step"] == 4
    run(script, [*argv, "--resume", "latest"])
    assert same(weights(folder, name, out.name), weights(folder, name, whole.name))
    states = [runs.load_state(path / "checkpoint-000005") for path in (out, whole)]
    assert same(*states) and states[0]["step"] == STEPS
    assert metrics(folder, out.name) == metrics(folder, whole.name)
    assert not [*out.rglob("*.tmp*"), *out.glob("earlier-*")]
    if name.startswith("reward"):
        assert (out / "report.json").read_text() == (whole / "report.json").read_text()
        (out / "report.json").unlink()  # a run that was complete writes its report again
        run(script, [*argv, "--resume", str(out / "checkpoint-000005")])
        assert (out / "report.json").read_text() == (whole / "report.json").read_text()


# ---- bad inputs
@pytest.fixture(scope="module")
def broken(folder, one_rank):
    """Folders with one thing wrong each, by name."""
    copy = lambda name, source="generator": shutil.copytree(folder / source, folder / "bad" / name)
    (folder / "bad/empty").mkdir(parents=True)
    (copy("no_weights") / "transformer" / WEIGHTS).unlink()
    (copy("no_config") / "transformer/config.json").unlink()
    shutil.rmtree(copy("no_vae") / "vae")
    export_transformer(generator(in_dim=4, out_dim=4), copy("four_channels") / "transformer")
    save_module(PixelReward("first", 9), folder / "bad/other_text")
    for name, source, file in (("cut", "generator", f"transformer/{WEIGHTS}"),
                               ("cut_reward", "generator/reward", WEIGHTS),
                               ("cut_data", "data", "shard-00000.safetensors")):
        path = copy(name, source) / file
        path.write_bytes(path.read_bytes()[:-100])
    config = copy("other_config") / "transformer/config.json"
    config.write_text(config.read_text().replace('"ffn_dim": 48', '"ffn_dim": 64'))
    save_module(PAVRM.from_generator(generator(dim=36), 1), folder / "bad/other_reward")
    write_data(folder / "bad/channels", channels=5)
    write_data(folder / "bad/width", context=(3, 9))
    write_data(folder / "bad/long", context=(4, 8))
    write_data(folder / "bad/unlabelled", labels=[None] * 32)
    write_data(folder / "bad/one_label", labels=[1] * 32)
    return folder / "bad"


BAD = [
    ("train_align", "--model {bad}/absent", "bad/absent: there is no such folder, and nothing is downl"),
    ("train_align", "--model {bad}/empty", "bad/empty holds no config.json"),
    ("train_align", "--model {bad}/no_config", "transformer holds no config.json"),
    ("train_align", "--model {bad}/no_weights", f"holds no {WEIGHTS}"),
    ("train_align", "--model {bad}/cut", f"cut/transformer/{WEIGHTS} is not a whole safetensors file"),
    ("train_align", "--model {bad}/other_config",
     "do not fit: 6 of another shape: blocks.0.ffn.0.bias (48,)"),
    ("train_align", "--lora_rank 2 --export whole", "--export: invalid choice: 'whole'"),
    ("train_align", "--lora_rank -1", "--lora_rank must be a finite number at least 0, got -1"),
    ("train_align", "--reward {bad}/absent", "bad/absent is not a folder"),
    ("train_align", "--model {folder}/generator/reward", "config.json: is of a reward model: give the"),
    ("train_align", "--reward {folder}/generator", "holds no config.json: give "),
    ("train_align", "--num_validation 2 --judge {folder}/generator", "holds no config.json: give "),
    ("train_align", "--method refl --reward {folder}/one-reward_rgb", "holds no config.json: give "),
    ("train_align", "--reward {bad}/cut_reward", f"cut_reward/{WEIGHTS} is not a whole safetensors file"),
    ("train_align", "--reward {bad}/other_reward", "another trunk than the generator: dim 36 instead of 24"),
    ("train_align", "--reward {bad}/other_reward", "of 24: give --model, the generator that it was trained"),
    ("train_align", "--method rwr --reward {bad}/other_reward", "dim 36 instead of 24"),
    ("train_align", "--reward {folder}/generator/transformer", "config.json is not a reward model's"),
    ("train_align", "--reward {folder}/generator/reward_rgb_first",
     "reward_rgb_first/config.json is not a reward model's"),
    ("train_align", "--method refl --reward {folder}/generator/reward",
     "reward/config.json is not a pixel reward's"),
    ("train_align", "--method refl --frames_decoded all --reward {folder}/generator/reward_rgb_first",
     "reward_rgb_first has frames 'first' instead of 'all'; train one with "
     "`python train_reward.py --space rgb --frames_decoded all`"),
    ("train_align", "--method refl --reward {bad}/other_text", "other_text has text_dim 9 instead of 8"),
    ("train_align", "--method refl --reward {bad}/absent",
     "absent is not a folder; train one with `python train_reward.py"),
    ("train_align", "--method refl --model {bad}/no_vae", "no_vae/vae is not a folder"),
    ("train_align", "--method refl --model {bad}/four_channels",
     "decodes latents of 16 channels, the generator makes 4"),
    ("train_align", "--frames_decoded all",
     "--frames_decoded means nothing with --method prfl: leave it out"),
    ("train_align", "--method rwr --decoder_checkpointing",
     "--decoder_checkpointing means nothing with --method rwr"),
    ("train_align", "--data {bad}/absent", "bad/absent/shards.json is missing"),
    ("train_align", "--data {bad}/empty", "bad/empty/shards.json is missing"),
    ("train_align", "--data {bad}/cut_data", "shard-00000.safetensors: truncated or damaged"),
    ("train_align", "--data {bad}/channels", "latents have 5 channels, the model has 16"),
    ("train_align", "--data {bad}/width", "context is [3, 9] (tokens, width), not [3, 8]"),
    ("train_align", "--data {bad}/long", "context is [4, 8] (tokens, width), not [3, 8]"),
    ("train_align", "--bogus 1", "unknown flag: --bogus"),
    ("train_align", "--method dpo", "--method: invalid choice: 'dpo'"),
    ("train_align", "--max_train_steps 0", "--max_train_steps must be a finite number above 0, got 0"),
    ("train_align", "--learning_rate nan", "--learning_rate must be a finite number above 0, got nan"),
    ("train_align", "--num_inference_steps 2 --trajectory_part early",
     "--num_inference_steps 2 leaves the early"),
    ("train_align", "--resume {bad}/empty", "bad/empty: there is no"),
    ("train_align", "--resume {folder}/one-reward/checkpoint-000004",
     "checkpoint-000004: not a checkpoint of this"),
    ("train_reward", "--resume {folder}/one-sft/checkpoint-000004",
     "checkpoint-000004: not a checkpoint of this"),
    ("train_reward", "--resume {folder}/one-reward --depth 1",
     "that run has --depth 2 (now 1): give it the same"),
    ("train_reward", "--model {bad}/cut", f"cut/transformer/{WEIGHTS} is not a whole safetensors file"),
    ("train_reward", "--data {bad}/unlabelled", "no clip has a label: a reward model needs 0 and 1"),
    ("train_reward", "--labels {bad}/absent", "--labels {bad}/absent: there is no such file"),
    ("train_reward", "--data {bad}/one_label", "every label is 1: a reward model needs 0 and 1"),
    ("train_reward", "--data {bad}/channels",
     "latents have 5 channels, the model has 16: give the --model for which they were encoded"),
    ("train_reward", "--data {bad}/long", "context is [4, 8] (tokens, width), not [3, 8]"),
    ("train_reward", "--holdout 32", "--holdout 32 leaves nothing to train on"),
    ("train_reward", "--depth 3", "--depth 3: must be from 1 to 2, the blocks of the generator"),
    ("train_reward", "--space rgb", "--depth means nothing with --space rgb: leave it out"),
    ("train_reward", "--space latent --frames_decoded all",
     "--frames_decoded means nothing with --space latent: leave it out"),
    ("train_reward", "--resume {folder}/one-reward_rgb/checkpoint-000004", "--space rgb (now latent)"),
    ("train_reward", "--space hsv", "--space: invalid choice: 'hsv'"),
    ("train_reward", "--pooling sum", "--pooling: invalid choice: 'sum'"),
    ("train_reward", "--fixed_t 1.5", "--fixed_t must be a finite number below 1, got 1.5"),
    ("train_reward", "--max_train_steps 0", "--max_train_steps must be"),
    ("sample", "--prompt=", "--prompt is empty"),
    ("sample", "--prompt red --output x.gif", "--output x.gif: the name must end in .mp4"),
    ("sample", "--output {folder}/x.mp4 --model {folder}/generator", "give --prompt"),
]
ids = [f"{script} {flags}" for script, flags, _ in BAD]


def bad_command(folder, script, flags):
    name = {"train_align": "rwr" if "--method rwr" in flags else "prfl", "train_reward": "reward"}.get(script)
    argv = command(folder, name, "bad-run")[1] if name else []
    return argv + [word.format(folder=folder, bad=folder / "bad") for word in flags.split()]


@pytest.mark.parametrize("script, flags, words", BAD, ids=ids)
def test_bad_inputs_are_one_line_and_leave_nothing_behind(folder, broken, capsys, script, flags, words):
    before = sorted(folder.rglob("*"))
    with pytest.raises(SystemExit) as stop:
        run(script, bad_command(folder, script, flags))
    stderr = capsys.readouterr().err
    assert stop.value.code == 2 and one_line(stderr), stderr
    assert words.replace("{bad}", str(folder / "bad")) in stderr
    assert sorted(folder.rglob("*")) == before


def test_bad_inputs_of_real_processes(folder, broken):
    picked = [BAD[ids.index(name)] for name in ("train_align --model {bad}/cut", "sample --prompt=",
                                                "train_reward --data {bad}/unlabelled")]
    before = sorted(folder.rglob("*"))
    started = [subprocess.Popen([sys.executable, ROOT / f"{script}.py", *bad_command(folder, script, flags)],
                                env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                                cwd=folder / "bad/empty") for script, flags, _ in picked]
    for process, (_, _, words) in zip(started, picked):
        stdout, stderr = process.communicate(timeout=300)
        assert (process.returncode, stdout) == (2, "") and one_line(stderr) and words in stderr, stderr
    assert sorted(folder.rglob("*")) == before


def test_a_number_that_is_not_finite_ends_the_run(folder, capsys):
    """Data with a NaN: exit code 1, the step named, and no weights written."""
    write_data(folder / "nan")
    shards = load_file(folder / "nan/shard-00000.safetensors")
    latents = shards["latents"].clone()
    latents[:, 0, 0, 0, 0] = torch.nan
    data.write_shards(folder / "nan", latents, shards["context"], shards["label"].tolist(), [""] * 32)
    with pytest.raises(SystemExit) as stop:
        run(*command(folder, "sft", "nan-run", "--data", str(folder / "nan")))
    last = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 1 and last.startswith("error: step 1: the sft loss is nan")
    assert not [*(folder / "nan-run").glob("checkpoint*"), *(folder / "nan-run").glob("transformer*")]
