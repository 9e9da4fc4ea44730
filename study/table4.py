"""`python -m study.reproduce table4`: seconds and memory of an iteration, measured by study/cost.py, and what fits at Wan's size
by the arithmetic of scale/plan.py."""
import itertools
import json

import numpy as np

from formats.weights import SHIPPED, read_config
from model import PRESETS as MODELS
from report import plot, table, verdict
from scale import plan
from study.parts import named


def measured(work, name, *flags):
    """What study/cost.py measured with these flags; kept. One process at a time, as it measures itself."""
    folder = work.folder / "cost" / name
    work.run([(folder, "measured.json", "-m", "study.cost", *flags)], jobs=1)
    return json.loads((folder / "measured.json").read_text())


WAN, STEADY = "wan2.1-t2v-14b", "PRFL, steady recipe"
TRUNK = read_config(SHIPPED["t2v"] / "transformer")["num_layers"]


def wan_peak(preset, frames, method, decoded="first"):
    """Bytes of a GPU by plan.py: 832x480, weights cut over 8 GPUs, one clip on each, checkpointing on."""
    config = plan.Config(preset, method=method, frames=frames, gpus=8, frames_decoded=decoded)
    return plan.costs(config, MODELS[preset])["with"]["peak"]


def longest(preset, *how):
    """The most frames (4 k + 1) that fit 80 GB so."""
    return next(frames - 4 for frames in itertools.count(1, 4) if wan_peak(preset, frames, *how) > 80e9)


