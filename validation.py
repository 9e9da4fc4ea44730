"""What the training scripts report while they train: a reward model's accuracy on held-out videos, and, on the
embedded world, what the annotator says of a generator's samples of held-out prompts.

Axes: b batch, m held-out videos, c channels, f frames, h height, w width, l text tokens.
"""
from pathlib import Path

import torch
from tqdm import tqdm

import flow
from common import noise, uniform
from flow import add_noise
from formats.codec import load_text_encoder, load_vae
from formats.video import contact_sheet, from_pixels, to_pixels
from model import first_frame_condition, image_inputs
from world import judge, scene

INTERVALS = 5                                                   # of t, in the paper's reward-model tables


def make_validation(config, runtime):
    """-> validate(policy, step) -> {validation_<name>: value}, on rank 0; {} on the others. config: train_align.py's.

    Samples num_validation fixed prompts from fixed noise, prints what the annotator says of them, and draws the
    first eight in <output_dir>/samples/step-<step>.png.
    """
    n = config.num_validation
    vae = load_vae(f"{config.model}/vae").to(runtime.device)
    text = load_text_encoder(f"{config.model}/text_encoder").to(runtime.device)
    clips, prompts, _ = scene.make(n, 900, "clean", config.size, split="validation")
    folder = Path(config.output_dir) / "samples"

    @torch.no_grad()
    def validate(policy, step):
        image_to_video = policy.config["model_type"] == "i2v"
        y = first_frame_condition(vae.encode(from_pixels(clips.to(runtime.device)))) if image_to_video else None
        latents = flow.sample(policy, scene.LATENT_SHAPES[config.size], text.encode(prompts), 900, range(n),
                              config.num_inference_steps, y=y, autocast=runtime.autocast)
        if runtime.rank > 0:                                    # it sampled with the others: FSDP gathers
            return {}
        videos = to_pixels(vae.decode(latents)).cpu()
        folder.mkdir(parents=True, exist_ok=True)
        contact_sheet(videos[:8], folder / f"step-{step:06d}.png")
        found = judge.summary(judge.annotate(videos, prompts))
        tqdm.write("  ".join([f"iteration {step}"] + [f"{name} {value:.3f}" for name, value in found.items()]))
        return {f"validation_{name}": value for name, value in found.items()}

    return validate


def auc(scores, labels):
    """Probability that a good one scores above a bad one, ties counted half; nan if one kind is missing."""
    good, bad = scores[labels == 1], scores[labels == 0]
    wins = (good[:, None] > bad[None]).double() + 0.5 * (good[:, None] == bad[None]).double()
    return wins.mean().item() if wins.numel() else float("nan")


@torch.no_grad()
def interval_logits(model, latents, context, seed=0, batch_size=256, autocast=None, **image):
    """Section 4's test: logits [5, m] of m videos, each noised to one random t in every fifth of (0, 1].

    latents [m, c, f, h, w], context [m, l, d_text], image: y and clip [m, ...] (i2v). t and noise depend on seed,
    interval and place only.
    """
    rows, (device, m) = [], (latents.device, len(latents))
    for k in range(INTERVALS):
        t = ((k + uniform(seed, "interval t", k, range(m))) / INTERVALS).to(device)
        x1 = noise(latents.shape[1:], seed, "interval noise", k, range(m)).to(device)
        for i in range(0, m, batch_size):
            j = slice(i, i + batch_size)
            with autocast() if autocast else torch.autocast(device.type, enabled=False):
                rows.append(model(add_noise(latents[j], x1[j], t[j]), t[j], context[j],
                                  **{name: z[j] for name, z in image.items()}))
    return torch.cat(rows).view(INTERVALS, m)


def interval_metrics(logits, labels):
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
    [m, c, f, h, w], context [m, l, d_text] and label [m]. The report holds accuracy, balanced_accuracy and auc: five numbers each, by t (interval_metrics), and
    under "clean" one each, of the videos at t = 0.
    """
    x0, context, labels = (batch[name].to(runtime.device) for name in ("latents", "context", "label"))
    zero = torch.zeros(len(x0), device=runtime.device)                                                  # t
    image = image_inputs(generator_config, batch, runtime.device)

    @torch.no_grad()
    def measure():
        found = interval_metrics(interval_logits(reward_fn, x0, context, config.seed, 4 * config.batch_size,
                                                 runtime.autocast, **image), labels)
        clean = []
        for i in range(0, len(x0), 4 * config.batch_size):
            j = slice(i, i + 4 * config.batch_size)
            with runtime.autocast():
                clean.append(reward_fn(x0[j], zero[j], context[j], **{name: z[j] for name, z in image.items()}))
        clean = {name: row[0] for name, row in interval_metrics(torch.cat(clean)[None], labels).items()}
        averages = {name: sum(row) / len(row) for name, row in found.items()}
        if runtime.rank == 0:
            tqdm.write("held out, t in    " + "".join(f"  ({k / 5:.1f},{(k + 1) / 5:.1f}]" for k in range(5))
                       + "   average     clean")
            for name, row in found.items():
                tqdm.write(f"{name:18}" + "".join(f"{v:11.3f}" for v in [*row, averages[name], clean[name]]))
        return found | {"clean": clean}, {f"held_out_{name}": value for name, value in averages.items()}

    return measure
