"""Plumbing every script shares, as plain functions: errors, command line, process group, random draws,
checkpoints, metrics. No Trainer: each script owns its loop and calls these. Imports nothing of ours.

Randomness: whatever is random in example i of step k comes from generator(seed, purpose, k, i), so a resumed
run, or one on another number of ranks, draws the same numbers and no generator state is ever stored.
"""
import argparse, dataclasses, datetime, difflib, errno, hashlib, json, math, os, re, shutil, sys, time, typing
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm


class InputError(ValueError):
    """The user's input cannot be used. One line: it names the file, field or flag and says what to do."""


# ---- command line ---------------------------------------------------------------------------------------------
def arg(default, help, *, choices=None, above=None, at_least=None, at_most=None, alias=None, positional=False):
    """A dataclass field that is also a flag. default=... (Ellipsis) makes it required."""
    default = dataclasses.MISSING if default is ... else default
    return dataclasses.field(default=default, metadata=dict(
        help=help, choices=choices, above=above, at_least=at_least, at_most=at_most, alias=alias,
        positional=positional))


def _value_type(hint):
    """int | Optional[int] | tuple[int, ...] -> (type of one value, may be None, is a tuple)."""
    inner = [a for a in typing.get_args(hint) if a not in (type(None), ...)]
    optional = type(None) in typing.get_args(hint)
    kind, _, many = _value_type(inner[0]) if optional else (inner[0] if inner else hint, False, bool(inner))
    return kind, optional, many


def check_config(config):
    """Raises InputError naming the flag whose value is out of bounds, not finite or not one of its choices."""
    for f in dataclasses.fields(config):
        value, meta, name = getattr(config, f.name), f.metadata, f.name if f.metadata["positional"] else f"--{f.name}"
        for v in value if isinstance(value, tuple) else () if value is None else (value,):
            bounds = [(f"above {meta['above']}", meta["above"] is None or v > meta["above"]),
                      (f"at least {meta['at_least']}", meta["at_least"] is None or v >= meta["at_least"]),
                      (f"at most {meta['at_most']}", meta["at_most"] is None or v <= meta["at_most"])]
            wanted = " and ".join(text for text, _ in bounds if not text.endswith(" None"))
            if (isinstance(v, float) and not math.isfinite(v)) or not all(ok for _, ok in bounds):
                kind = "whole" if isinstance(v, int) else "finite"
                raise InputError(f"{name} must be a {kind} number {wanted}".rstrip() + f", got {v}")
            if meta["choices"] and v not in meta["choices"]:
                near = difflib.get_close_matches(str(v), map(str, meta["choices"]), 1)
                hint = f" (did you mean {near[0]}?)" if near else ""
                raise InputError(f"{name} must be one of {', '.join(map(str, meta['choices']))}, got {v}{hint}")


def parse(Config, doc, argv=None, prog=None):
    """-> a checked Config. Raises InputError; --help prints doc and every flag with its default, and exits."""
    formatter = lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=36, width=110)
    parser = argparse.ArgumentParser(prog, description=doc, allow_abbrev=False, formatter_class=formatter)
    parser.error = lambda message: (_ for _ in ()).throw(InputError(message.removeprefix("argument ")))
    hints, fields = typing.get_type_hints(Config), {f.name: f for f in dataclasses.fields(Config)}
    for name, f in fields.items():
        kind, _, many = _value_type(hints[name])
        required = f.default is dataclasses.MISSING
        text = f.metadata["help"] + ("" if required else f" (default: {f.default})")
        text = (text + (" [" + ", ".join(map(str, f.metadata["choices"])) + "]" if f.metadata["choices"] else ""))
        names = [name] if f.metadata["positional"] else [f"--{name}"] + ["--" + a for a in [f.metadata["alias"]] if a]
        shown = {bool: {"action": argparse.BooleanOptionalAction}}.get(kind, {"metavar": kind.__name__.upper()})
        if f.metadata["positional"]:
            shown = {"metavar": name.upper()} | ({} if required else {"nargs": "?"})
        else:
            shown |= {"nargs": "+"} if many else {}
            shown |= {"dest": name, "required": required}
        parser.add_argument(*names, default=argparse.SUPPRESS, help=text.replace("%", "%%"), **shown)
    given, unknown = parser.parse_known_args(argv)
    if unknown:
        flags = [o for a in parser._actions for o in a.option_strings]
        near = difflib.get_close_matches(unknown[0].split("=")[0], flags, 1)
        raise InputError(f"unknown {'flag' if unknown[0].startswith('-') else 'argument'} {unknown[0]}"
                         + (f" (did you mean {near[0]}?)" if near else " (--help lists the flags)"))
    config = Config(**{k: _convert(fields[k], hints[k], v) for k, v in vars(given).items()})
    check_config(config)
    return config


