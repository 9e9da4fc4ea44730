"""The paper's comparisons on the embedded world, one command each. Finished parts are kept; run again to go on.

    python -m study.reproduce table1                    PRFL against the base, SFT, RWR and RGB ReFL
    python -m study.reproduce table3 --preset quick     one seed, fewer videos
    python -m study.reproduce all --preset quick        everything

table1     base, RWR, SFT (at equal updates, at equal time), RGB ReFL (first frame, all frames), PRFL
table2     image-to-video: base, SFT, PRFL
table3     which part of the trajectory PRFL rewards
table4     seconds and memory of an iteration, beside RGB ReFL's, for growing clips
table5     how PAVRM pools its tokens, beside the pixel rewards
table7     binary cross-entropy or Bradley-Terry
table8     how many blocks K the trunk has
table9     a reward model on videos of generators it was not trained on
fig3       a reward model of pixels on one-step-denoised states; frozen probes by depth; probes against fine-tuning
fig5       wins, ties and losses of PRFL, the annotator in the place of people
labels     how many samples PAVRM learns from
loss       PRFL's loss form, lambda, steps with gradients, with and without SFT updates
steady     the steady recipe beside the paper's, 512 test videos and its learning rates
mid        both recipes, and best of n, at a second size of the world: 48x48, 27 tokens
why        why it holds: each part with and without each other; noise, exact last passes, no rollout; passes, N, no SFT
           updates, image-to-video; what else was tried on the paper's
speed      CPU seconds of alignment to a quality: PRFL, RGB ReFL, both by both recipes, and SFT
stopping   a second reward model as judge: does its choice of checkpoint lose what an annotator would have kept
hacking    proxy reward, quality, speed, brightness, saturation while aligning, with and without SFT updates
annotator  the judge itself, after mp4 and VAE: clean clips that pass, flaws that fail
search     best of n by the latent reward while sampling: quality against forward passes, candidates dropped on the way
fooled     the headline rows by a strict and a loose annotator, and in wordings that the world never uses

Every part is a plain call of this repository's own scripts, printed as it starts; what it said is in log.txt in its
folder. Writes <results_dir>/<name>.md and .json, and a .png where a curve says more (if matplotlib is there). Intervals are
95 %, from resampling seeds and videos together; a claim of the paper holds if the interval of the paired difference is
above zero, does not hold if it is below, and cannot be told otherwise. (table9's videos differ: unpaired there.)
table5, table7, table8, labels and fig3 compare reward models: theirs train half as long as table1's (--preset quick: a
third).
"""
import json
import signal
import sys
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

import common
import refl_baseline
from common import InputError, arg
from families import load_vae
from flow import add_noise
from formats.video import from_pixels, read_video, to_pixels, write_video
from formats.weights import SHIPPED
from model import load_transformer
from pavrm import load_pavrm
from report import (
    auc_values,
    balanced_values,
    claim_verdicts,
    claims_table,
    confidence_interval,
    plot,
    show,
    summary,
    table,
    verdict,
)
from study import parts
from study.endurance import endurance
from study.mid import mid
from study.parts import (
    I2V,
    METRICS,
    align_folder,
    base_of,
    evaluations,
    named,
    reward_folder,
    train_aligned,
    train_rewards,
)
from study.search import fooled, search
from study.steady import speed, steady, why
from study.stopping import stopping
from study.table4 import table4
from validation import logits_by_t, metrics_by_t
from world import clips, scene
from world.annotator import annotate

BASE = SHIPPED["t2v"]
RATES = {method: (3e-5, 1e-4, 3e-4) for method in ("prfl", "rwr", "refl")} | {"sft": (3e-5, 1e-4, 3e-4, 1e-3)}  # table1's sweep
PIXELS = {f"pixels, {name}": ("--space", "rgb", "--frames_decoded", frames)
          for name, frames in (("first frame", "first"), ("all frames", "all"))}     # rows: train_reward flags
TRUNK = json.loads((BASE / "transformer" / "config.json").read_text())["num_layers"]
INTERVALS = "[0, .2]", "(.2, .4]", "(.4, .6]", "(.6, .8]", "(.8, 1]"                            # of t


