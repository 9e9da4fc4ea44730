"""LoRA: y = W x + b + alpha / r * B A x, with W and b frozen, on q, k, v, o of every attention of the policy.

A [r, d] starts random and B [d, r] at zero, so training starts at the base model. Or both start from a file,
on the layers that the file names. Only A and B have gradients and optimizer state. formats/adapters.py has
the files. `merge` gives plain weights again.

Axes: d model width, r rank.
"""
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from common import InputError, arg, random_generator, rank
from experts import Experts
from formats.adapters import FILE, FILES, read_adapters, write_adapters
from formats.weights import EXPERTS, Later, full_tensor
from model import export_transformer


@dataclass
class Flags:
    """Flags of train_align.py for adapters."""
    lora_rank: int = arg(0, "train adapters of this rank (such as 16) beside the frozen q, k, v, o of each "
                         "attention; they often take 10 times the learning rate. 0 trains all weights",
                         at_least=0)
    lora_alpha: float | None = arg(None, "adapters are multiplied by lora_alpha / lora_rank; default: "
                                   "lora_rank, so that the factor is 1", above=0, only="lora_rank")
    lora: str | None = arg(None, "LoRA file whose adapters training starts from; for two experts, the file "
                           "of the high-noise one")
    lora_2: str | None = arg(None, "for a generator of two experts (Wan2.2 A14B): LoRA file whose adapters "
                             "training of the low-noise one starts from")
    export: str = arg("merged", "what a run with adapters writes: merged: the merged weights and the "
                      "adapters; lora: the adapters only", choices=("merged", "lora"))


class LoRALinear(nn.Module):
    """A frozen nn.Linear, whose weights keep their names, with A and B beside it."""

    def __init__(self, linear, r, scale):
        super().__init__()
        self.weight, self.bias, self.scale = linear.weight, linear.bias, scale
        self.lora_A = nn.Linear(linear.in_features, r, bias=False)
        self.lora_B = nn.Linear(r, linear.out_features, bias=False)

    def forward(self, x):
        return F.linear(x, self.weight, self.bias) + self.scale * self.lora_B(self.lora_A(x))


def read_for(dit, path):
    """Reads adapters that fit a VideoDiT (`read_adapters`). Raises InputError if they are of another
    model."""
    adapters, shapes = read_adapters(path), {name: tuple(p.shape) for name, p in dit.named_parameters()}
    for layer, (A, B) in adapters.items():
        if shapes.get(f"{layer}.weight") != (len(B), A.shape[1]):
            raise InputError(f"{path}: its adapters are of another model: {layer} changes a weight of "
                             f"{[len(B), A.shape[1]]}, this one has "
                             f"{list(shapes.get(f'{layer}.weight', []))}")
    return adapters


def add(dit, lora_rank, alpha=None, seed=0, path=None):
    """Freezes a VideoDiT, in place, and gives its attentions adapters that train. With lora_rank 0 and no
    path it changes nothing.

    alpha None: equal to lora_rank, so that the scale is 1. path: a LoRA file whose adapters training starts
    from, with the file's rank. Call this before parallel.shard. Raises InputError on an alpha without a rank,
    a rank that is not the file's, or a file of another model.
    """
    start = read_for(dit, path) if path else {}
    if not lora_rank and not start:
        if alpha:
            raise InputError("--lora_alpha scales adapters: give --lora_rank too, or leave it out")
        return
    if wrong := [len(A) for A, _ in start.values() if lora_rank and len(A) != lora_rank]:
        raise InputError(f"--lora_rank {lora_rank}: the adapters in {path} have rank {wrong[0]}; leave it "
                         "out "
                         "to go on from them")
    dit.requires_grad_(False)
    draws = random_generator(seed, "lora")
    for layer in start or [f"blocks.{i}.{kind}_attn.{x}" for i in range(len(dit.blocks))
                           for kind in ("self", "cross") for x in "qkvo"]:
        r = lora_rank or len(start[layer][0])
        adapted = LoRALinear(dit.get_submodule(layer), r, (alpha or r) / r)
        if start:
            A, B = start[layer]
            adapted.lora_A.weight.data, adapted.lora_B.weight.data = A, B / adapted.scale
        else:
            nn.init.kaiming_uniform_(adapted.lora_A.weight, a=5 ** 0.5, generator=draws)
            nn.init.zeros_(adapted.lora_B.weight)
        parent, name = layer.rsplit(".", 1)
        setattr(dit.get_submodule(parent), name, adapted)


