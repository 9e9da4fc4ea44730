"""Checkpoints side by side on held-out prompts, with the same noise: quality, motion, hacking panel, intervals.

    python evaluate.py checkpoints runs/sft runs/prfl --output_dir results/mine
    python evaluate.py base=checkpoints prfl=runs/prfl --num_videos 512
    python evaluate.py --task i2v base=checkpoints/i2v prfl=runs/prfl_i2v
    python evaluate.py checkpoints --best_of 8                  search.py: of 8 candidates a video, what the reward keeps
    python evaluate.py checkpoints --split reworded             sentences in wordings that no training saw

    python evaluate.py --model Wan2.1 --prompts test.txt base=Wan2.1 prfl=runs/prfl --reward runs/reward/reward
    python evaluate.py --clips my_clips --reward runs/reward/reward     scores clips that exist: to clean, or to check, labels

Each folder holds transformer/ (or is one); `name=folder` names it in the tables. The first is the one the others are
compared with. Prompts and seeds are disjoint from all training. Writes table.md, table.json, per_video.json,
videos.png (a row a prompt, the checkpoints from left to right, every other frame), side_by_side.mp4 and side_by_side.gif
(the same moving, each clip framed green or red by its verdict). The judge is the embedded world's annotator, which sees
pixels only.

Metrics, all means over videos, with 95 % intervals from a bootstrap over videos:
  qualified            both axes qualified and the prompt followed
  physical, deformity  share qualified on that axis
  adherent             colour, shape and direction are the prompt's
  motion smoothness    odd frames against the mean of their neighbours: 1 - mean absolute error, pixels in [0, 1]
  dynamic degree       share that moves at more than half of the world's slowest speed
  subject consistency  cosine similarity of the subject's cut-out to that of the first and of the previous frame
  I2V subject          the same, to the given first frame (image-to-video only)
  PAVRM score          share the reward model calls good at one random t
  speed, brightness, saturation   against reward hacking; clean renders stand in the last row

--prompts: any generator's samples of prompts of one's own, of which no annotator says anything: the table has the reward
model and, with --judge, a second one, each as share called good at five random t; the panel of validation.py (dynamic: over
half of the first checkpoint's median flow); and every difference from the first checkpoint, prompt by prompt, with its
interval. <output_dir>/<name>/ gets the videos and metadata.jsonl, ready for `label.py --pairs`. What no flag says is as
sample.py has it. Runs under torchrun.

--clips: a folder of clips or of shards. scores.jsonl lists them, the worst first, with the probability of "good" that the
reward model gives each at one random t in every fifth of (0, 1]; where labels are known, accuracy and calibration too.

Axes: b batch, c channels, f frames, h height, w width.
"""
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import common
import data
import flow
import search
import validation
from common import InputError, arg
from formats import codec, lock, runs
from formats.codec import load_text_encoder, load_vae
from formats.metadata import replace_text, update_rows, write_rows
from formats.picture import wall, write_gif
from formats.prompts import read_prompts
from formats.video import contact_sheet, from_pixels, read_clip, to_pixels, write_video
from formats.weights import SHIPPED, TASKS, resolve_model, transformer_folder
from model import first_frame_condition, image_inputs, load_transformer
from pavrm import load_pavrm
from report import confidence_interval, plot, show, table
from scale import parallel
from world import annotator, scene

TABLE = {"qualified": "qualified", "physical_qualified": "physical", "deformity_qualified": "deformity",
         "adherent": "adherent", "smoothness": "motion smoothness", "dynamic": "dynamic degree",
         "consistency": "subject consistency", "i2v_subject": "I2V subject", "pavrm": "PAVRM score",
         "speed": "speed", "brightness": "brightness", "saturation": "saturation"}


