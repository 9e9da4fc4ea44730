"""LoRA: y = W x + b + alpha / r * B A x, with W and b frozen, on q, k, v, o of every attention of the policy.

A [r, d] starts random and B [d, r] at zero, so training starts at the base model. Only A and B have
gradients and optimizer state. The file is what diffusers reads, `pipeline.load_lora_weights(output_dir)`;
alpha / r is multiplied into B there, so that every reader finds scale 1. `merge` gives plain weights again.

Axes: d model width, r rank.
"""
import os
from pathlib import Path

import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from common import InputError, generator
from formats.weights import diffusers_name

FILE = "pytorch_lora_weights.safetensors"


class LoRALinear(nn.Module):
    """A frozen nn.Linear, under its own names, and beside it A and B."""

    def __init__(self, linear, rank, scale):
        super().__init__()
        self.weight, self.bias, self.scale = linear.weight, linear.bias, scale
        self.lora_A = nn.Linear(linear.in_features, rank, bias=False)
        self.lora_B = nn.Linear(rank, linear.out_features, bias=False)

    def forward(self, x):
        return F.linear(x, self.weight, self.bias) + self.scale * self.lora_B(self.lora_A(x))


def add(dit, rank, alpha=None, seed=0):
    """Freezes a VideoDiT, in place, and gives its attentions adapters that train. rank 0: changes nothing.

    alpha None: as rank, scale 1. Call it before parallel.shard. Raises InputError on an alpha without a rank.
    """
    if not rank:
        if alpha:
            raise InputError("--lora_alpha scales adapters: give --lora_rank too, or leave it out")
        return
    dit.requires_grad_(False)
    draws = generator(seed, "lora")
    for block in dit.blocks:
        for attention in (block.self_attn, block.cross_attn):
            for name in ("q", "k", "v", "o"):
                layer = LoRALinear(getattr(attention, name), rank, (alpha or rank) / rank)
                nn.init.kaiming_uniform_(layer.lora_A.weight, a=5 ** 0.5, generator=draws)
                nn.init.zeros_(layer.lora_B.weight)
                setattr(attention, name, layer)


def scaled(state, alpha):
    """{name of the layer: (A, alpha / r * B)} of a VideoDiT's state_dict with adapters, in float32."""
    found = {}
    for name, A in state.items():
        if name.endswith(".lora_A.weight"):
            B = state[name.replace("lora_A", "lora_B")].float()
            found[name.removesuffix(".lora_A.weight")] = A.float(), B * ((alpha or len(A)) / len(A))
    return found


def merge(state, alpha=None):
    """The state_dict of a plain VideoDiT, W + alpha / r * B A; one that has no adapters stays as it is."""
    merged = {name: x for name, x in state.items() if ".lora_" not in name}
    for layer, (A, B) in scaled(state, alpha).items():
        W = merged[f"{layer}.weight"]
        merged[f"{layer}.weight"] = (W.float() + B @ A).to(W.dtype)
    return merged


def save(state, folder, alpha=None):
    """Writes the adapters of a state_dict, if it has any, as folder/pytorch_lora_weights.safetensors."""
    adapters = {}
    for layer, (A, B) in scaled(state, alpha).items():
        theirs = diffusers_name(f"transformer.{layer}.")
        adapters |= {f"{theirs}lora_A.weight": A.contiguous(), f"{theirs}lora_B.weight": B.contiguous()}
    if adapters:
        temporary = Path(folder) / f"{FILE}.tmp"
        save_file(adapters, temporary, {"format": "pt"})
        os.replace(temporary, Path(folder) / FILE)              # whole or not at all
