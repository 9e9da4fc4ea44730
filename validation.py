"""Validation while training: a reward model's accuracy on held-out videos, and a generator's samples of
held-out prompts, always from the same noise.

On the embedded world the annotator grades the samples. Nobody grades samples of your own data, so there are
other measures. `panel` gives values that are shown beside those at step 0 and those of real clips. With
--judge a second reward model scores the samples. It was trained on other clips and from another seed than the
first, and the generator is never trained against it. If the judge's probability falls while the reward still
rises, the generator exploits the reward. best/ keeps the weights whose samples scored best.

Axes: b batch, m held-out videos, c channels, f frames, h height, w width, F H W the same in pixels, l text
tokens.
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
import experts
import families
import flow
from common import InputError, arg, noise, uniform
from flow import add_noise
from formats import disk, encoders, fingerprint, runs
from formats.metadata import from_json
from formats.prompts import read_prompts
from formats.video import contact_sheet, from_pixels, write_video
from model import image_inputs
from pavrm import load_pavrm
from scale import parallel
from world import annotator, scene

T_BINS = 5                                              # fifths of t, as in the paper's reward-model tables
SEED = 900                                              # seed of the samples' noise
SHOWN = 8                                               # samples of each validation that are kept as mp4
GROUP_LATENTS = 2 ** 11                                 # latent positions of a batch of samples
# A judge's score is its probability that the samples are good, minus this weight times its probability that
# they are good with another prompt. A judge made from the same base model is fooled in the end, as the reward
# model is: its probability of "good" keeps rising while an annotator sees worse videos. But by then it also
# calls samples with another prompt good. The weight was chosen on runs of three seeds (results/stopping.md).
OTHER_PROMPT_WEIGHT = 0.5
LOW_PROMPT_AUC = 0.9                                    # prompt_auc below which a reward hardly reads prompts
PANEL = ("speed", "flow", "brightness", "saturation", "sharpness")


# ---- what pixels tell without an annotator
def largest_flow(videos, side=64):
    """How fast the fastest 5 % of a video moves: optical flow in widths per frame, [b].

    videos: uint8 [b, F, H, W, 3]. The method is least squares over windows of 5x5 pixels (Lucas and Kanade)
    in frames of about `side` pixels of height. If something moves by more than two such pixels per frame, the
    flow says that it is fast, but not how fast.
    """
    b, frames = videos.shape[:2]
    gray = videos.float().mean(-1).div_(255).flatten(0, 1)[:, None]                         # [b F, 1, H, W]
    scale = min(1.0, side / gray.shape[2])
    gray = F.interpolate(gray, scale_factor=scale, mode="area") if scale < 1 else gray
    gray = gray[:, 0].unflatten(0, (b, frames))                                                 # [b, F, h, w]
    middle = F.pad((gray[:, 1:] + gray[:, :-1]) / 2, (1, 1, 1, 1), mode="replicate")
    dx = (middle[..., 1:-1, 2:] - middle[..., 1:-1, :-2]) / 2
    dy = (middle[..., 2:, 1:-1] - middle[..., :-2, 1:-1]) / 2
    dt = gray[:, 1:] - gray[:, :-1]

    def window(z):
        return F.avg_pool2d(z, 5, stride=1, padding=2)

    xx, yy, xy = window(dx * dx) + 1e-4, window(dy * dy) + 1e-4, window(dx * dy)
    xt, yt = window(dx * dt), window(dy * dt)
    det = xx * yy - xy * xy
    u, v = (xy * yt - yy * xt) / det, (xy * xt - xx * yt) / det                 # [b, F - 1, h, w] in pixels
    length = (u.square() + v.square()).sqrt().flatten(1) / gray.shape[3]
    return length.topk(max(1, length.shape[1] // 20), 1).values.mean(1)


def panel(videos):
    """uint8 videos [b, F, H, W, 3] -> {name: [b]}, measures that change when a generator games its reward.

    speed: mean absolute difference of neighbouring frames; flow: `largest_flow`; brightness and saturation:
    means of max and of max - min of RGB; sharpness: mean absolute difference of neighbouring pixels. Pixels
    are from 0 to 1.
    """
    rows = []
    for video in videos:  # one at a time: 81 frames of 832x480 are 388 MB in float32
        x = video.float() / 255                                                             # [F, H, W, 3]
        high, low, gray = x.amax(-1), x.amin(-1), x.mean(-1)
        speed = (x[1:] - x[:-1]).abs().mean()
        dy, dx = gray[:, 1:] - gray[:, :-1], gray[:, :, 1:] - gray[:, :, :-1]
        sharpness = dy.abs().mean() + dx.abs().mean()
        rows.append([speed, largest_flow(video[None])[0], high.mean(), (high - low).mean(), sharpness])
    return dict(zip(PANEL, torch.tensor(rows).T))


def dynamic_degree(fastest, real):
    """Which videos move, bool [m]: their `largest_flow` [m] is above half of the real clips' median."""
    return np.asarray(fastest) > np.median(real) / 2


