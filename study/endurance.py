"""`python -m study.reproduce endurance`: do the generator's videos stay good, however long PRFL trains it?

The generator can learn to please the reward model and not the eye. This study combines three choices that
could prevent that:

recipe      paper: Algorithm 1. steady: at most four long steps in the rollout, and -log sigmoid(r).
            by video: like steady, but each video of a batch has its own rewarded step (study/why.py).
            own moments: like paper, but SFT updates and reward updates have an AdamW each (study/why.py).
schedule    the learning rate stays constant, or falls linearly to 0 at the end of the run.
reward      the reward model is trained as in the paper, or a quarter of each of its batches gets another
            video's prompt and the label bad (train_reward.py --mismatched).

Most of the runs take a quarter of an hour on one core, some take up to 50 minutes. So the curves and the test
verdicts of a finished run are kept in results/endurance_runs.json, and the run is not made again until its
entry there is removed. results/endurance.md says how many runs there are, and how many of them are made.
"""
from typing import NamedTuple

import numpy as np
import torch

import common
import flow
from common import InputError
from families import load_text_encoder, load_vae
from formats import runs
from formats.metadata import from_json
from formats.video import to_pixels
from formats.weights import SHIPPED
from model import load_transformer
from report import confidence_interval, plot, show, summary, table
from study.parts import HOME, part_of, read_metrics, reward_folder, train_reward_models
from validation import OTHER_PROMPT_WEIGHT
from world import annotator, scene

EVERY = 40                                                      # iterations between validations
VALIDATED, TESTED, TEST_SEED = 256, 512, 7_000                  # numbers of videos, and evaluate.py's seed
PANEL = ("speed", "brightness", "saturation")
RECIPES = {"paper": ("train_align.py", "--method", "prfl", "--recipe", "paper"),
           "steady": ("train_align.py", "--method", "prfl", "--recipe", "steady"),
           "by video": ("-m", "study.why", "--rewarded_step", "per_video", "--rollout_passes", 4,
                        "--reward_loss", "logsigmoid"),
           "own moments": ("-m", "study.why", "--variant", "moments")}


class Case(NamedTuple):
    """A run without its seed.

    mismatched: the share of each batch of the reward model that gets another video's prompt. rate: learning
    rate. length: number of iterations. parts: the reward model learns from 1 / parts of the labelled samples,
    for reward_steps steps (None: the preset's number).
    """
    recipe: str
    schedule: str = "constant"
    mismatched: float = 0.25
    rate: float = 1e-4
    length: int = 960
    parts: int = 1
    reward_steps: int | None = None

    def name(self, seed):
        reward = f"mismatched {self.mismatched:g}"
        if self.parts > 1:
            reward += f" 1 of {self.parts} {self.reward_steps} steps"
        return f"{self.recipe}, {self.schedule}, {self.rate:g}, {reward}, {self.length}, seed {seed}"

    def reward_flags(self):
        """Flags of train_reward.py. Without flags it makes the reward model of the other tables."""
        flags = ("--mismatched", self.mismatched) if self.mismatched else ()
        if self.parts > 1:
            flags += ("--fold", f"1/{self.parts}", "--max_train_steps", self.reward_steps)
        return flags

    def row(self):
        reward = f"mismatched {self.mismatched:g}" if self.mismatched else "the paper's reward"
        return f"{self.recipe}, {self.schedule} {self.rate:g}, {reward}"


# The learning rate of a run falls to 0 at its end, so a long run does not contain the shorter ones.
STEADY = Case("steady", "linear", rate=2e-4)                # train_align.py's defaults, but for the length
BY_VIDEO = STEADY._replace(recipe="by video")
THREE_SEEDS = [Case("paper", length=480), Case("own moments", length=480), Case("steady"),
               *(STEADY._replace(length=length) for length in (120, 240, 480, 960)),
               *(STEADY._replace(rate=3e-4, length=length) for length in (120, 480)),
               *(BY_VIDEO._replace(length=length) for length in (120, 480))]
ONE_SEED = [Case("paper", "linear"), STEADY._replace(length=1920), STEADY._replace(mismatched=0), BY_VIDEO]


# ---- one run
def judge_seed(work, seed, case):
    """The seed whose reward model is the judge of a run (train_align.py --judge): the next one. Only runs of
    the paper's recipe, which have to be stopped in time, have a judge. The others: None."""
    return (seed + 1) % max(2, len(work.seeds)) if case.recipe == "paper" else None


