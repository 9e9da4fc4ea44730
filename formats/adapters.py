"""LoRA files, in the spellings of several trainers: which layer each weight changes, and by how much.

We write diffusers' names, or those that ComfyUI and the official repository's tools read:

    diffusers   transformer.blocks.0.attn1.to_q.lora_A.weight
    wan         diffusion_model.blocks.0.self_attn.q.lora_A.weight

We also read files with lora_down, lora_up and alpha, names joined by underscores
(lora_unet_blocks_0_self_attn_q, and VideoX-Fun's lora_unet__blocks_0_self_attn_q), and peft's own
(base_model.model.blocks.0...).

A layer changes by scale * B A. Other programs say the scale in one of two ways, and we read the first one
that is there: a tensor `alpha` beside A and B, or the settings of peft's LoraConfig, which diffusers puts
into the file's header and peft into adapter_config.json beside the file. Without either the scale is 1. What
we write has scale 1, because alpha / r is multiplied into B, so that every reader finds the same weights.

Axes: d d' widths of a layer, r rank.
"""
import re
from pathlib import Path

from safetensors import SafetensorError, safe_open

from common import InputError
from formats import disk
from formats.metadata import from_json
from formats.weights import diffusers_name, stream_tensors

FILE = "pytorch_lora_weights.safetensors"
# The files of adapters, beside a transformer's folder. The second file is for the low-noise one of two
# experts. Both files have the same names of weights, so for the second one diffusers needs
# load_into_transformer_2=True.
FILES = {"transformer": FILE, "transformer_2": "pytorch_lora_weights_2.safetensors"}
LAYOUTS = ("diffusers", "wan")
LAYERS = ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o",
          "cross_attn.q", "cross_attn.k", "cross_attn.v", "cross_attn.o", "cross_attn.k_img",
          "cross_attn.v_img",
          "ffn.0", "ffn.2")                                     # layers of a block that adapters can change
PREFIXES = ("base_model.model.", "transformer.", "diffusion_model.", "lora_unet__", "lora_unet_")
ENDS = {"lora_A.weight": "A", "lora_down.weight": "A", "lora_A.default.weight": "A",
        "lora_B.weight": "B", "lora_up.weight": "B", "lora_B.default.weight": "B", "alpha": "alpha"}
HEADER, BESIDE = "lora_adapter_metadata", "adapter_config.json"         # where peft's settings are


def diffusers_layer(layer):
    """blocks.0.self_attn.q -> blocks.0.attn1.to_q"""
    return diffusers_name(f"{layer}.")[:-1]


def spellings():
    """{a layer's name in a block, as any trainer spells it: our name}"""
    found = {}
    for layer in LAYERS:
        for spelling in (layer, diffusers_layer(layer), layer.replace(".", "_")):
            found[spelling] = layer
    return found


SPELLED = spellings()


def parse_name(name):
    """A weight's name in a LoRA file -> (our layer, such as blocks.0.self_attn.q, and "A", "B" or "alpha"),
    or None."""
    for prefix in PREFIXES:
        name = name.removeprefix(prefix)
    for end, part in ENDS.items():
        if name.endswith(f".{end}"):
            block = re.fullmatch(r"blocks[._](\d+)[._](.+)", name.removesuffix(f".{end}"))
            if block and block[2] in SPELLED:
                return f"blocks.{block[1]}.{SPELLED[block[2]]}", part
    return None


