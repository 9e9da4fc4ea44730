"""Training data of the embedded world: rendered clips, and a generator's own samples labelled by the
annotator.

    python -m world.clips clips --count 1024 --kind mixture

writes clips as mp4 with a metadata.jsonl that holds prompts and labels, to look at or for `data.py encode`.

Without --data, train_reward.py learns from `own_samples` and train_align.py from `clean_clips`.

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
from formats.weights import expert_folders, read_config, transformer_folder
from model import image_inputs
from world import scene
from world.annotator import annotate


def require_world(model):
    """Raises InputError if `model` is not a generator of the embedded world, whose VAE is a VideoVAE."""
    if "_class_name" in read_config(f"{model}/vae"):                # only diffusers' VAEs have a _class_name
        raise InputError(f"--model {model}: its VAE is not that of the embedded world: "
                         "give clips of your own with --data")


@torch.no_grad()
def own_samples(folder, generator, model, count, num_steps, size, seed, runtime, shift=1.0,
                transformer=None):
    """Makes Shards of `count` samples of a VideoDiT, which the annotator labels, or reads them from `folder`
    if they are there.

    A sample's label is 1 if it is qualified, 0 if it is unqualified (see `annotate`), and missing in between.
    Samples of an image-to-video generator start from the first frames of clean renders. The shards hold the
    latents of these frames as condition; samples with a pinned frame hold it already.

    generator: the VideoDiT. model: the folder with its vae/ and text_encoder/. transformer: the generator's
    own folder, if that is not in `model`. num_steps, shift: as in flow.sample. size: one of scene.SIZES.
    Every rank makes its share of the samples. Raises InputError if `folder` was made with other settings.
    """
    settings = {"model": str(model), "count": count, "num_steps": num_steps, "size": size, "seed": seed}
    if shift != 1:
        settings["shift"] = shift
    require_world(model)
    settings["encoders"] = {role: fingerprint.of_encoder(f"{model}/{role}", role)
                            for role in ("vae", "text_encoder")}
    if expert_folders(transformer or model):
        settings["generator"] = fingerprint.of_weights(transformer or model)
    else:
        settings["generator"] = fingerprint.of_encoder(transformer_folder(transformer or model)[0],
                                                        "transformer")
    if (Path(folder) / "shards.json").exists():
        shards = data.Shards(folder)
        made_with = shards.settings or {}
        for name in {*made_with, "shift"} - {"model"}:      # a model is known by its content, not by its path
            if made_with.get(name) != settings.get(name):
                raise InputError(f"{folder}: was made with {made_with}; "
                                 "give another folder with --samples_dir, or remove this one")
        return shards
    if runtime.rank == 0:
        lock.require_ours(folder, "shards")
        folder_lock = lock.hold(folder, "shards")               # until this function ends
    vae = load_vae(f"{model}/vae").to(runtime.device)
    text = load_text_encoder(f"{model}/text_encoder").to(runtime.device)
    prompts = scene.draw_prompts(count, seed + 11)
    first_frames = None
    if generator.config["model_type"] == "i2v":
        first_frames = scene.make(count, seed + 10, "clean", size)[0]
    mine = range(runtime.rank, count, runtime.world_size)
    made = []
    for i in common.progress(range(0, len(mine), 128), "own samples, batches of up to 128"):
        indices = list(mine[i:i + 128])
        asked = [prompts[j] for j in indices]
        context = text.encode(asked)                                                            # [b, l, d]
        image = {}
        if first_frames is not None:
            clean = vae.encode(from_pixels(first_frames[indices]).to(runtime.device))
            image = image_inputs(generator.config, {"latents": clean}, runtime.device)
        x0 = flow.sample(generator, scene.LATENT_SHAPES[size], context, seed, indices, num_steps, shift=shift,
                         autocast=runtime.autocast, **image)                            # [b, c, f, h, w]
        labels = labels_of(annotate(to_pixels(vae.decode(x0)).cpu(), asked))
        columns = [indices, x0.cpu(), context.cpu(), labels]
        if "y" in image:        # the reward model sees the given frame there; a pinned one is in the latents
            columns.append(image["y"][:, 4:].cpu())
        made += zip(*columns)
    made = sorted(itertools.chain(*common.gather(made)), key=lambda row: row[0])
    if runtime.rank == 0:
        _, latents, contexts, labels, *condition = zip(*made)
        optional = {}
        if condition:
            optional["condition"] = torch.stack(condition[0])
        data.write_shards(folder, torch.stack(latents), torch.stack(contexts), labels, prompts,
                          settings=settings, **optional)
        folder_lock.close()
    common.gather(None)                                         # the other ranks wait for the shards
    return data.Shards(folder)


def labels_of(annotations):
    """What `annotate` returned -> the label of each clip: 1 good, 0 bad, None in between, as in the paper."""
    labels = []
    for good, bad in zip(annotations["qualified"].tolist(), annotations["unqualified"].tolist()):
        if good:
            labels.append(1)
        elif bad:
            labels.append(0)
        else:
            labels.append(None)
    return labels


def clean_clips(folder, model, count, size, seed, runtime):
    """Makes Shards of `count` clean clips of the embedded world, or uses those that are in `folder`.

    The clips go the same way as a user's: rank 0 writes mp4 files, and `data.encode` encodes them, on all
    ranks, with the vae/ and text_encoder/ in `model`. Raises InputError if `folder` was made with other
    settings.
    """
    clips = Path(folder) / "clips"
    latents = Path(folder) / "latents"
    mark = Path(folder) / "world.json"                          # holds the settings
    settings = {"count": count, "size": size, "seed": seed}
    try:
        made_with = from_json(mark.read_text()) if mark.exists() else settings
    except ValueError as error:
        made_with = f"settings that cannot be read ({mark.name}: {error})"
    if made_with != settings:
        raise InputError(f"{folder}: was made with {made_with}; "
                         "give another folder with --curated_dir, or remove this one")
    require_world(model)
    common.gather(None)                                         # wait until every rank has read the settings
    if runtime.rank == 0:
        lock.require_ours(folder, "curated", ("world.json",))
        folder_lock = lock.hold(folder, "curated")              # noqa: F841   until this function ends
        runs.write_json(mark, settings)
        if not (clips / "metadata.jsonl").exists():
            main(Config(str(clips), count=count, seed=seed, kind="clean", world=size))
    encode = data.Encode(str(clips), out=str(latents), vae=f"{model}/vae",
                         text_encoder=f"{model}/text_encoder")
    data.encode(encode, runtime)
    common.gather(None)                                         # the other ranks wait for the shards
    return data.Shards(latents)


# ---- the command
@dataclass
class Config:
    folder: str = arg(..., "new folder for the clips and metadata.jsonl", positional=True)
    count: int = arg(1024, "number of clips", above=0)
    seed: int = arg(0, "seed of clips and prompts", at_least=0)
    kind: str = arg("mixture", "which clips are rendered: clean ones, flawed ones, a mixture of both, or "
                    "those with one flaw, named as in world/scene.py")
    world: str = arg("tiny", "size of the clips, by its name in SIZES of world/scene.py",
                     choices=tuple(scene.SIZES))


def main(config):
    lock.require_ours(config.folder, "clips")
    if (Path(config.folder) / "metadata.jsonl").exists():
        raise InputError(f"{config.folder}: holds clips and a metadata.jsonl already: name a new folder")
    with lock.hold(config.folder, "clips"):
        render(config)


def render(config):
    """Writes the clips and metadata.jsonl of `config`. Clips that are neither good nor bad have no label."""
    rows = []
    bar = common.progress(config.count, "render")
    for start in range(0, config.count, 64):    # always 64, so that a larger count begins with the same clips
        seed = int(torch.randint(2 ** 31, (), generator=common.random_generator(config.seed, "world", start)))
        videos, prompts, _ = scene.make(64, seed, config.kind, config.world)
        labels = labels_of(annotate(videos, prompts))
        for i in range(min(64, config.count - start)):
            name = f"clips/{start + i:06d}.mp4"
            write_video(Path(config.folder) / name, videos[i], fps=8)
            row = {"file_name": name, "prompt": prompts[i]}
            if labels[i] is not None:
                row["label"] = labels[i]
            rows.append(row)
            bar.update()
    bar.close()
    write_rows(Path(config.folder) / "metadata.jsonl", rows)
    counts = collections.Counter(row.get("label") for row in rows)
    print(f"{config.folder}: {len(rows)} clips, {counts[1]} good, {counts[0]} bad, {counts[None]} unlabelled")


if __name__ == "__main__":
    common.cli(main, Config, __doc__, prog="python -m world.clips")
