"""A run folder on disk: args.json, checkpoints, metrics.jsonl. A kill at any moment leaves all of them usable.

    runs/align/
        args.json                       the flags, as they were resolved
        metrics.jsonl                   one line a step
        checkpoint-000040/              transformer/ (or reward/), train_state.pt (or sharded_state/), args.json
        samples/  best/  transformer/   what the script makes of it
"""
import dataclasses
import json
import math
import os
import re
import shutil
import time
from pathlib import Path

import torch

from common import InputError, rank
from formats.video import read_clip


def write_json(path, value):
    """Whole or not at all: a temporary name, then a rename."""
    Path(f"{path}.tmp").write_text(json.dumps(value, indent=2) + "\n")
    os.replace(f"{path}.tmp", path)


def list_checkpoints(output_dir):
    """[(step, path)] of whole checkpoints, oldest first; `.old`: a kill came while that step was replaced."""
    paths = sorted(Path(output_dir).glob("checkpoint-*"), reverse=True)  # the plain name comes last and wins
    names = [(re.fullmatch(r"checkpoint-(\d+)(\.old)?", path.name), path) for path in paths]
    return sorted({int(name[1]): path for name, path in names if name}.items())


def start_run(config, resume_step=None):
    """Rank 0: creates config.output_dir and its args.json. Checkpoints past resume_step (None: all) are of an
    earlier run; they are renamed to earlier-<time>-checkpoint-<step>, so that `latest` never means them."""
    if rank() == 0:
        folder = Path(config.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        for step, path in list_checkpoints(folder):
            if resume_step is None or step > resume_step:
                path.rename(folder / f"earlier-{time.time_ns()}-{path.name}")
        write_json(folder / "args.json", dataclasses.asdict(config))


def save_checkpoint(output_dir, step, folders, state, config, keep=None):
    """Rank 0: writes checkpoint-<step> (folders {name: function(path)}, train_state.pt, args.json) under a
    temporary name, flushes, renames: a kill at any moment leaves the previous one usable. keep: n stay."""
    final = Path(output_dir) / f"checkpoint-{step:06d}"
    temporary, old = Path(f"{final}.tmp"), Path(f"{final}.old")
    if rank() > 0:
        return final
    for leftover in Path(output_dir).glob("checkpoint-*.tmp"):
        shutil.rmtree(leftover)
    temporary.mkdir(parents=True)
    for name, write in folders.items():
        (temporary / name).mkdir()
        write(temporary / name)
    torch.save({"step": step, **state}, temporary / "train_state.pt")
    write_json(temporary / "args.json", dataclasses.asdict(config))
    for path in [*temporary.rglob("*"), temporary]:  # on the disk before the name is
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
    if final.exists():  # a folder cannot be replaced in one move
        shutil.rmtree(old, ignore_errors=True)
        os.rename(final, old)
    os.rename(temporary, final)
    shutil.rmtree(old, ignore_errors=True)
    whole = [path for _, path in list_checkpoints(output_dir)]
    for path in whole[:len(whole) - keep] if keep else []:
        shutil.rmtree(path, ignore_errors=True)
    return final


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
        return torch.load(Path(path) / "train_state.pt", map_location="cpu", weights_only=True)
    except Exception as e:  # torch raises RuntimeError, EOFError, UnpicklingError, ... for one cause
        raise InputError(f"{path}/train_state.pt is truncated or damaged ({type(e).__name__})") from None


class MetricsLog:
    """metrics.jsonl, one flushed line a step (rank 0); TensorBoard events if that is installed. On resume,
    lines past resume_step, or cut short by a kill, are dropped; None starts afresh."""

    def __init__(self, output_dir, resume_step=None):
        path, self.file, self.board = Path(output_dir) / "metrics.jsonl", None, None
        if rank() == 0:
            lines = path.read_text().splitlines(True) if resume_step is not None and path.exists() else []
            lines = [x for x in lines if x.endswith("}\n") and json.loads(x)["step"] <= resume_step]
            self.file = path.open("w", buffering=1)  # flushes each line
            self.file.writelines(lines)
            try:
                from torch.utils.tensorboard import SummaryWriter
                self.board = SummaryWriter(str(output_dir), purge_step=(resume_step or 0) + 1)
            except ImportError:
                pass

    def log(self, step, **values):
        """Numbers, scalar tensors or strings. Raises FloatingPointError if one is not finite."""
        values = {k: v.item() if isinstance(v, torch.Tensor) else v for k, v in values.items()}
        for name, value in values.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise FloatingPointError(f"step {step}: {name} is {value}; lower --learning_rate")
            if self.board and not isinstance(value, str):
                self.board.add_scalar(name, value, step)
        if self.board:
            self.board.flush()
        if self.file:
            self.file.write(json.dumps({"step": step, **values}) + "\n")

    def videos(self, step, folder):
        """The mp4s in `folder`, to TensorBoard, if that and moviepy, by which it shows them, are installed."""
        for path in sorted(Path(folder).glob("*.mp4")) if self.board else []:
            video, fps = read_clip(path)                                                    # uint8 [f, h, w, 3]
            try:
                self.board.add_video(f"samples/{path.stem}", video.permute(0, 3, 1, 2)[None], step, fps)
            except ImportError:
                return
