"""What a run folder holds, and what a new run does to the run that is there. A kill at any moment leaves the
folder usable.

    runs/align/
        args.json                        the flags, as they were resolved
        metrics.jsonl                    one line per step
        checkpoint-000040/               transformer/, transformer_2/ or reward/ (the weights), args.json,
                                         train_state.pt (step, AdamW's numbers); with fsdp sharded_state/;
                                         with adapters pytorch_lora_weights.safetensors
        best/                            the weights with the best score, as in a checkpoint; best.json (step,
                                         score, judge)
        samples/  transformer/           what else the script makes
        earlier-20261129-204500/         a run that was here before: all of the above, to be resumed

With --export lora the files of the adapters replace transformer/ and transformer_2/, also in best/ and in
checkpoints.

A script first calls open_checkpoint, which reads the checkpoint and refuses a wrong one. Then it loads
everything that could still be wrong, and then it calls start_run. Only start_run changes the folder, and it
prints what it changes:

    a fresh run                               sets aside the run that is there, as earlier-<time>/
    --resume, a checkpoint of this folder     continues from it; sets aside what the run made after it
    --resume, one in an earlier-<time>/       sets aside the run that is there, and moves the earlier one back
    --resume, a checkpoint of another folder  sets aside the run that is there; the other folder is only read
    a run that is refused                     changes nothing

Clips and samples that a script rendered for itself (curated/, samples/shards.json, own_samples/) stay where
they are in all cases. The next run uses them again, or refuses them if its own would be different."""
import dataclasses
import errno
import fnmatch
import importlib.util
import json
import math
import os
import re
import shutil
import tempfile
import time
from pathlib import Path

import torch

from common import InputError, arg, gather, rank
from formats import disk, fingerprint, lock
from formats.metadata import from_json, replace_text
from formats.picture import write_gif
from formats.video import read_clip

# The flags that may differ in a resumed run, which prints the difference. With any other flag changed it
# would be another run, and is refused.
MAY_CHANGE = {"max_train_steps", "learning_rate", "trunk_learning_rate", "weight_decay", "batch_size",
              "gradient_accumulation_steps", "max_grad_norm", "mixed_precision", "gradient_checkpointing",
              "decoder_checkpointing", "parallel", "sequence_parallel", "fsdp_group_size",
              "offload_activations", "keep_attention", "compile", "checkpointing_steps", "keep", "export",
              "validation_steps", "validation_prompts", "guidance_scale", "guidance_scale_2", "judge",
              "patience"}
# Flags of folders that are compared by what they hold, because the folders may move.
BY_CONTENT = {"model", "reward", "data", "labels", "samples_dir", "curated_dir"}
NOT_COMPARED = {"output_dir", "resume_from_checkpoint"}
# Flags in the args.json of older runs: old name -> new name.
RENAMED = {"shard_size": "fsdp_group_size"}

# What the scripts make in a run folder, and a new run sets aside together. Folders with another writer stay.
WEIGHTS = ("best", "transformer", "transformer_2", "reward", "vae", "text_encoder",
           "pytorch_lora_weights.safetensors", "pytorch_lora_weights_2.safetensors")
MADE = ("args.json", "metrics.jsonl", "report.json", "events.out.tfevents.*", "checkpoint-*",
        "sharded_state.tmp", "samples", "earlier-*-checkpoint-*", *WEIGHTS,
        *(f"{name}.tmp*" for name in WEIGHTS), *(f"{name}{disk.REPLACED}" for name in WEIGHTS))
CHECKPOINT = re.compile(rf"checkpoint-(\d+)(\.old|\{disk.REPLACED})?")  # in older runs .old meant .replaced
# The end of the name of a folder while a run is moved to it or from it.
MOVING = ".moving"


def fast_precision():
    """"bf16" if the machine is fast at it, else "no" (float32). Most laptops' CPUs only emulate bf16 (AVX-512
    does not include it), and so do GPUs older than Ampere. On these float32 is several times faster."""
    if torch.cuda.is_available():
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = torch.cpu.get_capabilities().get("avx512_bf16", False)
    return "bf16" if fast else "no"


