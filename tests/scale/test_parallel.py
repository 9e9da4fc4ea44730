"""--parallel fsdp: two ranks against one process, checkpoints across numbers of ranks, a kill, bad inputs.

The generator, the data and the runs are those of tiny.py, with which test_training.py holds two ddp ranks
against one; here two FSDP ranks with accumulated, checkpointed batches of 2 are held against one process with
batches of 8.
"""
import json
import shutil
import signal
from functools import partialmethod

import launch
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from tiny import (
    DRIVER,
    STEPS,
    apart,
    command,
    distance,
    generator,
    metrics,
    one_line,
    run,
    same,
    weights,
)
from torch.distributed.tensor import DTensor

import common
import prfl
from formats.runs import list_checkpoints, load_state
from model import load_transformer
from pavrm import PAVRM
from scale import lora, parallel
from scale.lora import FILE

MICRO = ["--gradient_accumulation_steps", "2", "--gradient_checkpointing"]
pytestmark = pytest.mark.usefixtures("cpu")
LORA = ["--lora_rank", "2", "--lora_alpha", "4", "--learning_rate", "1e-3"]
KILLED = """
import os, signal, sys, torch.distributed.checkpoint as dcp, common, train_align
save, count = dcp.save, 0

def save_or_die(*args, **kwargs):
    global count
    count += 1
    if count == 2 and common.rank() == 1:                       # the other rank is writing its pieces
        os.kill(os.getpid(), signal.SIGKILL)
    save(*args, **kwargs)

dcp.save = save_or_die
common.cli(train_align.main, train_align.Config, "", sys.argv[1:])
"""


@pytest.fixture(scope="module")
def runs(folder):
    """one-*: one process, batch 8. two-*: two FSDP ranks. one-to-two-*: its last iteration, on two FSDP
    ranks. killed-prfl: two FSDP ranks, one killed while the second checkpoint was written, and resumed."""
    for name in ("prfl", "steady", "rwr", "nft", "grpo", "reward"):
        run(*command(folder, name, f"one-{name}"))
    for kind, name in (("prfl", "lora"), ("nft", "nft-lora")):
        run(*command(folder, kind, f"one-{name}", *LORA))
    fsdp = lambda kind, output, *more, b: command(folder, kind, output, "--parallel", "fsdp", *more,
                                                  batch_size=b)
    killed = fsdp("prfl", "killed-prfl", *MICRO, b=2)
    done = launch.python("-c", KILLED, *killed[1], ranks=2)
    assert done.returncode == -signal.SIGKILL, done.stderr[-3000:]
    assert [step for step, _ in list_checkpoints(folder / "killed-prfl")] == [2]
    jobs = [*(fsdp(name, f"two-{name}", *MICRO, b=2) for name in ("prfl", "steady", "rwr", "nft", "grpo")),
            fsdp("reward", "two-reward", "--gradient_checkpointing", b=4),
            fsdp("prfl", "two-lora", *LORA, b=4), fsdp("nft", "two-nft-lora", *LORA, b=4),
            (killed[0], [*killed[1], "--resume", "latest"])]
    for name in ("prfl", "nft", "reward"):
        jobs.append(fsdp(name, f"one-to-two-{name}", "--resume", f"{folder}/one-{name}/checkpoint-000004",
                         b=4))
    launch.torchrun(2, "-c", DRIVER, json.dumps(jobs))


def start_of(name):
    if name != "reward":
        return generator().state_dict()
    torch.manual_seed(0)                                        # as the script seeds it
    return PAVRM.from_generator(generator(), 2).state_dict()


@pytest.mark.parametrize("name", ["prfl", "steady", "rwr", "nft", "grpo", "reward"])
def test_two_fsdp_ranks_are_one_process_with_twice_the_batch(folder, runs, name):
    alone, together = (weights(folder, name, f"{ranks}-{name}") for ranks in ("one", "two"))
    assert apart(alone, together) < 0.005 * apart(alone, start_of(name))
    for row, other in zip(metrics(folder, f"one-{name}"), metrics(folder, f"two-{name}"), strict=True):
        assert row == pytest.approx(other, rel=1e-3, abs=1e-5)


