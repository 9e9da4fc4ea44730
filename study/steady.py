"""`python -m study.reproduce steady`, `why` and `speed`.

steady compares the two recipes of prfl.RECIPES. why combines their choices in all ways, and asks what keeps
the steady recipe from collapsing. speed asks how many CPU seconds of alignment each method needs to reach a
quality.

Unlike the runs of table1, these are validated while they train. That needs the world's own clips, so the
curated clips are rendered for each seed.
"""
from typing import NamedTuple

import numpy as np

from formats import runs
from formats.weights import SHIPPED
from model import PRESETS as MODELS
from report import claim_verdicts, claims_table, plot, show, summary, table
from scale import plan
from study.parts import (
    I2V,
    METRICS,
    TUNED,
    base_of,
    evaluations,
    named,
    read_metrics,
    reward_flags,
    reward_folder,
    train_reward_models,
)

WAN = "wan2.1-t2v-14b"
EVERY = 40                              # iterations between validations; train_align.py saves as often
COLUMNS = ("qualified", "physical_qualified", "deformity_qualified", "adherent", "speed", "brightness",
           "saturation")
LEVELS = (0.80, 0.85, 0.90, 0.95)       # for `speed`: shares of the validation videos that are qualified


def combination(step, passes, loss):
    """Flags of train_align.py or, if each video gets its own rewarded step, of study/why.py, which is the
    only script that can do that."""
    per_video = ("--rewarded_step", "per_video") if step == "per_video" else ()
    return (*per_video, "--rollout_passes", passes, "--reward_loss", loss)


PAPER, STEADY = combination("per_batch", 0, "linear"), combination("per_batch", 4, "logsigmoid")
RECIPES = {"PRFL, paper's recipe": ("--keep", 12, *PAPER), "PRFL, steady recipe": ("--keep", 12, *STEADY)}


class Run(NamedTuple):
    """A run: flags of train_align.py or study/why.py, which also make up the name of the run's folder."""
    flags: tuple
    name: str = "steady"                # how the folder's name begins: steady, why or speed-<method>
    one_seed: bool = False


def folder_of(work, seed, run):
    return work.folder / f"seed-{seed}" / named(run.name, run.flags)


def recipe_folder(work, seed, row):
    return folder_of(work, seed, Run(RECIPES[row]))


def length(work):
    """The number of iterations of a run whose flags give none: 480 with the preset full."""
    return 4 * work.preset["iterations"]


