"""The plumbing that every script shares, as plain functions. This file imports no other file of ours.

Every random number for example i of step k comes from random_generator(seed, purpose, k, i). So a resumed
run, and a run on another number of ranks, draw the same numbers, and no generator state is ever stored."""
import argparse
import dataclasses
import datetime
import hashlib
import math
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
def arg(default, help, *, choices=None, above=None, at_least=None, at_most=None, below=None, alias=None,
        positional=False, only=""):
    """A dataclass field that is also a flag. Its type is int, float, str or bool, or Optional[X] or tuple[X,
    ...] of these.

    default: ... (Ellipsis) makes the flag required. above, at_least, at_most, below: bounds of every value.
    only: when the flag has an effect; otherwise it is refused. It is a list of conditions, joined by ", "
    (and) or " or ":
        "method prfl refl"      --method is one of the two
        "!method sft"           --method is not sft
        "data"                  --data is given (of a switch: it is on; of a number: it is not 0)
        "!data"                 --data is not given
    """
    rule = {"help": help, "choices": choices, "above": above, "at_least": at_least, "at_most": at_most,
            "below": below, "alias": alias, "positional": positional, "only": only}
    return dataclasses.field(default=dataclasses.MISSING if default is ... else default, metadata=rule)


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise InputError(message.removeprefix("argument "))


def parse(Config, doc, argv=None, prog=None):
    """-> Config from the command line. Raises InputError, which names the flag; --help prints doc and flags.
    """
    parser = _Parser(prog, description=doc, allow_abbrev=False,
                     formatter_class=argparse.RawDescriptionHelpFormatter)
    hints, fields = typing.get_type_hints(Config), dataclasses.fields(Config)
    positionals = {field.name for field in fields if field.metadata["positional"]}
    own = [field for field in fields if field.name in Config.__annotations__]
    inherited = [field for field in fields if field.name not in Config.__annotations__]
    for field in own + inherited:
        _add_flag(parser, field, hints[field.name], positionals)
    words = sys.argv[1:] if argv is None else argv
    given, left = parser.parse_known_args(words)
    if left:
        raise InputError(_what_is_left(left, words))
    given = vars(given)
    for name, value in given.items():
        if isinstance(value, list):
            given[name] = tuple(value)
    config = Config(**given)
    for field in fields:
        _check_bounds(field, getattr(config, field.name))
        if field.name in given:
            unmet = _unmet(config, field.metadata["only"], positionals)
            if unmet:
                raise InputError(f"--{field.name} means nothing {unmet}")
    return config


def _what_is_left(left, words):
    """The message about words of the command line that no flag takes."""
    if flags := [word for word in left if word.startswith("-")]:
        return f"unknown flag: {', '.join(flags)}"
    flag = next((word for word, second in zip(words, words[2:]) if word.startswith("--")
                 and second == left[0]), None)                  # the flag took the word between the two
    return f"{left[0]}: one value too many: {f'{flag} takes one' if flag else 'leave it out'}"


def _add_flag(parser, field, hint, positionals):
    """Gives argparse one field of a Config. A flag that is not given is left out of the result, so that
    Config's default holds. positionals: names of the Config's fields that have no dashes."""
    rule, required = field.metadata, field.default is dataclasses.MISSING
    inner = typing.get_args(hint)                               # of X | None and tuple[X, ...] X is the first
    kind = inner[0] if inner else hint
    help = rule["help"]
    notes = []
    if rule["only"]:
        notes.append(f"only {_in_words(rule['only'], positionals)}")
    if not required and field.default not in (None, ()):
        notes.append(f"default: {field.default}")
    if notes:
        help += f" ({'; '.join(notes)})"
    options = {"help": help.replace("%", "%%")}                 # argparse reads % as a placeholder
    if kind is bool:
        options["action"] = argparse.BooleanOptionalAction
    else:
        options["type"] = kind
        options["choices"] = rule["choices"]
    if typing.get_origin(hint) is tuple:
        options["nargs"] = "*" if rule["positional"] and not required else "+"
    if rule["positional"]:
        parser.add_argument(field.name, **options)
        return
    names = [f"--{field.name}"]
    if rule["alias"]:
        names.append(f"--{rule['alias']}")
    parser.add_argument(*names, required=required, default=argparse.SUPPRESS, **options)