def scaled(state, alpha):
    """The adapters in a VideoDiT's state_dict -> {name of the layer: (A, alpha / r * B)}, full tensors in
    float32."""
    found = {}
    for name, x in state.items():
        if name.endswith(".lora_A.weight"):
            A, B = full_tensor(x), full_tensor(state[name.replace("lora_A", "lora_B")])
            found[name.removesuffix(".lora_A.weight")] = A.float(), B.float() * ((alpha or len(A)) / len(A))
    return found


def merge(state, adapters):
    """-> the state_dict of a plain VideoDiT, with weights W + alpha / r * B A. Each of them is computed only
    when it is written. adapters: what `scaled` returned."""
    merged = {name: x for name, x in state.items() if ".lora_" not in name}
    for layer, (A, B) in adapters.items():
        W = merged[f"{layer}.weight"]
        # a frozen W that was cast is read from its file again, to the CPU, so it may have to go to A's device
        make = lambda W=W, A=A, B=B: full_tensor(W).to(A.device, torch.float32) + B @ A
        merged[f"{layer}.weight"] = Later(W.shape, torch.float32, make)
    return merged


def attach(dit, path):
    """Gives a VideoDiT the adapters in a LoRA file, in place, to sample with. Raises InputError if they do
    not fit.

    The adapters are not merged: what they add is often too small for a weight in bfloat16.
    """
    add(dit, 0, path=path)
    dit.requires_grad_(False)


def save(adapters, folder, layout="diffusers", file=FILE):
    """Writes the adapters that `scaled` returned to folder/file. If there are none, it writes nothing."""
    if adapters and rank() == 0:
        write_adapters(Path(folder) / file, {layer: (A.cpu(), B.cpu()) for layer, (A, B) in adapters.items()},
                       layout)


@torch.no_grad()
def export(dit, path, alpha=None, kind="merged"):
    """Writes the weights of `dit` to folder `path`, with adapters merged in, and the adapters by themselves
    to a file beside it. With kind "lora" it writes only that file. -> [the folder or file to read, of each
    VideoDiT that was written]. Every rank must call it; rank 0 writes.

    Of two Experts, those that train are written, each to a folder of its own name beside `path`.
    """
    if isinstance(dit, Experts):
        trained = dit.trained()
        wrote = [export_one(part, path.with_name(EXPERTS[name][0]), alpha, kind, dit.notes(name, trained))
                 for name, part in trained.items()]
    else:
        wrote = [export_one(dit, path, alpha, kind)]
    if rank() == 0 and path.is_dir() and not any(path.iterdir()):
        path.rmdir()                                            # weights that kind "lora" left out
    return wrote


def export_one(dit, path, alpha, kind, notes=None):
    """`export` of one VideoDiT; notes: as in model.export_transformer."""
    state, file = dit.state_dict(), FILES[path.name]
    for name, p in state.items():
        if dit.weight_files and p.dtype != torch.float32:       # it was cast: read the base's own weight
            state[name] = Later(p.shape, torch.float32, partial(dit.weight_files.tensor, name))
    adapters = scaled(state, alpha)
    save(adapters, path.parent, file=file)
    if kind == "lora":
        return path.parent / file
    export_transformer(dit, path, dtype=torch.float32, state=merge(state, adapters), notes=notes)
    return path