@dataclass
class Config(search.Flags):
    checkpoints: tuple[str, ...] = arg((), "folders, or name=folder; the first is compared with; without, the shipped base",
                                       positional=True)
    output_dir: str = arg("runs/evaluate", "where tables and pictures go")
    task: str | None = arg(None, "t2v, or i2v (image-to-video); without, what the checkpoints are", choices=TASKS, only="!clips")
    model: str | None = arg(None, "folder with text_encoder/, vae/ and reward/; without, the shipped one of --task")
    reward: str | None = arg(None, "reward model of the PAVRM score; without, <model>/reward if there is one")
    prompts: str | None = arg(None, "file of prompts (.txt, .jsonl, .csv) in place of the embedded world's", only="!clips")
    clips: str | None = arg(None, "folder of clips, or of their shards, to score with --reward; without checkpoints")
    judge: str | None = arg(None, "second reward model, trained on other clips and from another seed", only="prompts")
    world: str = arg("tiny", "size of the embedded world", choices=tuple(scene.SIZES), only="!prompts, !clips")
    size: str | None = arg(None, "W*H; without, the model's, or the clips'", only="prompts or clips")
    frames: int | None = arg(None, "frames, 4k + 1; without, the model's, or the clips'", at_least=5, only="prompts or clips")
    fps: float | None = arg(None, "frames per second; without, the model's, or the clips'", above=0, only="prompts or clips")
    num_videos: int | None = arg(None, "prompts, one video each; without, 512 held-out ones, or all of --prompts", above=0,
                                 only="!clips")
    num_inference_steps: int | None = arg(None, "Euler steps; without, 16, or with --prompts the model's", above=0, only="!clips")
    guidance_scale: float | None = arg(None, "classifier-free guidance, 1 is none; without, the model's", at_least=0, only="!clips")
    shift: float | None = arg(None, "warps times towards noise; without, the model's", above=0, at_most=100, only="prompts")
    split: str = arg("test", "held-out sentences: test to report on, validation to choose on; reworded: with verbs, order and "
                     "phrases that training never sees", choices=("test", "validation", "reworded"), only="!prompts, !clips")
    seed: int = arg(0, "of the noise and of the prompts, among the held-out ones", at_least=0)
    mixed_precision: str = runs.precision_flag()


def cutouts(videos, centers, side):
    """The subject of every frame, centred, background subtracted: float [b, f, side, side, 3].

    videos: uint8 [b, f, h, w, 3]; centers: [b, f, 2] in fractions, as `annotator.annotate` tracks them.
    """
    b, f, h, w, _ = videos.shape
    frames = (videos.float() / 255 - torch.tensor(scene.BACKGROUND)).permute(0, 1, 4, 2, 3).flatten(0, 1)
    steps = (torch.arange(side) - (side - 1) / 2) * 2 / w                                       # in [-1, 1] units
    x = (2 * centers.flatten(0, 1)[:, 0] - 1)[:, None, None] + steps[None, None, :]
    y = (2 * centers.flatten(0, 1)[:, 1] - 1)[:, None, None] + steps[None, :, None]
    grid = torch.stack(torch.broadcast_tensors(x, y), -1)                                       # [b f, side, side, 2]
    crops = F.grid_sample(frames, grid, align_corners=False)                                    # [b f, 3, side, side]
    return crops.unflatten(0, (b, f)).permute(0, 1, 3, 4, 2)


def measure(videos, prompts, given=None):
    """Per-video values [b] of every pixel metric (see the top). videos: uint8 [b, f, h, w, 3].

    given: clips [b, f, h, w, 3] whose first frames were the input of an image-to-video model.
    """
    judged = annotator.annotate(videos, prompts)
    pixels = videos.float() / 255
    guess = (pixels[:, :-2:2] + pixels[:, 2::2]) / 2                                            # of the odd frames
    side = round(2.6 * scene.RADIUS[1] * videos.shape[2])
    subjects = cutouts(videos, judged["center"], side).flatten(2)                               # [b, f, side side 3]
    similar = lambda a, b: F.cosine_similarity(a, b, dim=-1, eps=1e-4).clamp_min(0)
    out = {"qualified": judged["qualified"], "physical_qualified": judged["physical"] == 2,
           "deformity_qualified": judged["deformity"] == 2,
           "smoothness": 1 - (guess - pixels[:, 1:-1:2]).abs().flatten(1).mean(1),
           "consistency": 0.5 * (similar(subjects[:, 1:], subjects[:, :1])
                                 + similar(subjects[:, 1:], subjects[:, :-1])).mean(1),
           **{name: judged[name] for name in annotator.PANEL}}
    if given is not None:
        centers = annotator.annotate(given, prompts)["center"][:, :1]
        out["i2v_subject"] = similar(subjects, cutouts(given[:, :1], centers, side).flatten(2)).mean(1)
    # What a person would rank by: axes first, then the prompt.
    grade = judged["physical"] + judged["deformity"] + 2 * judged["adherent"].long()
    return {name: values.double().numpy() for name, values in out.items()} | {"grade": grade.numpy()}


