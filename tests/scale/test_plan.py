"""plan.py: its counts against the modules, its bytes against what autograd saves and tensors that live, its
FLOPs against PyTorch's counter, and all of it against the paper's Table 4.

The true widths and clip sizes run under FakeTensorMode: tensors of the right shape and size without data, so
that 14B blocks on 33 thousand tokens take seconds and no memory. Attention takes the GPU's path (bf16, fused)
on the CPU too."""

import inspect
import json
import re
import weakref
from pathlib import Path

import launch
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

import common
import data
import flow
import model
import pavrm
import prfl
import refl_baseline
import train_align
import train_reward
import validation
from families import fill_in, sampling_defaults, training_defaults
from formats import weights
from model import PRESETS
from scale import lora, parallel, plan
from scale import simulate as simulation
from scale.simulate import gpu_attend, simulate

ROOT = Path(plan.__file__).parents[1]
WAN = PRESETS["wan2.1-t2v-1.3b"] | dict(num_layers=2)
IMAGE = WAN | dict(model_type="i2v", in_dim=36, image_dim=1280)


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch):
    monkeypatch.setattr(model, "attend", gpu_attend)
    model.rope_table.cache_clear()              # no table of another fake mode, nor a fake one left behind
    yield
    model.rope_table.cache_clear()


