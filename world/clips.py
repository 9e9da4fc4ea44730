"""Clips of the embedded world, and a generator's own samples, judged.

    python -m world.clips clips --count 1024 --kind mixture      mp4 files and metadata.jsonl with labels, to look at or to encode

train_reward.py without --data learns from `own_samples`, train_align.py without --data from `clean_clips`.

Axes: b batch, c latent channels, f latent frames, h w latents, l text tokens, d text width.
"""
import collections
import itertools
from dataclasses import dataclass
from pathlib import Path

import torch

import common
import data
import flow
from common import InputError, arg
from families import load_text_encoder, load_vae
from formats import fingerprint, lock, runs
from formats.metadata import from_json, write_rows
from formats.video import from_pixels, to_pixels, write_video
from formats.weights import read_config, transformer_folder
from model import first_frame_condition
from world import scene
from world.annotator import annotate


def require_world(model):
    """Raises InputError if `model` is no generator of the embedded world, whose VAE is a VideoVAE."""
    if "_class_name" in read_config(f"{model}/vae"):
        raise InputError(f"--model {model}: its VAE is not that of the embedded world: give clips of your own with --data")


@torch.no_grad()
def own_samples(folder, generator, model, count, num_steps, size, seed, runtime, shift=1.0):
    """Shards of `count` samples of a VideoDiT, judged by the embedded world's annotator; made once and kept.

    Label 1: qualified on both axes and true to the prompt; 0: unqualified on an axis or against the prompt; none in
    between. Image-to-video starts from clean renders' first frames, whose latents the shards hold as condition. model:
    the folder with its vae/ and text_encoder/. Every rank makes its share. Raises InputError if `folder` was made with
    other settings.
    """
    settings = {"model": str(model), "count": count, "num_steps": num_steps, "size": size, "seed": seed}
    settings |= {} if shift == 1 else {"shift": shift}
    require_world(model)
    settings["encoders"] = {role: fingerprint.of_encoder(f"{model}/{role}", role) for role in ("vae", "text_encoder")}
    settings["generator"] = fingerprint.of_encoder(transformer_folder(model)[0], "transformer")
    if (Path(folder) / "shards.json").exists():
        shards = data.Shards(folder)
        made_with = shards.settings or {}
        if {**made_with, "model": None} != {name: settings.get(name) for name in made_with} | {"model": None}:   # known by content
            raise InputError(f"{folder}: was made with {made_with}; use another --output_dir, or remove it")
        return shards
    if runtime.rank == 0:
        lock.require_ours(folder, "shards")
        guard = lock.hold(folder, "shards")                     # until this function ends
    vae = load_vae(f"{model}/vae").to(runtime.device)
    text = load_text_encoder(f"{model}/text_encoder").to(runtime.device)
    prompts = scene.draw_prompts(count, seed + 11)
    image_to_video = generator.config["model_type"] == "i2v"
    first_frames = scene.make(count, seed + 10, "clean", size)[0] if image_to_video else None
    mine = range(runtime.rank, count, runtime.world_size)
    made = []
    for i in common.progress(range(0, len(mine), 128), "own samples (x128)"):
        indices = list(mine[i:i + 128])
        wanted = [prompts[j] for j in indices]
        context = text.encode(wanted)                                                               # [b, l, d]
        y = first_frame_condition(vae.encode(from_pixels(first_frames[indices]).to(runtime.device))) \
            if image_to_video else None
        x0 = flow.sample(generator, scene.LATENT_SHAPES[size], context, seed, indices, num_steps, shift=shift, y=y,
                         autocast=runtime.autocast)                                                 # [b, c, f, h, w]
        judged = annotate(to_pixels(vae.decode(x0)).cpu(), wanted)
        labels = [1 if good else 0 if bad else None for good, bad in
                  zip(judged["qualified"].tolist(), judged["unqualified"].tolist())]
        condition = [y[:, 4:].cpu()] if image_to_video else []      # so that the given frame reaches the reward model
        made += zip(indices, x0.cpu(), context.cpu(), labels, *condition)
    made = sorted(itertools.chain(*common.gather(made)), key=lambda row: row[0])
    if runtime.rank == 0:
        _, latents, contexts, labels, *condition = zip(*made)
        data.write_shards(folder, torch.stack(latents), torch.stack(contexts), labels, prompts, settings=settings,
                     **({"condition": torch.stack(condition[0])} if condition else {}))
        guard.close()
    common.gather(None)                                         # the others wait for the file
    return data.Shards(folder)


