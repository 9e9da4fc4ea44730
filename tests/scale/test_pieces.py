"""Loading by pieces: what each rank reads and holds, of one file, of several, in Wan's names and in
diffusers'; and the options that spare memory."""
import collections
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from launch import ENV, ROOT, torchrun
from safetensors.torch import load_file, save_file
from tiny import command, generator, one_line, run, same
from torch.utils._python_dispatch import TorchDispatchMode

import common
from formats.weights import WEIGHTS, Later, full_tensor, save_module, stream_tensors
from model import PRESETS, VideoDiT, export_transformer, load_transformer
from pavrm import PAVRM
from scale import lora, offload, parallel, plan
from scale.simulate import gpu_attend

pytestmark = pytest.mark.usefixtures("cpu")


def load(folder, out):
    done = torchrun(4, ROOT / "tests/scale/load_pieces.py", str(folder), str(out))
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(rows) == 4, done.stderr[-3000:]
    return rows


def test_each_rank_reads_its_rows(tmp_path):
    """Of two files in diffusers' names; 200 MB of weights, a quarter of them on each rank. Written again as
    one file, by one rank, which never holds more than one weight beside its quarter."""
    torch.manual_seed(0)
    dit = VideoDiT(dim=512, ffn_dim=2560, num_heads=8, num_layers=12, text_dim=64, text_len=8, freq_dim=64)
    export_transformer(dit, tmp_path, "diffusers")
    state = load_file(tmp_path / WEIGHTS)
    names = sorted(state)
    files = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, some in files.items():
        save_file({name: state[name] for name in some}, tmp_path / file)
    (tmp_path / f"{WEIGHTS}.index.json").write_text(json.dumps(
        {"weight_map": {name: file for file, some in files.items() for name in some}}))
    (tmp_path / WEIGHTS).unlink()
    size = 4 * sum(p.numel() for p in dit.parameters())
    rows = load(tmp_path, tmp_path / "out")
    assert all(row["meta"] and row["far"] == 0 for row in rows) and sum(row["held"]
                                                                        for row in rows) == size > 190e6
    for row in rows:
        assert row["peak"] < size / 4 + 100e6, row              # and what the libraries hold
        assert row["written"] < size / 4 + 100e6 and row["started"] == pytest.approx(3 ** -0.5, rel=0.02), row
    for name, x in load_file(tmp_path / "out" / WEIGHTS).items():
        assert torch.equal(x, dit.state_dict()[name].to(x.dtype))
        assert (x.dtype == torch.bfloat16) == (name == "head.modulation")


@pytest.mark.parametrize("layout", ["wan", "diffusers"])
def test_one_rank_gets_all(tmp_path, layout):
    """In place on its device, as load_transformer gives it; adapters keep what they start with."""
    export_transformer(generator(), tmp_path, layout)
    runtime = common.Runtime(0, 1, torch.device("cpu"), torch.float32)
    one = load_transformer(tmp_path, load_now=False)
    assert all(p.is_meta for p in one.parameters())
    parallel.shard(one, runtime, parallel.Flags())
    for (name, p), q in zip(one.named_parameters(), load_transformer(tmp_path).parameters(), strict=True):
        assert torch.equal(p, q), name
    assert one.weight_files is None


def test_a_reward_model_starts_the_same_by_pieces(tmp_path):
    export_transformer(generator(), tmp_path)
    runtime, found = common.Runtime(0, 1, torch.device("cpu"), torch.float32), []
    for whole_model in (True, False):
        torch.manual_seed(3)
        judge = PAVRM.from_generator(load_transformer(tmp_path, load_now=whole_model), 1)
        assert judge.trunk.blocks[0].ffn[0].weight.is_meta != whole_model
        found.append(parallel.shard(judge, runtime, parallel.Flags()).state_dict())
    assert same(*found)


def test_files_are_those_of_safetensors(tmp_path):
    """Of every dtype and shape, also a scalar; safetensors reads the same."""
    tensors = {"a": torch.randn(3, 5).t(), "b": torch.tensor(2.0, dtype=torch.float64),
               "c": torch.randn(0, 4),
               "d": torch.randn(7).half(),
               "e": Later((2, 2), torch.bfloat16, lambda: torch.eye(2).bfloat16())}
    stream_tensors(tensors, tmp_path / "x.safetensors", {"a": torch.bfloat16})
    found = load_file(tmp_path / "x.safetensors")
    wanted = {name: full_tensor(x).contiguous()
              for name, x in tensors.items()} | {"a": tensors["a"].bfloat16().contiguous()}
    assert {name: x.dtype for name, x in found.items()} == {name: x.dtype for name, x in wanted.items()}
    assert all(torch.equal(found[name], wanted[name]) for name in wanted) and len(found) == 5


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no disk that is always full")
def test_a_full_disk_is_named():
    with pytest.raises(OSError, match="No space left on device: '/dev/full'"):
        stream_tensors({"a": torch.randn(100_000)}, Path("/dev/full"))


