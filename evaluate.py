"""Compares generators on the same prompts and noise: quality, motion and signs of reward hacking, with
intervals.

    python evaluate.py checkpoints runs/sft runs/prfl --output_dir results/mine
    python evaluate.py base=checkpoints prfl=runs/prfl --num_videos 512
    python evaluate.py --task i2v base=checkpoints/i2v prfl=runs/prfl_i2v
    python evaluate.py checkpoints --best_of 4          the best of 4 candidates by the reward (search.py)
    python evaluate.py checkpoints --split reworded     sentences in wordings that no training saw

    python evaluate.py --model Wan2.1 --prompts test.txt base=Wan2.1 prfl=runs/prfl \\
        --reward runs/reward/reward
    python evaluate.py --clips my_clips --reward runs/reward/reward     to clean or check the labels of clips

All of these run under torchrun, too: the processes share the videos, and the results are the same.

A generator here is a transformer/ folder or a folder that holds one, such as a run folder, its best/ or a
checkpoint-<step>/ in it; `name=folder` names it in the tables. The others are compared with the first one.
Prompts and seeds are disjoint from all training. The embedded world's annotator, which sees pixels only, says
how good the videos are. The results are table.md, table.json, per_video.json, videos.png (one row per prompt,
the generators from left to right, every other frame), and side_by_side.mp4 and side_by_side.gif (the same in
motion, with a green frame around clips that the annotator calls qualified and a red one around the others).

The metrics are means over videos, with 95 % intervals from a bootstrap over videos:
  qualified           share that are physical, not deformed and adherent, all three
  physical            share whose motion is physical
  not deformed        share whose subject keeps its form
  adherent            share that show the colour, shape and direction that the prompt asks for
  motion smoothness   1 - mean absolute difference of odd frames from the mean of their neighbours
  dynamic degree      share that move at more than half of the world's slowest speed
  subject consistency cosine similarity of the subject's cut-out to that of the first and previous frame
  I2V subject         cosine similarity of the cut-out to the given first frame (image-to-video only)
  PAVRM score         share that the reward model calls good at one random t
  speed, brightness, saturation   these change when a reward is hacked
The last row is of clean renders: videos of the same prompts, drawn without flaws and passed through the VAE.

--prompts FILE compares any generators on your own prompts, which the annotator cannot grade. The table has
the share of samples that the reward model calls good, and with --judge the share that the judge calls good
(both are means over five random t). It also has speed, flow, brightness, saturation and sharpness, which
`panel` in validation.py explains. The dynamic degree is here the share of videos whose flow is above half of
the first generator's median. A second table has, for each of these metrics, the difference from the first
generator, paired by prompt, with its interval. The videos and metadata.jsonl go to <output_dir>/<name>/,
ready for `label.py --pairs`; sample.py --prompts makes the videos of such a metadata.jsonl again. Flags that
are not given have sample.py's defaults.

Under torchrun, --parallel fsdp splits a generator that is too large for the memory of each process over the
GPUs. The reward model and the judge stay whole.

--clips DIR scores a folder of clips or of shards. scores.jsonl lists the clips, the worst first, each with
five probabilities of "good", which the reward model gives at one random t in every fifth of (0, 1]. Where
labels are known, accuracy and calibration are reported, too.

Axes: b batch, c channels, f frames, h height, w width, n videos, l text tokens.
"""
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import common
import data
import experts
import families
import flow
import search
import validation
from common import InputError, arg
from formats import encoders, lock, runs, samples
from formats.metadata import replace_text, update_rows, write_rows
from formats.picture import wall, write_gif
from formats.prompts import read_prompts
from formats.video import contact_sheet, from_pixels, read_clip, to_pixels, write_video
from formats.weights import SHIPPED, TASKS, resolve_model, task_in_words, transformer_folder
from model import image_inputs, load_transformer
from pavrm import load_pavrm
from report import confidence_interval, plot, show, table
from scale import parallel
from world import annotator, scene

# {metric: column} of the tables: TABLE for the embedded world's videos, WATCHED for samples of other prompts
TABLE = {"qualified": "qualified", "physical_qualified": "physical", "deformity_qualified": "not deformed",
         "adherent": "adherent", "smoothness": "motion smoothness", "dynamic": "dynamic degree",
         "consistency": "subject consistency", "i2v_subject": "I2V subject", "pavrm": "PAVRM score",
         "speed": "speed", "brightness": "brightness", "saturation": "saturation"}
