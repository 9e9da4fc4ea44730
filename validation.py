"""What the training scripts report while they train: a reward model's accuracy on held-out videos, and, on the
embedded world, what the annotator says of a generator's samples of held-out prompts.

Axes: b batch, m held-out videos, c channels, f frames, h height, w width, l text tokens.
"""
from pathlib import Path

import torch
from tqdm import tqdm

import data
import flow
import world
from model import first_frame_condition, load_text_encoder
from pavrm import interval_logits, interval_metrics
from vae import from_pixels, load_vae, to_pixels


def make_validation(config, runtime):
    """-> validate(policy, step) -> {validation_<name>: value}, on rank 0; {} on the others. config: train_align.py's.

    Samples num_validation fixed prompts from fixed noise, prints what the annotator says of them, and draws the
    first eight in <output_dir>/samples/step-<step>.png.
    """
    n = config.num_validation
    vae = load_vae(f"{config.model}/vae").to(runtime.device)
    text = load_text_encoder(f"{config.model}/text_encoder").to(runtime.device)
    clips, prompts, _ = world.make(n, 900, "clean", config.size, split="validation")
    folder = Path(config.output_dir) / "samples"

    @torch.no_grad()
    def validate(policy, step):
        image_to_video = policy.config["model_type"] == "i2v"
        y = first_frame_condition(vae.encode(from_pixels(clips.to(runtime.device)))) if image_to_video else None
        latents = flow.sample(policy, world.LATENT_SHAPES[config.size], text.encode(prompts), 900, range(n),
                              config.num_inference_steps, y=y, autocast=runtime.autocast)
        if runtime.rank > 0:                                    # it sampled with the others: FSDP gathers
            return {}
        videos = to_pixels(vae.decode(latents)).cpu()
        folder.mkdir(parents=True, exist_ok=True)
        data.contact_sheet(videos[:8], folder / f"step-{step:06d}.png")
        found = world.summary(world.annotate(videos, prompts))
        tqdm.write("  ".join([f"iteration {step}"] + [f"{name} {value:.3f}" for name, value in found.items()]))
        return {f"validation_{name}": value for name, value in found.items()}

    return validate


def make_reward_report(judge, batch, generator_config, config, runtime):
    """-> measure() -> (report, its averages over t for the log); rank 0 prints it as the paper's table.

    judge(x_t, t, context, **image) -> logits [b]; config: train_reward.py's; batch: held-out latents [m, c, f, h, w], context [m, l, d_text] and
    label [m]. The report holds accuracy, balanced_accuracy and auc: five numbers each, by t (pavrm.interval_metrics),
    and under "clean" one each, of the videos at t = 0.
    """
    x0, context, labels = (batch[name].to(runtime.device) for name in ("latents", "context", "label"))
    zero = torch.zeros(len(x0), device=runtime.device)                                                  # t
    image = data.image_inputs(generator_config, batch, runtime.device)

    @torch.no_grad()
    def measure():
        found = interval_metrics(interval_logits(judge, x0, context, config.seed, 4 * config.batch_size,
                                                 runtime.autocast, **image), labels)
        clean = []
        for i in range(0, len(x0), 4 * config.batch_size):
            j = slice(i, i + 4 * config.batch_size)
            with runtime.autocast():
                clean.append(judge(x0[j], zero[j], context[j], **{name: z[j] for name, z in image.items()}))
        clean = {name: row[0] for name, row in interval_metrics(torch.cat(clean)[None], labels).items()}
        averages = {name: sum(row) / len(row) for name, row in found.items()}
        if runtime.rank == 0:
            tqdm.write("held out, t in    " + "".join(f"  ({k / 5:.1f},{(k + 1) / 5:.1f}]" for k in range(5))
                       + "   average     clean")
            for name, row in found.items():
                tqdm.write(f"{name:18}" + "".join(f"{v:11.3f}" for v in [*row, averages[name], clean[name]]))
        return found | {"clean": clean}, {f"held_out_{name}": value for name, value in averages.items()}

    return measure