def table4(work):
    methods = {"SFT": "sft", "PRFL": "prfl", STEADY: "prfl_steady",
               "RGB ReFL, first frame": "refl_first", "RGB ReFL, all frames": "refl_all"}
    rounds, paper = work.preset["rounds"], {False: 1.42, True: 1.49}                    # by "without SFT updates"
    settings = [(16, TRUNK), (40, TRUNK), (40, round(TRUNK / 5))]     # the world's N and K; the paper's N; its share of blocks
    speed, ratios, recipes = [], [], []
    for N, K in settings:
        for without in ((), ("--no-sft_updates",)):
            times = measured(work, named(f"times-{rounds}-recipes-N-{N}-K-{K}", without), "times", "--rounds", rounds,
                             "--num_inference_steps", N, "--depth", K, *without)
            seconds = {row: np.array(times[method]) for row, method in methods.items()}
            draws = np.random.default_rng(0).integers(0, rounds, (2000, rounds))                # of rounds, for all methods
            label, shown = f"N = {N}, K = {K}" + (", no SFT updates" if without else ""), []

            def times_as_long(row, other):
                low, high = np.quantile(seconds[row][draws].mean(1) / seconds[other][draws].mean(1), (0.025, 0.975))
                return {"mean": seconds[row].mean() / seconds[other].mean(), "interval": [low, high]}

            recipes.append({"setting": label, **{f"{row} / {other}": times_as_long(row, other) for row, other in (
                (STEADY, "PRFL"), (list(methods)[3], STEADY))}})
            for row in list(methods)[3:]:
                ratio, (low, high) = times_as_long(row, "PRFL").values()
                ratios.append({"setting": label, "row": row, "ratio": ratio, "interval": [low, high], "paper": paper[bool(without)],
                               "faster": verdict(low, high, 1.0), "by as much": verdict(low, high, paper[bool(without)])})
                shown.append(f"{ratio:.2f} [{low:.2f}, {high:.2f}]")
            speed.append([label, *(f"{x.mean():.3f}" for x in seconds.values()), *shown, paper[bool(without)]])
    verdicts = [[row[0], *(r["faster"] for r in ratios if r["setting"] == row[0]),
                 next(r["by as much"] for r in ratios if r["setting"] == row[0])] for row in speed]
    cells = [(frames, "64*64") for frames in (17, 33, 65, 81)] + [(17, "32*32"), (17, "96*96")]
    rows = {row: ("--method", method) for row, method in methods.items() if row != STEADY}      # its memory is PRFL's
    chunked = "the same, --decoder_checkpointing"
    rows[chunked] = (*rows["RGB ReFL, all frames"], "--decoder_checkpointing")

    def cell(frames, size, *flags):
        flags = ("--frames", frames, "--size", size, "--batch_size", 4, "--rounds", 2, *flags)
        return measured(work, named("cell", flags).replace("*", "x"), "cell", *flags)

    found = {(row, *at): cell(*at, *flags) for row, flags in rows.items() for at in cells}
    chains = {(k, how): cell(17, "64*64", "--grad_steps", k, *how)
              for how in ((), ("--gradient_checkpointing",)) for k in (1, 2, 4, 16)}
    lengths = [frames for frames, size in cells if size == "64*64"]
    by_frames = lambda value: ("frames", {row: (lengths, [value(found[row, f, "64*64"]) for f in lengths]) for row in rows})
    planned = {"PRFL": ("prfl",), "RGB ReFL, first frame": ("refl",), "RGB ReFL, all frames": ("refl", "all")}
    wan = [[preset, *(longest(preset, *how) for how in planned.values())] for preset in ("wan2.1-t2v-1.3b", WAN)]
    plot(work.results / "table4.png", {
        "measured: MB of an iteration, 4 clips of 64x64": by_frames(lambda cell: cell["bytes"] / 1e6),
        "measured: seconds of an iteration": by_frames(lambda cell: np.mean(cell["seconds"])),
        "arithmetic: GB of a GPU, Wan 14B, 832x480": ("frames", {
            **{row: (range(1, 82, 20), [wan_peak(WAN, frames, *how) / 1e9 for frames in range(1, 82, 20)])
               for row, how in planned.items()}, "80 GB": ((1, 81), (80, 80))})})
    first, other = (plan.decoder_costs(f, 60, 104)["kept"] / 1e9 for f in (1, 2))
    work.write("table4", "Table 4: what an iteration costs", [
        "Seconds of an iteration on the world's videos, batch 32, the methods in turn in one process (`python -m study.cost "
        f"times`, {rounds} rounds), and how many times as long as PRFL's RGB ReFL's is, with its 95 % interval over rounds; at "
        "the mean of the steps that a method draws from. The paper, N = 40 and K = 8 of 40 blocks, first frame: 1.42 times, "
        "without SFT updates 1.49. PRFL rolls out to any step, RGB ReFL to a late one, which counts for more at N = 40; PRFL's "
        "reward costs K / L of a generator.", "",
        *table(["", *methods, "ratio, first frame", "ratio, all frames", "paper, first frame"], speed),
        *table(["PRFL is faster than RGB ReFL", "first frame", "all frames", "first frame, by the paper's factor"], verdicts),
        "The same processes: how many times as long the steady recipe's iteration takes as the paper's, and RGB ReFL's first "
        "frame by the paper's recipe as PRFL's by the steady one (asked for beforehand at N = 40: at most .5, and at least 2):", "",
        *table(["", *list(recipes[0])[1:]], [[setting, *("{:.2f} [{:.2f}, {:.2f}]".format(cell["mean"], *cell["interval"])
                                                        for cell in cells)] for setting, *cells in map(dict.values, recipes)]),
        "Peak memory over what weights and optimizer hold, MB, 4 clips, each cell a process of its own "
        "(`python -m study.cost cell`; about 70 MB are the libraries' own buffers). The paper, GB for 81 frames of 832x480: PRFL "
        "66.81, RGB ReFL with the first frame 55.47, with all frames out of memory:", "",
        *table(["", *(f"{f} frames, {size.replace('*', 'x')}" for f, size in cells)],
               [[row, *(f"{found[row, *at]['bytes'] / 1e6:.0f}" for at in cells)] for row in rows]),
        "Seconds of an iteration in the same processes (mean of two; the ratios above compare within one process):", "",
        *table(["", *(f"{f} frames, {size.replace('*', 'x')}" for f, size in cells)],
               [[row, *(f"{np.mean(found[row, *at]['seconds']):.2f}" for at in cells)] for row in rows]),
        "PRFL with gradients through the last k steps before the reward, of 8 or 9, 4 clips of 17 frames of 64x64 (16: all of "
        "them). MB as above, and seconds of an iteration:", "",
        *table(["k", "MB", "seconds", "MB, block checkpointing", "seconds"],
               [[k, *(cell for how in ((), ("--gradient_checkpointing",)) for cell in (
                   f"{chains[k, how]['bytes'] / 1e6:.0f}", f"{np.mean(chains[k, how]['seconds']):.2f}"))] for k in (1, 2, 4, 16)]),
        "The most frames of 832x480 that fit 80 GB a GPU (8 GPUs, weights cut over them, one clip on each, checkpointing on), by "
        "the formulas that `python -m scale.plan wan2.1-t2v-14b --gpus 8 --method refl --frames_decoded all` prints. Wan's "
        "decoder, without tiling or checkpointing, keeps 4 bytes for a norm, 2 for SiLU and 2 for the padded input for every "
        f"channel and pixel of every convolution: {first:.1f} GB for the first latent frame, {other - first:.1f} GB for each of "
        "the other (F - 1) / 4. Arithmetic, not measured:", "",
        *table(["", *planned], wan)],
        {"ratios": ratios, "recipes": recipes, "wan": wan, "cells": [{"row": row, **cell} for (row, *_), cell in found.items()],
         "grad_steps": list(chains.values())})
