"""Sample videos, one prompt or thousands, from every generator that training knows, to mp4.

    python sample.py --prompt "a red circle moving to the right"
    python sample.py --prompt "a blue square moves up" --transformer runs/align/transformer --num_videos 4 \\
        --contact_sheet sheet.png
    python sample.py --prompt "a blue square moves up" --best_of 8         search.py: the best of 8, by the latent reward
    python sample.py --task i2v --prompt "a red circle moving to the right" --image first.png
    python sample.py --model Wan2.1 --lora pytorch_lora_weights.safetensors --prompt "a cat lands on its feet"
    torchrun --nproc_per_node=8 sample.py --model Wan2.1 --prompts prompts.txt --output_dir clips     own samples, to label

--prompts FILE: .txt, a prompt a line; or .jsonl or .csv with prompt and, where wanted, image (a first frame) and seed.
--output_dir gets an mp4 a video and metadata.jsonl, which label.py and data.py read. Under torchrun each process makes its
share. A second run goes on where a killed one stopped; the files are the same, byte for byte, on any number of processes.

What is not said comes from the model. Embedded world: 32*32, 9 frames at 8 fps, 32 steps, no guidance, shift 1. Wan2.1, as
published: 832*480, 81 frames at 16 fps, guidance 5, shift 3 (5 from 720P on), its negative prompt; and the paper's 40 steps.
Text encoder, generator and VAE are on the GPU one after another.

Axes: b batch, c channels, f frames, h height, w width, l text tokens.
"""
import dataclasses
import hashlib
import itertools
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

import common
import data
import flow
import search
from common import InputError, arg
from formats import codec, lock, runs
from formats.metadata import from_json, not_text, update_rows
from formats.prompts import read_prompts
from formats.video import contact_sheet, read_clip, write_video
from formats.weights import TASKS, resolve_model
from model import load_transformer
from pavrm import load_pavrm
from scale import lora, parallel, plan, sequence

EXAMPLE = "a red circle moving to the right"
BATCH_LATENTS = 2 ** 12                                         # latent positions of a batch where no flag says


@dataclass
class Config(search.Flags):
    prompt: str | None = arg(None, f"what the video shows, in plain words; without, of the shipped model: {EXAMPLE}")
    prompts: str | None = arg(None, "file of many prompts; give --output_dir too")
    output: str = arg("sample.mp4", "mp4 to write; with several videos, sample-0.mp4, sample-1.mp4, ...", only="!prompts")
    output_dir: str | None = arg(None, "folder for the videos, and metadata.jsonl", only="prompts")
    task: str | None = arg(None, "which shipped generator, without --model: t2v, or i2v (image-to-video)", choices=TASKS)
    model: str | None = arg(None, "another folder with transformer/, text_encoder/, vae/ (and image_encoder/), e.g. Wan2.1's")
    transformer: str | None = arg(None, "another generator, e.g. runs/align/transformer")
    lora: str | None = arg(None, "LoRA file to add to the generator, in diffusers' or ComfyUI's names")
    image: str | None = arg(None, "first frame (png, jpg, or a video's first frame), for image-to-video models")
    size: str | None = arg(None, "W*H of the video; without, the model's")
    frames: int | None = arg(None, "frames, 4k + 1; without, the model's", at_least=5)
    fps: float | None = arg(None, "frames per second of the file; without, the model's", above=0)
    num_videos: int = arg(1, "videos of each prompt", above=0)
    num_inference_steps: int | None = arg(None, "Euler steps from noise to video; without, the model's", above=0)
    guidance_scale: float | None = arg(None, "classifier-free guidance, 1 is none; without, the model's", at_least=0)
    negative_prompt: str | None = arg(None, "what guidance leads away from; without, Wan2.1's own, or an all-zero context")
    shift: float | None = arg(None, "warps times towards noise, 1 is uniform; without, the model's", above=0, at_most=100)
    seed: int = arg(0, "of the noise; a row of --prompts may have its own", at_least=0)
    reward: str | None = arg(None, "reward model of the search; without, <model>/reward", only="!best_of 1")
    contact_sheet: str | None = arg(None, "also write all frames of all videos as one PNG", only="!prompts")
    batch_size: int | None = arg(None, "videos of one seed in a pass; without, by their size: 1 for Wan2.1's", above=0)
    mixed_precision: str | None = arg(None, "autocast dtype; without, no, and for Wan2.1 bf16 if the machine has it",
                                     choices=("no", "bf16"))
    parallel: str = arg("ddp", "under torchrun: the generator whole on each GPU (ddp), or 1 / GPUs of it (fsdp)",
                        choices=parallel.KINDS)
    sequence_parallel: int = arg(1, "neighbouring GPUs that share a video's tokens, for long ones", above=0)