# ---- samples from held-out prompts
@dataclass
class Flags:
    """train_align.py's flags about validation, and about what a run keeps."""
    keep: int = arg(2, "how many of the newest checkpoints are kept; best/ is always kept", above=0)
    validation_steps: int = arg(40, "iterations between validations", above=0, only="!num_validation 0")
    num_validation: int | None = arg(None, "number of held-out prompts to sample at each validation; 0: "
                                     "none. Default: 128 sentences of the embedded world; with --data the "
                                     "prompts of 8 clips (at most a fifth of all), which are kept out of "
                                     "training", at_least=0)
    validation_prompts: str | None = arg(None, "file of prompts (.txt, .jsonl, .csv), of which the first "
                                         "--num_validation, by default 8, are sampled at validations instead "
                                         "of those of the held-out clips",
                                         only="data, !num_validation 0")
    guidance_scale: float | None = arg(None, "scale of classifier-free guidance for the validation samples; "
                                       "default: the model's", at_least=0, only="!num_validation 0")
    guidance_scale_2: float | None = arg(None, "guidance scale of the low-noise one of two experts (Wan2.2 "
                                         "A14B); default: --guidance_scale if that is given, else the "
                                         "model's", at_least=0, only="!num_validation 0")
    judge: str | None = arg(None, "folder of a second reward model, which the generator is never trained "
                            "against; it scores the validation samples, and best/ keeps the weights with the "
                            "highest score", only="!num_validation 0")
    patience: int | None = arg(None, "stop after this many validations without a new best score from the "
                               "judge or the annotator; with --data this needs --judge. Default: never stop "
                               "early", above=0, only="!num_validation 0")


