"""Run by test_pieces.py under torchrun: each rank loads its pieces of the generator in argv[1], and of a
reward model that starts from it, and writes the generator to argv[2]. It prints, as JSON, the most host
memory that took, in bytes beyond what the process had before, and how far its rows are from those of the
files."""
import json
import resource
import sys

import torch

import common
from formats.weights import WeightFiles
from model import export_transformer, load_transformer
from pavrm import PAVRM
from scale import parallel

if __name__ == "__main__":
    torch.set_num_threads(1)
    runtime = common.setup("no")
    anonymous = lambda: next(int(line.split()[1]) * 1024 for line in open("/proc/self/status")
                             if line.startswith("RssAnon"))
    before, most = anonymous(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    dit = load_transformer(sys.argv[1], load_now=False)
    nothing_yet = all(p.is_meta for p in dit.parameters())
    rename = dit.weight_files.rename
    parallel.shard(dit, runtime, parallel.Flags(parallel="fsdp"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - most
    dit.stored_dtypes = {"head.modulation": torch.bfloat16}     # as if one weight had been stored so
    export_transformer(dit, sys.argv[2])
    written = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - most
    files, held, far = WeightFiles(sys.argv[1], rename), 0, 0.0
    for name, p in dit.named_parameters():
        mine = p.to_local()
        first = parallel.first_row(p)
        held += 4 * mine.numel()
        if len(mine):
            far = max(far, (mine - files.tensor(name)[first:first + len(mine)]).abs().max().item())
    del dit, p, mine
    judge = PAVRM.from_generator(load_transformer(sys.argv[1], load_now=False), 4)
    parallel.shard(judge, runtime, parallel.Flags(parallel="fsdp"))
    for name, p in judge.trunk.named_parameters():
        mine, first = p.to_local(), parallel.first_row(p)
        if len(mine):
            far = max(far, (mine - files.tensor(name)[first:first + len(mine)]).abs().max().item())
    # 1 / sqrt(3): as nn.Linear
    started = judge.mlp[0].weight.full_tensor().std().item() * judge.mlp[0].in_features ** 0.5
    row = {"rank": runtime.rank, "meta": nothing_yet, "peak": peak, "held": held, "far": far,
           "written": written, "started": started}
    sys.stdout.write(json.dumps(row) + "\n")                    # in one piece: print writes two
    sys.stdout.flush()
    common.teardown()
