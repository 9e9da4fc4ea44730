"""Which VAE, text encoder and image encoder a folder holds: the one place that decides it.

A folder's config.json tells. The embedded world's own small models (world/) and Wan2.1's (formats/wan.py, which needs
requirements-wan.txt) have the same methods, so nothing else in this repository asks which of them it has:

    vae.encode(video) -> latents        vae.decode(latents) -> video        text.encode(prompts) -> context
    image.encode(first frames) -> CLIP tokens

All come in eval mode, without gradients on their weights. Weights that do not fit are an InputError.
"""
from common import InputError
from formats.weights import load_weights, read_config
from world.text_encoder import TextEncoder
from world.vae import VideoVAE


def load_vae(path):
    """The VAE in folder `path`: a VideoVAE, or Wan2.1's as diffusers stores it."""
    config = read_config(path)
    if config.get("_class_name") == "AutoencoderKLWan":
        from formats.wan import WanVAE
        return WanVAE(path)
    try:
        vae = VideoVAE(**config)
    except TypeError as error:
        raise InputError(f"{path}/config.json is not a VideoVAE's: {error}") from None
    return load_weights(vae, path).eval().requires_grad_(False)


def load_text_encoder(path):
    """The text encoder in folder `path`: a TextEncoder, or Wan2.1's UMT5 as transformers stores it."""
    config = read_config(path)
    if config.get("model_type") == "umt5":
        from formats.wan import WanTextEncoder
        return WanTextEncoder(path)
    try:
        text = TextEncoder(**config)
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        raise InputError(f"{path}/config.json is not a TextEncoder's: {error}") from None
    return load_weights(text, path).eval().requires_grad_(False)


def load_image_encoder(path):
    """The image encoder in folder `path`: Wan2.1's CLIP vision model as transformers stores it."""
    from formats.wan import WanImageEncoder
    return WanImageEncoder(path)