WATCHED = {"pavrm": "PAVRM score", "judge": "judge", **{name: name for name in validation.PANEL},
           "dynamic": "dynamic degree"}
CLEAN = "clean renders"                                 # the last row of the embedded world's table
WORLD_BATCH = 128                                       # the embedded world's videos in a batch
BATCH_LATENTS = 2 ** 12                                 # latent positions of a batch of other videos
SEED = 7_000                                            # --seed is added to it, for noise and prompts
SHOWN, SIDE = 8, 160                                    # prompts in the pictures, longer side of a video
T_NAMES = [f"({k / 5:.1f}, {(k + 1) / 5:.1f}]" for k in range(validation.T_BINS)]


@dataclass
class Config(search.Flags):
    checkpoints: tuple[str, ...] = arg((), "generators to compare, each given as folder or name=folder; the "
                                       "others are compared with the first. Default: the shipped base",
                                       positional=True)
    output_dir: str = arg("runs/evaluate", "folder for tables and pictures")
    task: str | None = arg(None, "t2v (text-to-video) or i2v (image-to-video); default: the generators' own",
                           choices=TASKS, only="!clips")
    model: str | None = arg(None, "folder with text_encoder/, vae/ and reward/; default: the shipped model "
                            "for --task")
    reward: str | None = arg(None, "folder of the reward model that gives the PAVRM score. Default: "
                             "<model>/reward if there is one; with --prompts none. --clips needs one")
    prompts: str | None = arg(None, "file of prompts (.txt, .jsonl, .csv) to use instead of the embedded "
                              "world's", only="!clips")
    clips: str | None = arg(None, "folder of clips, or of their shards, that --reward scores; give no "
                            "generators then")
    judge: str | None = arg(None, "folder of a second reward model, trained on other clips and from another "
                            "seed, that scores the videos too", only="prompts")
    world: str = arg("tiny", "size of the embedded world's clips: tiny is 32x32, mid is 48x48, small is "
                     "64x64 pixels", choices=tuple(scene.SIZES), only="!prompts, !clips")
    size: str | None = arg(None, "W*H of the videos in pixels; default: the model's, or with --clips the "
                           "clips'", only="prompts or clips")
    frames: int | None = arg(None, "number of frames, 4k + 1; default: the model's, or with --clips the "
                             "clips'", at_least=5, only="prompts or clips")
    fps: float | None = arg(None, "frames per second; default: the model's, or with --clips the clips'",
                            above=0, only="prompts or clips")
    num_videos: int | None = arg(None, "number of prompts, for each of which every generator makes one "
                                 "video; default: 512 held-out prompts, or all of --prompts", above=0,
                                 only="!clips")
    num_inference_steps: int | None = arg(None, "Euler steps per video; default: 16, or with --prompts the "
                                          "model's", above=0, only="!clips")
    guidance_scale: float | None = arg(None, "scale of classifier-free guidance; 1: no guidance. Default: "
                                       "the model's", at_least=0, only="!clips")
    guidance_scale_2: float | None = arg(None, "guidance scale of the low-noise one of two experts (Wan2.2 "
                                         "A14B); default: --guidance_scale if that is given, else the "
                                         "model's", at_least=0, only="prompts")
    shift: float | None = arg(None, "moves the times of the Euler steps towards noise; default: the model's",
                              above=0, at_most=100, only="prompts")
    split: str = arg("test", "which held-out sentences are used: test is for reports, validation is for "
                     "choices, reworded has verbs, word order and phrases that training never sees",
                     choices=("test", "validation", "reworded"), only="!prompts, !clips")
    seed: int = arg(0, "seed of the noise, and of which held-out prompts are chosen", at_least=0)
    mixed_precision: str = runs.precision_flag()
    parallel: str = arg("ddp", "under torchrun: each GPU holds the whole generator (ddp) or a part of it "
                        "(fsdp)", choices=parallel.KINDS, only="prompts")