# ---- frozen matrices in the dtype of autocast
def test_off_the_cpu_frozen_matrices_wait_in_bfloat16():
    """The base under adapters, and a frozen reward model; what trains does not. As many bytes as planned."""
    config = PRESETS["tiny-t2v"]
    planned = plan.costs(plan.Config("tiny-t2v", frames=9, size="32*32", lora_rank=2, depth=4), config)
    for device, narrow in (("meta", True), ("cpu", False)):
        runtime = common.Runtime(0, 1, torch.device(device), torch.bfloat16)
        with torch.device("meta"):
            policy, judge = VideoDiT(**config), PAVRM(config | {"num_layers": 4}).freeze()
            trained = VideoDiT(**config)
            lora.add(policy, 2)
        for model in (policy, judge, trained):
            parallel.lay_out(model, runtime, parallel.Flags())
        policy_bytes, judge_bytes, trained_bytes = (sum(p.nbytes for p in model.parameters())
                                                    for model in (policy, judge, trained))
        assert trained_bytes == 4 * planned["parameters"]["total"]
        assert (policy_bytes == planned["weights"]) == (judge_bytes == planned["reward_weights"]) == narrow
        for name, p in policy.named_parameters():
            if p.requires_grad or "norm" in name or not name.startswith("blocks"):
                assert p.dtype == torch.float32, name


def test_a_cast_base_gives_the_same_results_and_exports(tmp_path):
    """Under autocast the same velocity, bit by bit; gradients as near as bfloat16 adds; merged with the
    weights as they are in the base's file, not as they were cast."""
    export_transformer(generator(), tmp_path / "base")
    runtime, found = common.Runtime(0, 1, torch.device("cpu"), torch.bfloat16), []
    g = torch.Generator().manual_seed(1)
    x, t, context = (torch.randn(2, 16, 2, 4, 4, generator=g), torch.rand(2, generator=g),
                     torch.randn(2, 3, 8, generator=g))
    for cast in (False, True):
        policy = load_transformer(tmp_path / "base", load_now=False)
        lora.add(policy, 2, seed=1)
        if cast:
            parallel.cast_matrices(policy, torch.bfloat16)
        parallel.shard(policy, runtime, parallel.Flags())
        assert (policy.blocks[0].ffn[0].weight.dtype == torch.bfloat16) == cast
        draws = torch.Generator().manual_seed(6)
        for name, p in policy.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(p, std=0.3, generator=draws)
        with runtime.autocast():
            out = policy(x, t, context)
        out.square().mean().backward()
        gradients = torch.cat([p.grad.flatten() for p in policy.parameters() if p.requires_grad])
        (tmp_path / str(cast)).mkdir()
        lora.export(policy, tmp_path / str(cast) / "transformer")
        found.append((out.detach(), gradients))
    (wide, slope), (narrow, other) = found
    assert torch.equal(wide, narrow) and (slope - other).norm() < 0.02 * slope.norm()
    wide, narrow = (load_file(tmp_path / name / "transformer" / WEIGHTS) for name in ("False", "True"))
    assert same(wide, narrow) and {w.dtype for w in narrow.values()} == {torch.float32}


WHOLE = """
import json, resource, sys, torch
from model import load_transformer
from pavrm import load_pavrm
from scale import parallel
torch.set_num_threads(1)
folder, dtype = sys.argv[1], getattr(torch, sys.argv[2])
most = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = most()
dit = load_transformer(folder + "/transformer", load_now=False).requires_grad_(False)
parallel.whole(dit, dtype)
pavrm = parallel.whole(load_pavrm(folder + "/reward", dit, load_now=False), dtype)
held = sum(p.nbytes for model in (dit, pavrm) for p in model.parameters())
print(json.dumps({"peak": most() - before, "held": held, "dtype": str(dit.blocks[0].ffn[0].weight.dtype),
                  "pooling": str(pavrm.pool.w_k.weight.dtype)}))
"""


