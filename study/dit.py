"""Times the forward and backward pass of our VideoDiT and of diffusers' WanTransformer3DModel, with the same
weights and inputs.

    python -m study.dit                                  # every shape and precision, about 3 minutes
    python -m study.dit --shapes tiny --rounds 40 --output dit.json
    python -m study.dit --threads 1 --clock cpu          # on a machine that is shared with other work

The two models run in turn, A B A B. Each round has a ratio, ours / theirs, and the table shows the median of
these ratios, because other load on the machine disturbs a ratio less than a time. Before anything is timed,
the outputs of both models and the gradients of their inputs are compared. They must be equal, in bf16 as far
as its 8 bits go. The loss is the mean square of the output.
"""
import argparse
import itertools
import json
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

import model

TINY = model.PRESETS["tiny-t2v"]
SHAPES = {  # name: (config, batch, latent f h w)
    "tiny": (TINY, 64, (3, 4, 4)),                                                            # 12 tokens
    "small": (model.PRESETS["small-t2v"], 8, (5, 8, 8)),                                      # 80 tokens
    "wide": (TINY | dict(dim=512, ffn_dim=2048, num_heads=8, num_layers=4), 2, (4, 20, 20)),  # 400 tokens
}


def build(config, device):
    """-> (our model with every weight drawn at random, diffusers' model with the same weights)"""
    from diffusers import WanTransformer3DModel
    torch.manual_seed(0)
    ours = model.VideoDiT(**config)
    for parameter in ours.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    with tempfile.TemporaryDirectory() as folder:
        model.export_transformer(ours, f"{folder}/dit", layout="diffusers")
        theirs = WanTransformer3DModel.from_pretrained(f"{folder}/dit")
    return ours.to(device), theirs.to(device).train()


def seconds(step, device, clock):
    start = clock()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return clock() - start


def compare(name, rounds, device, dtype, clock):
    """Times one shape in one precision -> a row of the table: the median times in milliseconds, and the
    median of the rounds' ratios ours / theirs."""
    config, b, size = SHAPES[name]
    ours, theirs = build(config, device)
    x = torch.randn(b, config["in_dim"], *size, device=device)
    t = torch.rand(b, device=device)
    context = torch.randn(b, config["text_len"], config["text_dim"], device=device)
    calls = {"ours": lambda x: ours(x, t, context),
             "diffusers": lambda x: theirs(x, 1000 * t, context, return_dict=False)[0].float()}
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)

    def train_step(call, model_):
        model_.zero_grad(set_to_none=True)
        with autocast:
            loss = call(x).square().mean()
        loss.backward()

    results = {}
    for who, call in calls.items():
        leaf = x.clone().requires_grad_()
        with autocast:
            velocity = call(leaf)
        results[who] = velocity.detach(), torch.autograd.grad(velocity.square().mean(), leaf)[0]
    error = max(((a - b).norm() / b.norm()).item() for a, b in zip(results["ours"], results["diffusers"]))
    assert error < (1e-4 if dtype == torch.float32 else 5e-2), f"{name}: outputs differ by {error:.1e}"

    times = {"ours": [], "diffusers": []}
    for i in range(rounds + 2):  # the first two rounds warm up
        for who, model_ in (("ours", ours), ("diffusers", theirs)):
            spent = seconds(lambda: train_step(calls[who], model_), device, clock)
            if i >= 2:
                times[who].append(1000 * spent)
    ratios = [a / b for a, b in zip(*times.values())]
    tokens = size[0] * size[1] * size[2] // 4
    return dict(shape=name, precision=str(dtype).removeprefix("torch."), dim=config["dim"],
                layers=config["num_layers"], batch=b, tokens=tokens, rounds=rounds,
                ours_ms=statistics.median(times["ours"]), diffusers_ms=statistics.median(times["diffusers"]),
                ratio=statistics.median(ratios), ratio_low=min(ratios), ratio_high=max(ratios), error=error)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES), metavar="NAME",
                        help=f"which shapes to time, of {', '.join(SHAPES)} (default: all)")
    parser.add_argument("--rounds", type=int, default=15, help="timed rounds per row (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    parser.add_argument("--mixed_precision", nargs="+", choices=("no", "bf16"),
                        default=["no", "bf16"], metavar="P", help="no: float32; bf16: autocast over float32 "
                        "weights (default: both)")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall",
                        help="cpu: count the time that this process computes, for a machine shared with "
                             "other work; use it with --threads 1, because waiting threads count too "
                             "(default: %(default)s)")
    parser.add_argument("--output", help="write the rows and the machine as JSON to this file")
    args = parser.parse_args()
    if args.rounds < 1:
        parser.error("--rounds must be at least 1")
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU")
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    clock = time.process_time if args.clock == "cpu" else time.perf_counter
    dtypes = [dict(no=torch.float32, bf16=torch.bfloat16)[p] for p in args.mixed_precision]
    print("forward + backward, ms                     ours  diffusers  ratio  (low-high)   relative error")
    rows = []
    for name, dtype in itertools.product(args.shapes, dtypes):
        row = compare(name, args.rounds, device, dtype, clock)
        rows.append(row)
        print(f"{name:6} {row['precision']:8} dim {row['dim']:3} batch {row['batch']:3} n {row['tokens']:3}"
              f"{row['ours_ms']:10.1f} {row['diffusers_ms']:10.1f} {row['ratio']:6.2f}"
              f"  ({row['ratio_low']:.2f}-{row['ratio_high']:.2f})       {row['error']:.1e}", flush=True)
    if args.output:
        Path(args.output).write_text(json.dumps(dict(
            command=" ".join(["python", *sys.argv]), torch=torch.__version__, machine=platform.processor(),
            threads=torch.get_num_threads(), clock=args.clock, device=args.device, rows=rows,
        ), indent=2) + "\n")


if __name__ == "__main__":
    main()
