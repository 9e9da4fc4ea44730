"""Does a GPU compute what a CPU does? `python -m pytest tests/gpu.py`, skipped where there is none.

Each check is a function of a device. tests/test_gpu_checks.py runs all of them on the CPU at small sizes, so
that they do not rot. `python -m study.node --first_hour` runs this file first.
"""
import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from launch import ENV, ROOT
from torch.nn.attention import SDPBackend, sdpa_kernel

import common
import prfl
from model import PRESETS, VideoDiT
from pavrm import PAVRM, QueryAttention
from scale import offload, parallel, plan

BACKENDS = (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION)


def far(a, b):
    """The relative difference of two tensors, by their norms."""
    a, b = a.detach().double().cpu(), b.detach().double().cpu()
    return ((a - b).norm() / b.norm().clamp(min=1e-12)).item()


def runtime_of(device, dtype=torch.float32):
    return common.Runtime(0, 1, torch.device(device), dtype)


def models():
    """A generator whose 4 heads have 64 channels, as flash attention takes them, and a reward model of it."""
    torch.manual_seed(0)
    dit = VideoDiT(**PRESETS["tiny-t2v"] | dict(dim=256, ffn_dim=512, num_heads=4, num_layers=3))
    torch.nn.init.normal_(dit.head.head.weight, std=0.1)        # Wan's own start is zero
    pavrm = PAVRM.from_generator(dit, 2)
    torch.nn.init.normal_(pavrm.mlp[-1].weight, std=0.1)
    return dit, pavrm.freeze()


def batch(device):
    g = torch.Generator().manual_seed(1)
    shapes = (2, 16, 5, 8, 12), (2, 16, 5, 8, 12), (2, 8, 128)
    return [torch.randn(shape, generator=g).to(device) for shape in shapes]


def results(device, dtype):
    """{what: tensor} of an SFT and of a reward update on a device, under autocast to dtype."""
    runtime = runtime_of(device, dtype)
    dit, pavrm = (parallel.shard(model, runtime, parallel.Flags()) for model in models())
    x0, x1, context = batch(device)
    found = {}
    with runtime.autocast():
        t = torch.tensor([0.2, 0.9], device=device)
        losses = {"sft": prfl.sft_loss(dit, x0, x1, t, context)}
        losses["prfl"], found["logits"] = prfl.reward_update_loss(dit, pavrm, x1, context, 3, 8, shift=3.0)
        with torch.no_grad():
            found["velocity"] = dit(x0, t, context)
    for name, loss in losses.items():
        dit.zero_grad()
        loss.backward()
        found[name] = loss.detach()
        found[f"{name} gradient"] = torch.cat([p.grad.flatten() for p in dit.parameters()
                                               if p.grad is not None])
    return found


# ---- the checks
def check_float32(device):
    """Velocity, logits, losses and gradients of SFT and PRFL, as on a CPU."""
    here, there = (results(name, torch.float32) for name in ("cpu", device))
    for name in here:
        assert far(there[name], here[name]) < 1e-4, name


def check_bfloat16(device):
    """The same under autocast, where a CPU's float32 is the truth: within what eight bits give."""
    here, there = results("cpu", torch.float32), results(device, torch.bfloat16)
    for name in here:
        assert far(there[name], here[name]) < (0.1 if "gradient" in name else 0.03), name


def check_convolutions(device):
    """float32 means float32, as latents are to be those of a CPU: no TF32."""
    torch.backends.cudnn.allow_tf32 = True                      # as it is unless somebody says otherwise
    common.setup("no")
    assert not torch.backends.cudnn.allow_tf32
    g = torch.Generator().manual_seed(1)
    x, w = torch.randn(1, 96, 3, 32, 32, generator=g), torch.randn(96, 96, 3, 3, 3, generator=g)
    assert far(F.conv3d(x.to(device), w.to(device)), F.conv3d(x, w)) < 1e-5


def check_pooling(device):
    """QueryAttention at 14B's width and tokens against attention that makes keys and values, in float64."""
    n, d = (32_760, 5120) if device == "cuda" else (300, 64)
    torch.manual_seed(0)
    for heads in (1, 8):
        pool = QueryAttention(d, heads=heads).to(device)
        h = torch.randn(1, n, d, device=device)
        q, k, v = (y.double().unflatten(-1, (heads, -1)).transpose(1, 2)
                   for y in (pool.query[None], pool.w_k(h), pool.w_v(h)))                   # [1, k, ., e]
        share = (q @ k.mT / math.sqrt(d / heads)).softmax(-1)
        wanted = (share @ v).transpose(1, 2).flatten(1) + pool.query
        assert far(pool(h), wanted) < 1e-5