class LiveBytes(TorchDispatchMode):
    """`peak`: the most bytes that tensors held at one time, each storage counted once."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.seen = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x,
                          torch.Tensor) and (key := (storage := x.untyped_storage())._cdata) not in self.seen:
                self.seen[key] = storage.nbytes()
                self.now += storage.nbytes()
                weakref.finalize(storage, self.freed, key)
        self.peak = max(self.peak, self.now)
        return out

    def freed(self, key):
        self.now -= self.seen.pop(key)


class Adapter(nn.Module):
    def __init__(self, base, rank):
        super().__init__()
        self.base, self.down = base, nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)
        self.weight = base.weight

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


def build(config, trained="all", rank=4):
    """A VideoDiT; "none": frozen; "lora": adapters beside frozen q, k, v, o."""
    dit = model.VideoDiT(**config).requires_grad_(trained == "all")
    for block in dit.blocks if trained == "lora" else ():
        for attention in (block.self_attn, block.cross_attn):
            for name in "qkvo":
                setattr(attention, name, Adapter(getattr(attention, name), rank))
    return dit


def inputs(config, grid, batch=1, grad=False):
    args = dict(x=torch.randn(batch, 16, *grid, requires_grad=grad), t=torch.rand(batch),
                context=torch.randn(batch, config["text_len"], config["text_dim"]))
    if config["model_type"] == "i2v":
        args["y"] = torch.randn(batch, 20, *grid)
    if config.get("image_dim"):
        args["clip_tokens"] = torch.randn(batch, plan.IMAGE_TOKENS, config["image_dim"])
    return args


def saved_bytes(call, exclude):
    """Bytes of the storages that autograd keeps for `call()`, without those in `exclude` (a set of storage
    ids)."""
    kept = {}

    def pack(x):
        storage = x.untyped_storage()
        kept[storage._cdata] = storage          # held, so that no id is used twice
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = call()
    del out
    return sum(storage.nbytes() for key, storage in kept.items() if key not in exclude)


def costs(config, **flags):
    return plan.costs(plan.Config("tiny-t2v", **dict(depth=min(8, config["num_layers"])) | flags), config)


# ---- counts
@pytest.mark.parametrize("preset", PRESETS)
def test_parameters_are_those_of_the_modules(preset):
    config = PRESETS[preset]
    with torch.device("meta"):
        dit, reward = model.VideoDiT(**config), pavrm.PAVRM(config | dict(num_layers=3))
    size = lambda module: sum(p.numel() for p in module.parameters())
    found = plan.parameters(config)
    assert (found["total"], found["block"], found["head"]) == (size(dit), size(dit.blocks[0]), size(dit.head))
    assert plan.reward_parameters(config, 3) == size(reward)
    adapters = [p for n, p in build(config | dict(num_layers=3), "lora", 5).named_parameters() if ".up." in n
                or
                ".down." in n] if config["dim"] < 1000 else []
    assert not adapters or plan.lora_parameters(config | dict(num_layers=3),
                                                5) == sum(p.numel() for p in adapters)


def test_tokens_of_wans_sizes():
    assert plan.latent_grid(81, "832*480") == (21, 60,
                                               104) and plan.latent_grid(81, "1280*720") == (21, 90, 160)
    assert costs(WAN, frames=81, size="832*480")["n"] == 32_760
    assert costs(WAN, frames=81, size="1280*720")["n"] == 75_600
    five = PRESETS["wan2.2-ti2v-5b"]
    assert costs(five, frames=121, size="1280*704")["n"] == 27_280
    assert plan.parameters(five)["total"] == pytest.approx(5e9, rel=0.01)
    with pytest.raises(common.InputError, match="multiples of 32"):
        costs(five, size="1280*720")


@pytest.mark.parametrize("preset, clip", [
    ("wan2.2-ti2v-5b", "121 frames of 1280*704"), ("wan2.2-a14b", "81 frames of 832*480"),
    ("wan2.1-t2v-14b", "81 frames of 832*480"), ("tiny-t2v", "9 frames of 32*32")])
def test_the_clip_is_the_generators_own(capsys, preset, clip):
    frames, size = clip.split(" frames of ")
    flags = ["--recipe", "steady", "--clips", 9]
    out = printed(capsys, preset, *flags)
    assert f": {clip}, 1 per GPU" in out
    assert out == printed(capsys, preset, *flags, "--frames", frames, "--size", size)
    assert f": 5 frames of {size}, " in printed(capsys, preset, "--frames", 5)
    assert f": {frames} frames of 64*64, " in printed(capsys, preset, "--size", "64*64")


def test_two_experts():
    """Beside one transformer of the same shape: under fsdp both are there; alone, they change places with the
    host. An update is of one of them, and the rollout goes on to the steps of what trains."""
    one, two = PRESETS["wan2.1-t2v-14b"], plan.GENERATORS["wan2.2-a14b"]
    P = plan.parameters(one)["total"]
    frozen = 4 * P - 2 * one["num_layers"] * plan.matrix_parameters(one)            # matrices in bf16
    for flags in (dict(gpus=8), dict(gpus=8, lora_rank=16), {}, dict(lora_rank=16), dict(method="sample")):
        of_one, low = costs(one, **flags), costs(two, **flags)
        both = costs(two, expert="both", **flags)
        parts, trains = of_one["parts"], flags.get("method") != "sample"
        more = frozen / parts if parts > 1 else 0               # of the one that does not train
        assert low["weights"] - of_one["weights"] == pytest.approx(more)
        # alone: both are on the host while they change places, the one that trains with its float32 weights
        rests = frozen + (4 * P if trains and not flags.get("lora_rank") else frozen)
        assert low["waiting_weights"] == (0 if more else rests)
        assert (low["trained"], low["optimizer"]) == (of_one["trained"], of_one["optimizer"])
        if trains:
            assert (both["trained"], both["gradients"]) == (2 * of_one["trained"], of_one["gradients"])
            assert both["optimizer"] == 2 * of_one["optimizer"] and both["waiting_weights"] == 0
            assert both["weights"] == pytest.approx(2 * of_one["weights"])
            assert low["with"]["peak"] - of_one["with"]["peak"] == pytest.approx(more)
            assert low["update_flops"] == both["update_flops"] == of_one["update_flops"]
    # shift 12, N = 40: t = 12 u / (1 + 11 u) >= .875 for u >= .3684, which are 26 of the steps' starts
    found = {name: costs(two, expert=name)["rollout_steps"] for name in ("high", "low", "both")}
    assert found == {"high": 12.5, "low": 32.5, "both": 19.5}
    written = {name: plan.way(plan.Config("wan2.2-a14b", expert=name, clips=1), two)["export"] / P
               for name in ("high", "both")}
    assert written == {"high": 2, "both": 4}
    with pytest.raises(common.InputError, match="late part of the trajectory .* of the --expert that trains"):
        costs(two, expert="high", method="refl")


# ---- bytes
@pytest.mark.parametrize("trained", ["all", "lora", "none"])
@pytest.mark.parametrize("config, batch, grid", [(WAN, 1, (21, 60, 104)), (IMAGE, 2, (5, 60, 104))])
def test_a_block_keeps_what_autograd_saves(config, batch, grid, trained):
    with FakeTensorMode():
        dit, args = build(config, trained), inputs(config, grid, batch, grad=trained != "all")
        d, F = config["dim"], config["ffn_dim"]
        weights = {p.untyped_storage()._cdata for p in dit.parameters()}

        def blocks(depth):
            with torch.autocast("cpu", torch.bfloat16):
                return dit.features(args["x"], args["t"], args["context"], depth=depth, y=args.get("y"),
                                    clip_tokens=args.get("clip_tokens"))
        measured = saved_bytes(lambda: blocks(2), weights) - saved_bytes(lambda: blocks(1), weights)
    # bf16 copies of the matrices are a term of their own; frozen ones that see only the prompt or the image
    # keep none
    squares = 6 if trained != "all" else 10 if config.get("image_dim") else 8
    measured -= 2 * (squares * d * d + 2 * d * F)
    n = grid[0] * grid[1] * grid[2] // 4
    assert sum(plan.block_bytes(config, n, trained, batch).values()) == pytest.approx(measured, rel=0.005)


# Wan2.2 TI2V-5B's VAE, as its config.json has it.
TI2V_VAE = dict(base_dim=160, decoder_base_dim=256, z_dim=48, is_residual=True, in_channels=12,
                out_channels=12, patch_size=2, scale_factor_spatial=16, latents_mean=[0.0] * 48,
                latents_std=[1.0] * 48)
VAES = [(plan.WAN21_VAE, {}), (plan.TI2V_VAE, TI2V_VAE)]


@pytest.mark.parametrize("vae_counted, vae_config", VAES, ids=["wan2.1", "ti2v"])
@pytest.mark.parametrize("frames, h, w", [(1, 60, 104), (3, 16, 16)])
def test_the_decoder_keeps_and_computes_what_diffusers_does(frames, h, w, vae_counted, vae_config):
    diffusers = pytest.importorskip("diffusers", reason="Wan's VAEs are taken from diffusers")
    with FakeTensorMode(), FlopCounterMode(display=False) as flops:
        vae = diffusers.AutoencoderKLWan(**vae_config).requires_grad_(False)    # float32, as WanVAE has it
        weights = {p.untyped_storage()._cdata for p in vae.parameters()}
        z = torch.randn(1, vae.z_dim, frames, h, w, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16):
            measured = saved_bytes(lambda: vae.decode(z, return_dict=False)[0], weights)
    found = plan.decoder_costs(frames, h, w, vae=vae_counted)
    assert found["kept"] == pytest.approx(measured, rel=0.02)
    assert found["flops"] == pytest.approx(flops.get_total_flops(), rel=0.01)
    assert sum(p.numel() for p in [*vae.decoder.parameters(),
                                   *vae.post_quant_conv.parameters()]) == vae_counted.decoder_parameters
    assert sum(p.numel() for p in vae.parameters()) == vae_counted.parameters
    first = plan.decoder_costs(frames, h, w, first=True, vae=vae_counted)
    assert first["kept"] == plan.decoder_costs(1, h, w, vae=vae_counted)["kept"]


def test_what_refl_holds_is_float32(folder):
    """Of the pixel reward and of the whole VAE, as they are loaded; and the planner counts 4 bytes of each
    number."""
    path = folder / "generator"
    dit = model.load_transformer(path)
    how = train_align.Config(model=str(path), reward=str(path / "reward_rgb_first"))
    runtime = common.Runtime(0, 1, torch.device("cpu"), torch.bfloat16)
    held = refl_baseline.load_reward_and_decoder(how, dit, runtime)
    assert {p.dtype for one in held for p in one.parameters()} == {torch.float32}
    found = costs(PRESETS["wan2.1-t2v-14b"], method="refl", pixel_reward_parameters=10 ** 9, gpus=8)
    assert (found["reward_weights"], found["vae_weights"]) == (4 * 10 ** 9, 4 * plan.WAN21_VAE.parameters)
    moments = found["with"]["moments"]                          # autocast's copies of the reward's weights
    assert moments["pixels"] - moments["decoder"] == 2 * 10 ** 9 - found["decoder"]["passing"]


def test_attention_that_is_kept():
    """14B at 480P: an eighth less work, and 2 (d + 2 k) bytes a token of each block more."""
    again, once = (costs(PRESETS["wan2.1-t2v-14b"], gpus=8, method="sft", keep_attention=keep)
                   for keep in (False, True))
    tokens = 32_760
    assert once["with"]["peak"] - again["with"]["peak"] == 39 * tokens * (2 * 5120 + 4 * 40)
    assert again["update_flops"] - once["update_flops"] == 40 * 4 * tokens ** 2 * 5120
    assert 0.87 < once["update_flops"] / again["update_flops"] < 0.89
    with pytest.raises(common.InputError, match="--keep_attention keeps a part"):
        costs(WAN, keep_attention=True, gradient_checkpointing=False)


@pytest.mark.parametrize("width, layers, size, method, checkpointing", [
    ("wan2.1-t2v-1.3b", 4, "832*480", "sft", True), ("wan2.1-t2v-1.3b", 4, "832*480", "prfl", True),
    ("wan2.1-t2v-1.3b", 2, "832*480", "prfl", False), ("wan2.1-t2v-14b", 3, "832*480", "prfl", True),
    ("wan2.1-t2v-1.3b", 3, "64*64", "prfl", True), ("wan2.1-t2v-1.3b", 4, "832*480", "prfl", "kept")])
def test_peak_of_live_tensors(width, layers, size, method, checkpointing):
    """Weights, moments, gradients and activations of a whole update at the true width and clip; three
    blocks. "kept": checkpointing, but for attention."""
    config, keep = PRESETS[width] | dict(num_layers=layers), checkpointing == "kept"
    found = costs(config, method=method, size=size, parallel="ddp", depth=2, keep_attention=keep)
    with FakeTensorMode(), LiveBytes() as live:
        dit = build(config)
        dit.gradient_checkpointing = checkpointing
        reward = pavrm.PAVRM(config | dict(num_layers=2)).freeze() if method == "prfl" else None
        if reward:
            parallel.cast_matrices(reward.trunk, torch.bfloat16)
            reward.trunk.gradient_checkpointing = checkpointing
        if keep:
            for one in filter(None, (dit, getattr(reward, "trunk", None))):
                one.checkpoint_options = parallel.KEEP_ATTENTION
        optimizer = torch.optim.AdamW(dit.parameters(), foreach=True)         # as it is on a GPU
        for p in dit.parameters():
            optimizer.state[p] = dict(step=torch.tensor(0.0), exp_avg=torch.zeros_like(p),
                                      exp_avg_sq=torch.zeros_like(p))
        x, t, context = inputs(config, (found["f"], found["h"], found["w"])).values()
        live.peak = live.now
        with torch.autocast("cpu", torch.bfloat16):
            loss = (prfl.reward_update_loss(dit, reward, x, context, 1, 40)[0] if reward else
                    prfl.sft_loss(dit, x, torch.randn_like(x), t, context))
        loss.backward()
        optimizer.step()
    assert found["with" if checkpointing else "without"]["peak"] == pytest.approx(live.peak, rel=0.06)


def test_peak_measured_by_the_allocator():
    """Small models on real tensors, in a process of their own."""
    done = launch.python("tests/scale/measure_peak.py")
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert done.returncode == 0 and len(found) == 10, done.stderr[-3000:]
    for row in found:
        assert row["planned"] == pytest.approx(row["measured"], rel=0.1), row
        assert row["simulated"] is None or row["simulated"] == pytest.approx(row["measured"], rel=0.1), row
    assert sum(row["simulated"] is not None for row in found) == 5


@pytest.mark.parametrize("flags", [dict(), dict(sequence_parallel=2),
                                   dict(lora_rank=32, size="832*480", frames=81, gpus=8)])
def test_a_simulated_iteration_beside_the_pencil(flags):
    """fsdp over ranks that do not exist, at the width of 1.3B; line by line."""
    config = PRESETS["wan2.1-t2v-1.3b"] | dict(num_layers=2)
    one = plan.Config("tiny-t2v", **dict(size="256*256", frames=17, recipe="steady", gpus=2, depth=2) | flags)
    found = plan.costs(one, config)
    phases = simulate(one, config, (found["f"], found["h"], found["w"]))
    start, moments = phases["before"], found["with"]["moments"]
    assert start["Parameter"] == pytest.approx(found["weights"] + found["reward_weights"], rel=0.01)
    assert start["Optstate"] == pytest.approx(found["optimizer"], rel=0.01)
    stepping = found["static"] + moments["optimizer"]           # the inputs lie beside it
    assert phases["optimizer step"]["Total"] == pytest.approx(stepping, rel=0.1, abs=5e7)
    rewarding, own = (max(phases[name]["Total"] for name in names) for names in (
        ("reward, forward", "reward's backward"), ("SFT, backward", "generator's backward")))
    assert rewarding == pytest.approx(found["static"] + max(moments["reward"], moments.get("pooling", 0)),
                                      rel=0.1)
    assert own == pytest.approx(found["static"] + max(moments["generator"], moments["gradients"]), rel=0.1)
    assert max(phase["Total"] for phase in phases.values()) == pytest.approx(found["with"]["peak"], rel=0.1)
    assert not torch.distributed.is_initialized() and model.attend is gpu_attend


@pytest.mark.parametrize("expert, flags", [("low", dict(gpus=2)), ("both", dict(gpus=2, lora_rank=8)),
                                           ("both", dict())])
def test_a_simulated_iteration_of_two_experts(monkeypatch, expert, flags):
    """Beside one transformer of the same shape: under fsdp, or where both train, each has its second expert
    too. Every call is of the expert whose step it is."""
    one, kept, names_of_calls = PRESETS["wan2.1-t2v-1.3b"] | dict(num_layers=2), [], simulation.names_of_calls
    two = one | {"boundary_ratio": 0.875}
    monkeypatch.setattr(simulation, "names_of_calls",
                        lambda *how: kept.append(names_of_calls(*how)) or kept[0])
    how = plan.Config("wan2.2-a14b", size="256*256", frames=17, recipe="steady", depth=2, expert=expert,
                      **flags)
    found, of_one = plan.costs(how, two), plan.costs(how, one)
    grid = found["f"], found["h"], found["w"]
    phases, before = simulate(how, two, grid, plan.times_of_rollout(how, two)), simulate(how, one, grid)
    for kind, keys in (("Parameter", ("weights", "reward_weights")), ("Optstate", ("optimizer",))):
        added = sum(found[key] - of_one[key] for key in keys)
        measured = phases["before"][kind] - before["before"][kind]
        assert measured == pytest.approx(added, rel=0.01) and (added > 0) == (kind == "Parameter" or
                                                                              expert == "both")
    assert max(phase["Total"] for phase in phases.values()) == pytest.approx(found["with"]["peak"], rel=0.1)
    assert list(kept[0]) == []                                  # all calls that were planned were made


def test_one_of_two_experts_that_rests_is_not_on_the_gpu():
    one, how = PRESETS["wan2.1-t2v-1.3b"] | dict(num_layers=2), plan.Config(
        "wan2.2-a14b", size="64*64", frames=5, recipe="steady", depth=2, expert="high")
    two, grid = one | {"boundary_ratio": 0.875}, (2, 8, 8)
    found = simulate(how, two, grid, plan.times_of_rollout(how, two))
    assert found["before"] == simulate(how, one, grid)["before"]


def test_the_experts_that_an_iteration_calls():
    """Six steps, from t = 1, .83, .67, .5, .33 and .17, with the boundary at .6: the SFT update, and the
    steps to the one that is rewarded."""
    times, names = flow.schedule(6), lambda *how: list(simulation.names_of_calls(*how))
    how = lambda **flags: plan.Config("wan2.2-a14b", num_inference_steps=6, **flags)
    assert names(how(), times, 0.6, 5) == ["low"] + ["high"] * 3 + ["low"] * 2
    assert names(how(expert="high"), times, 0.6, 2) == ["high"] * 3
    assert names(how(expert="both", recipe="steady"), times, 0.6, 6) == ["low", "high", "high", "low", "low"]


def test_fsdp_cuts_and_checkpointing_and_lora_save():
    config = PRESETS["wan2.1-t2v-14b"]
    whole, cut = costs(config, gpus=8, parallel="ddp"), costs(config, gpus=8, parallel="fsdp")
    for part in ("weights", "gradients", "optimizer", "reward_weights"):
        assert whole[part] == 8 * cut[part]
    assert cut["with"]["peak"] < cut["without"]["peak"] and whole["without"]["peak"] > whole["with"]["peak"]
    assert costs(config, gpus=8, parallel="fsdp")["block"] == whole["block"]
    adapters = costs(config, lora_rank=32, parallel="ddp")
    assert adapters["with"]["peak"] < whole["with"]["peak"] / 2
    assert adapters["trained"] == 40 * 16 * 32 * 5120


# ---- FLOPs
@pytest.mark.parametrize("config, trained, checkpointing, tolerance", [
    (WAN, True, True, 0.02), (WAN, True, False, 0.02), (IMAGE, True, True, 0.02),
    (WAN, False, True, 0.06), (WAN, False, False, 0.06)])  # frozen: text's k and v take no backward at all
def test_flops_are_those_of_pytorchs_counter(config, trained, checkpointing, tolerance):
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    rules = {flash: lambda q, k, v, *a, out_shape=None, **kw: sdpa_flop_count(q, k, v),
             torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward:
                 lambda g, q, k, v, *a, out_shape=None, **kw: sdpa_backward_flop_count(g, q, k, v)}
    with FakeTensorMode(), FlopCounterMode(display=False, custom_mapping=rules) as counter:
        dit, args = build(config, "all" if trained else "none"), inputs(config, (5, 32, 32), grad=not trained)
        dit.gradient_checkpointing = checkpointing
        with torch.autocast("cpu", torch.bfloat16):
            velocity = dit(**args)
        once = counter.get_total_flops()
        velocity.sum().backward()
    forward = plan.forward_flops(config, 5 * 16 * 16, 2)
    assert sum(forward) == pytest.approx(once, rel=0.001)
    assert plan.update_flops(forward, trained,
                             checkpointing) == pytest.approx(counter.get_total_flops(), rel=tolerance)


@pytest.mark.parametrize("part, num_steps", [("full", 40), ("late", 40), ("full", 16), ("full", 5)])
def test_passes_of_the_steady_recipe(part, num_steps):
    """Counted in flow.rollout, for every step that can be drawn."""
    steps = prfl.steps_of_part(part, num_steps)
    calls = []
    dit = lambda x, t, context: calls.append(t) or x
    for step in steps:
        flow.rollout(dit, torch.ones(1, 1, 1, 1, 1), None, num_steps, stop=step - 1,
                     passes=plan.STEADY_PASSES)
    stride = -(-num_steps // plan.STEADY_PASSES)
    assert plan.rollout_passes(steps, stride) == pytest.approx(len(calls) / len(steps))


def test_shared_clips_take_a_share_of_the_work():
    """Linear layers and attention, but for the prompt; two clips on eight GPUs; the reward pools all tokens
    on each."""
    whole, shared = (costs(PRESETS["wan2.1-t2v-14b"], gpus=8, size="1280*720", sequence_parallel=n)
                     for n in (1, 4))
    assert (shared["m"], shared["n"], shared["groups"]) == (18_900, 75_600, 2) and whole["groups"] == 8
    assert shared["forward"][1] == whole["forward"][1] / 4
    assert whole["forward"][0] / 4 < shared["forward"][0] < 1.02 * whole["forward"][0] / 4
    assert shared["edge"] == whole["edge"] / 4 and shared["static"] == whole["static"]
    odd = costs(WAN, frames=1, size="96*96", gpus=4, sequence_parallel=4)
    assert odd["n"] == 36 and odd["m"] == 9 and costs(WAN, frames=1, size="112*112", gpus=4,
                                                      sequence_parallel=4)["m"] == 13


@pytest.mark.parametrize("recipe", ["paper", "steady"])
@pytest.mark.parametrize("ranks", [4, 8])
def test_720p_fits_as_the_papers_did(ranks, recipe):
    found = costs(PRESETS["wan2.1-t2v-14b"], size="1280*720", gpus=8, sequence_parallel=ranks, recipe=recipe)
    assert found["with"]["peak"] < 66.81e9


def test_network_of_two_nodes_by_hand():
    config = PRESETS["wan2.1-t2v-1.3b"]
    count, R = plan.parameters(config), plan.reward_parameters(config, 8)
    once = 2 * count["blocks"] + 4 * (count["total"] - count["blocks"])
    judge = 2 * 8 * count["block"] + 4 * (R - 8 * count["block"])
    found = costs(config, gpus=4, nodes=2)
    assert found["network"] == pytest.approx(7 / 8 * ((4 + 19.5) * once + 2 * judge + 2 * 4 * count["total"]))
    assert costs(config, gpus=4, nodes=2,
                 parallel="ddp")["network"] == pytest.approx(7 / 8 * 2 * 2 * 4 * count["total"])
    assert costs(config, gpus=8)["network"] == 0
    node = costs(config, gpus=4, nodes=2, fsdp_group_size=4)  # weights stay inside a node, sums go to both
    assert node["parts"] == 4 and node["network"] == pytest.approx(1 / 2 * 2 * 2 * 4 * count["total"])
    assert node["static"] == costs(config, gpus=4)["static"]


def test_offloading_keeps_two_block_inputs_of_all():
    config = PRESETS["wan2.1-t2v-14b"]
    here, away = (costs(config, gpus=8, offload_activations=on) for on in (False, True))
    assert here["with"]["waiting"] - away["with"]["waiting"] == 38 * here["edge"]
    assert away["offloaded"] == 48 * here["edge"] and here["offloaded"] == 0
    assert here["with"]["moments"]["generator"] - away["with"]["moments"]["generator"] == 38 * here["edge"]


def test_sampling_beside_live_tensors():
    """The generator's forward pass at the true width, and Wan's decoder."""
    diffusers = pytest.importorskip("diffusers", reason="Wan2.1's VAE is taken from diffusers")
    config = PRESETS["wan2.1-t2v-14b"] | dict(num_layers=2)
    found = costs(config, method="sample", size="832*480")
    with FakeTensorMode(), torch.no_grad():
        with LiveBytes() as live:
            dit = parallel.cast_matrices(build(config, "none"), torch.bfloat16)
            args = inputs(config, (found["f"], found["h"], found["w"]))
            live.peak = live.now
            with torch.autocast("cpu", torch.bfloat16):
                dit(**args)
        assert found["with"]["moments"]["generator"] == pytest.approx(live.peak, rel=0.06)
        with LiveBytes() as live:
            vae = diffusers.AutoencoderKLWan()
            z, weights = torch.randn(1, 16, 5, 60, 104), live.now
            live.peak = live.now
            vae.decode(z, return_dict=False)
        assert plan.decoding(5, 60, 104) == pytest.approx(live.peak - weights, rel=0.25)


@pytest.mark.parametrize("preset, experts", [("wan2.1-t2v-14b", 1), ("wan2.2-a14b", 2)])
def test_what_sampling_takes_of_the_host(capsys, preset, experts):
    """Each process holds the VAE and the whole generator, or, split, first the text encoder."""
    transformers = pytest.importorskip("transformers", reason="UMT5 is taken from transformers")
    with torch.device("meta"):
        encoder = transformers.UMT5EncoderModel(transformers.UMT5Config(
            vocab_size=256_384, d_model=4096, d_kv=64, d_ff=10_240, num_layers=24, num_heads=64,
            feed_forward_proj="gated-gelu")).bfloat16()
        dit = parallel.cast_matrices(build(PRESETS["wan2.1-t2v-14b"], "none"), torch.bfloat16)
    text, whole = (sum(p.nbytes for p in one.parameters()) for one in (encoder, dit))
    for kind, held in (("ddp", experts * whole), ("fsdp", text)):
        wanted = 8 * (4 * plan.WAN21_VAE.parameters + held + 1e9)
        out = printed(capsys, preset, "--method", "sample", "--gpus", 8, "--parallel", kind)
        assert f"host memory of a node {wanted / 1e9:13.2f} GB" in out
    training = costs(plan.GENERATORS[preset], gpus=8, parallel="ddp", offload_activations=True)
    waiting = training["waiting_weights"] + training["offloaded"]
    assert training["host"] == 8 * (4 * 6 * 5120 ** 2 + waiting + 1e9)


@pytest.mark.parametrize("size, rank", [("832*480", 0), ("64*64", 4)])
def test_the_reward_model_of_rwr_goes_before_the_first_update(size, rank):
    """Its samples need it beside the generator, but nothing of AdamW."""
    config = PRESETS["wan2.1-t2v-14b"] | dict(num_layers=2)
    how = dict(size=size, lora_rank=rank)
    found, sft = costs(config, method="rwr", **how), costs(config, method="sft", **how)
    assert found["static"] == sft["static"] and found["reward_weights"] > 0
    with FakeTensorMode(), torch.no_grad(), LiveBytes() as live:
        dit, reward = build(config), pavrm.PAVRM(config).freeze()
        lora.add(dit, rank)
        for one in (dit, reward.trunk):
            parallel.cast_matrices(one, torch.bfloat16)
        args = inputs(config, (found["f"], found["h"], found["w"]))
        live.peak = live.now
        with torch.autocast("cpu", torch.bfloat16):
            dit(**args)
    if rank:                                                    # the highest point: a small clip needs little
        assert found["with"]["worst"] == "samples"
        assert found["with"]["peak"] == pytest.approx(live.peak, rel=0.06)
    else:
        assert live.peak < found["with"]["peak"] == sft["with"]["peak"]


# ---- one round
@pytest.mark.parametrize("vae_counted, vae_config", VAES, ids=["wan2.1", "ti2v"])
@pytest.mark.parametrize("frames, size", [(1, "64*96"), (9, "64*96")])
def test_the_encoder_computes_what_diffusers_does(frames, size, vae_counted, vae_config):
    diffusers = pytest.importorskip("diffusers", reason="Wan's VAEs are taken from diffusers")
    f, h, w = plan.latent_grid(frames, size, vae_counted.space)
    with FakeTensorMode(), FlopCounterMode(display=False) as flops, torch.no_grad():
        diffusers.AutoencoderKLWan(**vae_config).encode(torch.randn(1, 3, frames, 96, 64))
    assert plan.encoder_flops(f, h, w, vae_counted) == pytest.approx(flops.get_total_flops(), rel=0.02)


def test_disk_is_that_of_the_files(tmp_path, monkeypatch):
    """Checkpoints and shards of a small model, written as the scripts do."""
    config = model.PRESETS["tiny-t2v"]
    found = plan.way(plan.Config("tiny-t2v", frames=9, size="32*32", depth=4, clips=3), config)
    size = lambda folder: sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    for name, trained in (("1", pavrm.PAVRM(config | dict(num_layers=4))), ("2", model.VideoDiT(**config))):
        groups = trained.parameter_groups(1e-4,
                                          1e-4) if name == "1" else [{"params": list(trained.parameters())}]
        optimizer = torch.optim.AdamW(groups)
        for p in (p for group in groups for p in group["params"]):
            p.grad = torch.zeros_like(p)
        optimizer.step()
        (tmp_path / name).mkdir()
        write = lambda path: weights.save_module(trained, path)
        parallel.save_checkpoint(tmp_path / name, 1, {"weights": write}, trained, optimizer,
                                 train_align.Config())
        assert size(tmp_path / name) == pytest.approx(found["checkpoint" + name], rel=0.01)
    run, put, sizes = tmp_path / "run", validation.disk.put, {}
    measured = lambda new, path: sizes.update({path: size(run)}) or put(new, path)
    monkeypatch.setattr(validation.disk, "put", measured)
    for _ in range(2):                                          # the second best/ replaces the first
        run.mkdir(exist_ok=True)
        validation.save_best(run, write, {})
    assert sizes[run / "best"] == pytest.approx(found["best"], rel=0.01)
    parts = ("shards", "disk1", "disk1", "disk2", "adapters", "best", "export")
    assert found["disk"] == sum(found[part] for part in parts)
    assert found["peak2"] == found["stage2"]["with"]["peak"] + found["stage2"]["reward_weights"]
    data.write_shards(tmp_path / "shards", torch.zeros(3, 16, 3, 4, 4),
                      torch.zeros(3, config["text_len"], config["text_dim"]), [0, 1, None], ["a"] * 3)
    assert (tmp_path / "shards/shard-00000.safetensors").stat().st_size == pytest.approx(
        found["shards"], abs=1000)                               # its header
    own = plan.Config("tiny-t2v", "rwr", frames=9, size="32*32", depth=4, num_samples=3)
    assert plan.costs(own, config)["own_samples"] == found["shards"]


def test_what_the_scripts_do_by_default():
    one, reward, align = plan.Config("tiny-t2v"), train_reward.Config(), train_align.Config()
    fill_in(align, training_defaults(model.PRESETS["tiny-t2v"], "align"))
    assert (one.reward_steps, plan.REWARD_EVERY) == (reward.max_train_steps, reward.checkpointing_steps)
    assert (one.max_train_steps, plan.ALIGN_EVERY) == (align.max_train_steps, align.checkpointing_steps)
    assert reward.validation_steps == plan.REWARD_EVERY
    assert inspect.signature(parallel.save_checkpoint).parameters["keep"].default == plan.KEPT


def scale_page():
    """docs/scale.md: (the planner's words for the lines it shows, [those for its table's columns], its
    text)."""
    text = (ROOT / "docs" / "scale.md").read_text()
    found = [words.split() for words in re.findall(r"python -m scale.plan (wan[^`(\n]+)", text)]
    return found[0], [words for words in found if "--clips" in words], text


def test_docs_say_what_is_printed_today(capsys):
    shown, columns, text = scale_page()
    lines = text.split("$ python -m scale.plan")[1].split("```")[0].splitlines()[1:]
    out = printed(capsys, *shown).splitlines()
    assert len(lines) > 8 and [line for line in lines if line not in out] == []
    assert len(columns) == 2
    found = [re.findall(r"^  \S.*? {2,}([\d,.]+ (?:GB|h))  ",
                        printed(capsys, *flags).split("one round")[1], re.M)
             for flags in columns]
    table = re.findall(r"^\| [^|]* \| ([^|]* (?:GB|h)) \| ([^|]* (?:GB|h)) \|$", text, re.M)
    assert len(table) == 13 and table == list(zip(*found))


def test_docs_say_what_sampling_takes():
    """A step with guidance is two passes. In a validation of eight prompts each of eight GPUs makes a video.
    """
    text, one, rows = " ".join(scale_page()[2].split()), plan.Config("tiny-t2v"), []
    for preset, gpus, steps in (("wan2.1-t2v-1.3b", 1, 40), ("wan2.1-t2v-14b", 8, 40),
                                ("wan2.2-ti2v-5b", 2, 50), ("wan2.2-a14b", 8, 40)):
        c = plan.GENERATORS[preset]
        used = sampling_defaults(c)
        assert used["num_inference_steps"] == steps and used["guidance_scale"] > 1
        found = costs(c, method="sample", num_inference_steps=steps)
        flops = plan.decoder_costs(found["f"], found["h"], found["w"], vae=plan.vae_of(c))["flops"]
        seconds, decoding = 2 * found["seconds"], flops / (one.mfu * one.fp32_tflops * 1e12)
        hours = (videos * (seconds + decoding) / gpus / 3600 for videos in (650, 200))
        rows.append([f"{seconds:.0f} s", f"{decoding:.0f} s", *(f"{x:.1f} h" for x in hours)])
    names = "steps of a video, with guidance", "decoding a video", "`sample.py`, 650 videos", \
        "`evaluate.py`, 200 videos"
    for name, cells in zip(names, zip(*rows)):
        assert f"| {name} | {' | '.join(cells)} |" in text
    large = PRESETS["wan2.1-t2v-14b"]
    validation_seconds = 2 * costs(large, method="sample")["seconds"]
    between = lambda n: n * costs(large, gpus=8, recipe="steady")["seconds"]
    share = lambda n: f"{100 * validation_seconds / (validation_seconds + between(n)):.0f} %"
    assert train_align.Config().validation_steps == 40
    assert (f"a validation of eight prompts take {validation_seconds:.0f} s. The 40 iterations between two "
            f"validations of the default take {between(40):,.0f} s, so validation is {share(40)} of the "
            "time. The 20 iterations of the walk's `--validation_steps 20` take "
            f"{between(20):,.0f} s, so there it is {share(20)}.") in text


def test_docs_commands_are_the_ones_planned():
    """What the planner takes for granted of the walk's commands is what they do by default, or say."""
    walk = (ROOT / "docs" / "your_model.md").read_text()
    config = PRESETS["wan2.1-t2v-14b"] | {"image_dim": None}
    one = plan.settle(plan.Config("wan2.1-t2v-14b"), config)
    reward, align = training_defaults(config, "reward"), training_defaults(config, "align")
    assert (one.depth, one.reward_batch_size) == (train_reward.Config().depth, reward["batch_size"])
    assert (one.batch_size, one.num_inference_steps) == (align["batch_size"], align["num_inference_steps"])
    assert f"--max_train_steps {one.max_train_steps}" in walk and "--gradient_checkpointing" in walk
    assert f'--size "{one.size}" --frames {one.frames} --fps 16' in walk
    assert one.holdout == 500 // 5                           # train_reward.py holds out a fifth of its videos


