"""Real files in and out: mp4 clips, metadata files, and the latent shards that training reads.

    python data.py world clips --count 1024 --kind mixture       clips of the embedded world, with labels
    python data.py check clips                                   what is wrong, clip by clip
    python data.py encode clips --out latents --size 832*480 --frames 81 --fps 16

A data folder holds clips and metadata.jsonl (or .csv), one row a clip: file_name (or video, file), prompt (or
text, caption), and perhaps label (or reward): 1 good, 0 bad, missing = unlabelled, which is never read as 0.

Axes: b batch, c latent channels, F video frames (4k + 1), f latent frames (k + 1), H W pixels, h w latents,
l text tokens, d text width, n clips of a shard.
"""
import collections, csv, functools, itertools, json, os, sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
from av.video.reformatter import Interpolation, VideoReformatter
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

import common
from common import InputError, arg
# uint8 [b, F, H, W, 3] <-> float [b, 3, F, H, W] in [-1, 1]
from vae import from_pixels as to_float, to_pixels as to_uint8

HERE = Path(__file__).resolve().parent
FIELDS = {"file_name": ("file_name", "video", "file"), "prompt": ("prompt", "text", "caption"),
          "label": ("label", "reward")}
LABELS = {None: None, "0": 0, "1": 1, "0.0": 0, "1.0": 1, "False": 0, "True": 1}
FEWEST = 5  # frames of a clip to train on: two latent frames


# ---- video files
def read_video(path):
    """-> uint8 [f, h, w, 3], upright. Raises InputError if the file cannot be decoded to its end."""
    return read_clip(path)[0]


def read_clip(path, size=None, frames=None, fps=None):
    """-> (video uint8 [F, H, W, 3], its frames per second). Raises InputError if it cannot be decoded.

    size (W, H): scaled to cover it, then centre-cropped. frames: reading stops after as many. fps: frames are
    dropped, by their time stamps, down to this rate.
    """
    if not Path(path).is_file():
        raise InputError(f"{path}: there is no such file")
    images, reformatter, start = [], VideoReformatter(), None
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise InputError(f"{path}: holds no video stream")
            stream = container.streams.video[0]
            stream.codec_context.thread_count = 1  # clips are small: threads cost more than they give
            stream.codec_context.options = {"err_detect": "explode"}  # no frames made up for damaged ones
            native = float(stream.average_rate or stream.guessed_rate or 8)
            if fps and fps > 1.02 * native:
                raise InputError(f"{path}: has {native:.3g} frames per second, fewer than --fps {fps:g}")
            for count, frame in enumerate(container.decode(stream)):
                start = frame.time if start is None else start
                time = count / native if frame.time is None else frame.time - start
                # Image number len(images) is due at len(images) / fps; a gap repeats the frame after it.
                while fps is None or len(images) / fps < time + 0.5 / native:
                    images.append(_to_rgb(frame, size, reformatter))
                    if fps is None or len(images) == frames:
                        break
                if len(images) == frames:
                    break
    except (av.FFmpegError, OSError) as e:
        raise InputError(f"{path}: damaged or not a video ({e.strerror or e})") from None
    if len({image.shape for image in images}) != 1:
        raise InputError(f"{path}: " + ("its frames differ in size" if images else "holds no frames"))
    return torch.from_numpy(np.stack(images)), fps or native


