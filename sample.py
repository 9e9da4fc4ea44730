"""Samples videos as mp4, for one prompt or thousands, from every generator that can be trained here.

    python sample.py --prompt "a red circle moving to the right"
    python sample.py --prompt "a blue square moves up" --transformer runs/align/transformer --num_videos 4 \\
        --contact_sheet sheet.png
    python sample.py --prompt "a blue square moves up" --best_of 4      the best of 4, see search.py
    python sample.py --task i2v --prompt "a red circle moving to the right" --image first.png
    python sample.py --model Wan2.1 --lora pytorch_lora_weights.safetensors --prompt "a cat lands on its feet"
    torchrun --nproc_per_node=8 sample.py --model Wan2.1 --prompts prompts.txt --output_dir clips
    python sample.py --prompts clips/metadata.jsonl --output_dir again      makes the same videos again

--prompts FILE is a .txt file with one prompt per line, or a .jsonl or .csv file whose rows have prompt and,
if wanted, image (a first frame) and seed. --output_dir gets one mp4 per video, and metadata.jsonl, which
label.py and data.py read. Under torchrun the processes share the videos. A second run continues where a
killed one stopped. The files are the same, byte for byte, on any number of processes.

Each row of metadata.jsonl also says how its video was made. If the row is given to --prompts again, it makes
the same bytes on the same machine, whatever other rows are given with it. (With bf16, --parallel must be the
same, too.) If a flag is given as well, it replaces what the row says.

Flags that are not given have the model's defaults. Embedded world: 32*32, 9 frames at 8 fps, 32 steps, no
guidance, shift 1. Wan2.1: 832*480, 81 frames at 16 fps, guidance 5, shift 3 (5 from 720P on) and the negative
prompt as published, and the paper's 40 steps. Wan2.2 TI2V-5B: 1280*704, 121 frames at 24 fps, 50 steps,
guidance 5, shift 5; --task i2v gives it a first frame. Wan2.2 A14B: as Wan2.1, but with shift 12 and guidance
4 (its low-noise expert has guidance 3); for image-to-video, shift 5 and guidance 3.5 for both experts. The
text encoder, the generator and the VAE take turns on the GPU, and so do two experts.

Axes: b batch, c channels, f frames, h height, w width, l text tokens.
"""
import dataclasses
import hashlib
import itertools
from dataclasses import dataclass, replace
from pathlib import Path

import torch

import common
import data
import experts
import families
import search
from common import InputError, arg
from formats import disk, encoders, lock, runs, samples
from formats.metadata import from_json, not_text, update_rows
from formats.paths import require_writable
from formats.prompts import foreign_flag, read_prompts
from formats.video import contact_sheet, read_clip, write_video
from formats.weights import TASKS, resolve_model, task_in_words
from model import load_transformer
from pavrm import load_pavrm
from scale import lora, parallel, plan

EXAMPLE = "a red circle moving to the right"
BATCH_LATENTS = 2 ** 12                                 # latent positions of a batch without --batch_size


