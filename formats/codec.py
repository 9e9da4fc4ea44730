"""Which VAE, text encoder and image encoder a folder holds, and how its generator is used: the one place that decides it.

A folder's config.json tells. The embedded world's own small models (world/) and Wan2.1's (formats/wan.py, which needs
requirements-wan.txt) have the same methods, so nothing else in this repository asks which of them it has:

    vae.encode(video) -> latents        vae.decode(latents) -> video        text.encode(prompts) -> context
    image.encode(first frames) -> CLIP tokens

All come in eval mode, without gradients on their weights. Weights that do not fit are an InputError.
"""
import os
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from common import InputError, rank, uniform
from formats.video import SPACE, TIME, from_pixels, read_clip, to_pixels
from formats.weights import load_weights, read_config, stream_tensors
from model import image_inputs
from world import scene
from world.text_encoder import TextEncoder
from world.vae import VideoVAE


def load_vae(path):
    """The VAE in folder `path`: a VideoVAE, or Wan2.1's as diffusers stores it."""
    if read_config(path).get("_class_name") == "AutoencoderKLWan":
        from formats.wan import WanVAE
        return WanVAE(path)
    return _ours(VideoVAE, path)


def load_text_encoder(path):
    """The text encoder in folder `path`: a TextEncoder, or Wan2.1's UMT5 as transformers stores it."""
    if read_config(path).get("model_type") == "umt5":
        from formats.wan import WanTextEncoder
        return WanTextEncoder(path)
    return _ours(TextEncoder, path)


def _ours(cls, path):
    """The VideoVAE or TextEncoder that `save_module` wrote to folder `path`."""
    try:
        module = cls(**read_config(path))
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        raise InputError(f"{path}/config.json is not a {cls.__name__}'s: {error}") from None
    return load_weights(module, path).eval().requires_grad_(False)


def load_image_encoder(path):
    """The image encoder in folder `path`: Wan2.1's CLIP vision model as transformers stores it."""
    from formats.wan import WanImageEncoder
    return WanImageEncoder(path)


def find_encoders(model):
    """{"vae" | "text_encoder" | "image_encoder": folder} of those in a generator's folder, or beside a transformer's."""
    folder = Path(model)
    folder = folder if any((folder / name).is_dir() for name in ("vae", "text_encoder")) else folder.resolve().parent
    return {role: folder / role for role in ("vae", "text_encoder", "image_encoder") if (folder / role).is_dir()}


def count_long_captions(path, prompts):
    """-> (how many of the prompts are longer than what the text encoder in folder `path` reads, that limit in words). Loads
    no weights."""
    config = read_config(path)
    if config.get("model_type") == "umt5":
        from formats.wan import TEXT_LEN, count_tokens
        return sum(n > TEXT_LEN for n in count_tokens(path, prompts)), f"{TEXT_LEN} tokens"
    limit = config.get("max_bytes", 128)
    return sum(len(prompt.encode("utf-8", "surrogatepass")) > limit for prompt in prompts), f"{limit} bytes"


# ---- how a generator is used
WAN_CONTEXT = 512                                               # tokens of UMT5's context, by which Wan2.1 is known
# Wan2.1's own negative prompt: it names what the films it was trained on should not have looked like.
WAN_NEGATIVE = ("色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，"
                "最差质量，低质量，JPEG压缩残留，丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，"
                "畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，"
                "背景人很多，倒着走")


def fill_in(config, values):
    """Sets the flags that were left open (None) to `values`, as far as config has them."""
    for name, value in values.items():
        if getattr(config, name, "") is None:
            setattr(config, name, value)


def sampling_defaults(dit_config, height=None):
    """How a generator of this config is used where nobody says otherwise: {"size" (W, H), "frames", "fps",
    "num_inference_steps", "guidance_scale", "shift", "negative_prompt"}.

    Wan2.1: what its authors publish, but for the steps, which are the paper's (Sec. 5.1). height: of the video in pixels,
    where it is not the default, as the shift depends on it: 3 at 480P, 5 at 720P. The embedded world's: as it was trained;
    its null prompt is all zeros, so it has no negative one.
    """
    if dit_config["text_len"] == WAN_CONTEXT:
        return {"size": (832, 480), "frames": 81, "fps": 16.0, "num_inference_steps": 40, "guidance_scale": 5.0,
                "shift": 5.0 if (height or 480) >= 720 else 3.0, "negative_prompt": WAN_NEGATIVE}
    world = scene.SIZES["small" if dit_config["dim"] > 192 else "tiny"]
    return {"size": (world["resolution"],) * 2, "frames": world["frames"], "fps": float(scene.FPS),
            "num_inference_steps": 32, "guidance_scale": 1.0, "shift": 1.0, "negative_prompt": None}


