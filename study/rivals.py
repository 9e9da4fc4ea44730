"""`python -m study.reproduce rivals`: PRFL beside other ways to learn from the same latent reward.

DiffusionNFT and Flow-GRPO are reinforcement learning: they get the reward's value. LeapAlign and Direct-Align
get its gradient, as PRFL does, but judge finished videos (study/why.py). All have the same reward model, the
same prompts and the same curated clips. All but DiffusionNFT, which is better without, make an SFT update in
each iteration. What counts is the qualified rate at equal CPU seconds of training: an iteration of a rival
takes longer, because its videos are sampled to the end. As the runs were made on machines that were more or
less busy, the CPU seconds of an iteration are measured for all methods in turn, on one machine that does
nothing else. The reward models' own training and the validations are not counted.

A finished run is kept in results/rivals_runs.json and is not made again, just as study/endurance.py keeps its
runs in results/endurance_runs.json. The runs by which the rivals' settings were chosen are in
results/rivals_trials.json.
"""
import math
import platform
from typing import NamedTuple

import numpy as np

from formats.weights import SHIPPED
from report import confidence_interval, plot, show, summary, table, verdict
from study.endurance import PANEL, TESTED, VALIDATED, finished, keep, kept_in, read_kept, test_values
from study.parts import HOME, commit, read_metrics, reward_folder
from study.steady import seconds_to

FILE, TRIALS, SECONDS = "rivals_runs.json", "rivals_trials.json", "rivals_seconds.json"
TIMED, TURNS = 24, 2                                            # iterations of each method, in so many turns
LEVELS = (0.60, 0.70, 0.80, 0.90)                               # of the validation videos
PRFL = "PRFL, steady recipe"


class Rival(NamedTuple):
    """One run, but for its seed. length, every: iterations, and those between validations."""
    row: str
    flags: tuple
    length: int
    every: int
    script: tuple = ("train_align.py",)
    recipe: str = "rival"

    def name(self, seed):
        return f"{self.row}, {self.length}, seed {seed}"

    def reward_flags(self):
        """Flags of train_reward.py."""
        return "--mismatched", 0.25


# The settings of NFT and GRPO are the best that were tried on seed 0; those of LeapAlign and Direct-Align are
# PRFL's, untuned. The lengths give all about the CPU seconds of PRFL's 480 iterations.
STEADY = ("--rollout_passes", 4, "--reward_loss", "logsigmoid", "--learning_rate", 2e-4, "--lr_scheduler",
          "linear")
NFT = ("--method", "nft", "--no-sft_updates", "--learning_rate", 3e-4)
FULL = (Rival(PRFL, ("--method", "prfl"), 480, 40),
        Rival("DiffusionNFT", NFT, 160, 20),
        Rival("DiffusionNFT, falling rate", (*NFT, "--lr_scheduler", "linear"), 160, 20),
        Rival("Flow-GRPO", ("--method", "grpo", "--inner_updates", 1, "--learning_rate", 3e-4,
                            "--reward_weight", 5.0), 240, 30),
        Rival("LeapAlign", ("--variant", "leaps", *STEADY), 300, 30, ("-m", "study.why")),
        Rival("Direct-Align", ("--variant", "direct_align", *STEADY), 400, 40, ("-m", "study.why")),
        Rival("SFT", ("--method", "sft", "--learning_rate", 3e-4), 1440, 120))