@dataclass
class Config(search.Flags):
    prompt: str | None = arg(None, "what the video shows, in plain words; default for the shipped model: "
                             f"{EXAMPLE}")
    prompts: str | None = arg(None, "file of many prompts (.txt, .jsonl, .csv); give --output_dir too")
    output: str = arg("sample.mp4", "mp4 file to write; several videos become sample-0.mp4, sample-1.mp4, "
                      "...", only="!prompts")
    output_dir: str | None = arg(None, "folder for the videos and metadata.jsonl", only="prompts")
    task: str | None = arg(None, "t2v (text-to-video) or i2v (image-to-video). Without --model it chooses "
                           "the shipped generator; with a --model that can do both, it chooses the task. "
                           "Default: the --model's own task, else t2v", choices=TASKS)
    model: str | None = arg(None, "folder of another model, with transformer/, text_encoder/, vae/ (and "
                            "image_encoder/), such as Wan2.1's; default: the shipped one for --task")
    transformer: str | None = arg(None, "folder of another transformer for this model, such as "
                                  "runs/align/transformer: safetensors and a config.json, as diffusers or "
                                  "Wan's authors write them (our runs do as the authors)")
    lora: str | None = arg(None, "LoRA file to add to the generator, with the names of diffusers or ComfyUI; "
                           "for two experts (Wan2.2 A14B), the file of the high-noise one")
    lora_2: str | None = arg(None, "LoRA file to add to the low-noise one of two experts")
    image: str | None = arg(None, "first frame, for image-to-video models: a png, a jpg, or a video whose "
                            "first frame is taken")
    size: str | None = arg(None, "W*H of the video in pixels; default: the model's")
    frames: int | None = arg(None, "number of frames, 4k + 1; default: the model's", at_least=5)
    fps: float | None = arg(None, "frames per second of the file; default: the model's", above=0)
    num_videos: int = arg(1, "videos of each prompt", above=0)
    num_inference_steps: int | None = arg(None, "Euler steps from noise to video; default: the model's",
                                          above=0)
    guidance_scale: float | None = arg(None, "scale of classifier-free guidance; 1: no guidance. Default: "
                                       "the model's", at_least=0)
    guidance_scale_2: float | None = arg(None, "guidance scale of the low-noise one of two experts (Wan2.2 "
                                         "A14B); default: --guidance_scale if that is given, else the "
                                         "model's", at_least=0)
    negative_prompt: str | None = arg(None, "prompt that guidance leads away from; default: for Wan its "
                                      "published one, else an all-zero context")
    shift: float | None = arg(None, "moves the times of the Euler steps towards noise; 1 spaces them evenly. "
                              "Default: the model's", above=0, at_most=100)
    seed: int = arg(0, "seed of the noise; a row of --prompts may have a seed of its own", at_least=0)
    reward: str | None = arg(None, "folder of the reward model that chooses among the candidates; default: "
                             "<model>/reward", only="!best_of 1")
    contact_sheet: str | None = arg(None, "PNG file into which all frames of all videos are written too",
                                    only="!prompts")
    batch_size: int | None = arg(None, "how many videos of one seed are sampled together. Default: as many "
                                 f"as have at most {BATCH_LATENTS:,} latent positions together, but at least "
                                 "one (for Wan2.1 one); rows of a metadata.jsonl keep the "
                                 "batches in which they were made", above=0)
    mixed_precision: str | None = arg(None, "autocast dtype; default: bf16 for Wan2.1 and Wan2.2 on machines "
                                      "that are fast at it, else no", choices=("no", "bf16"))
    parallel: str = arg("ddp", "under torchrun: each GPU holds the whole generator (ddp) or a part of it "
                        "(fsdp)", choices=parallel.KINDS)
    sequence_parallel: int = arg(1, "number of neighbouring GPUs that share the tokens of each video, for "
                                 "long videos", above=0)


@dataclass
class Video:
    """One video to make. Its noise depends only on seed and index; its last bits also depend on batch and
    place."""
    path: Path | None                                   # None: it only fills a place in a batch, unwritten
    prompt: str
    image: str | None
    seed: int
    index: int
    batch: int | None = None                            # how many videos are sampled together; None: open
    place: int | None = None                            # the number of this video among them


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
    if flag := foreign_flag(config.prompt or ""):
        raise InputError(f"--prompt: {flag} is not read from a prompt: take it out, or give sample.py a flag "
                         "of its own")
    if Path(config.output).suffix.lower() != ".mp4":
        raise InputError(f"--output {config.output}: the name must end in .mp4")
    if config.contact_sheet and Path(config.contact_sheet).suffix.lower() != ".png":
        raise InputError(f"--contact_sheet {config.contact_sheet}: the name must end in .png")
    if config.output_dir:
        lock.require_ours(config.output_dir, "samples", ("sample.json",), "--output_dir")
    else:
        require_writable(config.output, f"--output {config.output}")
    if config.contact_sheet:
        require_writable(config.contact_sheet, f"--contact_sheet {config.contact_sheet}")
    data.parse_size(config)
    search.drops_of(config)


