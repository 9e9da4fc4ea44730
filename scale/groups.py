"""Process groups: made once for all models, and each as patient as the main group.

A group that is made without a timeout has its backend's own, ten minutes under NCCL. While rank 0 writes an
export of 57 GB the others wait in a collective, so every group here waits for common.TIMEOUT.
"""
from functools import lru_cache

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

import common


@lru_cache(maxsize=4)
def neighbours(world, size):
    """-> [the group of `size` neighbouring ranks that this rank is one of, the group of the ranks that have
    its place among theirs]. world: dist.group.WORLD. Every rank must call it; `size` divides their number."""
    rows = torch.arange(world.size()).view(-1, size)
    return [dist.new_subgroups_by_enumeration(ranks.tolist(), timeout=common.TIMEOUT)[0]
            for ranks in (rows, rows.T)]


@lru_cache(maxsize=4)
def mesh(world, device, size=0):
    """The mesh that fully_shard splits weights over, on devices of type `device`: all ranks, which talk to
    each other in the main group, or groups of `size` neighbours, each with all weights."""
    if not size:
        return DeviceMesh.from_group(world, device)
    near, across = neighbours(world, size)
    return DeviceMesh.from_group([across, near], device, mesh=torch.arange(world.size()).view(-1, size),
                                 mesh_dim_names=("replicate", "shard"))


def forget():
    """For a process whose main group ends and which may start another."""
    neighbours.cache_clear()
    mesh.cache_clear()