def precision_flag(more=""):
    return arg(fast_precision(), f"autocast dtype{more}; bf16 unless this machine only emulates it",
               choices=("no", "bf16"))


@dataclasses.dataclass
class Flags:
    """The flags of every training run."""
    mixed_precision: str = precision_flag(", in which RGB ReFL decodes too (trained weights, AdamW's state "
                                          "and the rollout's latents stay fp32)")
    resume_from_checkpoint: str | None = arg(None, "continue from a checkpoint: give its folder, a run "
                                             "folder (its last checkpoint is used), or 'latest' (the last "
                                             "checkpoint in --output_dir; if there is none, the run starts "
                                             "afresh)", alias="resume")


def write_json(path, value):
    """Replaces the file, whole or not at all."""
    replace_text(path, json.dumps(value, indent=2) + "\n")


def list_checkpoints(output_dir):
    """[(step, path)] of whole checkpoints, oldest first. If a kill came while one was being replaced, its
    path is `checkpoint-<step>.replaced`."""
    found = {}
    # the plain name comes last and wins
    for path in sorted(Path(output_dir).glob("checkpoint-*"), reverse=True):
        if name := CHECKPOINT.fullmatch(path.name):
            found[int(name[1])] = path
    return sorted(found.items())


# ---- the same run, or another
def contents(config, shards):
    """{"model", "reward" or "data": fingerprint} of what a run learns from."""
    found = {}
    for name in ("model", "reward"):
        if path := getattr(config, name, None):
            found[name] = fingerprint.of_weights(path)
    if shards:
        found["data"] = fingerprint.of_shards(shards)
    return found


def changes(path, config, made_from=None):
    """Compares config with the run that wrote checkpoint `path` -> (differences that make it another run,
    differences that are allowed), each [(flag, saved value, new value)]. made_from: this run's `contents`.
    Without it, flags that are still None (they may be filled in later) and those of BY_CONTENT are not
    compared. Raises InputError."""
    saved, now = read_args(path), json.loads(json.dumps(dataclasses.asdict(config)))
    # the run may be older than a flag; then the flag had its default there
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    if foreign := sorted(saved.keys() - now.keys() - {"made_from"}):
        raise InputError(f"{path}: not a checkpoint of this script: its args.json has --{foreign[0]}")
    known = saved.get("made_from")                              # the oldest runs do not have it
    other, allowed = [], []
    for name in sorted(now.keys() - NOT_COMPARED):
        there, here = saved.get(name, defaults[name]), now[name]
        if there == here:
            continue
        if made_from is None and (here is None or name in BY_CONTENT):
            continue
        if made_from is not None and known and name in BY_CONTENT:
            continue
        # with a rate of 0 the trunk is frozen, and other weights are trained
        freezes = name == "trunk_learning_rate" and 0 in (there, here)
        if name in MAY_CHANGE and not freezes:
            allowed.append((name, there, here))
        else:
            other.append((name, there, here))
    if made_from is not None and known:
        for name, here in made_from.items():
            if known.get(name) != here:
                other.append((f"{name}, what it holds:", known.get(name), here))
    return other, allowed


def read_args(path):
    """The flags in a run's or a checkpoint's args.json, with the names they have today. Raises InputError."""
    try:
        saved = from_json((Path(path) / "args.json").read_text())
    except ValueError as e:
        raise InputError(f"{path}/args.json is damaged ({e})") from None
    if not isinstance(saved, dict) or not isinstance(saved.get("made_from", {}), dict):
        raise InputError(f"{path}/args.json is damaged: it holds no flags")
    for old, new in RENAMED.items():
        if old in saved and new not in saved:
            saved[new] = saved.pop(old)
    return saved


def refuse_another_run(path, differ):
    if differ:
        said = ", ".join(f"--{name} {there} (now {now})" for name, there, now in differ)
        raise InputError(f"--resume_from_checkpoint {path}: that run has {said}: give it the same, or start "
                         "afresh in another --output_dir")