# ---- the paper
def test_table_4():
    """66.81 GB for PRFL, 55.47 GB for the first frame, out of memory for all; 1.42 and 1.49 times faster."""
    config = PRESETS["wan2.1-t2v-14b"]
    found = {name: costs(config, gpus=8, method=name.split()[0], frames_decoded=name.split()[-1])
             for name in ("prfl first", "refl first", "refl all")}
    assert found["prfl first"]["with"]["peak"] / 1e9 == pytest.approx(66.81, rel=0.15)
    assert 55.47 < found["refl first"]["with"]["peak"] / 1e9 < 80 < found["refl all"]["with"]["peak"] / 1e9
    work = {name: (one["iteration_flops"], one["iteration_flops"] - one["update_flops"])
            for name, one in found.items()}
    assert work["refl first"][0] / work["prfl first"][0] == pytest.approx(1.42, abs=0.05)
    assert work["refl first"][1] / work["prfl first"][1] == pytest.approx(1.49, abs=0.05)
    text = (ROOT / "results" / "plan.md").read_text()           # says the planner's figures as they are
    found |= {(ranks, recipe): costs(config, gpus=8, size="1280*720", sequence_parallel=ranks, recipe=recipe)
              for ranks in (1, 4, 8) for recipe in ("paper", "steady")}
    for one in found.values():
        assert f"{one['with']['peak'] / 1e9:.2f} GB" in text
    for ranks in (1, 4, 8):
        paper, steady = (f"{found[ranks, recipe]['seconds'] / found[ranks, recipe]['groups']:.1f} s"
                         for recipe in ("paper", "steady"))
        assert f"| {paper} | {steady} |" in text


