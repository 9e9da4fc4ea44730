"""`python -m study.reproduce stopping`: does a second reward model stop the paper's recipe in time, where there is no annotator?

train_align.py --judge chooses best/ by a reward model that was trained on other samples and from another seed: here that of
the next seed. The embedded world's annotator watches the same validation videos and has no say.
"""
import json

import numpy as np

from report import plot, table
from study.parts import TUNED, Work, reward_folder, train_rewards
from study.steady import EVERY, PAPER
from validation import OTHER_PROMPT, judges_score

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
    """metrics.jsonl's rows -> what the judge's choice costs: its iteration and rate, the annotator's, and the curves."""
    rows = [row for row in rows if "validation_judge" in row]
    curves = {"annotator": [row["validation_qualified"] for row in rows], "judge": [row["validation_judge"] for row in rows],
              "judge, another prompt": [row["validation_judge_other_prompt"] for row in rows], "score": [*map(judges_score, rows)]}
    rate, steps = curves["annotator"], [row["step"] for row in rows]
    at = {who: int(np.argmax(curves[who])) for who in ("annotator", "judge", "score")}
    return {"steps": steps, "curves": curves, "best": steps[at["annotator"]], "chosen": steps[at["score"]],
            "lost": max(rate) - rate[at["score"]], "lost_by_opinion": max(rate) - rate[at["judge"]],
            "lost_at_end": max(rate) - rate[-1]}


def stopping(work):
    train(work)
    read = lambda seed: (run_folder(work, seed) / "metrics.jsonl").read_text().splitlines()
    found = {f"seed {seed}": choice(map(json.loads, read(seed))) for seed in work.seeds}
    lost, videos = [one["lost"] for one in found.values()], work.preset["videos"] // 2
    plot(work.results / "stopping.png", {name: ("iteration", {who: (one["steps"], one["curves"][who]) for who in one["curves"]})
                                         for name, one in found.items()})
    lines = [f"PRFL by the paper's recipe, {2 * work.preset['iterations']} iterations, {videos} validation videos every {EVERY}. "
             "The judge is the reward model of the next seed. `best/` is the checkpoint of its highest score: the probability it "
             f"gives samples to be good, less {OTHER_PROMPT:g} of the one it gives them for another prompt. Lost: the annotator's "
             "best rate less its rate there.", "",
             *table(["", "annotator's best at", "judge's choice at", "lost", "lost by its opinion alone", "lost without stopping"],
                    [[name, f"{one['best']}", f"{one['chosen']}", f"{one['lost']:.3f}", f"{one['lost_by_opinion']:.3f}",
                      f"{one['lost_at_end']:.3f}"] for name, one in found.items()]),
             f"Lost at most {max(lost):.3f}; asked for beforehand: at most {WITHIN:g}, which "
             + ("holds." if max(lost) <= WITHIN else "does not hold."), ""]
    for name, one in found.items():
        lines += [f"## {name}", "", *table(["iteration", *map(str, one["steps"])], [
            [who, *(f"{value:.3f}" for value in values)] for who, values in one["curves"].items()])]
    work.write("stopping", "A second reward model chooses when to stop", lines, {"found": found, "holds": max(lost) <= WITHIN})
