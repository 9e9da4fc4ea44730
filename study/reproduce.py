"""The paper's comparisons on the embedded world, one command each. Finished parts are kept.
Run a command again to continue it.

    python -m study.reproduce table1                    PRFL against the base, SFT, RWR and RGB ReFL
    python -m study.reproduce table3 --preset quick     one seed, fewer videos
    python -m study.reproduce all --preset quick        everything

table1             PRFL beside the base, RWR, SFT and RGB ReFL, at equal updates and at equal time
table2             image-to-video: base, SFT, PRFL
table3             which part of the trajectory PRFL rewards
table4             seconds and memory of an iteration, beside RGB ReFL's, for growing clips
table5             how PAVRM pools its tokens, beside reward models of pixels
table7             the reward model's loss: binary cross-entropy or Bradley-Terry
table8             how many blocks K the trunk has
table9             a reward model on videos of generators that it was not trained on
fig3               where a reward can be read: pixels predicted in one step, frozen features, fine-tuning
fig5               wins, ties and losses of PRFL, as the annotator sees them
labels             how many samples PAVRM learns from
few_labels         how good the generator becomes if the reward model has few labels
second_round       which labels to add: of the aligned generator's samples, or more of the base's
loss               choices in PRFL: form of the loss, lambda, steps with gradients, SFT updates
endurance          whether PRFL stays good over many iterations: recipes, learning rates and rewards
rivals             PRFL beside DiffusionNFT, Flow-GRPO and SFT: quality over CPU seconds
steady             the steady recipe beside the paper's, and its learning rates
elsewhere          today's recipes and best of n at a second size (48x48), and with image-to-video
why                what keeps the steady recipe from collapsing: its choices combined, and other changes
speed              CPU seconds until a quality is reached: PRFL and RGB ReFL with both recipes, and SFT
stopping           a second reward model as judge: how far its chosen checkpoint is from the annotator's
hacking            reward, quality, speed and colours while aligning, with and without SFT updates
annotator          how often the annotator passes clean clips and fails flawed ones, after mp4 and VAE
search             best of n by the latent reward while sampling: quality against forward passes
search_mismatched  best of n again, by reward models that saw mismatched prompts
wan22              two experts (A14B) and a pinned frame (TI2V-5B), in the embedded world
fooled             the main results by a stricter and a looser annotator, and on wordings never trained on

Every part is a plain call of one of this repository's scripts. The call is printed when it starts, and
log.txt in the part's folder has what it printed. Writes <results_dir>/<name>.md and .json and, for curves, a
.png (if matplotlib is installed).

Intervals are 95 %, from resampling seeds and videos together. A claim of the paper "holds" if the interval of
the paired difference is above zero, "does not hold" if it is below, and "cannot be told" otherwise. (In
table9 the rows have different videos, so differences are not paired there.)

The reward models of table5, table7, table8, labels and fig3 are only compared with each other. They train
half as long as those of table1, or a third with --preset quick.
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
from study.elsewhere import elsewhere
from study.endurance import endurance
from study.few_labels import few_labels
from study.parts import (
    I2V,
    METRICS,
    align_folder,
    base_of,
    evaluations,
    named,
    read_metrics,
    reward_folder,
    train_aligned,
    train_rewards,
)
from study.rivals import rivals
from study.search import fooled, search
from study.search_mismatched import search_mismatched
from study.second_round import second_round
from study.steady import speed, steady, why
from study.stopping import stopping
from study.table4 import table4
from study.wan22 import wan22
from validation import logits_by_t, metrics_by_t
from world import clips, scene
from world.annotator import annotate

BASE = SHIPPED["t2v"]
RATES = {"prfl": (3e-5, 1e-4, 3e-4), "rwr": (3e-5, 1e-4, 3e-4), "refl": (3e-5, 1e-4, 3e-4),
         "sft": (3e-5, 1e-4, 3e-4, 1e-3)}                       # the learning rates that table1 tries
PIXELS = {"pixels, first frame": ("--space", "rgb", "--frames_decoded", "first"),
          "pixels, all frames": ("--space", "rgb", "--frames_decoded", "all")}  # {row: train_reward flags}
TRUNK = json.loads((BASE / "transformer" / "config.json").read_text())["num_layers"]
T_INTERVALS = "[0, .2]", "(.2, .4]", "(.4, .6]", "(.6, .8]", "(.8, 1]"
NOT_IN_PAPER = "not in it"                                      # marks a claim that is ours


# ---- studies of alignment
def alignment_study(work, name, title, variants, claims, paper, notes=()):
    """Trains variants of alignment, evaluates them on the test videos and writes the table `name`.

    variants: {row: (method, train_align flags)}, all of one task. claims: [(better, worse)] or [(better,
    worse, NOT_IN_PAPER)], where each of the two is a row, compared by the qualified rate, or "<row>'s
    <metric>". paper: {row: published value}. notes: more lines below the table.
    """
    flags_of_first = next(iter(variants.values()))[1]
    task = base_of(flags_of_first)
    base = SHIPPED["i2v"] if task else SHIPPED["t2v"]
    train_aligned(work, every_seed(work, variants))
    found = evaluations(work, named("test", task), aligned_folders(work, variants, {"base": base}), task)
    metrics = [metric for metric in METRICS if metric in found[0]["base"]]
    rows, values = {}, {}
    for row in found[0]:
        values[row] = [f[row]["qualified"] for f in found]
        rows[row] = {}
        for metric in metrics:
            values[f"{row}'s {METRICS[metric]}"] = [f[row][metric] for f in found]
            rows[row][metric] = summary([f[row][metric] for f in found])
    claims = claim_verdicts(claims, values)
    lines = [f"{work.preset['videos']} held-out videos, with the same prompts and noise in every row "
             f"({work.said_seeds()}). The column \"paper\" has the paper's average metric. That has another "
             "scale, so compare only the orderings.", ""]
    cells = []
    for row, by_metric in rows.items():
        cells.append([row, paper.get(row, ""), f"**{show(**by_metric['qualified'])}**",
                      *(f"{by_metric[metric]['mean']:.3f}" for metric in metrics[1:]),
                      decimals(by_metric["qualified"]["seeds"])])
    lines += table(["", "paper", *(METRICS[metric] for metric in metrics), "qualified, by seed"], cells)
    values = {"rows": rows, "claims": claims, "paper": paper}
    work.write(name, title, [*lines, *claims_table(claims), *notes], values)


def decimals(values):
    return " ".join(f"{value:.3f}" for value in values)


def every_seed(work, variants):
    """{row: (method, train_align flags)} -> the runs of all seeds, as `train_aligned` takes them."""
    return [(seed, *run) for seed in work.seeds for run in variants.values()]


def aligned_folders(work, variants, others=None):
    """{row: (method, train_align flags)} -> {seed: {row: checkpoint folder}}, as `evaluations` takes them.
    others: rows {row: folder} that come first and are the same for every seed."""
    folders = {}
    for seed in work.seeds:
        folders[seed] = dict(others or {})
        for row, run in variants.items():
            folders[seed][row] = align_folder(work, seed, *run)
    return folders


def iteration_in_sft_updates(work, method, flags=(), seed=0):
    """How many SFT updates take as long as one iteration of a finished prfl or refl run.

    An iteration is an SFT update and a reward update. The seconds of both come from the same run, so whatever
    else the machine did slowed both alike.
    """
    rows = [row for row in read_metrics(align_folder(work, seed, method, flags)) if "reward" in row]
    sft = np.array([row["sft_seconds"] for row in rows])
    reward = np.array([row["reward_seconds"] for row in rows])
    return 1 + reward.sum() / sft.sum()


def steps_of_equal_time(work):
    """How long other methods train in the time of PRFL's iterations: {"sft": updates, "first" and "all":
    iterations of RGB ReFL with these frames}. The training of the reward models is not counted."""
    refl = {frames: ("refl", ("--frames_decoded", frames)) for frames in ("first", "all")}
    train_aligned(work, [(0, "prfl", ()), *((0, *run) for run in refl.values())])
    updates = work.preset["iterations"] * iteration_in_sft_updates(work, "prfl")
    steps = {"sft": round(updates)}
    for frames, run in refl.items():
        steps[frames] = round(updates / iteration_in_sft_updates(work, *run))
    return steps


HALF = "SFT, half as many updates"          # as many SFT updates as PRFL and RGB ReFL make, at SFT's own rate


def table1_variants(work):
    """{row: (method, train_align flags)}"""
    steps = steps_of_equal_time(work)
    variants = {"RWR": ("rwr", ()),
                "SFT": ("sft", ()),
                "SFT, equal time": ("sft", ("--max_train_steps", steps["sft"])),
                HALF: ("sft", ("--max_train_steps", work.preset["iterations"]))}
    for name, frames in (("first frame", "first"), ("all frames", "all")):
        flags = ("--frames_decoded", frames)
        variants[f"RGB ReFL, {name}"] = ("refl", flags)
        variants[f"RGB ReFL, {name}, equal time"] = ("refl", (*flags, "--max_train_steps", steps[frames]))
    variants["PRFL"] = ("prfl", ())
    return variants


def reports_table(work, variants):
    """A table of the accuracy of reward models on their held-out samples, mean over the seeds. variants:
    {row: train_reward flags}."""
    train_rewards(work, variants.values())
    rows = []
    for row, flags in variants.items():
        files = [reward_folder(work, seed, flags) / "report.json" for seed in work.seeds]
        reports = [json.loads(file.read_text()) for file in files]
        for metric in ("accuracy", "balanced_accuracy", "auc"):
            mean = np.mean([[*report[metric], report["clean"][metric]] for report in reports], 0)
            rows.append([f"{row}, {metric.replace('_', ' ')}", *(f"{value:.3f}" for value in mean)])
    return table(["", *T_INTERVALS, "t = 0"], rows)


def table1(work):
    variants = table1_variants(work)
    steps, iterations = steps_of_equal_time(work), work.preset["iterations"]
    notes = [f"PRFL and RGB ReFL make {iterations} iterations, which are {2 * iterations} updates. SFT and "
             f"RWR make {2 * iterations} updates. \"Equal time\" is the time of PRFL's iterations: it allows "
             f"{steps['sft']} updates of SFT, {steps['first']} iterations of RGB ReFL with the first frame, "
             f"and {steps['all']} with all frames. This follows from the seconds of each kind of update in "
             "the methods' runs of seed 0. The time for the reward models and their samples is not counted.",
             ""]
    paper = {"base": 81.03, "RWR": 84.17, "SFT": 84.79, "RGB ReFL, first frame": 83.97, "PRFL": 89.58}
    if work.preset["sweep"]:
        variants, more = with_the_best_rates(work, variants)
        notes += more
    train_aligned(work, every_seed(work, variants))
    few = {row: variants[row] for row in ("SFT, equal time", "RGB ReFL, all frames", "PRFL")}
    folders = aligned_folders(work, few, {"base": BASE})
    finer = evaluations(work, "40-steps", folders, ("--num_inference_steps", 40))
    cells = [[row, show(**summary([f[row]["qualified"] for f in finer]))] for row in finer[0]]
    notes += ["The same checkpoints and noise, sampled in 40 Euler steps (the paper's N) instead of 16:", "",
              *table(["", "qualified"], cells)]
    notes += ["The reward models on 400 held-out samples of the base, mean over the seeds. t = 0 is the "
              "finished video. At t > 0 reward models of pixels see the x_0 that is predicted in one step, "
              "decoded.", "",
              *reports_table(work, {"PAVRM": ()} | PIXELS)]
    claims = []
    for other in ("base", *variants):
        if other in paper and other != "PRFL":
            claims.append(("PRFL", other))
        elif other != "PRFL":
            claims.append(("PRFL", other, NOT_IN_PAPER))
    claims += [("SFT", "RWR"), ("RWR", "RGB ReFL, first frame"), ("RGB ReFL, first frame", "base"),
               ("RGB ReFL, first frame", HALF, NOT_IN_PAPER), ("RGB ReFL, all frames", HALF, NOT_IN_PAPER)]
    title = "Table 1: PRFL and what it is compared with"
    alignment_study(work, "table1", title, variants, claims, paper, notes)


def with_the_best_rates(work, variants):
    """Tries RATES for each of variants {row: (method, flags)}, on validation videos -> (variants with the
    best rate of each in its flags, lines about the rates)."""
    runs = {}
    for row, (method, flags) in variants.items():
        for rate in RATES[method]:
            runs[row, rate] = method, (*flags, "--learning_rate", rate)
    train_aligned(work, every_seed(work, runs))
    found = evaluations(work, "sweep", aligned_folders(work, runs), ("--split", "validation", "--seed", 50))
    tried = sorted({rate for _, rate in runs})
    best, rows = {}, []
    for row in variants:
        rates = {}
        for rate in tried:
            if (row, rate) in runs:
                rates[rate] = float(np.mean([f[row, rate]["qualified"] for f in found]))
        best[row] = max(rates, key=rates.get)
        shown = {rate: f"{qualified:.3f}" for rate, qualified in rates.items()}
        shown[best[row]] = f"**{shown[best[row]]}**"
        rows.append([row, *(shown.get(rate, "") for rate in tried)])
    tuned = ", ".join(f"{rate:g} ({method})" for method, rate in parts.TUNED.items())
    lines = ["The share of qualified videos with each learning rate that was tried, mean over the seeds. The "
             "sentences are for validation: neither training nor the table above has them. The table above "
             "has each row with its best learning rate. Other tables use "
             f"{tuned}.", "", *table(["", *(f"{rate:g}" for rate in tried)], rows)]
    return {row: runs[row, best[row]] for row in variants}, lines


def table2(work):
    alignment_study(work, "table2", "Table 2: image-to-video", {"SFT": ("sft", I2V), "PRFL": ("prfl", I2V)},
                    [("PRFL", "base"), ("PRFL", "SFT", NOT_IN_PAPER), ("PRFL's dynamic", "base's dynamic"),
                     ("PRFL's I2V subject", "base's I2V subject", NOT_IN_PAPER)],
                    {"base": 85.31, "PRFL": 93.38}, [
        "The given first frames come from clean renders. I2V subject: how much the subject in all frames "
        "looks like the subject in the given frame. The paper, at 480P, has a dynamic degree of 57 for the "
        "base and 87 for PRFL. The learning rates are those that table 1 chose.", "",
        "The reward model on 400 held-out samples of the base, mean over the seeds. t = 0 is the finished "
        "video.", "",
        *reports_table(work, {"PAVRM": I2V})])


def table3(work):
    alignment_study(work, "table3", "Table 3: the rewarded part of the trajectory",
                    {"early": ("prfl", ("--trajectory_part", "early")),
                     "middle": ("prfl", ("--trajectory_part", "middle")),
                     "late": ("prfl", ("--trajectory_part", "late")),
                     "full": ("prfl", ())},
                    [("full", "early"), ("full", "middle"), ("full", "late"),
                     ("middle", "late"), ("middle", "early"), ("late", "early")],
                    {"early": 82.25, "middle": 87.02, "late": 85.01, "full": 89.58})


def loss(work):
    variants = {"PRFL: linear, lambda 1": ("prfl", ()),
                "-log sigmoid": ("prfl", ("--reward_loss", "logsigmoid")),
                "sigmoid hinge (released code)": ("prfl", ("--reward_loss", "sigmoid_hinge")),
                "sigmoid hinge, lambda 30":
                    ("prfl", ("--reward_loss", "sigmoid_hinge", "--reward_weight", 30.0)),
                "lambda 0.1": ("prfl", ("--reward_weight", 0.1)),
                "lambda 5": ("prfl", ("--reward_weight", 5.0)),
                "without SFT updates": ("prfl", ("--no-sft_updates",))}
    without_sft = "without SFT updates"
    argued = "sigmoid hinge (released code)", without_sft
    train_aligned(work, every_seed(work, variants))
    first, *others = variants
    claims, costs = [], []
    for other in others:
        if other in argued:
            claims.append((first, other))
        else:
            claims.append((first, other, NOT_IN_PAPER))
    for row, run in variants.items():
        if row != without_sft:
            cost = np.mean([iteration_in_sft_updates(work, *run, seed=seed) for seed in work.seeds])
            costs.append(f"{row} {cost:.2f}")
    notes = ["The paper has no table of these variants; a \"yes\" marks the orderings that it argues for. "
             f"One iteration takes as long as this many SFT updates: {', '.join(costs)}.", ""]
    alignment_study(work, "loss", "PRFL's own choices: loss form, lambda, SFT updates",
                    variants, claims, {}, notes)


def fig5(work):
    variants = {}
    for row, run in table1_variants(work).items():
        if row != HALF and "equal time" not in row:
            variants[row] = run
    train_aligned(work, every_seed(work, variants))
    found = evaluations(work, "test", aligned_folders(work, variants))
    paper = {"SFT": (59.33, 18.53, 22.13), "RWR": (63.20, 16.27, 20.53),
             "RGB ReFL, first frame": (67.47, 13.73, 18.80)}            # % win, tie, lose
    rows, values = [], {}
    for row in list(variants)[:-1]:                             # all but PRFL
        gap = np.array([f["PRFL"]["grade"] - f[row]["grade"] for f in found])
        win, tie, lose = summary(gap > 0), summary(gap == 0), summary(gap < 0)
        low, high = confidence_interval(np.sign(gap))
        values[row] = {"win": win, "tie": tie, "lose": lose, "verdict": verdict(low, high),
                       "paper": paper.get(row)}
        shares = " / ".join(f"{share:.1f}" for share in paper.get(row, ()))
        rows.append([row, shares, show(**win), show(**tie), show(**lose), values[row]["verdict"]])
    head = ["PRFL against", "paper, % win / tie / lose", "win", "tie", "lose", "more wins than losses"]
    work.write("fig5", "Figure 5: PRFL against each, video by video", [
        "Both videos have the same prompt and noise, and the one with the better grade wins. A grade is the "
        "sum of both axes (0, 1 or 2 each), plus 2 if the video is true to the prompt. The grades are the "
        "annotator's, not people's. All methods made the same number of updates.", "",
        *table(head, rows)], values)


def hacking(work):
    """Reward, quality, speed and colours during alignment with the paper's recipe, with and without SFT
    updates, for twice the iterations of table1.

    The runs are validated while they train. That needs the world's own clips, so there is no --data.
    """
    variants = {"PRFL": (), "without SFT updates": ("--no-sft_updates",)}
    length, every = 2 * work.preset["iterations"], 20
    train_rewards(work, [()])
    folder = lambda seed, flags: work.folder / f"seed-{seed}" / named("hacking", flags)
    wanted = []
    for seed in work.seeds:
        for flags in variants.values():
            wanted.append((folder(seed, flags), "transformer/config.json", "train_align.py",
                           "--recipe", "paper", "--seed", seed,
                           "--reward", reward_folder(work, seed) / "reward",
                           "--learning_rate", parts.TUNED["prfl"], "--max_train_steps", length,
                           "--validation_steps", every, "--num_validation", work.preset["videos"] // 2,
                           *flags))
    work.run(wanted)

    panel = ("qualified", "speed", "brightness", "saturation")
    curves, ends = {}, {}
    for label, flags in variants.items():
        runs = [read_metrics(folder(seed, flags)) for seed in work.seeds]
        validated = [[row for row in rows if "validation_qualified" in row] for rows in runs]
        at = [row["step"] for row in validated[0]]
        curves[label] = {}
        for key in panel:
            by_seed = [[row[f"validation_{key}"] for row in rows] for rows in validated]
            curves[label][key] = (at, np.mean(by_seed, 0).tolist())
        updates = [row for rows in runs for row in rows if "reward" in row]
        rewards = []
        for step in at[1:]:
            rewards.append(np.mean([row["reward"] for row in updates if step - every < row["step"] <= step]))
        curves[label]["proxy reward"] = (at[1:], rewards)
        ends[label] = [rows[-1]["validation_qualified"] for rows in validated]
    keys = ("proxy reward", *panel)
    plot(work.results / "hacking.png",
         {key: ("iteration", {label: found[key] for label, found in curves.items()}) for key in keys})

    def shown(at, values, step):
        return f"{values[at.index(step)]:.3f}" if step in at else ""

    rows = []
    for label, found in curves.items():
        for step in found["qualified"][0]:
            rows.append([f"{label}, iteration {step}", *(shown(*found[key], step) for key in keys)])
    said_ends = "; ".join(f"{label} {decimals(values)}" for label, values in ends.items())
    work.write("hacking", "What the reward does to the videos, while aligning", [
        f"Proxy reward: the mean logit in the last {every} reward updates. The other columns are measured "
        f"on {work.preset['videos'] // 2} validation videos. All are means of {len(work.seeds)} seeds. "
        "Qualified at the end, by seed: "
        f"{said_ends}.", "", *table(["", *keys], rows)], {"curves": curves, "ends": ends})


# ---- studies of the reward model
@torch.no_grad()
def test_set(work, folder=None, generator=BASE):
    """Samples of a generator that no reward model of any seed saw -> (latents, contexts, labels).

    Samples without a label are left out. The shards are kept in `folder`. Default: the base's samples, in the
    folder "test_samples".
    """
    runtime = common.setup("no")
    dit = load_transformer(generator).to(runtime.device).eval()
    shards = clips.own_samples(folder or work.folder / "test_samples", dit, str(BASE), work.preset["tested"],
                               16, "tiny", 9_999, runtime, transformer=generator)
    kept = shards.batch((shards.labels >= 0).nonzero()[:, 0])
    return kept["latents"], kept["context"], kept["label"]


def reward_fn_of(work, seed, flags):
    """The reward model that a run trained, as reward_fn(x_t, t, context, y=) -> logits.

    A reward model of pixels scores the x_0 that the base predicts from x_t.
    """
    folder = reward_folder(work, seed, flags) / "reward"
    if "--space" not in flags:
        return load_pavrm(folder)
    base = load_transformer(BASE).eval().requires_grad_(False)
    reward = refl_baseline.load_pixel_reward(folder, parts.frames_of(flags), base.config["text_dim"])
    decoder = refl_baseline.load_decoder(str(BASE), base.config["out_dim"])
    return partial(refl_baseline.predicted_reward, reward, decoder, base)


def accuracy_row(logits, labels):
    """The accuracy of a reward model in each of the five intervals of t.

    logits [seeds, 5, m], labels [seeds, m] -> (right [seeds, 5, m], a dict: "average" is the accuracy over
    all t, as a summary; "intervals" (accuracy), "balanced", "auc" and "judged_good" (the share called good)
    have a mean over the seeds for each interval).
    """
    right = ((logits >= 0) == (labels == 1)[:, None]).double().numpy()
    metrics = [metrics_by_t(*seed) for seed in zip(logits, labels)]
    mean = lambda name: np.mean([by_t[name] for by_t in metrics], 0).tolist()
    return right, {"average": summary(right.mean(1)), "intervals": mean("accuracy"),
                   "balanced": mean("balanced_accuracy"), "auc": mean("auc"),
                   "judged_good": (logits >= 0).double().mean((0, 2)).tolist()}


def accuracy_table(rows, paper):
    """Lines of a table. rows: {row: the dict of `accuracy_row`}. paper: {row: published value}."""
    lines = []
    for row, cells in rows.items():
        lines.append([row, paper.get(row, ""), f"**{show(**cells['average'])}**",
                      *(f"{value:.3f}" for value in cells["intervals"]),
                      f"{np.mean(cells['balanced']):.3f}", f"{np.mean(cells['auc']):.3f}"])
    return table(["", "paper", "average", *T_INTERVALS, "balanced, average", "AUC, average"], lines)


def logits_at(reward_fn, latents, context, t):
    """Logits [m] of m videos, all noised to the same time t. latents [m, c, f, h, w], context [m, l,
    d_text]."""
    t = torch.full((len(latents),), t)
    x1 = common.noise(latents.shape[1:], 0, "one t", 0, range(len(latents)))
    x_t = add_noise(latents, x1, t)
    batches = zip(x_t.split(256), t.split(256), context.split(256))
    return torch.cat([reward_fn(*batch) for batch in batches])


@torch.no_grad()
def reward_study(work, name, title, variants, claims, paper, notes=(), by="accuracy", at=None):
    """Trains variants of the reward model, tests them on one test set and writes the table `name`.

    Each test video gets a random t in each fifth of (0, 1]. The reward models train less than those of
    alignment: there are many, and they are only compared with each other.

    variants: {row: train_reward flags}. claims: as in `alignment_study`, but each of the two is a row, "<row>
    in <interval of t>", "<row> at <at>" or "swing of <row>". paper: {row: published value}. by: "accuracy" or
    "AUC", what claims compare. at: a single t that gets a column of its own. Returns {row: the dict of
    `accuracy_row`}.
    """
    steps = work.preset["study_steps"]
    variants = {row: (*flags, "--max_train_steps", steps) for row, flags in variants.items()}
    train_rewards(work, variants.values())
    latents, context, labels = test_set(work)
    values, rows = {}, {}
    for row, flags in common.progress(variants.items(), "testing reward models"):
        reward_fns = [reward_fn_of(work, seed, flags) for seed in work.seeds]
        logits = torch.stack([logits_by_t(reward_fn, latents, context) for reward_fn in reward_fns])
        every = labels.expand(len(logits), -1)                                                  # [seeds, m]
        right, rows[row] = accuracy_row(logits, every)                                      # [seeds, 5, m]
        compared = right
        if by == "AUC":
            compared = auc_values(logits, every)
        values[row] = compared.mean(1)
        for i, part in enumerate(T_INTERVALS):
            values[f"{row} in {part}"] = compared[:, i]
        values[f"swing of {row}"] = (right[:, 1:] != right[:, :1]).mean(1)  # verdicts other than in [0, .2]
        if at is not None:
            at_one_t = torch.stack([logits_at(reward_fn, latents, context, at) for reward_fn in reward_fns])
            values[f"{row} at {at}"] = ((at_one_t >= 0) == (every == 1)).double().numpy()       # [seeds, m]
            rows[row]["at"] = summary(values[f"{row} at {at}"])
    claims = claim_verdicts(claims, values)
    good = (labels == 1).double().mean()
    lines = [f"Accuracy on {len(labels)} samples of the base that no reward model was trained on ({good:.0%} "
             f"of them good), with one random t in each fifth of (0, 1] ({work.said_seeds()}). Each reward "
             f"model trained for {steps} steps.", ""]
    lines += accuracy_table(rows, paper)
    if at is not None:
        cells = [[row, show(**rows[row]["at"]), show(**summary(values[f"swing of {row}"]))] for row in rows]
        lines += [f"The accuracy at t = {at}, and the swing: in what share of the other four intervals a "
                  "video's verdict differs from that in "
                  f"{T_INTERVALS[0]}.", "", *table(["", f"t = {at}", "swing"], cells)]
    if by == "AUC":
        cells = [[row, *(f"{value:.4f}" for value in rows[row]["auc"])] for row in rows]
        lines += ["AUC:", "", *table(["", *T_INTERVALS], cells)]
    lines += [f"The claims compare {by}, averaged over t if they do not name an "
              "interval:", "", *claims_table(claims),
              *notes]
    work.write(name, title, lines, {"rows": rows, "claims": claims, "judged_by": by, "paper": paper})
    return rows


def table5(work):
    eq5 = "attention with query"
    reward_study(work, "table5", "Table 5: how tokens become one vector",
                 {"mean": ("--pooling", "mean"), "max": ("--pooling", "max"),
                  "attention without query": ("--pooling", "attention"), eq5: (),
                  "8 heads (released code)": ("--pooling", "multihead")} | PIXELS,
                 [(eq5, "mean"), (eq5, "max"), (eq5, "attention without query"), ("mean", "max"),
                  (eq5, "pixels, all frames")],
                 {"pixels, all frames": "78.83 (VLM)", "mean": 83.37, "max": 78.47,
                  "attention without query": 83.42, eq5: 84.18})


def table7(work):
    claims = [("BCE", "BT")]
    claims += [(f"BCE in {part}", f"BT in {part}") for part in T_INTERVALS[:3]]
    claims += [(f"BT in {part}", f"BCE in {part}") for part in T_INTERVALS[3:]]
    reward_study(work, "table7", "Table 7: binary cross-entropy or Bradley-Terry",
                 {"BCE": (), "BT": ("--loss", "bt")}, claims, {"BCE": 80.05, "BT": 79.85},
                 ["Bradley-Terry only learns differences, so its logit has no natural zero and accuracy is "
                  "unfair to it. The claims therefore compare AUC.", ""], by="AUC")


DEPTHS = [k for k in (1, 2, 4, 6, 8) if k <= TRUNK]


def depth_flags(k):
    """train_reward flags of a trunk of k blocks. There are none for all blocks, which is the default, because
    a run's folder is named by its flags."""
    return () if k == TRUNK else ("--depth", k)