# ---- what is printed
def printed(capsys, *flags):
    common.cli(lambda config: plan.report(config, plan.GENERATORS[config.preset]), plan.Config, plan.__doc__,
               [str(flag) for flag in flags])
    return capsys.readouterr().out


@pytest.mark.parametrize("flags", [
    ("wan2.1-t2v-14b", "--gpus", 8), ("wan2.1-i2v-14b", "--gpus", 8, "--parallel", "ddp",
                                      "--no-gradient_checkpointing"),
    ("wan2.1-t2v-1.3b", "--method", "refl", "--frames_decoded", "all"),
    ("tiny-i2v", "--method", "rwr", "--size", "32*32"),
    ("wan2.1-t2v-14b", "--method", "reward", "--batch_size", 2, "--gpus", 8),
    ("wan2.1-t2v-1.3b", "--size", "832x480"),
    ("wan2.1-i2v-14b", "--clips", 500, "--lora_rank", 8), ("wan2.1-t2v-14b", "--method", "sft", "--lora_rank",
                                                           16),
    ("wan2.1-t2v-14b", "--lora_rank", 16, "--gpus", 2), ("wan2.1-t2v-14b", "--gpus", 8, "--nodes", 2,
                                                         "--recipe", "steady"),
    ("wan2.1-i2v-14b", "--gpus", 8, "--sequence_parallel", 4, "--size", "1280*720"),
    ("wan2.1-t2v-1.3b", "--gpus", 4, "--sequence_parallel", 4, "--method", "refl"),
    ("wan2.1-t2v-1.3b", "--method", "sample"), ("wan2.2-a14b", "--method", "sample"),
    ("wan2.2-a14b", "--gpus", 8, "--expert", "both"), ("wan2.2-a14b", "--lora_rank", 8, "--clips", 9),
    ("wan2.1-t2v-14b", "--gpus", 8, "--nodes", 2, "--fsdp_group_size", 8, "--offload_activations")])
