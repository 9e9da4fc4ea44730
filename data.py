"""Clips in: metadata files, the latent shards that training reads, and the loader (formats/video.py reads the files).

    python data.py check clips                                   what is wrong, clip by clip
    python data.py encode clips --out latents                    with the shipped VAE and text encoder
    python data.py encode clips --out latents --size "832*480" --frames 81 --fps 16 --vae Wan2.1/vae \
        --text_encoder Wan2.1/text_encoder                       with Wan2.1's own (requirements-wan.txt)

A data folder holds clips and metadata.jsonl (or .csv), one row a clip: file_name (or video, file), prompt (or
text, caption), and perhaps label (or reward): 1 good, 0 bad, missing = unlabelled, which is never read as 0.

Axes: b batch, c latent channels, F video frames (4k + 1), f latent frames (k + 1), H W pixels, h w latents,
l text tokens, d text width, n clips of a shard, m CLIP image tokens.
"""
import collections
import csv
import functools
import itertools
import json
import math
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

import common
from common import InputError, arg
from formats import labels as people
from formats.codec import load_image_encoder, load_text_encoder, load_vae, save_null_context
from formats.video import frame_rate, from_pixels, read_clip
from formats.weights import SHIPPED

FIELDS = {"file_name": ("file_name", "video", "file"), "prompt": ("prompt", "text", "caption"),
          "label": ("label", "reward")}