def _check_bounds(field, value):
    """Raises InputError, which names the flag, if a value is out of its bounds, not finite, or too large for
    torch."""
    rule = field.metadata
    values = value if isinstance(value, tuple) else (value,)
    for v in values:
        if not isinstance(v, (int, float)):
            continue
        broken = []
        if rule["above"] is not None and not v > rule["above"]:
            broken.append(f" above {rule['above']}")
        if rule["at_least"] is not None and not v >= rule["at_least"]:
            broken.append(f" at least {rule['at_least']}")
        if rule["at_most"] is not None and not v <= rule["at_most"]:
            broken.append(f" at most {rule['at_most']}")
        if rule["below"] is not None and not v < rule["below"]:
            broken.append(f" below {rule['below']}")
        if isinstance(v, int) and v >= 2 ** 63:
            broken.append(" below 2 ** 63")
        if broken or (isinstance(v, float) and not math.isfinite(v)):
            raise InputError(f"--{field.name} must be a finite number{''.join(broken)}, got {v}")


def _conditions(only):
    """"method a b, !data or keep" -> [[("method", ["a", "b"], True), ("data", [], False)], [("keep", [],
    True)]]: a list of alternatives, each a list of (flag, values, whether the flag must have one of them)."""
    alternatives = []
    for alternative in only.split(" or ") if only else ():
        conditions = []
        for condition in alternative.split(", "):
            flag, *values = condition.split()
            conditions.append((flag.removeprefix("!"), values, not flag.startswith("!")))
        alternatives.append(conditions)
    return alternatives


def _in_words(only, positionals=()):
    """A rule as --help says it, such as "if --method is a or b and without --data, or with --keep"."""
    alternatives = []
    for conditions in _conditions(only):
        words = []
        for flag, values, wanted in conditions:
            name = flag if flag in positionals else f"--{flag}"
            if values:
                *others, last = values
                one_of = f"{', '.join(others)} or {last}" if others else last
                words.append(f"if {name} is {'' if wanted else 'not '}{one_of}")
            else:
                words.append(f"{'with' if wanted else 'without'} {name}")
        alternatives.append(" and ".join(words))
    return ", or ".join(alternatives)


def _unmet(config, only, positionals=()):
    """Why a flag with this rule has no effect here, and what to do: the first unmet condition of each
    alternative; "" if the flag has an effect."""
    reasons, remedies = [], ["leave it out"]
    for conditions in _conditions(only):
        reason, remedy = "", None
        for flag, values, wanted in conditions:
            value = getattr(config, flag)
            found = str(value) in values if values else bool(value)
            if found != wanted and not reason:
                name = flag if flag in positionals else f"--{flag}"
                reason = f"without {name}" if value is None or value is False else f"with {name} {value}"
                remedy = f"give {name} too" if wanted and not values else None
        if not reason:
            return ""
        if reason not in reasons:
            reasons.append(reason)
            remedies += [remedy] if remedy else []
    return f"{' and '.join(reasons)}: {', or '.join(remedies)}" if reasons else ""


def refuse(config, names, why):
    """Raises InputError for a flag of `names` that does not have its default, because it would be ignored.
    why: the words after "means nothing"."""
    for field in dataclasses.fields(config):
        if field.name in names and getattr(config, field.name) != field.default:
            raise InputError(f"--{field.name} means nothing {why}: leave it out")


def divisors(*numbers):
    """The numbers that divide all of `numbers`, in words."""
    return ", ".join(str(i) for i in range(1, min(numbers) + 1) if not any(x % i for x in numbers))