# ---- studies of alignment
def alignment_study(work, name, title, variants, claims, paper, notes=()):
    """variants: {row: (method, train_align flags)}, all of one task; claims: [(better, worse)] rows, by the qualified rate,
    or "<row>'s <metric>"; paper: {row: published value}."""
    task = base_of(next(iter(variants.values()))[1])
    base = SHIPPED["i2v" if task else "t2v"]
    train_aligned(work, [(seed, method, flags) for seed in work.seeds for method, flags in variants.values()])
    rows = {seed: {"base": base} | {row: align_folder(work, seed, *run) for row, run in variants.items()} for seed in work.seeds}
    found = evaluations(work, named("test", task), rows, task)
    metrics = [metric for metric in METRICS if metric in found[0]["base"]]
    rows = {row: {metric: summary([f[row][metric] for f in found]) for metric in metrics} for row in found[0]}
    claims = claim_verdicts(claims, {row: [f[row]["qualified"] for f in found] for row in rows} | {
        f"{row}'s {METRICS[metric]}": [f[row][metric] for f in found] for row in rows for metric in metrics})
    lines = [f"{work.preset['videos']} held-out videos, same prompts and noise in every row ({work.said_seeds()}). The paper's "
             "column is its average metric (another scale: compare orderings).", ""]
    lines += table(["", "paper", *(METRICS[m] for m in metrics), "qualified, by seed"],
                   [[row, paper.get(row, ""), f"**{show(**cells['qualified'])}**",
                     *(f"{cells[m]['mean']:.3f}" for m in metrics[1:]),
                     " ".join(f"{v:.3f}" for v in cells["qualified"]["seeds"])] for row, cells in rows.items()])
    work.write(name, title, [*lines, *claims_table(claims), *notes], {"rows": rows, "claims": claims, "paper": paper})


def iteration_in_sft_updates(work, method, flags=(), seed=0):
    """How many SFT updates take as long as one iteration of a finished prfl or refl run, by the seconds of both kinds of
    update in it, which whatever else the machine did slowed alike."""
    rows = map(json.loads, (align_folder(work, seed, method, flags) / "metrics.jsonl").read_text().splitlines())
    sft, reward = np.array([(row["sft_seconds"], row["reward_seconds"]) for row in rows if "reward" in row]).T
    return 1 + reward.sum() / sft.sum()


def steps_of_equal_time(work):
    """{"sft" updates, "first" and "all" iterations of RGB ReFL} that take as long as PRFL's iterations (reward models' own
    training not counted)."""
    refl = {frames: ("refl", ("--frames_decoded", frames)) for frames in ("first", "all")}
    train_aligned(work, [(0, "prfl", ()), *((0, *run) for run in refl.values())])
    updates = work.preset["iterations"] * iteration_in_sft_updates(work, "prfl")
    return {"sft": round(updates)} | {frames: round(updates / iteration_in_sft_updates(work, *run)) for frames, run in refl.items()}


HALF = "SFT, half as many updates"                         # as many SFT updates as PRFL and RGB ReFL make, at its own rate


def table1_variants(work):
    """{row: (method, train_align flags)}"""
    steps = steps_of_equal_time(work)
    refl = {f"RGB ReFL, {name}{time}": ("refl", ("--frames_decoded", frames, *more))
            for name, frames in (("first frame", "first"), ("all frames", "all"))
            for time, more in (("", ()), (", equal time", ("--max_train_steps", steps[frames])))}
    return {"RWR": ("rwr", ()), "SFT": ("sft", ()), "SFT, equal time": ("sft", ("--max_train_steps", steps["sft"])),
            HALF: ("sft", ("--max_train_steps", work.preset["iterations"])), **refl, "PRFL": ("prfl", ())}


def reports_table(work, variants):
    """What the reward models of variants {row: train_reward flags} said of their held-out samples, mean over seeds."""
    train_rewards(work, variants.values())
    reports = {row: [json.loads((reward_folder(work, seed, flags) / "report.json").read_text()) for seed in work.seeds]
               for row, flags in variants.items()}
    return table(["", *INTERVALS, "t = 0"],
                 [[f"{row}, {metric.replace('_', ' ')}", *(f"{v:.3f}" for v in np.mean(
                     [[*report[metric], report["clean"][metric]] for report in found], 0))]
                  for row, found in reports.items() for metric in ("accuracy", "balanced_accuracy", "auc")])


