"""The VAE, text encoder and image encoder of a generator: where they are in its folder, and what is done with
them in every family.

families.py loads them. In every family they have the same methods, are in eval mode and have no gradients on
their weights:

    vae.encode(video) -> latents        vae.decode(latents) -> video        text.encode(prompts) -> context
    image.encode(first frames) -> CLIP tokens
    vae.channels, vae.space: how many channels a latent has, and how many pixels it is wide and high

Axes: b batch, c latent channels, F video frames, f latent frames, H W pixels, h w latents, l text tokens, d
      text width.
"""
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F

from common import InputError, rank, uniform
from formats.video import TIME, from_pixels, to_pixels
from formats.weights import load_weights, read_config

ROLES = ("vae", "text_encoder", "image_encoder")


def find_encoders(model):
    """{role: folder} of the encoders in a generator's folder `model` or, if `model` is only a transformer's
    folder, beside it."""
    folder = Path(model)
    if not (folder / "vae").is_dir() and not (folder / "text_encoder").is_dir():
        folder = folder.resolve().parent
    return {role: folder / role for role in ROLES if (folder / role).is_dir()}


def load_saved(cls, path):
    """The module of class `cls` that `save_module` wrote to folder `path`. Raises InputError if the folder
    holds another class."""
    try:
        module = cls(**read_config(path))
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        raise InputError(f"{path}/config.json is not a {cls.__name__}'s: {error}") from None
    return load_weights(module, path).eval().requires_grad_(False)


def count_long_captions(path, prompts):
    """-> (how many of the prompts are longer than the text encoder in folder `path` can read, this limit in
    words). Loads no weights."""
    config = read_config(path)
    if config.get("model_type") == "umt5":
        from formats.wan import TEXT_LEN, count_tokens
        return sum(n > TEXT_LEN for n in count_tokens(path, prompts)), f"{TEXT_LEN} tokens"
    limit = config.get("max_bytes", 128)
    return sum(len(prompt.encode("utf-8", "surrogatepass")) > limit for prompt in prompts), f"{limit} bytes"


@contextmanager
def on(module, device):
    """Moves the module to the device and, if that is a GPU, back to the CPU afterwards. So the 29 GB of a 14B
    generator make room for the VAE. None stays None."""
    yield module and module.to(device)
    if module and torch.device(device).type == "cuda":
        module.cpu()


# ---- text
def encode_texts(text, folder, prompts, device):
    """-> {prompt: context [l, d] on the CPU}, without the zeros after a prompt's tokens, because every
    generator adds them again.

    text: the encoder that was loaded from `folder`. It reads one prompt at a time, because in a batch the
    rounding of a prompt's context, and with it the bytes of a video, would depend on the other prompts.
    """
    text = text.to(device)
    prompts = list(dict.fromkeys(prompts))
    too_long, limit = count_long_captions(folder, prompts)
    if too_long and rank() == 0:
        print(f"note: {too_long} of the prompts are longer than the {limit} that {folder} reads: the rest is "
              "cut off")
    contexts = {}
    for prompt in prompts:
        context = text.encode([prompt])[0].float().cpu()                                    # [l, d]
        used = context.abs().sum(-1).nonzero()
        length = int(used.max()) + 1 if len(used) else 1
        contexts[prompt] = context[:length].clone()
    return contexts


def stack_contexts(contexts):
    """Contexts [l, d] of several lengths -> [b, longest l, d], with zeros behind the shorter ones."""
    return torch.nn.utils.rnn.pad_sequence(contexts, batch_first=True)


def drop_contexts(context, config, iteration, indices, null):
    """context [b, l, d_text] of the examples `indices` -> the same, but a random share
    config.context_dropout of the examples has the null context [l, d_text], or zeros if null is None."""
    dropped = uniform(config.seed, "context dropout", iteration, indices) < config.context_dropout
    if not dropped.any():
        return context
    null = torch.zeros_like(context[0]) if null is None else null[:context.shape[1]]
    return torch.where(dropped.to(context.device)[:, None, None], null, context)


# ---- video
def condition_latents(vae, videos, blank_frames):
    """The given first frame as an image-to-video generator takes it: latents [b, c, f, h, w] of videos uint8
    [b, F, H, W, 3], of which only the first frame is read.

    blank_frames: the VAE encodes the first frame and blank frames after it, as Wan does. Otherwise it
    encodes only the first frame, and zeros follow its latent frame.
    """
    first = from_pixels(videos[:, :1])                                                      # [b, 3, 1, H, W]
    frames = videos.shape[1]
    if blank_frames:
        return vae.encode(F.pad(first, (0, 0, 0, 0, 0, frames - 1)))
    return F.pad(vae.encode(first), (0, 0, 0, 0, 0, (frames - 1) // TIME))


def decode_pixels(vae, latents, pixels=2 ** 23):
    """latents [b, c, f, h, w] -> uint8 videos [b, F, H, W, 3] on the CPU. As many videos are decoded at once
    as have at most `pixels` pixels together, but at least one."""
    _, _, f, h, w = latents.shape
    at_once = max(1, pixels // (TIME * f * h * w * vae.space ** 2))
    return torch.cat([to_pixels(vae.decode(x)).cpu() for x in latents.split(at_once)])