def test_printed_sums_add_up(capsys, flags):
    """Peak = what stays + the largest moment, and both are printed."""
    out = printed(capsys, *flags)
    stays = float(re.search(r"together +([\d.]+) GB", out)[1])
    for part in out.split("\npeak ")[1:]:
        part = part.split("\n\n")[0]
        *moments, peak = (float(x) for x in re.findall(r"  ([\d.]+) GB", part))
        assert peak == pytest.approx(stays + max(moments), abs=0.02)
    for edge, formula in re.findall(r"input of a block +([\d.]+) GB  4 b [nm] d = ([\dx ]+)", out):
        assert float(edge) == pytest.approx(eval(formula.replace("x", "*")) / 1e9, abs=0.006)
    assert max(map(len, out.splitlines())) < 150


def test_seconds_follow_the_flops(capsys):
    a, b = costs(WAN, mfu=0.4, tflops=989.0), costs(WAN, mfu=0.2, tflops=100.0)
    assert b["seconds"] / a["seconds"] == pytest.approx(2 * 9.89)
    assert a["seconds"] == a["iteration_flops"] / (0.4 * 989e12)
    double = costs(WAN, num_inference_steps=80)
    assert double["rollout_steps"] == 39.5 and a["rollout_steps"] == 19.5


@pytest.mark.parametrize("flags, words", [
    (("wan2.1-t2v-13b",), "wan2.1-t2v-14b"), (("tiny-t2v", "--size", "830*480"), "--size 830*480"),
    (("tiny-t2v", "--size", "big"), "--size"), (("tiny-t2v", "--frames", 80), "--frames 80"),
    (("tiny-t2v", "--depth", 9), "--depth"), (("tiny-t2v", "--mfu", 1.5), "--mfu"),
    (("tiny-t2v", "--gpus", 0), "--gpus"),
    (("wan2.2-ti2v-5b", "--expert", "low"),
     "--expert means nothing with preset wan2.2-ti2v-5b: leave it out"),
    (("tiny-t2v", "--method", "ppo"), "method"), ((), "preset"),
    (("tiny-t2v", "--size", "0x0"), "--size 0x0"),
    (("tiny-t2v", "--method", "sft", "--depth", 2), "--depth means nothing with --method sft"),
    (("tiny-t2v", "--num_samples", 5), "--num_samples means nothing with --method prfl"),
    (("tiny-t2v", "--method", "rwr", "--clips", 5), "--clips means nothing with --method rwr"),
    (("tiny-t2v", "--holdout", 5), "--holdout means nothing without --clips"),
    (("tiny-t2v", "--gpus", 4, "--sequence_parallel", 4), "must divide 4 GPUs and 6 heads: choose one of 1, "
                                                          "2"),
    (("tiny-t2v", "--gpus", 4, "--fsdp_group_size", 3), "--fsdp_group_size 3 must divide 4 GPUs"),
    (("tiny-t2v", "--no-gradient_checkpointing", "--offload_activations"),
     "--offload_activations moves what"),
    (("tiny-t2v", "--method", "sft", "--recipe", "steady"), "--recipe means nothing with --method sft")])
def test_bad_input_is_one_line(capsys, flags, words):
    with pytest.raises(SystemExit) as end:
        printed(capsys, *flags)
    lines = capsys.readouterr().err.strip().splitlines()
    assert end.value.code == 2 and len(lines) == 1 and words in lines[0]


def test_the_planner_runs_as_a_module():
    done = launch.python("-m", "scale.plan", "tiny-t2v", "--size", "32*32")
    assert done.returncode == 0 and "video tokens n" in done.stdout, done.stderr
