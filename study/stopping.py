"""`python -m study.reproduce stopping`: can a second reward model stop the paper's recipe in time, without an
annotator?

`train_align.py --judge` chooses best/ by a second reward model, the judge, which was trained on other samples
and from another seed: here it is the reward model of the next seed. The annotator grades the same validation
videos, but its grades choose nothing.
"""
import numpy as np

from report import plot, table
from study.parts import TUNED, Work, read_metrics, reward_folder, train_rewards
from study.steady import EVERY, PAPER
from validation import OTHER_PROMPT_WEIGHT, judges_score

WITHIN = 0.03       # the choice should lose at most this much of the annotator's best rate; asked beforehand


def run_folder(work, seed):
    return work.folder / f"seed-{seed}" / "stopping"


def train(work):
    """Aligns with the paper's recipe and a judge, for twice the iterations of table 1."""
    both = Work(work.config)
    both.seeds = range(max(2, len(work.seeds)))     # a single seed, too, needs the next one's reward model
    train_rewards(both, [()])
    work.used |= both.used
    wanted = []
    for seed in work.seeds:
        judge = reward_folder(work, (seed + 1) % len(both.seeds)) / "reward"
        wanted.append((
            run_folder(work, seed), "transformer/config.json", "train_align.py", "--seed", seed,
            "--curated_dir", work.folder / f"seed-{seed}" / "curated",
            "--reward", reward_folder(work, seed) / "reward", "--judge", judge, *PAPER,
            "--learning_rate", TUNED["prfl"], "--lr_scheduler", "constant",
            "--max_train_steps", 2 * work.preset["iterations"], "--validation_steps", EVERY,
            "--num_validation", work.preset["videos"] // 2))
    work.run(wanted)


def choice(rows):
    """What the judge's choice costs. rows: of metrics.jsonl.

    Returns the iterations "steps" of the validations and their "curves"; the iterations that are "best" for
    the annotator and "chosen" by the judge's score; and how much of the annotator's best rate is "lost"
    at the chosen iteration, "lost_by_opinion" (if the judge's probability alone chose) and "lost_at_end".
    """
    rows = [row for row in rows if "validation_judge" in row]
    steps = [row["step"] for row in rows]
    curves = {"annotator": [row["validation_qualified"] for row in rows],
              "judge": [row["validation_judge"] for row in rows],
              "judge, another prompt": [row["validation_judge_other_prompt"] for row in rows],
              "score": [judges_score(row) for row in rows]}
    rate = curves["annotator"]
    best, by_opinion, chosen = (int(np.argmax(curves[who])) for who in ("annotator", "judge", "score"))
    return {"steps": steps, "curves": curves, "best": steps[best], "chosen": steps[chosen],
            "lost": max(rate) - rate[chosen], "lost_by_opinion": max(rate) - rate[by_opinion],
            "lost_at_end": max(rate) - rate[-1]}


def stopping(work):
    train(work)
    found, panels, rows = {}, {}, []
    for seed in work.seeds:
        one = found[f"seed {seed}"] = choice(read_metrics(run_folder(work, seed)))
        curves = {who: (one["steps"], values) for who, values in one["curves"].items()}
        panels[f"seed {seed}"] = ("iteration", curves)
        rows.append([f"seed {seed}", f"{one['best']}", f"{one['chosen']}", f"{one['lost']:.3f}",
                     f"{one['lost_by_opinion']:.3f}", f"{one['lost_at_end']:.3f}"])
    plot(work.results / "stopping.png", panels)
    lost = max(one["lost"] for one in found.values())
    holds = lost <= WITHIN
    verdict = "holds" if holds else "does not hold"
    lines = [f"PRFL with the paper's recipe for {2 * work.preset['iterations']} iterations, validated on "
             f"{work.preset['videos'] // 2} videos every {EVERY} iterations. The judge is the reward model "
             "of the next seed. `best/` is the checkpoint with the highest score: the probability that the "
             f"judge gives to the samples being good, minus {OTHER_PROMPT_WEIGHT:g} times the one that it "
             "gives with another prompt. Lost: the annotator's best rate minus its rate at the choice.", "",
             *table(["", "annotator's best at", "judge's choice at", "lost", "lost by its opinion alone",
                     "lost without stopping"], rows),
             f"The most that was lost is {lost:.3f}. Asked for beforehand: at most {WITHIN:g}, which "
             f"{verdict}.", ""]
    for name, one in found.items():
        curves = [[who, *(f"{value:.3f}" for value in values)] for who, values in one["curves"].items()]
        lines += [f"## {name}", "", *table(["iteration", *map(str, one["steps"])], curves)]
    work.write("stopping", "A second reward model chooses when to stop", lines,
               {"found": found, "holds": holds})