def summary(values):
    """values [m] -> {"mean", "interval"}: 95 %, from resampled videos."""
    return {"mean": float(values.mean()), "interval": confidence_interval(values[None])}


def compare(a, b):
    """b against a, video by video: difference in qualified rate with its paired 95 % interval, win / tie / lose."""
    difference = summary(b["qualified"] - a["qualified"])
    return {"qualified_difference": difference["mean"], "interval": difference["interval"],
            "win": float((b["grade"] > a["grade"]).mean()), "tie": float((b["grade"] == a["grade"]).mean()),
            "lose": float((b["grade"] < a["grade"]).mean())}


def markdown(rows, pairs):
    """The tables of table.md: metrics with intervals, then the comparisons with the first row."""
    names = [name for name in TABLE if any(name in row for row in rows.values())]
    lines = table(["", *(TABLE[name] for name in names)],
                  [[label, *(show(**row[name]) if name in row else "" for name in names)] for label, row in rows.items()])
    if pairs:
        lines += table([f"against {next(iter(rows))}", "qualified, difference", "win", "tie", "lose"],
                       [[label, show(pair["qualified_difference"], pair["interval"], "+"),
                         *(f"{pair[key]:.3f}" for key in ("win", "tie", "lose"))] for label, pair in pairs.items()])
    return "\n".join(lines)


def own(config, runtime):
    """Rank 0 becomes the one writer of --output_dir, if that is new, empty or an evaluation's -> the lock, to keep."""
    if runtime.rank == 0:
        lock.require_ours(config.output_dir, "evaluation", ("per_video.json", "scores.jsonl", "part.json"))
        return lock.hold(config.output_dir, "evaluation")


# ---- any generator, on prompts of one's own
WATCHED = {"pavrm": "PAVRM score", "judge": "judge", **{name: name for name in validation.PANEL}, "dynamic": "dynamic degree"}
BATCH_LATENTS = 2 ** 12                                         # latent positions of a batch of samples
SHOWN, HEIGHT = 6, 160                                          # prompts in the pictures, pixels of a video there