def _to_rgb(frame, size, reformatter):
    """-> uint8 [H, W, 3], turned as the file asks (phones store portrait clips lying down)."""
    turns = round(frame.rotation / 90) % 4
    width, height = (frame.width, frame.height)[::-1 if turns % 2 else 1]
    scale = max(size[0] / width, size[1] / height) if size else 1
    wide, high = (round(width * scale), round(height * scale))
    how = Interpolation.AREA if scale < 1 else Interpolation.BICUBIC if scale > 1 else Interpolation.BILINEAR
    stored = (wide, high)[::-1 if turns % 2 else 1]
    scaled = reformatter.reformat(frame, *stored, "rgb24", interpolation=how, threads=1)
    image = np.rot90(scaled.to_ndarray(), turns)
    left, top = ((wide - size[0]) // 2, (high - size[1]) // 2) if size else (0, 0)
    return np.ascontiguousarray(image[top:top + size[1], left:left + size[0]] if size else image)


def write_video(path, video, fps=8):
    """Writes uint8 [f, h, w, 3] (tensor or array) as H.264, 4:2:0 (odd sizes gain a row or column), whole or
    not at all. Raises InputError if the name does not end in .mp4."""
    path, video, reformatter = Path(path), np.asarray(video), VideoReformatter()
    if path.suffix.lower() != ".mp4":
        raise InputError(f"{path}: the name of a video to write must end in .mp4")
    if video.dtype != np.uint8 or video.ndim != 4 or video.shape[-1] != 3 or not len(video):
        raise ValueError(f"write_video wants uint8 [f, h, w, 3], got {video.dtype} {list(video.shape)}")
    video = np.pad(video, ((0, 0), (0, video.shape[1] % 2), (0, video.shape[2] % 2), (0, 0)), mode="edge")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with av.open(str(temporary), "w", format="mp4") as container:
            stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
            stream.height, stream.width, stream.pix_fmt = *video.shape[1:3], "yuv420p"
            stream.options = {"crf": "12", "preset": "veryfast", "threads": "1"}
            for image in video:
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
                container.mux(stream.encode(reformatter.reformat(frame, format="yuv420p", threads=1)))
            container.mux(stream.encode())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


# ---- pictures
def write_png(path, image):
    """Writes uint8 [h, w, 3] as PNG, whole or not at all."""
    image = np.ascontiguousarray(image)
    codec = av.CodecContext.create("png", "w")
    codec.height, codec.width, codec.pix_fmt, codec.time_base = *image.shape[:2], "rgb24", Fraction(1, 1)
    packets = codec.encode(av.VideoFrame.from_ndarray(image, format="rgb24")) + codec.encode(None)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(f"{path}.tmp")
    temporary.write_bytes(b"".join(bytes(packet) for packet in packets))
    os.replace(temporary, path)


def contact_sheet(videos, path, scale=3):
    """Writes uint8 videos [n, f, h, w, 3] as one PNG: a row a video, time to the right."""
    frames = np.asarray(videos).repeat(scale, 2).repeat(scale, 3)                   # [n, f, H, W, 3]
    frames = np.pad(frames, ((0, 0), (0, 0), (0, scale), (0, scale), (0, 0)), constant_values=255)
    n, f, h, w, _ = frames.shape
    write_png(path, frames.transpose(0, 2, 1, 3, 4).reshape(n * h, f * w, 3))


# ---- metadata
def read_rows(folder):
    """Yields (place, {file_name, prompt, label} or None, problem or None) for each row of the metadata."""
    paths = [path for path in Path(folder).glob("metadata.*") if path.suffix in (".jsonl", ".csv")]
    if not paths:
        missing = "no metadata.jsonl or metadata.csv in it" if Path(folder).is_dir() else "no such folder"
        raise InputError(f"{folder}: {missing}")
    path = max(paths)  # .jsonl before .csv
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            for number, line in enumerate(csv.DictReader(file) if path.suffix == ".csv" else file, 1):
                if isinstance(line, dict) or line.strip():
                    yield f"{path} row {number}", *_parse_row(line)
    except (UnicodeDecodeError, csv.Error) as e:
        raise InputError(f"{path}: is not UTF-8 text of that format ({e})") from None


def _parse_row(line):
    try:
        raw = line if isinstance(line, dict) else json.loads(line)
        row = {field: next((raw[name] for name in names if raw.get(name) not in (None, "")), None)
               for field, names in FIELDS.items()}
    except (ValueError, AttributeError):
        return None, "not a JSON object"
    if not isinstance(row["file_name"], str):
        return None, "no file_name (or video, file)"
    label = row["label"] if row["label"] is None else str(row["label"]).strip()
    if label not in LABELS:
        return None, f"label must be 0, 1 or missing, got {row['label']!r}"
    return row | {"prompt": str(row["prompt"] or "").strip(), "label": LABELS[label]}, None


def read_metadata(folder):
    """-> [{file_name, prompt, label: 0 | 1 | None}]. Raises InputError naming the first unusable row."""
    rows = list(read_rows(folder))
    for place, _, problem in rows:
        if problem:
            raise InputError(f"{place}: {problem}")
    if not rows:
        raise InputError(f"{folder}: its metadata file has no rows")
    return [row for _, row, _ in rows]


# ---- latent shards
def write_shards(folder, latents, contexts, labels, prompts, file_names=None, fps=8.0, settings=None,
                 append=False):
    """Writes one shard: latents [n, c, f, h, w] and contexts [n, l, d] as float32, labels (0, 1, None or -1),
    prompts. append: after the shards there, else in their place. A kill at any moment leaves whole shards."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    shapes = {"latent_shape": list(latents.shape[1:]), "context_shape": list(contexts.shape[1:])}
    before = Shards(folder) if append and (folder / "shards.json").exists() else None
    index = before.index if before else shapes | {"fps": fps, "settings": settings, "shards": []}
    if {key: index[key] for key in shapes} != shapes:
        raise InputError(f"{folder}: shards there have another shape than {shapes}")
    values = torch.tensor([-1 if x is None else int(x) for x in labels], dtype=torch.int8)
    name = f"shard-{len(index['shards']):05d}.safetensors"
    names = file_names or [f"{name}#{i}" for i in range(len(values))]
    rows = [{"file_name": file, "prompt": prompt, "label": None if label < 0 else label}
            for file, prompt, label in zip(names, prompts, values.tolist(), strict=True)]
    if not before:
        (folder / "shards.json").unlink(missing_ok=True)
    latents, contexts = latents.float().contiguous(), contexts.float().contiguous()
    save_file({"latents": latents, "context": contexts, "label": values}, folder / f"{name}.tmp")
    os.replace(folder / f"{name}.tmp", folder / name)
    rows = (before.rows if before else []) + rows
    _replace(folder / "metadata.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    index["shards"].append({"file": name, "count": len(values)})
    _replace(folder / "shards.json", json.dumps(index | {"count": len(rows)}, indent=1))


def _replace(path, text):
    Path(f"{path}.tmp").write_text(text, encoding="utf-8")
    os.replace(f"{path}.tmp", path)


class Shards:
    """Read-only view of a folder of shards, memory-mapped: resident memory does not grow with the data.
    Raises InputError, one line, if the folder is missing, truncated or inconsistent."""

    def __init__(self, folder):
        self.folder = folder = Path(folder)
        self.tensors, self.where, labels = [], [], []
        try:
            self.index = json.loads((folder / "shards.json").read_text())
            self.latent_shape = tuple(self.index["latent_shape"])    # (c, f, h, w)
            self.context_shape = tuple(self.index["context_shape"])  # (l, d)
            self.fps, self.settings = self.index["fps"], self.index["settings"]
            for entry in self.index["shards"]:
                path, n = folder / entry["file"], entry["count"]
                file = safe_open(path, "pt")
                views = [file.get_slice(key) for key in ("latents", "context", "label")]
                shapes = [tuple(view.get_shape()) for view in views]
                if shapes != [(n, *self.latent_shape), (n, *self.context_shape), (n,)]:
                    raise InputError(f"{path}: holds {shapes}, not what shards.json says: encode again")
                self.where += [(len(self.tensors), i) for i in range(n)]
                self.tensors.append(views)
                labels.append(views[2][:])
        except (FileNotFoundError, NotADirectoryError) as e:
            raise InputError(f"{e.filename or path} is missing: `python data.py encode` writes it") from None
        except (OSError, SafetensorError) as e:
            raise InputError(f"{path}: truncated or damaged ({e}): encode again") from None
        except (json.JSONDecodeError, KeyError, TypeError) as e:
            raise InputError(f"{folder}/shards.json: damaged ({e!r}): encode again") from None
        self.rows = read_metadata(folder)[:len(self.where)]  # later rows: of a shard that a kill cut off
        self.labels = torch.cat(labels) if labels else torch.empty(0, dtype=torch.int8)
        if not 0 < len(self) == self.index["count"] == len(self.rows):
            raise InputError(f"{folder}: shards.json counts {self.index['count']} clips, the shards hold "
                             f"{len(self)}, metadata.jsonl {len(self.rows)}: encode again")
        if [-1 if row["label"] is None else row["label"] for row in self.rows] != self.labels.tolist():
            raise InputError(f"{folder}: metadata.jsonl and shards differ in labels: change them beside "
                             "the clips and encode again")

    def __len__(self):
        return len(self.where)

    def batch(self, indices):
        """-> {latents [b, c, f, h, w], context [b, l, d], label int8 [b] (-1: none), prompt: list of b}"""
        indices = [int(i) for i in indices]
        places = [self.where[i] for i in indices]
        latents, context = (torch.cat([self.tensors[s][k][i:i + 1] for s, i in places]) for k in (0, 1))
        return {"latents": latents, "context": context, "label": self.labels[indices],
                "prompt": [self.rows[i]["prompt"] for i in indices]}

    def require(self, channels=None, context_shape=None, labelled=False):
        """Raises InputError naming the field that does not fit a model of these latent channels and contexts
        [l, d]; labelled: every clip needs a label, and both labels must occur."""
        if channels not in (None, self.latent_shape[0]):
            raise InputError(f"{self.folder}: latents have {self.latent_shape[0]} channels, the model "
                             f"has {channels}: encode with its own VAE")
        if context_shape is not None and tuple(context_shape) != self.context_shape:
            raise InputError(f"{self.folder}: context is {list(self.context_shape)} (tokens, width), not "
                             f"{list(context_shape)} as the model's: encode with its own text encoder")
        bare = [row["file_name"] for row in self.rows if row["label"] is None]
        if labelled and bare:
            raise InputError(f"{self.folder}: labels missing for {len(bare)} of {len(self)} clips: "
                             f"{', '.join(bare[:3] + ['...'][:len(bare) > 3])}: label them and encode again")
        if labelled and len(self.labels.unique()) < 2:
            raise InputError(f"{self.folder}: every label is {self.labels[0]}: a reward model needs 0 and 1")


    def require_fit(self, dit, labelled=False):
        """`require` what the VideoDiT wants; its context may be shorter than text_len, as it pads."""
        length = min(self.context_shape[0], dit.config["text_len"])
        self.require(dit.config["out_dim"], (length, dit.config["text_dim"]), labelled)


@functools.lru_cache(maxsize=4)
def _permutation(n, seed, epoch):
    return torch.randperm(n, generator=common.generator(seed, "order", epoch))


def order(n, seed, step, indices, global_batch):
    """Which of n examples stand at `indices` of the global batch of step 0, 1, ... -> int64 [len(indices)].
    Every epoch is its own permutation; nothing depends on the number of ranks; there is no state to save."""
    places = [step * global_batch + int(i) for i in indices]
    return torch.stack([_permutation(n, seed, place // n)[place % n] for place in places])


def split(n, holdout, seed):
    """-> (train, held-out) sorted int64 indices; holdout: a share below 1, or a number of examples."""
    count = round(n * holdout) if holdout < 1 else int(holdout)
    if not 0 <= count < n:
        raise InputError(f"a holdout of {holdout} leaves nothing to train on: there are {n} examples")
    shuffled = torch.randperm(n, generator=common.generator(seed, "split"))
    return shuffled[count:].sort().values, shuffled[:count].sort().values


def labelled_split(shards, holdout, seed):
    """`split` of the labelled clips, holdout in number. Raises InputError if a part is empty or all of one label."""
    labelled = (shards.labels >= 0).nonzero()[:, 0]
    if holdout >= len(labelled):
        raise InputError(f"--holdout {holdout} leaves nothing to train on: there are {len(labelled)} labelled videos")
    train, held = (labelled[part] for part in split(len(labelled), holdout, seed))
    if any(len(shards.labels[part].unique()) < 2 for part in (train, held)):
        raise InputError(f"{shards.folder}: training or held-out videos are all of one label; a reward model needs "
                         "both 0 and 1")
    return train, held


# ---- the generator's own samples
@torch.no_grad()
def own_samples(folder, generator, model, count, num_steps, size, seed, runtime):
    """Shards of `count` samples of a VideoDiT, judged by the embedded world's annotator; made once and kept.

    Label 1: qualified on both axes and true to the prompt; 0: unqualified on an axis or against the prompt; none in
    between. model: the folder with its vae/ and text_encoder/. Every rank makes its share. Raises InputError if
    `folder` was made with other settings.
    """
    import flow
    import world
    from model import first_frame_condition, load_text_encoder
    from vae import load_vae
    settings = {"model": str(model), "count": count, "num_steps": num_steps, "size": size, "seed": seed}
    if (Path(folder) / "shards.json").exists():
        shards = Shards(folder)
        if shards.settings != settings:
            raise InputError(f"{folder}: was made with {shards.settings}; use another --output_dir, or remove it")
        return shards
    vae = load_vae(f"{model}/vae").to(runtime.device)
    text = load_text_encoder(f"{model}/text_encoder").to(runtime.device)
    prompts = world.draw_prompts(count, seed + 11)
    image_to_video = generator.config["model_type"] == "i2v"
    first_frames = world.make(count, seed + 10, "clean", size)[0] if image_to_video else None
    mine = range(runtime.rank, count, runtime.world_size)
    made = []
    for i in common.progress(range(0, len(mine), 128), "own samples (x128)"):
        indices = list(mine[i:i + 128])
        wanted = [prompts[j] for j in indices]
        context = text.encode(wanted)                                                               # [b, l, d]
        y = first_frame_condition(vae.encode(to_float(first_frames[indices]).to(runtime.device))) \
            if image_to_video else None
        x0 = flow.sample(generator, world.LATENT_SHAPES[size], context, seed, indices, num_steps, y=y,
                         autocast=runtime.autocast)                                                 # [b, c, f, h, w]
        judged = world.annotate(to_uint8(vae.decode(x0)).cpu(), wanted)
        labels = [1 if good else 0 if bad else None for good, bad in
                  zip(judged["qualified"].tolist(), judged["unqualified"].tolist())]
        made += zip(indices, x0.cpu(), context.cpu(), labels)
    made = sorted(itertools.chain(*common.gather(made)), key=lambda row: row[0])
    if runtime.rank == 0:
        _, latents, contexts, labels = zip(*made)
        write_shards(folder, torch.stack(latents), torch.stack(contexts), labels, prompts, settings=settings)
    common.gather(None)                                         # the others wait for the file
    return Shards(folder)


def clean_clips(folder, model, count, size, seed, runtime):
    """Shards of clean clips of the embedded world, through the same door as anybody's: mp4 files, then encoded with
    the vae/ and text_encoder/ in `model`. Made once (by rank 0) and kept in `folder`."""
    clips, latents, mark = Path(folder) / "clips", Path(folder) / "latents", Path(folder) / "world.json"
    settings = {"count": count, "size": size, "seed": seed}
    if mark.exists() and json.loads(mark.read_text()) != settings:
        raise InputError(f"{folder}: was made with {mark.read_text().split()}; use another --output_dir, or remove it")
    common.gather(None)                                         # every rank has looked
    if runtime.rank == 0:
        Path(folder).mkdir(parents=True, exist_ok=True)
        common.write_json(mark, settings)
        if not (clips / "metadata.jsonl").exists():
            world_command(World(str(clips), count=count, seed=seed, kind="clean", size=size))
        encode_command(Encode(str(clips), out=str(latents), vae=f"{model}/vae", text_encoder=f"{model}/text_encoder"))
    common.gather(None)                                         # the others wait for the files
    return Shards(latents)


# ---- commands
@dataclass
class World:
    folder: str = arg(..., "where clips and metadata.jsonl go", positional=True)
    count: int = arg(1024, "clips", above=0)
    seed: int = arg(0, "of clips and prompts", at_least=0)
    kind: str = arg("mixture", "clean, mixture (of clean and flawed), flawed, or the name of one flaw")
    size: str = arg("tiny", "size of the world", choices=("tiny", "small"))


def world_command(config):
    import world
    rows, bar = [], common.progress(config.count, "render")
    for start in range(0, config.count, 64):  # always 64, so that a larger count begins with the same clips
        seed = int(torch.randint(2 ** 31, (), generator=common.generator(config.seed, "world", start)))
        videos, prompts, _ = world.make(64, seed, config.kind, config.size)
        judged = world.annotate(videos, prompts)
        for i in range(min(64, config.count - start)):
            name, good = f"clips/{start + i:06d}.mp4", int(judged["qualified"][i])
            write_video(Path(config.folder) / name, videos[i], fps=8)
            certain = good or judged["unqualified"][i]  # clips in between stay unlabelled, as in the paper
            rows.append({"file_name": name, "prompt": prompts[i]} | ({"label": good} if certain else {}))
            bar.update()
    bar.close()
    _replace(Path(config.folder) / "metadata.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    counts = collections.Counter(row.get("label") for row in rows)
    print(f"{config.folder}: {len(rows)} clips, {counts[1]} good, {counts[0]} bad, {counts[None]} unlabelled")


@dataclass
class Check:
    folder: str = arg(..., "folder with clips and metadata", positional=True)
    size: str | None = arg(None, "W*H: clips are scaled to cover it and centre-cropped")
    frames: int | None = arg(None, "frames of each clip, 4k + 1, or all it has", at_least=FEWEST)
    fps: float | None = arg(None, "frames per second, or the clip's own; faster clips drop frames", above=0)


def parse_size(config):
    """--size '832*480' or '832x480' -> (832, 480) or None; --frames is checked too. Raises InputError."""
    sides = (config.size or "16*16").replace("x", "*").split("*")
    sides = [int(side) if side.isdecimal() else 0 for side in sides]
    if len(sides) != 2 or not all(side and side % 16 == 0 for side in sides):
        raise InputError(f"--size must be W*H, both multiples of 16, got {config.size}")
    if config.frames and config.frames % 4 != 1:
        raise InputError(f"--frames must be 4k + 1, as {config.frames // 4 * 4 + 1} is, got {config.frames}")
    return tuple(sides) if config.size else None


def load_clips(rows, config, size, kind=None):
    """Yields (row, uint8 [F, H, W, 3] or None, kind, problem or None), in order. Clips are cut to 4k + 1
    frames, and all must be of one kind [W, H, F, fps]: the given one, or that of the first usable clip."""
    seen = set()

    def load(row):
        path = Path(config.folder) / row["file_name"]
        try:
            video, fps = read_clip(path, size, config.frames, config.fps)
        except InputError as e:
            return None, None, str(e).removeprefix(f"{path}: ")
        kind = [video.shape[2], video.shape[1], (len(video) - 1) // 4 * 4 + 1, round(fps, 1)]
        if kind[2] < (config.frames or FEWEST):
            return None, kind, f"too short: {len(video)} frames of {config.frames or FEWEST} at {fps:.3g} fps"
        if kind[0] % 16 or kind[1] % 16:
            return None, kind, f"size {kind[0]}x{kind[1]} is not a multiple of 16: pass --size W*H"
        return video[:kind[2]], kind, None if row["prompt"] else "empty prompt"

    with ThreadPoolExecutor(8) as pool:
        for start in range(0, len(rows), 8):  # at most 8 decoded clips at a time
            part = rows[start:start + 8]
            for row, (video, found, problem) in zip(part, pool.map(load, part)):
                kind = kind or (None if problem else found)
                if problem is None and found != kind:
                    problem = f"is {show(found)}, the others are {show(kind)}: pass --size, --frames, --fps"
                problem = "listed twice" if row["file_name"] in seen else problem
                seen.add(row["file_name"])
                yield row, None if problem else video, found, problem


def show(kind):
    return "{}x{}, {} frames, {:g} fps".format(*kind)


def check_command(config):
    size, listed, usable = parse_size(config), list(read_rows(config.folder)), []
    problems = [f"{place}: {problem}" for place, _, problem in listed if problem]
    bar = common.progress(len(listed) - len(problems), "check")
    for row, _, kind, problem in load_clips([row for _, row, bad in listed if not bad], config, size):
        problems += [f"{row['file_name']}: {problem}"] if problem else []
        usable += [] if problem else [(row["label"], show(kind))]
        bar.update()
    bar.close()
    labels = collections.Counter(label for label, _ in usable)
    print(*problems, f"{config.folder}: {len(usable)} of {len(listed)} clips usable: {labels[1]} good, "
          f"{labels[0]} bad, {labels[None]} unlabelled" + (f"; {usable[0][1]}" if usable else ""), sep="\n")
    if problems or not listed:
        raise InputError(f"{config.folder}: {len(problems)} of {len(listed)} clips cannot be used")


@dataclass
class Encode(Check):
    out: str = arg("latents", "folder of the shards; a second run goes on where the first one stopped")
    vae: str = arg(str(HERE / "checkpoints/vae"), "folder of the VAE")
    text_encoder: str = arg(str(HERE / "checkpoints/text_encoder"), "folder of the text encoder")
    batch_size: int = arg(8, "clips encoded at once", above=0)
    shard_size: int = arg(256, "clips a shard", above=0)


@torch.inference_mode()
def encode_command(config):
    from model import load_text_encoder
    from vae import load_vae
    size, out, rows = parse_size(config), Path(config.out), read_metadata(config.folder)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    settings = {name: getattr(config, name) for name in ("size", "frames", "fps", "vae", "text_encoder")}
    before = Shards(out) if (out / "shards.json").exists() else None
    done = {row["file_name"]: row for row in before.rows} if before else {}
    kind = (before.settings or {}).get("kind") if before else None
    if before and before.settings != settings | {"kind": kind}:
        raise InputError(f"{out}: was encoded with {before.settings}: use these flags, or another --out")
    if changed := [row["file_name"] for row in rows if done.get(row["file_name"], row) != row]:
        raise InputError(f"{out}: prompt or label of {changed[0]} has changed since: use another --out")
    vae, text = load_vae(config.vae).to(device), load_text_encoder(config.text_encoder).to(device)
    out.mkdir(parents=True, exist_ok=True)
    todo, batch, ready, skipped = [row for row in rows if row["file_name"] not in done], [], [], 0
    bar = common.progress(len(rows), "encode", initial=len(rows) - len(todo))
    with (out / "report.jsonl").open("w", buffering=1) as report:
        for row, video, kind, problem in itertools.chain(load_clips(todo, config, size, kind), [(None,) * 4]):
            if problem:
                skipped += 1
                bar.write(f"skipped {row['file_name']}: {problem}")
                report.write(json.dumps({"file_name": row["file_name"], "reason": problem}) + "\n")
            elif row:
                batch.append((row, video, kind))
            bar.update(row is not None)
            if batch and (len(batch) == config.batch_size or row is None):
                latents = vae.encode(to_float(torch.stack([video for _, video, _ in batch]).to(device)))
                contexts = text.encode([row["prompt"] for row, _, _ in batch])
                ready += [(r, k, x, c) for (r, _, k), x, c in zip(batch, latents.cpu(), contexts.cpu())]
                batch = []
            if ready and (len(ready) >= config.shard_size or row is None):
                kept, kinds, latents, contexts = zip(*ready)
                write_shards(out, torch.stack(latents), torch.stack(contexts), *(
                    [row[name] for row in kept] for name in ("label", "prompt", "file_name")),
                    fps=kinds[0][3], settings=settings | {"kind": kinds[0]}, append=True)
                ready = []
    bar.close()
    print(f"{out}: {len(rows) - skipped} of {len(rows)} clips encoded"
          + (f", {skipped} skipped: see {out / 'report.jsonl'}" if skipped else ""))
    if skipped == len(rows):
        raise InputError(f"{config.folder}: no clip could be encoded: see {out / 'report.jsonl'}")


COMMANDS = {"world": (world_command, World), "check": (check_command, Check),
            "encode": (encode_command, Encode)}

if __name__ == "__main__":
    command = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if command in ("-h", "--help"):
        print(__doc__)
    elif command in COMMANDS:
        common.cli(*COMMANDS[command], __doc__, sys.argv[2:], f"data.py {command}")
    else:
        sys.exit(print(f"error: data.py has world, check and encode, not {command}", file=sys.stderr) or 2)