def require_ours(config):
    """Raises InputError unless --output_dir is new, empty, or the folder of an earlier run of this script,
    and --model is elsewhere."""
    folder, model = Path(config.output_dir), Path(config.model).resolve()
    if folder.resolve() in (model, *model.parents) and folder.exists():
        raise InputError(f"--output_dir {folder}: holds --model {config.model}, which would be written "
                         "over: name another folder")
    # args.json is looked at below; files of a run that ended while it made its data; a note by study/parts.py
    ours = ["args.json", "samples/.lock", "curated/.lock", "own_samples/.lock", "part.json"]
    ours += [path.name for _, path in list_checkpoints(folder)]
    lock.require_ours(folder, "run", ours, "--output_dir")
    if not (folder / "args.json").is_file():
        return
    known = {field.name for field in dataclasses.fields(config)} | {"made_from"}
    saved = read_args(folder)
    if foreign := sorted(saved.keys() - known):
        raise InputError(f"--output_dir {folder}: holds a run of another script, as its args.json has "
                         f"--{foreign[0]}: name another folder")
    if not saved:
        raise InputError(f"--output_dir {folder}: its args.json is of no run of this script, as it is "
                         "empty: name another folder")


def refuse_inputs_that_would_move(config):
    """Raises InputError if a flag names a file or folder of the earlier run that a new run in --output_dir
    sets aside."""
    moved = [path.resolve() for path in made_in(config.output_dir)]
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if isinstance(value, str) and field.name not in NOT_COMPARED:
            path = Path(value).resolve()
            if any(place in (path, *path.parents) for place in moved):
                raise InputError(f"--{field.name} {value}: belongs to the run in --output_dir "
                                 f"{config.output_dir}, which a new run there would set aside: name another "
                                 "--output_dir")


# ---- a run starts
def open_checkpoint(config):
    """-> (path, state) of the checkpoint that --resume_from_checkpoint names; (None, {"step": 0}) for a fresh
    run, also if the flag is `latest` and there is no checkpoint. Changes nothing; every process must call it.

    Raises InputError if the given flags show that the checkpoint is of another run; if it is past
    --max_train_steps; if the run folder is not ours to write in; or if the processes do not see the same
    folder."""
    spec, folder = config.resume_from_checkpoint, Path(config.output_dir)
    # not for world/pretrain.py, which has no --model and has already put latents there
    if rank() == 0 and hasattr(config, "model"):
        require_ours(config)
    for name in ("output_dir", "samples_dir", "curated_dir"):
        if getattr(config, name, None):
            disk.require_shared(getattr(config, name), f"--{name}")
    path = resolve_checkpoint(folder, spec) if spec else None
    if spec and path is None and rank() == 0:
        print(f"--resume latest: there is no checkpoint in {folder} yet, so the run starts afresh")
    if path is None or not in_run(path, folder):
        refuse_inputs_that_would_move(config)
    if path is None:
        return None, {"step": 0}
    refuse_another_run(path, changes(path, config)[0])
    state = load_state(path)
    if state["step"] > config.max_train_steps:
        raise InputError(f"--max_train_steps {config.max_train_steps}: {path} has made {state['step']} "
                         "steps already")
    return path, state


def start_run(config, resume_step=None, shards=None):
    """Rank 0 becomes the only writer of config.output_dir, treats the run that is there as the top of this
    file says, prints what it does, and writes args.json -> MetricsLog, which keeps the lock. Every process
    must call it, after everything else that could fail. resume_step: the step of the checkpoint from
    open_checkpoint; default: a fresh run. shards: the data that the run learns from.

    Raises InputError if the run to resume learned from other contents, or if another process writes in the
    folder."""
    folder, folder_lock, writer = Path(config.output_dir), None, None
    gather(None)                                # from here on no process reads what rank 0 is going to move
    if rank() == 0:
        made_from, path = contents(config, shards), None
        writer = summary_writer()
        if resume_step is not None:
            path = resolve_checkpoint(folder, config.resume_from_checkpoint)
            other, allowed = changes(path, config, made_from)
            refuse_another_run(path, other)
            said = "".join(f"; --{name} {now} (was {there})" for name, there, now in allowed)
            print(f"goes on from {path}{said}")
        folder_lock = lock.hold(folder)
        if path is not None and in_run(path, folder):
            if half := half_moved(folder):
                bring_back(folder, half)
            set_aside_after(folder, resume_step)
        else:
            set_aside_run(folder)
            if path is not None and is_earlier(path.resolve().parent, folder):
                bring_back(folder, path.resolve().parent)
                set_aside_after(folder, resume_step)
        write_json(folder / "args.json", dataclasses.asdict(config) | {"made_from": made_from})
    return MetricsLog(folder, resume_step, folder_lock, writer)


