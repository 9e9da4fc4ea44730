"""`python -m study.reproduce table4`: the seconds and memory of an iteration, which study/cost.py measures,
and how many frames fit into a GPU at Wan's size, which scale/plan.py computes."""
import itertools
import json

import numpy as np

from formats.weights import SHIPPED, read_config
from model import PRESETS as MODELS
from report import plot, table, verdict
from scale import plan
from study.parts import named


def measured(work, name, *flags):
    """What study/cost.py measured with these flags. The measurement runs once, and alone, because other work
    would disturb it."""
    folder = work.folder / "cost" / name
    work.run([(folder, "measured.json", "-m", "study.cost", *flags)], jobs=1)
    return json.loads((folder / "measured.json").read_text())


WAN, STEADY = "wan2.1-t2v-14b", "PRFL, steady recipe"
TRUNK = read_config(SHIPPED["t2v"] / "transformer")["num_layers"]


def wan_peak(preset, frames, method, decoded="first"):
    """The peak of bytes on each of 8 GPUs, by scale/plan.py, if each has one clip of 832x480, fsdp splits the
    weights over the 8, and checkpointing is on."""
    config = plan.Config(preset, method=method, frames=frames, gpus=8, frames_decoded=decoded)
    return plan.costs(config, MODELS[preset])["with"]["peak"]


def most_frames(preset, *how):
    """The most frames (4 k + 1) of which `wan_peak` is at most 80 GB."""
    for frames in itertools.count(1, 4):
        if wan_peak(preset, frames, *how) > 80e9:
            return frames - 4