def table1(work):
    variants = table1_variants(work)
    steps, iterations = steps_of_equal_time(work), work.preset["iterations"]
    notes = [f"PRFL and RGB ReFL: {iterations} iterations, {2 * iterations} updates. SFT and RWR: {2 * iterations} updates. "
             f"Equal time: {steps['sft']} updates of SFT, {steps['first']} and {steps['all']} iterations of RGB ReFL with the "
             "first frame and with all, by the seconds of every kind of update in the methods' own runs on seed 0. What the "
             "reward models and their samples took is not counted.", ""]
    paper = {"base": 81.03, "RWR": 84.17, "SFT": 84.79, "RGB ReFL, first frame": 83.97, "PRFL": 89.58}
    if work.preset["sweep"]:
        runs = {(row, rate): (method, (*flags, "--learning_rate", rate)) for row, (method, flags) in variants.items()
                for rate in RATES[method]}
        train_aligned(work, [(seed, *run) for seed in work.seeds for run in runs.values()])
        judged = evaluations(work, "sweep", {seed: {key: align_folder(work, seed, *run) for key, run in runs.items()}
                                             for seed in work.seeds}, ("--split", "validation", "--seed", 50))
        sweep = {row: {rate: float(np.mean([found[row, rate]["qualified"] for found in judged])) for rate in RATES[method]}
                 for row, (method, _) in variants.items()}
        tried = sorted({rate for rates in sweep.values() for rate in rates})
        best = {row: max(rates, key=rates.get) for row, rates in sweep.items()}
        variants = {row: runs[row, best[row]] for row in variants}
        notes += ["Learning rates tried: qualified rate on validation sentences, which training and the table above never "
                 "see, mean over the seeds. The best of each row is the one above. Other tables take "
                  + ", ".join(f"{rate:g} ({method})" for method, rate in parts.TUNED.items()) + ".", "",
                  *table(["", *(f"{rate:g}" for rate in tried)],
                         [[row, *(f"**{rates[rate]:.3f}**" if rate == best[row] else f"{rates[rate]:.3f}" if rate in rates else ""
                                  for rate in tried)] for row, rates in sweep.items()])]
    train_aligned(work, [(seed, *run) for seed in work.seeds for run in variants.values()])
    few = {row: variants[row] for row in ("SFT, equal time", "RGB ReFL, all frames", "PRFL")}
    finer = evaluations(work, "40-steps", {seed: {"base": BASE} | {row: align_folder(work, seed, *run) for row, run in few.items()}
                                           for seed in work.seeds}, ("--num_inference_steps", 40))
    notes += ["The same checkpoints and noise sampled in 40 Euler steps, the paper's N, in place of 16:", "",
              *table(["", "qualified"], [[row, show(**summary([f[row]["qualified"] for f in finer]))] for row in finer[0]])]
    notes += ["Reward models on 400 held-out own samples, mean over seeds; t = 0 is the finished video, and at t > 0 pixels are "
              "decoded from the x_0 predicted in one step.", "", *reports_table(work, {"PAVRM": ()} | PIXELS)]
    alignment_study(work, "table1", "Table 1: PRFL and what it is compared with", variants,
                    [*(("PRFL", other, *(() if other in paper else ("not in it",))) for other in ("base", *list(variants)[:-1])),
                     ("SFT", "RWR"), ("RWR", "RGB ReFL, first frame"), ("RGB ReFL, first frame", "base"),
                     *((f"RGB ReFL, {frames}", HALF, "not in it") for frames in ("first frame", "all frames"))], paper, notes)


def table2(work):
    alignment_study(work, "table2", "Table 2: image-to-video", {"SFT": ("sft", I2V), "PRFL": ("prfl", I2V)},
                    [("PRFL", "base"), ("PRFL", "SFT", "not in it"), ("PRFL's dynamic", "base's dynamic"),
                     ("PRFL's I2V subject", "base's I2V subject", "not in it")],
                    {"base": 85.31, "PRFL": 93.38}, [
        "The given first frames are of clean renders. I2V subject: the subject's likeness to the given frame, all frames. The "
        "paper, at 480P: dynamic degree 57 for the base, 87 for PRFL. Learning rates are those that table 1 chose.", "",
        "The reward model on 400 held-out own samples, mean over seeds; t = 0 is the finished video.", "",
        *reports_table(work, {"PAVRM": I2V})])


def table3(work):
    alignment_study(work, "table3", "Table 3: the rewarded part of the trajectory",
                    {part: ("prfl", ("--trajectory_part", part)) for part in ("early", "middle", "late")}
                    | {"full": ("prfl", ())},
                    [("full", "early"), ("full", "middle"), ("full", "late"), ("middle", "late"), ("middle", "early"),
                     ("late", "early")],
                    {"early": 82.25, "middle": 87.02, "late": 85.01, "full": 89.58})