def in_run(path, folder):
    """Whether checkpoint `path` is of the run in `folder`, also if a kill left this run half moved."""
    folder = Path(folder).resolve()
    if CHECKPOINT.fullmatch(path.name) is None:
        return False
    return path.resolve().parent in (folder, half_moved(folder))


def is_earlier(home, folder):
    """Whether `home` is a run of `folder` that was set aside."""
    return home.name.startswith("earlier-") and home.parent == Path(folder).resolve()


# ---- a run is set aside, and comes back
def made_in(folder):
    """[path] of all that the run in `folder` made. Folders that have a writer of their own are left out:
    rendered clips and samples, which the next run uses again, and other runs."""
    found = []
    for path in sorted(Path(folder).glob("*")):
        signs = [lock.NAME, "shards.json"]                      # signs of another writer
        if "checkpoint-" not in path.name:
            signs.append("args.json")
        if path.is_dir() and any((path / name).exists() for name in signs):
            continue
        if any(fnmatch.fnmatch(path.name, pattern) for pattern in MADE):
            found.append(path)
    return found


def half_moved(folder):
    """The folder of an earlier run that was being moved when its process was killed, or None."""
    return next(iter(sorted(Path(folder).glob(f"earlier-*{MOVING}"))), None)


def set_aside(folder, moved, copied=()):
    """Moves the paths in `moved` and copies the files in `copied` to one folder earlier-<time>/ -> its path.
    If an earlier move was interrupted, what it had already moved goes to the same folder."""
    half = half_moved(folder)
    if half is None:
        name = time.strftime("earlier-%Y%m%d-%H%M%S")
        while (folder / name).exists():
            name += "-again"
        half = folder / f"{name}{MOVING}"
        half.mkdir()
        disk.flush(folder)
    for path in copied:
        shutil.copyfile(path, half / path.name)
        disk.flush(half / path.name)
    for path in moved:
        os.rename(path, half / path.name)
    disk.flush(half)
    aside = half.with_name(half.name.removesuffix(MOVING))
    os.rename(half, aside)
    disk.flush(folder)
    return aside


def set_aside_run(folder):
    """Sets the whole run in `folder` aside, if it made a first step, and prints where it is now."""
    made = made_in(folder)
    empty = [path for path in made if path.name == "args.json" or path.name.startswith("events.out.tfevents.")
             or (path.name == "metrics.jsonl" and not read_metrics(path))]
    if len(made) == len(empty) and not half_moved(folder):
        return
    aside = set_aside(folder, made)
    if list_checkpoints(aside):
        back = f"to go back to it, give its flags and --resume {aside}"
    else:
        back = "it has no checkpoint to go back to"
    print(f"{folder} held an earlier run. It is now {aside}; {back}", flush=True)


def set_aside_after(folder, step):
    """If the run in `folder` has checkpoints past `step`, sets aside all that it made after that step, with
    copies of args.json and metrics.jsonl, and prints where that is now."""
    newer = [number for number, _ in list_checkpoints(folder) if number > step]
    if not newer:
        return
    stays, copied, moved = ("samples", "events.out.tfevents.", "sharded_state.tmp", "earlier-"), [], []
    for path in made_in(folder):
        name = CHECKPOINT.fullmatch(path.name)
        if path.name in ("args.json", "metrics.jsonl"):
            copied.append(path)
        elif name:
            if int(name[1]) > step:
                moved.append(path)
        elif path.name == "best":
            if step_of_best(path) > step:
                moved.append(path)
        elif not path.name.startswith(stays):
            moved.append(path)
    aside = set_aside(folder, moved, copied)
    print(f"{folder}: what the run made after step {step} is now {aside}; to go back to step {newer[-1]}, "
          f"give --resume {aside}",
          flush=True)


