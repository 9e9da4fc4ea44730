"""groups.py: which ranks talk to each other, how long they wait, and that models share their groups."""
import json

import pytest
from launch import torchrun

SCRIPT = """
import json, sys, torch, torch.distributed as dist
import common
from scale import groups, parallel
from tiny import generator

runtime = common.setup("no", 0, 2)
flags = parallel.Flags(parallel="fsdp", sequence_parallel=2, fsdp_group_size=2)
counts = []
for _ in range(3):
    model = parallel.shard(generator(), runtime, flags)
    counts.append(len(dist.distributed_c10d._world.pg_map))
near, across = groups.neighbours(dist.group.WORLD, 2)
every, mesh = (groups.mesh(dist.group.WORLD, "cpu", size) for size in (0, 2))
used = [dist.group.WORLD, near, across, model.sequence(8).group, every.get_group(), mesh.get_group("shard"),
        mesh.get_group("replicate")]
seconds = [one._get_backend(torch.device("cpu")).options._timeout.total_seconds() for one in used]
row = {"rank": runtime.rank, "ranks": [dist.get_process_group_ranks(one) for one in used],
       "seconds": seconds, "counts": counts}
sys.stdout.write(json.dumps(row) + chr(10))     # in one piece: print writes two
sys.stdout.flush()
common.teardown()
"""


@pytest.fixture(scope="module")
def rows():
    """What each of four ranks says of its groups."""
    done = torchrun(4, "-c", SCRIPT)
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == 4, done.stderr[-3000:]
    return sorted(found, key=lambda row: row["rank"])


def test_every_group_waits_as_long_as_the_main_one(rows):
    assert all(row["seconds"] == [3600] * 7 for row in rows)


def test_who_talks_to_whom(rows):
    near, across = [[0, 1], [0, 1], [2, 3], [2, 3]], [[0, 2], [1, 3], [0, 2], [1, 3]]
    every = [0, 1, 2, 3]
    for row, mine, other in zip(rows, near, across):
        assert row["ranks"] == [every, mine, other, mine, every, mine, other]


def test_models_share_their_groups(rows):
    """The main group and two for the neighbours, however many models there are."""
    assert all(len(set(row["counts"])) == 1 for row in rows)