def table8(work):
    variants = {f"K = {k}": depth_flags(k) for k in DEPTHS}
    reward_study(work, "table8", "Table 8: blocks in the trunk", variants,
                 [("K = 4", "K = 1"), ("K = 4", f"K = {TRUNK}")], {},
                 ["The paper, whose generator has 40 blocks, has 84.18 at K = 8, 85.51 at 16, 85.25 at 24, "
                  "84.03 at 32 and 83.27 at 40. So the best depth there is a middle one. The generator here "
                  f"has {TRUNK} blocks. The claims ask whether a middle depth is above the least depth and "
                  "above all blocks.", ""])


@torch.no_grad()
def table9(work):
    """Tests every seed's reward model on videos of the base, of this base after alignment, and of the
    image-to-video base."""
    train_aligned(work, [(seed, method, ()) for seed in work.seeds for method in ("sft", "prfl")])

    def aligned(seed, method):
        generator = align_folder(work, seed, method)
        return test_set(work, generator / "test_samples", generator)

    def image_to_video():
        return test_set(work, work.folder / "test_samples-i2v", SHIPPED["i2v"])

    own, mean = "own base", "the other three, mean"
    sets = {own: [test_set(work) for seed in work.seeds],
            "SFT-aligned": [aligned(seed, "sft") for seed in work.seeds],
            "PRFL-aligned": [aligned(seed, "prfl") for seed in work.seeds],
            "image-to-video base": [image_to_video() for seed in work.seeds]}
    m = min(len(labels) for found in sets.values() for *_, labels in found)     # videos of each generator
    rows, right, balanced = {}, {}, {}
    for row, found in sets.items():
        labels = torch.stack([labels[:m] for *_, labels in found])                              # [seeds, m]
        good = (labels == 1).double().mean(1)
        if not 0 < good.min() <= good.max() < 1:
            raise InputError(f"table9: all {m} test videos of {row} have one label; take another preset")
        logits = torch.stack([logits_by_t(reward_fn_of(work, seed, ()), latents[:m], context[:m])
                              for seed, (latents, context, _) in zip(work.seeds, found)])   # [seeds, 5, m]
        right[row], rows[row] = accuracy_row(logits, labels)
        rows[row]["good"] = good.mean().item()
        balanced[row] = balanced_values(right[row], labels)
    others = [row for row in sets if row != own]
    balanced[mean] = np.concatenate([balanced[row] for row in others], 2)                   # [seeds, 5, 3 m]
    rows[mean] = {"average": summary(np.concatenate([right[row].mean(1) for row in others], 1)),
                  **{key: np.mean([rows[row][key] for row in others], 0).tolist()
                     for key in ("intervals", "balanced", "auc", "good")}}
    over_t = {row: values.mean(1) for row, values in balanced.items()}
    claims = claim_verdicts([(own, row) for row in (*others, mean)], over_t, paired=False)
    high, low = f"{mean}, in (.8, 1]", "in [0, .2]"
    claims += claim_verdicts([(high, low)], {high: balanced[mean][:, 4], low: balanced[mean][:, 0]})
    good = ", ".join(f"{row} {cells['good']:.0%}" for row, cells in rows.items())
    work.write("table9", "Table 9: the reward model on other generators' videos", [
        f"{m} videos of each generator that the reward model has not seen, with one random t in each fifth "
        f"of (0, 1] ({work.said_seeds()}). Good videos: {good}. As these shares differ, the claims compare "
        "balanced accuracy. As the videos differ, the differences are not paired, except in the last claim. "
        "SFT and PRFL started from the own base, and PRFL learned from this same reward model.", "",
        *accuracy_table(rows, {own: 84.13, mean: 74.40}), *claims_table(claims),
        "The paper, on other generators: best in (.8, 1] with 81.00, worst in [0, .2] with 70.00.", ""],
        {"rows": rows, "claims": claims, "paper": {own: 84.13, mean: 74.40}})


