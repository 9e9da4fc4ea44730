"""One model on many processes: with `--parallel ddp` a copy on each, with `--parallel fsdp` a piece on each.

ddp:  every rank holds all weights; common.average_and_clip_gradients averages the gradients.
fsdp: every rank holds 1 / ranks of each weight, gradient and optimizer state, in float32 (fully_shard of
      PyTorch, "FSDP2"). A block is gathered in the dtype of autocast when it runs, and freed after that. Its
      gradients are averaged in float32, and each rank keeps its piece. The training loops are the same as
      with ddp, but weights, gradients and optimizer state are DTensors, and every backward pass averages. So
      accumulated batches add up in the pieces, and optimizer.zero_grad() keeps SFT and reward gradients
      apart, as with ddp.

Two things differ under fsdp. With bf16, a block's norms and modulation are bf16 too while the block runs
(with ddp, autocast reads them in float32). And each forward call gathers weights, so all ranks must make the
same forward calls.

A checkpoint of either kind resumes under either kind, on any number of ranks. Its weights are in its
transformer/ or reward/, and each rank reads its own rows from there. With ddp AdamW's moments are whole
tensors in train_state.pt; with fsdp they are the ranks' pieces in sharded_state/. (PyTorch unpickles
sharded_state/.metadata: resume from what you wrote yourself.)
"""
import json
import shutil
import warnings
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

import common
from common import InputError, arg
from experts import Experts, parts
from formats import encoders, runs
from formats.weights import EXPERTS, WeightFiles, read_config
from scale import groups, offload, sequence

KINDS = ("ddp", "fsdp")
ATTENTION = tuple(getattr(torch.ops.aten, f"_scaled_dot_product_{kind}").default for kind in (
    "flash_attention", "efficient_attention", "cudnn_attention", "flash_attention_for_cpu"))
PIECES = "sharded_state"  # what torch.distributed.checkpoint writes into a checkpoint folder of fsdp


@dataclass
class Flags:
    """Flags of both training scripts for several GPUs or little memory."""
    gradient_checkpointing: bool = arg(False, "save memory: recompute each block in the backward pass")
    keep_attention: bool = arg(False, "with --gradient_checkpointing: keep the result of self-attention, so "
                               "that the backward pass need not compute it again; this takes less time and "
                               "more memory")
    parallel: str = arg("ddp", "under torchrun: ddp (not PyTorch's DistributedDataParallel) keeps a full "
                        "copy of the trained model and, in alignment, of the reward model and the judge on "
                        "every GPU; fsdp splits them over the GPUs. Training takes 16 bytes per weight, for "
                        "the weight, its gradient and Adam's two moments", choices=KINDS)
    sequence_parallel: int = arg(1, "number of neighbouring GPUs that share the tokens of each clip, for "
                                 "clips that are too long for one GPU; the paper uses 4", above=0)
    fsdp_group_size: int = arg(0, "with --parallel fsdp: split over groups of this many neighbouring GPUs, "
                               "for example those of one node; each group then holds a full copy. 0 splits "
                               "over all GPUs", at_least=0)
    offload_activations: bool = arg(False, "with --gradient_checkpointing: keep the inputs of the blocks in "
                                    "the host's memory until the backward pass needs them")
    compile: bool = arg(False, "compile each block with torch.compile; this takes time at the start (20 to "
                        "45 s on a CPU) and makes the steps faster (measured on a CPU only)")


def check(flags):
    """Raises InputError if there are no processes to share the work, or if the flags contradict each other.
    Scripts call it before they start to work."""
    sequence.check(flags.sequence_parallel)
    if flags.parallel == "fsdp" and not dist.is_initialized():
        raise InputError("--parallel fsdp shards over processes: start with torchrun --nproc_per_node=<GPUs>")
    if flags.fsdp_group_size and flags.parallel != "fsdp":
        raise InputError("--fsdp_group_size means nothing with --parallel ddp: leave it out")
    if flags.fsdp_group_size and dist.get_world_size() % flags.fsdp_group_size:
        raise InputError(f"--fsdp_group_size {flags.fsdp_group_size} does not divide the "
                         f"{dist.get_world_size()} "
                         f"processes: choose one of {common.divisors(dist.get_world_size())}")
    if flags.offload_activations and not flags.gradient_checkpointing:
        raise InputError("--offload_activations moves the block inputs that --gradient_checkpointing keeps: "
                         "give both")
    if flags.keep_attention and not flags.gradient_checkpointing:
        raise InputError("--keep_attention keeps what --gradient_checkpointing would compute again: give "
                         "both")
    if flags.keep_attention and flags.compile:
        raise InputError("--keep_attention does not see into the blocks that --compile compiles: give one of "
                         "the two")


