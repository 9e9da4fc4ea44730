"""`python -m study.reproduce elsewhere`: today's defaults with two other generators of the embedded world.

48x48            clips of 48x48, which are 27 tokens and not 12; the base is checkpoints/mid
image-to-video   the generator is also given the first frame; the base is checkpoints/i2v

All settings are those that were chosen with the text-to-video base at 32x32. Both recipes have the same
reward model: a quarter of each of its batches got another video's prompt and the label bad. The paper's
recipe is not stopped, so the table shows where it ends.
"""
import numpy as np

from formats.metadata import from_json
from formats.weights import SHIPPED
from report import claim_verdicts, claims_table, show
from study.endurance import EVERY, VALIDATED, curve_of, fall
from study.parts import I2V, MID, named, read_metrics, reward_folder, train_reward_models
from study.resampling import passes
from study.search import STEPS
from study.steady import curve_lines, length, quality_table

GENERATORS = {"48x48": (MID, SHIPPED["t2v mid"]), "image-to-video": (I2V, SHIPPED["i2v"])}
BASE, PAPER, STEADY, CLEAN = "base", "PRFL, the paper's recipe", "PRFL, the steady recipe", "clean renders"
BASE_SEARCHED, STEADY_SEARCHED = (f"{row}, best of {n} for {passes(n) / STEPS:.1f} times the passes"
                                  for row, n in ((BASE, 4), (STEADY, 2)))
RECIPES = {PAPER: "paper", STEADY: "steady"}
MISMATCHED = ("--mismatched", 0.25)


def aligned(work, seed, flags, row):
    """The part that aligns a generator, as Work.run takes it: (folder, last file that it writes, script,
    *flags). Its folder becomes a row of the table."""
    home = work.folder / f"seed-{seed}"
    return (home / named(f"elsewhere-{RECIPES[row]}", flags), "transformer/config.json", "train_align.py",
            "--recipe", RECIPES[row], "--seed", seed, *flags, "--curated_dir", home / named("curated", flags),
            "--reward", reward_folder(work, seed, (*MISMATCHED, *flags)) / "reward",
            "--max_train_steps", length(work), "--validation_steps", EVERY, "--num_validation", VALIDATED)


def evaluated(work, seed, flags, base):
    """Evaluates the rows of one generator and one seed -> {row: {metric: values of the test videos}}"""
    home = work.folder / f"seed-{seed}"
    reward = reward_folder(work, seed, (*MISMATCHED, *flags)) / "reward"
    paper, steady = (aligned(work, seed, flags, row)[0] for row in RECIPES)
    found = {}
    for name, folders, more in (("one", {BASE: base, PAPER: paper, STEADY: steady}, ()),
                                ("best-of-4", {BASE_SEARCHED: base}, ("--best_of", 4)),
                                ("best-of-2", {STEADY_SEARCHED: steady}, ("--best_of", 2))):
        folder = home / named(f"elsewhere-evaluation-{name}", flags)
        short = {f"g{i}": row for i, row in enumerate(folders)}
        work.run([(folder, "per_video.json", "evaluate.py", *(f"{g}={folders[row]}" for g, row in
                   short.items()), "--num_videos", work.preset["videos"], "--reward", reward, *flags, *more)])
        panel = from_json((folder / "per_video.json").read_text())
        found = {row: panel[g] for g, row in short.items()} | {CLEAN: panel[CLEAN]} | found
    order = (BASE, BASE_SEARCHED, PAPER, STEADY, STEADY_SEARCHED, CLEAN)
    return {row: {metric: np.array(values) for metric, values in found[row].items()} for row in order}


def elsewhere(work):
    numbers, lines, curves = {}, [], {}
    for name, (flags, base) in GENERATORS.items():
        train_reward_models(work, [(seed, (*MISMATCHED, *flags)) for seed in work.seeds])
        for row in RECIPES:                 # the first recipe of a seed renders the clips for the second one
            work.run([aligned(work, seed, flags, row) for seed in work.seeds])
        found = [evaluated(work, seed, flags, base) for seed in work.seeds]
        cells, rows = quality_table(found)
        pairs = ((STEADY, PAPER), (STEADY, BASE), (BASE_SEARCHED, BASE), (STEADY_SEARCHED, STEADY))
        claims = claim_verdicts([(*pair, "not in it") for pair in pairs],
                                {row: [seed[row]["qualified"] for seed in found] for row in cells})
        validated = {row: [curve_of(read_metrics(aligned(work, seed, flags, row)[0])) for seed in work.seeds]
                     for row in RECIPES}
        falls = {row: dict(zip(("difference", "interval"), fall(by_seed)))
                 for row, by_seed in validated.items()}
        curves[f"Validation, {name}"] = {row: [{int(step): point["qualified"] for step, point in seed.items()}
                              for seed in by_seed] for row, by_seed in validated.items()}
        numbers[name] = {"rows": cells, "claims": claims, "fall": falls}
        said = ", ".join(f"{row.removeprefix('PRFL, ')} {show(*fallen.values(), '+')}"
                         for row, fallen in falls.items())
        lines += [f"## {name}", "", *rows, *claims_table(claims), "The mean of the last quarter of the "
                  f"validations minus that of the best quarter: {said}.", ""]
    work.write("elsewhere", "Today's defaults at a second size, and with image-to-video", [
        f"{work.preset['videos']} test videos ({work.said_seeds()}), after {length(work)} iterations. "
        "Learning rates, numbers of steps, N and K are those that were chosen with the text-to-video base at "
        "32x32. A quarter of each batch of the reward models had another video's prompt and the label bad. "
        "Best of n resamples candidates (search.py).", "", *lines, *curve_lines(work, "elsewhere", curves)],
        {**numbers, "curves": curves})