def check_attention(device):
    """Each fused kernel at the tokens and head of 14B, forward and backward, against a few exact rows."""
    n, few = (32_760, 64) if device == "cuda" else (500, 20)
    g = torch.Generator().manual_seed(1)
    q, k, v, slope = (torch.randn(1, 2, n, 128, generator=g).to(device, torch.bfloat16) for _ in range(4))
    q, k, v = (y.requires_grad_() for y in (q, k, v))
    share = (q[:, :, :few].double() @ k.double().mT / math.sqrt(128)).softmax(-1)
    wanted, ran = share @ v.double(), []
    exact, = torch.autograd.grad(wanted, q, slope[:, :, :few].double())
    for backend in BACKENDS:
        try:
            with sdpa_kernel(backend):
                out = F.scaled_dot_product_attention(q, k, v)
        except RuntimeError as error:
            # what CUDA says, and the CPU, where a machine has none of this kind
            if not any(said in str(error) for said in ("No available kernel", "No viable backend")):
                raise
            continue
        gradient, = torch.autograd.grad(out, q, slope)
        assert far(out[:, :, :few], wanted) < 0.01, backend
        assert far(gradient[:, :, :few], exact[:, :, :few]) < 0.02, backend
        ran.append(backend.name)
    assert ran, "no fused kernel runs here"


def check_sequence(device):
    """A clip over a group of one rank is the clip whole."""
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device == "cuda" else "gloo", store=dist.HashStore(), rank=0,
                                world_size=1)
    from scale.sequence import Sequence
    dit, (x0, _, context), found = models()[0].to(device), batch(device), []
    for shared in (None, lambda n: Sequence(dist.group.WORLD, n)):
        dit.sequence = shared
        dit.zero_grad()
        v = dit(x0, torch.tensor([0.2, 0.9], device=device), context)
        v.square().mean().backward()
        found.append((v, dit.blocks[0].self_attn.q.weight.grad.clone()))
    dist.destroy_process_group()
    for whole, spread in zip(*found):
        assert far(spread, whole) < 1e-5


def check_offload(device):
    """The same gradients, twice in the same buffers, of exactly the bytes that the planner counts, pinned."""
    runtime, found = runtime_of(device), []
    x0, _, context = batch(device)
    for away in (False, True):
        dit = models()[0].to(device)
        dit.gradient_checkpointing = True
        host = offload.offload(dit) if away else None
        for _ in range(2):
            dit(x0, torch.tensor([0.2, 0.9], device=runtime.device), context).square().mean().backward()
        found.append(torch.cat([p.grad.flatten() for p in dit.parameters()]))
    assert far(found[1], found[0]) < 1e-5
    one = plan.Config("tiny-t2v", "sft", 17, "96*64", batch_size=2, offload_activations=True)
    assert host.bytes == plan.costs(one, dit.config)["offloaded"]
    buffers = [x for free in host.free.values() for x in free]
    assert len(buffers) == 3 and all(x.is_pinned() == (device == "cuda") for x in buffers)


def check_frozen_matrices(device):
    """A generator that is cast to sample with has the velocity of one that autocast casts."""
    x0, _, context = batch(device)
    found = []
    for cast in (False, True):
        dit = models()[0].requires_grad_(False)
        if cast:
            parallel.cast_matrices(dit, torch.bfloat16)
        with torch.no_grad(), torch.autocast(device, torch.bfloat16):
            found.append(dit.to(device)(x0, torch.tensor([0.2, 0.9], device=device), context))
    assert torch.equal(*found)


TWO_RANKS = """
import json, sys, torch, torch.distributed as dist
import common
from tiny import generator
dist.init_process_group("gloo")
rank, device = dist.get_rank(), sys.argv[1]
model = generator().to(device)
g = torch.Generator().manual_seed(1)
x, t, context = (torch.randn(4, 16, 2, 4, 4, generator=g), torch.rand(4, generator=g),
                 torch.randn(4, 3, 8, generator=g))
mine = slice(2 * rank, 2 * rank + 2)
model(*(y[mine].to(device) for y in (x, t, context))).square().mean().backward()
norm = common.average_and_clip_gradients(list(model.parameters()), None)
alone = generator().to(device)
alone(*(y.to(device) for y in (x, t, context))).square().mean().backward()
far = max((p.grad - q.grad).abs().max().item() for p, q in zip(model.parameters(), alone.parameters()))
row = json.dumps({"rank": rank, "far": far, "norm": norm})
sys.stdout.write(row + chr(10))                                 # in one piece: print writes two
sys.stdout.flush()
common.teardown()
"""


def check_two_ranks(device):
    """Gradients of two processes that share this device, by gloo, as NCCL wants a GPU for each."""
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "two_ranks.py"
        script.write_text(TWO_RANKS)
        environment = ENV | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
        if device == "cuda":
            del environment["CUDA_VISIBLE_DEVICES"]             # which hides the GPU from other tests
        done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone",
                               "--nproc_per_node=2", script, device], env=environment, capture_output=True,
                              text=True, timeout=300)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0 and len(rows) == 2, done.stderr[-2000:]
    assert all(row["far"] < 1e-5 < row["norm"] for row in rows), rows


CHECKS = (check_float32, check_bfloat16, check_convolutions, check_pooling, check_attention, check_sequence,
          check_offload, check_frozen_matrices, check_two_ranks)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("check", CHECKS)
def test_on_a_gpu(check):
    check("cuda")
