"""Real files in and out: mp4 clips, metadata files, and the latent shards that training reads.

    python data.py world clips --count 1024 --seed 0 --kind mixture     clips of the embedded world, with labels
    python data.py check clips                                          what is wrong, clip by clip
    python data.py encode clips --out latents --size 832*480 --frames 81 --fps 16

A data folder holds clips and metadata.jsonl (or .csv), one row a clip: file_name (or video, file), prompt (or text,
caption), and optionally label (or reward): 1 good, 0 bad, missing = unlabelled, which is never read as 0.

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
from vae import from_pixels as to_float, to_pixels as to_uint8  # uint8 [b,F,H,W,3] <-> float [b,3,F,H,W]

HERE = Path(__file__).resolve().parent
FIELDS = {"file_name": ("file_name", "video", "file"), "prompt": ("prompt", "text", "caption"),
          "label": ("label", "reward")}
FEWEST = 5  # frames of a clip: two latent frames


# ---- video files
def read_clip(path, size=None, frames=None, fps=None):
    """-> (video uint8 [F, H, W, 3], frames per second). Raises InputError in one line if it cannot be decoded.

    size (W, H): scaled to cover it, then centre-cropped. frames: reading stops there. fps: of the result; frames are
    dropped by their time stamps. Phone rotation is applied.
    """
    out, reformatter = [], VideoReformatter()
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            stream.codec_context.thread_count = 1  # clips are small: threads cost more than they give
            native = float(stream.average_rate or stream.guessed_rate or 0) or 8.0
            if fps and fps > native * 1.02:
                raise InputError(f"{path}: has {native:g} frames per second, fewer than --fps {fps:g}")
            start = None
            for count, frame in enumerate(container.decode(stream)):
                start = frame.time if start is None else start
                time = count / native if frame.time is None else frame.time - start
                # Frame number len(out) of the result is due while its time is nearest to this frame's.
                due = 1 if not fps else max(0, int((time + 0.5 / native) * fps - 1e-6) + 1 - len(out))
                out += [_to_rgb(frame, size, reformatter)] * due if due else []
                if frames and len(out) >= frames:
                    break
    except (av.FFmpegError, OSError, IndexError, ValueError) as e:
        if isinstance(e, InputError):
            raise
        reason = "there is no such file" if not Path(path).is_file() else f"not a video that can be decoded ({e})"
        raise InputError(f"{path}: {' '.join(reason.split())}") from None
    if not out or len({x.shape for x in out}) > 1:
        raise InputError(f"{path}: " + ("frames differ in size" if out else "holds no frame"))
    return torch.from_numpy(np.stack(out[:frames])), float(fps or native)


def read_video(path):
    """-> uint8 [f, h, w, 3], all frames. Raises InputError."""
    return read_clip(path)[0]


def _to_rgb(frame, size, reformatter):
    """-> uint8 [H, W, 3], upright; size (W, H) or None."""
    turns = round(frame.rotation / 90) % 4
    width, height = (frame.width, frame.height) if turns % 2 == 0 else (frame.height, frame.width)
    if size:
        scale = max(size[0] / width, size[1] / height)
        width, height = max(size[0], round(width * scale)), max(size[1], round(height * scale))
    stored = (width, height) if turns % 2 == 0 else (height, width)
    how = Interpolation.BILINEAR if not size else Interpolation.AREA if scale < 1 else Interpolation.BICUBIC
    image = reformatter.reformat(frame, *stored, format="rgb24", interpolation=how, threads=1).to_ndarray()
    image = np.rot90(image, turns)
    if size:
        top, left = (height - size[1]) // 2, (width - size[0]) // 2
        image = image[top:top + size[1], left:left + size[0]]
    return np.ascontiguousarray(image)


def write_video(path, video, fps=8):
    """Writes uint8 [f, h, w, 3] (tensor or array) as H.264 in 4:2:0 (odd sizes gain a row or column), whole or not
    at all. Raises InputError if the name does not end in .mp4."""
    path, video = Path(path), np.asarray(video)
    if path.suffix.lower() != ".mp4":
        raise InputError(f"{path}: the name of a video to write must end in .mp4")
    if video.dtype != np.uint8 or video.ndim != 4 or video.shape[-1] != 3 or not len(video):
        raise ValueError(f"write_video wants uint8 [f, h, w, 3], got {video.dtype} {list(video.shape)}")
    video = np.pad(video, ((0, 0), (0, video.shape[1] % 2), (0, video.shape[2] % 2), (0, 0)), mode="edge")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary, reformatter = path.with_name(f".{path.name}.{os.getpid()}.tmp"), VideoReformatter()
    try:
        with av.open(str(temporary), "w", format="mp4") as container:
            stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001), pix_fmt="yuv420p",
                                          height=video.shape[1], width=video.shape[2],
                                          options={"crf": "12", "preset": "veryfast", "threads": "1"})
            for image in video:
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
                container.mux(stream.encode(reformatter.reformat(frame, format="yuv420p", threads=1)))
            container.mux(stream.encode())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


# ---- metadata
def _rows(folder):
    """Yields (place, row or None, problem or None) for each row of the metadata file."""
    paths = [Path(folder) / name for name in ("metadata.jsonl", "metadata.csv")]
    path = next((p for p in paths if p.is_file()), None)
    if path is None:
        missing = "there is no such folder" if not Path(folder).is_dir() else "holds no metadata.jsonl or metadata.csv"
        raise InputError(f"{folder}: {missing}")
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            lines = enumerate(csv.DictReader(file), 2) if path.suffix == ".csv" else enumerate(file, 1)
            for number, line in lines:
                if isinstance(line, dict) or line.strip():
                    yield f"{path}:{number}", *_row(line)
    except (UnicodeDecodeError, csv.Error) as e:
        raise InputError(f"{path}: not UTF-8 text in that format ({e})") from None


def _row(line):
    try:
        raw = line if isinstance(line, dict) else json.loads(line)
        found = {field: next((raw[n] for n in names if raw.get(n) not in (None, "")), None)
                 for field, names in FIELDS.items()}
    except (ValueError, AttributeError):
        return None, "not a JSON object"
    if not isinstance(found["file_name"], str):
        return None, "has no file_name (or video, file)"
    if found["label"] is not None and str(found["label"]) not in ("0", "1", "0.0", "1.0", "True", "False"):
        return None, f"label must be 0, 1 or missing, got {found['label']!r}"
    label = None if found["label"] is None else int(str(found["label"]) in ("1", "1.0", "True"))
    return {"file_name": found["file_name"], "prompt": str(found["prompt"] or "").strip(), "label": label}, None


def read_metadata(folder):
    """-> [{file_name, prompt, label: 0 | 1 | None}]. Raises InputError naming the first row that cannot be used."""
    rows = []
    for place, row, problem in _rows(folder):
        if problem:
            raise InputError(f"{place}: {problem}")
        rows.append(row)
    if not rows:
        raise InputError(f"{folder}: its metadata file has no rows")
    return rows


def parse_size(text):
    """'832*480' or '832x480' -> (width, height); None -> None. Raises InputError."""
    parts = (text or "16*16").replace("x", "*").split("*")
    if len(parts) != 2 or not all(p.isdigit() and int(p) > 0 and int(p) % 16 == 0 for p in parts):
        raise InputError(f"--size must be W*H, both multiples of 16, got {text}")
    return tuple(map(int, parts)) if text else None


def load_clips(rows, config, kind=None):
    """Yields (row, video uint8 [F, H, W, 3] or None, kind, reason it cannot be used or None), in order, decoding on
    threads. Clips are trimmed to 4k + 1 frames; all must be of one kind (size, frames, fps): `kind` or the first's."""
    size, seen = parse_size(config.size), set()
    if config.frames and config.frames % 4 != 1:
        raise InputError(f"--frames must be 4k + 1, such as {config.frames // 4 * 4 + 1}, got {config.frames}")

    def load(row):
        if not row["prompt"]:
            return None, None, "empty prompt"
        try:
            video, fps = read_clip(Path(config.folder) / row["file_name"], size, config.frames, config.fps)
        except InputError as e:
            return None, None, str(e).removeprefix(f"{Path(config.folder) / row['file_name']}: ")
        keep, width, height = (len(video) - 1) // 4 * 4 + 1, video.shape[2], video.shape[1]
        kind = f"{width}x{height}, {keep} frames, {fps:.3g} fps"
        if keep < (config.frames or FEWEST):
            return None, kind, f"too short: {len(video)} frames at {fps:.3g} fps, not {config.frames or FEWEST}"
        bad = width % 16 or height % 16
        return video[:keep], kind, f"size {width}x{height} is not a multiple of 16: pass --size W*H" if bad else None

    with ThreadPoolExecutor() as pool:
        for start in range(0, len(rows), 16):  # at most 16 decoded clips at a time
            part = rows[start:start + 16]
            for row, (video, found, reason) in zip(part, pool.map(load, part)):
                kind = kind or (found if reason is None else None)
                if reason is None and found != kind:
                    reason = f"{found}, the others have {kind}: pass --size, --frames, --fps"
                reason = "listed twice" if row["file_name"] in seen else reason
                seen.add(row["file_name"])
                yield row, None if reason else video, found, reason