def step_of_best(path):
    """The step whose weights the folder best/ holds; 0 if its best.json does not say."""
    try:
        return int(from_json((path / "best.json").read_text())["step"])
    except (OSError, ValueError, LookupError, TypeError, OverflowError):
        return 0


def bring_back(folder, aside):
    """Moves the run in folder `aside`, a subfolder of `folder`, back to its place. Raises InputError if a
    process writes in it."""
    half = aside
    if not aside.name.endswith(MOVING):
        # raises InputError if a run is being continued in there
        lock.hold(aside).close()
        (aside / lock.NAME).unlink(missing_ok=True)
        half = aside.with_name(aside.name + MOVING)
        os.rename(aside, half)
    for path in sorted(half.iterdir()):
        if not (folder / path.name).exists() or path.name in ("args.json", "metrics.jsonl"):
            os.rename(path, folder / path.name)
    disk.flush(folder)
    if next(half.iterdir(), None) is None:
        half.rmdir()
    else:
        # some things could not be moved because `folder` has their names, such as clips rendered twice
        os.rename(half, half.with_name(half.name.removesuffix(MOVING)))


# ---- checkpoints
def save_checkpoint(output_dir, step, folders, state, config, keep=None):
    """Writes checkpoint-<step> (folders {name: function(path)}, train_state.pt, args.json) under a temporary
    name, flushes it and renames it. After a kill or a power loss at any moment, the previous checkpoint can
    still be used. keep: how many checkpoints stay; default: all. Every rank must call it, because a model's
    pieces are gathered while they are written; rank 0 writes. Raises OSError, which names the last whole
    checkpoint, if the disk is full, read-only or gone."""
    final = Path(output_dir) / f"checkpoint-{step:06d}"
    temporary = Path(f"{final}.tmp")
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
        # the run's args.json has more than the flags: `made_from` (see `contents`)
        run = read_args(output_dir) if (Path(output_dir) / "args.json").exists() else {}
        write_json(temporary / "args.json", run | dataclasses.asdict(config))
        disk.put(temporary, final)
    except OSError as e:
        # half a checkpoint is of no use, and a full disk needs the room
        shutil.rmtree(temporary, ignore_errors=True)
        raise unwritten(output_dir, step, e) from None
    whole = [path for _, path in list_checkpoints(output_dir)]
    for path in whole[:-keep] if keep else []:
        shutil.rmtree(path, ignore_errors=True)
    return final


def unwritten(output_dir, step, error):
    """-> an OSError for `error`, because of which checkpoint-<step> could not be written. It names the last
    whole checkpoint."""
    whole = list_checkpoints(output_dir)
    there = "there is none before it"
    if whole:
        there = f"the last whole one is {whole[-1][1]}: --resume latest goes on from it"
    number, why = getattr(error, "errno", None) or errno.EIO, getattr(error, "strerror", None) or str(error)
    said = f"{why}: checkpoint-{step:06d} could not be written; {there}"
    return OSError(number, said, getattr(error, "filename", None))


def save_state(state, path):
    """torch.save, but on a full disk it raises OSError, which names the file and the cause. torch's own
    RuntimeError names neither."""
    try:
        with open(path, "wb") as file:
            torch.save(state, file)
    except RuntimeError as e:
        raise OSError(errno.EIO, f"not written whole ({e})", str(path)) from None


def resolve_checkpoint(output_dir, spec):
    """-> the path of the checkpoint that `spec` names: a checkpoint folder; a run folder (its last
    checkpoint); the name of one of these inside output_dir; or "latest", the last one in output_dir (None if
    there is none). Raises InputError."""
    path, inside = Path(spec), Path(output_dir) / spec
    if spec == "latest":
        path = Path(output_dir)
    elif not path.is_dir() and (inside.is_dir() or path.name == spec):
        path = inside
    if not path.name.startswith("checkpoint-") and not (path / "train_state.pt").is_file():
        found = list_checkpoints(path)
        if spec == "latest" and (half := half_moved(path)):
            found = sorted([*found, *list_checkpoints(half)])
        if spec == "latest" and not found:
            return None
        path = found[-1][1] if found else path / "checkpoint-<step>"
    if lacking := [name for name in ("train_state.pt", "args.json") if not (path / name).is_file()]:
        others = [other for _, other in list_checkpoints(path.parent) if other != path]
        last = f"; the last one there is {others[-1]}" if others else ""
        raise InputError(f"--resume_from_checkpoint {spec}: there is no {path / lacking[0]}{last}")
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
            pass                                                # a kill or an editor damaged this line
    return found