LABELS = {None: None, "0": 0, "1": 1, "0.0": 0, "1.0": 1, "False": 0, "True": 1}
FEWEST = 5  # frames of a clip to train on: two latent frames
SUFFIXES = (".mp4", ".mov", ".webm", ".mkv", ".avi", ".m4v")
# What encode holds in memory: clips decoded ahead, pixels of a batch, bytes of a shard, bytes of a clip whose size
# and length no flag says. 81 frames of 832x480 are 97 MB, as float32 388 MB, and 17 MB in a shard of Wan2.1.
AHEAD, BATCH_PIXELS, SHARD_BYTES, CLIP_BYTES = 2, 2 ** 24, 2 ** 27, 2 ** 27


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
                 append=False, clips=None, **extra):
    """Writes one shard: latents [n, c, f, h, w] and contexts [n, l, d] as float32, labels (0, 1, None or -1),
    prompts; extra: of image-to-video, clip_fea [n, m, d'] and condition [n, c, f, h, w]. append: after the shards
    there, else in their place. clips: the folder they were made of, for `Shards.relabel`. A kill at any moment leaves
    whole shards."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    shapes = {"latent_shape": list(latents.shape[1:]), "context_shape": list(contexts.shape[1:]),
              "extra_shapes": {name: list(x.shape[1:]) for name, x in extra.items()}}
    before = Shards(folder) if append and (folder / "shards.json").exists() else None
    index = before.index if before else shapes | {"fps": fps, "settings": settings, "shards": []}
    index |= {"clips": os.path.relpath(os.path.realpath(clips), os.path.realpath(folder))} if clips else {}
    if {key: index.get(key, {}) for key in shapes} != shapes:
        raise InputError(f"{folder}: shards there have another shape than {shapes}")
    values = torch.tensor([-1 if x is None else int(x) for x in labels], dtype=torch.int8)
    name = f"shard-{len(index['shards']):05d}.safetensors"
    names = file_names or [f"{name}#{i}" for i in range(len(values))]
    rows = [{"file_name": file, "prompt": prompt, "label": None if label < 0 else label}
            for file, prompt, label in zip(names, prompts, values.tolist(), strict=True)]
    if not before:
        (folder / "shards.json").unlink(missing_ok=True)
    tensors = {name: x.float().contiguous() for name, x in (extra | dict(latents=latents, context=contexts)).items()}
    save_file(tensors | {"label": values}, folder / f"{name}.tmp")
    os.replace(folder / f"{name}.tmp", folder / name)
    rows = (before.rows if before else []) + rows
    replace_text(folder / "metadata.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    index["shards"].append({"file": name, "count": len(values)})
    replace_text(folder / "shards.json", json.dumps(index | {"count": len(rows)}, indent=1))


def replace_text(path, text):
    Path(f"{path}.tmp").write_text(text, encoding="utf-8")
    os.replace(f"{path}.tmp", path)


class Shards:
    """Read-only view of a folder of shards, memory-mapped for each batch: resident memory does not grow with the
    data. Raises InputError, one line, if the folder is missing, truncated or inconsistent."""

    def __init__(self, folder):
        self.folder = folder = Path(folder)
        self.where, labels = [], []
        try:
            self.index = json.loads((folder / "shards.json").read_text())
            self.latent_shape = tuple(self.index["latent_shape"])    # (c, f, h, w)
            self.context_shape = tuple(self.index["context_shape"])  # (l, d)
            self.shapes = {"latents": self.latent_shape, "context": self.context_shape,
                           **{name: tuple(shape) for name, shape in self.index.get("extra_shapes", {}).items()}}
            self.fps, self.settings = self.index["fps"], self.index["settings"]
            for entry in self.index["shards"]:
                path, n = folder / entry["file"], entry["count"]
                with safe_open(path, "pt") as file:
                    found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
                    if found != {"label": (n,)} | {name: (n, *shape) for name, shape in self.shapes.items()}:
                        raise InputError(f"{path}: holds {found}, not what shards.json says: encode again")
                    labels.append(file.get_tensor("label").clone())
                self.where += [(path, i) for i in range(n)]
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
            raise InputError(f"{folder}: metadata.jsonl and shards differ in labels: leave these as they were encoded, "
                             "and change labels beside the clips")
        self.label_note = "labels as they were encoded"

    def __len__(self):
        return len(self.where)

    def relabel(self, answers=None, bad="both"):
        """-> self, with today's labels, the same on every rank: people's answers in the labels.jsonl beside the clips (or in
        the file `answers`), for clips without one those of the clips' metadata, else as encoded. bad: formats/labels.py's."""
        folder = self.index.get("clips") and Path(os.path.normpath(self.folder / self.index["clips"]))
        if answers and not Path(answers).is_file():
            raise InputError(f"--labels {answers}: there is no such file")
        rows = read_metadata(folder) if folder and any(folder.glob("metadata.*")) else []
        labels = lambda rows: {os.path.normpath(row["file_name"]): row["label"] for row in reversed(rows)}
        path = answers or folder and folder / "labels.jsonl"
        sources = {f"{path}": people.majority(people.read_answers(path), bad) if path else {},
                   f"the metadata in {folder}": labels(rows), "encoding": labels(self.rows)}
        counts = collections.Counter()
        for i, name in enumerate(os.path.normpath(row["file_name"]) for row in self.rows):
            source = next(source for source, found in sources.items() if name in found)
            label = sources[source][name]
            self.labels[i] = -1 if label is None else label
            counts[source] += label is not None
        note = "labels from " + (", ".join(f"{source}: {counts[source]}" for source in sources if counts[source]) or "nowhere")
        self.labels, self.label_note = common.gather((self.labels, note))[0]    # a person may be answering meanwhile
        return self

    def batch(self, indices):
        """-> {latents [b, c, f, h, w], context [b, l, d], label int8 [b] (-1: none), prompt: list of b}, and in
        shards of image-to-video clip_fea [b, m, d'] and condition [b, c, f, h, w]."""
        indices = [int(i) for i in indices]
        batch = {name: torch.empty(len(indices), *shape) for name, shape in self.shapes.items()}
        for path in {self.where[i][0] for i in indices}:
            with safe_open(path, "pt") as file:  # closed again: what was read of an open map stays resident
                for name, rows in batch.items():
                    view = file.get_slice(name)
                    for j, (shard, k) in enumerate(self.where[i] for i in indices):
                        if shard == path:
                            rows[j:j + 1] = view[k:k + 1]
        return batch | {"label": self.labels[indices], "prompt": [self.rows[i]["prompt"] for i in indices]}

    def require(self, channels=None, context_shape=None, labelled=False, image_dim=None):
        """Raises InputError naming the field that does not fit a model of these latent channels, contexts [l, d]
        and CLIP tokens of width image_dim; labelled: both labels must occur."""
        if channels not in (None, self.latent_shape[0]):
            raise InputError(f"{self.folder}: latents have {self.latent_shape[0]} channels, the model "
                             f"has {channels}: encode with its own VAE")
        if context_shape is not None and tuple(context_shape) != self.context_shape:
            raise InputError(f"{self.folder}: context is {list(self.context_shape)} (tokens, width), not "
                             f"{list(context_shape)} as the model's: encode with its own text encoder")
        if image_dim not in (None, self.shapes.get("clip_fea", (0,))[-1]):
            raise InputError(f"{self.folder}: holds no CLIP image tokens of width {image_dim}, which the model takes: "
                             "encode with --image_encoder")
        found = sorted(set(self.labels.tolist()) - {-1})
        if labelled and len(found) < 2:
            raise InputError(f"{self.folder}: " + (f"every label is {found[0]}" if found else "no clip has a label")
                             + ": a reward model needs 0 and 1 (label.py, or `label` in the clips' metadata)")

    def require_fit(self, dit, labelled=False):
        """`require` what the VideoDiT wants; its context may be shorter than text_len, as it pads."""
        if any(side % patch for side, patch in zip(self.latent_shape[1:], dit.config["patch_size"])):
            raise InputError(f"{self.folder}: latents are {list(self.latent_shape[1:])}, which the model's patches of "
                             f"{list(dit.config['patch_size'])} do not divide: encode with another --size")
        length = min(self.context_shape[0], dit.config["text_len"])
        self.require(dit.config["out_dim"], (length, dit.config["text_dim"]), labelled, dit.config["image_dim"])


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


def take_fold(shards, fold):
    """Shards of which all clips outside `fold` count as unlabelled: "i/n" is the i-th of n random parts, which have no clip in
    common and depend on nothing but their number; None: all clips. Raises InputError."""
    if fold is None:
        return shards
    i, n = (int(part) if part.isdecimal() else 0 for part in f"{fold}/x".split("/")[:2])
    if fold.count("/") != 1 or not 1 <= i <= n:
        raise InputError(f"--fold {fold}: must be i/n, as 1/2 and 2/2 are, with i from 1 to n")
    outside = torch.randperm(len(shards), generator=common.generator(0, "fold")) % n != i - 1
    shards.labels = shards.labels.masked_fill(outside, -1)
    return shards


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


# ---- commands
@dataclass
class Check:
    folder: str = arg(..., "folder with clips and metadata", positional=True)
    size: str | None = arg(None, "W*H: clips are scaled to cover it and centre-cropped")
    frames: int | None = arg(None, "frames of each clip, 4k + 1, or all it has", at_least=FEWEST)
    fps: float | None = arg(None, "frames per second (16 for Wan2.1), or the clip's own; faster clips drop frames, "
                            "slower ones repeat them", above=0)


def parse_size(config):
    """--size '832*480' or '832x480' -> (832, 480) or None; --frames is checked too. Raises InputError."""
    sides = (config.size or "16*16").replace("x", "*").split("*")
    sides = [int(side) if side.isdecimal() else 0 for side in sides]
    if len(sides) != 2 or not all(side and side % 16 == 0 for side in sides):
        raise InputError(f"--size must be W*H, both multiples of 16, got {config.size}")
    if config.frames and config.frames % 4 != 1:
        raise InputError(f"--frames must be 4k + 1, as {config.frames // 4 * 4 + 1} is, got {config.frames}")
    return tuple(sides) if config.size else None


def load_clips(rows, config, size, kind=None, seen=()):
    """Yields (row, uint8 [F, H, W, 3] or None, kind, problem or None), in order, decoding a few clips ahead. Clips
    are cut to 4k + 1 frames, and all must be of one kind [W, H, F, fps]: the given one, or that of the first usable
    clip. seen: file names that were there before."""
    seen, rows = {os.path.normpath(name) for name in seen}, iter(rows)
    largest = None if size and config.frames else CLIP_BYTES

    def load(row):
        path = Path(config.folder) / row["file_name"]
        try:
            video, fps = read_clip(path, size, config.frames, config.fps, largest)
        except InputError as e:
            return None, None, str(e).removeprefix(f"{path}: ")
        kind = [video.shape[2], video.shape[1], (len(video) - 1) // 4 * 4 + 1, round(fps, 1)]
        if kind[2] < (config.frames or FEWEST):
            return None, kind, f"too short: {len(video)} frames of {config.frames or FEWEST} at {fps:.3g} fps"
        if kind[0] % 16 or kind[1] % 16:
            return None, kind, f"size {kind[0]}x{kind[1]} is not a multiple of 16: pass --size W*H"
        return video[:kind[2]], kind, None if row["prompt"] else "empty prompt"

    with ThreadPoolExecutor(AHEAD) as pool:
        waiting = collections.deque((row, pool.submit(load, row)) for row in itertools.islice(rows, AHEAD))
        while waiting:
            row, loading = waiting.popleft()
            video, found, problem = loading.result()
            waiting.extend((row, pool.submit(load, row)) for row in itertools.islice(rows, 1))
            del loading  # it holds the video too
            kind = kind or (None if problem else found)
            if problem is None and found != kind:
                problem = f"is {show(found)}, the others are {show(kind)}: pass --size, --frames, --fps"
            name = os.path.normpath(row["file_name"])  # a/../b.mp4 is b.mp4
            problem = "listed twice" if name in seen else problem
            seen.add(name)
            yield row, None if problem else video, found, problem


def show(kind):
    return "{}x{}, {} frames, {:g} fps".format(*kind)


def check_command(config):
    size, folder, listed, usable, slow = parse_size(config), Path(config.folder), list(read_rows(config.folder)), [], 0
    problems = [f"{place}: {problem}" for place, _, problem in listed if problem]
    rows = [row for _, row, problem in listed if not problem]
    bar = common.progress(len(rows), "check")
    for row, _, kind, problem in load_clips(rows, config, size):
        problems += [f"{row['file_name']}: {problem}"] if problem else []
        usable += [] if problem else [(row["label"], show(kind))]
        slow += not problem and config.fps is not None and frame_rate(folder / row["file_name"]) < config.fps / 1.02
        bar.update()
    bar.close()
    labels = collections.Counter(label for label, _ in usable)
    print(*problems, f"{folder}: {len(usable)} of {len(listed)} clips usable: {labels[1]} good, "
          f"{labels[0]} bad, {labels[None]} unlabelled" + (f"; {usable[0][1]}" if usable else ""), sep="\n")
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES}
    unlisted = sorted(names - {os.path.normpath(row["file_name"]) for row in rows})
    if slow:
        print(f"{slow} of them are slower than {config.fps:g} fps: their frames will repeat")
    if unlisted:
        print(f"{len(unlisted)} video files are not in the metadata: {', '.join(unlisted[:3])}"
              + ", ..." * (len(unlisted) > 3))
    if problems or not listed:
        raise InputError(f"{folder}: {len(problems)} of {len(listed)} clips cannot be used")


@dataclass
class Encode(Check):
    out: str = arg("latents", "folder of the shards; a second run goes on where the first one stopped")
    vae: str = arg(str(SHIPPED["t2v"] / "vae"), "folder of the VAE, or of diffusers' AutoencoderKLWan")
    text_encoder: str = arg(str(SHIPPED["t2v"] / "text_encoder"),
                            "folder of the text encoder, or of transformers' UMT5 (tokenizer in it or beside it)")
    image_encoder: str | None = arg(None, "folder of transformers' CLIPVisionModel, for Wan2.1's image-to-video: "
                                    "shards get its tokens, and the VAE's code of frame 0 with blank ones behind it")
    batch_size: int = arg(8, "clips encoded at once; fewer if they hold more than 16 million pixels", above=0)
    shard_size: int = arg(256, "clips a shard; fewer if they hold more than 128 MiB", above=0)


def encode_batch(videos, prompts, vae, text, image, device):
    """uint8 videos [F, H, W, 3] and their prompts -> {name in the shards: tensor [b, ...] on the CPU}"""
    videos = torch.stack(videos).to(device)                                             # [b, F, H, W, 3]
    out = {"latents": vae.encode(from_pixels(videos)), "context": text.encode(prompts)}    # [b, c, f, h, w], [b, l, d]
    if image is not None:
        blank = from_pixels(videos)
        blank[:, :, 1:] = 0
        out["condition"] = vae.encode(blank)                                            # [b, c, f, h, w]
        out["clip_fea"] = image.encode(videos[:, 0])                                    # [b, m, d']
    return {name: x.float().cpu() for name, x in out.items()}


@torch.inference_mode()
def encode_command(config):
    size, out, rows = parse_size(config), Path(config.out), read_metadata(config.folder)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    settings = {name: getattr(config, name) for name in ("size", "frames", "fps", "vae", "text_encoder")}
    settings |= {"size": config.size and config.size.replace("x", "*")}
    settings |= {"image_encoder": config.image_encoder} if config.image_encoder else {}
    before = Shards(out) if (out / "shards.json").exists() else None
    done = {row["file_name"]: row for row in before.rows} if before else {}
    kind = (before.settings or {}).get("kind") if before else None
    if before and before.settings != settings | {"kind": kind}:
        raise InputError(f"{out}: was encoded with {before.settings}: use these flags, or another --out")
    first = {row["file_name"]: row for row in reversed(rows)}  # of rows that name one file twice, the upper one
    if changed := [name for name, row in first.items() if done.get(name, row)["prompt"] != row["prompt"]]:
        raise InputError(f"{out}: the prompt of {changed[-1]} has changed since: use another --out")
    vae, text, image = load_vae(config.vae).to(device), load_text_encoder(config.text_encoder).to(device), None
    if config.image_encoder:
        image = load_image_encoder(config.image_encoder).to(device)
    out.mkdir(parents=True, exist_ok=True)
    save_null_context(out, text)
    left = dict(done)
    todo = [row for row in rows if left.pop(row["file_name"], None) is None]
    batch, ready, skipped = [], [], 0
    bar = common.progress(len(rows), "encode", initial=len(rows) - len(todo))
    with (out / "report.jsonl").open("w", buffering=1) as report:
        clips = load_clips(todo, config, size, kind, done)
        for row, video, kind, problem in itertools.chain(clips, [(None,) * 4]):         # None: nothing comes after
            if problem:
                skipped += 1
                bar.write(f"skipped {row['file_name']}: {problem}")
                report.write(json.dumps({"file_name": row["file_name"], "reason": problem}) + "\n")
            elif row:
                batch.append((row, video, kind))
                room = min(config.batch_size, BATCH_PIXELS // math.prod(kind[:3]))
            if batch and (row is None or len(batch) >= room):
                encoded = encode_batch([video for _, video, _ in batch], [row["prompt"] for row, _, _ in batch],
                                       vae, text, image, device)
                ready += [(r, k, {name: x[i] for name, x in encoded.items()}) for i, (r, _, k) in enumerate(batch)]
                enough = min(config.shard_size, SHARD_BYTES // sum(4 * x[0].numel() for x in encoded.values()))
                batch = []
            bar.update(row is not None)
            if ready and (row is None or len(ready) >= enough):
                kept, kinds, tensors = zip(*ready)
                tensors = {name: torch.stack([x[name] for x in tensors]) for name in tensors[0]}
                write_shards(out, tensors.pop("latents"), tensors.pop("context"), *(
                    [row[name] for row in kept] for name in ("label", "prompt", "file_name")),
                    fps=kinds[0][3], settings=settings | {"kind": kinds[0]}, append=True, clips=config.folder, **tensors)
                ready = []
    bar.close()
    print(f"{out}: {len(rows) - skipped} of {len(rows)} clips encoded"
          + (f", {skipped} skipped: see {out / 'report.jsonl'}" if skipped else ""))
    if skipped == len(rows):
        raise InputError(f"{config.folder}: no clip could be encoded: see {out / 'report.jsonl'}")


COMMANDS = {"check": (check_command, Check), "encode": (encode_command, Encode)}

if __name__ == "__main__":
    command = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if command in ("-h", "--help"):
        print(__doc__)
    elif command in COMMANDS:
        common.cli(*COMMANDS[command], __doc__, sys.argv[2:], f"data.py {command}")
    else:
        sys.exit(print(f"error: data.py has check and encode, not {command}", file=sys.stderr) or 2)