def read_adapters(path):
    """Reads a LoRA file -> {name of our layer: (A [r, d], B [d', r])} in float32, with the scale multiplied
    into B. Raises InputError, which names the file and the weight."""
    parts = {}
    try:
        with safe_open(path, "pt") as file:
            settings = read_settings(path, file.metadata() or {})
            for name in file.keys():
                known = parse_name(name)
                if known is None:
                    raise InputError(f"{path}: {name} is no adapter of a Wan2.1 transformer's block")
                layer, part = known
                parts.setdefault(layer, {})[part] = file.get_tensor(name).float()
    except (FileNotFoundError, IsADirectoryError):
        raise InputError(f"{path}: there is no such file; give a .safetensors with LoRA weights") from None
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: is not a whole safetensors file: {' '.join(str(error).split())}") from None
    found = {}
    for layer, part in parts.items():
        A, B = part.get("A"), part.get("B")
        if A is None or B is None or A.ndim != 2 or B.ndim != 2 or len(A) != B.shape[1]:
            raise InputError(f"{path}: A and B of {layer} are not there or do not fit each other")
        if "alpha" in part:
            scale = float(part["alpha"]) / len(A)
        else:
            scale = scale_of(settings, layer, len(A))
        found[layer] = A, B * scale
    if not found:
        raise InputError(f"{path}: holds no adapters")
    return found


# ---- the scale in peft's settings
def read_settings(path, header):
    """The settings of peft's LoraConfig in a file's header, or in adapter_config.json beside it; {} if there
    are none. Raises InputError if they cannot be read, because a guessed scale would make another adapter."""
    place, text = f"{path}: {HEADER} in its header", header.get(HEADER)
    beside = Path(path).parent / BESIDE
    if text is None and Path(path).name.startswith("adapter_model") and beside.is_file():
        place, text = str(beside), beside.read_text()
    if text is None:
        return {}
    try:
        settings = from_json(text)
        # in the file of a pipeline, the name of a setting begins with the model that it is for
        settings = {name.removeprefix("transformer."): value for name, value in settings.items()}
        numbers = [settings.get("lora_alpha", 1)]
        for name in ("alpha_pattern", "rank_pattern"):
            settings[name] = dict(settings.get(name) or {})
            numbers += settings[name].values()
            for pattern in settings[name]:
                re.compile(pattern)
        if not all(type(x) in (int, float) and abs(x) < float("inf") for x in numbers):
            raise ValueError("lora_alpha and the patterns' values must be numbers")
    except (ValueError, TypeError, AttributeError, re.error) as error:
        raise InputError(f"{place}: these are no settings of a LoRA: {error}") from None
    return settings


def scale_of(settings, layer, r):
    """The scale of a layer by peft's settings: alpha / r, or alpha / sqrt(r) with use_rslora, or 1 if there
    are no settings."""
    if not settings:
        return 1.0
    alpha, name = settings.get("lora_alpha", 8), diffusers_layer(layer)  # 8 is peft's default
    for pattern, value in settings["alpha_pattern"].items():
        if re.match(rf"(.*\.)?({pattern})$", name):            # peft's rule: the first that matches
            alpha = value
            break
    return alpha / (r ** 0.5 if settings.get("use_rslora") else r)


def write_adapters(path, adapters, layout="diffusers"):
    """Writes adapters {name of our layer: (A [r, d], B [d', r])} to the file `path`, whole or not at all."""
    tensors = {}
    for layer, (A, B) in adapters.items():
        name = f"diffusion_model.{layer}"
        if layout == "diffusers":
            name = f"transformer.{diffusers_layer(layer)}"
        tensors |= {f"{name}.lora_A.weight": A.contiguous(), f"{name}.lora_B.weight": B.contiguous()}
    temporary = Path(f"{path}.tmp")
    stream_tensors(tensors, temporary)
    disk.put(temporary, path)


def share_kept(merged, adapters, dtype):
    """The share of what adapters add to the weights that is still there when the merged weights are stored in
    dtype.

    merged: {name: weight} with the adapters in it. adapters: what `read_adapters` returned. The share is the
    sum of (stored - base) * (B A), divided by the sum of (B A)^2: the part of the change that points in the
    direction of B A. base is the weight without adapters, in dtype.
    """
    along = total = 0.0
    for layer, (A, B) in adapters.items():
        W, added = merged[f"{layer}.weight"].float(), (B @ A).float()
        base = (W - added).to(dtype).float()
        along += ((W.to(dtype).float() - base) * added).sum().item()
        total += added.square().sum().item()
    return along / total if total else 1.0