# Defaults of the training scripts: in the embedded world the best in results/table1.md; for a generator of Wan2.1's size the
# paper's (A.2.3 to A.2.5: its batch of 30 is that of all ranks, and 800 iterations are one epoch over its prompts; how many
# videos PAVRM sees at once it does not say).
BATCH = 30
TRAINING = {
    "align": ({"learning_rate": 1e-4, "batch_size": 32, "gradient_accumulation_steps": 1, "max_train_steps": 120,
               "num_inference_steps": 16},
              {"learning_rate": 5e-6, "batch_size": 1, "max_train_steps": 800, "num_inference_steps": 40}),
    "reward": ({"learning_rate": 2e-3, "trunk_learning_rate": 1e-3, "batch_size": 64},
               {"learning_rate": 1e-5, "trunk_learning_rate": 1e-6, "batch_size": 2}),
}


def training_defaults(dit_config, stage):
    """What train_align.py ("align") or train_reward.py ("reward") do where no flag says: {flag: value}. dit_config: of the
    generator; one of width 1536 or more is of Wan2.1's size."""
    world, wan = TRAINING[stage]
    if dit_config["dim"] < 1536:
        return world
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    return wan | ({"gradient_accumulation_steps": max(1, round(BATCH / ranks))} if stage == "align" else {})


NULL_CONTEXT = "null_context.safetensors"                       # beside shards


# ---- text, generator and VAE on the device one after another
@contextmanager
def on(module, device):
    """The module on the device, and off it after, where that is a GPU: a 14B generator's 29 GB make room for the VAE. None
    stays None."""
    yield module and module.to(device)
    if module and torch.device(device).type == "cuda":
        module.cpu()


def encode_texts(folder, prompts, device, width=None):
    """{prompt: context [l, d] on the CPU, without the zeros behind it, which every generator adds again}. The text encoder
    in `folder` is loaded, used and let go. One prompt at a time: rounding, and with it the bytes of a video, would depend on
    its neighbours in a batch. width: d that the generator takes, else an InputError."""
    text, found, prompts = load_text_encoder(folder).to(device), {}, list(dict.fromkeys(prompts))
    cut, limit = count_long_captions(folder, prompts)
    if cut and rank() == 0:
        print(f"note: {cut} of the prompts are longer than the {limit} that {folder} reads: the rest is cut off")
    for prompt in prompts:
        context = text.encode([prompt])[0].float().cpu()                                    # [l, d]
        if width not in (None, context.shape[1]):
            raise InputError(f"{folder}: its contexts have width {context.shape[1]}, the generator takes {width}: give --model, "
                             "the folder that the generator came from")
        tokens = context.abs().sum(-1).nonzero()
        found[prompt] = context[:int(tokens.max()) + 1 if len(tokens) else 1].clone()
    return found


def save_null_context(folder, text):
    """Beside shards of Wan's contexts: those of the empty and of the negative prompt. The embedded world's are all zeros."""
    if not isinstance(text, TextEncoder):
        empty, negative = text.encode(["", WAN_NEGATIVE]).float().cpu().contiguous()
        stream_tensors({"empty": empty.clone(), "negative": negative.clone()}, Path(folder) / NULL_CONTEXT)


def null_context(dit_config, kind, shards, model, device):
    """[l, d_text] of the "empty" or the "negative" prompt of a Wan generator, from the folder of shards, or by the text
    encoder in `model`; None in the embedded world, whose null context is all zeros. Raises InputError if neither has it."""
    if dit_config["text_len"] != WAN_CONTEXT:
        return None
    if shards and (path := Path(shards) / NULL_CONTEXT).is_file():
        return load_file(path)[kind].to(device)
    if not Path(f"{model}/text_encoder").is_dir():
        raise InputError(f"{shards}: holds no {NULL_CONTEXT}, and {model} no text_encoder/ to make it with: encode again")
    prompt = {"empty": "", "negative": WAN_NEGATIVE}[kind]
    return encode_texts(f"{model}/text_encoder", [prompt], device)[prompt].to(device)


