"""Reads Wan's own VAEs, text encoder and image encoder from folders of diffusers and transformers, and writes
an aligned transformer in the form that diffusers loads. Nobody needs this file to learn the method.

    pip install -r requirements-wan.txt
    python data.py encode clips --vae Wan2.1/vae --text_encoder Wan2.1/text_encoder ...
    python -m formats.wan runs/align/transformer --out aligned
    python -m formats.wan runs/align --out aligned          two experts: writes those that runs/align has
    python -m formats.wan runs/align/pytorch_lora_weights.safetensors --out comfyui.safetensors --layout wan
    >>> transformer = WanTransformer3DModel.from_pretrained("aligned", torch_dtype=torch.bfloat16)
    >>> pipeline = WanPipeline.from_pretrained("Wan2.1", transformer=transformer)

families.py calls these functions when the config.json of a folder is that of such a model.

Axes: b batch, c latent channels, F video frames (4k + 1), f latent frames (k + 1), H W pixels, h w latents,
l text tokens, d text width, m image tokens.
"""
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn

import common
from common import InputError, arg
from formats.adapters import FILE, FILES, LAYOUTS, read_adapters, share_kept, write_adapters
from formats.paths import require_writable
from formats.weights import EXPERTS, does_both, expert_folders, pipeline_of, require_fetched

TEXT_LEN = 512  # tokens of Wan2.1's context


def extra(path):
    """-> (diffusers, transformers), or InputError if requirements-wan.txt is not installed."""
    try:
        import diffusers
        import transformers
    except ImportError as error:
        raise InputError(f"{path}: needs {error.name}: pip install -r requirements-wan.txt") from None
    return diffusers, transformers


def load(cls, path, dtype, word="dtype"):
    """cls.from_pretrained(path) in eval mode, without gradients on its weights. Raises InputError if anything
    is missing, damaged or of another shape, while the libraries would fill in random weights."""
    try:
        model, info = cls.from_pretrained(str(path), output_loading_info=True, local_files_only=True,
                                          **{word: dtype})
    # libraries and versions differ: they raise OSError, ValueError, RuntimeError, SafetensorError, ...
    except Exception as error:
        require_fetched(path)
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"{path}: not a whole folder of {cls.__name__}: {reason}") from None
    wrong = [str(name) for kind in ("missing", "unexpected", "mismatched")
             for name in info.get(f"{kind}_keys") or ()]
    if wrong:
        raise InputError(f"{path}: missing, unexpected or misshapen weights of {cls.__name__}: "
                         f"{', '.join(sorted(wrong)[:4])}{', ...' * (len(wrong) > 4)}")
    return model.eval().requires_grad_(False)


def beside(path, files, sibling):
    """The folder that holds one of `files`: `path` itself or, as in a pipeline, `sibling` next to it; or
    None."""
    folders = (Path(path), Path(path).resolve().parent / sibling)
    return next((folder for folder in folders if any((folder / name).is_file() for name in files)), None)


class WanVAE(nn.Module):
    """diffusers' AutoencoderKLWan, Wan2.1's or Wan2.2 TI2V-5B's, in float32, with Wan's latents: (z - mean) /
    std per channel."""

    def __init__(self, path):
        super().__init__()
        diffusers, _ = extra(path)
        self.vae = load(diffusers.AutoencoderKLWan, path, torch.float32, "torch_dtype")
        self.past = None                                # the decoder looks back too far to decode in chunks
        self.channels, self.space = self.vae.config["z_dim"], self.vae.config["scale_factor_spatial"]
        for name in ("mean", "std"):
            values = torch.tensor(self.vae.config[f"latents_{name}"], dtype=torch.float32)
            self.register_buffer(name, values.view(-1, 1, 1, 1))                            # [c, 1, 1, 1]

    def encode(self, video):
        """video [b, 3, F, H, W] in [-1, 1] -> latents [b, c, f, h, w]: the posterior's mode, normalised."""
        return (self.vae.encode(video).latent_dist.mode() - self.mean) / self.std

    def decode(self, latents):
        """latents [b, c, f, h, w] -> video [b, 3, F, H, W], clamped to [-1, 1] by diffusers."""
        return self.vae.decode(latents * self.std + self.mean).sample


def load_tokenizer(path):
    """The tokenizer of the text encoder in folder `path`. It lies in the same folder or in tokenizer/ beside
    it. Raises InputError."""
    _, transformers = extra(path)
    folder = beside(path, ("tokenizer.json", "spiece.model", "tokenizer_config.json"), "tokenizer")
    if folder is None:
        raise InputError(f"{path}: there is no tokenizer in it, nor in tokenizer/ beside it")
    try:
        return transformers.AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # versions differ: OSError, ValueError, KeyError, JSONDecodeError, ...
        require_fetched(folder)
        raise InputError(f"{folder}: not a whole tokenizer: {' '.join(str(error).split())[:300]}") from None


def count_tokens(path, prompts):
    """[the number of tokens of each prompt, including those that the encoder in folder `path` would cut off].
    """
    tokenizer = load_tokenizer(path)
    from diffusers.pipelines.wan.pipeline_wan import prompt_clean
    return [len(tokenizer(prompt_clean(prompt)).input_ids) for prompt in prompts]


