"""What is watched while training: a reward model's accuracy on held-out videos, and a generator's samples of held-out
prompts, always from the same noise.

On the embedded world the annotator judges the samples. On clips of one's own nobody does, so there is a panel (`panel`),
each value beside that at step 0 and that of real clips; and, with --judge, a second reward model, trained on other clips
and from another seed than the one that is climbed: where its opinion falls while the reward still rises, the reward is
being exploited. best/ keeps the weights whose samples were liked best.

Axes: b batch, m held-out videos, c channels, f frames, h height, w width, F H W of pixels, l text tokens.
"""
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import common
import data
import flow
from common import InputError, arg, noise, uniform
from flow import add_noise
from formats import codec, disk, fingerprint, runs
from formats.metadata import from_json
from formats.prompts import read_prompts
from formats.video import SPACE, TIME, contact_sheet, from_pixels, read_clip, write_video
from model import first_frame_condition, image_inputs
from pavrm import load_pavrm
from scale import parallel
from world import annotator, scene

T_BINS = 5                                                   # of t, in the paper's reward-model tables
SEED, SHOWN = 900, 8                                            # of the samples' noise; of them, on the disk
GROUP_LATENTS = 2 ** 11                                         # latent positions of a batch of samples
# A judge's score: how likely it calls the samples good, less this times how likely it calls them so for another prompt. A judge
# of the same base is fooled in the end as the climbed reward is, and its opinion alone goes on rising while an annotator sees
# worse; but it then likes a sample whatever was asked for. Chosen on three seeds' runs: results/stopping.md.
OTHER_PROMPT = 0.5
DEAF = 0.9                                                      # prompt_auc below which a reward hardly reads its prompt
PANEL = ("speed", "flow", "brightness", "saturation", "sharpness")