def take_settings(config, rows):
    """Fills in the flags that are not given with the settings that the rows of --prompts were made with.

    -> these settings if all that decide a video's bytes are the same now as then, else None. Raises
    InputError.
    """
    recorded = samples.shared_settings(config.prompts, rows)
    if not recorded:
        return None
    flags = [f"--{name}={value}" for name, value in recorded.items() if name in samples.FLAGS]
    try:
        then = common.parse(Config, "", flags)
    except InputError as error:
        raise InputError(f"{config.prompts}: its settings cannot be used: {error}") from None
    default = {field.name: field.default for field in dataclasses.fields(Config)}
    given = [name for name in samples.FLAGS if getattr(config, name) != default[name]]
    changed = [name for name in given
               if not samples.same_setting(name, getattr(config, name), getattr(then, name))]
    if config.num_videos > 1:
        changed.append("num_videos")
    keep = set(samples.FLAGS) - set(given)
    if {"task", "model"} & set(changed):  # another model: settings of the old one are dropped
        keep -= {"task", "model", "transformer", "lora", "lora_2", "guidance_scale_2", "reward"}
    elif "transformer" in changed:
        keep -= {"lora", "lora_2"}
    if {"best_of", "search"} & set(changed):
        keep -= {"drops"}
    if "guidance_scale" in changed:
        keep -= {"guidance_scale_2"}                            # its default is the new --guidance_scale
    scale_2 = then.guidance_scale_2 if "guidance_scale_2" in keep else config.guidance_scale_2
    if config.guidance_scale == 1 == (scale_2 or 1):
        keep -= {"negative_prompt"}
    for name in keep:
        setattr(config, name, getattr(then, name))
    check_flags(config)
    exact = set(changed) <= {"batch_size"}
    if exact:
        config.batch_size = then.batch_size
    if changed and common.rank() == 0:
        what = f"its videos were made with other {', '.join(changed)}: these are new videos"
        if exact:
            what = "its videos keep their batches, and so their bytes: --batch_size is not used"
        print(f"note: {config.prompts}: {what}")
    return recorded if exact else None