def part_of_case(work, seed, case):
    """The part that makes a run, as Work.run takes it: (folder, last file that it writes, script, *flags)."""
    words = case.name(seed).replace(", ", "_").replace(" ", "-")
    reward = lambda seed: reward_folder(work, seed, case.reward_flags()) / "reward"
    judge = judge_seed(work, seed, case)
    watched = () if judge is None else ("--judge", reward(judge))
    return (work.folder / f"seed-{seed}" / f"endurance-{words}", "transformer/config.json",
            *RECIPES[case.recipe], "--seed", seed, "--curated_dir", work.folder / f"seed-{seed}" / "curated",
            "--reward", reward(seed), *watched, "--learning_rate", case.rate, "--lr_scheduler", case.schedule,
            "--max_train_steps", case.length, "--validation_steps", EVERY, "--num_validation", VALIDATED,
            "--checkpointing_steps", 120)


def reward_models(work, wanted):
    """Runs [(seed, case)] -> their reward models and judges, [(seed, train_reward flags)]."""
    both = [(of, case.reward_flags()) for seed, case in wanted
            for of in (seed, judge_seed(work, seed, case)) if of is not None]
    return list(dict.fromkeys(both))


def curve_of(rows):
    """Rows of a metrics.jsonl -> {iteration: {"qualified" and the other validation metrics, "reward",
    "cpu_seconds" of all updates until then}}, for the iterations that were validated."""
    curve, seconds = {}, 0.0
    for row in rows:
        seconds += sum(value for name, value in row.items() if name.endswith("_cpu_seconds"))
        if "validation_qualified" in row:
            watched = {name.removeprefix("validation_"): round(value, 4) for name, value in row.items()
                       if name.startswith("validation_")}
            reward = {"reward": round(row["reward"], 3)} if "reward" in row else {}
            curve[str(row["step"])] = {**watched, **reward, "cpu_seconds": round(seconds, 1)}
    return curve


def bits(values):
    """Verdicts [n] as a string of 0 and 1."""
    return "".join(str(int(value)) for value in values)


@torch.no_grad()
def test_verdicts(transformer):
    """Samples evaluate.py's test sentences, and reworded ones, with the generator in folder `transformer` ->
    what the annotators find, {"test, firm": {"qualified": bits, ...}, ..., "test means": [speed, brightness,
    saturation], ...}"""
    runtime = common.setup(runs.fast_precision(), 0)
    base = SHIPPED["t2v"]
    dit = load_transformer(transformer).to(runtime.device).eval()
    vae = load_vae(base / "vae").to(runtime.device)
    text = load_text_encoder(base / "text_encoder").to(runtime.device)
    found = {}
    for split in ("test", "reworded"):
        _, prompts, _ = scene.make(TESTED, TEST_SEED, "clean", "tiny", split=split)
        x = flow.sample(dit, scene.LATENT_SHAPES["tiny"], text.encode(prompts), TEST_SEED, range(TESTED), 16,
                        autocast=runtime.autocast)
        seen = annotator.annotate(torch.cat([to_pixels(vae.decode(z)).cpu() for z in x.split(128)]), prompts)
        for who, tolerance in annotator.ANNOTATORS.items():
            grades = annotator.grade(seen, tolerance)
            found[f"{split}, {who}"] = {"qualified": bits(grades["qualified"]),
                                        "physical": bits(grades["physical"] == 2),
                                        "deformity": bits(grades["deformity"] == 2)}
        found[f"{split}, firm"]["adherent"] = bits(seen["adherent"])
        found[f"{split} means"] = [round(seen[name].float().mean().item(), 5) for name in PANEL]
    return found


def read_kept(path):
    try:
        return from_json(path.read_text()) if path.exists() else {}
    except ValueError as error:
        raise InputError(f"{path} is damaged ({error}): restore or remove it") from None


def kept_in(work, file):
    """Reads `file` from the repository's results/ and from --results_dir, which counts where both have a name
    -> {name: what is kept}"""
    return read_kept(HOME / "results" / file) | read_kept(work.results / file)


def keep(work, file, kept):
    work.results.mkdir(parents=True, exist_ok=True)
    runs.write_json(work.results / file, kept)