# ---- measures of the embedded world's videos
def cutouts(videos, centers, side):
    """The subject of every frame, centred, background subtracted: float [b, f, side, side, 3].

    videos: uint8 [b, f, h, w, 3]; centers: [b, f, 2] in fractions, as `annotator.annotate` tracks them.
    """
    b, f, h, w, _ = videos.shape
    frames = (videos.float() / 255 - torch.tensor(scene.BACKGROUND)).permute(0, 1, 4, 2, 3).flatten(0, 1)
    steps = (torch.arange(side) - (side - 1) / 2) * 2 / w                                   # in [-1, 1] units
    x = (2 * centers.flatten(0, 1)[:, 0] - 1)[:, None, None] + steps[None, None, :]
    y = (2 * centers.flatten(0, 1)[:, 1] - 1)[:, None, None] + steps[None, :, None]
    grid = torch.stack(torch.broadcast_tensors(x, y), -1)                               # [b f, side, side, 2]
    crops = F.grid_sample(frames, grid, align_corners=False)                            # [b f, 3, side, side]
    return crops.unflatten(0, (b, f)).permute(0, 1, 3, 4, 2)


def measure(videos, prompts, given=None):
    """Per-video values [b] of every pixel metric (see the top). videos: uint8 [b, f, h, w, 3].

    given: clips [b, f, h, w, 3] whose first frames were the input of an image-to-video model.
    """
    grades = annotator.annotate(videos, prompts)
    pixels = videos.float() / 255
    guess = (pixels[:, :-2:2] + pixels[:, 2::2]) / 2                                    # of the odd frames
    side = round(2.6 * scene.RADIUS[1] * videos.shape[2])
    subjects = cutouts(videos, grades["center"], side).flatten(2)                       # [b, f, side side 3]
    found = {"qualified": grades["qualified"], "physical_qualified": grades["physical"] == 2,
             "deformity_qualified": grades["deformity"] == 2,
             "smoothness": 1 - (guess - pixels[:, 1:-1:2]).abs().flatten(1).mean(1),
             "consistency": 0.5 * (similarity(subjects[:, 1:], subjects[:, :1])
                                   + similarity(subjects[:, 1:], subjects[:, :-1])).mean(1),
             **{name: grades[name] for name in annotator.PANEL}}
    if given is not None:
        centers = annotator.annotate(given, prompts)["center"][:, :1]
        first = cutouts(given[:, :1], centers, side).flatten(2)
        found["i2v_subject"] = similarity(subjects, first).mean(1)
    # `compare` ranks videos by this grade: two axes from 0 to 2 each, and 2 if the prompt is shown.
    grade = grades["physical"] + grades["deformity"] + 2 * grades["adherent"].long()
    return {name: values.double().numpy() for name, values in found.items()} | {"grade": grade.numpy()}


def similarity(a, b):
    return F.cosine_similarity(a, b, dim=-1, eps=1e-4).clamp_min(0)


def summary(values):
    """values [n] -> {"mean", "interval"}, the 95 % interval from resampled videos."""
    return {"mean": float(values.mean()), "interval": confidence_interval(values[None])}


def compare(a, b):
    """Compares b with a, video by video: the difference in the qualified rate with its paired 95 % interval,
    and the shares of videos that win, tie and lose."""
    difference = summary(b["qualified"] - a["qualified"])
    return {"qualified_difference": difference["mean"], "interval": difference["interval"],
            "win": float((b["grade"] > a["grade"]).mean()), "tie": float((b["grade"] == a["grade"]).mean()),
            "lose": float((b["grade"] < a["grade"]).mean())}


# ---- the one flow: generators (or clips) -> videos -> measures -> tables and pictures
def main(config):
    """Each kind of evaluation is a function that checks its flags and returns what differs:

    names                what is compared, in order
    open_source(name)    -> (groups, measure_group): lists of video numbers; measure_group(group, keep) ->
                         ({metric: values [b]}, videos uint8 [b, f, h, w, 3]), which are not used unless keep
    report(found, films) writes tables and pictures of {name: {metric: [n]}} and {name: {number: video}}
    """
    lock.require_ours(config.output_dir, "evaluation", ("per_video.json", "scores.jsonl", "part.json"),
                      "--output_dir")
    runtime = common.setup(config.mixed_precision, config.seed)
    with torch.no_grad():
        if config.clips:
            names, open_source, report = existing_clips(config, runtime)
        else:
            named = name_checkpoints(config)
            kind = own_prompts if config.prompts else embedded_world
            names, open_source, report = kind(config, named, runtime)
        folder_lock = lock_output_dir(config, runtime)          # noqa: F841   held until main returns
        found, films = measure_all(names, open_source, runtime, config.parallel)
        if runtime.rank == 0:
            report(found, films)
    common.teardown()