def test_a_float32_export_is_never_whole_in_memory(tmp_path):
    """Read to sample with: 260 MB of files are cast while they are read, and take 130 MB."""
    torch.manual_seed(0)
    dit = VideoDiT(dim=512, ffn_dim=2560, num_heads=8, num_layers=12, text_dim=64, text_len=8, freq_dim=64)
    export_transformer(dit, tmp_path / "transformer")
    save_module(PAVRM.from_generator(dit, 4), tmp_path / "reward")
    files = sum(file.stat().st_size for file in tmp_path.rglob("*.safetensors"))
    done = subprocess.run([sys.executable, "-c", WHOLE, tmp_path, "bfloat16"], env=ENV, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr
    row = json.loads(done.stdout)
    assert (row["dtype"], row["pooling"]) == ("torch.bfloat16", "torch.float32")
    assert 255e6 < files and row["held"] < 0.55 * files
    assert row["peak"] < row["held"] + 60e6, row                # one weight in float32, and the libraries


# ---- block inputs that wait in the host's memory
def test_every_block_input_goes_and_comes_back(monkeypatch):
    """Two updates of a generator of three blocks and a reward model of two: the gradients are those without
    --offload_activations, the inputs of all five blocks leave each time, and the second update uses the
    buffers of the first, which have the bytes that the planner counts."""
    runtime = common.Runtime(0, 1, torch.device("cpu"), torch.float32)
    left, pack, hosts, make = [], offload.Host.pack, [], offload.offload

    def counted(host, x):
        kept = pack(host, x)
        left.extend([tuple(x.shape)] * isinstance(kept, offload.Away))
        return kept

    monkeypatch.setattr(offload.Host, "pack", counted)
    monkeypatch.setattr(offload, "offload", lambda dit: hosts.append(make(dit)))
    g = torch.Generator().manual_seed(1)
    batches = [(torch.randn(2, 16, 3, 4, 8, generator=g), torch.rand(2, generator=g),
                torch.randn(2, 3, 8, generator=g)) for _ in range(2)]
    gradients = []
    for flags in (parallel.Flags(gradient_checkpointing=True),
                  parallel.Flags(gradient_checkpointing=True, offload_activations=True)):
        policy, judge = generator(num_layers=3), PAVRM.from_generator(generator(), 2).freeze()
        torch.nn.init.normal_(judge.mlp[-1].weight, generator=torch.Generator().manual_seed(4))
        for model in (policy, judge):
            parallel.shard(model, runtime, flags)
        for x, t, context in batches:
            judge(x - policy(x, t, context), t, context).sum().backward()
        gradients.append([p.grad for p in policy.parameters()])
    assert left == 2 * 5 * [(2, 24, 24)]                        # tokens, and no weight or prompt
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b)
    planned = plan.costs(plan.Config("tiny-t2v", frames=9, size="64*32", batch_size=2, depth=2,
                                     offload_activations=True), policy.config | {"image_dim": None})
    assert sum(host.bytes for host in hosts) == planned["offloaded"] == 5 * 4 * 2 * 24 * 24


def test_the_next_input_is_on_its_way_when_one_is_asked_for():
    """And never more than two are back at one time."""
    host, inputs = offload.Host(), [torch.full((2, 2), float(i)) for i in range(4)]
    host.begin((2, 2))
    kept = [host.pack(x) for x in inputs]
    for i in (3, 2, 1, 0):
        assert torch.equal(host.unpack(kept[i]), inputs[i])
        assert [away.back is not None for away in kept] == [j == i - 1 for j in range(4)]
    host.begin((2, 2))
    again = [host.pack(x + 1) for x in inputs]
    assert host.bytes == 4 * 16                                 # the same buffers
    assert all(torch.equal(host.unpack(away), x + 1) for away, x in zip(again[::-1], inputs[::-1]))


@pytest.mark.parametrize("shared", [False, True])
def test_attention_that_is_kept_is_not_computed_again(monkeypatch, shared):
    """Generator and reward model: bit by bit the same gradients, and each self-attention once; without the
    flag, and of cross-attention, twice. shared: while block inputs wait on the host."""
    monkeypatch.setattr("model.attend", gpu_attend)
    runtime, found = common.Runtime(0, 1, torch.device("cpu"), torch.bfloat16), []
    g = torch.Generator().manual_seed(1)
    x, t, context = (torch.randn(2, 16, 3, 4, 8, generator=g), torch.rand(2, generator=g),
                     torch.randn(2, 3, 8, generator=g))
    for keep in (False, True):
        policy, judge = generator(num_layers=3), PAVRM.from_generator(generator(), 2).freeze()
        torch.nn.init.normal_(judge.mlp[-1].weight, generator=torch.Generator().manual_seed(4))
        for one in (policy, judge):
            parallel.shard(one, runtime, parallel.Flags(gradient_checkpointing=True, keep_attention=keep,
                                                        offload_activations=shared))
        counted = Counter()
        with counted:
            with runtime.autocast():
                loss = judge(x - policy(x, t, context), t, context).sum()
            loss.backward()
        found.append(([p.grad for p in policy.parameters()], counted.calls))
    (recomputed, calls), (kept, fewer) = found
    assert all(torch.equal(a, b) for a, b in zip(recomputed, kept))
    # 24 tokens, 3 of the prompt
    assert calls == {24: 2 * 5, 3: 2 * 5} and fewer == {24: 5, 3: 2 * 5}


class Counter(TorchDispatchMode):
    """`calls`: {number of keys: how often attention was computed}"""

    def __init__(self):
        super().__init__()
        self.calls = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in parallel.ATTENTION:
            self.calls[args[1].shape[2]] += 1
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("flags, words", [
    (["--keep_attention"], "--gradient_checkpointing would compute again: give both"),
    (["--keep_attention", "--gradient_checkpointing", "--compile"], "give one of the two"),
    (["--offload_activations"], "--gradient_checkpointing keeps: give both"),
    (["--fsdp_group_size", "2"], "--fsdp_group_size means nothing with --parallel ddp"),
    (["--fsdp_group_size", "-1"], "--fsdp_group_size must be a finite number at least 0")])
def test_bad_input_is_one_line(folder, capsys, flags, words):
    with pytest.raises(SystemExit) as stop:
        run(*command(folder, "prfl", "bad-run", *flags))
    stderr = capsys.readouterr().err
    assert stop.value.code == 2 and one_line(stderr) and words in stderr, stderr