def _convert(f, hint, text):
    kind, optional, many = _value_type(hint)
    if many:
        return tuple(_convert(f, kind, t) for t in text)
    if kind in (bool, str) or (optional and text.lower() == "none"):
        return None if optional and str(text).lower() == "none" else text
    try:
        return kind(text)
    except ValueError:
        noun = {int: "a whole number", float: "a number"}[kind]
        raise InputError(f"--{f.name} must be {noun}, got {text!r}") from None


def cli(main, Config, doc, argv=None, prog=None):
    """Parse, run main(config), turn expected failures into one line on stderr. Exit codes: 2 unusable input,
    1 the run failed (non-finite loss, out of memory, full disk), 130 interrupted; anything else is a bug and
    keeps its traceback."""
    try:
        main(parse(Config, doc, argv, prog))
    except InputError as e:
        _fail(str(e), 2)
    except (FloatingPointError, torch.OutOfMemoryError) as e:
        memory = "out of memory: lower --batch_size or turn on --gradient_checkpointing; " if "emory" in str(e) else ""
        _fail(memory + str(e), 1)
    except OSError as e:
        if e.errno not in (errno.EACCES, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EEXIST, errno.ENOTDIR):
            raise
        _fail(f"{e.strerror}: {e.filename or 'while writing'}", 2)
    except KeyboardInterrupt:
        _fail("interrupted", 130)


def _fail(message, code):
    if rank() > 0:  # the same error on every rank is printed once: by the time we wake, torchrun has ended us
        time.sleep(3)
    where = f" (rank {rank()})" if rank() else ""
    print(f"error{where}: " + " ".join(message.split()), file=sys.stderr, flush=True)
    sys.exit(code)


# ---- processes and random draws -------------------------------------------------------------------------------
def rank():
    return int(os.environ.get("RANK", 0))


@dataclasses.dataclass(frozen=True)
class Runtime:
    rank: int
    world_size: int
    device: torch.device
    dtype: torch.dtype  # of autocast; weights stay float32

    def autocast(self):
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def indices(self, batch_size, micro=0):
        """Positions in the global batch of this rank's examples; micro counts gradient accumulation."""
        start = (micro * self.world_size + self.rank) * batch_size
        return list(range(start, start + batch_size))


def setup(mixed_precision="no", seed=0):
    """-> Runtime. Joins torchrun's group if there is one (nccl on CUDA, gloo on CPU). mixed_precision: no | bf16."""
    world_size, local = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_RANK", 0))
    cuda = torch.cuda.is_available()
    if cuda and local >= torch.cuda.device_count():
        raise InputError(f"--nproc_per_node is above the {torch.cuda.device_count()} GPUs of this machine")
    if cuda:
        torch.cuda.set_device(local)
    elif "RANK" in os.environ and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
    if cuda and mixed_precision == "bf16" and not torch.cuda.is_bf16_supported():
        raise InputError("--mixed_precision bf16 needs a GPU with bfloat16: use --mixed_precision no")
    if "RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group("nccl" if cuda else "gloo", timeout=datetime.timedelta(hours=1))
    torch.manual_seed(seed)  # same on every rank: modules start from equal weights
    dtype = {"no": torch.float32, "bf16": torch.bfloat16}[mixed_precision]
    return Runtime(rank(), world_size, torch.device("cuda", local) if cuda else torch.device("cpu"), dtype)


def teardown():
    if dist.is_initialized():
        dist.destroy_process_group()