def name_checkpoints(config):
    """-> {name: folder} of the checkpoints; fills in task and model. Raises InputError."""
    if not (config.checkpoints or config.model or config.prompts):
        config.checkpoints = (f"base={resolve_model(config)}",)
    if not config.checkpoints:
        raise InputError("give checkpoints to compare, or --clips with a folder of clips")
    named = {}
    for part in config.checkpoints:
        name, folder = name_of_folder(part)
        if name in named:
            raise InputError("two checkpoints have one name: give them as name=folder")
        named[name] = folder
    for folder in named.values():
        resolve_model(config, folder)                           # all must be of one task
    return named


def name_of_folder(part):
    """name=folder, or a folder, which is named by its last part -> (name, folder).

    `runs/lr=1e-4` is a folder: it exists, or what stands before the = could not be a name.
    """
    name, equals, folder = part.partition("=")
    if equals and "/" not in name and not Path(part).exists():
        return name, folder
    return Path(part).name, part


def lock_output_dir(config, runtime):
    """Rank 0 becomes the only writer of --output_dir -> the lock, to keep. The other ranks wait for it."""
    folder_lock = None
    if runtime.rank == 0:
        folder_lock = lock.hold(config.output_dir, "evaluation")
    common.gather(None)
    return folder_lock


def measure_all(names, open_source, runtime, kind):
    """-> ({name: {metric: [n]}}, {name: {number: video uint8 [f, h, w, 3]} of the first SHOWN}), the same on
    every rank.

    The ranks take the groups in turn. A group's numbers do not depend on the rank that computes it, so n
    ranks give the same result as one. kind: the --parallel of the generators.
    """
    found, films = {}, {}
    for name in names:
        groups, measure_group = open_source(name)
        mine, rows, shown = parallel.work_of_rank(groups, runtime, kind), [], []
        about = f"{name}, batches of up to {len(groups[0]) * runtime.world_size} videos"
        for group, keep in common.progress(mine, about):
            values, videos = measure_group(group, keep)
            if not keep:
                continue
            rows += validation.by_video(group, values)
            shown += [(i, validation.shrunk(video, SIDE)) for i, video in zip(group, videos) if i < SHOWN]
        found[name] = {key: np.array(values) for key, values in validation.gather_values(rows).items()}
        films[name] = dict(sum(common.gather(shown), []))
        measure_group = None                # its generator leaves the memory before the next one comes
    return found, films


def require_reward(config, reward):
    """Raises InputError if best of n is asked for without a reward model."""
    if config.best_of > 1 and not reward:
        raise InputError(f"--best_of {config.best_of} needs a reward model: name one with --reward")


def check_models(named, config, *rewards):
    """Raises InputError, before any work, if a generator or a reward model for it cannot be loaded, or if a
    generator is not one for the encoders in --model."""
    for folder in named.values():
        dit = load_transformer(folder, load_now=False, task=config.task)
        families.require_encoders(dit.config, config.model, folder)
        for path in filter(None, rewards):
            load_pavrm(path, dit, load_now=False)


def open_generator(config, folder, runtime, **rewards):
    """Loads the generator in `folder` and its reward models, ready to sample -> (generator, what
    parallel.to_sample returns, {name: reward model}). rewards: {name: path or None}."""
    dit = load_transformer(folder, load_now=False, task=config.task).eval().requires_grad_(False)
    pavrms = {name: parallel.whole(load_pavrm(path, dit, load_now=False), runtime.dtype)
              for name, path in rewards.items() if path}
    return dit, parallel.to_sample(dit, runtime, config.parallel), pavrms


def searched(config, passes):
    """Words for the line above a table: how the videos were chosen."""
    if config.best_of == 1:
        return ""
    how = {"resample": "resampled", "drop": "the others dropped"}[config.search]
    return f"the best of {config.best_of} by the reward ({how}), {passes:g} forward passes per video; "