class WanTextEncoder(nn.Module):
    """transformers' UMT5EncoderModel and its tokenizer, which lies in the same folder or in tokenizer/ beside
    it. The model, of 5.7 billion parameters, is bfloat16 on CUDA, as Wan runs it, and float32 elsewhere."""

    def __init__(self, path):
        super().__init__()
        _, transformers = extra(path)
        self.tokenizer = load_tokenizer(path)
        dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
        self.encoder = load(transformers.UMT5EncoderModel, path, dtype)

    def encode(self, prompts):
        """list of b strings -> context [b, 512, d] float32. After a prompt's tokens it is zero, as Wan pads
        it."""
        from diffusers.pipelines.wan.pipeline_wan import prompt_clean
        tokens = self.tokenizer([prompt_clean(prompt) for prompt in prompts], padding="max_length",
                                truncation=True,
                                max_length=TEXT_LEN, return_attention_mask=True, return_tensors="pt")
        tokens = tokens.to(self.encoder.device)
        context = self.encoder(tokens.input_ids, tokens.attention_mask).last_hidden_state.float()  # [b, l, d]
        return context * tokens.attention_mask[..., None]


class WanImageEncoder(nn.Module):
    """transformers' CLIPVisionModel in float32. Its preprocessor_config.json lies in the same folder or in
    image_processor/ beside it."""

    def __init__(self, path):
        super().__init__()
        _, transformers = extra(path)
        folder = beside(path, ("preprocessor_config.json",), "image_processor")
        if folder is None:
            raise InputError(f"{path}: there is no preprocessor_config.json in it, nor in image_processor/ "
                             "beside it")
        self.processor = transformers.CLIPImageProcessor.from_pretrained(str(folder), local_files_only=True)
        self.encoder = load(transformers.CLIPVisionModel, path, torch.float32)

    def encode(self, images):
        """uint8 [b, H, W, 3] -> all tokens of the layer before the last, float32 [b, m, d] (Wan2.1: 257 x
        1280)."""
        pixels = self.processor(images=list(images.cpu().numpy()), return_tensors="pt").pixel_values
        return self.encoder(pixels.to(self.encoder.device), output_hidden_states=True).hidden_states[-2]


@dataclass
class Export:
    transformer: str = arg(..., "what to export: the folder of an aligned transformer, a folder with two "
                           "experts (such as runs/align/best), or a LoRA file (.safetensors)",
                           positional=True)
    out: str = arg(..., "folder or LoRA file to write, which must not exist yet")
    layout: str = arg("diffusers", "whose names the weights get: those of diffusers, or those of the "
                      "official Wan2.1, which ComfyUI reads", choices=LAYOUTS)
    dtype: str = arg("bf16", "dtype of the written weights", choices=("bf16", "fp32"))


def export(config, load_transformer, export_transformer):
    """Writes what the command line asks for. load_transformer and export_transformer are model.py's. Raises
    InputError."""
    if Path(config.out).exists():
        raise InputError(f"--out {config.out}: is there already; name a new one")
    require_writable(config.out, f"--out {config.out}")
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[config.dtype]
    if Path(config.transformer).suffix == ".safetensors":
        adapters = {layer: (A.to(dtype), B.to(dtype))
                    for layer, (A, B) in read_adapters(config.transformer).items()}
        Path(config.out).parent.mkdir(parents=True, exist_ok=True)
        write_adapters(config.out, adapters, config.layout)
    else:
        dit = load_transformer(config.transformer, load_now=False)
        for one, source, out, notes in to_write(dit, config):
            if does_both(one.config):                           # the authors' name for a model of both tasks
                one.config["model_type"] = "ti2v"
            # weights are read here, so that an expert that is not written is not read either
            state = {name: one.weight_files.tensor(name) for name in one.state_dict()}
            export_transformer(one, out, config.layout, dtype, state, notes)
            tell_what_rounding_takes(state, source, dtype)
    print(f"wrote {config.out}")


def to_write(dit, config):
    """[(VideoDiT, the folder it is from, the folder to write, notes for its config.json)]. A generator of one
    transformer has one entry. Of two experts, those that are in --transformer have one each, and are written
    to folders in --out."""
    out, pair = Path(config.out), expert_folders(config.transformer)
    if pair is None:
        return [(dit, config.transformer, out, None)]
    home = pipeline_of(config.transformer).resolve()
    here = {name: getattr(pair, name) for name in EXPERTS
            if home in (getattr(pair, name).resolve(), getattr(pair, name).resolve().parent)}
    return [(getattr(dit, name), folder, out / EXPERTS[name][LAYOUTS.index(config.layout)],
             dit.notes(name, here)) for name, folder in here.items()]


def tell_what_rounding_takes(state, folder, dtype):
    """Prints a note if much of what merged adapters add to a transformer's weights is lost in dtype. The file
    of the adapters beside the transformer says that they were merged."""
    folder = Path(folder)
    if (folder / "transformer").is_dir():
        folder = folder / "transformer"
    file = folder.parent / FILES.get(folder.name, FILE)
    if not file.is_file():
        return
    adapters = read_adapters(file)
    for layer, (A, B) in adapters.items():
        if getattr(state.get(f"{layer}.weight"), "shape", None) != (len(B), A.shape[1]):
            return                                              # the adapters are of another model
    share = share_kept(state, adapters, dtype)
    if share < 0.9:
        print(f"note: only {share:.0%} of what the adapters add to the weights is left after rounding: write "
              "--dtype fp32, or "
              f"load the adapters themselves, {file} (train_align.py --export lora writes nothing else)")


if __name__ == "__main__":
    # formats/ imports nothing above itself, so these two are passed in
    from model import export_transformer, load_transformer
    common.cli(partial(export, load_transformer=load_transformer, export_transformer=export_transformer),
               Export, __doc__, prog="python -m formats.wan")