# ---- one run
def rivals_of(work):
    """FULL, or with --preset quick the same half as long."""
    shorter = 2 if work.config.preset == "quick" else 1
    return [rival._replace(length=rival.length // shorter, every=rival.every // shorter) for rival in FULL]


def part_of_rival(work, seed, rival):
    """(folder, file that it ends with, script, *flags), as Work.run takes them."""
    words = rival.name(seed).replace(", ", "_").replace(" ", "-")
    reward = ()
    if rival.row != "SFT":
        reward = "--reward", reward_folder(work, seed, rival.reward_flags()) / "reward"
    return (work.folder / f"seed-{seed}" / f"rivals-{words}", "transformer/config.json", *rival.script,
            *rival.flags, "--seed", seed, "--curated_dir", work.folder / f"seed-{seed}" / "curated", *reward,
            "--max_train_steps", rival.length, "--validation_steps", rival.every, "--num_validation",
            VALIDATED)


def seconds_per_iteration(work):
    """{row: CPU seconds of a mean iteration}, which are kept in SECONDS. Nothing else may run meanwhile."""
    kept, rivals = kept_in(work, SECONDS), rivals_of(work)
    if {rival.row for rival in rivals} <= kept.get("seconds", {}).keys():
        return kept["seconds"]
    found = {rival.row: [] for rival in rivals}
    for turn in range(TURNS):
        for rival in rivals:
            _, last, *command = part_of_rival(work, 0, rival._replace(length=TIMED))
            if rival.row != "SFT":
                command[command.index("--reward") + 1] = SHIPPED["t2v"] / "reward"
            command[command.index("--num_validation") + 1] = 0
            at = command.index("--validation_steps")
            del command[at:at + 2]
            words = rival.row.replace(", ", "_").replace(" ", "-")
            folder = work.folder / "seed-0" / f"rivals-seconds-{words}-{turn}"
            work.run([(folder, last, *command)], jobs=1)
            # the first iterations are slower: memory is taken, code is loaded
            found[rival.row] += [sum(value for name, value in row.items() if name.endswith("_cpu_seconds"))
                                 for row in read_metrics(folder) if row["step"] > 2]
    seconds = {row: round(float(np.mean(values)), 4) for row, values in found.items()}
    keep(work, SECONDS, {"seconds": seconds, "turns": {row: [
        round(float(np.mean(part)), 4) for part in np.array_split(values, TURNS)]
        for row, values in found.items()}, "hardware": platform.processor() or platform.machine(),
        "commit": commit()})
    return seconds


def timed(part, seconds):
    """A kept run, whose curve has `seconds` for each iteration."""
    return part | {"curve": {step: point | {"cpu_seconds": int(step) * seconds}
                             for step, point in part["curve"].items()}}


def passes(flags, N=16):
    """Passes of a batch through the generator, or through PAVRM, in a mean iteration -> (forward, backward).

    flags: of train_align.py or study.why. N: Euler steps of a rollout. Until a group parts, GRPO makes one
    rollout for the whole group.
    """
    given = lambda name, default: flags[flags.index(name) + 1] if name in flags else default
    method, k, group = flags[1], given("--inner_updates", 4), given("--group_size", 8)
    sft = 0 if "--no-sft_updates" in flags else 1
    if method == "sft":
        return 1, 1
    at_most = given("--rollout_passes", 4 if method == "prfl" else 10)
    stride = math.ceil(N / at_most) if at_most else 1
    rollout = lambda steps: math.ceil(steps / stride)
    if method == "direct_align":                                # a step with gradients, and PAVRM
        return sft + rollout(N) + 2, sft + 2
    if method == "leaps":                                       # two leaps with gradients, and PAVRM
        made = [rollout(first) + rollout(second - first) + rollout(N - second)
                for second in range(N) for first in range(second)]
        return sft + float(np.mean(made)) + 3, sft + 3
    if method == "prfl":                                        # a step with gradients, and PAVRM
        return sft + float(np.mean([rollout(step - 1) for step in range(1, N + 1)])) + 2, sft + 2
    if method == "nft":                                         # velocities of the old policy and of the new
        return sft + rollout(N) + 1 + 2 * k, sft + k
    sampled = np.mean([rollout(first) / group + k + rollout(N - first - k) for first in range(N - k + 1)])
    start = k if given("--kl_weight", 0.04) else 0
    return sft + float(sampled) + 1 + start + k, sft + k


# ---- what they say
def curve_of_seconds(part):
    """A kept run -> [(CPU seconds of all updates until then, qualified rate)] at each validation."""
    return [(row["cpu_seconds"], row["qualified"]) for row in part["curve"].values()]


def rate_at(part, seconds):
    """The qualified rate at the first validation after this many CPU seconds or, if there is none, at the
    last one."""
    curve = curve_of_seconds(part)
    return next((rate for spent, rate in curve if spent >= seconds), curve[-1][1])


def as_values(rates):
    """Rates of the seeds -> [seeds, validation videos], with one 1 for each qualified video. Which videos
    were qualified is not kept, so differences are not paired."""
    return np.array([np.arange(VALIDATED) < round(rate * VALIDATED) for rate in rates], float)


def comparison(what, better, worse):
    """Rates of the seeds -> the row of a table: whether the first are above the others, and the numbers."""
    low, high = confidence_interval(as_values(better), as_values(worse))
    difference = float(np.mean(better) - np.mean(worse))
    return {"claim": what, "difference": difference, "interval": [low, high],
            "seeds": [a - b for a, b in zip(better, worse)], "verdict": verdict(low, high)}


def comparisons(row, parts, prfl, steps):
    """A rival beside PRFL, at equal CPU seconds and where each was at its best, and beside the base. parts,
    prfl: kept runs of the same seeds. steps: PRFL's iterations whose CPU seconds the rival gets too."""
    best = lambda parts: [max(rate for _, rate in curve_of_seconds(part)) for part in parts]
    found = []
    for step in steps:
        rates = [mine["curve"][str(step)]["qualified"] for mine in prfl]
        seconds = [mine["curve"][str(step)]["cpu_seconds"] for mine in prfl]
        others = [rate_at(part, spent) for part, spent in zip(parts, seconds)]
        found.append(comparison(f"after the CPU seconds of {step} iterations of PRFL, PRFL above {row}",
                                rates, others))
    base = [part["curve"]["0"]["qualified"] for part in parts]
    return [*found, comparison(f"each at its best validation, PRFL above {row}", best(prfl), best(parts)),
            comparison(f"{row} at its best validation above the base", best(parts), base)]


# ---- what was tried
def trial_rows(trials):
    """The runs of results/rivals_trials.json, of which the first is PRFL's -> (numbers, rows of a table).

    Each: the rate at every validation, the best one with its interval, and how far PRFL's last one lies above
    the first one after as many CPU seconds, if the run was that long. All validations are of the same videos,
    so the difference is paired.
    """
    bits = lambda point: np.array([[float(bit) for bit in point["qualified"]]])             # [1, videos]
    prfl = list(trials[0]["validations"].values())[-1]
    numbers, rows = [], []
    for trial in trials:
        points = {step: point for step, point in trial["validations"].items() if int(step)}
        rates = {step: float(bits(point).mean()) for step, point in points.items()}
        said = ", ".join(f"{rates[step]:.3f} ({step}, {point['cpu_seconds']:.0f} s)"
                         for step, point in points.items())
        best = points[max(rates, key=rates.get)]
        after = [point for point in points.values() if point["cpu_seconds"] >= prfl["cpu_seconds"]]
        above = summary(bits(prfl) - bits(after[0])) if after and trial is not trials[0] else None
        numbers.append({"flags": trial["flags"], "rates": rates, "best": summary(bits(best)),
                        "spent": {step: point["cpu_seconds"] for step, point in points.items()},
                        "reward": {step: point.get("reward") for step, point in points.items()},
                        "prfl_above": above})
        rows.append([f"`{trial['flags']}`", said, show(**numbers[-1]["best"]),
                     show(**above, sign="+") if above else ""])
    return numbers, rows


def trial_lines():
    """-> (numbers, lines about what was tried)"""
    kept = read_kept(HOME / "results" / TRIALS)
    if not kept:
        return {}, []
    numbers, rows = trial_rows(kept["runs"])
    base = [float(bit) for bit in kept["runs"][0]["validations"]["0"]["qualified"]]
    count = len(base)
    return {"trials": numbers, "base": summary([base])}, [
        f"What was tried for the rivals, on seed {kept['seed']} with a reward model that saw no mismatched "
        f"prompts, by {count} validation videos: the qualified rate (after so many iterations and CPU "
        "seconds), the best one, and how far PRFL's last one lies above the first one that had its CPU "
        "seconds (one seed: intervals are over videos alone). Some runs were stopped before that.", "",
        *table(["flags of train_align.py", "qualified", "best", "PRFL above it"], rows)]


def rivals(work):
    prfl, *others = rivals_of(work)
    kept = {}
    for methods in ([prfl], others):                        # PRFL's run of a seed renders the curated clips
        wanted = [(seed, rival) for rival in methods for seed in work.seeds]
        kept |= finished(work, wanted, FILE, part_of_rival)
    report(work, kept, seconds_per_iteration(work))


def report(work, kept, seconds):
    """Writes the table and the curves of the runs that are kept: of each method those seeds of which PRFL's
    run is kept too. seconds: {row: CPU seconds of an iteration}."""
    curves, cells, rows, compared, made = {}, [], {}, [], 0
    methods = rivals_of(work)
    for rival in methods:
        row = rival.row
        seeds = [seed for seed in work.seeds if {methods[0].name(seed), rival.name(seed)} <= kept.keys()]
        if not seeds:
            continue
        parts, prfl = ([timed(kept[r.name(seed)], seconds[r.row]) for seed in seeds]
                       for r in (rival, methods[0]))
        made += len(parts)
        if row != PRFL:
            compared += comparisons(row, parts, prfl, (methods[0].length // 4, methods[0].length))
        found = [curve_of_seconds(part) for part in parts]
        grid = sorted({seconds for seed in found for seconds, _ in seed})
        curves[row] = grid, np.mean([np.interp(grid, *zip(*seed)) for seed in found], 0).tolist()
        reached = {level: [seconds_to(level, seed) for seed in found] for level in LEVELS}
        last = [list(part["curve"].values())[-1] for part in parts]
        test = summary(test_values(parts, "test, firm"))
        means = dict(zip(PANEL, np.mean([part["test"]["test means"] for part in parts], 0).tolist()))
        adherent = float(test_values(parts, "test, firm", "adherent").mean())
        rewards = [point["reward"] for point in last if "reward" in point]
        ends = {name: [point[name] for point in last] for name in ("qualified", "cpu_seconds")}
        rows[row] = {"qualified": test, "adherent": {"mean": adherent}, "seconds": reached,
                     "best": [max(rate for _, rate in seed) for seed in found],
                     "cpu_seconds": ends["cpu_seconds"], "reward": rewards,
                     "passes": passes(rival.flags),
                     **{name: {"mean": mean} for name, mean in means.items()}}
        cells.append([row, len(parts), "{:.1f} + {}".format(*passes(rival.flags)),
                      *(seconds_cell(reached[level]) for level in LEVELS),
                      f"{np.mean(rows[row]['best']):.3f}", f"{np.mean(ends['qualified']):.3f}",
                      f"{np.mean(ends['cpu_seconds']):.0f}", show(**test), f"{adherent:.3f}",
                      *(f"{mean:.3f}" for mean in means.values()),
                      f"{np.mean(rewards):.1f}" if rewards else ""])
    wanted, lines = len(methods) * len(work.seeds), []
    if made < wanted:
        lines = [f"{made} of {wanted} runs are made. The command below makes the others.", ""]
    if made:
        lines += run_lines(cells, compared)
        plot(work.results / "rivals.png",
             {"qualified of the validation videos": ("CPU seconds of training", curves)})
    trials, more = trial_lines()
    work.write("rivals", "Rivals with the same latent reward", [*lines, *more],
               {"rows": rows, "claims": compared, **trials})


def run_lines(cells, compared):
    """The tables of the runs: rows of the first, and what `comparisons` gave."""
    lines = [f"CPU seconds of training, one thread, until a validation ({VALIDATED} videos) first reached a "
             "rate, mean over the seeds that did; the best and the last validation, and the CPU seconds of "
             f"the whole run. Then {TESTED} test videos at the end, what the annotator sees there, and the "
             "reward that the method itself last saw. Passes: forward and backward ones of a batch "
             "through the generator or PAVRM, in a mean iteration. The CPU seconds of an iteration were "
             "measured for all methods in turn on one machine (rivals_seconds.json). If a run has fewer CPU "
             "seconds than PRFL's, its last validation is compared.", "",
             *table(["", "seeds", "passes", *(f"{level:.2f}" for level in LEVELS), "best", "last",
                     "CPU seconds", "test videos", "adherent", *PANEL, "reward"], cells)]
    return [*lines, "PRFL beside each, on the validation videos:", "", *table(
        ["claim", "difference", "by seed", "verdict"],
        [[found["claim"], show(found["difference"], found["interval"], "+"),
          " ".join(f"{x:+.3f}" for x in found["seeds"]), found["verdict"]] for found in compared])]


def seconds_cell(found):
    """CPU seconds of the seeds that reached a level, None of the others -> a cell."""
    reached = [seconds for seconds in found if seconds is not None]
    share = f" ({len(reached)} of {len(found)})" * (len(reached) < len(found))
    return f"{np.mean(reached):.0f}{share}" if reached else "never"