def write_results(config, line, tables, rows, against, found, digits):
    """Writes table.md, table.json and per_video.json, whose values are rounded to `digits` digits."""
    folder = Path(config.output_dir)
    replace_text(folder / "table.md", f"{line}95 % bootstrap intervals.\n\n" + "\n".join(tables))
    runs.write_json(folder / "table.json", {"config": vars(config), "rows": rows, "against_first": against})
    per_video = {}
    for name, metrics in found.items():
        per_video[name] = {metric: [round(value, digits) for value in values.tolist()]
                           for metric, values in metrics.items()}
    runs.write_json(folder / "per_video.json", per_video)
    print("\n".join(tables))


def metrics_table(columns, rows):
    """The lines of a table of means with intervals. rows: {name: {metric: summary}}. columns: {metric:
    title}; a metric that no row has gets no column."""
    metrics = [metric for metric in columns if any(metric in row for row in rows.values())]
    cells = [[name, *(show(**row[metric]) if metric in row else "" for metric in metrics)]
             for name, row in rows.items()]
    return table(["", *(columns[metric] for metric in metrics)], cells)


# ---- the embedded world: held-out prompts, graded by the annotator
def embedded_world(config, named, runtime):
    """Evaluates on held-out prompts of the embedded world, with its annotator's grades. The last row has
    clean renders."""
    if any(families.of_config(transformer_folder(folder)[1]).world is None for folder in named.values()):
        raise InputError("the embedded world's prompts and annotator mean nothing to Wan's generators: "
                         "give --prompts FILE")
    families.fill_in(config, {"num_videos": 512, "num_inference_steps": 16, "guidance_scale": 1.0})
    drops = search.drops_of(config)
    reward = config.reward
    if reward is None and Path(f"{config.model}/reward").is_dir():
        reward = f"{config.model}/reward"
    require_reward(config, reward)
    check_models(named, config, reward)
    vae, device = families.load_vae(f"{config.model}/vae").to(runtime.device), runtime.device
    n, seed, image_to_video, spent = config.num_videos, SEED + config.seed, config.task == "i2v", {}
    clean, prompts, _ = scene.make(n, seed, "clean", config.world, split=config.split)
    text = families.load_text_encoder(f"{config.model}/text_encoder").to(device).eval()
    context = text.encode(prompts)                                                          # [n, l, d]
    given = vae.encode(from_pixels(clean.to(device)))                                       # [n, c, f, h, w]

    def open_source(name):
        if name != CLEAN:
            dit, _, pavrms = open_generator(config, named[name], runtime, pavrm=reward)
            dit = dit.to(device)
            pavrm = pavrms["pavrm"].to(device) if pavrms else None

        def measure_group(group, keep):
            latents = given[group]
            if name != CLEAN:
                image = image_inputs(dit.config, {"latents": latents}, device)
                latents, spent["passes"] = search.best_of(
                    dit, pavrm, given.shape[1:], context[group], seed, group, config.num_inference_steps,
                    config.best_of, drops, guidance_scale=config.guidance_scale, batch_size=WORLD_BATCH,
                    autocast=runtime.autocast, **image)
            videos = to_pixels(vae.decode(latents)).cpu()
            values = measure(videos, [prompts[i] for i in group], clean[group] if image_to_video else None)
            if name != CLEAN and pavrm:
                t = common.uniform(seed, "pavrm t", 0, group).to(device)
                x1 = common.noise(given.shape[1:], seed, "pavrm x1", 0, group).to(device)
                with runtime.autocast():
                    logits = pavrm(flow.add_noise(latents, x1, t), t, context[group], **image)
                values["pavrm"] = (logits >= 0).double().cpu().numpy()
            return values, videos

        return common.groups_of(n, WORLD_BATCH), measure_group

    def report(found, films):
        rows = {name: {metric: summary(values) for metric, values in metrics.items() if metric != "grade"}
                for name, metrics in found.items()}
        first, folder = next(iter(named)), Path(config.output_dir)
        against = {name: compare(found[first], found[name]) for name in named if name != first}
        tables = metrics_table(TABLE, rows)
        if against:
            tables += table([f"against {first}", "qualified, difference", "win", "tie", "lose"],
                            [[name, show(pair["qualified_difference"], pair["interval"], "+"),
                              *(f"{pair[key]:.3f}" for key in ("win", "tie", "lose"))]
                             for name, pair in against.items()])
        line = f"{n} held-out prompts, same noise, {config.num_inference_steps} Euler steps; "
        write_results(config, line + searched(config, spent["passes"]), tables, rows, against, found, 4)
        few = range(min(SHOWN, n))
        videos = {name: torch.stack([films[name][i] for i in few]) for name in named}
        gap = torch.full_like(videos[first][:, :1], 255)                            # a white frame between
        bands = [part for name in named for part in (videos[name][:, ::2], gap)][:-1]
        contact_sheet(torch.cat(bands, 1), folder / "videos.png", scale=2)
        side_by_side = wall(videos, prompts[:len(few)],
                            {name: (name, f"{rows[name]['qualified']['mean']:.0%} good") for name in named},
                            {name: found[name]["qualified"][:len(few)] > 0 for name in named})
        write_video(folder / "side_by_side.mp4", side_by_side, fps=scene.FPS)
        write_gif(folder / "side_by_side.gif", side_by_side, fps=scene.FPS)
        print(f"wrote {folder}/table.md, table.json, per_video.json, videos.png and side_by_side.mp4")
        print(f"look at {folder}/side_by_side.gif: the same prompts and noise; green frames are what the "
              "annotator calls good")

    return [*named, CLEAN], open_source, report


