"""Process groups. Each is made once for all models, and waits as long as the main group.

A group that is made without a timeout has its backend's own timeout, ten minutes under NCCL. While rank 0
writes an export of 57 GB the other ranks wait in a collective, so every group here has common.TIMEOUT.
"""
from functools import lru_cache

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

import common


@lru_cache(maxsize=4)
def neighbours(world, size):
    """Cuts the ranks into groups of `size` neighbours -> [this rank's group, the group of the ranks with the
    same place in each group of neighbours]. world: dist.group.WORLD. Every rank must call this function;
    `size` divides the number of ranks."""
    rows = torch.arange(world.size()).view(-1, size)
    return [dist.new_subgroups_by_enumeration(ranks.tolist(), timeout=common.TIMEOUT)[0]
            for ranks in (rows, rows.T)]


@lru_cache(maxsize=4)
def mesh(world, device, size=0):
    """The mesh over which fully_shard splits weights, on devices of type `device`: all ranks, in the main
    group, or with a `size` groups of this many neighbours, each of which holds all weights."""
    if not size:
        return DeviceMesh.from_group(world, device)
    near, across = neighbours(world, size)
    return DeviceMesh.from_group([across, near], device, mesh=torch.arange(world.size()).view(-1, size),
                                 mesh_dim_names=("replicate", "shard"))


def forget():
    """Forgets the groups, for a process whose main group ends and which may start another."""
    neighbours.cache_clear()
    mesh.cache_clear()
