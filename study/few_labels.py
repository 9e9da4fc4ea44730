"""`python -m study.reproduce few_labels`: how many labels does it take?

Reward models learn from a random part of a seed's labelled samples. Then the generator is aligned with each
of them, with the steady recipe. So the table says what somebody who pays for labels wants to know: how good
the generator is in the end, and not only how often the reward model is right. The runs are kept in the same
file as those of study/endurance.py.
"""
import numpy as np

from report import plot, show, table
from study.endurance import Case, finished, row_of, seeds_of

# (parts, steps): the reward model learns from 1 / parts of the labelled samples, for `steps` steps. The fewer
# the samples, the fewer the steps, because few samples are soon known by heart. The reward models that learn
# from all samples are those of endurance.py.
SIZES = ((320, 200), (80, 400), (20, 800), (5, 1600), (1, None))
ALL_LABELS = Case("steady", "linear", rate=2e-4, length=480)
BY_PARTS = {parts: ALL_LABELS._replace(parts=parts, reward_steps=steps) for parts, steps in SIZES}
NOT_MISMATCHED = ALL_LABELS._replace(mismatched=0)
CASES = [*BY_PARTS.values(), NOT_MISMATCHED]
ONE_SEED = [BY_PARTS[5], NOT_MISMATCHED]                    # made with one seed, to complete the picture
HEAD = ["labels", "mismatched", "seeds", "held-out accuracy, clean", "40", "120", "240", "480",
        "last quarter minus best quarter", "test videos", "by seed", "adherent"]


def cases_of(work):
    """CASES, but for those in which this preset leaves the reward model fewer than 50 samples."""
    return [case for case in CASES if work.preset["samples"] // case.parts >= 50]


def few_labels(work):
    wanted = [(seed, case) for case in cases_of(work) for seed in seeds_of(work, case, ONE_SEED)]
    report(work, finished(work, wanted))


def report(work, kept):
    """Writes the table and the curves of the runs that are kept."""
    rows, cells, curves, made = {}, [], {}, 0
    for case in cases_of(work):
        parts = [kept[case.name(seed)] for seed in work.seeds if case.name(seed) in kept]
        if not parts:
            continue
        made += len(parts)
        numbers, _ = row_of(case, parts)
        rewards = [part["reward"] for part in parts if "reward" in part]    # older runs kept no report
        labels, accuracy = "all", ""
        if rewards:
            labels = round(np.mean([reward["trained_on"] + reward["held_out"] for reward in rewards]))
            accuracy = f"{np.mean([reward['clean']['accuracy'] for reward in rewards]):.3f}"
            numbers |= {"labels": labels, "reward_accuracy": [r["clean"]["accuracy"] for r in rewards],
                        "reward_prompt_auc": [r["clean"].get("prompt_auc") for r in rewards]}
        test = numbers["qualified"]
        rows[f"{case.mismatched:g} mismatched, 1 of {case.parts}"] = numbers
        cells.append([labels, f"{case.mismatched:g}", len(parts), accuracy,
                      *(f"{np.mean(numbers['validation'][step]):.3f}" for step in (40, 120, 240, 480)),
                      show(numbers["fall"]["difference"], numbers["fall"]["interval"], "+"), show(**test),
                      " ".join(f"{value:.3f}" for value in test["seeds"]),
                      f"{numbers['adherent']['mean']:.3f}"])
        steps, means = curves.setdefault(f"{case.mismatched:g} mismatched", ([], []))
        steps.append(str(work.preset["samples"] // case.parts))
        means.append(test["mean"])
    plot(work.results / "few_labels.png",
         {"qualified test videos": ("samples that were graded", curves)})
    lines = ["Every row had 480 iterations of the steady recipe, whose learning rate falls from 2e-4 to 0. "
             "The rows differ in how many labelled samples the reward model had. A fifth of these samples, "
             "at most 400, were held out; if that is only a few, the accuracy on them is uncertain. Samples "
             "whose grade lies between good and bad have no label. They are about a fifth of the "
             f"{work.preset['samples']:,} graded samples. Mismatched: the share of each batch of the reward "
             "model that got another video's prompt and the label bad.", "", *table(HEAD, cells)]
    wanted = sum(len(seeds_of(work, case, ONE_SEED)) for case in cases_of(work))
    if made < wanted:
        lines += [f"{made} of {wanted} runs are made. The command below makes the "
                  "others.", ""]
    work.write("few_labels", "How many labels does it take?", lines, {"rows": rows})
