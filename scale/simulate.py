"""A second opinion on the planner's bytes: it runs one whole PRFL iteration at the true size, on tensors
without data.

The training code itself runs: VideoDiT, PAVRM, fully_shard, shared clips and AdamW. The process group of
--gpus ranks is fake, and so are the tensors: under FakeTensorMode they have shapes, dtypes and storage sizes
but no data. PyTorch's own MemTracker counts the storages that are alive. So 14B at 81 frames takes minutes on
one core and hardly any memory. Not counted are the CUDA context, the allocator's unused pieces, what kernels
take inside themselves, and clipping (a few numbers).

If a generator has two experts, both are simulated, and each is called for its own steps. But if one of them
rests on the host, a GPU never holds both. Then only the expert that trains is simulated, and it makes all
steps, because the frozen expert's steps take no more memory.

Under fsdp the mesh must be made before FakeTensorMode starts, and the models are split while they are on
meta. The tracker's module hooks are not used: they expect one forward call of a module, but a rollout makes
many, and they hold gradients that the program frees. Bytes are counted by phases instead.
"""
import math
from contextlib import contextmanager
from unittest.mock import MagicMock, patch

import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.testing._internal.distributed.fake_pg import FakeStore

import model
import prfl
from common import Runtime
from experts import NAMES, Experts, parts, steps_of_expert
from pavrm import PAVRM
from scale import groups, lora, parallel


def gpu_attend(q, k, v, sequence=None):
    """`model.attend` as on a GPU. The CPU's fused kernel, which runs here, keeps as many bytes."""
    if sequence is not None:
        return sequence.tokens(gpu_attend(*sequence.heads(q, k, v)))
    q, k, v = (y.to(v.dtype).transpose(1, 2) for y in (q, k, v))
    return nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class CalledInOrder(Experts):
    """Two experts. `names`, an iterator, says which of them the next call is for, because fake times have no
    values to decide by. All videos of a call are on the same side of the boundary."""

    def forward(self, x, t, context, **conditions):
        rows = torch.arange(len(x))                             # the copies that Experts makes
        v = getattr(self, next(self.names))(x[rows], t[rows], context[rows],
                                            **{key: z[rows] for key, z in conditions.items()})
        return torch.cat([v])[rows]


def names_of_calls(config, times, boundary, step):
    """An iterator over the names of the experts that an iteration calls: for the SFT update, for each pass of
    the rollout, and for the rewarded step."""
    passes = prfl.RECIPES[config.recipe]["rollout_passes"]
    stride = math.ceil(config.num_inference_steps / passes) if passes else 1
    sft = "low" if config.expert == "both" else config.expert
    starts = [*range(0, step - 1, stride), step - 1]
    return iter([sft] + ["high" if times[i] >= boundary else "low" for i in starts])


class Phases(MemTracker):
    """A tracker whose `peaks` are {phase: {kind: bytes}}: what was alive in each phase, at the moment with
    the most bytes. `begin` starts a phase."""

    def __init__(self):
        super().__init__()
        # modules are not followed, because the hooks for that hold the gradients of every block until the
        # backward pass ends
        self._mod_tracker = MagicMock(is_bw=False)
        self.phase, self.peaks, self.counts = "before", {}, True

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return super().__torch_dispatch__(func, types, args,
                                          kwargs) if self.counts else func(*args, **kwargs or {})

    @contextmanager
    def but_for_shapes(self):
        """Tracks a `with` block, but not the search of DTensor for the shapes of its results, which makes
        whole tensors without data that a true run does not have."""
        find = ShardingPropagator._propagate_tensor_meta_non_cached

        def uncounted(*args):
            self.counts = False
            try:
                return find(*args)
            finally:
                self.counts = True

        with patch.object(ShardingPropagator, find.__name__, uncounted), self:
            yield

    def begin(self, phase):
        self.phase = phase
        self._update_peak_stats(None)

    def _update_peak_stats(self, state):
        for now in self._curr_mem_snap.values():                # there is only one device
            if now["Total"] > self.peaks.get(self.phase, {"Total": 0})["Total"]:
                self.peaks[self.phase] = {str(getattr(kind, "value", kind)): size
                                          for kind, size in now.items()}