def summary_writer():
    """TensorBoard's SummaryWriter. If TensorBoard is not installed: None. If it is installed but cannot be
    imported: None, and a warning."""
    if importlib.util.find_spec("tensorboard") is None:
        return None
    try:
        from torch.utils.tensorboard import SummaryWriter
        return SummaryWriter
    except Exception as error:                                  # a broken install raises anything
        no_tensorboard(error)
        return None


def no_tensorboard(error):
    disk.warn_once("tensorboard", f"TensorBoard cannot be used ({type(error).__name__}: "
                                  f"{' '.join(str(error).split())[:200]}): "
                   "metrics go to metrics.jsonl only")


class MetricsLog:
    """Rank 0 writes metrics.jsonl, one flushed line per step, and TensorBoard events if `writer`, its
    SummaryWriter, is given. On resume, lines past resume_step and damaged lines are dropped; with resume_step
    None, all old lines are dropped. folder_lock: a lock to keep."""

    def __init__(self, output_dir, resume_step=None, folder_lock=None, writer=None):
        path, self.folder_lock = Path(output_dir) / "metrics.jsonl", folder_lock
        self.file, self.board = None, None
        if rank() > 0:
            return
        kept = [line for step, line in read_metrics(path) if resume_step is not None and step <= resume_step]
        replace_text(path, "".join(f"{line}\n" for line in kept))
        self.file = path.open("a", buffering=1)                 # flushes each line
        if writer is not None:
            try:
                self.board = writer(str(output_dir), purge_step=(resume_step or 0) + 1)
            except Exception as error:
                no_tensorboard(error)

    def on_board(self, write):
        """Calls write(board) if there is a board. If this fails, the run only warns, and writes no more
        events."""
        if self.board is None:
            return
        try:
            write(self.board)
        except Exception as error:
            no_tensorboard(error)
            self.board = None

    def log(self, step, **values):
        """Logs numbers, scalar tensors or strings. Raises FloatingPointError if a number is not finite,
        OSError if the file is gone."""
        values = {k: v.item() if isinstance(v, torch.Tensor) else v for k, v in values.items()}
        for name, value in values.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise FloatingPointError(f"step {step}: {name} is {value}; lower --learning_rate")

        def add_scalars(board):
            for name, value in values.items():
                if not isinstance(value, str):
                    board.add_scalar(name, value, step)
            board.flush()

        self.on_board(add_scalars)
        if self.file:
            if not os.fstat(self.file.fileno()).st_nlink:       # the file, or the whole folder, was removed
                said = f"was removed while step {step} was made"
                raise FileNotFoundError(errno.ENOENT, said, self.file.name)
            self.file.write(json.dumps({"step": step, **values}) + "\n")

    def videos(self, step, folder):
        """Shows the mp4s in `folder` on TensorBoard's page of images, as moving GIFs."""
        def add_video(board, path):
            # SummaryWriter.add_video makes the same GIF, but needs moviepy 1
            from tensorboard.compat.proto.summary_pb2 import Summary
            # uint8 [f, h, w, 3]
            video, fps = read_clip(path)
            with tempfile.TemporaryDirectory() as place:
                write_gif(Path(place) / "video.gif", video.numpy(), fps)
                image = Summary.Image(height=video.shape[1], width=video.shape[2], colorspace=3,
                                      encoded_image_string=(Path(place) / "video.gif").read_bytes())
            shown = Summary.Value(tag=f"samples/{path.stem}", image=image)
            board.file_writer.add_summary(Summary(value=[shown]), step)

        for path in sorted(Path(folder).glob("*.mp4")):
            self.on_board(lambda board, path=path: add_video(board, path))
