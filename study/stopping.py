"""`python -m study.reproduce stopping`: does a second reward model stop the paper's recipe in time, where there is no annotator?

train_align.py --judge chooses best/ by a reward model that was trained on other samples and from another seed: here that of
the next seed. The embedded world's annotator watches the same validation videos and has no say.
"""
import json

import numpy as np

from report import plot, table
from study.parts import TUNED, Work, reward_folder, train_rewards
from study.steady import EVERY, PAPER
from validation import LEAST_GAIN, best_place

WITHIN = 0.03                                                   # of the annotator's best: what was asked for beforehand


def run_folder(work, seed):
    return work.folder / f"seed-{seed}" / "stopping"


def train(work):
    """Twice as long as the paper's recipe is best for, a judge beside each run."""
    both = Work(work.config)
    both.seeds = range(max(2, len(work.seeds)))                 # one seed alone has the next one's judge all the same
    train_rewards(both, [()])
    work.used |= both.used
    judge = lambda seed: reward_folder(work, (seed + 1) % len(both.seeds)) / "reward"
    work.run([(run_folder(work, seed), "transformer/config.json", "train_align.py", "--seed", seed,
               "--curated_dir", work.folder / f"seed-{seed}" / "curated", "--reward", reward_folder(work, seed) / "reward",
               "--judge", judge(seed), *PAPER, "--learning_rate", TUNED["prfl"],
               "--max_train_steps", 2 * work.preset["iterations"], "--validation_steps", EVERY,
               "--num_validation", work.preset["videos"] // 2) for seed in work.seeds])


def choice(rows):
    """metrics.jsonl's rows -> what the judge's choice costs: its iteration and rate, the annotator's, and both curves."""
    rows = [row for row in rows if "validation_judge" in row]
    steps, judge, annotator = ([row[key] for row in rows] for key in ("step", "validation_judge", "validation_qualified"))
    mine, highest = best_place(judge, LEAST_GAIN), int(np.argmax(judge))
    return {"steps": steps, "judge": judge, "annotator": annotator, "chosen": steps[mine], "best": steps[int(np.argmax(annotator))],
            "lost": max(annotator) - annotator[mine], "lost_by_highest": max(annotator) - annotator[highest],
            "lost_at_end": max(annotator) - annotator[-1]}


def stopping(work):
    train(work)
    read = lambda seed: (run_folder(work, seed) / "metrics.jsonl").read_text().splitlines()
    found = {f"seed {seed}": choice(map(json.loads, read(seed))) for seed in work.seeds}
    lost, videos = [one["lost"] for one in found.values()], work.preset["videos"] // 2
    plot(work.results / "stopping.png", {name: ("iteration", {
        "annotator: share qualified": (one["steps"], one["annotator"]), "judge: probability of good": (one["steps"], one["judge"])})
        for name, one in found.items()})
    lines = [f"PRFL by the paper's recipe, {2 * work.preset['iterations']} iterations, {videos} validation videos every {EVERY}. "
             "The judge is the reward model of the next seed; `best/` is its choice: the first validation that none behind it "
             f"exceeds by more than {LEAST_GAIN:g}, gain by gain. Lost: the annotator's best rate less its rate there.", "",
             *table(["", "annotator's best at", "judge's choice at", "lost", "lost by its highest", "lost without stopping"],
                    [[name, f"{one['best']}", f"{one['chosen']}", f"{one['lost']:.3f}", f"{one['lost_by_highest']:.3f}",
                      f"{one['lost_at_end']:.3f}"] for name, one in found.items()]),
             f"Lost at most {max(lost):.3f}; asked for beforehand: at most {WITHIN:g}, which "
             + ("holds." if max(lost) <= WITHIN else "does not hold."), ""]
    for name, one in found.items():
        lines += [f"## {name}", "", *table(["iteration", *map(str, one["steps"])], [
            [who, *(f"{value:.3f}" for value in one[who])] for who in ("annotator", "judge")])]
    work.write("stopping", "A second reward model chooses when to stop", lines, {"found": found, "holds": max(lost) <= WITHIN})