def loss(work):
    variants = {"PRFL: linear, lambda 1, 1 step": ("prfl", ()),
                "-log sigmoid": ("prfl", ("--reward_loss", "logsigmoid")),
                "sigmoid hinge (released code)": ("prfl", ("--reward_loss", "sigmoid_hinge")),
                "sigmoid hinge, lambda 30": ("prfl", ("--reward_loss", "sigmoid_hinge", "--reward_weight", 30.0)),
                "lambda 0.1": ("prfl", ("--reward_weight", 0.1)), "lambda 5": ("prfl", ("--reward_weight", 5.0)),
                "2 steps with gradients": ("prfl", ("--grad_steps", 2)),
                "4 steps with gradients": ("prfl", ("--grad_steps", 4)),
                "without SFT updates": ("prfl", ("--no-sft_updates",))}
    first, *others = variants
    argued = "sigmoid hinge (released code)", "without SFT updates"
    train_aligned(work, [(seed, *run) for seed in work.seeds for run in variants.values()])
    cost = {row: np.mean([iteration_in_sft_updates(work, *run, seed=seed) for seed in work.seeds])
            for row, run in variants.items() if row != others[-1]}
    alignment_study(work, "loss", "PRFL's own choices: loss form, lambda, steps with gradients, SFT updates", variants,
                    [(first, other, *(() if other in argued else ("not in it",))) for other in others], {},
                    ["The paper has no table of these; what it argues for is marked. An iteration takes as long as so many SFT "
                     "updates: " + ", ".join(f"{row} {value:.2f}" for row, value in cost.items())
                     + ". Memory of more steps with gradients: table 4.", ""])


def fig5(work):
    variants = {row: run for row, run in table1_variants(work).items() if "equal time" not in row and row != HALF}
    train_aligned(work, [(seed, *run) for seed in work.seeds for run in variants.values()])
    found = evaluations(work, "test", {seed: {row: align_folder(work, seed, *run) for row, run in variants.items()}
                                       for seed in work.seeds})
    paper = {"SFT": (59.33, 18.53, 22.13), "RWR": (63.20, 16.27, 20.53), "RGB ReFL, first frame": (67.47, 13.73, 18.80)}
    rows, values = [], {}
    for row in list(variants)[:-1]:
        gap = np.array([f["PRFL"]["grade"] - f[row]["grade"] for f in found])
        share = [summary(gap > 0), summary(gap == 0), summary(gap < 0)]
        low, high = confidence_interval(np.sign(gap))
        values[row] = {"win": share[0], "tie": share[1], "lose": share[2], "verdict": verdict(low, high),
                       "paper": paper.get(row)}
        rows.append([row, " / ".join(f"{v:.1f}" for v in paper.get(row, ())), *(show(**cell) for cell in share),
                     values[row]["verdict"]])
    work.write("fig5", "Figure 5: PRFL against each, video by video", [
        "Same prompt, same noise; the better grade wins: the sum of both axes' (0, 1, 2), and 2 if it is true to the prompt. The "
        "annotator judges, not people. Equal updates.", "",
        *table(["PRFL against", "paper, % win / tie / lose", "win", "tie", "lose", "more wins than losses"], rows)], values)


