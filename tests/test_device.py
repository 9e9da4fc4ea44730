"""Would it run on a GPU? Weights and inputs are on another device than the default one. Here that is `meta`,
which holds no data, but every operation checks what meets what: a tensor that was left on the CPU fails.
And which dtypes would a GPU's autocast see?"""
import contextlib
import json

import pytest
import torch
from tiny import command, generator, run
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import common
import flow
import model
import prfl
from common import Runtime
from pavrm import CRITERIA, PAVRM
from scale.simulate import gpu_attend

META, autocast = torch.device("meta"), torch.autocast
COPIES = ("aten::_to_copy", "aten::copy_", "aten::set_", "aten::empty_like", "aten::zeros_like",
          "aten::_foreach_copy_")


class OtherDevice(TorchDispatchMode):
    """Tensors with data and tensors on meta meet only in copies; what is read back from meta is all ones."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, func._schema.name
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        places = {x.device.type for x in tensors if x.dim()}
        assert len(places) < 2 or name in COPIES, f"{name} of tensors on {places}"
        away = bool(tensors) and tensors[0].is_meta
        if name == "aten::_local_scalar_dense" and away:
            return True if args[0].dtype == torch.bool else 1
        if name == "aten::_to_copy" and away and torch.device(kwargs.get("device") or META).type == "cpu":
            return torch.ones(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        if name == "aten::nonzero" and away:                    # all of them are
            return torch.empty(args[0].numel(), args[0].dim(), dtype=torch.long, device=META)
        if name == "aten::index" and away:                      # a mask takes all
            args = args[0], [i if i is None or i.dtype != torch.bool else
                             torch.empty(i.numel(), dtype=torch.long, device=META) for i in args[1]]
        if name == "aten::copy_" and tensors[-1].is_meta and not away:
            return args[0].fill_(1)
        return func(*args, **kwargs)


@pytest.fixture
def other_device(monkeypatch, cpu):
    """The scripts find another device than the CPU."""
    def setup(precision="no", seed=0, shared=1):
        torch.manual_seed(seed)
        return Runtime(0, 1, META, torch.float32, shared)

    def autocast_elsewhere(kind, *args, **kwargs):
        return contextlib.nullcontext() if kind == "meta" else autocast(kind, *args, **kwargs)

    def formatted(x, how):
        return format(x.item(), how) if x.is_meta else written(x, how)

    written = torch.Tensor.__format__
    monkeypatch.setattr(common, "setup", setup)
    monkeypatch.setattr(torch, "autocast", autocast_elsewhere)
    monkeypatch.setattr(torch.Tensor, "__format__", formatted)
    with OtherDevice():
        yield


def test_the_check_finds_what_was_left_behind(other_device):
    there, here = torch.zeros(3, device=META), torch.zeros(3)
    for mistake in (lambda: there + here, lambda: there[here.long()],
                    lambda: torch.nn.functional.linear(there, here[None])):
        with pytest.raises((AssertionError, RuntimeError)):
            mistake()
    assert (there + 1).is_meta and not there.cpu().is_meta and there.sum().item() == 1


ALIGN = ["--num_validation", "2", "--validation_steps", "2"]


@pytest.mark.parametrize("name, more", [
    ("sft", ALIGN), ("steady", ALIGN), ("refl", []),
    ("refl", ["--frames_decoded", "all", "--decoder_checkpointing", "--recipe", "steady"]), ("rwr", []),
    ("steady", ["--lora_rank", "2", "--context_dropout", "0.5", "--reward_loss", "sigmoid_hinge",
                "--gradient_checkpointing"]),
    ("prfl", ["--gradient_checkpointing", "--offload_activations", "--gradient_accumulation_steps", "2"]),
    ("nft", []), ("grpo", ["--lora_rank", "2"]),
    ("reward", []), ("reward", ["--loss", "bt", "--pooling", "max", "--trunk_learning_rate", "0"]),
    ("reward_rgb", [])])
def test_scripts_train_save_and_go_on(folder, other_device, monkeypatch, name, more):
    """Losses, updates, validation, checkpoints, and a run that goes on from one."""
    output = f"run-{name}-{len(more)}{more[0] if more else ''}"
    run(*command(folder, name, output, *more, "--max_train_steps", "1"))
    run(*command(folder, name, output, *more, "--max_train_steps", "2", "--resume", "latest"))
    rows = [json.loads(line) for line in (folder / output / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["step"]] == [1, 2]
    assert (folder / output / "checkpoint-000002").is_dir()


def test_samplers(other_device):
    """Guidance, image-to-video, and best of n."""
    dit = generator(model_type="i2v", in_dim=36, image_dim=8).to(META)
    context, y, clip_tokens = (torch.zeros(3, *shape, device=META)
                               for shape in ((3, 8), (20, 2, 4, 4), (5, 8)))
    x = flow.sample(dit, (16, 2, 4, 4), context, 0, [0, 1, 2], 4, shift=3.0, guidance_scale=5.0,
                    batch_size=2, y=y, clip_tokens=clip_tokens)
    assert x.is_meta and x.shape == (3, 16, 2, 4, 4)


# ---- dtypes
# What a GPU's autocast widens to float32.
WIDENED = ("native_layer_norm", "linalg_vector_norm", "pow", "rsqrt", "exp", "log", "softplus", "sum",
           "mse_loss", "_softmax", "reciprocal", "binary_cross_entropy_with_logits", "prod", "cumsum", "norm")
ATTENTION = "_scaled_dot_product_flash_attention_for_cpu"


class Dtypes(TorchDispatchMode):
    """`seen`: {operation: the dtypes of floating-point tensors that it has been given}"""

    def __init__(self):
        super().__init__()
        self.seen = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = {x.dtype for x in tree_leaves(args) if isinstance(x, torch.Tensor) and x.is_floating_point()}
        self.seen.setdefault(func._schema.name.removeprefix("aten::"), set()).update(found)
        return func(*args, **kwargs or {})


def test_dtypes_of_a_gpus_autocast(monkeypatch):
    """Matrices and attention are in bfloat16. What a GPU's autocast would widen, and a CPU's does not, is in
    float32 already."""
    monkeypatch.setattr(model, "attend", gpu_attend)
    dit = generator()
    judge = PAVRM.from_generator(dit, 1).freeze()
    g = torch.Generator().manual_seed(0)
    x, x1, context = (torch.randn(3, *shape, generator=g) for shape in ((16, 2, 4, 4), (16, 2, 4, 4), (3, 8)))
    with Dtypes() as dtypes, torch.autocast("cpu", torch.bfloat16):
        losses = [prfl.sft_loss(dit, x, x1, torch.tensor([0.1, 0.5, 1]), context)]
        losses += [prfl.reward_update_loss(dit, judge, x1, context, 2, 4, loss=loss)[0]
                   for loss in prfl.REWARD_LOSSES]
        losses += [loss(judge(x, torch.rand(3), context), torch.tensor([0, 1, 1]))
                   for loss in CRITERIA.values()]
    bf16, f32 = torch.bfloat16, torch.float32
    assert all(loss.dtype == f32 for loss in losses)
    assert dtypes.seen[ATTENTION] == {bf16}
    for name in dtypes.seen.keys() & set(WIDENED):
        assert dtypes.seen[name] <= {f32, torch.float64}, name
    assert {"native_layer_norm", "linalg_vector_norm", "rsqrt"} <= dtypes.seen.keys()
    assert dtypes.seen["addmm"] == {bf16, f32}                  # times and the head, where it is off too