def generator(seed, *keys):
    """CPU generator that depends on nothing but its arguments."""
    digest = hashlib.blake2b(repr((seed, *keys)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def noise(shape, seed, purpose, step, indices):
    """Standard normal [len(indices), *shape], float32; row j depends only on (seed, purpose, step, indices[j])."""
    return torch.stack([torch.randn(shape, generator=generator(seed, purpose, step, int(i))) for i in indices])


def uniform(seed, purpose, step, indices):
    """U(0, 1) [len(indices)], float32; element j depends only on (seed, purpose, step, indices[j])."""
    return torch.cat([torch.rand(1, generator=generator(seed, purpose, step, int(i))) for i in indices])


def average_gradients(params):
    """Mean of .grad over ranks, in place; on one process nothing happens."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        grads = [p.grad for p in params if p.grad is not None]
        for work in [dist.all_reduce(g, async_op=True) for g in grads]:
            work.wait()
        torch._foreach_div_(grads, dist.get_world_size())


def average(values, device="cpu"):
    """{name: number or scalar tensor} -> {name: float}, the mean over ranks (equal batches assumed)."""
    out = torch.tensor([float(v) for v in values.values()], dtype=torch.float64, device=device)
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(out)
        out /= dist.get_world_size()
    return dict(zip(values, out.tolist()))


def clip_gradients(params, max_norm, step=None):
    """Clips in place (max_norm None: only measures) -> norm before clipping, float. Raises FloatingPointError."""
    params = [p for p in params if p.grad is not None]
    norm = torch.nn.utils.get_total_norm([p.grad for p in params])
    if not torch.isfinite(norm):
        raise FloatingPointError(f"step {step}: gradient norm is {norm.item()}; a lower --learning_rate may help")
    if max_norm is not None:
        torch.nn.utils.clip_grads_with_norm_(params, max_norm, norm)
    return norm.item()


# ---- run folder and checkpoints -------------------------------------------------------------------------------
def write_json(path, value):
    """Whole or not at all: a temporary name, then a rename."""
    temporary = Path(f"{path}.tmp")
    temporary.write_text(json.dumps(value, indent=2, default=str) + "\n")
    os.replace(temporary, path)


def checkpoints(output_dir):
    """[(step, path)] of whole checkpoints, oldest first. `.old`: a kill came while that step was being replaced."""
    found = {}
    for path in sorted(Path(output_dir).glob("checkpoint-*"), reverse=True):  # plain name last, so it wins
        if (match := re.fullmatch(r"checkpoint-(\d+)(\.old)?", path.name)) and path.is_dir():
            found[int(match[1])] = path
    return sorted(found.items())


def start_run(config, resume_step=None):
    """Creates config.output_dir with args.json (rank 0). Checkpoints later than resume_step (None: all of them)
    belong to an earlier run: they move to previous-<n>/, so that `latest` never picks them up."""
    folder = Path(config.output_dir)
    if rank() > 0:
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    stale = [path for step, path in checkpoints(folder) if resume_step is None or step > resume_step]
    if stale:
        count = next(n for n in range(1, 10 ** 6) if not (folder / f"previous-{n}").exists())
        (folder / f"previous-{count}").mkdir()
        for path in stale + [p for p in [folder / "metrics.jsonl"] if resume_step is None and p.exists()]:
            path.rename(folder / f"previous-{count}" / path.name)
        print(f"{folder} holds an earlier run: moved to {folder / f'previous-{count}'}", file=sys.stderr)
    write_json(folder / "args.json", dataclasses.asdict(config))
    return folder


def save_checkpoint(output_dir, step, folders, state, config, keep=None):
    """Rank 0: writes checkpoint-<step> as folders {name: function(path)}, train_state.pt and args.json under a
    temporary name, flushes, renames. A kill at any moment leaves the previous one usable. keep: newest n stay."""
    final, temporary = Path(output_dir) / f"checkpoint-{step:06d}", Path(output_dir) / f"checkpoint-{step:06d}.tmp"
    if rank() > 0:
        return final
    for leftover in Path(output_dir).glob("checkpoint-*.tmp"):
        shutil.rmtree(leftover)
    temporary.mkdir(parents=True)
    for name, write in folders.items():
        (temporary / name).mkdir()
        write(temporary / name)
    sizes = {str(p.relative_to(temporary)): p.stat().st_size for p in temporary.rglob("*") if p.is_file()}
    torch.save({"step": step, **state, "files": sizes}, temporary / "train_state.pt")
    write_json(temporary / "args.json", dataclasses.asdict(config) if dataclasses.is_dataclass(config) else config)
    for path in [*temporary.rglob("*"), temporary]:
        _fsync(path)
    old = final.with_suffix(".old")
    if final.exists():  # a rename cannot replace a folder; resolve_checkpoint knows the .old name
        shutil.rmtree(old, ignore_errors=True)
        os.rename(final, old)
    os.rename(temporary, final)
    _fsync(output_dir)
    shutil.rmtree(old, ignore_errors=True)
    for _, path in checkpoints(output_dir)[:-keep] if keep else []:
        shutil.rmtree(path)
    return final


def _fsync(path):
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def resolve_checkpoint(output_dir, spec):
    """`latest`, a checkpoint folder, its name inside output_dir, or a run folder -> path of a whole checkpoint."""
    path = Path(output_dir) if spec == "latest" else Path(spec)
    if spec != "latest" and not path.exists():
        path = Path(output_dir) / spec
    if not path.is_dir():
        raise InputError(f"--resume_from_checkpoint {spec}: there is no folder {path}")
    if not re.fullmatch(r"checkpoint-\d+(\.old)?", path.name):
        if not checkpoints(path):
            raise InputError(f"--resume_from_checkpoint {spec}: {path} holds no checkpoint-<step> folder")
        path = checkpoints(path)[-1][1]
    if missing := [n for n in ("train_state.pt", "args.json") if not (path / n).is_file()]:
        raise InputError(f"--resume_from_checkpoint {spec}: {path} is not whole, it lacks {' and '.join(missing)}")
    return path


def load_state(path):
    """-> the state given to save_checkpoint, plus `step`. Raises InputError on truncated or missing files."""
    try:
        state = torch.load(Path(path) / "train_state.pt", map_location="cpu", weights_only=True)
    except Exception as e:  # torch raises RuntimeError, EOFError, UnpicklingError, ... for one cause
        raise InputError(f"{path}/train_state.pt cannot be read: truncated or not a checkpoint "
                         f"({type(e).__name__}); resume from an earlier one") from None
    for name, size in state.pop("files", {}).items():
        if not (Path(path) / name).is_file() or (name.endswith(".safetensors")
                                                 and (Path(path) / name).stat().st_size != size):
            raise InputError(f"{path}/{name} is missing or truncated; resume from an earlier checkpoint")
    return state


class MetricsLog:
    """metrics.jsonl, one object a step, flushed at once (rank 0); TensorBoard events if that is installed. On
    resume, lines later than resume_step (and a half-written last line) are dropped; None starts afresh."""

    def __init__(self, output_dir, resume_step=None):
        self.file = self.board = None
        if rank() > 0:
            return
        path, kept = Path(output_dir) / "metrics.jsonl", []
        for line in path.read_text().splitlines() if path.exists() and resume_step is not None else []:
            try:
                kept += [line + "\n"] if json.loads(line)["step"] <= resume_step else []
            except (ValueError, KeyError):
                continue
        Path(f"{path}.tmp").write_text("".join(kept))
        os.replace(f"{path}.tmp", path)
        self.file = path.open("a")
        try:
            from torch.utils.tensorboard import SummaryWriter
            self.board = SummaryWriter(str(output_dir), purge_step=None if resume_step is None else resume_step + 1)
        except ImportError:
            pass

    def log(self, step, values=(), **more):
        """Numbers, scalar tensors or strings. Raises FloatingPointError naming step and value if not finite."""
        row = {k: v.item() if isinstance(v, torch.Tensor) else v for k, v in {**dict(values), **more}.items()}
        for name, value in row.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise FloatingPointError(f"step {step}: {name} is {value}; a lower --learning_rate may help")
        if self.file:
            self.file.write(json.dumps({"step": step, **row}) + "\n")
            self.file.flush()
        for name, value in row.items() if self.board else ():
            if isinstance(value, (int, float)):
                self.board.add_scalar(name, value, step)

    def close(self):
        for writer in filter(None, (self.file, self.board)):
            writer.close()


def progress(iterable_or_total, desc, initial=0):
    """tqdm with rate and time left on rank 0, quiet elsewhere; every 10 s when stderr is a log file."""
    every = 0.2 if sys.stderr.isatty() else 10
    total = iterable_or_total if isinstance(iterable_or_total, int) else None
    return tqdm(None if total is not None else iterable_or_total, desc=desc, total=total, initial=initial,
                disable=rank() > 0, mininterval=every, maxinterval=max(10, every), dynamic_ncols=True)