def settle(config, sources):
    """Flags in, settings out: -> (a copy of config with its open flags filled in, {flag: where its value
    comes from}).

    A flag that was given keeps its value. A flag that is open (None) takes its value from the first of
    `sources` that has one for it. sources: {where the values come from, such as "the steady recipe": {flag:
    value}}. All other flags keep their defaults."""
    values, origin = {}, {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value != field.default:
            origin[field.name] = "given"
        elif value is None:
            for source, found in sources.items():
                if found.get(field.name) is not None:
                    values[field.name] = found[field.name]
                    origin[field.name] = source
                    break
    return dataclasses.replace(config, **values), origin


def print_settings(config, origin):
    """Prints the settings that are not defaults, on rank 0: one line for each source, first the flags that
    were given. config, origin: from `settle`."""
    if rank() > 0:
        return
    for source in ["given", *sorted(set(origin.values()) - {"given"})]:
        said = [f"--{name} {getattr(config, name)}" for name in origin if origin[name] == source]
        if said:
            print(f"settings, {source}: {', '.join(said)}")


def cli(main, Config, doc, argv=None, prog=None):
    """Calls main(Config from the command line); an expected failure is one line on stderr. Exit code 2:
    unusable input, 1: the disk, non-finite numbers or out of memory, 130: interrupted. Any other exception is
    a bug and keeps its traceback."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")       # any file name can be printed on any terminal
    try:
        return main(parse(Config, doc, argv, prog))
    except (InputError, PermissionError, FileExistsError, NotADirectoryError) as e:
        code, message = 2, str(e)
    except (OSError, FloatingPointError, torch.OutOfMemoryError) as e:
        code, message = 1, str(e)
    except KeyboardInterrupt:
        code, message = 130, "interrupted"
    except Exception:
        if "RANK" in os.environ:
            # often only a consequence of another rank's failure: while this one waits, torchrun ends it
            time.sleep(3)
        raise
    if rank() > 0:
        # if all ranks fail, only rank 0 prints: while the others wait, torchrun ends them
        time.sleep(3)
    shown = ""
    for character in " ".join(message.split()):
        shown += character if character.isprintable() else ascii(character)[1:-1]
    print("error:", shown, file=sys.stderr, flush=True)
    leave(code)


# ---- processes and random draws
BUCKET_BYTES = 2 ** 26  # how many bytes of gradients are summed over the ranks at a time
TIMEOUT = datetime.timedelta(hours=1)   # how long processes wait, for example while one of them writes 57 GB


@dataclasses.dataclass(frozen=True)
class Runtime:
    rank: int
    world_size: int
    device: torch.device
    dtype: torch.dtype              # of autocast; weights stay float32
    sequence_parallel: int = 1      # how many neighbouring ranks share their clips

    def autocast(self):
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def indices(self, batch_size, micro=0):
        """Positions of this rank's examples in the global batch. micro: the number of the accumulated batch.
        """
        place = (micro * self.world_size + self.rank) // self.sequence_parallel
        return [place * batch_size + j for j in range(batch_size)]


def setup(mixed_precision="no", seed=0, sequence_parallel=1):
    """-> Runtime; joins torchrun's process group if there is one. mixed_precision: no | bf16."""
    cuda = torch.cuda.is_available()
    device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if cuda else "cpu")
    if cuda:
        torch.cuda.set_device(device)
    # float32 in convolutions too: with TF32, which is cuDNN's default, latents differ from a CPU's
    torch.backends.cudnn.allow_tf32 = False
    if "RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group("nccl" if cuda else "gloo", timeout=TIMEOUT)
    torch.manual_seed(seed)         # the same on every rank, so that modules start from the same weights
    dtype = {"no": torch.float32, "bf16": torch.bfloat16}[mixed_precision]
    return Runtime(rank(), int(os.environ.get("WORLD_SIZE", 1)), device, dtype, sequence_parallel)


def teardown():
    """The last call of a script; under torchrun it ends the process."""
    if dist.is_initialized():
        dist.barrier()              # if a rank leaves while another talks to it, the other one can abort
        leave(0)


