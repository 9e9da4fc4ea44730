"""Weight folders on disk, with config.json beside safetensors: our own, Wan2.1's official ones, and those of
diffusers.

Nothing here is needed to understand the method; `model.load_transformer` and `model.export_transformer` use
it. Reading is strict: weights that are missing, unexpected or of another shape raise an InputError that lists
them. A folder is written whole or not at all: it has a temporary name until it is complete. Weights are read
from safetensors only.
"""
import copy
import json
import math
import os
import shutil
import struct
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from common import InputError, rank
from formats import disk
from formats.metadata import from_json

WEIGHTS = "diffusion_pytorch_model.safetensors"
POINTER = b"version https://git-lfs"                            # how a file begins that git-lfs did not fetch
TASKS = ("t2v", "i2v")
CHECKPOINTS = Path(__file__).parents[1] / "checkpoints"
# task, and --world unless that is tiny
SHIPPED = {"t2v": CHECKPOINTS, "i2v": CHECKPOINTS / "i2v", "t2v mid": CHECKPOINTS / "mid"}


class Later(NamedTuple):
    """A tensor that is only computed when it is written."""
    shape: tuple
    dtype: torch.dtype
    make: Callable


def full_tensor(x):
    """The full tensor of x, of which each rank may hold a piece, or which may be a Later. Every rank must
    call it."""
    x = x.make() if isinstance(x, Later) else x
    return x.detach().full_tensor() if isinstance(x, DTensor) else x.detach()


def stream_tensors(tensors, path, dtype=None):
    """Writes a safetensors file, with one full tensor in memory at a time. tensors: {name: tensor or Later}.
    dtype: what they are cast to, or {name: dtype}, or None. Raises OSError, which names the file; then
    nothing of the file is left."""
    dtypes = dtype if isinstance(dtype, dict) else dict.fromkeys(tensors, dtype) if dtype else {}
    words = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
             torch.int8: "I8",
             torch.uint8: "U8"}
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, x in tensors.items():
        dtype = dtypes.get(name, x.dtype)
        start, end = end, end + math.prod(x.shape) * dtype.itemsize
        header[name] = {"dtype": words[dtype], "shape": list(x.shape), "data_offsets": [start, end]}
    header = json.dumps(header, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)                         # so that the numbers after it are aligned
    try:
        with open(path, "wb") as file:
            file.write(struct.pack("<Q", len(header)) + header)
            for name, x in tensors.items():
                x = full_tensor(x).to("cpu", dtypes.get(name, x.dtype)).contiguous()
                file.write(x.flatten().view(torch.uint8).numpy().data)
    except OSError as error:
        if Path(path).is_file():
            os.unlink(path)
        raise OSError(error.errno, error.strerror, str(path)) from None