def test_each_rank_holds_half(folder, runs):
    for output, *names in (
            ("two-prfl", "blocks.0.ffn.0.weight/exp_avg", "head.head.weight/exp_avg_sq",
             "blocks.1.ffn.2.bias/exp_avg"),
            ("two-reward", "trunk.blocks.1.ffn.0.weight/exp_avg", "mlp.0.weight/exp_avg",
             "pool.w_k.weight/exp_avg")):
        pieces = dcp.FileSystemReader(folder / output / "checkpoint-000005" / parallel.PIECES)
        assert all("/" in name for name in pieces.read_metadata().state_dict_metadata)  # weights are in files
        for name in names:
            whole = pieces.read_metadata().state_dict_metadata[name]
            half = [whole.size[0] // 2, *whole.size[1:]]
            assert [list(chunk.sizes) for chunk in whole.chunks] == [half, half], name
    assert load_state(folder / "two-prfl/checkpoint-000005") == {"step": STEPS}


@pytest.mark.parametrize("name", ["lora", "nft-lora"])
def test_adapters_train_alike_on_two_fsdp_ranks(folder, runs, name):
    alone, together = (load_file(folder / f"{ranks}-{name}" / FILE) for ranks in ("one", "two"))
    size = max(x.abs().max().item() for name, x in alone.items() if "lora_B" in name)          # from zero
    assert distance(alone, together) < 0.005 * size
    stored = dcp.FileSystemReader(folder / f"two-{name}/checkpoint-000005" / parallel.PIECES).read_metadata()
    assert all(".lora_" in name for name in stored.state_dict_metadata)


def test_export_loads_strictly(folder, runs):
    for output in ("two-prfl", "two-lora", "two-prfl/checkpoint-000004"):
        state = load_transformer(folder / output / "transformer").state_dict()
        assert not any(isinstance(x, DTensor) for x in state.values())
        assert distance(state, generator().state_dict()) > 0


# ---- resume
@pytest.mark.parametrize("name", ["prfl", "nft", "reward"])
def test_resume_on_another_number_of_ranks(folder, runs, name):
    kind = {"reward": "reward"}.get(name, "transformer")
    run(*command(folder, name, f"two-to-one-{name}", "--resume", f"{folder}/two-{name}/checkpoint-000004"))
    whole = weights(folder, name, f"one-{name}")
    before = load_file(folder / f"one-{name}/checkpoint-000004/{kind}/diffusion_pytorch_model.safetensors")
    for way in ("one-to-two", "two-to-one"):
        assert apart(weights(folder, name, f"{way}-{name}"), whole) < 0.02 * apart(before, whole), way
        assert metrics(folder, f"{way}-{name}")[-1] == pytest.approx(metrics(folder, f"one-{name}")[-1],
                                                                     rel=1e-3, abs=1e-5)


def test_a_rank_killed_while_it_wrote_a_checkpoint(folder, runs):
    assert same(weights(folder, "prfl", "killed-prfl"), weights(folder, "prfl", "two-prfl"))
    assert metrics(folder, "killed-prfl") == metrics(folder, "two-prfl")
    assert not [*(folder / "killed-prfl").rglob("*.tmp*")]


@pytest.mark.parametrize("damage, words", [
    (lambda pieces: (pieces / ".metadata").write_bytes(b"cut"), "is truncated or damaged"),
    (lambda pieces: (pieces / "__1_0.distcp").write_bytes(b"cut"), "is truncated or damaged"),
    (lambda pieces: (pieces / "__1_0.distcp").unlink(), "is truncated or damaged"),
    (shutil.rmtree, "holds no optimizer state"),
])
def test_damaged_pieces_are_one_line(folder, runs, tmp_path, capsys, damage, words):
    shutil.copytree(folder / "two-prfl/checkpoint-000004", tmp_path / "checkpoint-000004")
    damage(tmp_path / "checkpoint-000004" / parallel.PIECES)
    with pytest.raises(SystemExit) as stop:
        run(*command(folder, "prfl", "bad-run", "--resume", str(tmp_path / "checkpoint-000004")))
    stderr = capsys.readouterr().err
    assert stop.value.code == 2 and one_line(stderr) and words in stderr, stderr
    assert not (folder / "bad-run").exists()


def test_a_checkpoint_without_optimizer_state_is_refused(tmp_path):
    model = generator()
    optimizer = torch.optim.AdamW(model.parameters())
    state = {"step": 3, "model": parallel.trained(model), "optimizer": {"state": {}, "param_groups": []}}
    with pytest.raises(common.InputError, match="holds no optimizer state"):
        parallel.load_state(tmp_path, state, model, optimizer)


@pytest.mark.parametrize("name, flags, words", [
    ("reward", ["--depth", "1", "--resume", "two-reward/checkpoint-000004"],
     "that run has --depth 2 (now 1)"),
    ("prfl", ["--resume", "two-reward/checkpoint-000004"], "not a checkpoint of this script"),
    ("prfl", [*LORA, "--resume", "two-prfl/checkpoint-000004"], "--lora_rank 0 (now 2)"),
    ("prfl", ["--lora_rank", "3", "--resume", "two-lora/checkpoint-000004"], "--lora_rank 2 (now 3)"),
    ("prfl", ["--parallel", "fsdp"], "--parallel fsdp shards over processes: start with torchrun"),
    ("reward", ["--parallel", "fsdp"], "--parallel fsdp shards over processes: start with torchrun"),
    ("prfl", ["--parallel", "zero"], "--parallel: invalid choice: 'zero'"),
    ("prfl", ["--lora_alpha", "8"], "--lora_alpha means nothing with --lora_rank 0: leave it out"),
    ("prfl", ["--lora_rank", "-1"], "--lora_rank must be a finite number at least 0, got -1"),
])
def test_bad_inputs_are_one_line(folder, runs, capsys, name, flags, words):
    flags = [str(folder / flag) if flag.startswith("two-") else flag for flag in flags]
    with pytest.raises(SystemExit) as stop:
        run(*command(folder, name, "bad-run", *flags))
    stderr = capsys.readouterr().err
    assert stop.value.code == 2 and one_line(stderr) and words in stderr, stderr
    assert not (folder / "bad-run").exists()


# ---- precision
@pytest.fixture
def group():
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield common.Runtime(0, 1, torch.device("cpu"), torch.bfloat16)
    dist.destroy_process_group()


def test_blocks_run_in_bfloat16_from_float32_pieces(group):
    """Also: the rollout's gathered weights are given back, the frozen reward model is sharded and gets no
    gradients, and the reward update's gradient is that of autocast to bfloat16's precision."""
    torch.manual_seed(3)
    x_T, context, seen = torch.randn(8, 16, 2, 4, 4), torch.randn(8, 3, 8), []
    gradients = []
    for kind in parallel.KINDS:
        policy, pavrm = generator(), PAVRM.from_generator(generator(), 1).freeze()
        torch.nn.init.normal_(pavrm.mlp[-1].weight, generator=torch.Generator().manual_seed(4))
        for model in (policy, pavrm):
            parallel.shard(model, group, parallel.Flags(parallel=kind))
        for layer in (policy.blocks[1].ffn[0], pavrm.trunk.blocks[0].self_attn.q, pavrm.mlp[0]):
            layer.register_forward_hook(lambda layer, x, y: seen.append(layer.weight.dtype))
        policy.head.register_forward_hook(lambda layer, x, y: seen.append(layer.head.weight.dtype))
        policy.blocks[0].register_forward_hook(lambda block, x, y: seen.append(y.dtype))
        with group.autocast():
            prfl.reward_update_loss(policy, pavrm, x_T, context, 3, 4)[0].backward()
        gradients.append([p.grad for p in policy.parameters()])
        assert all(p.grad is None for p in pavrm.parameters())
        assert all(isinstance(p, DTensor) == (kind == "fsdp") and p.dtype == torch.float32
                   for p in (*policy.parameters(), *pavrm.parameters()))
        if kind == "ddp":
            seen.clear()
    f32, bf16 = torch.float32, torch.bfloat16
    assert seen == 3 * [f32, bf16, f32] + [bf16, f32]  # residual stream, ffn, head; the trunk's q, mlp
    ddp, fsdp = (torch.cat([g.flatten() for g in found]) for found in
                 (gradients[0], [g.full_tensor() for g in gradients[1]]))
    assert fsdp.dtype == f32 and (fsdp - ddp).norm() < 0.03 * ddp.norm()


def test_frozen_matrices_of_bfloat16_are_split_too(group):
    """fsdp over a base that was cast, whose adapters train in float32, and a frozen reward model: the
    gradients are those of ddp over float32."""
    torch.manual_seed(3)
    x_T, context, gradients = torch.randn(8, 16, 2, 4, 4), torch.randn(8, 3, 8), []
    for kind in parallel.KINDS:
        policy, pavrm = generator(), PAVRM.from_generator(generator(), 1).freeze()
        torch.nn.init.normal_(pavrm.mlp[-1].weight, generator=torch.Generator().manual_seed(4))
        lora.add(policy, 2, seed=1)
        if kind == "fsdp":
            for dit in (policy, pavrm.trunk):
                parallel.cast_matrices(dit, torch.bfloat16)
        for model in (policy, pavrm):
            parallel.shard(model, group, parallel.Flags(parallel=kind))
        assert (policy.blocks[1].ffn[0].weight.dtype == torch.bfloat16) == (kind == "fsdp")
        with group.autocast():
            prfl.reward_update_loss(policy, pavrm, x_T, context, 3, 4)[0].backward()
        gradients.append([p.grad for p in policy.parameters() if p.requires_grad])
    ddp, fsdp = (torch.cat([g.flatten() for g in found]) for found in
                 (gradients[0], [g.full_tensor() for g in gradients[1]]))
    assert fsdp.dtype == torch.float32 and (fsdp - ddp).norm() < 0.03 * ddp.norm() > 0


@pytest.mark.parametrize("kind", parallel.KINDS)
def test_compiled_blocks_train_alike(group, kind, monkeypatch):
    """A rollout and a rewarded step, blocks recomputed. Traced and differentiated as --compile does; the C++
    that would come of it takes minutes, so these graphs run op by op."""
    monkeypatch.setattr(torch.nn.Module, "compile", partialmethod(torch.nn.Module.compile,
                                                                  backend="aot_eager"))
    torch.manual_seed(3)
    x_T, context, found = torch.randn(4, 16, 2, 4, 4), torch.randn(4, 3, 8), []
    for compiled in (False, True):
        torch._dynamo.utils.counters.clear()
        policy, pavrm = generator(num_layers=1), PAVRM.from_generator(generator(), 1).freeze()
        torch.nn.init.normal_(pavrm.mlp[-1].weight, generator=torch.Generator().manual_seed(4))
        for model in (policy, pavrm):
            parallel.shard(model, group, parallel.Flags(gradient_checkpointing=True, parallel=kind,
                                                        compile=compiled))
        with group.autocast():
            prfl.reward_update_loss(policy, pavrm, x_T, context, 3, 4)[0].backward()
        gradients = [p.grad.full_tensor() if kind == "fsdp" else p.grad for p in policy.parameters()]
        found.append(torch.cat([gradient.flatten() for gradient in gradients]))
        assert bool(torch._dynamo.utils.counters["stats"]["unique_graphs"]) == compiled
    eager, traced = found
    assert (traced - eager).norm() < 0.003 * eager.norm()       # of bfloat16: other products are fused