@dataclass
class Video:
    """One video to make; its noise depends on seed and index alone."""
    path: Path
    prompt: str
    image: str | None
    seed: int
    index: int


def check_flags(config):
    """Raises InputError for flags that cannot work, before anything is loaded."""
    if config.prompt is None and config.prompts is None and not (config.model or config.image):
        config.prompt = EXAMPLE
    if (config.prompt is None) == (config.prompts is None):
        raise InputError("give --prompt, or --prompts with a file of them")
    if config.prompts is not None and config.output_dir is None:
        raise InputError("--prompts needs --output_dir, the folder for its videos")
    if config.prompt is not None and not config.prompt.strip():
        raise InputError("--prompt is empty: say what the video shows")
    for name in ("prompt", "negative_prompt"):
        if wrong := not_text(getattr(config, name) or ""):
            raise InputError(f"--{name} {wrong}")
    if Path(config.output).suffix.lower() != ".mp4":
        raise InputError(f"--output {config.output}: the name must end in .mp4")
    if config.contact_sheet and Path(config.contact_sheet).suffix.lower() != ".png":
        raise InputError(f"--contact_sheet {config.contact_sheet}: the name must end in .png")
    data.parse_size(config)
    search.parse_cuts(config.best_of, config.cuts)


def settle(config, dit_config):
    """What the flags leave open, as the model is used -> size (W, H)."""
    size, negative = data.parse_size(config) or codec.sampling_defaults(dit_config)["size"], config.negative_prompt
    codec.fill_in(config, codec.sampling_defaults(dit_config, size[1]))
    if negative is not None and config.guidance_scale == 1:
        raise InputError("--negative_prompt means nothing with --guidance_scale 1: leave it out, or give a larger one")
    config.size = f"{size[0]}*{size[1]}"
    c, f, h, w = codec.latent_shape(dit_config, size, config.frames)
    config.batch_size = config.batch_size or max(1, BATCH_LATENTS // (f * h * w))
    return size


def list_videos(config):
    """[Video], in order."""
    output, n = Path(config.output), config.num_videos
    if config.prompt is not None:
        paths = [output if n == 1 else output.with_name(f"{output.stem}-{k}{output.suffix}") for k in range(n)]
        return [Video(path, config.prompt, config.image, config.seed, k) for k, path in enumerate(paths)]
    rows = read_prompts(config.prompts)
    for name in ("seed", "image"):
        if all(row[name] is not None for row in rows):
            common.refuse(config, (name,), f"where every row of --prompts has its own {name}")
    return [Video(Path(config.output_dir) / (f"{i:06d}.mp4" if n == 1 else f"{i:06d}-{k}.mp4"), row["prompt"],
                  row["image"] or config.image, *((config.seed, i * n + k) if row["seed"] is None else (row["seed"], k)))
            for i, row in enumerate(rows) for k in range(n)]


def batches(videos, batch_size):
    """The list cut into batches of one seed. They are the same whatever is done already and however many processes there
    are, as rounding, and with it the bytes of a file, can depend on a video's neighbours in its batch."""
    for _, same in itertools.groupby(videos, lambda video: video.seed):
        same = list(same)
        yield from (same[i:i + batch_size] for i in range(0, len(same), batch_size))


def check_images(videos, dit_config, size):
    """Raises InputError for an image that is missing, superfluous, damaged or does not fit."""
    for image in dict.fromkeys(video.image for video in videos):
        if (dit_config["model_type"] == "i2v") != (image is not None):
            raise InputError("--image is needed by image-to-video models (or an image in each row of --prompts), and by those "
                             f"alone; this one is {dit_config['model_type']}")
        if image is not None:
            read_clip(image, size=size, frames=1)


def start_folder(config, videos):
    """Makes --output_dir -> its lock, to keep; sample.json in it says how its videos are made. Raises InputError where it
    says otherwise."""
    kept = ("model", "transformer", "lora", "size", "frames", "fps", "num_inference_steps", "guidance_scale", "negative_prompt",
            "shift", "batch_size", "mixed_precision", "best_of", "cuts", "reward")
    rows = repr([(video.path.name, *dataclasses.astuple(video)[1:]) for video in videos])
    settings = {name: getattr(config, name) for name in kept} | {"videos": hashlib.sha256(rows.encode()).hexdigest()[:16]}
    path = Path(config.output_dir) / "sample.json"
    lock.require_ours(config.output_dir, "samples", ("sample.json",))
    held = lock.hold(config.output_dir, "samples")
    if path.exists():
        try:
            before = from_json(path.read_text())
            changed = [name for name in settings if before.get(name) != settings[name]]
        except (ValueError, AttributeError) as error:
            raise InputError(f"{path} is damaged ({error}): name another --output_dir") from None
        if changed:
            raise InputError(f"--output_dir {config.output_dir}: its videos were made with other {', '.join(changed)}: use the "
                             "same flags and prompts, or another folder")
    else:
        runs.write_json(path, settings)
    return held


def told_if_it_does_not_fit(config, dit_config, runtime, memory):
    """The planner's one line where a GPU of `memory` bytes is too small, else None."""
    flags = plan.Config("wan2.1-t2v-14b", method="sample", frames=config.frames, size=config.size, gpus=runtime.world_size,
                        parallel=config.parallel, sequence_parallel=config.sequence_parallel, batch_size=config.batch_size,
                        num_inference_steps=config.num_inference_steps)
    peak = plan.costs(flags, dit_config)["with"]["peak"]
    if peak > memory:
        return (f"likely out of memory: {peak / 1e9:.0f} GB are wanted of a GPU's {memory / 1e9:.0f}: lower --batch_size, --size "
                "or --frames, or start on more GPUs with torchrun and --parallel fsdp or --sequence_parallel")
    return None


def write_metadata(folder, videos):
    """metadata.jsonl of the videos that are there."""
    rows = [{"file_name": video.path.name, "prompt": video.prompt, "seed": video.seed}
            | ({"image": video.image} if video.image else {}) for video in videos if video.path.exists()]
    update_rows(Path(folder) / "metadata.jsonl", rows)


@torch.no_grad()
def main(config):
    check_flags(config)
    model = resolve_model(config, config.transformer)
    videos = list_videos(config)
    pieces = config.parallel == "fsdp" and not config.lora      # each rank reads its own; adapters are merged into whole weights
    dit = load_transformer(config.transformer or model, dtype=None, whole=not pieces).eval().requires_grad_(False)
    wan = dit.config["text_len"] == codec.WAN_CONTEXT
    config.mixed_precision = config.mixed_precision or (runs.fast_precision() if wan else "no")
    runtime = common.setup(config.mixed_precision, config.seed, config.sequence_parallel)
    parallel.check(parallel.Flags(parallel=config.parallel, sequence_parallel=config.sequence_parallel))
    size, device = settle(config, dit.config), runtime.device
    if config.lora:
        lora.merge_file(dit, config.lora)
    check_images(videos, dit.config, size)
    cuts = search.parse_cuts(config.best_of, config.cuts)
    pavrm = load_pavrm(config.reward or f"{model}/reward", dit) if config.best_of > 1 else None
    todo = list(batches(videos, config.batch_size))
    if config.output_dir:
        if runtime.rank == 0:
            held = start_folder(config, videos)                 # noqa: F841   as long as this function runs
        todo = common.gather([batch for batch in todo if not all(video.path.exists() for video in batch)])[0]
    if device.type == "cuda" and runtime.rank == 0:
        memory = torch.cuda.get_device_properties(device).total_memory
        if line := told_if_it_does_not_fit(config, dit.config, runtime, memory):
            print(line, flush=True)
    shape = codec.latent_shape(dit.config, size, config.frames)
    mine, shown = parallel.work_of_rank(todo, runtime, config.parallel), []

    vae = codec.load_vae(f"{model}/vae")
    clip = codec.load_image_encoder(f"{model}/image_encoder") if dit.config["image_dim"] else None
    negative = [] if config.negative_prompt is None else [config.negative_prompt]
    prompts = [video.prompt for batch, _ in mine for video in batch] + negative
    contexts = codec.encode_texts(f"{model}/text_encoder", prompts, device, dit.config["text_dim"])
    null = contexts[negative[0]].to(device) if negative else None                                   # [l, d]
    if config.parallel == "fsdp":
        on_device = partial(nullcontext, parallel.shard(dit.float(), runtime, parallel.Flags(parallel="fsdp")))
    else:
        sequence.spread(dit, runtime)
        on_device = partial(codec.on, parallel.cast_matrices(dit, runtime.dtype), device)

    for batch, keep in common.progress(mine, f"videos (x{config.batch_size * runtime.world_size})"):
        context = codec.stack_contexts([contexts[video.prompt] for video in batch]).to(device)          # [b, l, d]
        image = {}
        if batch[0].image:
            images = list(dict.fromkeys(video.image for video in batch))
            first = torch.stack([read_clip(image, size=size, frames=1)[0][0] for image in images]).to(device)
            with codec.on(vae, device), codec.on(clip or vae, device):
                image = codec.image_conditions(dit.config, vae, clip, first, config.frames)
            image = {name: x[[images.index(video.image) for video in batch]] for name, x in image.items()}
        what = shape, context, batch[0].seed, [video.index for video in batch], config.num_inference_steps
        how = dict(shift=config.shift, guidance_scale=config.guidance_scale, null=null, autocast=runtime.autocast, **image)
        with on_device():
            if pavrm is None:
                latents = flow.sample(dit, *what, **how)                                            # [b, c, f, h, w]
            else:
                with codec.on(pavrm, device):
                    latents, passes = search.best_of(dit, pavrm, *what, cuts, batch_size=config.batch_size, **how)
        if not keep:
            continue
        with codec.on(vae, device):
            pixels = codec.decode_pixels(vae, latents)                                              # [b, F, H, W, 3]
        for video, frames in zip(batch, pixels):
            write_video(video.path, frames, config.fps)
        if config.output_dir and runtime.rank == 0:
            write_metadata(config.output_dir, videos)
        if config.contact_sheet:
            shown += [(video.index, frames) for video, frames in zip(batch, pixels)]
    shown = sorted(itertools.chain(*common.gather(shown)), key=lambda one: one[0])
    if runtime.rank == 0:
        if pavrm is not None and mine:
            print(f"best of {config.best_of}: {passes:g} forward passes a video, {passes / config.num_inference_steps:.1f} times "
                  "those of one candidate")
        if config.output_dir:
            write_metadata(config.output_dir, videos)
            print(f"wrote {len(videos)} videos and metadata.jsonl in {config.output_dir}")
        else:
            print(*(f"wrote {video.path}" for video in videos), sep="\n")
        if config.contact_sheet:
            contact_sheet(torch.stack([frames for _, frames in shown]), config.contact_sheet)
            print(f"wrote {config.contact_sheet}")
    common.teardown()


if __name__ == "__main__":
    common.cli(main, Config, __doc__)
