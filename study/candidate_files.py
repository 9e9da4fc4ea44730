"""What study/candidates.py and study/resampling.py share: flags, models, and the file that each writes.

Axes: m videos, n candidates, b batch of candidates, c channels, f frames, h height, w width.
"""
from dataclasses import dataclass
from pathlib import Path

import torch

from common import arg
from families import load_text_encoder, load_vae
from formats import disk, runs
from formats.video import to_pixels
from formats.weights import SHIPPED, stream_tensors
from model import load_transformer
from pavrm import load_pavrm
from study.search import ANNOTATED
from world import annotator


@dataclass
class Flags:
    reward: str = arg(..., "folder of the reward model")
    transformer: str | None = arg(None, "folder of the generator; default: the shipped one")
    num_videos: int = arg(512, "number of held-out prompts", above=0)
    seed: int = arg(0, "seed of the noise; the prompts are the same with every seed", at_least=0)
    mixed_precision: str = runs.precision_flag()


def load(reward, transformer, runtime):
    """Loads generator, reward model, VAE and text encoder to the runtime's device -> the four."""
    dit = load_transformer(transformer or SHIPPED["t2v"]).to(runtime.device).eval()
    pavrm = load_pavrm(reward, dit).to(runtime.device)
    vae = load_vae(SHIPPED["t2v"] / "vae").to(runtime.device)
    text = load_text_encoder(SHIPPED["t2v"] / "text_encoder").to(runtime.device).eval()
    return dit, pavrm, vae, text


def annotated(vae, x, prompts):
    """Latents x [b, c, f, h, w] -> what the annotator measures on the videos, {name of ANNOTATED: [b]}"""
    found = annotator.annotate(to_pixels(vae.decode(x)).cpu(), prompts)
    return {name: found[name].float() for name in ANNOTATED}


def write(path, rows, n):
    """Writes {name: [m, n, ...]} to the file `path`. rows: the batches of candidates, [{name: [b, ...]}], in
    which the n candidates of a video follow each other."""
    found = {}
    for name in rows[0]:
        flat = torch.cat([row[name] for row in rows])                               # [m n, ...]
        found[name] = flat.unflatten(0, (-1, n)).contiguous()
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    stream_tensors(found, f"{path}.part")
    disk.put(f"{path}.part", path)
    print(f"{found['qualified'].mean():.3f} of the videos are qualified\nwrote {path}")
