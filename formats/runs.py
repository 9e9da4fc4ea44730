"""A run folder on disk: args.json, checkpoints, metrics.jsonl. A kill at any moment leaves all of them usable.

    runs/align/
        args.json                       the flags, as they were resolved
        metrics.jsonl                   one line a step
        checkpoint-000040/              transformer/ (or reward/), train_state.pt (or sharded_state/), args.json
        samples/  best/  transformer/   what the script makes of it
"""
import dataclasses
import errno
import json
import math
import os
import re
import shutil
import tempfile
import time
from pathlib import Path

import torch

from common import InputError, arg, rank
from formats import fingerprint, lock
from formats.metadata import from_json, replace_text
from formats.picture import write_gif
from formats.video import read_clip

# What a run that goes on may do otherwise than before; it is told. Every other flag makes it another run.
MAY_CHANGE = {"max_train_steps", "learning_rate", "trunk_learning_rate", "weight_decay", "batch_size",
              "gradient_accumulation_steps", "max_grad_norm", "mixed_precision", "gradient_checkpointing",
              "decoder_checkpointing", "parallel", "sequence_parallel", "fsdp_group_size", "offload_activations", "compile",
              "checkpointing_steps", "keep", "export",
              "validation_steps", "validation_prompts", "guidance_scale", "judge", "patience"}
BY_CONTENT = {"model", "reward", "data", "labels", "samples_dir", "curated_dir"}    # may move: `made_from` knows what they hold
NOT_COMPARED = {"output_dir", "resume_from_checkpoint"}


def fast_precision():
    """"bf16", or "no" (float32) where it is several times faster: most laptops' CPUs only emulate
    bf16 (AVX-512 alone does not have it), and so do GPUs older than Ampere."""
    fast = torch.cuda.is_bf16_supported(including_emulation=False) if torch.cuda.is_available() else \
        torch.cpu.get_capabilities().get("avx512_bf16", False)
    return "bf16" if fast else "no"


def precision_flag(more=""):
    return arg(fast_precision(), f"autocast dtype{more}; bf16 unless this machine only emulates it", choices=("no", "bf16"))


@dataclasses.dataclass
class Flags:
    """What every training run takes."""
    mixed_precision: str = precision_flag(" (weights, optimizer and rollout state are fp32)")
    resume_from_checkpoint: str | None = arg(None, "'latest' or a checkpoint folder", alias="resume")


def write_json(path, value):
    """Whole or not at all: a temporary name, then a rename."""
    replace_text(path, json.dumps(value, indent=2) + "\n")


def list_checkpoints(output_dir):
    """[(step, path)] of whole checkpoints, oldest first; `.old`: a kill came while that step was replaced."""
    paths = sorted(Path(output_dir).glob("checkpoint-*"), reverse=True)  # the plain name comes last and wins
    names = [(re.fullmatch(r"checkpoint-(\d+)(\.old)?", path.name), path) for path in paths]
    return sorted({int(name[1]): path for name, path in names if name}.items())


# ---- the same run, or another
def contents(config, shards):
    """{"model", "reward", "data": fingerprint} of what a run learns from."""
    weights = {name: path for name in ("model", "reward") if (path := getattr(config, name, None))}
    return {name: fingerprint.of_weights(path) for name, path in weights.items()} | (
        {"data": fingerprint.of_shards(shards)} if shards else {})


def changes(path, config, made_from=None):
    """What config does otherwise than the run of checkpoint folder `path`: ([(flag, there, now)] that make it another run,
    [...] that may change). made_from: its `contents`; without, what is not given (None) may still be filled in, and is
    not compared."""
    saved, now = read_args(path), json.loads(json.dumps(dataclasses.asdict(config)))
    defaults = {field.name: field.default for field in dataclasses.fields(config)}        # of flags younger than the run
    if foreign := sorted(saved.keys() - now.keys() - {"made_from"}):
        raise InputError(f"{path}: not a checkpoint of this script: its args.json has --{foreign[0]}")
    there = {name: saved.get(name, defaults[name]) for name in now.keys() - NOT_COMPARED}
    differ = [(name, there[name], now[name]) for name in sorted(there) if there[name] != now[name]]
    if made_from is None:
        differ = [row for row in differ if row[2] is not None and row[0] not in BY_CONTENT]
    elif known := saved.get("made_from"):                       # an old run knows its paths only
        differ = [row for row in differ if row[0] not in BY_CONTENT]
        differ += [(f"{name}, what it holds:", known.get(name), x) for name, x in made_from.items() if known.get(name) != x]
    froze = lambda name, *values: name == "trunk_learning_rate" and 0 in values         # other weights train
    other = [row for row in differ if row[0] not in MAY_CHANGE or froze(*row)]
    return other, [row for row in differ if row not in other]


def read_args(path):
    """The flags in a run's or a checkpoint's args.json. Raises InputError."""
    try:
        saved = from_json((Path(path) / "args.json").read_text())
    except ValueError as e:
        raise InputError(f"{path}/args.json is damaged ({e})") from None
    if not isinstance(saved, dict) or not isinstance(saved.get("made_from", {}), dict):
        raise InputError(f"{path}/args.json is damaged: it holds no flags")
    return saved


