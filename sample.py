"""Sample videos for a prompt, to mp4.

    python sample.py --prompt "a red circle moving to the right"
    python sample.py --prompt "a blue square moves up" --transformer runs/align/transformer --num_videos 4 \\
        --contact_sheet sheet.png
    python sample.py --prompt "a blue square moves up" --best_of 8         search.py: the best of 8, by the latent reward
    python sample.py --task i2v --prompt "a red circle moving to the right" --image first.png

Axes: b batch, c channels, f frames, h height, w width, l text tokens.
"""
from dataclasses import dataclass
from pathlib import Path

import torch

import common
import flow
import search
from common import InputError, arg
from formats.codec import load_text_encoder, load_vae
from formats.video import contact_sheet, from_pixels, read_clip, to_pixels, write_video
from formats.weights import TASKS, resolve_model
from model import first_frame_condition, load_transformer
from pavrm import load_pavrm
from world import scene


@dataclass
class Config:
    prompt: str = arg(..., "what the video shows, in plain words")
    output: str = arg("sample.mp4", "mp4 to write; with several videos, sample-0.mp4, sample-1.mp4, ...")
    task: str | None = arg(None, "which shipped generator, without --model: t2v, or i2v (image-to-video)", choices=TASKS)
    model: str | None = arg(None, "another folder with transformer/, text_encoder/ and vae/")
    transformer: str | None = arg(None, "another generator, e.g. runs/align/transformer")
    image: str | None = arg(None, "first frame (png, jpg, or a video's first frame), for image-to-video models")
    size: str = arg("tiny", "size of the video", choices=tuple(scene.SIZES))
    num_videos: int = arg(1, "videos to make", above=0)
    num_inference_steps: int = arg(32, "Euler steps from noise to video", above=0)
    guidance_scale: float = arg(1.0, "classifier-free guidance; 1 is none", at_least=0)
    seed: int = arg(0, "of the noise", at_least=0)
    best_of: int = arg(1, "candidates a video, of which the reward model keeps one (search.py)", above=0)
    cuts: str | None = arg(None, "when it drops them: time:candidates that stay, such as .75:4,.56:2,.37:1; 0:1 judges finished "
                           "ones alone; without, half at .75, a quarter at .56, one at .37")
    reward: str | None = arg(None, "reward model of --best_of; without, <model>/reward")
    contact_sheet: str | None = arg(None, "also write all frames of all videos as one PNG")
    mixed_precision: str = arg("no", "autocast dtype", choices=("no", "bf16"))


@torch.no_grad()
def main(config):
    if not config.prompt.strip():
        raise InputError("--prompt is empty: say what the video shows")
    if Path(config.output).suffix.lower() != ".mp4":
        raise InputError(f"--output {config.output}: the name must end in .mp4")
    if config.contact_sheet and Path(config.contact_sheet).suffix.lower() != ".png":
        raise InputError(f"--contact_sheet {config.contact_sheet}: the name must end in .png")
    cuts = search.parse_cuts(config.best_of, config.cuts)
    if config.best_of == 1:
        common.refuse(config, ("reward",), "without --best_of")
    runtime = common.setup(config.mixed_precision, config.seed)
    if runtime.world_size > 1:
        raise InputError("sample.py runs on one process: start it without torchrun")
    resolve_model(config, config.transformer)
    dit = load_transformer(config.transformer or config.model).to(runtime.device).eval()
    if config.best_of > 1:
        pavrm = load_pavrm(config.reward or f"{config.model}/reward", dit).to(runtime.device)
    text = load_text_encoder(f"{config.model}/text_encoder").to(runtime.device).eval()
    vae = load_vae(f"{config.model}/vae").to(runtime.device)
    b = config.num_videos
    shape = scene.LATENT_SHAPES[config.size]
    if (dit.config["model_type"] == "i2v") != (config.image is not None):
        raise InputError("--image is needed by image-to-video models, and by those alone; this one is "
                         + dit.config["model_type"])
    y = None
    if config.image:
        side = scene.SIZES[config.size]["resolution"]
        frame = read_clip(config.image, size=(side, side), frames=1)[0]                    # [1, h, w, 3]
        first = vae.encode(from_pixels(frame[None].to(runtime.device)))                         # [1, c, 1, h, w]
        y = first_frame_condition(first.expand(b, -1, shape[1], -1, -1))                        # [b, 4 + c, f, h, w]
    context = text.encode([config.prompt] * b)                                                  # [b, l, d]
    what = shape, context, config.seed, range(b), config.num_inference_steps
    how = dict(guidance_scale=config.guidance_scale, y=y, autocast=runtime.autocast)
    if config.best_of > 1:
        latents, passes = search.best_of(dit, pavrm, *what, cuts, **how)
        print(f"best of {config.best_of}: {passes:g} forward passes a video, {passes / config.num_inference_steps:.1f} times "
              "those of one candidate")
    else:
        latents = flow.sample(dit, *what, **how)
    videos = to_pixels(vae.decode(latents)).cpu()                                               # [b, F, H, W, 3]

    output = Path(config.output)
    for i, video in enumerate(videos):
        path = output if b == 1 else output.with_name(f"{output.stem}-{i}{output.suffix}")
        write_video(path, video, fps=scene.FPS)
        print(f"wrote {path}")
    if config.contact_sheet:
        contact_sheet(videos, config.contact_sheet)
        print(f"wrote {config.contact_sheet}")


if __name__ == "__main__":
    common.cli(main, Config, __doc__)