def simulate(config, c, grid, times=None):
    """Simulates an SFT and a reward update of PRFL -> {phase: {"Parameter", "Optstate", ..., "Total":
    bytes}} of one GPU.

    config: the planner's flags. c: a VideoDiT's config, with `boundary_ratio` if there are two experts. grid:
    the latent (f, h, w). times: the times of a rollout, from flow.schedule; two experts need them. Rewarded
    is the middle one of the steps that the trained experts make. Raises InputError."""
    world, two = config.gpus * config.nodes, "boundary_ratio" in c
    shape = {key: value for key, value in c.items() if key != "boundary_ratio"}
    steps = range(1, config.num_inference_steps + 1)
    if two:
        steps = steps_of_expert(config.expert, times, c["boundary_ratio"])
    step = (steps[0] + steps[-1]) // 2                          # the rewarded step
    one_rests = config.expert != "both" and (config.parallel == "ddp" or world == 1)
    runtime = Runtime(0, world, torch.device("cpu"), torch.bfloat16, config.sequence_parallel)
    flags = parallel.Flags(config.gradient_checkpointing, config.keep_attention,
                           config.parallel if world > 1 else "ddp", config.sequence_parallel,
                           config.fsdp_group_size, config.offload_activations)
    if world > 1:
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    attend, model.attend = model.attend, gpu_attend
    model.rope_table.cache_clear()          # a fake mode cannot use a table with data, nor the reverse
    try:
        with torch.device("meta"):
            policy = model.VideoDiT(**shape)
            if two and not one_rests:
                policy = CalledInOrder(policy, model.VideoDiT(**shape), c["boundary_ratio"])
            pavrm = PAVRM(shape | {"num_layers": config.depth}).freeze()
        if isinstance(policy, Experts):
            policy.names = names_of_calls(config, times, c["boundary_ratio"], step)
            for name in NAMES:
                getattr(policy, name).requires_grad_(config.expert in (name, "both"))
        for one in parts(policy):
            if next(one.parameters()).requires_grad:
                lora.add(one, config.lora_rank)
        for one in (*parts(policy), pavrm):
            parallel.cast_matrices(getattr(one, "trunk", one), runtime.dtype)   # lay_out would on a GPU only
            parallel.lay_out(one, runtime, flags)
        with FakeTensorMode(allow_non_fake_inputs=True):         # the models, which are on meta
            return iterate(config, c, grid, policy, pavrm, runtime, step)
    finally:
        model.attend = attend
        model.rope_table.cache_clear()
        groups.forget()
        if world > 1:
            dist.destroy_process_group()


def iterate(config, c, grid, policy, pavrm, runtime, step):
    """Runs one iteration, as train_align.py makes it, under a tracker -> the peaks of its phases."""
    for one in (policy, pavrm):
        one._apply(lambda x: torch.empty_like(x, device="cpu"))
    trained = [p for p in policy.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, foreach=True)        # as on a GPU
    for p in trained:
        optimizer.state[p] = {"step": torch.tensor(0.0), "exp_avg": torch.zeros_like(p),
                              "exp_avg_sq": torch.zeros_like(p)}
    x1 = torch.randn(config.batch_size, c["out_dim"], *grid)
    context, t = torch.randn(config.batch_size, c["text_len"], c["text_dim"]), torch.rand(config.batch_size)
    image = {}
    if c["model_type"] == "i2v":
        image["y"] = torch.randn(config.batch_size, c["in_dim"] - c["out_dim"], *grid)
    if c.get("image_dim"):
        image["clip_tokens"] = torch.randn(config.batch_size, 257, c["image_dim"])
    tracker, recipe = Phases(), prfl.RECIPES[config.recipe]
    tracker.track_external(policy, pavrm, optimizer, x1, context, t, *image.values())

    def update(name, make_loss):
        optimizer.zero_grad()
        tracker.begin(f"{name}, forward")
        with runtime.autocast():
            loss = make_loss()
        tracker.begin("reward's backward" if name == "reward" else f"{name}, backward")
        loss.backward()
        tracker.begin("optimizer step")
        optimizer.step()

    def behind_reward(module, args, velocity):
        if velocity.requires_grad and tracker.phase.startswith("reward"):
            velocity.register_hook(lambda gradient: tracker.begin("generator's backward"))

    hook = policy.register_forward_hook(behind_reward)
    with tracker.but_for_shapes():
        update("SFT", lambda: prfl.sft_loss(policy, x1, torch.randn_like(x1), t, context, **image))
        update("reward", lambda: prfl.reward_update_loss(policy, pavrm, x1, context, step,
                                                         config.num_inference_steps,
                                                         rollout_passes=recipe["rollout_passes"],
                                                         loss=recipe["reward_loss"],
                                                         **image)[0])
    hook.remove()
    return tracker.peaks