def refuse_another_run(path, differ):
    if differ:
        said = ", ".join(f"--{name} {there} (now {now})" for name, there, now in differ)
        raise InputError(f"--resume_from_checkpoint {path}: that run has {said}: give it the same, or start afresh in another "
                         "--output_dir")


def require_ours(config):
    """Raises InputError unless --output_dir is new or empty, or is of an earlier run of this script from a model elsewhere."""
    folder, model = Path(config.output_dir), Path(config.model).resolve()
    if folder.resolve() in (model, *model.parents) and folder.exists():
        raise InputError(f"--output_dir {folder}: holds --model {config.model}, which would be written over: name another folder")
    known = {field.name for field in dataclasses.fields(config)} | {"made_from"}
    if not (folder / "args.json").is_file():
        ours = ("samples/.lock", "curated/.lock", "part.json")  # a run that ended while it made them; study/parts.py's note
        lock.require_ours(folder, "run", (*ours, *(path.name for _, path in list_checkpoints(folder))))
    elif (foreign := sorted(read_args(folder).keys() - known)) or not read_args(folder):
        raise InputError(f"--output_dir {folder}: its args.json is of no run of this script ({foreign[:1]}): name another folder")


def open_checkpoint(config):
    """-> (path, state) of the checkpoint that --resume_from_checkpoint names; (None, {"step": 0}) without. Raises InputError
    if it is of another run, by the flags given, or past --max_train_steps, and as `require_ours` does."""
    if rank() == 0 and hasattr(config, "model"):                # world/pretrain.py keeps latents there before it comes here
        require_ours(config)
    if not config.resume_from_checkpoint:
        return None, {"step": 0}
    path = resolve_checkpoint(config.output_dir, config.resume_from_checkpoint)
    refuse_another_run(path, changes(path, config)[0])
    state = load_state(path)
    if state["step"] > config.max_train_steps:
        raise InputError(f"--max_train_steps {config.max_train_steps}: {path} has made {state['step']} steps already")
    return path, state


def start_run(config, resume_step=None, shards=None):
    """Rank 0 becomes the one writer of config.output_dir and writes its args.json -> MetricsLog, which keeps the lock.

    Checkpoints past resume_step (None: all) are of an earlier run; they are renamed to earlier-<time>-checkpoint-<step>, so
    that `latest` never means them. A run that goes on is compared with its checkpoint: InputError if it is another, a line
    for what it does otherwise. shards: what it learns from.
    """
    held, folder = None, Path(config.output_dir)
    if rank() == 0:
        made_from = contents(config, shards)
        if resume_step is not None:
            path = resolve_checkpoint(folder, config.resume_from_checkpoint)
            other, told = changes(path, config, made_from)
            refuse_another_run(path, other)
            print(f"goes on from {path}" + "".join(f"; --{name} {now} (was {there})" for name, there, now in told))
        held = lock.hold(folder)
        for step, path in list_checkpoints(folder):
            if resume_step is None or step > resume_step:
                path.rename(folder / f"earlier-{time.time_ns()}-{path.name}")
        write_json(folder / "args.json", dataclasses.asdict(config) | {"made_from": made_from})
    return MetricsLog(folder, resume_step, held)


def save_checkpoint(output_dir, step, folders, state, config, keep=None):
    """Writes checkpoint-<step> (folders {name: function(path)}, train_state.pt, args.json) under a temporary name, flushes,
    renames: a kill at any moment leaves the previous one usable. keep: n stay. Every rank calls the functions, as a
    model's pieces are gathered while it is written; rank 0 writes.
    Raises OSError, which names the last whole checkpoint, if the disk is full, read-only or gone."""
    final = Path(output_dir) / f"checkpoint-{step:06d}"
    temporary, old = Path(f"{final}.tmp"), Path(f"{final}.old")
    if rank() > 0:
        for name, write in folders.items():
            write(temporary / name)
        return final
    try:
        for leftover in Path(output_dir).glob("checkpoint-*.tmp"):
            shutil.rmtree(leftover)
        temporary.mkdir()
        for name, write in folders.items():
            (temporary / name).mkdir()
            write(temporary / name)
        save_state({"step": step, **state}, temporary / "train_state.pt")
        run = read_args(output_dir) if (Path(output_dir) / "args.json").exists() else {}           # has `made_from`
        write_json(temporary / "args.json", run | dataclasses.asdict(config))
        for path in [*temporary.rglob("*"), temporary]:  # on the disk before the name is
            handle = os.open(path, os.O_RDONLY)
            os.fsync(handle)
            os.close(handle)
        if final.exists():  # a folder cannot be replaced in one move
            shutil.rmtree(old, ignore_errors=True)
            os.rename(final, old)
        os.rename(temporary, final)
    except OSError as e:
        shutil.rmtree(temporary, ignore_errors=True)    # what it holds is needed by nobody; a full disk needs the room
        raise unwritten(output_dir, step, e) from None
    shutil.rmtree(old, ignore_errors=True)
    whole = [path for _, path in list_checkpoints(output_dir)]
    for path in whole[:-keep] if keep else []:
        shutil.rmtree(path, ignore_errors=True)
    return final