def part_of_run(work, seed, run):
    """The part that makes a run, as Work.run takes it: (folder, last file that it writes, script, *flags)."""
    method = method_of(run)
    script = ("-m", "study.why") if run.name == "why" else ("train_align.py", "--method", method)
    curated = work.folder / f"seed-{seed}" / named("curated", base_of(run.flags))
    reward = () if method == "sft" else ("--reward",
        reward_folder(work, seed, reward_flags(method, run.flags)) / "reward")
    default = {"--learning_rate": TUNED[method], "--lr_scheduler": "constant",
               "--max_train_steps": length(work), "--validation_steps": EVERY,
               "--num_validation": work.preset["videos"] // 2}
    added = [word for flag, value in default.items() if flag not in run.flags for word in (flag, value)]
    return (folder_of(work, seed, run), "transformer/config.json", *script, "--seed", seed, "--curated_dir",
            curated, *reward, *added, *run.flags)


def method_of(run):
    return run.name.removeprefix("speed-") if run.name.startswith("speed-") else "prfl"


def train(work, wanted):
    """Makes the runs [(seed, Run)], after their reward models. Among runs that share curated clips, one goes
    before the others and renders the clips."""
    train_reward_models(work, [(seed, reward_flags(method_of(run), run.flags)) for seed, run in wanted
                               if method_of(run) != "sft"])
    first = {(seed, base_of(run.flags)): (seed, run) for seed, run in reversed(wanted)}
    work.run([part_of_run(work, *each) for each in first.values()])
    work.run([part_of_run(work, *each) for each in wanted])


def seeds_of(work, run):
    return work.seeds[:1] if run.one_seed else work.seeds


def train_recipes(work):
    """Trains with both recipes and keeps every checkpoint."""
    train(work, [(seed, Run(flags)) for seed in work.seeds for flags in RECIPES.values()])


def metrics_of(work, seed, run):
    return read_metrics(folder_of(work, seed, run))


def curve(work, seed, run):
    """{iteration: share of the validation videos that are qualified}"""
    return {row["step"]: row["validation_qualified"] for row in metrics_of(work, seed, run)
            if "validation_qualified" in row}


def stopped_at_its_best(folder):
    """The checkpoint with the highest share of qualified validation videos, or the earliest of several. This
    is where somebody who watches would stop."""
    validated = {row["step"]: row["validation_qualified"] for row in read_metrics(folder) if row["step"]
                 and "validation_qualified" in row}
    return dict(runs.list_checkpoints(folder))[max(validated, key=validated.get)]


# ---- steady, why
SAID = {"per_video": "step per video", "per_batch": "step per batch", 0: "every step", 4: "at most 4 passes",
        "linear": "linear", "logsigmoid": "-log sigmoid"}


def run_of(*how, more=()):
    """The Run of a combination (step, passes, loss). A combination that is a recipe gives this recipe's Run,
    so that no run is made twice."""
    flags = (*more, *combination(*how))
    if how[0] == "per_video":
        return Run(flags, "why")
    return Run(next((kept for kept in RECIPES.values() if kept[2:] == flags), flags))


def steady_comparisons(work):
    """{title: {row: Run}}: the two recipes, and the steady one at other learning rates."""
    half = ("--max_train_steps", length(work) // 2)
    rates = {f"{rate:g}": run_of("per_batch", 4, "logsigmoid", more=("--learning_rate", rate, *half))
             for rate in (3e-5, 2e-4, 3e-4)}
    rates[f"{TUNED['prfl']:g}, twice as long"] = run_of("per_batch", 4, "logsigmoid")
    return {"The two recipes": {"the paper's recipe": run_of("per_batch", 0, "linear"),
                                "the steady recipe": run_of("per_batch", 4, "logsigmoid")},
            "Learning rates of the steady recipe": rates}


def why_comparisons(work):
    """{title: {row: Run}}: all combinations of step, passes and loss. With one seed: what else might prevent
    the collapse, what the steady recipe is sensitive to, and what else might mend the paper's recipe."""
    steady, paper = run_of("per_batch", 4, "logsigmoid"), run_of("per_batch", 0, "linear")
    by_video = run_of("per_video", 4, "logsigmoid")
    variant = lambda name, *how: Run(("--variant", name, *combination(*how)), "why")
    eight = [(step, passes, loss) for step in ("per_batch", "per_video") for passes in (0, 4)
             for loss in ("linear", "logsigmoid")]
    recipe = {eight[0]: " (the paper's recipe)", eight[3]: " (the steady recipe)"}
    parts = {", ".join(map(SAID.get, how)) + recipe.get(how, ""): run_of(*how) for how in eight}
    coarse = {
        "linear, every step": run_of("per_video", 0, "linear"),
        "linear, every step, noise .2 (1 - t) on the state": variant("noise", "per_video", 0, "linear"),
        "linear, at most 4 passes and an exact last one": variant("exact_last", "per_video", 4, "linear"),
        "linear, at most 4 passes": run_of("per_video", 4, "linear"),
        "linear, no rollout: curated clips noised": variant("no_rollout", "per_video", 0, "linear"),
        "-log sigmoid, no rollout: curated clips noised": variant("no_rollout", "per_video", 0, "logsigmoid"),
        "-log sigmoid, at most 4 passes": by_video}
    passes = {
        **{f"at most {n} pass{'es' * (n > 1)}": run_of("per_batch", n, "logsigmoid") for n in (1, 2, 4, 8)},
        "every step": run_of("per_batch", 0, "logsigmoid"),
        "at most 4 passes, N = 40": Run(("--num_inference_steps", 40, *STEADY))}
    elsewhere = {
        "the steady recipe": steady,
        "an AdamW for each kind of update": variant("moments", "per_batch", 4, "logsigmoid"),
        "without SFT updates": Run(("--no-sft_updates", *STEADY)),
        "twice as long": Run(("--max_train_steps", 2 * length(work), *STEADY)),
        "image-to-video": Run((*I2V, *STEADY)),
        "image-to-video, the paper's recipe": Run((*I2V, *PAPER))}
    mended = {
        "the paper's recipe": paper,
        "an AdamW for each kind of update": variant("moments", "per_batch", 0, "linear"),
        "a pull to the base, + (v - v_ref)^2": variant("pull", "per_batch", 0, "linear"),
        "an average of the weights, factor .98": variant("ema", "per_batch", 0, "linear"),
        "gradients clipped to norm .1": Run(("--max_grad_norm", 0.1, *PAPER)),
        "the reward clipped at 2": variant("ceiling", "per_batch", 0, "linear")}
    with_one_seed = lambda rows: {row: run._replace(one_seed=True) for row, run in rows.items()}
    return {"Rewarded step, rollout, loss": parts,
            "Why coarse rollouts hold (step per video), one seed": with_one_seed(coarse),
            "Passes and steps of the steady recipe, one seed": with_one_seed(passes),
            "The steady recipe elsewhere, one seed": with_one_seed(elsewhere),
            "The paper's recipe and one thing more, one seed": with_one_seed(mended)}


def trained_curves(work, compared):
    """Trains those runs of {title: {row: Run}} that are not made yet -> {title: {row: [one curve for each
    seed]}}"""
    wanted = dict.fromkeys((seed, run) for rows in compared.values() for run in rows.values()
                           for seed in seeds_of(work, run))
    train(work, list(wanted))
    return {title: {row: [curve(work, seed, run) for seed in seeds_of(work, run)] for row,
                    run in rows.items()} for title, rows in compared.items()}


def curve_lines(work, name, curves):
    """Draws the curves -> lines of their tables."""
    plot(work.results / f"{name}.png", {title: ("iteration",
                  {row: (list(seeds[0]), np.mean([list(seed.values()) for seed in seeds], 0).tolist())
                   for row, seeds in by_row.items()}) for title, by_row in curves.items()})
    lines = [f"The numbered columns are the share of {work.preset['videos'] // 2} validation videos that are "
             f"qualified after this many iterations, as a mean over the seeds ({name}.png has the curves). "
             "Best: each seed's own best share, which is partly luck.", ""]
    for title, by_row in curves.items():
        lines += [f"## {title}", "", *curve_table(by_row, EVERY)]
    return lines


def curve_table(curves, every):
    """curves {row: [a seed's {iteration: rate}]} -> lines of a table with the means over the seeds at some
    iterations."""
    at = [step for step in (1, 2, 3, 6, 12, 24)
          if any(step * every in seed for found in curves.values() for seed in found)]
    mean = lambda found, step: f"{np.mean([seed[step] for seed in found]):.3f}" if all(
        step in seed for seed in found) else ""
    return table(["", *(f"{step * every}" for step in at), "best, mean", "last, mean", "last, by seed"],
                 [[row, *(mean(found, step * every) for step in at),
                   f"{np.mean([max(seed.values()) for seed in found]):.3f}",
                   f"**{np.mean([seed[max(seed)] for seed in found]):.3f}**",
                   " ".join(f"{seed[max(seed)]:.3f}" for seed in found)] for row, found in curves.items()])


def test_rows(work):
    """-> [{row: {metric: values of the test videos}}], one dict for each seed. The rows: the base, the
    paper's recipe where somebody who watches validation would have stopped and at the end, and the steady
    recipe at the end."""
    paper, steady = RECIPES
    ends = evaluations(work, "test", {seed: {"base": SHIPPED["t2v"],
                               f"{paper}, at the end": recipe_folder(work, seed, paper),
                               f"{steady}, at the end": recipe_folder(work, seed, steady)}
                        for seed in work.seeds})
    best = f"{paper}, stopped at its best"
    stopped = evaluations(work, "paper-at-its-best",
                          {seed: {best: stopped_at_its_best(recipe_folder(work, seed, paper))}
                           for seed in work.seeds})
    return [{"base": end["base"], best: stop[best]} | end for end, stop in zip(ends, stopped)]


def quality_table(found):
    """found [{row: {metric: values of the test videos}}], one dict for each seed -> ({row: {metric: its
    summary}}, lines of a table)"""
    rows = {row: {metric: summary([f[row][metric] for f in found]) for metric in COLUMNS} for row in found[0]}
    return rows, table(["", *map(METRICS.get, COLUMNS), "qualified, by seed"],
                       [[row, f"**{show(**cells['qualified'])}**",
                         *(f"{cells[m]['mean']:.3f}" for m in COLUMNS[1:]),
                         " ".join(f"{v:.3f}" for v in cells["qualified"]["seeds"])] for row,
                        cells in rows.items()])


def expectations(work, found, curves, rates, verdicts):
    """[(what was asked of the steady recipe beforehand, what was found, yes or no)]"""
    paper, steady = RECIPES
    end, clean = f"{steady}, at the end", "clean renders"
    mean = lambda row, metric: float(np.mean([f[row][metric] for f in found]))
    falls = [max(seed.values()) - seed[max(seed)] for seed in curves]
    lasts = {rate: np.mean([seed[length(work) // 2] for seed in by_seed]) for rate, by_seed in rates.items()}
    drift = {metric: mean(end, metric) / mean(clean, metric) - 1
             for metric in ("speed", "brightness", "saturation")}
    yes = lambda so: "yes" if so else "no"
    return [["at least .95 of the test videos at the end", f"{mean(end, 'qualified'):.3f}",
             yes(mean(end, "qualified") >= 0.95)],
            ["on validation videos no seed ends more than .03 below its own best",
             " ".join(f"{fall:.3f}" for fall in falls), yes(max(falls) <= 0.03)],
            ["above the paper's recipe stopped at its best",
             show(verdicts[0]["difference"], verdicts[0]["interval"], "+"),
             yes(verdicts[0]["verdict"] == "holds")],
            ["speed, brightness, saturation within 5 % of clean renders",
             ", ".join(f"{m} {d:+.1%}" for m, d in drift.items()),
             yes(max(map(abs, drift.values())) <= 0.05)],
            [f"above .85 after {length(work) // 2} iterations at every rate",
             ", ".join(f"{r} {v:.3f}" for r, v in lasts.items()), yes(min(lasts.values()) > 0.85)]]


def steady(work):
    train_recipes(work)
    curves = trained_curves(work, steady_comparisons(work))
    found = test_rows(work)
    paper, own = RECIPES
    rows, lines = quality_table(found)
    values = {row: [f[row]["qualified"] for f in found] for row in rows}
    end = f"{own}, at the end"
    claims = claim_verdicts([(end, f"{paper}, stopped at its best", "not in it"),
                             (end, f"{paper}, at the end", "not in it"), (end, "base", "not in it")], values)
    recipes, rates = curves.values()
    asked = expectations(work, found, recipes["the steady recipe"], rates, claims)
    work.write("steady", "The steady recipe beside the paper's",
               [f"{work.preset['videos']} test videos ({work.said_seeds()}). \"At the end\" is after "
                f"{length(work)} iterations. \"Stopped at its best\" is the checkpoint that is best on "
                "validation videos; to stop there, somebody has to watch.", "", *lines, *claims_table(claims),
                "What was asked of the steady recipe beforehand:", "", *table(["", "found", "so"], asked),
                *curve_lines(work, "steady", curves)],
               {"rows": rows, "claims": claims, "asked": asked, "curves": curves})


def why(work):
    curves = trained_curves(work, why_comparisons(work))
    work.write("why", "Why the steady recipe holds", curve_lines(work, "why", curves), {"curves": curves})


# ---- speed
def racers(work):
    """{row: Run}: each method, validated more often than elsewhere. RGB ReFL, which needs its own reward
    models, has one seed."""
    short, often = work.preset["iterations"] * 4 // 3, ("--validation_steps", 10)
    refl = {f"RGB ReFL, {name}, {said} recipe": Run(("--frames_decoded", frames, "--recipe", recipe,
                                                     "--max_train_steps", short, *often), "speed-refl",
                                                    one_seed=True) for name,
            frames in (("first frame", "first"), ("all frames", "all")) for said,
            recipe in (("paper's", "paper"), ("steady", "steady"))}
    return {**{f"PRFL, {said} recipe": Run(("--recipe", recipe, "--max_train_steps", short, *often),
                                           "speed-prfl") for said,
               recipe in (("paper's", "paper"), ("steady", "steady"))}, **refl,
            "SFT": Run(("--max_train_steps", 4 * work.preset["iterations"], "--validation_steps", 20),
                       "speed-sft")}


def quality_over_seconds(rows):
    """Rows of a metrics.jsonl -> for each validation (CPU seconds of all updates until then, qualified
    rate)."""
    found, seconds = [], 0.0
    for row in rows:
        seconds += sum(value for key, value in row.items() if key.endswith("_cpu_seconds"))
        if "validation_qualified" in row:
            found.append((seconds, row["validation_qualified"]))
    return found


def seconds_to(level, found):
    """The CPU seconds after which a validation first reached a level, or None if no validation did."""
    return next((seconds for seconds, rate in found if rate >= level), None)


def wan_flops(method, recipe="paper", decoded="first"):
    """FLOPs, by scale/plan.py, of an iteration of Wan 14B: one clip of 81 frames of 832x480, N = 40."""
    return plan.costs(plan.Config(WAN, method=method, recipe=recipe, frames=81, size="832*480",
                                  num_inference_steps=40, batch_size=1, gpus=8, frames_decoded=decoded),
                      MODELS[WAN])["iteration_flops"]


def speed(work):
    compared = racers(work)
    train(work, [(seed, run) for run in compared.values() for seed in seeds_of(work, run)])
    found = {row: [quality_over_seconds(metrics_of(work, seed, run)) for seed in seeds_of(work, run)]
             for row, run in compared.items()}
    times = {row: {level: [seconds_to(level, seed) for seed in by_seed] for level in LEVELS} for row,
             by_seed in found.items()}

    def cell(by_seed):
        reached = [seconds for seconds in by_seed if seconds is not None]
        share = f" ({len(reached)} of {len(by_seed)})" * (len(reached) < len(by_seed))
        return f"{np.mean(reached):.0f}{share}" if reached else "never"

    def once(by_seed):
        """The mean of the seeds' seconds, or None if not every seed reached the level."""
        return None if None in by_seed else float(np.mean(by_seed))

    paper, own = "PRFL, paper's recipe", "PRFL, steady recipe"
    slow, fast = once(times[paper][0.90]), once(times[own][0.90])
    ratio = fast / slow if slow and fast else None
    kinds = {paper: ("prfl",), own: ("prfl", "steady"), "SFT": ("sft",)}
    for name, frames in (("first frame", "first"), ("all frames", "all")):
        kinds[f"RGB ReFL, {name}, paper's recipe"] = ("refl", "paper", frames)
        kinds[f"RGB ReFL, {name}, steady recipe"] = ("refl", "steady", frames)
    flops = {row: wan_flops(*kind) for row, kind in kinds.items()}
    curves, rows = {}, []
    for row, by_seed in found.items():
        grid = sorted({seconds for seed in by_seed for seconds, _ in seed})
        curves[row] = grid, np.mean([np.interp(grid, *zip(*seed)) for seed in by_seed], 0).tolist()
        highest = np.mean([max(rate for _, rate in seed) for seed in by_seed])
        seconds, last = np.mean([seed[-1] for seed in by_seed], 0)
        flags = compared[row].flags
        rows.append([row, *(cell(times[row][level]) for level in LEVELS), f"{highest:.3f}", f"{last:.3f}",
                     f"{seconds:.0f}", flags[flags.index("--max_train_steps") + 1]])
    share = "an unknown share of the paper recipe's CPU seconds, because not every seed of both reached it"
    if ratio:
        share = f"{ratio:.2f} of the paper recipe's CPU seconds"
    plot(work.results / "speed.png",
         {"qualified of the validation videos": ("CPU seconds of alignment", curves)})
    work.write("speed", "Quality over CPU seconds of alignment", [
        "The columns 0.80 to 0.95: CPU seconds of all updates, on one thread, until a validation first "
        "reached this rate of qualified videos, as a mean over the seeds that reached it "
        f"({work.said_seeds()}; RGB ReFL: one). A validation has {work.preset['videos'] // 2} videos and is "
        "made every 10 iterations, or every 20 updates of SFT. The CPU seconds of validations and of "
        "training the reward models are not counted. Highest and last: a run's highest and last validation, "
        "as a mean over the seeds.", "",
        *table(["", *(f"{level:.2f}" for level in LEVELS), "highest", "last", "CPU seconds in all",
                "iterations"], rows),
        f"To reach .90 the steady recipe takes {share} (asked for beforehand: at most a third).", "",
        "FLOPs of an iteration of Wan 14B with one clip of 81 frames of 832x480 and N = 40. They follow from "
        "the formulas of `python -m scale.plan` and are not measured:", "",
        *table(["", "PFLOPs"], [[row, f"{value / 1e15:.1f}"] for row, value in flops.items()])],
        {"seconds": {row: {str(level): values for level, values in by_level.items()}
                     for row, by_level in times.items()},
         "curves": found, "ratio_at_.90": ratio, "flops": flops})