def labels(work):
    most = f"{work.preset['samples']} samples"
    variants, claims = {}, []
    for n in (1024, 4096):
        if n < work.preset["samples"]:
            variants[f"{n} samples"] = ("--num_samples", n, "--holdout", n // 8)
            claims.append((most, f"{n} samples", NOT_IN_PAPER))
    variants[most] = ()
    reward_study(work, "labels", "How many labelled samples PAVRM learns from", variants, claims, {},
                 ["The paper has no such comparison. Of these samples, the held-out ones and those without a "
                  "label are not trained on.", ""])


def fig3(work):
    frozen, at = ("--trunk_learning_rate", 0), ("--fixed_t", 0.2)
    probes = {f"probe, t = 0.2, K = {k}": (*frozen, *at, *depth_flags(k)) for k in DEPTHS}
    least, most = f"probe, t = 0.2, K = {DEPTHS[0]}", f"probe, t = 0.2, K = {TRUNK}"
    probe, tuned_at, ours = "probe, random t", "fine-tuned, t = 0.2", "fine-tuned, random t"
    variants = PIXELS | probes | {probe: frozen, tuned_at: at, ours: ()}
    claims = [(f"swing of {row}", f"swing of {ours}") for row in PIXELS]
    claims += [(f"{most} at 0.2", f"{least} at 0.2", "alike: 78.1 to 78.8 at every depth"),
               ("pixels, all frames", most), ("pixels, all frames", probe)]
    claims += [(ours, other) for other in (probe, tuned_at, *PIXELS)]
    rows = reward_study(
        work, "fig3", "Figure 3: where a reward can be read", variants, claims, {ours: 85.46},
        ["Reward models of pixels see the x_0 that is predicted in one step from x_t. In a probe the trunk "
         "is frozen, and only query and head learn. The paper's figure 3a: with pixels the score swings with "
         "t. 3b: at t = 0.2 probes are equally good at every depth. 3c: probes do not beat pixels, whatever "
         "t they learned from, but fine-tuning with random t does.", ""], at=0.2)
    middles = [0.1, 0.3, 0.5, 0.7, 0.9]
    by_t = lambda key, names: ("t", {row: (middles, rows[row][key]) for row in names})
    plot(work.results / "fig3.png", {
        "a: called good": by_t("judged_good", [*PIXELS, ours]),
        "b: accuracy of probes by depth": ("K", {
            "at t = 0.2, which they learned from": (DEPTHS, [rows[row]["at"]["mean"] for row in probes]),
            "average over t": (DEPTHS, [rows[row]["average"]["mean"] for row in probes])}),
        "c: AUC": by_t("auc", [*PIXELS, most, probe, tuned_at, ours])})


# ---- the annotator
def annotator(work):
    vae, count = load_vae(BASE / "vae"), work.preset["clips"]

    @torch.no_grad()
    def arrived(kind, n, seed):
        """Sends n clips the way of a user's clips: they are written as mp4, read, and encoded and decoded by
        the VAE. -> (videos, prompts)"""
        videos, prompts, _ = scene.make(n, seed, kind)
        with tempfile.TemporaryDirectory() as folder:
            read = []
            for i, video in enumerate(videos):
                write_video(Path(folder) / f"{i}.mp4", video)
                read.append(read_video(Path(folder) / f"{i}.mp4"))
        decoded = [to_pixels(vae.decode(vae.encode(from_pixels(x)))) for x in torch.stack(read).split(128)]
        return torch.cat(decoded), prompts

    rate = lambda annotations: annotations["qualified"].float().mean().item()
    clean, prompts = arrived("clean", count, 1)
    passed = rate(annotate(clean, prompts))
    failed = {}
    for i, flaw in enumerate(common.progress(scene.PHYSICAL + scene.DEFORMITY, "flaws")):
        videos, asked = arrived(flaw, count // 10, 100 + i)     # with severities from .6 to 1
        failed[flaw] = 1 - rate(annotate(videos, asked))
    for key, names in (("direction", scene.DIRECTIONS), ("color", scene.COLORS), ("shape", scene.SHAPES)):
        names = list(names)
        wrong = []
        for prompt in prompts:
            asked = scene.parse_prompt(prompt)
            asked[key] = names[(names.index(asked[key]) + 1) % len(names)]
            wrong.append(f"a {asked['color']} {asked['shape']} moving {scene.PHRASES[asked['direction']][0]}")
        failed[f"wrong {key} in the prompt"] = 1 - rate(annotate(clean, wrong))
    overall = float(np.mean([failed[name] for name in scene.PHYSICAL + scene.DEFORMITY]))
    title = f"The annotator: {count} clean and {count} clearly flawed clips, after mp4 and VAE"
    cells = [[name.replace("_", " "), f"{share:.4f}"] for name, share in failed.items()]
    work.write("annotator", title,
               [f"Share of clean clips that pass: **{passed:.4f}**. Share of flawed clips (severity .6 to 1) "
                f"that fail: **{overall:.4f}**.", "", *table(["flaw", "fails"], cells)],
               {"clean_pass": passed, "flawed_fail": overall, "fails": failed})


STUDIES = {study.__name__: study
           for study in (table1, table2, table3, table4, table5, table7, table8, table9, fig3, fig5, labels,
                         loss, endurance, few_labels, second_round, rivals, steady, elsewhere, why,
                         speed, stopping, hacking, annotator, search, search_mismatched, fooled, wan22)}


@dataclass
class Config:
    name: str = arg(..., "which comparison to run, from the list above", choices=(*STUDIES, "all"),
                    positional=True)
    preset: str = arg("full", "full: as in results/; quick: one seed, fewer videos and steps",
                      choices=tuple(parts.PRESETS))
    seeds: int | None = arg(None, "number of seeds; default: quick 1, full 3", above=0)
    output_dir: str = arg("runs/reproduce", "folder in which finished parts are kept")
    results_dir: str = arg("runs/results", "folder for the tables; an earlier table of the same name is "
                                           "overwritten")


def main(config):
    # SystemExit makes Work.run end its parts; a plain SIGTERM would not
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    if config.name == "all":
        train_rewards(parts.Work(config), [(), I2V])                # both take long, so they run side by side
        names = list(STUDIES)
    else:
        names = [config.name]
    for name in names:
        STUDIES[name](parts.Work(config))


if __name__ == "__main__":
    common.cli(main, Config, __doc__, prog="python -m study.reproduce")