def shard(model, runtime, flags):
    """Puts a VideoDiT, two Experts or a PAVRM, in place, on this rank's device: all of it (ddp) or this
    rank's piece (fsdp) -> model, which runs as `flags` say. A model on the meta device, from
    load_transformer(load_now=False), gets its weights here.

    Call it before the optimizer is made. For fsdp give the model on meta or on the CPU, so that only one
    block at a time is whole on the device; every rank must hold the same weights. Raises InputError as
    `check` does.
    """
    for part in parts(model):
        lay_out(part, runtime, flags)
    if isinstance(model, Experts) and flags.parallel == "ddp":
        model.resting = len(model.trained()) == 1               # the frozen expert waits on the host
    for part in parts(model):
        waits = getattr(model, "resting", False) and not any(p.requires_grad for p in part.parameters())
        fill(part, "cpu" if waits else runtime.device)
    return model


def lay_out(model, runtime, flags):
    """Does all that `shard` does, except the last step: weights on the meta device get no values."""
    check(flags)
    dit = getattr(model, "trunk", model)
    sequence.spread(dit, runtime)
    if runtime.device.type != "cpu":
        cast_matrices(dit, runtime.dtype)
    dit.gradient_checkpointing = flags.gradient_checkpointing
    if flags.keep_attention:
        dit.checkpoint_options = KEEP_ATTENTION
    if flags.offload_activations:
        offload.offload(dit)
    if flags.compile:
        for block in dit.blocks:
            block.compile()
    if flags.parallel == "fsdp":
        apply_fsdp(model, dit, runtime, flags.fsdp_group_size)


def kept(context, operation, *args, **kwargs):
    """Whether checkpointing keeps the result of an operation. Only the result of self-attention, which has as
    many keys as queries, is kept; all others are computed again."""
    if operation in ATTENTION and args[0].shape == args[1].shape:
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


KEEP_ATTENTION = {"context_fn": partial(create_selective_checkpoint_contexts, kept)}


def apply_fsdp(model, dit, runtime, fsdp_group_size):
    """Fully shards a model over all ranks, or over the ranks of each group of fsdp_group_size neighbours, so
    that each group has the whole model."""
    # PAVRM's logits are a view; no caller writes into them
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
    mesh = groups.mesh(dist.group.WORLD, runtime.device.type, fsdp_group_size)
    # inputs are not cast: the residual stream stays float32, and the model casts where it multiplies
    half = MixedPrecisionPolicy(runtime.dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in dit.blocks:
        fully_shard(block, mesh=mesh, mp_policy=half)
    # The rest, embeddings and head, is float32, as with autocast. It is freed after each forward pass:
    # otherwise a model that only sampled would stay gathered, and its parameters() would not be those that
    # the optimizer has.
    fully_shard(model, mesh=mesh, reshard_after_forward=True,
                mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False))


def whole(model, dtype):
    """Reads the weights of a frozen generator or PAVRM to the CPU, to sample with -> model. load_transformer
    or load_pavrm made the model with load_now=False. The weights are cast (cast_matrices) while they are
    read, so that a process never holds a float32 copy of a generator that it uses in bfloat16. Of two experts
    the one that is not called rests (Experts.resting)."""
    for part in parts(model):
        cast_matrices(getattr(part, "trunk", part), dtype)
        fill(part, torch.device("cpu"))
    if isinstance(model, Experts):
        model.resting = True
    return model


def to_sample(model, runtime, kind):
    """Reads the weights of a frozen generator, to sample with. load_transformer made it with load_now=False
    -> a function that returns a context, in which the generator can be called. With ddp the generator is on
    this rank's device in that context only, and else on the CPU. With fsdp this rank's piece stays on the
    device."""
    if kind == "fsdp":
        return partial(nullcontext, shard(model, runtime, Flags(parallel="fsdp")))
    sequence.spread(model, runtime)
    return partial(encoders.on, whole(model, runtime.dtype), runtime.device)


