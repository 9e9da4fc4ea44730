"""Plumbing every script shares, as plain functions. Imports none of our files.
Whatever is random in example i of step k comes from random_generator(seed, purpose, k, i): a resumed run, or one on
another number of ranks, draws the same numbers, and no generator state is ever stored."""
import argparse
import dataclasses
import datetime
import hashlib
import math
import operator
import os
import sys
import time
import typing

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from tqdm import tqdm


class InputError(ValueError):
    """The user's input cannot be used. One line: it names the file, field or flag and says what to do."""


def rank():
    return int(os.environ.get("RANK", 0))


# ---- command line
def arg(default, help, *, choices=None, above=None, at_least=None, at_most=None, below=None, alias=None, positional=False, only=""):
    """A dataclass field that is also a flag: int, float, str, bool, or Optional[X] or tuple[X, ...] of these.
    default=... (Ellipsis) makes it required; above, at_least, at_most, below bound every value. only: where it does anything, such
    as "method prfl refl, !data or keep": --method is one of two and --data not given, or --keep is. Elsewhere it is refused."""
    rule = {k: v for k, v in locals().items() if k != "default"}
    return dataclasses.field(default=dataclasses.MISSING if default is ... else default, metadata=rule)


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise InputError(message.removeprefix("argument ").replace("unrecognized arguments", "unknown flag"))


def parse(Config, doc, argv=None, prog=None):
    """-> Config from the command line. Raises InputError naming the flag; --help prints doc and flags."""
    parser = _Parser(prog, description=doc, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    hints, fields = typing.get_type_hints(Config), dataclasses.fields(Config)
    for field in sorted(fields, key=lambda field: field.name not in Config.__annotations__):     # its own come first
        _add_flag(parser, field, hints[field.name])
    given = {name: tuple(v) if isinstance(v, list) else v for name, v in vars(parser.parse_args(argv)).items()}
    config = Config(**given)
    for field in fields:
        _check_bounds(field, getattr(config, field.name))
        if field.name in given and (unmet := _unmet(config, field.metadata["only"])):
            raise InputError(f"--{field.name} means nothing {unmet}: leave it out")
    return config


def _add_flag(parser, field, hint):
    rule, required = field.metadata, field.default is dataclasses.MISSING
    kind = (*typing.get_args(hint), hint)[0]                # X | None and tuple[X, ...] -> X
    notes = [f"only: {rule['only'].replace('!', 'no ')}"] * bool(rule["only"]) + [f"default: {field.default}"] * (not required)
    how = {"help": (rule["help"] + (f" ({'; '.join(notes)})" if notes else "")).replace("%", "%%")}
    how |= {"action": argparse.BooleanOptionalAction} if kind is bool else {"type": kind, "choices": rule["choices"]}
    how |= {"nargs": "*" if rule["positional"] and not required else "+"} if typing.get_origin(hint) is tuple else {}
    if not rule["positional"]:
        how |= {"required": required, "default": argparse.SUPPRESS}     # what is not given is left to Config
    names = [field.name] if rule["positional"] else [f"--{name}" for name in (field.name, rule["alias"]) if name]
    parser.add_argument(*names, **how)


def _check_bounds(field, value):
    tests = ("above", operator.gt), ("at_least", operator.ge), ("at_most", operator.le), ("below", operator.lt)
    bounds = [(name.replace("_", " "), field.metadata[name], holds) for name, holds in tests if field.metadata[name] is not None]
    for v in value if isinstance(value, tuple) else (value,):
        broken = [f" {words} {bound}" for words, bound, holds in bounds if v is not None and not holds(v, bound)]
        broken += [" below 2 ** 63"] * (isinstance(v, int) and v >= 2 ** 63)             # more than torch counts
        if broken or isinstance(v, float) and not math.isfinite(v):
            raise InputError(f"--{field.name} must be a finite number{''.join(broken)}, got {v}")


def _unmet(config, only):
    """Why a flag of this rule (see arg) does nothing here; "" if it does something."""
    reasons = []
    for alternative in filter(None, only.split(" or ")):
        broken = []
        for flag, *values in (condition.split() for condition in alternative.split(", ")):
            value = getattr(config, flag.lstrip("!"))
            if (str(value) in values if values else bool(value)) == flag.startswith("!"):
                broken += [f"without --{flag}" if value is None or value is False else f"with --{flag.lstrip('!')} {value}"]
        if not broken:
            return ""
        reasons += [reason for reason in broken[:1] if reason not in reasons]
    return " and ".join(reasons)


def refuse(config, names, why):
    """Raises InputError for a flag of `names` that was given (is not its default) where it would be ignored."""
    for field in dataclasses.fields(config):
        if field.name in names and getattr(config, field.name) != field.default:
            raise InputError(f"--{field.name} means nothing {why}: leave it out")


def cli(main, Config, doc, argv=None, prog=None):
    """main(Config from the command line), expected failures as one line on stderr. Exit code 2: unusable input,
    1: the disk, non-finite numbers or out of memory, 130: interrupted. Other exceptions are bugs: traceback."""
    if hasattr(sys.stdout, "reconfigure"): sys.stdout.reconfigure(errors="backslashreplace")     # names of others, on any terminal
    try:
        return main(parse(Config, doc, argv, prog))
    except (InputError, PermissionError, FileExistsError, NotADirectoryError) as e:
        code, message = 2, str(e)
    except (OSError, FloatingPointError, torch.OutOfMemoryError) as e:
        code, message = 1, str(e)
    except KeyboardInterrupt:
        code, message = 130, "interrupted"
    except Exception:
        time.sleep(3 if "RANK" in os.environ else 0)    # often the echo of another rank's end: torchrun ends this one, too
        raise
    time.sleep(3 if rank() else 0)  # a failure of every rank is told once: torchrun ends the others meanwhile
    message = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in " ".join(message.split()))
    print("error:", message, file=sys.stderr, flush=True)
    leave(code)