def leave(code):
    """sys.exit, or under torchrun os._exit, which skips the interpreter's shutdown: a process-group thread
    that frees a tensor during the shutdown can abort the process (exit code -6, seen on a loaded machine)."""
    if not dist.is_initialized():
        sys.exit(code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def random_generator(seed, *keys):
    """A CPU generator that depends only on its arguments, which are plain numbers and strings."""
    digest = hashlib.blake2b(repr((seed, *keys)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def noise(shape, seed, purpose, step, indices):
    """Standard normal [len(indices), *shape]; row j depends only on (seed, purpose, step, indices[j])."""
    return torch.stack([torch.randn(shape, generator=random_generator(seed, purpose, step, int(i)))
                        for i in indices])


def uniform(seed, purpose, step, indices):
    """U(0, 1) [len(indices)]; element j depends only on (seed, purpose, step, indices[j])."""
    return torch.cat([torch.rand(1, generator=random_generator(seed, purpose, step, int(i)))
                      for i in indices])


def buckets(tensors, most):
    """[[tensor, ...], ...]: lists of neighbours of one dtype, each with at most `most` bytes together. A
    larger tensor has a list of its own."""
    found, room = [], 0
    for x in tensors:
        if not found or x.nbytes > room or x.dtype != found[-1][0].dtype:
            found.append([])
            room = most
        found[-1].append(x)
        room -= x.nbytes
    return found


def all_reduce_mean_(tensors):
    """Averages each tensor of a list over the ranks, in place, for example losses before they are logged.
    Small tensors are copied into a bucket and summed together, because each sum waits for all ranks."""
    if not tensors or not dist.is_initialized() or dist.get_world_size() == 1:
        return
    for bucket in buckets(tensors, BUCKET_BYTES):
        if len(bucket) == 1 and bucket[0].is_contiguous():
            dist.all_reduce(bucket[0])
            continue
        flat = torch.cat([x.flatten() for x in bucket])
        dist.all_reduce(flat)
        pieces = flat.split([x.numel() for x in bucket])
        torch._foreach_copy_(bucket, [piece.view(x.shape) for piece, x in zip(pieces, bucket)])
    torch._foreach_div_(tensors, dist.get_world_size())


def gather(value, to=None):
    """-> [the value of rank 0, of rank 1, ...] on every rank, or only on rank `to` (then [] elsewhere).
    Values must be picklable or CPU tensors."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    parts = [None] * dist.get_world_size() if to in (None, rank()) else None
    if to is None:
        dist.all_gather_object(parts, value)
    else:
        dist.gather_object(value, parts, to)
    return parts or []


def equal_turns(turns, count, spare=None):
    """Gives each rank as many turns at a model as the busiest rank has -> [(turn, whether its result
    counts)].

    Under FSDP every call of a model gathers its weights from all ranks, so all ranks must call it equally
    often, or they hang. turns: this rank's turns. count: how many turns the busiest rank has. A rank with
    fewer turns repeats `spare` (default: its first turn) in place of the missing ones, and drops the results.
    """
    turns = list(turns)
    if spare is None and turns:
        spare = turns[0]
    return [(turn, True) for turn in turns] + [(spare, False)] * (count - len(turns))


def groups_of(n, size):
    """0 .. n - 1 in lists of `size` neighbours; the last list can be shorter."""
    return [list(range(i, min(i + size, n))) for i in range(0, n, size)]


def equal_batches(rows, batch_size, max_rows=None):
    """Cuts `rows` rows into batches -> [(slice, whether its result counts)], as many as `max_rows` rows need
    (equal_turns). max_rows: how many rows the rank with the most has; default: this rank's number."""
    slices = [slice(i, i + batch_size) for i in range(0, rows, batch_size)]
    return equal_turns(slices, math.ceil((max_rows or rows) / batch_size))


def check_finite(value, name, step):
    """Raises FloatingPointError, which names the step and the value, if a scalar tensor is not finite."""
    if not torch.isfinite(value):
        raise FloatingPointError(f"step {step}: {name} is {value.item()}; lower --learning_rate, or look at "
                                 "the data")


def average_and_clip_gradients(params, max_norm, step=None):
    """Averages gradients over ranks and clips them in place -> their norm before clipping, a float. max_norm
    None: no clipping. Raises FloatingPointError, which names the step, if the norm is not finite."""
    params = [p for p in params if p.grad is not None]
    # FSDP averages in the backward pass
    all_reduce_mean_([p.grad for p in params if not isinstance(p, DTensor)])
    norm = torch.nn.utils.get_total_norm([p.grad for p in params])
    value = (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()
    if not math.isfinite(value):
        raise FloatingPointError(f"step {step}: the gradient norm is {value}; lower --learning_rate")
    torch.nn.utils.clip_grads_with_norm_(params, max_norm or math.inf, norm)
    return value


def progress(work, desc, initial=0):
    """A progress bar over an iterable or a number of steps, on rank 0. If stderr is a file, it prints every
    10 s."""
    steps, total = (None, work) if isinstance(work, int) else (work, None)
    pause = 0.2 if sys.stderr.isatty() else 10
    return tqdm(steps, total=total, desc=desc, initial=initial, disable=rank() > 0, mininterval=pause)