def write_folder(path, config, tensors, dtype=None):
    """Writes config.json and one safetensors file to a folder, which is renamed to `path` when it is
    complete. tensors, dtype: as in stream_tensors. If ranks hold pieces of tensors, every rank must call it;
    rank 0 writes."""
    path = Path(path)
    if rank() > 0:
        for x in tensors.values():
            if isinstance(x, (DTensor, Later)):
                full_tensor(x)
        return
    new = path.with_name(f"{path.name}.tmp{os.getpid()}")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    try:
        (new / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        stream_tensors(tensors, new / WEIGHTS, dtype)
        disk.put(new, path)
    finally:
        shutil.rmtree(new, ignore_errors=True)          # still there only if something failed


def read_config(path, part=None):
    """The dict in path/config.json, or InputError. part: the name of the folder in `path` that the user may
    have meant."""
    if not Path(path).is_dir():
        raise InputError(f"{path} is not a folder; give one that holds config.json and {WEIGHTS}")
    try:
        config = from_json((Path(path) / "config.json").read_text())
    except FileNotFoundError:
        meant = f": give {path}/{part}" if part and (Path(path) / part / "config.json").is_file() else ""
        raise InputError(f"{path} holds no config.json{meant}") from None
    except ValueError as error:
        raise InputError(f"{path}/config.json is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise InputError(f"{path}/config.json holds no JSON object")
    return config


def require_fetched(folder):
    """Raises InputError if a file in `folder` is a pointer of git-lfs, which stands for a file that was not
    downloaded."""
    for path in sorted(Path(folder).iterdir()):
        if path.is_file():
            with open(path, "rb") as file:
                if file.read(len(POINTER)) == POINTER:
                    raise InputError(f"{path}: is a pointer of git-lfs and not the file: run `git lfs pull` "
                                     "there")


class WeightFiles:
    """The tensors of a folder's safetensors file or shards. They are read one at a time, or only some rows.

    rename: a function from the names by which tensors are asked for to their names in the files.
    """

    def __init__(self, path, rename=lambda name: name):
        path = self.path = Path(path)
        self.rename = rename
        index = path / f"{WEIGHTS}.index.json"
        if (path / WEIGHTS).is_file():
            files = [path / WEIGHTS]
        elif index.is_file():
            try:
                files = [path / name
                         for name in sorted(set(from_json(index.read_text())["weight_map"].values()))]
            except (ValueError, KeyError, AttributeError, TypeError) as error:
                raise InputError(f"{index} is not a shard index: {error!r}") from None
        else:
            raise InputError(f"{path} holds no {WEIGHTS}, nor {index.name}")
        self.handle, self.file = {}, {}  # name -> open file, its path
        for file in files:
            try:
                handle = safe_open(file, "pt")
            except (FileNotFoundError, UnicodeError):           # or no file can have this name
                raise InputError(f"{file} is missing; {index.name} names it") from None
            except (SafetensorError, OSError) as error:
                require_fetched(path)
                raise InputError(f"{file} is not a whole safetensors file: "
                                 f"{error}".replace("\n", " ")) from None
            self.handle |= dict.fromkeys(handle.keys(), handle)
            self.file |= dict.fromkeys(handle.keys(), file)

    def require(self, shapes, ignore=()):
        """Raises InputError unless the files hold all of `shapes` (name -> shape) and nothing else, except
        names that contain a word of `ignore` -> self."""
        want = {self.rename(name): tuple(shape) for name, shape in shapes.items()}
        have = {name for name in self.handle if not any(word in name for word in ignore)}
        found = {name: tuple(self.handle[name].get_slice(name).get_shape()) for name in want.keys() & have}
        problems = {
            "missing": sorted(want.keys() - have),
            "unexpected": sorted(have - want.keys()),
            "of another shape": [f"{name} {found[name]} instead of {want[name]}"
                                 for name in sorted(found) if found[name] != want[name]],
        }
        if any(problems.values()):
            listed = "; ".join(f"{len(names)} {kind}: "
                               f"{', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"
                               for kind, names in problems.items() if names)
            raise InputError(f"the weights in {self.path} do not fit: {listed}")
        return self

    def behind(self, prefix):
        """The same files, for a model that has a prefix before all of these names."""
        other = copy.copy(self)
        other.rename = lambda name: self.rename(name.removeprefix(prefix))
        return other

    def tensor(self, name):
        name = self.rename(name)
        return self.handle[name].get_tensor(name)

    def shape(self, name):
        name = self.rename(name)
        return torch.Size(self.handle[name].get_slice(name).get_shape())

    def rows(self, name, start, stop):
        """Rows start .. stop - 1 of a tensor; no others are read from the file."""
        name = self.rename(name)
        with safe_open(self.file[name], "pt") as file:  # opened anew: pages of an open map stay resident
            return file.get_slice(name)[start:stop]


class Unkept(TorchDispatchMode):
    """Draws the initial values of weights on the meta device and throws them away, so that random draws after
    them stay the same."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out, kwargs = func(*args, **kwargs or {}), kwargs or {}
        if out.is_meta and func._schema.name in ("aten::uniform_", "aten::normal_", "aten::randn"):
            func(*(torch.empty(x.shape) if isinstance(x, torch.Tensor) else x for x in args), **kwargs | (
                {"device": "cpu"} if "device" in kwargs else {}))
        return out


@contextmanager
def unkept(really=True):
    """Modules that are made in this `with` block are on the meta device. Random draws after them are the same
    as if the modules were not on meta."""
    if really:
        with torch.device("meta"), Unkept():
            yield
    else:
        yield


def save_module(module, path, dtype=None):
    """Writes module.config and the weights (cast to dtype if given) to a folder, whole or not at all. Every
    rank must call it."""
    write_folder(path, module.config, module.state_dict(), dtype)


def load_weights(module, path, load_now=True):
    """Fills `module`, whose dtype and device stay, from a folder that `save_module` wrote -> the module. A
    module on the meta device gets float32 weights, or with load_now=False only `weight_files`, as in
    model.load_transformer.

    Raises InputError if the folder was written for another config or its weights are not exactly the
    module's.
    """
    stored, mine = read_config(path), json.loads(json.dumps(module.config))
    differing = [f"{key} {stored.get(key)!r} instead of {mine.get(key)!r}"
                 for key in sorted(stored.keys() | mine.keys()) if stored.get(key) != mine.get(key)]
    if differing:
        raise InputError(f"{path}/config.json is of another {type(module).__name__}: {', '.join(differing)}")
    meta = module.state_dict()
    files = WeightFiles(path).require({n: v.shape for n, v in meta.items()})
    if not load_now:
        module.weight_files = files
    elif any(x.is_meta for x in meta.values()):                # copies, so that no weight is a view of a file
        module.load_state_dict({n: files.tensor(n).to(torch.float32, copy=True) for n in meta}, assign=True)
    else:
        module.load_state_dict({n: files.tensor(n) for n in meta})
    return module


# ---- which folders are read
PIPELINES = ("WanPipeline", "WanVideoToVideoPipeline", "WanImageToVideoPipeline")       # of diffusers
PARTS = ("transformer", "vae", "text_encoder", "tokenizer", "image_encoder", "image_processor", "scheduler",
         "expand_timesteps", "transformer_2", "boundary_ratio")
TRANSFORMERS = ("WanModel", "WanTransformer3DModel")
SUPPORTED = "a folder of Wan2.1, Wan2.2 TI2V-5B or Wan2.2 A14B"
TI2V_CHANNELS = 48      # channels of the latents of Wan2.2 TI2V-5B, whose one generator is for both tasks
# Wan2.2 A14B is a generator of two experts. What diffusers and its authors call the folder of each expert.
EXPERTS = {"high": ("transformer", "high_noise_model"), "low": ("transformer_2", "low_noise_model")}
BOUNDARIES = {"t2v": 0.875, "i2v": 0.9}         # of A14B, whose authors' folders do not say it


def require_known(path):
    """Raises InputError if a generator's folder is not there, or is, or belongs to, a pipeline with a part
    that nothing here reads.

    Without that part the generator would not do what its authors meant, and no error would say so.
    """
    if not Path(path).is_dir():
        raise InputError(f"{path}: there is no such folder, and nothing is downloaded: give a generator's, "
                         "with transformer/, vae/ and text_encoder/, or that of a transformer")
    index = pipeline_of(path) / "model_index.json"
    if index.is_file():
        require_known_index(index)


def pipeline_of(path):
    """The folder itself, or its parent if it is the transformer's or an expert's folder in a pipeline."""
    path = Path(path)
    name = path.resolve().name
    return path.resolve().parent if name in EXPERTS["high"] + EXPERTS["low"] else path


def require_known_index(file):
    """Raises InputError if a diffusers pipeline's model_index.json names a pipeline or a part that nothing
    here reads."""
    index = read_index(file.parent)
    kind = index.get("_class_name")
    if kind not in PIPELINES:
        raise InputError(f"{file}: is of a {kind}: not supported, give {SUPPORTED}: {' or '.join(PIPELINES)}")
    for name, value in index.items():
        empty = value in (None, False) or value == [None, None]
        if not empty and not name.startswith("_") and name not in PARTS:
            raise InputError(f"{file}: names {name}, which nothing here reads: not supported, give "
                             f"{SUPPORTED}")
    if index.get("expand_timesteps"):
        require_known_times(file)


def read_index(folder):
    """The dict in folder/model_index.json, {} if there is none. Raises InputError."""
    file = Path(folder) / "model_index.json"
    if not file.is_file():
        return {}
    try:
        index = from_json(file.read_text())
    except ValueError as error:
        raise InputError(f"{file} is not JSON: {error}") from None
    if not isinstance(index, dict):
        raise InputError(f"{file} holds no JSON object")
    return index


class Pair(NamedTuple):
    """A generator of two experts on disk."""
    high: Path                  # folder of the expert for times from `boundary` on
    low: Path                   # folder of the expert for the times below `boundary`
    boundary: float


def expert_folders(path):
    """The Pair that a folder holds or is a half of, or None if its generator is one transformer.

    The folder is a diffusers pipeline with transformer/ and transformer_2/, the authors' folder with
    high_noise_model/ and low_noise_model/, what a run wrote, or one expert's own folder in any of these. If a
    run trained only one expert, this expert's config.json says where the other expert is. Raises InputError
    if the second half is not there, because one half makes no videos.
    """
    path = Path(path)
    home, found = pipeline_of(path), {}
    for name, folders in EXPERTS.items():
        for folder in folders:
            if (home / folder).is_dir():
                found[name] = home / folder
    notes = notes_of(path)
    if notes.get("_expert") in EXPERTS:                         # an expert's folder may have any name
        found[notes["_expert"]] = path
    for folder in found.values():
        notes = notes_of(folder) | notes
    index = read_index(home)
    boundary = index.get("boundary_ratio") or notes.get("_boundary_ratio")
    of_authors = any((home / folders[1]).is_dir() for folders in EXPERTS.values())
    names_two = index.get("transformer_2") not in (None, [None, None])
    if not (boundary or names_two or of_authors or "low" in found):
        return None
    for name, folders in EXPERTS.items():
        other = notes.get("_other")
        if name not in found and isinstance(other, str) and (Path(other) / "config.json").is_file():
            found[name] = Path(other)
        if name not in found:
            place = home / folders[of_authors]
            raise InputError(f"{path}: is half of a generator of two experts (Wan2.2 A14B): the {name}-noise "
                             f"one, {other or place}, is missing: put it, or a link to it, at "
                             f"{place}")
    if of_authors and not boundary:
        boundary = BOUNDARIES.get(read_config(found["low"]).get("model_type"))
    if type(boundary) is not float or not 0 < boundary < 1:
        raise InputError(f"{home}: holds two experts (Wan2.2 A14B), and its model_index.json does not say "
                         f"from which time on the first is used: boundary_ratio is {boundary}")
    return Pair(found["high"], found["low"], boundary)


def notes_of(folder):
    """What a transformer's config.json says beside its shape: the keys with _ in front."""
    if not (Path(folder) / "config.json").is_file():
        return {}
    return {key: value for key, value in read_config(folder).items() if key.startswith("_")}


def require_known_times(index):
    """Raises InputError if a pipeline gives each token its own time and is not the one of Wan2.2 TI2V-5B."""
    file = index.parent / "transformer/config.json"
    if file.is_file():
        theirs = read_config(file.parent)
        found = theirs.get("in_channels"), theirs.get("out_channels")
        if found != (TI2V_CHANNELS, TI2V_CHANNELS):
            raise InputError(f"{index}: names expand_timesteps (Wan2.2 TI2V-5B), and its transformer takes "
                             f"{found[0]} channels and makes {found[1]}, where that one has {TI2V_CHANNELS}: "
                             "not supported")


def require_known_transformer(config):
    """Raises InputError if a transformer's config.json is of a kind that resembles Wan2.1's, but takes or
    does more."""
    kind, task = config.get("_class_name", TRANSFORMERS[0]), config.get("model_type", TASKS[0])
    if "pooling" in config:
        raise InputError("is of a reward model: give the folder of a generator")
    if kind not in TRANSFORMERS:
        raise InputError(f"is of a {kind}: not supported, give {SUPPORTED}: {' or '.join(TRANSFORMERS)}")
    if task == "ti2v" and does_both(config):
        return
    if task not in TASKS:
        raise InputError(f"model_type is {task!r}: not supported, give a transformer of Wan2.1's for "
                         f"{' or '.join(TASKS)}")


def does_both(config):
    """Whether the generator with this config, in Wan's words, is for both tasks, of which --task chooses one.
    In image-to-video the given first latent frame is then in its place in x."""
    return config.get("in_dim", 16) == config.get("out_dim", 16) == TI2V_CHANNELS


def task_in_words(config):
    """The task of the generator with this config, and how a generator for both tasks gets the other one."""
    task = config["model_type"]
    other = TASKS[1 - TASKS.index(task)]
    return f"{task}, or {other} with --task {other}" if does_both(config) else task


def require_known_channels(config):
    """Raises InputError if a transformer takes more channels than those of the noise and, in image-to-video,
    of mask and first frame."""
    taken, c = config.get("in_dim", 16), config.get("out_dim", 16)
    if taken not in (c, 4 + 2 * c):
        raise InputError(f"takes {taken} channels: not supported, t2v takes {c} and i2v {4 + 2 * c} "
                         "(Wan2.1's Fun models for control signals take more)")


# ---- Wan2.1's official folders and diffusers'
# (Wan's word, diffusers' word), replaced in this order, because the two number a block's norms differently.
DIFFUSERS_WORDS = (
    ("text_embedding.0", "condition_embedder.text_embedder.linear_1"),
    ("text_embedding.2", "condition_embedder.text_embedder.linear_2"),
    ("time_embedding.0", "condition_embedder.time_embedder.linear_1"),
    ("time_embedding.2", "condition_embedder.time_embedder.linear_2"),
    ("time_projection.1", "condition_embedder.time_proj"),
    ("img_emb.proj.0", "condition_embedder.image_embedder.norm1"),
    ("img_emb.proj.1", "condition_embedder.image_embedder.ff.net.0.proj"),
    ("img_emb.proj.3", "condition_embedder.image_embedder.ff.net.2"),
    ("img_emb.proj.4", "condition_embedder.image_embedder.norm2"),
    ("head.modulation", "scale_shift_table"), ("head.head", "proj_out"), ("modulation", "scale_shift_table"),
    ("self_attn", "attn1"), ("cross_attn", "attn2"), ("norm3", "norm2"), ("norm_k_img", "norm_added_k"),
    (".q.", ".to_q."), (".k.", ".to_k."), (".v.", ".to_v."), (".o.", ".to_out.0."),
    (".k_img.", ".add_k_proj."), (".v_img.", ".add_v_proj."), ("ffn.0", "ffn.net.0.proj"),
    ("ffn.2", "ffn.net.2"),
)


def diffusers_name(name):
    for ours, theirs in DIFFUSERS_WORDS:
        name = name.replace(ours, theirs)
    return name


def diffusers_config(config):
    """Our config in the words of `WanTransformer3DModel`. It has no text_len (Wan's is 512), so we add
    _text_len."""
    image_dim, dim, heads = config["image_dim"], config["dim"], config["num_heads"]
    return dict(_class_name="WanTransformer3DModel", _text_len=config["text_len"],
                patch_size=config["patch_size"],
                num_attention_heads=heads, attention_head_dim=dim // heads, in_channels=config["in_dim"],
                out_channels=config["out_dim"], text_dim=config["text_dim"], freq_dim=config["freq_dim"],
                ffn_dim=config["ffn_dim"], num_layers=config["num_layers"], cross_attn_norm=True,
                qk_norm="rms_norm_across_heads", eps=config["eps"], image_dim=image_dim,
                added_kv_proj_dim=None if image_dim is None else dim, rope_max_seq_len=1024)


def from_diffusers_config(theirs):
    """The inverse of `diffusers_config`. Raises KeyError or InputError if `theirs` is not of a Wan2.1 model.
    """
    if theirs.get("qk_norm", "rms_norm_across_heads") != "rms_norm_across_heads" \
            or not theirs.get("cross_attn_norm", True) or theirs.get("pos_embed_seq_len") is not None:
        raise InputError("qk_norm, cross_attn_norm or pos_embed_seq_len is not that of Wan2.1's t2v and i2v "
                         "models")
    config = {key: theirs[key] for key in ("patch_size", "text_dim", "freq_dim", "ffn_dim", "num_layers",
                                           "eps")}
    in_dim, out_dim, heads = theirs["in_channels"], theirs["out_channels"], theirs["num_attention_heads"]
    return config | dict(model_type="i2v" if in_dim > out_dim else "t2v", in_dim=in_dim, out_dim=out_dim,
                         dim=heads * theirs["attention_head_dim"], num_heads=heads,
                         text_len=theirs.get("_text_len", 512), image_dim=theirs.get("image_dim"))


# What the config.json of an official folder always has. It leaves out the patch size, for example.
WAN_KEYS = ("model_type", "dim", "ffn_dim", "freq_dim", "in_dim", "out_dim", "num_heads", "num_layers",
            "text_len")


def require_numbers(config):
    """Raises InputError if a number of our config of a transformer is not a positive whole number. This is
    checked here because making the model does not use all of them: text_len is first used when a context
    comes."""
    for name in (*WAN_KEYS[1:], "text_dim", "image_dim"):
        value = config.get(name)
        if value is not None and (type(value) is not int or value < 1):
            raise InputError(f"{name} is {value!r}; it must be a positive whole number")


def from_wan_config(theirs, path):
    """Our config from a config.json in Wan's words, which is ours or an official one. An official one has no
    image_dim, so it is read from the weights."""
    if not (theirs.get("qk_norm", True) and theirs.get("cross_attn_norm", True)) \
            or list(theirs.get("window_size", (-1, -1))) != [-1, -1]:
        raise InputError("qk_norm, cross_attn_norm or window_size is not that of Wan2.1's t2v and i2v models")
    config = {key: value for key, value in theirs.items()
              if not key.startswith("_") and key not in ("qk_norm", "cross_attn_norm", "window_size")}
    if config.get("model_type") == "ti2v":
        config["model_type"] = "t2v"
    if "image_dim" not in config:
        weights = WeightFiles(path)
        name = "img_emb.proj.0.weight"
        config["image_dim"] = len(weights.tensor(name)) if name in weights.handle else None
    return config


def resolve_model(config, transformer=None):
    """Fills in config.model (default: the shipped generator for config.task and --world) and config.task ->
    config.model.

    transformer: the generator's folder if that is not config.model. Raises InputError if the generator is of
    another task, or if no generator of --world's size is shipped.
    """
    world, task = getattr(config, "world", "tiny"), config.task or "t2v"
    of_size = "" if world == "tiny" else f" {world}"
    folder = transformer or config.model or SHIPPED.get(task + of_size)
    if not folder:
        raise InputError(f"--world {world}: no {task} generator of that size is shipped: name one with "
                         "--model (python -m world.pretrain dit makes them)")
    if config.model:
        require_known(config.model)
    task = transformer_folder(folder, config.task)[1].get("model_type", "t2v")
    if config.task not in (None, task):
        raise InputError(f"--task is {config.task}, but the generator in {folder} is {task}")
    config.task = task
    config.model = config.model or str(SHIPPED.get(task + of_size) or SHIPPED.get(task) or SHIPPED["t2v"])
    return config.model


def transformer_folder(path, task=None):
    """Describes a transformer's folder (or a folder that holds `transformer/`) -> its path, our config, the
    function from our parameter names to those in the folder, and words that mark names which no model reads.
    Raises InputError.

    If the generator has two experts, these are the low-noise expert's, and the config has `boundary_ratio`
    too. task: what a generator for both tasks has to do; default: what it was trained to do here, else t2v.
    """
    path = Path(path)
    require_known(path)
    pair = expert_folders(path)
    if pair:
        high, low = (read_transformer(folder) for folder in (pair.high, pair.low))
        if high[1] != low[1]:
            raise InputError(f"{pair.high} and {pair.low} are no two experts of one generator: their "
                             "config.json give different shapes")
        return low[0], low[1] | {"boundary_ratio": pair.boundary}, *low[2:]
    if not (path / "config.json").exists() and (path / "transformer").is_dir():
        path = path / "transformer"
    return read_transformer(path, task)


def read_transformer(path, task=None):
    """`transformer_folder` for a folder that itself holds the config.json of one transformer."""
    theirs = read_config(path)
    try:
        require_known_transformer(theirs)
        if theirs.get("_class_name") == "WanTransformer3DModel" or "num_attention_heads" in theirs:
            # diffusers' published i2v folders carry norm_added_q weights, which no model reads
            config, rename, ignored = from_diffusers_config(theirs), diffusers_name, ("norm_added_q",)
        else:
            config, rename, ignored = from_wan_config(theirs, path), str, ()
        require_numbers(config)
        require_known_channels(config)
        missing = [key for key in WAN_KEYS if key not in config]
        if missing:
            raise InputError(f"{', '.join(missing)} is missing, which every generator has")
        if task and does_both(config):
            config["model_type"] = task
        return path, config, rename, ignored
    except (InputError, KeyError, TypeError) as error:
        raise InputError(f"{path}/config.json: {error}") from None