def finished(work, wanted, file="endurance_runs.json", part_of_run=part_of_case):
    """Makes the runs [(seed, case)] that are not kept in `file` -> {name of the run: what is kept of the
    run}"""
    kept = kept_in(work, file)
    missing = [(seed, case) for seed, case in wanted if case.name(seed) not in kept]
    train_reward_models(work, reward_models(work, missing))
    for i in range(0, len(missing), work.jobs):     # a few at a time: an interruption loses only these
        together = missing[i:i + work.jobs]
        # The first run of a seed renders the curated clips for all runs of this seed, so it goes before them.
        first = {seed: part_of_run(work, seed, case) for seed, case in reversed(together)}
        work.run(list(first.values()))
        work.run([part_of_run(work, seed, case) for seed, case in together])
        for seed, case in together:
            folder = part_of_run(work, seed, case)[0]
            part = part_of(folder)
            report = reward_folder(work, seed, case.reward_flags()) / "report.json"
            kept[case.name(seed)] = {"command": part["command"].replace(str(work.folder), "runs"),
                                     "commit": part["commit"], "minutes": round(part["seconds"] / 60, 1),
                                     "reward": from_json(report.read_text()),
                                     "curve": curve_of(read_metrics(folder)),
                                     "test": test_verdicts(folder / "transformer")}
        keep(work, file, kept)
    return {case.name(seed): kept[case.name(seed)] for seed, case in wanted}


# ---- what they say
def rates(curve):
    """The qualified rate of each validation but the first, which sees the untrained generator."""
    return [row["qualified"] for step, row in curve.items() if int(step)]


def fall(curves):
    """Curves of the seeds -> (mean of the last quarter of the validations minus that of the best quarter, the
    95 % interval of this difference), or None if there are not four validations.

    The best quarter is the one with the highest mean over the seeds. So a run that neither rises nor falls
    has a difference a little below zero.
    """
    values = np.array([rates(curve) for curve in curves])                               # [seeds, validations]
    if values.shape[1] < 4:
        return None
    quarters = np.array_split(values, 4, axis=1)
    best = max(quarters, key=np.mean)
    if best is quarters[-1]:
        return 0.0, [0.0, 0.0]
    return float(quarters[-1].mean() - best.mean()), confidence_interval(quarters[-1], best)


def test_values(parts, key, what="qualified"):
    """Kept runs of the seeds -> [seeds, test videos]"""
    return np.array([[float(bit) for bit in part["test"][key][what]] for part in parts])


def row_of(case, parts):
    """parts: what is kept of a case's runs, one for each seed -> (numbers, cells of the table). Numbers about
    the test videos have the same names as in results/table1.json."""
    curves = [part["curve"] for part in parts]
    fallen = fall(curves)
    at = {step: [curve[str(step)]["qualified"] for curve in curves]
          for step in (*SHOWN_STEPS, 1440, 1920) if str(step) in curves[0]}
    test = {key: summary(test_values(parts, key))
            for key in ("test, firm", "test, strict", "test, loose", "reworded, firm")}
    means = dict(zip(PANEL, np.mean([part["test"]["test means"] for part in parts], 0).tolist()))
    numbers = {"validation": at, "fall": fallen and dict(zip(("difference", "interval"), fallen)),
               "test": test, "qualified": test["test, firm"], "minutes": [part["minutes"] for part in parts]}
    for name, what in (("physical_qualified", "physical"), ("deformity_qualified", "deformity"),
                       ("adherent", "adherent")):
        numbers[name] = {"mean": float(test_values(parts, "test, firm", what).mean())}
    numbers |= {name: {"mean": mean} for name, mean in means.items()}
    steps = [f"{np.mean(at[step]):.3f}" if step in at else "" for step in SHOWN_STEPS]
    cells = [case.row(), case.length, len(parts), *steps, show(*fallen, "+") if fallen else "",
             show(**test["test, firm"]), " ".join(f"{value:.3f}" for value in test["test, firm"]["seeds"]),
             *(f"{test[key]['mean']:.3f}" for key in ("test, strict", "test, loose", "reworded, firm")),
             f"{numbers['adherent']['mean']:.3f}", *(f"{mean:.3f}" for mean in means.values())]
    return numbers, cells


SHOWN_STEPS = (40, 120, 240, 480, 720, 960)
HEAD = ["recipe, rate, reward", "iterations", "seeds", "40", "120", "240", "480", "720", "960",
        "last quarter minus best quarter", "test videos", "by seed", "strict", "loose", "reworded",
        "adherent", *PANEL]


def seeds_of(work, case, one_seed):
    """All seeds, or for a case of one_seed seed 1 alone (the only one, if there is no other)."""
    return work.seeds if case not in one_seed else work.seeds[1:2] or work.seeds