# ---- latent shards
def write_json(path, value):
    Path(f"{path}.tmp").write_text(json.dumps(value, indent=1) + "\n")
    os.replace(f"{path}.tmp", path)


def write_shards(folder, latents, contexts, labels, prompts, file_names=None, fps=8.0, settings=None):
    """Appends one shard to `folder` (made if missing): latents [n, c, f, h, w] and contexts [n, l, d] as float32,
    labels of 0 | 1 | None, prompts. shards.json is written last: what it does not count does not exist."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    index = {"count": 0, "latent_shape": list(latents.shape[1:]), "context_shape": list(contexts.shape[1:]),
             "fps": fps, "settings": settings, "shards": []}
    index = json.loads((folder / "shards.json").read_text()) if (folder / "shards.json").exists() else index
    if [list(latents.shape[1:]), list(contexts.shape[1:])] != [index["latent_shape"], index["context_shape"]]:
        raise InputError(f"{folder}: holds latents {index['latent_shape']} and contexts {index['context_shape']}, "
                         f"not {list(latents.shape[1:])} and {list(contexts.shape[1:])}")
    name, start = f"shard-{len(index['shards']):05d}.safetensors", index["count"]
    values = torch.tensor([-1 if x is None else int(x) for x in labels], dtype=torch.int8)
    save_file({"latents": latents.float().contiguous(), "context": contexts.float().contiguous(), "label": values},
              folder / f"{name}.tmp")
    os.replace(folder / f"{name}.tmp", folder / name)
    rows = (folder / "metadata.jsonl").read_text().splitlines()[:start] if start else []
    for i, prompt in enumerate(prompts):
        rows.append(json.dumps({"file_name": file_names[i] if file_names else f"{name}#{i}", "prompt": prompt,
                                "label": None if values[i] < 0 else int(values[i])}, ensure_ascii=False))
    (folder / "metadata.jsonl.tmp").write_text("\n".join(rows) + "\n")
    os.replace(folder / "metadata.jsonl.tmp", folder / "metadata.jsonl")
    index["shards"].append({"file": name, "count": len(values)})
    write_json(folder / "shards.json", index | {"count": start + len(values)})


class Shards:
    """Read-only view of a folder of shards; the files are memory-mapped, so memory does not grow with them.
    Raises InputError in one line if the folder is missing, truncated or inconsistent."""

    def __init__(self, folder):
        self.folder = folder = Path(folder)
        try:
            index = json.loads((folder / "shards.json").read_text())
            self.latent_shape, self.context_shape = tuple(index["latent_shape"]), tuple(index["context_shape"])
            self.fps, self.settings, files = index["fps"], index["settings"], index["shards"]
        except FileNotFoundError:
            raise InputError(f"{folder}: there is no shards.json; `python data.py encode` writes it") from None
        except (ValueError, KeyError, TypeError) as e:
            raise InputError(f"{folder}/shards.json is damaged ({e!r}): encode again") from None
        self.rows = read_metadata(folder)
        self.files, self.where, labels = [], [], []
        for number, entry in enumerate(files):
            path, n = folder / entry["file"], entry["count"]
            try:
                file = safe_open(path, "pt")
                shapes = [tuple(file.get_slice(key).get_shape()) for key in ("latents", "context", "label")]
            except (OSError, SafetensorError) as e:
                raise InputError(f"{path} is missing or truncated ({' '.join(str(e).split())}): encode again") from None
            if shapes != [(n, *self.latent_shape), (n, *self.context_shape), (n,)]:
                raise InputError(f"{path}: holds {shapes}, which is not what shards.json says: encode again")
            self.files.append((file.get_slice("latents"), file.get_slice("context"), file))
            self.where += [(number, i) for i in range(n)]
            labels.append(file.get_tensor("label"))
        if not len(self.where) == index["count"] <= len(self.rows) or not self.where:
            raise InputError(f"{folder}: shards.json counts {index['count']} clips, its shards hold {len(self.where)}, "
                             f"metadata.jsonl {len(self.rows)}: encode again")
        self.rows, self.labels = self.rows[:len(self.where)], torch.cat(labels)

    def __len__(self):
        return len(self.where)

    def batch(self, indices):
        """-> {latents [b, c, f, h, w], context [b, l, d], label int8 [b] (-1: none), prompt: list of b}"""
        at = [self.where[int(i)] for i in indices]
        latents, context = (torch.stack([self.files[s][k][i:i + 1][0].clone() for s, i in at]) for k in (0, 1))
        return {"latents": latents, "context": context, "label": self.labels[[int(i) for i in indices]],
                "prompt": [self.rows[int(i)]["prompt"] for i in indices]}

    def require(self, channels=None, context_shape=None, labelled=False):
        """Raises InputError naming the field that does not fit a model, or clips without label."""
        if channels not in (None, self.latent_shape[0]):
            raise InputError(f"{self.folder}: latents have {self.latent_shape[0]} channels, the model wants {channels}")
        if context_shape is not None and tuple(context_shape) != self.context_shape:
            raise InputError(f"{self.folder}: context is {list(self.context_shape)} (tokens, width), the model wants "
                             f"{list(context_shape)}: encode with its own text encoder")
        bare = [row["file_name"] for row, label in zip(self.rows, self.labels.tolist()) if label < 0]
        if labelled and bare:
            raise InputError(f"{self.folder}: labels missing for {len(bare)} of {len(self)} clips: "
                             f"{', '.join(bare[:3])}{', ...' if len(bare) > 3 else ''}; label them 0 or 1, encode again")
        if labelled and len(self.labels.unique()) < 2:
            raise InputError(f"{self.folder}: every label is {self.labels[0]}; a reward model needs both 0 and 1")


@functools.lru_cache(maxsize=4)
def _permutation(n, seed, epoch):
    return torch.randperm(n, generator=common.generator(seed, "order", epoch))


def order(n, seed, step, indices, global_batch):
    """Which of n examples stand at `indices` of the global batch of step 0, 1, ... -> int64 [len(indices)].

    Each epoch is a permutation of its own; nothing depends on the number of ranks, and there is no state to save.
    """
    places = [step * global_batch + int(i) for i in indices]
    return torch.stack([_permutation(n, seed, place // n)[place % n] for place in places])


def split(n, holdout, seed):
    """-> (train, held-out) sorted int64 indices; holdout: a share below 1 or a number of examples."""
    count = round(n * holdout) if holdout < 1 else int(holdout)
    if not 0 <= count < n:
        raise InputError(f"a holdout of {holdout} leaves nothing to train on: there are {n} examples")
    shuffled = torch.randperm(n, generator=common.generator(seed, "split"))
    return shuffled[count:].sort().values, shuffled[:count].sort().values


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
    for part in range(0, config.count, 64):  # whole parts, so that a larger count begins with the same clips
        seed = int(torch.randint(2 ** 31, (), generator=common.generator(config.seed, "world", part)))
        videos, prompts, _ = world.make(64, seed, config.kind, config.size)
        judged = world.annotate(videos, prompts)
        for i in range(min(64, config.count - part)):
            name = f"clips/{part + i:06d}.mp4"
            write_video(Path(config.folder) / name, videos[i], fps=8)
            label = {"label": int(judged["qualified"][i])} if judged["qualified"][i] or judged["unqualified"][i] else {}
            rows.append({"file_name": name, "prompt": prompts[i]} | label)  # partially qualified: no label
            bar.update()
    bar.close()
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (Path(config.folder) / "metadata.jsonl").write_text(text)
    counts = collections.Counter(row.get("label") for row in rows)
    print(f"{config.folder}: {config.count} clips, {counts[1]} good, {counts[0]} bad, {counts[None]} unlabelled")


@dataclass
class Check:
    folder: str = arg(..., "folder with clips and metadata", positional=True)
    size: str | None = arg(None, "W*H: clips are scaled to cover it and centre-cropped")
    frames: int | None = arg(None, "frames of each clip, 4k + 1 (default: as many as it has)", at_least=FEWEST)
    fps: float | None = arg(None, "frames per second; faster clips drop frames (default: their own)", above=0)


def check_command(config):
    listed = list(_rows(config.folder))
    problems = [f"{place}: {problem}" for place, _, problem in listed if problem]
    rows, labels, kinds = [row for _, row, problem in listed if not problem], collections.Counter(), set()
    bar = common.progress(len(rows), "check")
    for row, _, kind, reason in load_clips(rows, config):
        problems += [f"{row['file_name']}: {reason}"] if reason else []
        labels[None if reason else ("unlabelled", "bad", "good")[1 + (-1 if row["label"] is None else row["label"])]] += 1
        kinds |= set() if reason else {kind}
        bar.update()
    bar.close()
    print(*problems, *kinds, sep="\n")
    print(f"{config.folder}: {len(listed)} rows, {labels['good']} good, {labels['bad']} bad, "
          f"{labels['unlabelled']} unlabelled, {len(problems)} with problems")
    if problems or not listed:
        raise InputError(f"{config.folder}: {len(problems)} of {len(listed)} rows cannot be used as they are")


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
    out, rows, device = Path(config.out), read_metadata(config.folder), "cuda" if torch.cuda.is_available() else "cpu"
    settings = {name: getattr(config, name) for name in ("size", "frames", "fps", "vae", "text_encoder")}
    before = Shards(out) if (out / "shards.json").exists() else None
    done = {row["file_name"]: row for row in before.rows} if before else {}
    kind = (before.settings or {}).get("kind") if before else None
    if before and before.settings != settings | {"kind": kind}:
        raise InputError(f"{out}: was encoded with {before.settings}: use these flags, or another --out")
    if changed := [row["file_name"] for row in rows if done.get(row["file_name"], row) != row]:
        raise InputError(f"{out}: prompt or label of {changed[0]} has changed since it was encoded: use another --out")
    vae, text = load_vae(config.vae).to(device), load_text_encoder(config.text_encoder).to(device)
    out.mkdir(parents=True, exist_ok=True)
    todo, batch, ready, skipped = [row for row in rows if row["file_name"] not in done], [], [], 0
    bar = common.progress(len(rows), "encode", initial=len(rows) - len(todo))
    with (out / "report.jsonl").open("w", buffering=1) as report:
        for row, video, kind, reason in itertools.chain(load_clips(todo, config, kind), [(None,) * 4]):
            if reason:
                skipped += 1
                bar.write(f"skipped {row['file_name']}: {reason}")
                report.write(json.dumps({"file_name": row["file_name"], "reason": reason}) + "\n")
            elif row:
                batch.append((row, video, kind))
            bar.update(row is not None)
            if batch and (len(batch) == config.batch_size or row is None):
                latents = vae.encode(to_float(torch.stack([video for _, video, _ in batch]).to(device))).cpu()
                contexts = text.encode([row["prompt"] for row, _, _ in batch]).cpu()
                ready += [(r, kind, x, context) for (r, _, kind), x, context in zip(batch, latents, contexts)]
                batch = []
            if ready and (len(ready) >= config.shard_size or row is None):
                kept, kinds, latents, contexts = zip(*ready)
                write_shards(out, torch.stack(latents), torch.stack(contexts), *(
                    [row[name] for row in kept] for name in ("label", "prompt", "file_name")),
                    fps=float(kinds[0].split()[-2]), settings=settings | {"kind": kinds[0]})
                ready = []
    bar.close()
    print(f"{out}: {len(rows) - skipped} of {len(rows)} clips encoded" + (
        f", {skipped} skipped: see {out / 'report.jsonl'}" if skipped else ""))
    if skipped == len(rows):
        raise InputError(f"{config.folder}: no clip could be encoded: see {out / 'report.jsonl'}")


COMMANDS = {"world": (world_command, World), "check": (check_command, Check), "encode": (encode_command, Encode)}

if __name__ == "__main__":
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        print(__doc__)
    elif name in COMMANDS:
        common.cli(*COMMANDS[name], __doc__, sys.argv[2:], f"data.py {name}")
    else:
        sys.exit(print(f"error: the command must be one of {', '.join(COMMANDS)}, got {name}", file=sys.stderr) or 2)
