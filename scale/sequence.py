"""One clip over several GPUs: `--sequence_parallel n`, for clips with too many tokens for one GPU.

The ranks of a group hold the same noise, prompt and weights, and each works on its own n-th of the video
tokens: patch embedding, linear layers, norms, cross-attention to the whole prompt, head. Only self-attention
needs all tokens. It needs them head by head, so an all-to-all trades tokens for heads before it, and another
one trades back after it ("Ulysses"). The velocity, and the features that a reward model pools, are whole
again on every rank of the group:

    x --mine--> tokens [b, n / ranks, d] --blocks--> [b, n / ranks, d] --head--> --gather_tokens--> velocity
    q, k, v [b, n / ranks, k, e] --heads--> [b, n, k / ranks, e] --attention, tokens--> [b, n / ranks, d]

If the number of ranks does not divide n, zeros follow the last token; they are cut off before attention,
pooling and loss. Gradients need no rule of their own. Every rank of a group computes the clip's loss, and
these collectives are their own adjoints. So a backward pass gives each rank its part of the gradient of a sum
of `ranks` equal losses. ddp and fsdp average over all ranks anyway, and this average is the gradient of one
loss.

Axes: b batch, n video tokens, m = ceil(n / ranks), d model width, k heads, e channels of one head, p ranks of
      a group.
"""
import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from torch.distributed._functional_collectives import all_to_all_single_autograd

import common
from common import InputError
from experts import parts
from scale import groups

try:
    from torch.distributed._functional_collectives import all_gather_single_autograd
except ImportError:                                             # its name before torch 2.13
    from torch.distributed._functional_collectives import (
        all_gather_tensor_autograd as all_gather_single_autograd,
    )


class Sequence:
    """n tokens that the ranks of a process group share. `model.VideoDiT` calls its methods where a rank holds
    only its own tokens."""

    def __init__(self, group, n):
        self.group, self.n, self.ranks = group, n, dist.get_world_size(group)
        self.rank, self.m = dist.get_rank(group), -(-n // self.ranks)

    def mine(self, x, dim=1):
        """x with all n tokens along `dim` -> this rank's m tokens."""
        first = min(self.rank * self.m, self.n)
        x = x.narrow(dim, first, min(self.m, self.n - first))
        missing = self.m - x.shape[dim]
        return F.pad(x, (0, 0) * (x.dim() - 1 - dim) + (0, missing)) if missing else x

    def share_of(self, count):
        """How many of the first `count` tokens belong to this rank."""
        return min(max(count - self.rank * self.m, 0), self.m)

    def gather_tokens(self, x):
        """x [b, m, ...], this rank's tokens -> [b, n, ...], the tokens of all ranks."""
        every = all_gather_single_autograd(x.transpose(0, 1).contiguous(), 0, self.group)  # [p m, b, ...]
        return every[:self.n].transpose(0, 1)

    def heads(self, q, k, v):
        """q, k, v [b, m, k, e], this rank's tokens and all heads -> [b, n, k / p, e], all tokens and this
        rank's heads."""
        x = torch.stack([y.to(v.dtype) for y in (q, k, v)])  # a GPU attends in v's dtype
        x = rearrange(x, "q b m (p k) e -> p q b m k e", p=self.ranks).contiguous()
        x = all_to_all_single_autograd(x, None, None, self.group)               # p: the rank of the tokens
        return rearrange(x, "p q b m k e -> q b (p m) k e")[:, :, :self.n].unbind()

    def tokens(self, x):
        """x [b, n, d / p], all tokens and this rank's heads -> [b, m, d], its tokens and the heads of all."""
        x = F.pad(x, (0, 0, 0, self.m * self.ranks - self.n))
        x = rearrange(x, "b (p m) d -> p b m d", p=self.ranks).contiguous()
        x = all_to_all_single_autograd(x, None, None, self.group)               # p: the rank of the heads
        return rearrange(x, "p b m d -> b m (p d)")


def check(ranks):
    """Raises InputError if `ranks` processes cannot share a clip. Scripts call it before they start to work.
    """
    if ranks > 1 and not dist.is_initialized():
        raise InputError(f"--sequence_parallel {ranks} spreads a clip over processes: start with torchrun "
                         "--nproc_per_node=<GPUs>")
    if dist.is_initialized() and dist.get_world_size() % ranks:
        world = dist.get_world_size()
        raise InputError(f"--sequence_parallel {ranks} does not divide the {world} processes: choose one of "
                         f"{common.divisors(world)}")


def spread(dit, runtime):
    """Makes a generator share the tokens of each forward call among runtime.sequence_parallel ranks; every
    rank must call it.

    Raises InputError if runtime.sequence_parallel does not divide the number of the generator's heads.
    """
    ranks, heads = runtime.sequence_parallel, dit.config["num_heads"]
    check(ranks)
    if heads % ranks:
        raise InputError(f"--sequence_parallel {ranks} does not divide the generator's {heads} heads: choose "
                         f"one of {common.divisors(heads, runtime.world_size)}")
    if ranks > 1:
        group = groups.neighbours(dist.group.WORLD, ranks)[0]
        for part in parts(dit):
            part.sequence = lambda n: Sequence(group, n)