def table4(work):
    methods = {"SFT": "sft", "PRFL": "prfl", STEADY: "prfl_steady",
               "RGB ReFL, first frame": "refl_first", "RGB ReFL, all frames": "refl_all"}
    rounds = work.preset["rounds"]
    # (flags, the end of a setting's name, the paper's ratio: seconds of RGB ReFL with one frame / of PRFL)
    kinds = [((), "", 1.42), (("--no-sft_updates",), ", no SFT updates", 1.49)]
    # (N, K): first this world's, then the paper's N, then also the paper's share of blocks, a fifth
    settings = [(16, TRUNK), (40, TRUNK), (40, round(TRUNK / 5))]
    first_frame, all_frames = "RGB ReFL, first frame", "RGB ReFL, all frames"
    draws = np.random.default_rng(0).integers(0, rounds, (2000, rounds))    # the same rounds for all methods
    speed, verdicts, ratios, recipes = [], [], [], []
    for (N, K), (flags, ending, paper) in itertools.product(settings, kinds):
        name = named(f"times-{rounds}-recipes-N-{N}-K-{K}", flags)
        times = measured(work, name, "times", "--rounds", rounds, "--num_inference_steps", N, "--depth", K,
                         *flags)
        seconds = {row: np.array(times[method]) for row, method in methods.items()}

        def times_as_long(row, other):
            resampled = seconds[row][draws].mean(1) / seconds[other][draws].mean(1)
            low, high = np.quantile(resampled, (0.025, 0.975))
            return {"mean": seconds[row].mean() / seconds[other].mean(), "interval": [low, high]}

        label = f"N = {N}, K = {K}{ending}"
        recipes.append({"setting": label, f"{STEADY} / PRFL": times_as_long(STEADY, "PRFL"),
                        f"{first_frame} / {STEADY}": times_as_long(first_frame, STEADY)})
        of_setting = []
        for row in (first_frame, all_frames):
            ratio, (low, high) = times_as_long(row, "PRFL").values()
            of_setting.append({"setting": label, "row": row, "ratio": ratio, "interval": [low, high],
                               "paper": paper, "faster": verdict(low, high, 1.0),
                               "by as much": verdict(low, high, paper)})
        ratios += of_setting
        shown = ["{:.2f} [{:.2f}, {:.2f}]".format(one["ratio"], *one["interval"]) for one in of_setting]
        speed.append([label, *(f"{x.mean():.3f}" for x in seconds.values()), *shown, paper])
        verdicts.append([label, *(one["faster"] for one in of_setting), of_setting[0]["by as much"]])
    cells = [(frames, "64*64") for frames in (17, 33, 65, 81)] + [(17, "32*32"), (17, "96*96")]
    rows = {row: ("--method", method) for row, method in methods.items()}
    del rows[STEADY]                                            # this recipe takes as much memory as PRFL
    rows["the same, --decoder_checkpointing"] = (*rows[all_frames], "--decoder_checkpointing")

    def cell(frames, size, *flags):
        flags = ("--frames", frames, "--size", size, "--batch_size", 4, "--rounds", 2, *flags)
        return measured(work, named("cell", flags).replace("*", "x"), "cell", *flags)

    found = {(row, *at): cell(*at, *flags) for row, flags in rows.items() for at in cells}
    lengths = [frames for frames, size in cells if size == "64*64"]

    def by_frames(value):
        return "frames", {row: (lengths, [value(found[row, f, "64*64"]) for f in lengths]) for row in rows}

    planned = {"PRFL": ("prfl",), first_frame: ("refl",), all_frames: ("refl", "all")}
    wan = [[preset, *(most_frames(preset, *how) for how in planned.values())]
           for preset in ("wan2.1-t2v-1.3b", WAN)]
    drawn = range(1, 82, 20)
    peaks = {row: (drawn, [wan_peak(WAN, frames, *how) / 1e9 for frames in drawn])
             for row, how in planned.items()}
    plot(work.results / "table4.png", {
        "measured: MB of an iteration, 4 clips of 64x64": by_frames(lambda cell: cell["bytes"] / 1e6),
        "measured: seconds of an iteration": by_frames(lambda cell: np.mean(cell["seconds"])),
        "arithmetic: GB of a GPU, Wan 14B, 832x480": ("frames", {**peaks, "80 GB": ((1, 81), (80, 80))})})
    first = plan.decoder_costs(1, 60, 104)["kept"] / 1e9
    other = plan.decoder_costs(2, 60, 104)["kept"] / 1e9

    of_recipes = []
    for setting, *costs in map(dict.values, recipes):
        shown = ["{:.2f} [{:.2f}, {:.2f}]".format(cost["mean"], *cost["interval"]) for cost in costs]
        of_recipes.append([setting, *shown])
    megabytes = lambda cell: f"{cell['bytes'] / 1e6:.0f}"
    mean_seconds = lambda cell: f"{np.mean(cell['seconds']):.2f}"
    sizes = [f"{frames} frames, {size.replace('*', 'x')}" for frames, size in cells]
    work.write("table4", "Table 4: what an iteration costs", [
        "Seconds of an iteration on the world's videos, batch 32. The methods run in turn in one process "
        f"(`python -m study.cost times`, {rounds} rounds), at the mean of the steps that each draws from. "
        "Ratio: RGB ReFL's seconds / PRFL's, with its 95 % interval over rounds. The paper has 1.42 for the "
        "first frame at N = 40 and K = 8 of 40 blocks, and 1.49 without SFT updates. PRFL's rollout ends at "
        "any step and RGB ReFL's at a late one, which matters more at N = 40. PRFL's reward costs K / L of a "
        "forward pass of the generator.", "",
        *table(["", *methods, "ratio, first frame", "ratio, all frames", "paper, first frame"], speed),
        *table(["PRFL is faster than RGB ReFL", "first frame", "all frames",
                "first frame, by the paper's factor"], verdicts),
        "Two more ratios of seconds, from the same processes. PRFL, an iteration of the steady recipe / an "
        "iteration of the paper's recipe; asked for beforehand at N = 40: at most .5. And an iteration of "
        "RGB ReFL with the first frame and the paper's recipe / an iteration of PRFL with the steady recipe; "
        "asked for: at least 2.", "",
        *table(["", *list(recipes[0])[1:]], of_recipes),
        "Peak memory beyond what weights and optimizer hold, in MB, with 4 clips. Each cell is measured in a "
        "process of its own (`python -m study.cost cell`); about 70 MB are buffers of the libraries. The "
        "paper, in GB, for 81 frames of 832x480: PRFL 66.81, RGB ReFL with the first frame 55.47, with all "
        "frames out of memory.", "",
        *table(["", *sizes], [[row, *(megabytes(found[row, *at]) for at in cells)] for row in rows]),
        "Seconds of an iteration in the same processes, the mean of two. (The ratios above compare within "
        "one process.)", "",
        *table(["", *sizes], [[row, *(mean_seconds(found[row, *at]) for at in cells)] for row in rows]),
        "The most frames of 832x480 that fit into 80 GB per GPU (8 GPUs, weights split over them, one clip "
        "on each, checkpointing on), by the formulas that `python -m scale.plan wan2.1-t2v-14b --gpus 8 "
        "--method refl --frames_decoded all` prints. Wan's decoder, without tiling or checkpointing, keeps 4 "
        "bytes for a norm, 2 for SiLU and 2 for the padded input, for every channel and pixel of every "
        f"convolution: {first:.1f} GB for the first latent frame and {other - first:.1f} GB for each of the "
        "other (F - 1) / 4. This is arithmetic, not measured.", "",
        *table(["", *planned], wan)],
        {"ratios": ratios, "recipes": recipes, "wan": wan,
         "cells": [{"row": row, **cell} for (row, *_), cell in found.items()]})