def endurance(work):
    cases = [*THREE_SEEDS, *ONE_SEED]
    report(work, finished(work, [(seed, case) for case in cases for seed in seeds_of(work, case, ONE_SEED)]),
           cases)


def report(work, kept, cases):
    """Writes the table and the curves of the runs that are kept."""
    rows, cells, curves, used = {}, [], {}, []
    for case in cases:
        parts = [kept[case.name(seed)] for seed in work.seeds if case.name(seed) in kept]
        if not parts:
            continue
        used += parts
        rows[f"{case.row()}, {case.length}"], row = row_of(case, parts)
        cells.append(row)
        steps = [int(step) for step in parts[0]["curve"] if int(step)]
        curves[case] = (steps, np.mean([rates(part["curve"]) for part in parts], 0).tolist())
    panels = {}
    for title, is_steady in (("the steady recipe", True), ("other recipes", False)):
        shown = {f"{case.row()}, {case.length}": curve for case, curve in curves.items()
                 if (case.recipe == "steady") == is_steady and case.length >= 480}
        if shown:
            panels[title] = ("iteration", shown)
    plot(work.results / "endurance.png", panels)
    judged, stops = stopped_by_the_judge(work, kept, cases)
    minutes = sum(part["minutes"] for part in used)
    lines = [f"The columns 40 to 960 are the share of {VALIDATED} validation videos that are qualified after "
             "this many iterations, as a mean over the seeds. The column after them is the mean of the last "
             "quarter of the validations minus that of the best quarter. All later columns are about "
             f"{TESTED} test videos at the end of the run. \"Test videos\" and \"by seed\" are the share "
             "that the firm annotator calls qualified; \"strict\" and \"loose\" are the shares of the strict "
             "and the loose annotator; \"reworded\" is the firm annotator's share where the prompts are in "
             "other wordings. The last four columns are what the firm annotator measures. Each seed has its "
             "own reward model. Mismatched: the share of each batch of the reward model that got another "
             f"video's prompt and the label bad.", "", *table(HEAD, cells)]
    if stops:
        lines += ["In these runs the reward model of the next seed was the judge. The judge's opinion is the "
                  "probability that it gives to the samples being good. Its score is this opinion minus "
                  f"{OTHER_PROMPT_WEIGHT:g} times its opinion of the same samples with other prompts. A run "
                  "would be stopped where the score, or the opinion alone, is highest. Lost: the annotator's "
                  "best rate on the validation videos minus its rate there.", "",
                  *table(["run", "annotator's best at", "score's choice at", "lost", "opinion's choice at",
                          "lost", "lost at the end"], stops)]
    wanted = sum(len(seeds_of(work, case, ONE_SEED)) for case in cases)
    if len(used) < wanted:
        lines += [f"{len(used)} of {wanted} runs are made. The command below makes the others.", ""]
    lines += [f"The runs took {minutes:.0f} minutes on one core in sum, at "
              f"{', '.join(sorted({part['commit'] for part in used}))}.", ""]
    work.write("endurance", "Does PRFL stay good? Recipes, learning rates and rewards over many iterations",
               lines, {"rows": rows, "judge": judged})


def stopped_by_the_judge(work, kept, cases):
    """What is lost by stopping where the judge chooses -> (numbers, rows of the table), one of each for every
    run that had a judge."""
    numbers, cells = {}, []
    for name in (case.name(seed) for case in cases for seed in work.seeds):
        curve = kept.get(name, {}).get("curve", {})
        if not any("judge" in row for row in curve.values()):
            continue
        steps = [int(step) for step in curve]
        rate = [row["qualified"] for row in curve.values()]
        opinion = [row["judge"] for row in curve.values()]
        score = [row["judge"] - OTHER_PROMPT_WEIGHT * row["judge_other_prompt"] for row in curve.values()]
        best, by_score, by_opinion = (int(np.argmax(values)) for values in (rate, score, opinion))
        found = {"best": steps[best], "score": steps[by_score], "lost": rate[best] - rate[by_score],
                 "opinion": steps[by_opinion], "lost_by_opinion": rate[best] - rate[by_opinion],
                 "lost_at_end": rate[best] - rate[-1]}
        numbers[name] = found
        cells.append([name, *(f"{value:.3f}" if isinstance(value, float) else value
                              for value in found.values())])
    return numbers, cells