def sampled(config, folder, name, rows, contexts, size, runtime):
    """Samples every prompt from one generator, writes them to <output_dir>/<name>, and measures them.

    -> ({metric: [n]}, {index: small video uint8 [F, h, w, 3]} of the first few), the same on every rank.
    """
    dit, device = load_transformer(folder, dtype=None).eval().requires_grad_(False), runtime.device
    shape = codec.latent_shape(dit.config, size, config.frames)
    rewards = {kind: load_pavrm(path, dit) for kind, path in (("pavrm", config.reward), ("judge", config.judge)) if path}
    vae = load_vae(f"{config.model}/vae")
    clip = codec.load_image_encoder(f"{config.model}/image_encoder") if dit.config["image_dim"] else None
    null = contexts[None].to(device) if None in contexts else None
    cuts = search.parse_cuts(config.best_of, config.cuts)
    dit, found, films = parallel.cast_matrices(dit, runtime.dtype), [], []
    once = max(1, BATCH_LATENTS // (shape[1] * shape[2] * shape[3]))
    groups = [list(range(i, min(i + once, len(rows)))) for i in range(0, len(rows), once)]
    for group, _ in common.progress(parallel.work_of_rank(groups, runtime, "ddp"), f"{name} (x{once * runtime.world_size})"):
        context = codec.stack_contexts([contexts[rows[i]["prompt"]] for i in group]).to(device)
        image = {}
        if rows[group[0]]["image"]:
            first = torch.stack([read_clip(rows[i]["image"], size=size, frames=1)[0][0] for i in group]).to(device)
            with codec.on(vae, device), codec.on(clip or vae, device):
                image = codec.image_conditions(dit.config, vae, clip, first, config.frames)
        what = shape, context, 7_000 + config.seed, group, config.num_inference_steps
        how = dict(shift=config.shift, guidance_scale=config.guidance_scale, null=null, autocast=runtime.autocast, **image)
        with codec.on(dit, device):
            if config.best_of == 1:
                x = flow.sample(dit, *what, **how)                                                  # [b, c, f, h, w]
            else:
                with codec.on(rewards["pavrm"], device) as pavrm:
                    x, _ = search.best_of(dit, pavrm, *what, cuts, batch_size=once, **how)
        values = {}
        for kind, reward in rewards.items():
            with codec.on(reward, device):
                logits = validation.logits_by_t(reward, x, context, 7_000, autocast=runtime.autocast, indices=group, **image)
            values[kind] = (logits >= 0).double().mean(0).cpu()
        with codec.on(vae, device):
            videos = codec.decode_pixels(vae, x)
        values |= validation.panel(videos)
        found += [(i, {key: float(x[k]) for key, x in values.items()}) for k, i in enumerate(group)]
        for i, video in zip(group, videos):
            write_video(Path(config.output_dir) / name / f"{i:06d}.mp4", video, config.fps)
        films += [(i, validation.shrunk(video, HEIGHT)) for i, video in zip(group, videos) if i < SHOWN]
    found = [values for _, values in sorted(sum(common.gather(found), []), key=lambda row: row[0])]
    films = dict(sum(common.gather(films), []))
    return {key: np.array([values[key] for values in found]) for key in found[0]}, films


def compare_on_prompts(config, named, runtime):
    """`--prompts`: samples of each generator side by side."""
    rows = read_prompts(config.prompts)[:config.num_videos]
    dit_config = transformer_folder(next(iter(named.values())))[1]
    size = data.parse_size(config) or codec.sampling_defaults(dit_config)["size"]
    codec.fill_in(config, codec.sampling_defaults(dit_config, size[1]))
    for row in rows:
        if (row["image"] is not None) != (dit_config["model_type"] == "i2v"):
            raise InputError(f"--prompts {config.prompts}: an image in each row is needed by image-to-video models, and by those "
                             f"alone; these are {dit_config['model_type']}")
        if row["image"]:
            read_clip(row["image"], size=size, frames=1)
    if config.best_of > 1 and not config.reward:
        raise InputError(f"--best_of {config.best_of} needs a reward model: name one with --reward")
    for folder in named.values():                               # fails before any work
        for path in filter(None, (config.reward, config.judge)):
            load_pavrm(path, load_transformer(folder, whole=False), whole=False)
    negative = codec.sampling_defaults(dit_config)["negative_prompt"]
    contexts = codec.encode_texts(f"{config.model}/text_encoder", [row["prompt"] for row in rows]
                                  + [negative] * (negative is not None), runtime.device, dit_config["text_dim"])
    contexts |= {None: contexts[negative]} if negative is not None else {}
    held, found, films = own(config, runtime), {}, {}           # noqa: F841   as long as this function runs
    for name, folder in named.items():
        found[name], films[name] = sampled(config, folder, name, rows, contexts, size, runtime)
    first = next(iter(named))
    for values in found.values():
        values["dynamic"] = validation.dynamic_degree(values["flow"], found[first]["flow"]).astype(float)
    if runtime.rank > 0:
        return common.teardown()

    folder, metrics = Path(config.output_dir), [name for name in WATCHED if name in found[first]]
    for name in named:
        lines = [{"file_name": f"{i:06d}.mp4", "prompt": row["prompt"]} for i, row in enumerate(rows)]
        update_rows(folder / name / "metadata.jsonl", lines)
    means = {name: {metric: summary(values[metric]) for metric in metrics} for name, values in found.items()}
    against = {name: {metric: summary(found[name][metric] - found[first][metric]) for metric in metrics}
               for name in named if name != first}
    lines = table(["", *(WATCHED[metric] for metric in metrics)],
                  [[name, *(show(**row[metric]) for metric in metrics)] for name, row in means.items()])
    lines += table([f"above {first}", *(WATCHED[metric] for metric in metrics)],
                   [[name, *(show(**row[metric], sign="+") for metric in metrics)] for name, row in against.items()])
    replace_text(folder / "table.md", f"{len(rows)} prompts, same noise, {config.num_inference_steps} Euler steps, guidance "
                                     f"{config.guidance_scale:g}; 95 % bootstrap intervals.\n\n" + "\n".join(lines))
    runs.write_json(folder / "table.json", {"config": vars(config), "rows": means, "against_first": against})
    runs.write_json(folder / "per_video.json", {name: {key: x.round(5).tolist() for key, x in values.items()}
                                                for name, values in found.items()})
    few = range(min(SHOWN, len(rows)))
    side_by_side = wall({name: torch.stack([films[name][i] for i in few]) for name in named}, [rows[i]["prompt"] for i in few],
                        {name: (name,) for name in named})
    write_video(folder / "side_by_side.mp4", side_by_side, config.fps)
    strips = [torch.stack([validation.strip(films[name][i], 4) for i in few]) for name in named]
    contact_sheet(torch.cat(strips, 1), folder / "videos.png", scale=1)
    print("\n".join(lines))
    print(f"wrote {folder}/table.md, table.json, per_video.json, videos.png, side_by_side.mp4 and "
          + ", ".join(f"{name}/" for name in named))
    if len(named) > 1:
        other = list(named)[1]
        print(f"let people choose: python label.py --pairs {folder / first} {folder / other}")
    common.teardown()


# ---- clips that exist
def score_clips(config, runtime):
    """`--clips`: what a reward model thinks of each clip, and how right it is where labels are known."""
    common.refuse(config, ("best_of",), "with --clips")
    if config.checkpoints:
        raise InputError("--clips scores clips that exist: give no checkpoints")
    if not config.reward:
        raise InputError("--clips needs a reward model: name one with --reward")
    pavrm, source, folder, fit = load_pavrm(config.reward), Path(config.clips), Path(config.output_dir), ("size", "frames", "fps")
    wan = pavrm.trunk.config["text_len"] == codec.WAN_CONTEXT
    model = config.model or (None if wan else str(SHIPPED["t2v"]))
    if (source / "shards.json").exists():
        common.refuse(config, fit, "with --clips of shards, whose clips have theirs")
    elif not model:
        raise InputError("--clips: give --model too, the folder with the encoders that the reward model's generator came with")
    if not source.is_dir():
        raise InputError(f"--clips {source}: there is no such folder")
    held = own(config, runtime)                                 # noqa: F841   as long as this function runs
    if not (source / "shards.json").exists():
        flags = {name: getattr(config, name) for name in fit}
        flags |= {name: f"{model}/{name}" for name in ("vae", "text_encoder")}
        flags |= {"image_encoder": f"{model}/image_encoder"} if pavrm.trunk.config["image_dim"] else {}
        data.encode(data.Encode(str(source), out=str(folder / "latents"), **flags), runtime)
        source = folder / "latents"
    shards = data.Shards(source).relabel()
    data.require_fit(shards, pavrm.trunk, model)
    pavrm, rows = pavrm.to(runtime.device), []
    once = max(1, min(16, BATCH_LATENTS // math.prod(shards.latent_shape[1:])))
    for i in common.progress(range(0, len(shards), once), f"clips (x{once})"):
        indices = list(range(i, min(i + once, len(shards))))
        batch = shards.batch(indices)
        rows.append(validation.logits_by_t(
            pavrm, batch["latents"].to(runtime.device), batch["context"].to(runtime.device), config.seed, autocast=runtime.autocast,
            indices=indices, **image_inputs(pavrm.trunk.config, batch, runtime.device)).float().cpu())
    logits = torch.cat(rows, 1)                                                                     # [5, m]
    good, labels = torch.sigmoid(logits), shards.labels
    order = good.mean(0).argsort()
    folder.mkdir(parents=True, exist_ok=True)
    write_rows(folder / "scores.jsonl", [
        {"file_name": shards.rows[i]["file_name"], "prompt": shards.rows[i]["prompt"],
         "label": None if labels[i] < 0 else int(labels[i]), "good": round(good[:, i].mean().item(), 4),
         "good_by_t": [round(p, 4) for p in good[:, i].tolist()]} for i in order.tolist()])
    head = ["t in", *(f"({k / 5:.1f}, {(k + 1) / 5:.1f}]" for k in range(5))]
    cells = {"mean probability": good.mean(1).tolist(), "share called good": (logits >= 0).double().mean(1).tolist()}
    known = labels >= 0
    if len(labels[known].unique()) == 2:
        cells |= validation.metrics_by_t(logits[:, known], labels[known])
        curves = calibration(good[:, known], labels[known])
        runs.write_json(folder / "calibration.json", curves)
        drawn = {f"t in {t}": ([x["predicted"] for x in bins], [x["good"] for x in bins]) for t, bins in curves.items()}
        plot(folder / "calibration.png", {"share that is good": ("probability of good", {"exact": ([0, 1], [0, 1])} | drawn)})
    lines = table(head, [[name, *(f"{x:.3f}" for x in row)] for name, row in cells.items()])
    print("\n".join(lines))
    print(f"wrote {folder}/scores.jsonl: {len(shards)} clips, the worst first; {int(known.sum())} of them have labels")
    common.teardown()


def calibration(good, labels, bins=10):
    """{interval of t: [{"predicted", "good", "count"}]}: clips by the probability [5, m] given them, in ten equal steps (those
    that hold any); the mean of it, and the share that labels [m] call good."""
    found = {}
    for k, row in enumerate(good):
        place = (row * bins).long().clamp(max=bins - 1)
        found[f"({k / 5:.1f}, {(k + 1) / 5:.1f}]"] = [
            {"predicted": row[place == i].mean().item(), "good": (labels[place == i] == 1).double().mean().item(),
             "count": int((place == i).sum())} for i in range(bins) if (place == i).any()]
    return found


@torch.no_grad()
def main(config):
    runtime = common.setup(config.mixed_precision, config.seed)
    if config.clips:
        return score_clips(config, runtime)
    if not (config.checkpoints or config.model or config.prompts):
        config.checkpoints = (f"base={resolve_model(config)}",)
    named = dict(part.split("=", 1) if "=" in part else (Path(part).name, part) for part in config.checkpoints)
    if not named or len(named) < len(config.checkpoints):
        raise InputError("two checkpoints have one name: give them as name=folder" if named else
                         "give checkpoints to compare, or --clips with a folder of clips")
    for folder in named.values():
        resolve_model(config, folder)                                                   # all must be of one task
    if config.prompts:
        return compare_on_prompts(config, named, runtime)
    if any(transformer_folder(folder)[1]["text_len"] == codec.WAN_CONTEXT for folder in named.values()):
        raise InputError("the embedded world's prompts and annotator mean nothing to Wan2.1's generators: give --prompts FILE")
    codec.fill_in(config, {"num_videos": 512, "num_inference_steps": 16, "guidance_scale": 1.0})
    if runtime.world_size > 1:
        raise InputError("evaluate.py runs on one process without --prompts: start it without torchrun")
    cuts = search.parse_cuts(config.best_of, config.cuts)
    generators = {name: load_transformer(folder) for name, folder in named.items()}     # fails before any work
    text = load_text_encoder(f"{config.model}/text_encoder").to(runtime.device).eval()
    vae = load_vae(f"{config.model}/vae").to(runtime.device)
    reward = config.reward or (f"{config.model}/reward" if Path(f"{config.model}/reward").is_dir() else None)
    if config.best_of > 1 and not reward:
        raise InputError(f"--best_of {config.best_of} needs a reward model: name one with --reward")
    pavrms = {name: load_pavrm(reward, dit).to(runtime.device) for name, dit in generators.items()} if reward else {}
    n = config.num_videos
    seed = 7_000 + config.seed
    clean, prompts, _ = scene.make(n, seed, "clean", config.world, split=config.split)
    context = text.encode(prompts)                                                              # [n, l, d]
    given = vae.encode(from_pixels(clean.to(runtime.device)))                                   # [n, c, f, h, w]
    t = common.uniform(seed, "pavrm t", 0, range(n)).to(runtime.device)
    x1 = common.noise(given.shape[1:], seed, "pavrm x1", 0, range(n)).to(runtime.device)
    image_to_video = config.task == "i2v"
    y = first_frame_condition(given) if image_to_video else None                                # [n, 4 + c, f, h, w]

    held, found, videos = own(config, runtime), {}, {}          # noqa: F841   as long as this function runs
    for name, dit in generators.items():
        dit = dit.to(runtime.device).eval()
        latents = []
        for i in common.progress(range(0, n, 128), f"{name} (x128)"):
            j = range(i, min(n, i + 128))
            what = given.shape[1:], context[j], seed, j, config.num_inference_steps
            how = dict(guidance_scale=config.guidance_scale, y=None if y is None else y[j], autocast=runtime.autocast)
            if config.best_of > 1:
                found_best, passes = search.best_of(dit, pavrms[name], *what, cuts, **how)
            else:
                found_best = flow.sample(dit, *what, **how)
            latents.append(found_best)
        latents = torch.cat(latents)
        videos[name] = torch.cat([to_pixels(vae.decode(x)).cpu() for x in latents.split(128)])
        found[name] = measure(videos[name], prompts, clean if image_to_video else None)
        if reward:
            x_t = flow.add_noise(latents, x1, t)
            with runtime.autocast():
                logits = [pavrms[name](x_t[i:i + 128], t[i:i + 128], context[i:i + 128],
                                       y=None if y is None else y[i:i + 128]) for i in range(0, n, 128)]
            found[name]["pavrm"] = (torch.cat(logits) >= 0).double().cpu().numpy()
    videos["clean renders"] = torch.cat([to_pixels(vae.decode(x)).cpu() for x in given.split(128)])
    found["clean renders"] = measure(videos["clean renders"], prompts, clean if image_to_video else None)

    rows = {name: {metric: summary(values) for metric, values in metrics.items() if metric != "grade"}
            for name, metrics in found.items()}
    first = next(iter(named))
    pairs = {name: compare(found[first], found[name]) for name in named if name != first}
    folder = Path(config.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    tables = markdown(rows, pairs)
    searched = "" if config.best_of == 1 else f"the best of {config.best_of} by the reward, {passes:g} forward passes a video; "
    replace_text(folder / "table.md", f"{n} held-out prompts, same noise, {config.num_inference_steps} Euler steps; {searched}"
                                     "95 % bootstrap intervals.\n\n" + tables)
    runs.write_json(folder / "table.json", {"config": {k: v for k, v in vars(config).items()}, "rows": rows,
                                              "against_first": pairs})
    runs.write_json(folder / "per_video.json", {name: {metric: [round(v, 4) for v in values.astype(float).tolist()]
                                                         for metric, values in metrics.items()}
                                                  for name, metrics in found.items()})
    gap = torch.full_like(next(iter(videos.values()))[:8, :1], 255)                             # a white frame between
    bands = [part for name in named for part in (videos[name][:8, ::2], gap)][:-1]
    contact_sheet(torch.cat(bands, 1), folder / "videos.png", scale=2)
    few = min(8, n)
    side_by_side = wall({name: videos[name][:few] for name in named}, prompts[:few],
                        {name: (name, f"{rows[name]['qualified']['mean']:.0%} good") for name in named},
                        {name: found[name]["qualified"][:few] > 0 for name in named})
    write_video(folder / "side_by_side.mp4", side_by_side, fps=scene.FPS)
    write_gif(folder / "side_by_side.gif", side_by_side, fps=scene.FPS)
    print(tables)
    print(f"wrote {folder}/table.md, table.json, per_video.json, videos.png and side_by_side.mp4")
    print(f"look at {folder}/side_by_side.gif: the same prompts and noise, framed green where the annotator is content")
    common.teardown()


if __name__ == "__main__":
    common.cli(main, Config, __doc__)