def clean_clips(folder, model, count, size, seed, runtime):
    """Shards of clean clips of the embedded world, through the same door as anybody's: mp4 files (of rank 0), then encoded
    with the vae/ and text_encoder/ in `model` (by all ranks). Made once and kept in `folder`."""
    clips, latents, mark = Path(folder) / "clips", Path(folder) / "latents", Path(folder) / "world.json"
    settings = {"count": count, "size": size, "seed": seed}
    try:
        made_with = from_json(mark.read_text()) if mark.exists() else settings
    except ValueError as error:
        made_with = f"settings that cannot be read ({mark.name}: {error})"
    if made_with != settings:
        raise InputError(f"{folder}: was made with {made_with}; use another --output_dir, or remove it")
    require_world(model)
    common.gather(None)                                         # every rank has looked
    if runtime.rank == 0:
        lock.require_ours(folder, "curated", ("world.json",))
        guard = lock.hold(folder, "curated")                    # noqa: F841   until this function ends
        runs.write_json(mark, settings)
        if not (clips / "metadata.jsonl").exists():
            main(Config(str(clips), count=count, seed=seed, kind="clean", world=size))
    data.encode(data.Encode(str(clips), out=str(latents), vae=f"{model}/vae", text_encoder=f"{model}/text_encoder"), runtime)
    common.gather(None)                                         # the others wait for the files
    return data.Shards(latents)


# ---- the command
@dataclass
class Config:
    folder: str = arg(..., "where clips and metadata.jsonl go", positional=True)
    count: int = arg(1024, "clips", above=0)
    seed: int = arg(0, "of clips and prompts", at_least=0)
    kind: str = arg("mixture", "clean, mixture (of clean and flawed), flawed, or the name of one flaw")
    world: str = arg("tiny", "size of the world", choices=tuple(scene.SIZES))


def main(config):
    lock.require_ours(config.folder, "clips")
    if (Path(config.folder) / "metadata.jsonl").exists():
        raise InputError(f"{config.folder}: holds clips and a metadata.jsonl already: name a new folder")
    with lock.hold(config.folder, "clips"):
        render(config)


def render(config):
    rows, bar = [], common.progress(config.count, "render")
    for start in range(0, config.count, 64):  # always 64, so that a larger count begins with the same clips
        seed = int(torch.randint(2 ** 31, (), generator=common.random_generator(config.seed, "world", start)))
        videos, prompts, _ = scene.make(64, seed, config.kind, config.world)
        judged = annotate(videos, prompts)
        for i in range(min(64, config.count - start)):
            name, good = f"clips/{start + i:06d}.mp4", int(judged["qualified"][i])
            write_video(Path(config.folder) / name, videos[i], fps=8)
            certain = good or judged["unqualified"][i]  # clips in between stay unlabelled, as in the paper
            rows.append({"file_name": name, "prompt": prompts[i]} | ({"label": good} if certain else {}))
            bar.update()
    bar.close()
    write_rows(Path(config.folder) / "metadata.jsonl", rows)
    counts = collections.Counter(row.get("label") for row in rows)
    print(f"{config.folder}: {len(rows)} clips, {counts[1]} good, {counts[0]} bad, {counts[None]} unlabelled")


if __name__ == "__main__":
    common.cli(main, Config, __doc__, prog="python -m world.clips")