@torch.no_grad()
def fill(model, device):
    """Moves the model to `device`. Weights and buffers on the meta device are allocated there and read from
    the model's files, one at a time: the whole tensor, or only this rank's rows of a weight."""
    tensors = [model.named_parameters, model.named_buffers]
    waiting = {name for named in tensors for name, x in named() if x.is_meta}
    model._apply(lambda x: torch.empty_like(x, device=device) if x.is_meta else x.to(device))
    for name, p in model.named_parameters():
        if name in waiting:
            read_rows(p, model.weight_files, name)
    for name, buffer in model.named_buffers():                  # FSDP does not split them
        if name in waiting:
            buffer.copy_(model.weight_files.tensor(name))
    if waiting and all(p.dtype == torch.float32 for p in model.parameters()):
        model.weight_files = None       # closes the files; an export reads weights that were cast once more


def read_rows(p, files, name):
    """Fills a weight, or this rank's rows of it, from files."""
    mine, first = (p.to_local(), first_row(p)) if isinstance(p, DTensor) else (p, 0)
    if len(mine):
        mine.copy_(files.rows(name, first, first + len(mine)))


def first_row(p):
    return compute_local_shape_and_global_offset(p.shape, p.device_mesh, p.placements)[1][0]


def work_of_rank(work, runtime, kind):
    """This rank's share of `work`, a list: [(item, whether this rank keeps what comes of it)].

    Ranks that share a clip have the same items, and the first of these ranks keeps the results. Under fsdp
    the lists of all ranks are equally long (common.equal_turns). If an item is several batches, they have to
    be equally many on all ranks too: give the size of the largest item to flow.sample as max_rows.
    """
    group, place = divmod(runtime.rank, runtime.sequence_parallel)
    groups = runtime.world_size // runtime.sequence_parallel
    mine = work[group::groups]
    count = -(-len(work) // groups) if kind == "fsdp" else len(mine)
    spare = work[0] if work else None
    return [(item, counts and place == 0) for item, counts in common.equal_turns(mine, count, spare)]


def cast_matrices(dit, dtype):
    """Stores the frozen matrices of a VideoDiT's blocks in the dtype of autocast, in place -> dit. The rest
    is float32. Autocast would cast the same matrices at each call, so the results are the same, and the
    matrices take half the memory.

    Training on a CPU does not do this. A block that casts its input only once adds up the gradients of q, k
    and v in that dtype, which would change the last bits of what a CPU has trained."""
    matrices = set()
    for layer in dit.blocks.modules():
        weight = getattr(layer, "weight", None)
        if weight is not None and weight.dim() == 2 and not weight.requires_grad:   # of a linear layer
            matrices |= {weight, layer.bias}
    for p in dit.parameters():  # one at a time, so that a half-precision model is never all in float32
        p.data = p.data.to(dtype if p in matrices else torch.float32)
    return dit


def trained(model):
    """{name: weight} of the weights that train. A resumed run reads frozen weights from --model again."""
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def moments(model, optimizer):
    """{name/exp_avg: ...}: the tensors of AdamW's state, not copies; under fsdp they are this rank's pieces.
    """
    name_of = {p: name for name, p in model.named_parameters()}
    return {f"{name_of[p]}/{key}": x for p, values in optimizer.state.items() for key, x in values.items()}


def save_checkpoint(output_dir, step, folders, model, optimizer, config, keep=2, with_weights=False):
    """Saves a model in training with runs.save_checkpoint. Every rank must call it; under fsdp each rank
    writes its pieces. The trained weights are written once, in float32 and in a form that anybody can read,
    to the folder that one of `folders` makes. with_weights: the state holds them too, because that folder
    holds other weights, such as their average. Adapters, which are merged there, are always in the state."""
    state, folders, weights = {}, dict(folders), {}
    if with_weights or any(".lora_" in name for name in trained(model)):
        weights = trained(model)
    if not any(isinstance(p, DTensor) for p in model.parameters()):
        state = {"model": weights, "optimizer": optimizer.state_dict()}
    else:
        pieces = Path(output_dir) / f"{PIECES}.tmp"
        if common.rank() == 0:
            shutil.rmtree(pieces, ignore_errors=True)
        common.gather(None)                                     # wait until a killed run's pieces are gone
        try:
            # formats/disk.py flushes the pieces, because it tolerates disks that cannot
            dcp.save(weights | moments(model, optimizer),
                     storage_writer=dcp.FileSystemWriter(pieces, sync_files=False))
        except dcp.api.CheckpointException as e:                # has an error for each rank that failed
            common.gather(None)                                 # wait until no rank writes any more
            shutil.rmtree(pieces, ignore_errors=True)
            raise runs.unwritten(output_dir, step, next(iter(e.failures.values()))[0]) from None
        folders[PIECES] = lambda path: common.rank() or pieces.replace(path)
    runs.save_checkpoint(output_dir, step, folders, state, config, keep)
    common.gather(None)  # no rank goes on before the checkpoint is there


def is_of(model, config):
    """Whether config, the content of a config.json, is that of a model or of its experts. Notes, such as
    `_class_name`, do not count."""
    mine = parts(model)[0].config
    return {key: x for key, x in config.items() if key[0] != "_"} == json.loads(json.dumps(mine))


def stored_weights(path, model):
    """{name of a weight: (the WeightFiles in checkpoint folder `path` that hold it, its name there)}. Raises
    InputError if they are damaged."""
    if isinstance(model, Experts):
        folders = [(f"{name}.", Path(path) / EXPERTS[name][0]) for name in model.trained()]
    else:
        folders = [("", config.parent) for config in Path(path).glob("*/config.json")]
    found = {}
    for prefix, folder in folders:
        if folder.is_dir():
            files = WeightFiles(folder)
            found |= {prefix + name: (files, name) for name in files.handle}
    return found


@torch.no_grad()
def load_state(path, state, model, optimizer):
    """Fills a model and its fresh AdamW from checkpoint folder `path`; state: runs.load_state(path).

    Every rank must call it. Raises InputError if the folder is damaged, or holds other names or shapes.
    """
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for p in params:
        optimizer.state[p] |= {"step": torch.tensor(0.0), "exp_avg": torch.zeros_like(p),
                               "exp_avg_sq": torch.zeros_like(p)}
    weights, pieces = trained(model), Path(path) / PIECES
    mine, saved, sizes = weights | moments(model, optimizer), {}, {}
    if "model" in state:                                        # whole tensors; those of AdamW have numbers
        name_of = {p: name for name, p in model.named_parameters()}
        names = {i: name_of[p] for i, p in enumerate(params)}
        saved = state["model"] | {f"{names.get(i)}/{key}": x for i, values in
                                  state["optimizer"]["state"].items() for key, x in values.items()}
        sizes = {name: x.shape for name, x in saved.items()}
    elif pieces.is_dir():
        try:
            sizes = {name: x.size for name, x in
                     dcp.FileSystemReader(pieces).read_metadata().state_dict_metadata.items()}
        except Exception as e:                                  # whatever unpickling a damaged file raises
            raise InputError(f"{pieces} is truncated or damaged ({type(e).__name__})") from None
    folders, stored = [config.parent for config in Path(path).glob("*/config.json")], {}
    if all("/" in name for name in sizes):                      # only moments: weights are in other folders
        stored = stored_weights(path, model)
        sizes |= {name: stored[name][0].shape(stored[name][1]) for name in weights if name in stored}
    # a weight that never had a gradient has no moments in the checkpoint; they stay zero
    mine = {name: x for name, x in mine.items() if name in sizes or "/" not in name}
    # config.json is compared too, because a model of another task may differ in frozen weights only
    others = [folder for folder in folders if not is_of(model, read_config(folder))]
    if others or sizes != {name: x.shape for name, x in mine.items()}:
        raise InputError(f"--resume_from_checkpoint {path}: not a checkpoint of this script with the same "
                         "--task, --model, --expert, --depth, --pooling, --lora_rank")
    if not any("/" in name for name in sizes):  # else training would go on, silently, with fresh moments
        raise InputError(f"--resume_from_checkpoint {path}: holds no optimizer state, so it is damaged")
    for name, (files, there) in stored.items():
        if name in weights:
            read_rows(mine.pop(name), files, there)
    if saved:
        for name, x in mine.items():
            y = saved[name]
            x.copy_(distribute_tensor(y, x.device_mesh, x.placements) if isinstance(x, DTensor) else y)
        return
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process needs none
    try:
        dcp.load(mine, checkpoint_id=pieces)                    # in place; ranks read what they hold
    except (Exception, dcp.api.CheckpointException) as e:       # which is a BaseException only
        raise InputError(f"{pieces} is truncated or damaged ({type(e).__name__})") from None
