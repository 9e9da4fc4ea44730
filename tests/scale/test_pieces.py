"""Loading by pieces: what each rank reads and holds, of one file, of several, in Wan's names and in
diffusers'; and the options that spare memory."""
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_sequence import torchrun
from tiny import ROOT, command, generator, one_line, run, same

import common
from formats.weights import WEIGHTS, Later, full_tensor, stream_tensors
from model import VideoDiT, export_transformer, load_transformer
from pavrm import PAVRM
from scale import parallel

pytestmark = pytest.mark.usefixtures("cpu")


def load(folder, out):
    done = torchrun(4, ROOT / "tests/scale/load_pieces.py", str(folder), str(out))
    rows = [json.loads(line) for line in done.stdout.replace("}{", "}\n{").splitlines()
            if line.startswith("{")]
    assert done.returncode == 0 and len(rows) == 4, done.stderr[-3000:]
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


# ---- block inputs that wait in the host's memory
def test_every_block_input_goes_and_comes_back(monkeypatch):
    monkeypatch.setattr(parallel, "OFFLOADED_FROM", 500)
    runtime, went = common.Runtime(0, 1, torch.device("cpu"), torch.float32), []
    hooks = torch.autograd.graph.saved_tensors_hooks

    class Counting(hooks):
        def __init__(self, pack, unpack):
            def counted(x):
                kept = pack(x)
                went.extend([tuple(x.shape)] * isinstance(kept, tuple))
                return kept
            super().__init__(counted, unpack)

    gradients = []
    for flags in (parallel.Flags(gradient_checkpointing=True),
                  parallel.Flags(gradient_checkpointing=True, offload_activations=True)):
        policy, judge = generator(num_layers=3), PAVRM.from_generator(generator(), 2)
        for model in (policy, judge):
            parallel.shard(model, runtime, flags)
        g = torch.Generator().manual_seed(1)
        x, t, context = torch.randn(2, 16, 3, 4, 8,
                                    generator=g), torch.rand(2,
                                                             generator=g), torch.randn(2, 3, 8, generator=g)
        if flags.offload_activations:
            monkeypatch.setattr(torch.autograd.graph, "saved_tensors_hooks", Counting)
        judge(x - policy(x, t, context), t, context).sum().backward()
        monkeypatch.setattr(torch.autograd.graph, "saved_tensors_hooks", hooks)
        gradients.append([p.grad for p in policy.parameters()])
    # blocks of both models: tokens
    assert [shape for shape in went if shape == (2, 24, 24)] == 5 * [(2, 24, 24)]
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("flags, words", [
    (["--offload_activations"], "--gradient_checkpointing keeps: give both"),
    (["--fsdp_group_size", "2"], "--fsdp_group_size means nothing with --parallel ddp"),
    (["--fsdp_group_size", "-1"], "--fsdp_group_size must be a finite number at least 0")])
def test_bad_input_is_one_line(folder, capsys, flags, words):
    with pytest.raises(SystemExit) as stop:
        run(*command(folder, "prfl", "bad-run", *flags))
    stderr = capsys.readouterr().err
    assert stop.value.code == 2 and one_line(stderr) and words in stderr, stderr
