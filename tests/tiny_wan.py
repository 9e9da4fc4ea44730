"""Tiny random instances of Wan's own classes, saved to disk as its pipeline folders are. Needs
requirements-wan.txt."""
import json

import diffusers
import numpy as np
import torch
import transformers

import common
import data
import sample
from formats import encoders, video, wan
from model import export_transformer, load_transformer

WORDS = "a red circle moves to the right blue square falls &".split()
TINY = dict(num_attention_heads=2, attention_head_dim=12, in_channels=16, out_channels=16, text_dim=20,
            freq_dim=16, ffn_dim=32, num_layers=2)

SHORT = ["--mixed_precision", "no", "--batch_size", "2", "--max_train_steps", "2"]


def run(module, *argv, command=None):
    function, Config = data.COMMANDS[command] if command else (module.main, module.Config)
    common.cli(function, Config, "", [str(a) for a in argv])


def export(*args, **more):
    wan.export(wan.Export(*args, **more), load_transformer, export_transformer)


def write_clips(folder, width, height, frames):
    """A film of width x height at 24 per second for each number of frames, with labels -> folder"""
    rows = []
    for i, count in enumerate(frames):
        level = np.linspace(40, 200, width)[None, None, :, None] * np.ones((count, height, 1, 3))
        level[:, 8:20, 4 + 4 * i:20 + 4 * i] = 230
        video.write_video(folder / f"{i}.mp4", level.astype(np.uint8), fps=24)
        rows.append({"file_name": f"{i}.mp4", "prompt": " ".join(WORDS[:i + 1]), "label": i % 2})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    vocabulary = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="</s>",
                                                unk_token="<unk>")


def random_weights(module):
    """No layer starts at zero then."""
    for p in module.parameters():
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=0.2)
        else:
            torch.nn.init.uniform_(p, 0.5, 1)
    return module.eval()


def text_encoder():
    return random_weights(transformers.UMT5EncoderModel(transformers.UMT5Config(
        vocab_size=3 + len(WORDS), d_model=20, d_kv=8, d_ff=24, num_layers=2, num_heads=2)))


def write_ti2v(folder):
    """folder/ti2v: a whole pipeline of Wan2.2 TI2V-5B's kind, tiny and random -> folder"""
    torch.manual_seed(0)
    vae = random_weights(diffusers.AutoencoderKLWan(
        base_dim=4, decoder_base_dim=4, z_dim=48, dim_mult=[1, 2, 2, 2], num_res_blocks=1, is_residual=True,
        in_channels=12, out_channels=12, patch_size=2, scale_factor_spatial=16,
        latents_mean=[i / 50 - 0.5 for i in range(48)], latents_std=[1 + i / 50 for i in range(48)]))
    dit = random_weights(diffusers.WanTransformer3DModel(**TINY | dict(in_channels=48, out_channels=48)))
    diffusers.WanPipeline(
        transformer=dit, vae=vae, tokenizer=tokenizer(), text_encoder=text_encoder(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=5.0), expand_timesteps=True,
    ).save_pretrained(folder / "ti2v")
    return folder


def write_a14b(folder):
    """folder/t2v and i2v: whole pipelines of Wan2.2 A14B's kind, of two experts, tiny and random -> folder"""
    torch.manual_seed(0)
    shared = dict(
        tokenizer=tokenizer(), text_encoder=text_encoder(),
        vae=random_weights(diffusers.AutoencoderKLWan(base_dim=4, dim_mult=[1, 2, 2, 2], num_res_blocks=1)),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0))     # so is the published one
    for task, cls, boundary in (("t2v", diffusers.WanPipeline, 0.875),
                                ("i2v", diffusers.WanImageToVideoPipeline, 0.9)):
        more = {"image_encoder": None, "image_processor": None} if task == "i2v" else {}
        high, low = (random_weights(diffusers.WanTransformer3DModel(**TINY | dict(
            in_channels=36 if task == "i2v" else 16))) for _ in range(2))
        cls(transformer=high, transformer_2=low, boundary_ratio=boundary, **shared,
            **more).save_pretrained(folder / task)
    return folder


def write_pipelines(folder):
    """folder/t2v and i2v: whole pipelines as diffusers writes them, tiny and random -> folder"""
    torch.manual_seed(0)
    vae = random_weights(diffusers.AutoencoderKLWan(base_dim=4, dim_mult=[1, 2, 2, 2], num_res_blocks=1))
    text = text_encoder()
    image = random_weights(transformers.CLIPVisionModel(transformers.CLIPVisionConfig(
        hidden_size=24, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2, image_size=28,
        patch_size=14)))
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    shared = dict(tokenizer=tokenizer(), text_encoder=text, vae=vae, scheduler=scheduler)
    dit = random_weights(diffusers.WanTransformer3DModel(**TINY))
    diffusers.WanPipeline(transformer=dit, **shared).save_pretrained(folder / "t2v")
    dit = random_weights(diffusers.WanTransformer3DModel(**TINY | dict(
        in_channels=36, image_dim=24, added_kv_proj_dim=24)))
    processor = transformers.CLIPImageProcessor(size={"shortest_edge": 28},
                                                crop_size={"height": 28, "width": 28})
    diffusers.WanImageToVideoPipeline(transformer=dit, image_encoder=image, image_processor=processor,
                                      **shared).save_pretrained(folder / "i2v")
    return folder


def write_picture(path, height, width):
    """A first frame of noise."""
    draws = torch.Generator().manual_seed(3)
    video.write_png(path, torch.randint(0, 256, (height, width, 3), dtype=torch.uint8, generator=draws))
    return path


class Uniform(diffusers.FlowMatchEulerDiscreteScheduler):
    """diffusers' Euler scheduler at flow.schedule's times: N + 1 of them, evenly from 1 to 0, then shifted
    once."""

    def set_timesteps(self, num_inference_steps=None, device=None, **_):
        super().set_timesteps(device=device, sigmas=np.linspace(1, 1 / num_inference_steps,
                                                                num_inference_steps))


def sampled(monkeypatch, *argv):
    """-> latents [b, c, f, h, w] of sample.py's videos, in order"""
    found, decode = [], encoders.decode_pixels
    with monkeypatch.context() as patch:
        patch.setattr(encoders, "decode_pixels", lambda vae, x: found.append(x.clone()) or decode(vae, x))
        run(sample, *argv)
    return torch.cat(found)