# ---- what can be said of pixels without an annotator
def largest_flow(videos, side=64):
    """How fast the fastest 5 % of a video moves: optical flow in widths per frame, [b]. videos: uint8 [b, F, H, W, 3].

    Least squares over windows of 5x5 pixels (Lucas and Kanade) at about `side` pixels of height; motion of more than two
    such pixels a frame is told apart from less, but not measured.
    """
    b, frames = videos.shape[:2]
    gray = videos.float().mean(-1).div_(255).flatten(0, 1)[:, None]                             # [b F, 1, H, W]
    scale = min(1.0, side / gray.shape[2])
    gray = F.interpolate(gray, scale_factor=scale, mode="area") if scale < 1 else gray
    gray = gray[:, 0].unflatten(0, (b, frames))                                                 # [b, F, h, w]
    middle = F.pad((gray[:, 1:] + gray[:, :-1]) / 2, (1, 1, 1, 1), mode="replicate")
    dx = (middle[..., 1:-1, 2:] - middle[..., 1:-1, :-2]) / 2
    dy = (middle[..., 2:, 1:-1] - middle[..., :-2, 1:-1]) / 2
    dt = gray[:, 1:] - gray[:, :-1]
    window = lambda z: F.avg_pool2d(z, 5, stride=1, padding=2)
    xx, yy, xy, xt, yt = window(dx * dx) + 1e-4, window(dy * dy) + 1e-4, window(dx * dy), window(dx * dt), window(dy * dt)
    det = xx * yy - xy * xy
    u, v = (xy * yt - yy * xt) / det, (xy * xt - xx * yt) / det                                 # [b, F - 1, h, w] in pixels
    length = (u.square() + v.square()).sqrt().flatten(1) / gray.shape[3]
    return length.topk(max(1, length.shape[1] // 20), 1).values.mean(1)


def panel(videos):
    """{name: [b]} of uint8 videos [b, F, H, W, 3]: what a generator changes when it games a reward. speed: mean absolute
    difference of neighbouring frames; flow: `largest_flow`; brightness, saturation: means of max and of max - min of RGB;
    sharpness: mean absolute difference of neighbouring pixels. All but flow in pixels from 0 to 1."""
    rows = []
    for video in videos:                                        # one at a time: 81 frames of 832x480 are 388 MB in float32
        x = video.float() / 255                                                                 # [F, H, W, 3]
        high, low, gray = x.amax(-1), x.amin(-1), x.mean(-1)
        sharp = (gray[:, 1:] - gray[:, :-1]).abs().mean() + (gray[:, :, 1:] - gray[:, :, :-1]).abs().mean()
        rows.append([(x[1:] - x[:-1]).abs().mean(), largest_flow(video[None])[0], high.mean(), (high - low).mean(), sharp])
    return dict(zip(PANEL, torch.tensor(rows).T))


def dynamic_degree(fastest, real):
    """Share of videos that move: whose `largest_flow` is over half of the real clips' median. Both [m] -> bool [m]"""
    return np.asarray(fastest) > np.median(real) / 2


# ---- samples of held-out prompts
@dataclass
class Flags:
    """What train_align.py takes for what is watched, and for what stays of it."""
    keep: int = arg(2, "checkpoints that stay, the newest, beside best/", above=0)
    validation_steps: int = arg(40, "iterations between validations", above=0, only="!num_validation 0")
    num_validation: int | None = arg(None, "held-out prompts whose samples are watched, 0: none; without, 128 of the embedded "
                                     "world, or 8 clips of --data, a fifth at most, which are not trained on", at_least=0)
    validation_prompts: str | None = arg(None, "file of other prompts to watch (.txt, .jsonl, .csv)",
                                         only="data, !num_validation 0")
    guidance_scale: float | None = arg(None, "of the samples that are watched; without, the model's own", at_least=0,
                                       only="!num_validation 0")
    judge: str | None = arg(None, "second reward model, which is only watched: its opinion chooses best/", only="!num_validation 0")
    patience: int | None = arg(None, "stop after so many validations without gain of the judge, or the annotator", above=0,
                               only="!num_validation 0")


def check_flags(config):
    """Raises InputError for flags of train_align.py about what is watched and kept that cannot work."""
    if config.patience and config.data and not config.judge:
        raise InputError("--patience needs an opinion of the samples: name a second reward model with --judge")
    if config.export == "lora" and not (config.lora or config.lora_rank):
        raise InputError("--export lora writes adapters: give --lora_rank or --lora too, or leave it out")


def hold_out(config, curated):
    """-> (clips of own data to train on, those held out: num_validation of them); fills in how many that is."""
    if config.num_validation is None:
        config.num_validation = min(8, len(curated) // 5) if config.data else 128
    if not config.num_validation:
        common.refuse(config, ("validation_steps", "validation_prompts", "guidance_scale", "judge", "patience"),
                      f"where nothing is watched, as of {len(curated)} clips no fifth can be held out (--num_validation)")
    if config.data and config.num_validation >= len(curated):
        raise InputError(f"--num_validation {config.num_validation} leaves nothing to train on: there are {len(curated)} clips")
    train, held = data.split(len(curated), config.num_validation if config.data else 0, config.seed)
    return curated[train], curated[held]


def held_out_prompts(config, dit_config, shards, held, vae, device):
    """What is sampled: (prompts, contexts: m of [l, d], {y, clip}: [m, ...], latent shape, clean clips uint8 or None).

    The embedded world's validation sentences, or --validation_prompts, or the prompts of held-out clips of the data.
    """
    n, i2v = config.num_validation, dit_config["model_type"] == "i2v"
    if not config.data:
        clips, prompts, _ = scene.make(n, SEED, "clean", config.world, split="validation")
        contexts = list(codec.load_text_encoder(f"{config.model}/text_encoder").to(device).encode(prompts).cpu())
        y = first_frame_condition(vae.encode(from_pixels(clips.to(device)))) if i2v else None
        return prompts, contexts, {"y": y.cpu()} if i2v else {}, scene.LATENT_SHAPES[config.world]
    if not config.validation_prompts:
        batch = shards.batch(held)
        return batch["prompt"], list(batch["context"]), image_inputs(dit_config, batch, "cpu"), shards.latent_shape
    rows = read_prompts(config.validation_prompts)[:n]
    prompts, image = [row["prompt"] for row in rows], {}
    if bad := [row["prompt"] for row in rows if (row["image"] is not None) != i2v]:
        raise InputError(f"--validation_prompts {config.validation_prompts}: {bad[0]!r} has {'no' if i2v else 'an'} image, "
                         f"the model is {dit_config['model_type']}")
    if i2v:
        _, f, h, w = shards.latent_shape
        first = torch.stack([read_clip(row["image"], size=(SPACE * w, SPACE * h), frames=1)[0][0] for row in rows]).to(device)
        clip = codec.load_image_encoder(f"{config.model}/image_encoder").to(device) if dit_config["image_dim"] else None
        given = [codec.image_conditions(dit_config, vae, clip, frame, TIME * (f - 1) + 1) for frame in first.split(1)]
        image = {name: torch.cat([one[name] for one in given]).cpu() for name in given[0]}
    contexts = codec.encode_texts(f"{config.model}/text_encoder", prompts, device, dit_config["text_dim"])
    return prompts, [contexts[prompt] for prompt in prompts], image, shards.latent_shape


@torch.no_grad()
def make_validation(config, runtime, policy, shards=None, held=None, export=None):
    """-> validate(policy, step, log=None) -> {validation_<name>: mean over videos}, the same on every rank; every rank must
    call it. log: a runs.MetricsLog, to show videos.

    config: train_align.py's. shards, held: own data, and the clips of it that are not trained on. export(path):
    writes the policy; best/ in the run folder keeps what it writes of the best step. Draws samples/step-<step>.png, and
    writes the first eight samples as mp4, all values by video as json. Raises InputError before anything is trained if
    encoders, prompts or judge do not fit.
    """
    device, folder, own, dit_config = runtime.device, Path(config.output_dir) / "samples", bool(config.data), policy.config
    vae = codec.load_vae(f"{config.model}/vae").to(device)
    prompts, contexts, image, shape = held_out_prompts(config, dit_config, shards, held, vae, device)
    null = None if config.guidance_scale == 1 else codec.null_context(dit_config, "negative", config.data, config.model, device)
    second = load_pavrm(config.judge, policy, whole=False) if config.judge else None
    if second and config.reward and fingerprint.of_weights(config.judge) == fingerprint.of_weights(config.reward):
        raise InputError(f"--judge {config.judge}: is the reward model that is climbed: train another one, on other clips (--fold)")
    if second:
        parallel.shard(second, runtime, config)
    fps = shards.fps if own else scene.FPS
    size = max(1, GROUP_LATENTS // (shape[1] * shape[2] * shape[3]))
    groups = [list(range(i, min(i + size, len(prompts)))) for i in range(0, len(prompts), size)]

    def latents_of(policy, group):
        j = torch.tensor(group)
        context = codec.stack_contexts([contexts[i] for i in group]).to(device)
        given = {name: x[j].to(device) for name, x in image.items()}
        x = flow.sample(policy, shape, context, SEED, group, config.num_inference_steps, shift=config.shift,
                        guidance_scale=config.guidance_scale, null=null, autocast=runtime.autocast, **given)
        found = {}
        if second:
            other = codec.stack_contexts([contexts[(i + 1) % len(contexts)] for i in group]).to(device)
            logits, strangers = (logits_by_t(second, x, asked, SEED, autocast=runtime.autocast, indices=group, **given)
                                 for asked in (context, other))
            found = {f"judge_t{k + 1}": row.float().cpu() for k, row in enumerate(logits)}
            found |= {name: torch.sigmoid(row.float()).mean(0).cpu() for name, row in
                      (("judge", logits), ("judge_other_prompt", strangers))}
        return x, found

    def measured(videos, group):
        if own:
            return panel(videos)
        found = annotator.annotate(videos, [prompts[i] for i in group])
        grades = {f"{axis}_qualified": found[axis] == 2 for axis in ("physical", "deformity")}
        return {"qualified": found["qualified"], **grades, **{name: found[name] for name in annotator.PANEL}}

    def table(rows):
        """[(index, {name: value})] of every rank -> {name: values in order}"""
        rows = [values for _, values in sorted(sum(common.gather(rows), []), key=lambda row: row[0])]
        return {name: [float(row[name]) for row in rows] for name in rows[0]}

    def split(group, found):
        return [(i, {name: values[k] for name, values in found.items()}) for k, i in enumerate(group)]

    def held_out_loss(policy):
        """Eq. 10 on the held-out clips, at four fixed times each."""
        rows = []
        for group, keep in parallel.work_of_rank([held[i:i + size].tolist() for i in range(0, len(held), size)], runtime,
                                             config.parallel):
            batch, losses = shards.batch(group), 0
            x0, context = batch["latents"].to(device), batch["context"].to(device)
            for k in range(4):
                x1 = noise(x0.shape[1:], SEED, "held-out x1", k, group).to(device)
                t = torch.full((len(x0),), (k + 0.5) / 4, device=device)
                with runtime.autocast():
                    v = policy(add_noise(x0, x1, t), t, context, **image_inputs(dit_config, batch, device))
                losses += (v.float() - (x1 - x0)).square().flatten(1).mean(1).cpu() / 4
            rows += split(group, {"sft_loss": losses}) if keep else []
        return table(rows)

    real = {}                                                   # the held-out clips, through the same VAE
    if own:
        rows = []
        for i, keep in parallel.work_of_rank(held.tolist(), runtime, "ddp"):
            with codec.on(vae, device):
                film = codec.decode_pixels(vae, shards.batch([i])["latents"].to(device))
            rows += split([i], panel(film)) if keep else []
        real = table(rows)
        real["dynamic"] = dynamic_degree(real["flow"], real["flow"]).tolist()
    history = None                                              # known when the run has started

    @torch.no_grad()
    def validate(policy, step, log=None):
        nonlocal history
        history = past_scores(config.output_dir) if history is None else history
        rows, films = [], []
        for group, keep in parallel.work_of_rank(groups, runtime, config.parallel):
            x, found = latents_of(policy, group)
            if keep:
                with codec.on(vae, device):
                    videos = codec.decode_pixels(vae, x)
                rows += split(group, measured(videos, group) | found)
                films += [(i, video) for i, video in zip(group, videos) if i < SHOWN]
        found = table(rows)
        if own:
            found["dynamic"] = dynamic_degree(found["flow"], real["flow"]).tolist()
            found |= held_out_loss(policy)
        for i, video in films:
            write_video(folder / f"step-{step:06d}" / f"{i}.mp4", video, fps)
        strips = [video for _, video in sorted(sum(common.gather([(i, strip(video)) for i, video in films]), []),
                                               key=lambda one: one[0])]
        means = {f"validation_{name}": float(np.mean(values)) for name, values in found.items()}
        score = judges_score(means) if second else means.get("validation_qualified")
        if score is not None:
            history.append(score)
            since = len(history) - 1 - history.index(max(history))
            means |= {"validation_score": score, "validation_since_best": since}
            if since == 0 and step and export:
                save_best(config.output_dir, policy, export, {"step": step, "score": score, "judge": config.judge or "annotator"})
        if runtime.rank == 0:
            contact_sheet(torch.stack(strips), folder / f"step-{step:06d}.png", scale=1 if own else 3)
            runs.write_json(folder / f"step-{step:06d}.json", {"prompts": prompts, "values": found, "real": real})
            show(step, means, real, folder)
            if log:
                log.videos(step, folder / f"step-{step:06d}")
        return means

    return validate


def shrunk(video, side):
    """A uint8 video [F, H, W, 3] whose longer side is at most `side`."""
    scale = side / max(video.shape[1:3])
    if scale >= 1:
        return video
    small = F.interpolate(video.permute(0, 3, 1, 2).float(), scale_factor=scale, mode="area")
    return small.permute(0, 2, 3, 1).round().to(torch.uint8)


def strip(video, count=9, side=96):
    """A few frames of a uint8 video [F, H, W, 3], small: for a contact sheet. -> uint8 [count, h, w, 3]"""
    return shrunk(video[torch.linspace(0, len(video) - 1, min(count, len(video))).round().long()], side)


def show(step, means, real, folder):
    """Prints the means; on own data each beside its value at step 0 and that of the real clips."""
    if not real:
        tqdm.write("  ".join([f"iteration {step}"] + [f"{name.removeprefix('validation_')} {value:.3f}"
                                                      for name, value in means.items()]))
        return
    try:
        start = {name: np.mean(values) for name, values in from_json((folder / "step-000000.json").read_text())["values"].items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        start = {}                                              # not there, or damaged
    cell = lambda value: " " * 11 if value is None else f"{value:11.4f}"
    lines = [f"iteration {step:<7}" + "".join(f"{name:>11}" for name in ("now", "step 0", "real clips"))]
    for name, value in means.items():
        name = name.removeprefix("validation_")
        lines.append(f"{name:17}{value:11.4f}{cell(start.get(name))}{cell(real.get(name) and np.mean(real[name]))}".rstrip())
    tqdm.write("\n".join(lines))


def judges_score(means):
    """What chooses best/ where a judge watches; means: a row of metrics.jsonl."""
    return means["validation_judge"] - OTHER_PROMPT * means["validation_judge_other_prompt"]


def past_scores(output_dir):
    """Scores of the validations that metrics.jsonl holds: those of the run that is resumed. The same on every rank."""
    path, found = Path(output_dir) / "metrics.jsonl", []
    if common.rank() == 0 and path.exists():
        scores = [json.loads(line).get("validation_score") for _, line in runs.read_metrics(path)]
        found = [score for score in scores if isinstance(score, (int, float))]
    return common.gather(found)[0]


def save_best(output_dir, policy, export, note):
    """Replaces best/ in the run folder by the policy's weights and best.json. Every rank must call it."""
    best = Path(output_dir) / "best"
    new = best.with_name("best.tmp")
    if common.rank() == 0:
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir()
    export(new / "transformer")
    if common.rank() == 0:
        runs.write_json(new / "best.json", note)
        disk.put(new, best)
    common.gather(None)                                         # nobody goes on before it is there


# ---- reward models
def auc(scores, labels):
    """Probability that a good one scores above a bad one, ties counted half; nan if one kind is missing."""
    good, bad = scores[labels == 1], scores[labels == 0]
    wins = (good[:, None] > bad[None]).double() + 0.5 * (good[:, None] == bad[None]).double()
    return wins.mean().item() if wins.numel() else float("nan")


@torch.no_grad()
def logits_by_t(model, latents, context, seed=0, batch_size=256, autocast=None, indices=None, **image):
    """Section 4's test: logits [5, m] of m videos, each noised to one random t in every fifth of (0, 1].

    latents [m, c, f, h, w], context [m, l, d_text], image: y and clip [m, ...] (i2v). t and noise depend on seed, interval
    and the video's number only: indices [m], or its place.
    """
    rows, (device, m) = [], (latents.device, len(latents))
    indices = range(m) if indices is None else indices
    for k in range(T_BINS):
        t = ((k + uniform(seed, "interval t", k, indices)) / T_BINS).to(device)
        x1 = noise(latents.shape[1:], seed, "interval noise", k, indices).to(device)
        for i in range(0, m, batch_size):
            j = slice(i, i + batch_size)
            with autocast() if autocast else torch.autocast(device.type, enabled=False):
                rows.append(model(add_noise(latents[j], x1[j], t[j]), t[j], context[j],
                                  **{name: z[j] for name, z in image.items()}))
    return torch.cat(rows).view(T_BINS, m)


def metrics_by_t(logits, labels):
    """{"accuracy", "balanced_accuracy", "auc"} of logits [5, m] and labels [m] in {0, 1}: lists of five numbers, from
    [0, .2] to (.8, 1]. Accuracy counts logit >= 0 as good; balanced accuracy is the mean over the two labels, .5 for a
    constant answer whatever the share of good videos."""
    right = ((logits >= 0) == (labels == 1)).float()                                                # [5, m]
    balanced = (right[:, labels == 1].mean(1) + right[:, labels == 0].mean(1)) / 2
    return {"accuracy": right.mean(1).tolist(), "balanced_accuracy": balanced.tolist(),
            "auc": [auc(row, labels) for row in logits]}


def make_reward_report(reward_fn, batch, generator_config, config, runtime):
    """-> measure() -> (report, its averages over t for the log); rank 0 prints it as the paper's table.

    reward_fn(x_t, t, context, **image) -> logits [b]; config: train_reward.py's; batch: held-out latents
    [m, c, f, h, w], context [m, l, d_text], label [m] and prompt. The report holds accuracy, balanced_accuracy and auc: five
    numbers each, by t (metrics_by_t), and under "clean" one each, of the videos at t = 0. prompt_accuracy and prompt_auc
    say whether the reward reads its prompt: how well it tells the good videos with their own prompt from the same videos with
    another's. They are missing where all prompts are alike.
    """
    x0, context, labels = (batch[name].to(runtime.device) for name in ("latents", "context", "label"))
    zero = torch.zeros(len(x0), device=runtime.device)                                                  # t
    image = image_inputs(generator_config, batch, runtime.device)

    good = (labels == 1).nonzero()[:, 0]
    groups = data.prompt_groups(batch["prompt"])
    others = None
    if len(torch.unique(groups)) > 1:
        others = context[data.other_rows(groups, good.cpu(), config.seed, 0, good.tolist())]                # [m', l, d]

    def logits_of(rows, context):
        """-> logits [6, m'] of the held-out videos `rows` with these contexts: by t, and of the clean videos."""
        given = {name: z[rows] for name, z in image.items()}
        found = logits_by_t(reward_fn, x0[rows], context, config.seed, 4 * config.batch_size, runtime.autocast,
                                rows.tolist(), **given)
        clean = []
        for j in torch.arange(len(rows)).split(4 * config.batch_size):
            with runtime.autocast():
                clean.append(reward_fn(x0[rows[j]], zero[rows[j]], context[j], **{name: z[j] for name, z in given.items()}))
        return torch.cat([found, torch.cat(clean)[None].to(found.dtype)])

    @torch.no_grad()
    def measure():
        logits = logits_of(torch.arange(len(x0), device=x0.device), context)
        found = metrics_by_t(logits, labels)
        if others is not None:
            wrong = logits_of(good, others)
            told = metrics_by_t(torch.cat([logits[:, good], wrong], 1),
                                    torch.tensor([1] * len(good) + [0] * len(good), device=x0.device))
            found |= {"prompt_accuracy": told["accuracy"], "prompt_auc": told["auc"]}
        clean = {name: row.pop() for name, row in found.items()}
        averages = {name: sum(row) / len(row) for name, row in found.items()}
        if runtime.rank == 0:
            tqdm.write("held out, t in    " + "".join(f"  ({k / 5:.1f},{(k + 1) / 5:.1f}]" for k in range(5))
                       + "   average     clean")
            for name, row in found.items():
                tqdm.write(f"{name:18}" + "".join(f"{v:11.3f}" for v in [*row, averages[name], clean[name]]))
            if clean.get("prompt_auc", 1) < DEAF:
                tqdm.write(f"note: good videos with their own prompt and with another's are told apart with AUC "
                           f"{clean['prompt_auc']:.2f}, where .5 is chance: this reward hardly reads the prompt; train with "
                           "--mismatched .25")
        return found | {"clean": clean}, {f"held_out_{name}": value for name, value in averages.items()}

    return measure
