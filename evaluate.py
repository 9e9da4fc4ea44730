"""Checkpoints side by side on held-out prompts, with the same noise: quality, motion, hacking panel, intervals.

    python evaluate.py checkpoints runs/sft runs/prfl --output_dir results/mine
    python evaluate.py base=checkpoints prfl=runs/prfl --num_videos 512
    python evaluate.py --task i2v base=checkpoints/i2v prfl=runs/prfl_i2v
    python evaluate.py checkpoints --best_of 8                  search.py: of 8 candidates a video, what the reward keeps
    python evaluate.py checkpoints --split reworded             sentences in wordings that no training saw

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

Axes: b batch, c channels, f frames, h height, w width.
"""
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

import common
import flow
import search
from common import InputError, arg
from formats import runs
from formats.codec import load_text_encoder, load_vae
from formats.picture import wall, write_gif
from formats.video import contact_sheet, from_pixels, to_pixels, write_video
from formats.weights import TASKS, resolve_model
from model import first_frame_condition, load_transformer
from pavrm import load_pavrm
from report import interval, show, table
from world import judge, scene

TABLE = {"qualified": "qualified", "physical_qualified": "physical", "deformity_qualified": "deformity",
         "adherent": "adherent", "smoothness": "motion smoothness", "dynamic": "dynamic degree",
         "consistency": "subject consistency", "i2v_subject": "I2V subject", "pavrm": "PAVRM score",
         "speed": "speed", "brightness": "brightness", "saturation": "saturation"}


@dataclass
class Config:
    checkpoints: tuple[str, ...] = arg(..., "folders, or name=folder; the first is compared with", positional=True)
    output_dir: str = arg("runs/evaluate", "where tables and pictures go")
    task: str | None = arg(None, "t2v, or i2v (image-to-video); without, what the checkpoints are", choices=TASKS)
    model: str | None = arg(None, "folder with text_encoder/, vae/ and reward/; without, the shipped one of --task")
    reward: str | None = arg(None, "reward model of the PAVRM score; without, <model>/reward if there is one")
    size: str = arg("tiny", "size of the world", choices=tuple(scene.SIZES))
    num_videos: int = arg(512, "held-out prompts, one video each", above=0)
    num_inference_steps: int = arg(16, "Euler steps", above=0)
    guidance_scale: float = arg(1.0, "classifier-free guidance; 1 is none", at_least=0)
    best_of: int = arg(1, "candidates a video, of which the reward model keeps one (search.py)", above=0)
    cuts: str | None = arg(None, "when it drops them: time:candidates that stay, such as .75:4,.56:2,.37:1; 0:1 judges finished "
                           "ones alone; without, half at .75, a quarter at .56, one at .37")
    split: str = arg("test", "held-out sentences: test to report on, validation to choose on; reworded: with verbs, order and "
                     "phrases that training never sees", choices=("test", "validation", "reworded"))
    seed: int = arg(0, "of the noise and of the prompts, among the held-out ones", at_least=0)
    mixed_precision: str = arg("bf16", "autocast dtype", choices=("no", "bf16"))


def cutouts(videos, centers, side):
    """The subject of every frame, centred, background subtracted: float [b, f, side, side, 3].

    videos: uint8 [b, f, h, w, 3]; centers: [b, f, 2] in fractions, as `judge.annotate` tracks them.
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
    judged = judge.annotate(videos, prompts)
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
           **{name: judged[name] for name in judge.PANEL}}
    if given is not None:
        centers = judge.annotate(given, prompts)["center"][:, :1]
        out["i2v_subject"] = similar(subjects, cutouts(given[:, :1], centers, side).flatten(2)).mean(1)
    # What a person would rank by: axes first, then the prompt.
    grade = judged["physical"] + judged["deformity"] + 2 * judged["adherent"].long()
    return {name: values.double().numpy() for name, values in out.items()} | {"grade": grade.numpy()}


def summary(values):
    """values [m] -> {"mean", "interval"}: 95 %, from resampled videos."""
    return {"mean": float(values.mean()), "interval": interval(values[None])}


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


@torch.no_grad()
def main(config):
    runtime = common.setup(config.mixed_precision, config.seed)
    if runtime.world_size > 1:
        raise InputError("evaluate.py runs on one process: start it without torchrun")
    cuts = search.parse_cuts(config.best_of, config.cuts)
    named = dict(part.split("=", 1) if "=" in part else (Path(part).name, part) for part in config.checkpoints)
    if len(named) < len(config.checkpoints):
        raise InputError("two checkpoints have one name: give them as name=folder")
    for folder in named.values():
        resolve_model(config, folder)                                                   # all must be of one task
    generators = {name: load_transformer(folder) for name, folder in named.items()}     # fails before any work
    text = load_text_encoder(f"{config.model}/text_encoder").to(runtime.device).eval()
    vae = load_vae(f"{config.model}/vae").to(runtime.device)
    reward = config.reward or (f"{config.model}/reward" if Path(f"{config.model}/reward").is_dir() else None)
    if config.best_of > 1 and not reward:
        raise InputError(f"--best_of {config.best_of} needs a reward model: name one with --reward")
    pavrms = {name: load_pavrm(reward, dit).to(runtime.device) for name, dit in generators.items()} if reward else {}
    n = config.num_videos
    seed = 7_000 + config.seed
    clean, prompts, _ = scene.make(n, seed, "clean", config.size, split=config.split)
    context = text.encode(prompts)                                                              # [n, l, d]
    given = vae.encode(from_pixels(clean.to(runtime.device)))                                   # [n, c, f, h, w]
    t = common.uniform(seed, "pavrm t", 0, range(n)).to(runtime.device)
    x1 = common.noise(given.shape[1:], seed, "pavrm x1", 0, range(n)).to(runtime.device)
    image_to_video = config.task == "i2v"
    y = first_frame_condition(given) if image_to_video else None                                # [n, 4 + c, f, h, w]

    found, videos = {}, {}
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
    (folder / "table.md").write_text(f"{n} held-out prompts, same noise, {config.num_inference_steps} Euler steps; {searched}"
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