def unwritten(output_dir, step, error):
    """An OSError for one that kept checkpoint-<step> from being written: it names the last whole one."""
    whole = list_checkpoints(output_dir)
    there = f"the last whole one is {whole[-1][1]}: --resume latest goes on from it" if whole else "there is none before it"
    number, why = getattr(error, "errno", None) or errno.EIO, getattr(error, "strerror", None) or str(error)
    return OSError(number, f"{why}: checkpoint-{step:06d} could not be written; {there}", getattr(error, "filename", None))


def save_state(state, path):
    """torch.save, whose RuntimeError on a full disk names neither the file nor the cause, as an OSError that does."""
    try:
        with open(path, "wb") as file:
            torch.save(state, file)
    except RuntimeError as e:
        raise OSError(errno.EIO, f"not written whole ({e})", str(path)) from None


def resolve_checkpoint(output_dir, spec):
    """`latest`, a checkpoint folder, its name inside output_dir, or a run folder -> its path. InputError."""
    path = Path(output_dir if spec == "latest" else spec)
    path = path if path.is_dir() else Path(output_dir) / spec
    if not path.name.startswith("checkpoint-"):
        path = list_checkpoints(path)[-1][1] if list_checkpoints(path) else path / "checkpoint-<step>"
    if lacking := [name for name in ("train_state.pt", "args.json") if not (path / name).is_file()]:
        raise InputError(f"--resume_from_checkpoint {spec}: there is no {path / lacking[0]}")
    return path


def load_state(path):
    """-> the state given to save_checkpoint, plus `step`. Raises InputError if it is truncated."""
    try:
        state = torch.load(Path(path) / "train_state.pt", map_location="cpu", weights_only=True)
        if type(state["step"]) is not int or state["step"] < 0:
            raise ValueError(state["step"])
    except Exception as e:  # torch raises RuntimeError, EOFError, UnpicklingError, ... for one cause
        raise InputError(f"{path}/train_state.pt is truncated or damaged ({type(e).__name__})") from None
    return state


def read_metrics(path):
    """[(step, line)] of the lines of a metrics.jsonl that are whole."""
    found = []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
        try:
            found.append((int(from_json(line)["step"]), line))
        except (ValueError, TypeError, KeyError, OverflowError):
            pass                                                # cut short by a kill, or by another hand
    return found


class MetricsLog:
    """metrics.jsonl, one flushed line a step (rank 0); TensorBoard events if that is installed. On resume,
    lines past resume_step, or that are damaged, are dropped; None starts afresh. held: a lock to keep."""

    def __init__(self, output_dir, resume_step=None, held=None):
        path, self.file, self.board, self.held = Path(output_dir) / "metrics.jsonl", None, None, held
        if rank() == 0:
            kept = [line for step, line in read_metrics(path) if resume_step is not None and step <= resume_step]
            replace_text(path, "".join(f"{line}\n" for line in kept))
            self.file = path.open("a", buffering=1)             # flushes each line
            try:
                from torch.utils.tensorboard import SummaryWriter
                self.board = SummaryWriter(str(output_dir), purge_step=(resume_step or 0) + 1)
            except ImportError:
                pass

    def log(self, step, **values):
        """Numbers, scalar tensors or strings. Raises FloatingPointError if one is not finite, OSError if the file is gone."""
        values = {k: v.item() if isinstance(v, torch.Tensor) else v for k, v in values.items()}
        for name, value in values.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise FloatingPointError(f"step {step}: {name} is {value}; lower --learning_rate")
            if self.board and not isinstance(value, str):
                self.board.add_scalar(name, value, step)
        if self.board:
            self.board.flush()
        if self.file:
            if not os.fstat(self.file.fileno()).st_nlink:       # the file, or the whole folder, was removed
                raise FileNotFoundError(errno.ENOENT, f"was removed while step {step} was made", self.file.name)
            self.file.write(json.dumps({"step": step, **values}) + "\n")

    def videos(self, step, folder):
        """The mp4s in `folder`, to TensorBoard, if that is installed: moving GIFs on its page of images."""
        for path in sorted(Path(folder).glob("*.mp4")) if self.board else []:
            from tensorboard.compat.proto.summary_pb2 import (
                Summary,  # its own add_video wants moviepy 1, for the same GIF
            )
            video, fps = read_clip(path)                                                    # uint8 [f, h, w, 3]
            with tempfile.TemporaryDirectory() as place:
                write_gif(Path(place) / "video.gif", video.numpy(), fps)
                image = Summary.Image(height=video.shape[1], width=video.shape[2], colorspace=3,
                                      encoded_image_string=(Path(place) / "video.gif").read_bytes())
            self.board.file_writer.add_summary(Summary(value=[Summary.Value(tag=f"samples/{path.stem}", image=image)]), step)