def hacking(work):
    """The panel over alignment by the paper's recipe, with and without SFT updates, twice as long as table1's: checkpoints
    are validated as they train, which needs the world's own clips and not shards."""
    variants = {"PRFL": (), "without SFT updates": ("--no-sft_updates",)}
    length, every = 2 * work.preset["iterations"], 20
    train_rewards(work, [()])
    folder = lambda seed, flags: work.folder / f"seed-{seed}" / named("hacking", flags)
    work.run([(folder(seed, flags), "transformer/config.json", "train_align.py", "--recipe", "paper", "--seed", seed,  # no --data
               "--reward", reward_folder(work, seed) / "reward", "--learning_rate", parts.TUNED["prfl"],
               "--max_train_steps", length, "--validation_steps", every, "--num_validation", work.preset["videos"] // 2, *flags)
              for seed in work.seeds for flags in variants.values()])

    panel = ("qualified", "speed", "brightness", "saturation")
    curves, ends = {}, {}
    for label, flags in variants.items():
        runs = [[json.loads(line) for line in (folder(seed, flags) / "metrics.jsonl").read_text().splitlines()]
                for seed in work.seeds]
        validated = [[row for row in rows if "validation_qualified" in row] for rows in runs]
        at = [row["step"] for row in validated[0]]
        curves[label] = {key: (at, np.mean([[row[f"validation_{key}"] for row in rows] for rows in validated], 0).tolist())
                         for key in panel}
        reward = [np.mean([r["reward"] for rows in runs for r in rows if "reward" in r and s - every < r["step"] <= s])
                  for s in at[1:]]
        curves[label]["proxy reward"] = (at[1:], reward)
        ends[label] = [rows[-1]["validation_qualified"] for rows in validated]
    keys = ("proxy reward", *panel)
    plot(work.results / "hacking.png",
         {key: ("iteration", {label: found[key] for label, found in curves.items()}) for key in keys})
    shown = lambda at, values, step: f"{values[at.index(step)]:.3f}" if step in at else ""
    rows = [[f"{label}, iteration {step}", *(shown(*found[key], step) for key in keys)]
            for label, found in curves.items() for step in found["qualified"][0]]
    work.write("hacking", "What the reward does to the videos, while aligning", [
        f"Proxy reward: mean logit of the {every} reward updates before. The others: {work.preset['videos'] // 2} validation "
        f"videos. Means of {len(work.seeds)} seeds; qualified at the end, by seed: " + "; ".join(
            f"{label} {' '.join(f'{v:.3f}' for v in values)}" for label, values in ends.items()) + ".", "",
        *table(["", *keys], rows)], {"curves": curves, "ends": ends})


# ---- studies of the reward model
@torch.no_grad()
def test_set(work, folder=None, generator=BASE):
    """Samples that no reward model of any seed saw, of the base or another generator, kept in folder: latents, contexts,
    labels, without the in-between."""
    runtime = common.setup("no")
    shards = clips.own_samples(folder or work.folder / "test_samples", load_transformer(generator).to(runtime.device).eval(),
                              str(BASE), work.preset["tested"], 16, "tiny", 9_999, runtime)
    kept = shards.batch((shards.labels >= 0).nonzero()[:, 0])
    return kept["latents"], kept["context"], kept["label"]


def reward_fn_of(work, seed, flags):
    """What a reward run trained, as reward_fn(x_t, t, context, y=) -> logits; pixels judge the x_0 predicted from x_t."""
    folder = reward_folder(work, seed, flags) / "reward"
    if "--space" not in flags:
        return load_pavrm(folder)
    base = load_transformer(BASE).eval().requires_grad_(False)
    reward = refl_baseline.load_pixel_reward(folder, parts.frames_of(flags), base.config["text_dim"])
    return partial(refl_baseline.predicted_reward, reward, refl_baseline.load_decoder(str(BASE), base.config["out_dim"]), base)


def accuracy_row(logits, labels):
    """logits [seeds, 5, m], labels [seeds, m] -> (right [seeds, 5, m], {accuracy as a summary; it, balanced accuracy,
    AUC and the share judged good by interval of t})."""
    right = ((logits >= 0) == (labels == 1)[:, None]).double().numpy()
    found = [metrics_by_t(*seed) for seed in zip(logits, labels)]
    return right, {"average": summary(right.mean(1)), **{key: np.mean([f[name] for f in found], 0).tolist() for key, name in (
        ("intervals", "accuracy"), ("balanced", "balanced_accuracy"), ("auc", "auc"))},
        "judged_good": (logits >= 0).double().mean((0, 2)).tolist()}


def accuracy_table(rows, paper):
    return table(["", "paper", "average", *INTERVALS, "balanced, average", "AUC, average"],
                 [[row, paper.get(row, ""), f"**{show(**cells['average'])}**", *(f"{v:.3f}" for v in cells["intervals"]),
                   *(f"{np.mean(cells[key]):.3f}" for key in ("balanced", "auc"))] for row, cells in rows.items()])


def logits_at(reward_fn, latents, context, t):
    """Logits [m] of m videos noised to one t; latents [m, c, f, h, w], context [m, l, d_text]."""
    t, x1 = torch.full((len(latents),), t), common.noise(latents.shape[1:], 0, "one t", 0, range(len(latents)))
    return torch.cat([reward_fn(*some) for some in zip(*(x.split(256) for x in (add_noise(latents, x1, t), t, context)))])


@torch.no_grad()
def reward_study(work, name, title, variants, claims, paper, notes=(), by="accuracy", at=None):
    """variants: {row: train_reward flags}; like alignment_study. Accuracy on one test set, t in each fifth of (0, 1]. Trained
    less than the reward models of alignment: there are many, and they are compared with each other only. by: what
    claims are judged by, accuracy or AUC. at: a t of a column of its own. claims: rows, "<row> in <interval of t>",
    "<row> at <at>", or "swing of <row>"."""
    steps = work.preset["study_steps"]
    variants = {row: (*flags, "--max_train_steps", steps) for row, flags in variants.items()}
    train_rewards(work, variants.values())
    latents, context, labels = test_set(work)
    judged, rows = {}, {}
    for row, flags in common.progress(variants.items(), "reward models judge"):
        reward_fns = [reward_fn_of(work, seed, flags) for seed in work.seeds]
        logits = torch.stack([logits_by_t(reward_fn, latents, context) for reward_fn in reward_fns])
        every = labels.expand(len(logits), -1)
        right, rows[row] = accuracy_row(logits, every)                                              # [seeds, 5, m]
        values = auc_values(logits, every) if by == "AUC" else right
        judged |= {row: values.mean(1)} | {f"{row} in {part}": values[:, i] for i, part in enumerate(INTERVALS)}
        judged[f"swing of {row}"] = (right[:, 1:] != right[:, :1]).mean(1)          # of verdicts, from that in [0, .2]
        if at is not None:
            found = torch.stack([logits_at(reward_fn, latents, context, at) for reward_fn in reward_fns])       # [seeds, m]
            judged[f"{row} at {at}"] = ((found >= 0) == (every == 1)).double().numpy()
            rows[row]["at"] = summary(judged[f"{row} at {at}"])
    claims = claim_verdicts(claims, judged)
    lines = [f"Accuracy on {len(labels)} own samples that no reward model was trained on ({(labels == 1).double().mean():.0%} "
             f"good), one random t in each fifth of (0, 1] ({work.said_seeds()}). Each trained for {steps} steps.", ""]
    lines += accuracy_table(rows, paper)
    if at is not None:
        lines += [f"Accuracy at t = {at}, and in how many of the other four intervals a video's verdict is not that in "
                  f"{INTERVALS[0]}:", "", *table(["", f"t = {at}", "swing"], [
                      [row, show(**cells["at"]), show(**summary(judged[f"swing of {row}"]))] for row, cells in rows.items()])]
    if by == "AUC":
        lines += ["AUC:", "", *table(["", *INTERVALS], [[row, *(f"{v:.4f}" for v in rows[row]["auc"])] for row in rows])]
    lines += [f"Judged by {by}, averaged over t unless it says otherwise:", "", *claims_table(claims), *notes]
    work.write(name, title, lines, {"rows": rows, "claims": claims, "judged_by": by, "paper": paper})
    return rows


def table5(work):
    eq5 = "attention with query"
    reward_study(work, "table5", "Table 5: how tokens become one vector",
                 {"mean": ("--pooling", "mean"), "max": ("--pooling", "max"),
                  "attention without query": ("--pooling", "attention"), eq5: (),
                  "8 heads (released code)": ("--pooling", "multihead")} | PIXELS,
                 [(eq5, "mean"), (eq5, "max"), (eq5, "attention without query"), ("mean", "max"), (eq5, "pixels, all frames")],
                 {"pixels, all frames": "78.83 (VLM)", "mean": 83.37, "max": 78.47, "attention without query": 83.42, eq5: 84.18})


def table7(work):
    reward_study(work, "table7", "Table 7: binary cross-entropy or Bradley-Terry", {"BCE": (), "BT": ("--loss", "bt")},
                 [("BCE", "BT"), *((f"BCE in {part}", f"BT in {part}") for part in INTERVALS[:3]),
                  *((f"BT in {part}", f"BCE in {part}") for part in INTERVALS[3:])], {"BCE": 80.05, "BT": 79.85},
                 ["Bradley-Terry learns differences only: its logit has no zero, accuracy is unfair to it, and AUC decides.", ""],
                 by="AUC")


def table8(work):
    depths = {f"K = {k}": () if k == TRUNK else ("--depth", k) for k in (1, 2, 4, 6, 8) if k <= TRUNK}
    reward_study(work, "table8", "Table 8: blocks in the trunk", depths, [("K = 4", "K = 1"), ("K = 4", f"K = {TRUNK}")],
                 {}, [f"The paper, of 40 blocks: K = 8 84.18, 16 85.51, 24 85.25, 32 84.03, 40 83.27. The generator here has "
                      f"{TRUNK}; its counterpart of the paper's peak: a middle depth above the least and above all blocks.", ""])


@torch.no_grad()
def table9(work):
    """Every seed's reward model on videos of its own base, of what that became, and of the image-to-video base."""
    train_aligned(work, [(seed, method, ()) for seed in work.seeds for method in ("sft", "prfl")])
    aligned = lambda seed, method: (align_folder(work, seed, method) / "test_samples", align_folder(work, seed, method))
    own, mean = "own base", "the other three, mean"
    sets = {own: [test_set(work) for seed in work.seeds],
            "SFT-aligned": [test_set(work, *aligned(seed, "sft")) for seed in work.seeds],
            "PRFL-aligned": [test_set(work, *aligned(seed, "prfl")) for seed in work.seeds],
            "image-to-video base": [test_set(work, work.folder / "test_samples-i2v", SHIPPED["i2v"]) for seed in work.seeds]}
    m = min(len(labels) for found in sets.values() for *_, labels in found)       # of each, so that all weigh the same
    rows, right, balanced = {}, {}, {}
    for row, found in sets.items():
        labels = torch.stack([labels[:m] for *_, labels in found])                              # [seeds, m]
        good = (labels == 1).double().mean(1)
        if not 0 < good.min() <= good.max() < 1:
            raise InputError(f"table9: all {m} test videos of {row} have one label; take another preset")
        logits = torch.stack([logits_by_t(reward_fn_of(work, seed, ()), latents[:m], context[:m])
                              for seed, (latents, context, _) in zip(work.seeds, found)])       # [seeds, 5, m]
        right[row], rows[row] = accuracy_row(logits, labels)
        rows[row]["good"] = good.mean().item()
        balanced[row] = balanced_values(right[row], labels)
    others = [row for row in sets if row != own]
    balanced[mean] = np.concatenate([balanced[row] for row in others], 2)                       # [seeds, 5, 3 m]
    rows[mean] = {"average": summary(np.concatenate([right[row].mean(1) for row in others], 1)),
                  **{key: np.mean([rows[row][key] for row in others], 0).tolist()
                     for key in ("intervals", "balanced", "auc", "good")}}
    claims = claim_verdicts([(own, row) for row in (*others, mean)], {row: x.mean(1) for row, x in balanced.items()}, paired=False)
    high, low = f"{mean}, in (.8, 1]", "in [0, .2]"
    claims += claim_verdicts([(high, low)], {high: balanced[mean][:, 4], low: balanced[mean][:, 0]})
    work.write("table9", "Table 9: the reward model on other generators' videos", [
        f"{m} videos of each generator, new to the reward model (good: "
        + ", ".join(f"{row} {cells['good']:.0%}" for row, cells in rows.items()) + f"), one random t in each fifth of (0, 1] "
        f"({work.said_seeds()}). As these shares differ, claims are judged by balanced accuracy, and unpaired, as the videos "
        "differ (the last one: paired). SFT and PRFL began at the own base; PRFL learned from this very reward model.", "",
        *accuracy_table(rows, {own: 84.13, mean: 74.40}), *claims_table(claims),
        "The paper, on other generators: best in (.8, 1], 81.00, and worst in [0, .2], 70.00.", ""],
        {"rows": rows, "claims": claims, "paper": {own: 84.13, mean: 74.40}})


def labels(work):
    counts = [n for n in (1024, 4096) if n < work.preset["samples"]]
    most = f"{work.preset['samples']} samples"
    reward_study(work, "labels", "How many labelled samples PAVRM learns from",
                 {f"{n} samples": ("--num_samples", n, "--holdout", n // 8) for n in counts} | {most: ()},
                 [(most, f"{n} samples", "not in it") for n in counts], {},
                 ["Not in the paper. Held-out and in-between ones are subtracted from these numbers before training.", ""])


def fig3(work):
    frozen, at = ("--trunk_learning_rate", 0), ("--fixed_t", 0.2)
    depths = [k for k in (1, 2, 4, 6, 8) if k <= TRUNK]
    probes = {f"probe, t = 0.2, K = {k}": (*frozen, *at, *(() if k == TRUNK else ("--depth", k))) for k in depths}
    least, most, ours = f"probe, t = 0.2, K = {depths[0]}", f"probe, t = 0.2, K = {TRUNK}", "fine-tuned, random t"
    pixels = list(PIXELS)[-1]
    tuned = {"probe, random t": frozen, "fine-tuned, t = 0.2": at, ours: ()}
    rows = reward_study(
        work, "fig3", "Figure 3: where a reward can be read", PIXELS | probes | tuned,
        [*((f"swing of {row}", f"swing of {ours}") for row in PIXELS),
         (f"{most} at 0.2", f"{least} at 0.2", "alike: 78.1 to 78.8 at every depth"),
         *((pixels, probe) for probe in (most, "probe, random t")), *((ours, other) for other in (*list(tuned)[:-1], *PIXELS))],
        {ours: 85.46},
        ["Pixels are judged on the x_0 predicted in one step from x_t. The paper's 3a: their score swings with t. Probes: frozen "
         "trunk, only query and head learn. 3b: at t = 0.2 they do as well at every depth. 3c: they do not beat pixels, whatever "
         "t they learned from, and fine-tuning with random t does.", ""], at=0.2)
    middles = [0.1, 0.3, 0.5, 0.7, 0.9]
    by_t = lambda key, names: ("t", {row: (middles, rows[row][key]) for row in names})
    plot(work.results / "fig3.png", {
        "a: judged good": by_t("judged_good", [*PIXELS, ours]),
        "b: accuracy of probes by depth": ("K", {
            "at t = 0.2, which they learned from": (depths, [rows[row]["at"]["mean"] for row in probes]),
            "average over t": (depths, [rows[row]["average"]["mean"] for row in probes])}),
        "c: AUC": by_t("auc", [*PIXELS, most, *tuned])})


# ---- the annotator
def annotator(work):
    vae, count = load_vae(BASE / "vae"), work.preset["clips"]

    @torch.no_grad()
    def arrived(kind, n, seed):
        """Clips as anybody's arrive: written as mp4, read back, and through the VAE -> (videos, prompts)."""
        videos, prompts, _ = scene.make(n, seed, kind)
        with tempfile.TemporaryDirectory() as folder:
            read = []
            for i, video in enumerate(videos):
                write_video(Path(folder) / f"{i}.mp4", video)
                read.append(read_video(Path(folder) / f"{i}.mp4"))
        decoded = [to_pixels(vae.decode(vae.encode(from_pixels(x)))) for x in torch.stack(read).split(128)]
        return torch.cat(decoded), prompts

    rate = lambda judged: judged["qualified"].float().mean().item()
    clean, prompts = arrived("clean", count, 1)
    passed = rate(annotate(clean, prompts))
    failed = {}
    for i, flaw in enumerate(common.progress(scene.PHYSICAL + scene.DEFORMITY, "flaws")):
        videos, asked = arrived(flaw, count // 10, 100 + i)        # severity .6 to 1, drawn
        failed[flaw] = 1 - rate(annotate(videos, asked))
    for key, names in (("direction", list(scene.DIRECTIONS)), ("color", list(scene.COLORS)), ("shape", scene.SHAPES)):
        wrong = []
        for prompt in prompts:
            asked = scene.parse_prompt(prompt)
            asked[key] = names[(list(names).index(asked[key]) + 1) % len(names)]
            wrong.append(f"a {asked['color']} {asked['shape']} moving {scene.PHRASES[asked['direction']][0]}")
        failed[f"wrong {key} in the prompt"] = 1 - rate(annotate(clean, wrong))
    overall = float(np.mean([failed[name] for name in scene.PHYSICAL + scene.DEFORMITY]))
    work.write("annotator", f"The annotator: {count} clean and {count} clearly flawed clips, after mp4 and VAE",
               [f"Clean clips that pass: **{passed:.4f}**. Flawed clips (severity .6 to 1) that fail: **{overall:.4f}**.",
                "", *table(["flaw", "fails"], [[name.replace("_", " "), f"{v:.4f}"] for name, v in failed.items()])],
               {"clean_pass": passed, "flawed_fail": overall, "fails": failed})


STUDIES = {study.__name__: study for study in (
    table1, table2, table3, table4, table5, table7, table8, table9, fig3, fig5, labels, loss, endurance, steady, mid, why,
    speed, stopping, hacking, annotator, search, fooled)}


@dataclass
class Config:
    name: str = arg(..., "what to reproduce", choices=(*STUDIES, "all"), positional=True)
    preset: str = arg("full", "full is what results/ holds", choices=tuple(parts.PRESETS))
    seeds: int | None = arg(None, "seeds; without, the preset's", above=0)
    output_dir: str = arg("runs/reproduce", "where the parts are kept")
    results_dir: str = arg("runs/results", "where the tables go, over those of before, whatever their preset")


def main(config):
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))         # an exception, so that Work.run ends its parts
    if config.name == "all":
        train_rewards(parts.Work(config), [(), I2V])                # both take long: side by side
    for name in STUDIES if config.name == "all" else (config.name,):
        STUDIES[name](parts.Work(config))


if __name__ == "__main__":
    common.cli(main, Config, __doc__)
