"""Run by test_sequence.py in two and in four ranks: the same updates whole on rank 0, and with each clip over
several ranks. Prints one JSON object a case: the largest relative difference of what was computed."""
import copy
import itertools
import json
from functools import partialmethod

import torch
import torch.distributed as dist
from tiny import generator

import common
import flow
import prfl
from pavrm import PAVRM
from scale import lora, parallel

KINDS = {False: {}, True: dict(model_type="i2v", in_dim=36, image_dim=32), "pinned": dict(model_type="i2v")}
ORDINARY = dict(kind="fsdp", image=False, checkpointing=True, rank=0, pooling="query_attention")
# every layout; then adapters, and a pooling that a zero behind the last token would show in
CASES = [ORDINARY | dict(zip(("kind", "image", "checkpointing"), case))
         for case in itertools.product(("ddp", "fsdp"), (False, True), (False, True))]
CASES += [ORDINARY | dict(rank=2), ORDINARY | dict(rank=2, kind="ddp", image=True)]
CASES += [ORDINARY | dict(pooling=name) for name in ("mean", "max", "multihead")]
CASES += [ORDINARY | dict(image="pinned")]  # 6 of the 18 tokens: ranks have 5 and 1 of them, or none
OTHERS = [ORDINARY | dict(offload_activations=True), ORDINARY | dict(fsdp_group_size=2),
          ORDINARY | dict(fsdp_group_size=2, rank=2)]
COMPILED = [ORDINARY | dict(compile=True)]


def far(a, b):
    """Largest relative difference of corresponding tensors, each by its norm."""
    return max(((x - y).norm() / x.norm().clamp(min=1e-6)).item() for x, y in zip(a, b, strict=True))


def whole(tensors):
    """Every rank calls it: the pieces of fsdp are gathered."""
    return [(x.full_tensor() if hasattr(x, "full_tensor") else x).detach() for x in tensors]


def compare(runtime, kind, image, checkpointing, rank, pooling, **more):
    """Rank 0 alone against all: {what: largest relative difference} on rank 0. 18 tokens, which 4 ranks do
    not divide; 4 heads."""
    one = generator(num_heads=4, **KINDS[image])
    judge = PAVRM.from_generator(one, 1, pooling).freeze()
    torch.nn.init.normal_(judge.mlp[-1].weight, generator=torch.Generator().manual_seed(4))
    lora.add(one, rank, seed=1)
    g = torch.Generator().manual_seed(1)
    for name, p in one.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1, generator=g)
    many = [copy.deepcopy(model) for model in (one, judge)]
    for model in many:
        parallel.shard(model, runtime, parallel.Flags(gradient_checkpointing=checkpointing, parallel=kind,
                                                      **more))
    B = 2 * runtime.world_size // runtime.sequence_parallel
    x, context = torch.randn(B, 16, 3, 6, 4, generator=g), torch.randn(B, 3, 8, generator=g)
    given = dict(y=torch.randn(B, 20, 3, 6, 4, generator=g),
                 clip_tokens=torch.randn(B, 5, 32, generator=g)) if image is True else {}
    if image == "pinned":
        given = dict(first_frame=torch.randn(B, 16, 1, 6, 4, generator=g))
    step = prfl.draw_step(3, 0, 4)
    found, alone = [], [(one, judge, range(B))] * (runtime.rank == 0)
    for policy, pavrm, j in (*alone, (*many, runtime.indices(2))):
        params = [p for p in policy.parameters() if p.requires_grad]
        optimizer, mine = torch.optim.AdamW(params, lr=1e-3), {name: z[j] for name, z in given.items()}
        loss, reward = prfl.reward_update_loss(policy, pavrm, x[j], context[j], step, 4, rollout_passes=2,
                                               **mine)
        sft = prfl.sft_loss(policy, x[j], x[j].flip(2), torch.full((len(j),), 0.3), context[j], **mine)
        (loss + sft).backward()
        sampled = flow.rollout(policy, x[j], context[j], 2, **mine)
        gradients = [p.grad.clone() for p in params]
        if policy is not one:
            common.average_and_clip_gradients(params, None)
            gradients = [p.grad.clone() for p in params]
            means = [loss.detach(), sft.detach()]
            common.all_reduce_mean_(means)
            loss, sft = means
            reward, sampled = (torch.cat(common.gather(z)[::runtime.sequence_parallel])
                               for z in (reward, sampled))
        optimizer.step()
        computed = dict(loss=[loss, sft], reward=[reward], sampled=[sampled], gradients=gradients,
                        weights=params)
        found.append({name: whole(tensors) for name, tensors in computed.items()})
    return {name: far(found[0][name], found[1][name]) for name in found[0]} if len(found) == 2 else {}


if __name__ == "__main__":
    torch.set_num_threads(1)
    # --compile traces and differentiates; the C++ that would come of it takes minutes, so graphs run op by op
    torch.nn.Module.compile = partialmethod(torch.nn.Module.compile, backend="aot_eager")
    for ranks in (2, 4):
        runtime = common.setup("no", 0, ranks)
        # Two ranks share a clip in groups of a larger world; alone they run what compiling makes slow.
        if dist.get_world_size() == 2:
            cases = [CASES[0]] + COMPILED
        else:
            cases = CASES if ranks == 4 else CASES[4:6] + OTHERS
        for case in cases:
            found = compare(runtime, **case)
            if runtime.rank == 0:
                print(json.dumps(case | {"ranks": ranks, "found": found}), flush=True)
        if ranks == dist.get_world_size():
            break
    common.teardown()