# ---- any generators, on your own prompts
def own_prompts(config, named, runtime):
    """`--prompts`: samples of any generators, kept as mp4, with rewards and the panel."""
    rows = read_prompts(config.prompts)[:config.num_videos]
    dit_config = transformer_folder(next(iter(named.values())), config.task)[1]
    defaults = families.sampling_defaults(dit_config)
    size = data.parse_size(config, families.of_config(dit_config).side) or defaults["size"]
    negative = defaults["negative_prompt"]
    experts.check_flags(config, dit_config)
    if "boundary_ratio" in dit_config:
        families.fill_in(config, {"guidance_scale_2": config.guidance_scale})
    families.fill_in(config, families.sampling_defaults(dit_config, size))
    for row in rows:
        if (row["image"] is not None) != (dit_config["model_type"] == "i2v"):
            raise InputError(f"--prompts {config.prompts}: every row needs an image for image-to-video "
                             f"models, and none for others; these are {task_in_words(dit_config)}")
        if row["image"]:
            read_clip(row["image"], size=size, frames=1)
    require_reward(config, config.reward)
    parallel.check(parallel.Flags(parallel=config.parallel))
    drops = search.drops_of(config)
    check_models(named, config, config.reward, config.judge)
    vae, device = families.load_vae(f"{config.model}/vae"), runtime.device
    texts = [row["prompt"] for row in rows]
    all_texts = texts if negative is None else [*texts, negative]
    contexts = families.encode_prompts(f"{config.model}/text_encoder", all_texts, device)
    null = None if negative is None else contexts[negative].to(device)                      # [l, d]
    shape = families.latent_shape(dit_config, size, config.frames)
    batch_size = max(1, BATCH_LATENTS // (shape[1] * shape[2] * shape[3]))
    groups, spent = common.groups_of(len(rows), batch_size), {}
    seed, folder = SEED + config.seed, Path(config.output_dir)

    def open_source(name):
        dit, on_device, rewards = open_generator(config, named[name], runtime, pavrm=config.reward,
                                                 judge=config.judge)
        image_encoder = None
        if dit.config["image_dim"]:
            image_encoder = families.load_image_encoder(f"{config.model}/image_encoder")
        pavrm = rewards["pavrm"] if config.best_of > 1 else None

        def measure_group(group, keep):
            context = encoders.stack_contexts([contexts[texts[i]] for i in group]).to(device)
            paths = [rows[i]["image"] for i in group]
            image = families.conditions_of_images(dit.config, vae, image_encoder, paths, size, config.frames,
                                               device)
            with on_device(), encoders.on(pavrm, device):
                x, spent["passes"] = search.best_of(                                        # [b, c, f, h, w]
                    dit, pavrm, shape, context, seed, group, config.num_inference_steps, config.best_of,
                    drops, shift=config.shift, null=null,
                    guidance_scale=experts.guidance(dit, config.guidance_scale, config.guidance_scale_2),
                    batch_size=batch_size, max_rows=len(groups[0]), autocast=runtime.autocast, **image)
            if not keep:
                return None, None
            values = {}
            for kind, reward in rewards.items():
                with encoders.on(reward, device):
                    logits = validation.logits_by_t(reward, x, context, SEED, autocast=runtime.autocast,
                                                    indices=group, **image)
                values[kind] = (logits >= 0).double().mean(0).cpu()
            with encoders.on(vae, device):
                videos = encoders.decode_pixels(vae, x)
            for i, video in zip(group, videos):
                write_video(folder / name / f"{i:06d}.mp4", video, config.fps)
            return values | validation.panel(videos), videos

        return groups, measure_group

    def write_metadata(name):
        flags = {flag: getattr(config, flag, None) for flag in samples.FLAGS}
        flags |= {"transformer": named[name], "size": f"{size[0]}*{size[1]}", "batch_size": batch_size,
                  "negative_prompt": negative, "reward": config.reward if config.best_of > 1 else None}
        settings, lines = samples.describe(flags, folder / name), []
        for group in groups:
            for place, i in enumerate(group):
                made = settings | {"index": i, "batch": len(group), "place": place}
                file_name, image = f"{i:06d}.mp4", rows[i]["image"]
                lines.append(samples.row(folder / name, file_name, texts[i], seed, image, made))
        update_rows(folder / name / "metadata.jsonl", lines)

    def report(found, films):
        first, *others = named
        for values in found.values():
            values["dynamic"] = validation.dynamic_degree(values["flow"], found[first]["flow"]).astype(float)
        for name in named:
            write_metadata(name)
        metrics = [metric for metric in WATCHED if metric in found[first]]
        means = {name: {metric: summary(found[name][metric]) for metric in metrics} for name in named}
        against = {name: {metric: summary(found[name][metric] - found[first][metric]) for metric in metrics}
                   for name in others}
        tables = metrics_table(WATCHED, means)
        if against:
            tables += table([f"above {first}", *(WATCHED[metric] for metric in metrics)],
                            [[name, *(show(**row[metric], sign="+") for metric in metrics)]
                             for name, row in against.items()])
        second = f" and {config.guidance_scale_2:g}" if config.guidance_scale_2 is not None else ""
        line = (f"{len(rows)} prompts, same noise, {config.num_inference_steps} Euler steps, guidance "
                f"{config.guidance_scale:g}{second}; ")
        write_results(config, line + searched(config, spent["passes"]), tables, means, against, found, 5)
        few = range(min(6, len(rows)))
        videos = {name: torch.stack([films[name][i] for i in few]) for name in named}
        side_by_side = wall(videos, texts[:len(few)], {name: (name,) for name in named})
        write_video(folder / "side_by_side.mp4", side_by_side, config.fps)
        strips = [torch.stack([validation.strip(films[name][i], 4) for i in few]) for name in named]
        contact_sheet(torch.cat(strips, 1), folder / "videos.png", scale=1)
        print(f"wrote {folder}/table.md, table.json, per_video.json, videos.png, side_by_side.mp4 and "
              + ", ".join(f"{name}/" for name in named))
        if others:
            print(f"let people choose: python label.py --pairs {folder / first} {folder / others[0]}")

    return list(named), open_source, report


# ---- clips that exist
def existing_clips(config, runtime):
    """`--clips`: what a reward model says of each clip, and its accuracy where labels are known."""
    fit = ("size", "frames", "fps")
    common.refuse(config, ("best_of",), "with --clips")
    if config.checkpoints:
        raise InputError("--clips scores clips that exist: give no checkpoints")
    if not config.reward:
        raise InputError("--clips needs a reward model: name one with --reward")
    pavrm = parallel.whole(load_pavrm(config.reward, load_now=False), runtime.dtype)
    source, folder = Path(config.clips), Path(config.output_dir)
    encoded = (source / "shards.json").exists()
    model = config.model
    if model is None and families.of_config(pavrm.trunk.config).world:
        model = str(SHIPPED["t2v"])
    if encoded:
        common.refuse(config, fit, "with --clips of shards, whose clips have theirs")
    elif not model:
        raise InputError("--clips: give --model too, the folder with the encoders that the reward model's "
                         "generator came with")
    if not source.is_dir():
        raise InputError(f"--clips {source}: there is no such folder")

    def load_shards():
        """The clips as Shards; they are encoded first if they are not yet."""
        latents = source
        if not encoded:
            latents = folder / "latents"
            flags = {name: getattr(config, name) for name in fit}
            roles = ["vae", "text_encoder", *(["image_encoder"] if pavrm.trunk.config["image_dim"] else [])]
            flags |= {role: f"{model}/{role}" for role in roles}
            data.encode(data.Encode(str(source), out=str(latents), **flags), runtime)
            common.gather(None)                                 # the other ranks wait for the files
        shards = data.Shards(latents).relabel()
        data.require_fit(shards, pavrm.trunk, model)
        return shards

    def open_source(name):
        shards = kept["shards"] = load_shards()
        pavrm.to(runtime.device)
        batch_size = max(1, min(16, BATCH_LATENTS // math.prod(shards.latent_shape[1:])))

        def measure_group(group, keep):
            batch = shards.batch(group)
            image = image_inputs(pavrm.trunk.config, batch, runtime.device)
            logits = validation.logits_by_t(
                pavrm, batch["latents"].to(runtime.device), batch["context"].to(runtime.device), config.seed,
                autocast=runtime.autocast, indices=group, **image)
            return {interval: row.float().cpu() for interval, row in zip(T_NAMES, logits)}, ()

        return common.groups_of(len(shards), batch_size), measure_group

    def report(found, films):
        shards = kept["shards"]
        logits = torch.tensor(np.stack([found["clips"][interval] for interval in T_NAMES])).float()  # [5, n]
        good, labels = torch.sigmoid(logits), shards.labels
        lines = []
        for i in good.mean(0).argsort().tolist():
            label = int(labels[i])
            lines.append({"file_name": shards.rows[i]["file_name"], "prompt": shards.rows[i]["prompt"],
                          "label": None if label < 0 else label, "good": round(good[:, i].mean().item(), 4),
                          "good_by_t": [round(p, 4) for p in good[:, i].tolist()]})
        write_rows(folder / "scores.jsonl", lines)
        cells = {"mean probability": good.mean(1).tolist(),
                 "share called good": (logits >= 0).double().mean(1).tolist()}
        known = labels >= 0
        if len(labels[known].unique()) == 2:
            cells |= validation.metrics_by_t(logits[:, known], labels[known])
            curves = calibration(good[:, known], labels[known])
            runs.write_json(folder / "calibration.json", curves)
            drawn = {f"t in {t}": ([x["predicted"] for x in bins], [x["good"] for x in bins])
                     for t, bins in curves.items()}
            panels = {"share that is good": ("probability of good", {"exact": ([0, 1], [0, 1])} | drawn)}
            plot(folder / "calibration.png", panels)
        cells = [[name, *(f"{x:.3f}" for x in row)] for name, row in cells.items()]
        print("\n".join(table(["t in", *T_NAMES], cells)))
        labelled = int(known.sum())
        print(f"wrote {folder}/scores.jsonl: {len(shards)} clips, the worst first; {labelled} of them have "
              "labels")

    kept = {}
    return ["clips"], open_source, report


def calibration(good, labels, bins=10):
    """good [5, n]: the probabilities that n clips got. labels [n] -> {interval of t: [{"predicted", "good",
    "count"}]}. Clips are sorted by their probability into ten equal steps. Each step that is not empty has
    its mean probability, the share of its clips that are labelled good, and their number."""
    found = {}
    for interval, row in zip(T_NAMES, good):
        step = (row * bins).long().clamp(max=bins - 1)
        found[interval] = []
        for i in range(bins):
            inside = step == i
            if inside.any():
                found[interval].append({"predicted": row[inside].mean().item(),
                                        "good": (labels[inside] == 1).double().mean().item(),
                                        "count": int(inside.sum())})
    return found


if __name__ == "__main__":
    common.cli(main, Config, __doc__)