# ---- processes and random draws
@dataclasses.dataclass(frozen=True)
class Runtime:
    rank: int
    world_size: int
    device: torch.device
    dtype: torch.dtype  # of autocast; weights stay float32
    sequence_parallel: int = 1  # neighbouring ranks that share their clips

    def autocast(self):
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def indices(self, batch_size, micro=0):
        """Positions in the global batch of this rank's examples; micro counts gradient accumulation."""
        place = (micro * self.world_size + self.rank) // self.sequence_parallel
        return [place * batch_size + j for j in range(batch_size)]


def setup(mixed_precision="no", seed=0, sequence_parallel=1):
    """-> Runtime; joins torchrun's process group if there is one. mixed_precision: no | bf16."""
    cuda = torch.cuda.is_available()
    device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if cuda else "cpu")
    if cuda:
        torch.cuda.set_device(device)
    if "RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group("nccl" if cuda else "gloo", timeout=datetime.timedelta(hours=1))
    torch.manual_seed(seed)  # equal on every rank: modules start from equal weights
    dtype = {"no": torch.float32, "bf16": torch.bfloat16}[mixed_precision]
    return Runtime(rank(), int(os.environ.get("WORLD_SIZE", 1)), device, dtype, sequence_parallel)


def teardown():
    """The last call of a script; under torchrun it ends the process."""
    if dist.is_initialized():
        dist.barrier()  # a rank that leaves while another still talks to it can abort that one
        leave(0)


def leave(code):
    """sys.exit; under torchrun at once, because a thread of the process group that is still letting go of a tensor
    while the interpreter shuts down aborts it (exit code -6, seen on a loaded machine)."""
    if not dist.is_initialized():
        sys.exit(code)
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(code)


def random_generator(seed, *keys):
    """CPU generator that depends on nothing but its arguments (plain numbers and strings)."""
    digest = hashlib.blake2b(repr((seed, *keys)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def noise(shape, seed, purpose, step, indices):
    """Standard normal [len(indices), *shape]; row j depends only on (seed, purpose, step, indices[j])."""
    return torch.stack([torch.randn(shape, generator=random_generator(seed, purpose, step, int(i))) for i in indices])


def uniform(seed, purpose, step, indices):
    """U(0, 1) [len(indices)]; element j depends only on (seed, purpose, step, indices[j])."""
    return torch.cat([torch.rand(1, generator=random_generator(seed, purpose, step, int(i))) for i in indices])


def all_reduce_mean_(tensors):
    """Mean over ranks, in place, of a list of tensors, e.g. of losses before they are logged."""
    if tensors and dist.is_initialized() and dist.get_world_size() > 1:
        for work in [dist.all_reduce(x, async_op=True) for x in tensors]:
            work.wait()
        torch._foreach_div_(tensors, dist.get_world_size())


def gather(value, to=None):
    """[value of rank 0, of rank 1, ...], on every rank, or on rank `to` ([] elsewhere); picklable values and CPU tensors."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    parts = [None] * dist.get_world_size() if to in (None, rank()) else None
    if to is None:
        dist.all_gather_object(parts, value)
    else:
        dist.gather_object(value, parts, to)
    return parts or []


def equal_turns(turns, count, spare=None):
    """A rank's turns at a model, made as many as those of the busiest rank -> [(turn, whether its result counts)].

    Under FSDP every call of a model gathers its weights from all ranks, so all must call it equally often, or they hang.
    turns: this rank's; count: those of the busiest rank. A rank with fewer takes `spare` (default: its first turn) for
    the missing ones, and drops what comes of it.
    """
    turns = list(turns)
    if spare is None and turns:
        spare = turns[0]
    return [(turn, True) for turn in turns] + [(spare, False)] * (count - len(turns))


def equal_batches(rows, batch_size, max_rows=None):
    """`rows` rows in batches -> [(slice, whether its result counts)], as many as `max_rows` rows need (equal_turns).
    max_rows: the most rows that any rank has in this call; default: this rank's."""
    slices = [slice(i, i + batch_size) for i in range(0, rows, batch_size)]
    return equal_turns(slices, math.ceil((max_rows or rows) / batch_size))


def check_finite(value, name, step):
    """Raises FloatingPointError naming the step and the value if a scalar tensor is not finite."""
    if not torch.isfinite(value):
        raise FloatingPointError(f"step {step}: {name} is {value.item()}; lower --learning_rate, or look at the data")


def average_and_clip_gradients(params, max_norm, step=None):
    """Averages gradients over ranks, clips in place (max_norm None: not) -> norm before clipping, float.
    Raises FloatingPointError naming the step if the norm is not finite."""
    params = [p for p in params if p.grad is not None]
    all_reduce_mean_([p.grad for p in params if not isinstance(p, DTensor)])     # FSDP averages in the backward pass
    norm = torch.nn.utils.get_total_norm([p.grad for p in params])
    value = (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()
    if not math.isfinite(value):
        raise FloatingPointError(f"step {step}: the gradient norm is {value}; lower --learning_rate")
    torch.nn.utils.clip_grads_with_norm_(params, max_norm or math.inf, norm)
    return value


def progress(work, desc, initial=0):
    """tqdm over an iterable or a number of steps, on rank 0; once in 10 s when stderr is a file."""
    what, pause = "total" if isinstance(work, int) else "iterable", 0.2 if sys.stderr.isatty() else 10
    return tqdm(**{what: work}, desc=desc, initial=initial, disable=rank() > 0, mininterval=pause)
