"""LoRA files: diffusers' names, or those that ComfyUI and the official repository's tools read.

    diffusers   transformer.blocks.0.attn1.to_q.lora_A.weight
    wan         diffusion_model.blocks.0.self_attn.q.lora_A.weight
Read are also files with lora_down, lora_up and alpha, and lora_unet_blocks_0_self_attn_q. Written is scale 1: alpha / r is
multiplied into B, so that every reader finds the same weights.

Axes: d d' widths of a layer, r rank.
"""
import re
from pathlib import Path

from safetensors import SafetensorError, safe_open

from common import InputError
from formats import disk
from formats.weights import diffusers_name, stream_tensors

FILE = "pytorch_lora_weights.safetensors"
LAYOUTS = ("diffusers", "wan")
LAYERS = (*(f"{kind}_attn.{x}" for kind in ("self", "cross") for x in "qkvo"),
          "cross_attn.k_img", "cross_attn.v_img", "ffn.0", "ffn.2")     # of a block
SPELLED = {spelling: layer for layer in LAYERS
           for spelling in (layer, diffusers_name(f"{layer}.")[:-1], layer.replace(".", "_"))}
ENDS = {"lora_A.weight": "A", "lora_down.weight": "A", "lora_B.weight": "B", "lora_up.weight": "B", "alpha": "alpha"}


def read_adapters(path):
    """{name of our layer: (A [r, d], B [d', r])} in float32, scale 1. Raises InputError naming the file and the weight."""
    parts = {}
    try:
        with safe_open(path, "pt") as file:
            for name in file.keys():
                end = next((end for end in ENDS if name.endswith(f".{end}")), "")
                layer = re.fullmatch(r"(?:transformer\.|diffusion_model\.|lora_unet_)?blocks[._](\d+)[._](.+)",
                                     name.removesuffix(f".{end}"))
                if not end or not layer or layer[2] not in SPELLED:
                    raise InputError(f"{path}: {name} is no adapter of a Wan2.1 transformer's block")
                parts.setdefault(f"blocks.{layer[1]}.{SPELLED[layer[2]]}", {})[ENDS[end]] = file.get_tensor(name).float()
    except (FileNotFoundError, IsADirectoryError):
        raise InputError(f"{path}: there is no such file; give a .safetensors with LoRA weights") from None
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: is not a whole safetensors file: {' '.join(str(error).split())}") from None
    found = {}
    for layer, part in parts.items():
        A, B = part.get("A"), part.get("B")
        if A is None or B is None or A.ndim != 2 or B.ndim != 2 or len(A) != B.shape[1]:
            raise InputError(f"{path}: A and B of {layer} are not there or do not fit each other")
        found[layer] = A, B * float(part.get("alpha", len(A))) / len(A)
    if not found:
        raise InputError(f"{path}: holds no adapters")
    return found


def write_adapters(path, adapters, layout="diffusers"):
    """Writes {name of our layer: (A [r, d], B [d', r])}, whole or not at all."""
    spell = {"diffusers": lambda layer: diffusers_name(f"transformer.{layer}."), "wan": "diffusion_model.{}.".format}[layout]
    tensors = {}
    for layer, (A, B) in adapters.items():
        tensors |= {f"{spell(layer)}lora_A.weight": A.contiguous(), f"{spell(layer)}lora_B.weight": B.contiguous()}
    temporary = Path(f"{path}.tmp")
    stream_tensors(tensors, temporary)
    disk.put(temporary, path)