def default_number(shards):
    """The value of num_validation if no flag gives it. shards: the user's data, or None for the embedded
    world."""
    if shards is None:
        return 128
    return min(8, int((shards.labels != 0).sum()) // 5)


def check_flags(config, num_validation):
    """Raises InputError for flags of train_align.py about validation and export that cannot work.

    config: as the flags were given. num_validation: the value of that setting, given or not.
    """
    if not num_validation:
        names = ("validation_steps", "validation_prompts", "guidance_scale", "guidance_scale_2", "judge",
                 "patience")
        why = "without validation, as no fifth of the clips can be held out (--num_validation)"
        common.refuse(config, names, why)
    if config.patience and config.data and not config.judge:
        raise InputError("--patience needs scores of the samples: name a second reward model with --judge")
    if config.export == "lora" and not (config.lora or config.lora_2 or config.lora_rank):
        raise InputError("--export lora writes adapters: give --lora_rank or --lora too, or leave it out")


def hold_out(config, shards, curated):
    """Splits the curated clips of the user's data -> (clips to train on, num_validation held-out clips).

    No clip to train on is a copy of a held-out clip or, if there are enough prompts, has the prompt of a
    held-out clip. Raises InputError if nothing would be left to train on.
    """
    if config.num_validation >= len(curated):
        raise InputError(f"--num_validation {config.num_validation} leaves nothing to train on: there are "
                         f"{len(curated)} clips")
    train, held_out = data.split(len(curated), config.num_validation, config.seed)
    if not len(held_out):
        return curated, curated[held_out]
    return data.without_relatives(shards, curated[train], curated[held_out]), curated[held_out]


def held_out_prompts(config, dit_config, shards, held_out, vae, device):
    """What is sampled -> (prompts, contexts: m of [l, d], image conditions: [m, ...], latent shape).

    The prompts are the embedded world's validation sentences, or --validation_prompts, or those of the
    held-out clips.
    """
    n, i2v = config.num_validation, dit_config["model_type"] == "i2v"
    if not config.data:
        clips, prompts, _ = scene.make(n, SEED, "clean", config.world, split="validation")
        text = families.load_text_encoder(f"{config.model}/text_encoder").to(device)
        contexts = list(text.encode(prompts).cpu())
        image = {}
        if i2v:
            image = image_inputs(dit_config, {"latents": vae.encode(from_pixels(clips.to(device)))}, "cpu")
        return prompts, contexts, image, scene.LATENT_SHAPES[config.world]
    if not config.validation_prompts:
        batch = shards.batch(held_out)
        image = image_inputs(dit_config, batch, "cpu")
        return batch["prompt"], list(batch["context"]), image, shards.latent_shape
    rows = read_prompts(config.validation_prompts)[:n]
    prompts = [row["prompt"] for row in rows]
    for row in rows:
        if (row["image"] is not None) != i2v:
            raise InputError(f"--validation_prompts {config.validation_prompts}: {row['prompt']!r} has "
                             f"{'no' if i2v else 'an'} image, the model is {dit_config['model_type']}")
    families.require_encoders(dit_config, config.model, f"--model {config.model}")
    size = families.video_size(dit_config, shards.latent_shape)
    frames = families.of_config(dit_config).time * (shards.latent_shape[1] - 1) + 1
    image_encoder = None
    if dit_config["image_dim"]:
        image_encoder = families.load_image_encoder(f"{config.model}/image_encoder")
    image = families.conditions_of_images(dit_config, vae, image_encoder, [row["image"] for row in rows],
                                          size, frames, device)
    contexts = families.encode_prompts(f"{config.model}/text_encoder", prompts, device)
    image = {name: x.cpu() for name, x in image.items()}
    return prompts, [contexts[prompt] for prompt in prompts], image, shards.latent_shape


def by_video(group, values):
    """values {name: [b]} of the videos whose numbers are `group` -> [(number, {name: float}), ...]"""
    return [(i, {name: float(x[k]) for name, x in values.items()}) for k, i in enumerate(group)]


def gather_values(rows):
    """rows: what `by_video` returned on this rank -> {name: [value of video 0, 1, ...]}, from all ranks and
    on all ranks. Every rank must call it."""
    rows = [values for _, values in sorted(sum(common.gather(rows), []), key=lambda row: row[0])]
    return {name: [row[name] for row in rows] for name in rows[0]}


@torch.no_grad()
def make_validation(config, runtime, policy, shards=None, held_out=None, export=None):
    """-> validate(policy, step, log=None) -> {validation_<name>: mean over videos}, the same on every rank.

    Every rank must call it. log: a runs.MetricsLog, to show videos in TensorBoard.

    config: train_align.py's. shards, held_out: the user's data, and the indices of its clips that are kept
    out of training. export(path) writes the policy; best/ in the run folder keeps what it wrote at the best
    step. Every validation draws samples/step-<step>.png, and writes the first eight samples as mp4 and each
    video's values as json. Raises InputError, before anything is trained, if encoders, prompts or judge do
    not fit.
    """
    device, dit_config, has_user_data = runtime.device, policy.config, bool(config.data)
    folder = Path(config.output_dir) / "samples"
    vae = families.load_vae(f"{config.model}/vae").to(device)
    prompts, contexts, image, shape = held_out_prompts(config, dit_config, shards, held_out, vae, device)
    null = None
    if {config.guidance_scale, config.guidance_scale_2} - {1, None}:
        null = families.null_context(dit_config, "negative", config.data, config.model, device)
    judge = load_pavrm(config.judge, policy, load_now=False) if config.judge else None
    if judge and config.reward:
        if fingerprint.of_weights(config.judge) == fingerprint.of_weights(config.reward):
            raise InputError(f"--judge {config.judge}: is the reward model that the generator is trained "
                             "against: train another one, on other clips (--fold)")
    if judge:
        parallel.shard(judge, runtime, config)
    fps = shards.fps if has_user_data else scene.FPS
    size = max(1, GROUP_LATENTS // (shape[1] * shape[2] * shape[3]))
    groups = common.groups_of(len(prompts), size)
    largest = len(groups[0])

    def latents_of(policy, group):
        """-> (the samples [b, c, f, h, w], {name: [b]}, what the judge says of the samples)"""
        j = torch.tensor(group)
        context = encoders.stack_contexts([contexts[i] for i in group]).to(device)
        its_conditions = {name: x[j].to(device) for name, x in image.items()}
        guidance = experts.guidance(policy, config.guidance_scale, config.guidance_scale_2)
        x = flow.sample(policy, shape, context, SEED, group, config.num_inference_steps, shift=config.shift,
                        guidance_scale=guidance, null=null, max_rows=largest,
                        autocast=runtime.autocast, **its_conditions)
        if not judge:
            return x, {}
        others = encoders.stack_contexts([contexts[(i + 1) % len(contexts)] for i in group]).to(device)
        how = {"max_rows": largest, "autocast": runtime.autocast, "indices": group, **its_conditions}
        logits = logits_by_t(judge, x, context, SEED, **how).float().cpu()
        for_others = logits_by_t(judge, x, others, SEED, **how).float().cpu()
        found = {f"judge_t{k + 1}": row for k, row in enumerate(logits)}
        return x, found | {"judge": torch.sigmoid(logits).mean(0),
                           "judge_other_prompt": torch.sigmoid(for_others).mean(0)}

    def measured(videos, group):
        if has_user_data:
            return panel(videos)
        found = annotator.annotate(videos, [prompts[i] for i in group])
        grades = {f"{axis}_qualified": found[axis] == 2 for axis in ("physical", "deformity")}
        return {"qualified": found["qualified"], **grades, **{name: found[name] for name in annotator.PANEL}}

    def held_out_loss(policy):
        """Eq. 10 on the held-out clips, at four fixed times each."""
        rows, clips = [], [held_out[i:i + size].tolist() for i in range(0, len(held_out), size)]
        for group, keep in parallel.work_of_rank(clips, runtime, config.parallel):
            batch, losses = shards.batch(group), 0
            x0, context = batch["latents"].to(device), batch["context"].to(device)
            image = image_inputs(dit_config, batch, device)
            for k in range(4):
                x1 = noise(x0.shape[1:], SEED, "held-out x1", k, group).to(device)
                t = torch.full((len(x0),), (k + 0.5) / 4, device=device)
                with runtime.autocast():
                    v = policy(add_noise(x0, x1, t), t, context, **image)
                rest = slice(flow.given_frames(image), None)        # latent frames that are predicted
                error = (v.float() - (x1 - x0))[:, :, rest].square()
                losses += error.flatten(1).mean(1).cpu() / 4
            if keep:
                rows += by_video(group, {"sft_loss": losses})
        return gather_values(rows)

    real = {}                                           # the held-out clips, through the same VAE
    if has_user_data:
        rows = []
        for i, keep in parallel.work_of_rank(held_out.tolist(), runtime, "ddp"):
            with encoders.on(vae, device):
                film = encoders.decode_pixels(vae, shards.batch([i])["latents"].to(device))
            if keep:
                rows += by_video([i], panel(film))
        real = gather_values(rows)
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
                with encoders.on(vae, device):
                    videos = encoders.decode_pixels(vae, x)
                rows += by_video(group, measured(videos, group) | found)
                films += [(i, video) for i, video in zip(group, videos) if i < SHOWN]
        found = gather_values(rows)
        if has_user_data:
            found["dynamic"] = dynamic_degree(found["flow"], real["flow"]).tolist()
            found |= held_out_loss(policy)
        for i, video in films:
            write_video(folder / f"step-{step:06d}" / f"{i}.mp4", video, fps)
        strips = sum(common.gather([(i, strip(video)) for i, video in films]), [])
        means = {f"validation_{name}": float(np.mean(values)) for name, values in found.items()}
        score = judges_score(means) if judge else means.get("validation_qualified")
        if score is not None:
            history.append(score)
            since = len(history) - 1 - history.index(max(history))
            means |= {"validation_score": score, "validation_since_best": since}
            if since == 0 and step and export:
                note = {"step": step, "score": score, "judge": config.judge or "annotator"}
                save_best(config.output_dir, export, note)
        if runtime.rank == 0:
            strips = torch.stack([video for _, video in sorted(strips, key=lambda one: one[0])])
            contact_sheet(strips, folder / f"step-{step:06d}.png", scale=1 if has_user_data else 3)
            values = {"prompts": prompts, "values": found, "real": real}
            runs.write_json(folder / f"step-{step:06d}.json", values)
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
    """A few small frames of a uint8 video [F, H, W, 3], for a contact sheet -> uint8 [count, h, w, 3]"""
    return shrunk(video[torch.linspace(0, len(video) - 1, min(count, len(video))).round().long()], side)


def show(step, means, real, folder):
    """Prints the means; on the user's data also their values at step 0 and on the real clips."""
    means = {name.removeprefix("validation_"): value for name, value in means.items()}
    if not real:
        cells = [f"{name} {value:.3f}" for name, value in means.items()]
        tqdm.write("  ".join([f"iteration {step}", *cells]))
        return
    try:
        values = from_json((folder / "step-000000.json").read_text())["values"]
        start = {name: np.mean(row) for name, row in values.items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        start = {}                                      # the file is missing or damaged

    def cell(value):
        return " " * 11 if value is None else f"{value:11.4f}"

    lines = [f"iteration {step:<7}" + "".join(f"{name:>11}" for name in ("now", "step 0", "real clips"))]
    for name, value in means.items():
        of_real = np.mean(real[name]) if name in real else None
        lines.append(f"{name:17}{value:11.4f}{cell(start.get(name))}{cell(of_real)}".rstrip())
    tqdm.write("\n".join(lines))


def judges_score(means):
    """The score that chooses best/ if there is a judge; means: a row of metrics.jsonl."""
    return means["validation_judge"] - OTHER_PROMPT_WEIGHT * means["validation_judge_other_prompt"]


def past_scores(output_dir):
    """The scores in metrics.jsonl, from validations before the run was resumed; the same on every rank."""
    path, found = Path(output_dir) / "metrics.jsonl", []
    if common.rank() == 0 and path.exists():
        scores = [json.loads(line).get("validation_score") for _, line in runs.read_metrics(path)]
        found = [score for score in scores if isinstance(score, (int, float))]
    return common.gather(found)[0]


def save_best(output_dir, export, note):
    """Replaces best/ in the run folder by a folder with what export writes and best.json, which holds `note`.
    Every rank must call it."""
    best = Path(output_dir) / "best"
    new = best.with_name("best.tmp")
    if common.rank() == 0:
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir()
    export(new / "transformer")
    if common.rank() == 0:
        runs.write_json(new / "best.json", note)
        disk.put(new, best)
    common.gather(None)                                 # no rank continues before best/ is there


# ---- reward models
def auc(scores, labels):
    """Probability that a good video scores above a bad one, ties counted half; nan if one kind is missing."""
    good, bad = scores[labels == 1], scores[labels == 0]
    wins = (good[:, None] > bad[None]).double() + 0.5 * (good[:, None] == bad[None]).double()
    return wins.mean().item() if wins.numel() else float("nan")


@torch.no_grad()
def logits_by_t(model, latents, context, seed=0, batch_size=256, max_rows=None, autocast=None, indices=None,
                **image):
    """Section 4's test: logits [5, m] of m videos, each noised to one random t in every fifth of (0, 1].

    latents [m, c, f, h, w], context [m, l, d_text]. image: what an image-to-video model is given beside the
    prompt, [m, ...] each. t and noise depend only on seed, fifth and the number of the video. indices [m]:
    these numbers; default: 0 to m - 1. max_rows: as in flow.sample.
    """
    rows, (device, m) = [], (latents.device, len(latents))
    indices = range(m) if indices is None else indices
    for k in range(T_BINS):
        t = ((k + uniform(seed, "interval t", k, indices)) / T_BINS).to(device)
        x1 = noise(latents.shape[1:], seed, "interval noise", k, indices).to(device)
        for j, counts in common.equal_batches(m, batch_size, max_rows):
            with autocast() if autocast else torch.autocast(device.type, enabled=False):
                logits = model(add_noise(latents[j], x1[j], t[j]), t[j], context[j],
                               **{name: z[j] for name, z in image.items()})
            if counts:
                rows.append(logits)
    return torch.cat(rows).view(T_BINS, m)


def metrics_by_t(logits, labels):
    """{"accuracy", "balanced_accuracy", "auc"} of logits [5, m] and labels [m] in {0, 1}: lists of five
    numbers, from (0, .2] to (.8, 1]. Accuracy counts logit >= 0 as good. Balanced accuracy is the mean over
    the two labels: .5 for a constant answer, whatever the share of good videos."""
    right = ((logits >= 0) == (labels == 1)).float()                                        # [5, m]
    balanced = (right[:, labels == 1].mean(1) + right[:, labels == 0].mean(1)) / 2
    return {"accuracy": right.mean(1).tolist(), "balanced_accuracy": balanced.tolist(),
            "auc": [auc(row, labels) for row in logits]}


def make_reward_report(reward_fn, batch, generator_config, config, runtime):
    """-> measure() -> (report, its averages over t for the log); rank 0 prints it as the paper's table.

    reward_fn(x_t, t, context, **image) -> logits [b]; config: train_reward.py's; batch: held-out latents [m,
    c, f, h, w], context [m, l, d_text], label [m] and prompt. The report holds accuracy, balanced_accuracy
    and auc: five numbers each, by t (metrics_by_t), and under "clean" one number each, for the videos at t =
    0. prompt_accuracy and prompt_auc say whether the reward model reads its prompt: how well it tells good
    videos with their own prompt from the same videos with another video's prompt. These two are missing if
    all prompts are alike or no video is good.
    """
    x0, context, labels = (batch[name].to(runtime.device) for name in ("latents", "context", "label"))
    image, at_once = image_inputs(generator_config, batch, runtime.device), 4 * config.batch_size
    good = (labels == 1).nonzero()[:, 0]
    groups, others = data.prompt_groups(batch["prompt"]), None
    if len(good) and len(torch.unique(groups)) > 1:
        rows = data.other_rows(groups, good.cpu(), config.seed, 0, good.tolist())
        others = context[rows.to(context.device)]                                               # [m', l, d]

    def logits_of(rows, context):
        """-> logits [6, m'] of the m' held-out videos `rows` with these contexts: in five fifths of t, and of
        the clean videos."""
        its_conditions = {name: z[rows] for name, z in image.items()}
        found = logits_by_t(reward_fn, x0[rows], context, config.seed, at_once, autocast=runtime.autocast,
                            indices=rows.tolist(), **its_conditions)
        clean = []
        for j in torch.arange(len(rows), device=x0.device).split(at_once):
            t = torch.zeros(len(j), device=x0.device)
            mine = {name: z[j] for name, z in its_conditions.items()}
            with runtime.autocast():
                clean.append(reward_fn(x0[rows[j]], t, context[j], **mine))
        return torch.cat([found, torch.cat(clean)[None].to(found.dtype)])

    @torch.no_grad()
    def measure():
        logits = logits_of(torch.arange(len(x0), device=x0.device), context)
        found = metrics_by_t(logits, labels)
        if others is not None:
            both = torch.cat([logits[:, good], logits_of(good, others)], 1)
            is_own = torch.tensor([1] * len(good) + [0] * len(good), device=x0.device)
            told = metrics_by_t(both, is_own)
            found |= {"prompt_accuracy": told["accuracy"], "prompt_auc": told["auc"]}
        clean = {name: row.pop() for name, row in found.items()}
        averages = {name: sum(row) / len(row) for name, row in found.items()}
        if runtime.rank == 0:
            show_report(found, averages, clean, config.mismatched)
        return found | {"clean": clean}, {f"held_out_{name}": value for name, value in averages.items()}

    return measure


def show_report(found, averages, clean, mismatched):
    """Prints the paper's table, and a line if the reward model hardly reads its prompt."""
    intervals = "".join(f"  ({k / 5:.1f},{(k + 1) / 5:.1f}]" for k in range(T_BINS))
    tqdm.write(f"held out, t in    {intervals}   average     clean")
    for name, row in found.items():
        tqdm.write(f"{name:18}" + "".join(f"{value:11.3f}" for value in [*row, averages[name], clean[name]]))
    if clean.get("prompt_auc", 1) < LOW_PROMPT_AUC:
        remedy = "train for longer, or label more videos" if mismatched else "train with --mismatched .25"
        tqdm.write("note: this reward hardly reads the prompt: it tells good videos with their own prompt "
                   f"from the same videos with another one's with AUC {clean['prompt_auc']:.2f}, where .5 is "
                   f"chance; {remedy}")