def settle(config, dit_config):
    """Fills in the flags that were left open, from the model's defaults -> size (W, H)."""
    negative = config.negative_prompt
    size = data.parse_size(config, families.of_config(dit_config).side)
    size = size or families.sampling_defaults(dit_config)["size"]
    experts.check_flags(config, dit_config)
    if "boundary_ratio" in dit_config:
        families.fill_in(config, {"guidance_scale_2": config.guidance_scale})
    families.fill_in(config, families.sampling_defaults(dit_config, size))
    if negative is not None and config.guidance_scale == 1 == (config.guidance_scale_2 or 1):
        raise InputError("--negative_prompt means nothing with --guidance_scale 1: leave it out, or give a "
                         "larger one")
    config.size = f"{size[0]}*{size[1]}"
    c, f, h, w = families.latent_shape(dit_config, size, config.frames)
    config.batch_size = config.batch_size or max(1, BATCH_LATENTS // (f * h * w))
    return size


def list_videos(config):
    """-> ([Video] in order, what `take_settings` returned, or None)."""
    output, n = Path(config.output), config.num_videos
    if config.prompt is not None:
        paths = [output]
        if n > 1:
            paths = [output.with_name(f"{output.stem}-{k}{output.suffix}") for k in range(n)]
        videos = [Video(path, config.prompt, config.image, config.seed, k) for k, path in enumerate(paths)]
        return videos, None
    rows = read_prompts(config.prompts)
    for name in ("seed", "image"):
        if all(row[name] is not None for row in rows):
            common.refuse(config, (name,), f"where every row of --prompts has its own {name}")
    before = take_settings(config, rows)
    videos = []
    for i, row in enumerate(rows):
        made = row.get("settings", {}) if n == 1 else {}
        for k in range(n):
            name = f"{i:06d}.mp4" if n == 1 else f"{i:06d}-{k}.mp4"
            image, seed, index = row["image"] or config.image, row["seed"], made.get("index", k)
            if seed is None:
                seed, index = config.seed, i * n + k
            video = Video(Path(config.output_dir) / name, row["prompt"], image, seed, index)
            if before:
                video.batch, video.place = made.get("batch"), made.get("place")
            videos.append(video)
    return videos, before


def place_videos(videos, batch_size):
    """Gives every Video without a batch its batch and place: neighbours in the list that have one seed go
    together. The size of a video's batch can change its rounding, and with it the bytes of its file. So
    batches depend neither on what is done already nor on the number of processes."""
    free = [video for video in videos if video.batch is None]
    for _, same_seed in itertools.groupby(free, lambda video: video.seed):
        same_seed = list(same_seed)
        for i in range(0, len(same_seed), batch_size):
            together = same_seed[i:i + batch_size]
            for place, video in enumerate(together):
                video.batch, video.place = len(together), place


def batches(videos):
    """-> [[Video, ...], ...], the batches. A batch has videos of one seed and one Video.batch, which is its
    size, each at its place. A place that no video has is filled with a copy of the batch's first video, but
    without a path."""
    found, with_room = [], {}
    for video in videos:
        open_batches = with_room.setdefault((video.seed, video.batch), [])
        batch = next((batch for batch in open_batches if batch[video.place] is None), None)
        if batch is None:
            batch = [None] * video.batch
            found.append(batch)
            open_batches.append(batch)
        batch[video.place] = video
        if None not in batch:
            open_batches.remove(batch)
    for batch in found:
        spare = replace(next(video for video in batch if video is not None), path=None)
        batch[:] = [spare if video is None else video for video in batch]
    return found


def is_done(batch):
    return all(video.path is None or video.path.exists() for video in batch)


def check_images(videos, dit_config, size):
    """Raises InputError for an image that is missing, superfluous, damaged or does not fit."""
    for image in dict.fromkeys(video.image for video in videos):
        if (dit_config["model_type"] == "i2v") != (image is not None):
            raise InputError("--image is needed for image-to-video models (or an image in each row of "
                             "--prompts), and other models take none; this one is "
                             f"{task_in_words(dit_config)}")
        if image is not None:
            read_clip(image, size=size, frames=1)


def start_folder(config, videos, weights=None):
    """Makes --output_dir and writes into its sample.json how its videos are made -> the folder's lock, to
    keep.

    weights: the fingerprint of all weights. Raises InputError if the folder holds videos and its sample.json
    says something else.
    """
    names = [name for name in samples.FLAGS if name != "task"]
    rows = repr([(video.path.name, video.prompt, video.image, video.seed, video.index) for video in videos])
    settings = {name: getattr(config, name) for name in names}
    settings |= {"weights": weights, "videos": hashlib.sha256(rows.encode()).hexdigest()[:16]}
    path = Path(config.output_dir) / "sample.json"
    folder_lock = lock.hold(config.output_dir, "samples")
    if not path.exists():
        runs.write_json(path, settings)
        return folder_lock
    try:
        before = from_json(path.read_text())
        if not isinstance(before, dict):
            raise ValueError("it holds no settings")
    except ValueError as error:
        raise InputError(f"{path} is damaged ({error}): name another --output_dir") from None
    # an older folder, which lacks some of these settings, continues; its search dropped candidates
    searched = "drop" if (before.get("best_of") or 1) > 1 else config.search
    before = {"search": searched, "drops": before.get("cuts"), "weights": weights} | before
    changed = ["prompts, seeds or images" if name == "videos" else name for name in settings
               if before.get(name) != settings[name]]
    if changed and ("videos" not in before or any(path.parent.glob("*.mp4"))):
        raise InputError(f"--output_dir {config.output_dir}: its videos were made with other "
                         f"{', '.join(changed)}: use the same flags and prompts, or another folder")
    if changed:                                                 # the start before failed and made no video
        runs.write_json(path, settings)
    return folder_lock


def memory_warning(config, dit_config, runtime, memory, pavrm=None):
    """A line with the planner's estimate if a GPU of `memory` bytes is too small, else None. pavrm: the
    reward model that is on the GPU beside the generator in a search, or None."""
    flags = plan.Config("wan2.1-t2v-14b", method="sample", frames=config.frames, size=config.size,
                        gpus=runtime.world_size, parallel=config.parallel,
                        sequence_parallel=config.sequence_parallel, batch_size=config.batch_size,
                        num_inference_steps=config.num_inference_steps)
    one = plan.costs(flags, dit_config)
    sampling, decoding = (one["static"] + one["with"]["moments"][name] for name in ("generator", "decoder"))
    if pavrm:
        sampling += sum(p.nbytes for p in pavrm.parameters())
    peak = max(sampling, decoding)
    if peak <= memory:
        return None
    return (f"likely out of memory: this needs {peak / 1e9:.0f} GB of a GPU's {memory / 1e9:.0f}: lower "
            "--batch_size, --size or --frames, or start on more GPUs with torchrun and --parallel fsdp or "
            "--sequence_parallel")


def write_metadata(folder, videos, settings):
    """Writes metadata.jsonl for the videos whose files exist. settings: those that all videos share."""
    rows = []
    for video in videos:
        if video.path.exists():
            place = {name: getattr(video, name) for name in samples.OF_A_VIDEO}
            made = settings | place
            rows.append(samples.row(folder, video.path.name, video.prompt, video.seed, video.image, made))
    update_rows(Path(folder) / "metadata.jsonl", rows)


@torch.no_grad()
def main(config):
    # ---- which videos, by which generator
    check_flags(config)
    videos, before = list_videos(config)
    model = resolve_model(config, config.transformer)
    dit = load_transformer(config.transformer or model, load_now=False, task=config.task)
    dit.eval().requires_grad_(False)
    generator = f"--transformer {config.transformer}" if config.transformer else f"--model {model}"
    families.require_encoders(dit.config, model, generator)
    half = families.of_config(dit.config).half
    config.mixed_precision = config.mixed_precision or (runs.fast_precision() if half else "no")
    runtime = common.setup(config.mixed_precision, config.seed, config.sequence_parallel)
    parallel.check(parallel.Flags(parallel=config.parallel, sequence_parallel=config.sequence_parallel))
    size, device = settle(config, dit.config), runtime.device
    for expert, adapters in experts.with_adapters(dit, config):
        lora.attach(expert, adapters)
    check_images(videos, dit.config, size)
    drops = search.drops_of(config)
    pavrm = None
    if config.best_of > 1:
        pavrm = parallel.whole(load_pavrm(config.reward or f"{model}/reward", dit, load_now=False),
                               runtime.dtype)
    place_videos(videos, config.batch_size)
    todo = batches(videos)
    if config.output_dir:
        disk.require_shared(config.output_dir, "--output_dir")
    else:
        disk.require_shared(Path(config.output).parent, "--output")
    if config.output_dir:
        if runtime.rank == 0:
            flags = {name: getattr(config, name) for name in samples.FLAGS}
            settings = samples.describe(flags, config.output_dir)
            if before and before.get("weights") not in (None, settings["weights"]):
                print(f"note: {config.prompts}: the weights named there have changed since: these are new "
                      "videos")
            folder_lock = start_folder(config, videos, settings["weights"])  # noqa: F841   until main returns
        todo = common.gather([batch for batch in todo if not is_done(batch)])[0]
    if device.type == "cuda" and runtime.rank == 0:
        memory = torch.cuda.get_device_properties(device).total_memory
        if line := memory_warning(config, dit.config, runtime, memory, pavrm):
            print(line, flush=True)
    shape = families.latent_shape(dit.config, size, config.frames)
    mine, shown = parallel.work_of_rank(todo, runtime, config.parallel), []
    largest = max((len(batch) for batch in todo), default=0)

    vae = families.load_vae(f"{model}/vae")
    image_encoder = families.load_image_encoder(f"{model}/image_encoder") if dit.config["image_dim"] else None
    guidance = experts.guidance(dit, config.guidance_scale, config.guidance_scale_2)
    negative = [] if config.negative_prompt is None else [config.negative_prompt]
    prompts = [video.prompt for batch, _ in mine for video in batch] + negative
    contexts = families.encode_prompts(f"{model}/text_encoder", prompts, device)
    null = contexts[negative[0]].to(device) if negative else None                                   # [l, d]
    on_device = parallel.to_sample(dit, runtime, config.parallel)

    about = f"batches of up to {config.batch_size * runtime.world_size} videos"
    for batch, keep in common.progress(mine, about):
        context = encoders.stack_contexts([contexts[video.prompt] for video in batch]).to(device)  # [b, l, d]
        conditions = families.conditions_of_images(dit.config, vae, image_encoder,
                                                   [video.image for video in batch], size, config.frames,
                                                   device)
        with on_device(), encoders.on(pavrm, device):
            latents, passes = search.best_of(                                                # [b, c, f, h, w]
                dit, pavrm, shape, context, batch[0].seed, [video.index for video in batch],
                config.num_inference_steps, config.best_of, drops, shift=config.shift,
                guidance_scale=guidance, null=null, batch_size=config.batch_size, max_rows=largest,
                autocast=runtime.autocast, **conditions)
        if not keep:
            continue
        with encoders.on(vae, device):
            pixels = encoders.decode_pixels(vae, latents)                                    # [b, F, H, W, 3]
        for video, frames in zip(batch, pixels):
            if video.path:
                write_video(video.path, frames, config.fps)
                if config.contact_sheet:
                    shown.append((video.index, frames))
        if config.output_dir and runtime.rank == 0:
            write_metadata(config.output_dir, videos, settings)
    shown = sorted(itertools.chain(*common.gather(shown)), key=lambda one: one[0])
    if runtime.rank == 0:
        if pavrm is not None and mine:
            print(search.cost_in_words(config.best_of, passes, config.num_inference_steps,
                                       guidance))
        if config.output_dir:
            write_metadata(config.output_dir, videos, settings)
            print(f"wrote {len(videos)} videos and metadata.jsonl in {config.output_dir}")
        else:
            print(*(f"wrote {video.path}" for video in videos), sep="\n")
        if config.contact_sheet:
            contact_sheet(torch.stack([frames for _, frames in shown]), config.contact_sheet)
            print(f"wrote {config.contact_sheet}")
    common.teardown()


if __name__ == "__main__":
    common.cli(main, Config, __doc__)