def drop_contexts(context, config, iteration, indices, null):
    """context [b, l, d_text] of examples `indices`, a share context_dropout of them the null context [l, d_text] or zeros."""
    dropped = uniform(config.seed, "context dropout", iteration, indices) < config.context_dropout
    if not dropped.any():
        return context
    null = torch.zeros_like(context[0]) if null is None else null[:context.shape[1]]
    return torch.where(dropped.to(context.device)[:, None, None], null, context)


def stack_contexts(contexts):
    """Contexts [l, d] of several lengths -> [b, longest l, d], zeros behind the shorter ones."""
    return torch.nn.utils.rnn.pad_sequence(contexts, batch_first=True)


def latent_shape(dit_config, size, frames):
    """(c, f, h, w) of the latents of a video of size (W, H)."""
    return dit_config["out_dim"], (frames - 1) // TIME + 1, size[1] // SPACE, size[0] // SPACE


def condition_latents(vae, videos, context_len):
    """The given first frame as image-to-video generators take it: latents [b, c, f, h, w] of uint8 videos [b, F, H, W, 3].
    As Wan does where the context is Wan's: the VAE's code of the frame with blank ones behind it; in the embedded world
    zeros stand behind the first frame's code."""
    video = from_pixels(videos[:, :1])                                                      # [b, 3, 1, H, W]
    frames = videos.shape[1]
    if context_len == WAN_CONTEXT:
        return vae.encode(F.pad(video, (0, 0, 0, 0, 0, frames - 1)))
    return F.pad(vae.encode(video), (0, 0, 0, 0, 0, (frames - 1) // TIME))


def image_conditions(dit_config, vae, image_encoder, first, frames):
    """What an image-to-video generator takes of first frames uint8 [b, H, W, 3] of videos of so many frames, as keywords:
    y [b, 4 + c, f, h, w], and clip [b, m, image_dim] if it has image tokens. As Wan does where the context is Wan's: the
    VAE's code of the frame with blank ones behind it; in the embedded world zeros stand behind it."""
    video = from_pixels(first[:, None])                                                     # [b, 3, 1, H, W]
    if dit_config["text_len"] == WAN_CONTEXT:
        video = F.pad(video, (0, 0, 0, 0, 0, frames - 1))                                   # [b, 3, F, H, W]
        x = vae.encode(video)
        batch = {"latents": x, "condition": x}
    else:
        batch = {"latents": F.pad(vae.encode(video), (0, 0, 0, 0, 0, (frames - 1) // TIME))}
    if dit_config["image_dim"]:
        batch["clip_fea"] = image_encoder.encode(first)
    return image_inputs(dit_config, batch, first.device)


def conditions_of_images(dit_config, vae, image_encoder, paths, size, frames, device):
    """`image_conditions` of pictures: one path per video, {} if the paths are None. size: (W, H). Each picture is encoded
    alone: rounding, and with it the bytes of a video, would depend on its neighbours in a batch."""
    if paths[0] is None:
        return {}
    found = {}
    with on(vae, device), on(image_encoder, device):
        for path in dict.fromkeys(paths):
            first = read_clip(path, size=size, frames=1)[0].to(device)                      # [1, H, W, 3]
            found[path] = image_conditions(dit_config, vae, image_encoder, first, frames)
    return {name: torch.cat([found[path][name] for path in paths]) for name in found[paths[0]]}


def decode_pixels(vae, latents, pixels=2 ** 23):
    """latents [b, c, f, h, w] -> uint8 videos [b, F, H, W, 3] on the CPU; so many pixels at a time, one video at least."""
    _, _, f, h, w = latents.shape
    at_once = max(1, pixels // (TIME * f * h * w * SPACE ** 2))
    return torch.cat([to_pixels(vae.decode(x)).cpu() for x in latents.split(at_once)])
